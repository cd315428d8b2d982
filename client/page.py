"""The page for hospital staff: the status, on this machine only, made from nothing else.

A small server on 127.0.0.1 that answers two questions, the page and ``/status.json``, and changes
nothing. The drawings are inline SVG whose places are computed here; the page fetches nothing but
itself, again and again, and says so when it cannot.

Guarantees:
    Nobody on another machine can open the page.
    A page of another origin that guessed the address, or rebound a name to it, is not answered.
    Only GET and HEAD are answered; nothing can be changed.
    The page is made from the status alone, and no text in it is ever markup.

Design: whoever has an account on this machine can open the page. It says what hospital staff may
know of studies, and nothing of patients.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined

from client.status import Charged, Cost, Status, StudyStatus
from shared_models.errors import MachineError
from shared_models.terminal import downward, size, upward

HOST = "127.0.0.1"
FRESH_S = 2.0  # so long the same status is shown to whoever asks
TIMEOUT_S = 10.0
REFRESH_S = 10

WIDTH, LEFT, RIGHT, TOP, FOOT = 520.0, 58.0, 12.0, 14.0, 40.0
HEIGHT = 230.0
RADIUS = 84.0

Look = Callable[[], Status]

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """A page that is being served."""

    port: int


class Tick(NamedTuple):
    """A mark on an axis: its place and what stands there."""

    at: float
    text: str


class Bar(NamedTuple):
    """What one round sent, as a rectangle, and in words."""

    x: float
    y: float
    width: float
    height: float
    spoken: str


class Chart(NamedTuple):
    """Everything the template needs to draw bars or steps over rounds."""

    title: str
    spoken: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...] = ()
    path: str = ""
    area: str = ""
    limit: Tick | None = None
    last: tuple[float, float] | None = None


class Gauge(NamedTuple):
    """Half a ring that fills as the budget is spent: its arcs, and whether it is nearly full."""

    track: str
    filled: str
    share: float
    is_high: bool


@contextmanager
def open_page(look: Look, *, port: int = 0, host: str = HOST) -> Iterator[Opened]:
    """Serve the page until the block ends.

    Raises:
        ValueError: if ``host`` is another address than 127.0.0.1.
        MachineError: if the port is taken.
    """
    if host != HOST:
        raise ValueError(f"expected {HOST}: the page is for this machine only, got another address")
    try:
        server = _Server((HOST, port), _Handler)
    except OSError as error:
        raise MachineError(f"port {port} is taken; choose another with --port") from error
    server.look = _kept(look)
    thread = threading.Thread(target=server.serve_forever, name="page", daemon=True)
    thread.start()
    try:
        yield Opened(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def render(status: Status) -> str:
    """Return the page: one HTML file that needs nothing beside it."""
    lifetime = status.lifetime
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            status=status,
            gauge=None if lifetime is None else gauge(lifetime),
            studies=sorted(status.studies, key=_by_urgency),
            costs=[one for one in status.studies if _counts(one)],
            sent=[(one, sent_chart(one)) for one in status.studies if one.sent],
            spending={one.study: spending_chart(one) for one in status.studies if one.charged},
            refresh_s=REFRESH_S,
        )
    )


def policy_of_content() -> str:
    """Return the page's Content-Security-Policy: its own style and script, nothing else."""
    style, script = (_hash(_text(name)) for name in ("page.css", "page.js"))
    return (
        f"default-src 'none'; style-src '{style}'; script-src '{script}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def gauge(cost: Cost) -> Gauge:
    """Return the arcs of a half ring around (100, 100), from the left to the right."""
    share = cost.share
    return Gauge(_arc(1.0), _arc(share) if share > 0 else "", share, share >= 0.9)


def sent_chart(study: StudyStatus) -> Chart:
    """Return the bytes that left for a study, a bar for each round."""
    by_round = {one.round_: one.size_bytes for one in study.sent}
    most = max(by_round.values(), default=0)
    up, ticks = _upward(most, text=size)
    across, width = _across(study.num_rounds + 1)
    bars = tuple(
        Bar(
            across(round_) - width / 2,
            up(sent),
            width,
            up(0) - up(sent),
            f"round {round_}: {size(sent)}",
        )
        for round_, sent in sorted(by_round.items())
    )
    spoken = f"Bytes sent in each round of {study.name}. " + "; ".join(b.spoken for b in bars)
    return Chart("Sent, round by round", spoken, _rounds(study.num_rounds + 1, across), ticks, bars)


def spending_chart(study: StudyStatus) -> Chart:
    """Return the epsilon of a study after each charge, in steps, under its limit."""
    most = max(one.epsilon for one in study.charged)
    limit = None if study.cost is None else study.cost.limit
    up, ticks = _upward(max(most, limit or 0.0), text=lambda value: f"{value:g}")
    across, _ = _across(study.num_rounds + 1)
    places = _steps(study.charged, across, up)
    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    area = f"{path} L{places[-1][0]:.1f} {up(0):.1f} L{places[0][0]:.1f} {up(0):.1f} Z"
    spoken = f"Epsilon of {study.name} after each round, at last {study.charged[-1].epsilon:g}"
    return Chart(
        "Epsilon after each round",
        spoken,
        _rounds(study.num_rounds + 1, across),
        ticks,
        path=path,
        area=area,
        limit=None if limit is None else Tick(up(limit), f"limit {limit:g}"),
        last=places[-1],
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    look: Look


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of the two paths, to a browser that asked this very machine."""

    server: _Server
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        """Answer a question."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer the same without the body."""
        self._answer(with_body=False)

    def version_string(self) -> str:
        """Return what the server calls itself: nothing of its versions."""
        return "consilia"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say what was asked for debugging only, and nothing of the words of whoever asked."""
        log.debug("the page was asked for")

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            return self._send(421, "text/plain", b"expected 127.0.0.1\n", with_body=with_body)
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return self._send(403, "text/plain", b"another page asked\n", with_body=with_body)
        makers = {"/": ("text/html", render), "/status.json": ("application/json", _json)}
        if self.path not in makers:
            return self._send(
                404, "text/plain", b"there is / and /status.json\n", with_body=with_body
            )
        kind, make = makers[self.path]
        try:
            body = make(self.server.look()).encode()
        except Exception as error:
            log.error("the status cannot be gathered: %s", type(error).__name__)
            text = b"the status cannot be gathered; see the page's log\n"
            return self._send(500, "text/plain", text, with_body=with_body)
        return self._send(200, kind, body, with_body=with_body)

    def _send(self, code: int, kind: str, body: bytes, *, with_body: bool) -> None:
        self.send_response(code)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": policy_of_content(),
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _kept(look: Look) -> Look:
    """Return ``look`` that looks again only after a moment, one at a time."""
    lock, kept = threading.Lock(), list[tuple[float, Status]]()

    def look_again() -> Status:
        with lock:
            if not kept or time.monotonic() > kept[0][0] + FRESH_S:
                kept[:] = [(time.monotonic(), look())]
            return kept[0][1]

    return look_again


def _json(status: Status) -> str:
    return status.model_dump_json()


def _by_urgency(one: StudyStatus) -> tuple[int, str]:
    order = {"offered": 0, "approved": 1, "withdrawn": 2, "refused": 3, "expired": 4, "closed": 4}
    return order[one.status], one.name


def _counts(one: StudyStatus) -> bool:
    """Tell whether a study's budget is worth a line: it was charged, or may be."""
    return one.cost is not None and (one.cost.epsilon > 0 or not one.is_over)


def _arc(share: float) -> str:
    angle = math.pi * (1 - min(share, 1.0))
    x, y = 100 + RADIUS * math.cos(angle), 100 - RADIUS * math.sin(angle)
    return f"M{100 - RADIUS:.2f} 100 A{RADIUS:g} {RADIUS:g} 0 0 1 {x:.2f} {y:.2f}"


def _across(num: int) -> tuple[Callable[[int], float], float]:
    """Return the middle of each of ``num`` places along the axis, and the width of a bar."""
    step = (WIDTH - LEFT - RIGHT) / num
    return (lambda index: LEFT + (index + 0.5) * step), min(0.72 * step, 34.0)


def _upward(
    most: float, *, text: Callable[[float], str]
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """Return the place of a value, and marks at round ones from 0."""
    step = _round_step(most / 4) if most > 0 else 1.0
    top = step * max(math.ceil(most / step - 1e-9), 1)
    bottom = HEIGHT - FOOT

    def up(value: float) -> float:
        return bottom - (bottom - TOP) * value / top

    values = [step * number for number in range(round(top / step) + 1)]
    return up, tuple(Tick(up(value), text(round(value, 9))) for value in values)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least * 0.999)


def _rounds(num: int, across: Callable[[int], float]) -> tuple[Tick, ...]:
    every = max(math.ceil(num / 10), 1)
    return tuple(Tick(across(round_), str(round_)) for round_ in range(0, num, every))


def _steps(
    charged: Sequence[Charged], across: Callable[[int], float], up: Callable[[float], float]
) -> list[tuple[float, float]]:
    """Return the corners of a staircase that climbs at each charge."""
    places = [(across(0) - 8, up(0))]
    for one in charged:
        x = across(one.round_)
        places += [(x, places[-1][1]), (x, up(one.epsilon))]
    return [*places, (min(places[-1][0] + 8, WIDTH - RIGHT), places[-1][1])]


def _text(name: str) -> str:
    return (files("client") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "when": _when, "upward": upward, "downward": downward}
    environment.globals |= {"style": _markup("page.css"), "script": _markup("page.js")}
    return environment


def _markup(name: str) -> Any:
    from markupsafe import Markup

    return Markup(_text(name))  # our own file, as it is


def _when(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}"
