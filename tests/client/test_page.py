"""The page is for this machine only, read-only, and made from the status alone."""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import page
from client.status import Charged, Cost, JournalStatus, Left, Refused, Sent, Status, StudyStatus
from shared_models.contracts import REFUSALS
from shared_models.errors import MachineError

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def study(**changed: Any) -> StudyStatus:
    fields: dict[str, Any] = {
        "study": "5" * 64,
        "name": "opacity",
        "purpose": "research",
        "task": "classification",
        "net": "densenet",
        "sites": ("north", "south"),
        "num_rounds": 3,
        "expires": date(2099, 1, 1),
        "status": "approved",
        "who": "Dr. Reed",
        "when": NOON,
        "reason": None,
        "state": "running",
        "num_rounds_done": 2,
        "is_masked": False,
        "cost": Cost(epsilon=2.3712, limit=4.0, delta=0.01),
        "planned_epsilon": 3.9,
        "charged": (
            Charged(round_=0, kind="train", epsilon=1.5),
            Charged(round_=1, kind="train", epsilon=2.3712),
        ),
        "sent": (Sent(round_=0, size_bytes=5000), Sent(round_=1, size_bytes=5100)),
        "num_replies": 2,
        "num_refusals": 1,
        "sent_bytes": 10_100,
    }
    return StudyStatus.model_validate(fields | changed)


def status(**changed: Any) -> Status:
    about = {"when": NOON, "study": "5" * 64, "name": "opacity", "round_": 1, "kind": "train"}
    fields: dict[str, Any] = {
        "when": NOON,
        "name": "north",
        "coordinator": "ab" * 32,
        "is_running": True,
        "last_visit": NOON,
        "certificate_days": 80,
        "free_mb": 50_000,
        "lifetime": Cost(epsilon=2.3712, limit=8.0, delta=0.01),
        "studies": (study(),),
        "left": (Left.model_validate({**about, "size_bytes": 5000, "digest": "e" * 64}),),
        "refused": (
            Refused.model_validate({**about, "code": "budget", "meaning": REFUSALS["budget"]}),
        ),
        "num_left": 2,
        "num_refused": 1,
        "sent_bytes": 10_100,
        "journal": JournalStatus(
            num_entries=9,
            last=NOON,
            last_kind="reply",
            fault=None,
            receipt_when=NOON,
            receipt_index=7,
            num_receipts=2,
        ),
        "attention": (),
    }
    return Status.model_validate(fields | changed)


@pytest.fixture
def opened() -> Iterator[page.Opened]:
    with page.open_page(status) as found:
        yield found


def ask(
    opened: page.Opened, path: str = "/", *, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection("127.0.0.1", opened.port, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=named)
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


# --- who is answered


def test_the_page_and_its_status_are_served(opened: page.Opened) -> None:
    answer, text = ask(opened)
    assert (answer.status, answer.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
    assert text == page.render(status())
    answer, text = ask(opened, "/status.json")
    assert answer.status == 200
    assert Status.model_validate_json(text) == status()


def test_head_is_answered_without_a_body(opened: page.Opened) -> None:
    answer, text = ask(opened, method="HEAD")
    assert (answer.status, text) == (200, "")
    assert answer.getheader("Content-Length") == str(len(page.render(status()).encode()))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_only_get_and_head_are_answered(method: str, opened: page.Opened) -> None:
    assert ask(opened, method=method)[0].status == 501


@pytest.mark.parametrize("path", ["/x", "/../site.toml", "/status.json?x=1", "/page.css"])
def test_nothing_else_is_there(path: str, opened: page.Opened) -> None:
    assert ask(opened, path)[0].status == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost", ""])
def test_a_name_rebound_to_this_machine_is_not_answered(host: str, opened: page.Opened) -> None:
    answer, text = ask(opened, Host=host)
    assert answer.status == 421
    assert "opacity" not in text


def test_localhost_by_its_name_is_answered(opened: page.Opened) -> None:
    assert ask(opened, Host=f"localhost:{opened.port}")[0].status == 200


@pytest.mark.parametrize("origin", ["cross-site", "same-site"])
def test_another_pages_request_is_not_answered(origin: str, opened: page.Opened) -> None:
    answer, text = ask(opened, Sec_Fetch_Site=origin)
    assert answer.status == 403
    assert "opacity" not in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost", ""])
def test_no_address_but_this_machines_own_is_served(host: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1"), page.open_page(status, host=host):
        pass


def test_a_taken_port_is_told_with_its_cure(opened: page.Opened) -> None:
    with (
        pytest.raises(MachineError, match="--port"),
        page.open_page(status, port=opened.port),
    ):
        pass


def test_a_status_that_cannot_be_gathered_says_nothing_of_why() -> None:
    def broken() -> Status:
        raise OSError("MARKED-7731")

    with page.open_page(broken) as opened:
        answer, text = ask(opened)
    assert answer.status == 500
    assert "MARKED" not in text


def test_the_status_is_not_gathered_anew_for_every_question() -> None:
    looks = []

    def look() -> Status:
        looks.append(1)
        return status()

    with page.open_page(look) as opened:
        for _ in range(5):
            ask(opened)
    assert len(looks) <= 2


# --- what the page may do


def test_the_page_fetches_nothing_but_itself(opened: page.Opened) -> None:
    answer, text = ask(opened)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", text)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    policy = answer.getheader("Content-Security-Policy") or ""
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    for name, value in {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Server": "consilia",
    }.items():
        assert answer.getheader(name) == value


def test_the_policy_names_the_pages_own_style_and_script() -> None:
    text = page.render(status())
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert page._hash(content) in page.policy_of_content()
    assert not re.search(r"\s(style|on[a-z]+)=\"", text)


HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7*7 }}'


def test_no_text_of_the_status_is_markup() -> None:
    found = page.render(status(studies=(study(who=HOSTILE),), attention=(HOSTILE,)))
    assert "<script>alert" not in found
    assert "<img" not in found
    assert found.count("&lt;script&gt;alert(1)") == 2
    assert "{{ 7*7 }}" in found


# --- what it says


def test_an_epsilon_never_stands_without_its_unit_delta_and_accountant() -> None:
    text = " ".join(page.render(status()).split())
    assert "Epsilon per patient at delta 0.01; accountant: dp_accounting PLD" in text


def test_what_is_spent_is_rounded_up_and_what_is_left_down() -> None:
    text = page.render(status())
    assert ">2.38</text>" in text
    assert "<strong>5.62 left</strong>" in text
    assert "2.37 " not in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"is_running": False}, "not running"),
        ({"lifetime": None}, "The ledger cannot be read"),
        ({"studies": (), "left": (), "refused": ()}, "No study was offered yet"),
        ({"studies": (study(cost=None, planned_epsilon=None),)}, "WITHOUT privacy"),
        ({"studies": (study(is_masked=True),)}, "only sums are seen"),
        ({"studies": (study(status="withdrawn", reason="legal"),)}, "; legal"),
        ({"attention": ("Look here.",)}, "<li>Look here.</li>"),
        ({"last_visit": None}, "the coordinator was not visited yet"),
        ({"lifetime": Cost(epsilon=7.9, limit=8.0, delta=0.01)}, 'class="fill high"'),
    ],
)
def test_the_page_tells_it(changed: dict[str, Any], words: str) -> None:
    assert words in page.render(status(**changed))


def test_all_in_order_is_said_only_where_it_is() -> None:
    assert "All is in order" in page.render(status())
    assert "All is in order" not in page.render(status(attention=("Look here.",)))


# --- drawings


@given(st.floats(0, 20), st.floats(0.1, 20))
def test_the_gauge_never_leaves_its_ring(epsilon: float, limit: float) -> None:
    found = page.gauge(Cost(epsilon=epsilon, limit=limit, delta=0.01))
    assert 0 <= found.share <= 1
    if found.filled:
        x, y = map(float, found.filled.split()[-2:])
        assert ((x - 100) ** 2 + (y - 100) ** 2) ** 0.5 == pytest.approx(page.RADIUS, abs=0.02)
        assert y <= 100.01


@given(
    st.lists(st.integers(0, 10**10), min_size=1, max_size=40),
    st.lists(st.floats(1e-4, 50), min_size=1, max_size=40),
)
def test_drawings_stay_on_their_canvas(sizes: list[int], costs: list[float]) -> None:
    one = study(
        num_rounds=40,
        sent=tuple(Sent(round_=n, size_bytes=size) for n, size in enumerate(sizes)),
        charged=tuple(
            Charged(round_=n, kind="train", epsilon=cost) for n, cost in enumerate(sorted(costs))
        ),
    )
    for bar in page.sent_chart(one).bars:
        assert bar.x >= page.LEFT
        assert bar.x + bar.width <= page.WIDTH
        assert page.TOP - 0.1 <= bar.y <= bar.y + bar.height <= page.HEIGHT - page.FOOT + 0.1
    places = re.findall(r"([\d.-]+) ([\d.-]+)", page.spending_chart(one).path)
    assert all(0 <= float(x) <= page.WIDTH for x, _ in places)
    assert all(page.TOP - 0.1 <= float(y) <= page.HEIGHT for _, y in places)


def test_every_drawing_is_well_formed_and_described() -> None:
    drawings = re.findall(r"<svg.*?</svg>", page.render(status()), re.DOTALL)
    assert len(drawings) == 4  # the gauge, the study's meter, what was sent, what was spent
    for drawing in drawings:
        assert ElementTree.fromstring(drawing).get("aria-label")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_a_real_browser_shows_it_and_refreshes_it_under_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script and the style run under the policy, and new figures take the old ones' place."""
    looks = []

    def look() -> Status:
        looks.append(1)
        return status(num_left=1000 + len(looks), sent_bytes=5)

    monkeypatch.setattr(page, "FRESH_S", 0.0)
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options = [f"--user-data-dir={tmp_path}", "--virtual-time-budget=25000", "--timeout=20000"]
    with page.open_page(look) as opened:
        url = f"http://127.0.0.1:{opened.port}/"
        found = subprocess.run(
            [*command, *options, url], capture_output=True, text=True, timeout=120, check=True
        )
    assert "Content Security Policy" not in found.stderr
    (shown,) = re.findall(r"1,0(\d\d) replies left the building", found.stdout)
    assert 1 < int(shown) <= len(looks)
