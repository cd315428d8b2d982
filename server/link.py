"""A door: starts and watches a SuperLink (``server/fleet.py``) and speaks its control interface.

Hospitals reach its public port, which answers Flower's fleet paths and nothing else. The control
interface, which knows no passwords, listens on another port, of the loopback interface only.

Guarantees:
    When ``superlink`` is left, no process that it or its SuperLink started is left.
    What an earlier one that was killed has left running is ended before the next starts.
    Two coordinators do not run one SuperLink's folder at once.
    A bundle that sites would not obey is not submitted.
    A log that ``bound_log`` looks after takes no more than twice its limit, and a moment's growth.

Design: Flower's own commands cost more than a second each, so enrolment and submission use the
client class behind them. Flower's private modules are used here, in ``server/fleet.py``,
``server/app.py`` and ``client/agent.py`` only; ``tests/server/test_link.py`` fails when a new
Flower renames one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from server.consortium import TlsFiles
from server.fleet import UNWANTED
from shared_models.envelope import BUNDLE_FILES
from shared_models.errors import DocumentError, MachineError, RunError
from shared_models.files import locked

Request = TypeVar("Request")
Result = TypeVar("Result")

START_S = 60.0
STOP_S = 5.0
POLL_S = 0.1
MARK = "CONSILIA_SUPERLINK"  # in the environment of everything a SuperLink starts: whose it is
LOCK = "superlink.lock"
MOST_LOG_BYTES = 16 * 2**20
LOOPBACK = ip_address("127.0.0.1")

log = logging.getLogger(__name__)


class RunState(NamedTuple):
    """Where a run stands, in Flower's words: pending, starting, running, finished."""

    status: str
    sub_status: str
    details: str

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended, well or not."""
        return self.status == "finished"

    @property
    def is_completed(self) -> bool:
        """Whether the server app ended without an exception."""
        return self.is_finished and self.sub_status == "completed"


class SuperLink(NamedTuple):
    """A running SuperLink: where hospitals reach it, and where on this machine its control is.

    ``flwr_home`` holds the configuration that Flower's commands read.
    """

    address: str
    control: str
    flwr_home: Path
    log_file: Path
    process: subprocess.Popen[bytes]
    client: ControlHttpClient

    def check(self) -> None:
        """Insist that the SuperLink answers.

        Raises:
            MachineError: if it does not.
        """
        self._asked(self.client.ListNodes, ListNodesRequest())

    def register(self, public_key_line: str, name: str) -> int:
        """Admit a site's node key (OpenSSH public line) and return its node id.

        Registering a key again returns the same id.

        Raises:
            DocumentError: if the line is no EC public key.
            RunError: if the SuperLink refuses.
        """
        key = _pem(public_key_line)
        listed = self._asked(self.client.ListNodes, ListNodesRequest()).nodes_info
        known: list[int] = [node.node_id for node in listed if node.public_key == key]
        if known:
            return known[0]
        request = RegisterNodeRequest(public_key=key, name=name)
        return self._call(self.client.RegisterNode, request).node_id

    def unregister(self, node_id: int) -> None:
        """Admit a site no longer: what it asks is refused from now on.

        Its key cannot be registered again until the SuperLink is started anew.

        Raises:
            MachineError: if the SuperLink has died.
        """
        try:
            self._call(self.client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))
        except RunError as error:  # Flower stumbles over a node that never came, once it is removed
            log.debug("node %d was not unregistered: %s", node_id, error)

    def submit(
        self,
        app_dir: Path,
        run_config: Mapping[str, str | int | float | bool],
        *,
        bundle: str | None = None,
    ) -> int:
        """Start a run of the app in ``app_dir`` and return its id.

        ``bundle`` is the digest that its bundle must have; without it, any.

        Raises:
            RunError: if the bundle has another digest, or the SuperLink refuses.
        """
        packed = build_fab_from_disk(app_dir)
        fab = Fab(hashlib.sha256(packed).hexdigest(), packed, {})
        if bundle is not None and bundle != fab.hash_str:
            raise RunError(
                f"this machine packs the app bundle as {fab.hash_str[:12]}, and sites obey the one "
                f"known as {bundle[:12]}: install the versions that constraints.txt names"
            )
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config))
        )
        return self._call(self.client.StartRun, request).run_id

    def status(self, run_id: int) -> RunState:
        """Return where a run stands.

        Raises:
            MachineError: if the SuperLink has died.
            RunError: if there is no such run.
        """
        runs = self._asked(self.client.ListRuns, ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in runs:
            raise RunError(f"the SuperLink knows no run {run_id}")
        state = runs[run_id].status
        return RunState(state.status, state.sub_status, state.details)

    def stop(self, run_id: int) -> bool:
        """Stop a run; False if it had ended already."""
        try:
            return self._call(self.client.StopRun, StopRunRequest(run_id=run_id)).success
        except RunError as error:
            log.debug("run %d was not stopped: %s", run_id, error)
            return False

    def _asked(self, method: Callable[[Request], Result], request: Request) -> Result:
        """Call what changes nothing: once more, if an idle connection was closed just then."""
        try:
            return self._call(method, request)
        except MachineError as error:
            if not isinstance(error.__cause__, httpx.RemoteProtocolError):
                raise
            return self._call(method, request)

    def _call(self, method: Callable[[Request], Result], request: Request) -> Result:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            raise RunError(f"the SuperLink refused: {error.response.text[:500]}") from error
        except httpx.HTTPError as error:
            reason = _reason(self.log_file) if self.process.poll() is not None else str(error)
            raise MachineError(f"the SuperLink does not answer: {reason}") from error


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def thin_app(folder: Path) -> Path:
    """Write the app bundle's two files to ``folder``: they name what is installed, nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in BUNDLE_FILES.items():
        (folder / name).write_text(text)
    return folder


def bound_log(log_file: Path, *, most_bytes: int = MOST_LOG_BYTES) -> bool:
    """Move what a log holds to ``<name>.1`` once it is over ``most_bytes``; tell whether it was.

    Its writers append, and go on doing so at its new beginning: they hold it open, and no pipe
    stands between that a kill could break. What they say between the copy and the cut is lost.
    """
    if not log_file.exists() or log_file.stat().st_size <= most_bytes:
        return False
    earlier = log_file.with_name(f"{log_file.name}.1")
    partial = log_file.with_name(f".{log_file.name}.tmp")
    with log_file.open("rb") as source, partial.open("wb") as target:
        source.seek(-most_bytes, os.SEEK_END)
        shutil.copyfileobj(source, target)
    partial.replace(earlier)
    os.truncate(log_file, 0)
    return True


@contextmanager
def superlink(
    folder: Path, *, tls: TlsFiles, port: int, log_file: Path, host: str = "127.0.0.1"
) -> Iterator[SuperLink]:
    """Run a SuperLink for hospitals on ``host:port``; at exit nothing it started is left.

    Raises:
        MachineError: if the port is taken, another coordinator uses ``folder``, the certificate
            does not serve, or the SuperLink ends before it answers.
    """
    home = folder / "flwr"
    home.mkdir(parents=True, exist_ok=True)
    refusal = f"another coordinator runs in {folder}; stop it first"
    with locked(folder / LOCK, refusal=refusal):
        mark = _mark_of(folder)
        _end_marked(mark)
        _refuse_certificate(tls.certificate)
        _refuse_taken(host, port)
        with _started(home, mark=mark, tls=tls, host=host, port=port, log_file=log_file) as link:
            yield link


@contextmanager
def _started(
    home: Path, *, mark: str, tls: TlsFiles, host: str, port: int, log_file: Path
) -> Iterator[SuperLink]:
    control_port = free_port()
    control = f"127.0.0.1:{control_port}"
    (home / "config.toml").write_text(_connection(control, tls.authority))
    bound_log(log_file)
    with log_file.open("ab") as handle:
        process = subprocess.Popen(
            _command(tls, host=host, port=port, control_port=control_port),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=_environment(home) | {MARK: mark},
            start_new_session=True,
        )
    try:
        with _control(control, tls.authority) as client:
            link = SuperLink(_joined(host, port), control, home, log_file, process, client)
            _await_health(link, host=host, port=port)
            yield link
    finally:
        _end(process, mark=mark)


def _command(tls: TlsFiles, *, host: str, port: int, control_port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "server.fleet"),
        *("--host", host, "--port", str(port), "--control-port", str(control_port)),
        *("--authority", str(tls.authority)),
        *("--certificate", str(tls.certificate), "--key", str(tls.key)),
    ]


def _environment(home: Path) -> dict[str, str]:
    """Return an environment in which Flower stays at home and finds its own programs."""
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    proxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    direct = ",".join([*([proxied] if proxied else []), "127.0.0.1", "localhost"])
    kept = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    return kept | {
        "PATH": os.pathsep.join(programs),
        "NO_PROXY": direct,
        "no_proxy": direct,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "WARNING"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PYTHONUNBUFFERED": "1",
        "MALLOC_MMAP_THRESHOLD_": "1048576",  # glibc: what is freed of a large message goes back
    }


def _connection(address: str, authority: Path) -> str:
    return (
        "[superlink]\n"
        'default = "consilia"\n'
        "[superlink.consilia]\n"
        f"address = {json.dumps(address)}\n"
        f"root-certificates = {json.dumps(str(authority.resolve()))}\n"
    )


@contextmanager
def _control(address: str, authority: Path) -> Iterator[ControlHttpClient]:
    tls = ssl.create_default_context(cafile=authority)
    with ControlHttpClient.from_server_address(
        address, insecure=False, root_certificates=authority.read_bytes(), interceptors=[]
    ) as client:
        client._client.close()  # one that no proxy setting leads astray takes its place
        client._client = httpx.Client(verify=tls, timeout=30.0, trust_env=False)
        yield client


def _await_health(link: SuperLink, *, host: str, port: int) -> None:
    until = time.monotonic() + START_S
    while link.process.poll() is None and time.monotonic() < until:
        with suppress(httpx.HTTPError, OSError):
            link.client._client.get(f"https://{link.control}/health").raise_for_status()
            with socket.create_connection((_reached(host), port), timeout=1.0):
                return
        time.sleep(POLL_S)
    raise MachineError(
        f"the SuperLink did not start: {_reason(link.log_file)}; more in {link.log_file}"
    )


def _reason(log_file: Path) -> str:
    """Return the last line of a log that names an error, or else its last line."""
    lines = [line.strip() for line in log_file.read_text(errors="replace").splitlines()[-50:]]
    errors = [line for line in lines if "error" in line.lower()]
    return next(filter(None, reversed(errors or lines)), "it said nothing")


def _refuse_taken(host: str, port: int) -> None:
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise MachineError(
            f"port {port} of {host} cannot be used ({error.strerror}); "
            "stop what listens there or choose another port"
        ) from error


def _refuse_certificate(file: Path) -> None:
    """Refuse what the coordinator's own processes, which call 127.0.0.1, would not believe."""
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise DocumentError(f"cannot read the certificate {file}") from error
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise MachineError(f"the certificate {file} has expired; issue it anew")
    if LOOPBACK not in names.get_values_for_type(x509.IPAddress):
        raise MachineError(f"the certificate {file} does not name 127.0.0.1; issue it anew with it")


def _reached(host: str) -> str:
    """Return an address at which this machine reaches what listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _end(process: subprocess.Popen[bytes], *, mark: str) -> None:
    """Stop the SuperLink, then whatever it started: its children lead sessions of their own."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    _end_marked(mark, process)
    process.kill()
    process.wait()


def _end_marked(mark: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """End what carries ``mark``; ``process`` is a child of this process among them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + STOP_S / 2
        for pid in _marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while _marked(mark) and time.monotonic() < until:
            if process is not None:
                process.poll()
            time.sleep(0.05)


def _mark_of(folder: Path) -> str:
    """Return what marks the processes of the SuperLink of ``folder``, whoever has started it."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()


def _marked(mark: str) -> list[int]:
    """Return the processes whose environment carries ``mark`` (where there is a /proc)."""
    needle, this = f"{MARK}={mark}".encode(), os.getpid()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(entry.name) != this and needle in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _pem(public_key_line: str) -> bytes:
    try:
        key = serialization.load_ssh_public_key(public_key_line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DocumentError("expected a public key as one OpenSSH line") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DocumentError("expected an EC key, as consilia-site makes it; got another kind")
    return public_key_to_bytes(key)
