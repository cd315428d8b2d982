"""A door: starts and watches a stock ``flower-superlink`` and speaks its control interface.

The SuperLink listens on the loopback interface only: its control interface knows no passwords, so
whoever reaches the port may submit runs. Hospitals on other machines need a gate in front of it
that passes ``/v1/fleet/`` and nothing else; there is none yet, so they cannot reach it.

Guarantees:
    When ``superlink`` is left, no process that it or its SuperLink started is left.

Design: Flower's own commands cost more than a second each, so enrolment and submission use the
client class behind them. Flower's private modules are used here, in ``server/app.py`` and in
``client/agent.py`` only; ``tests/server/test_link.py`` fails when a new Flower renames one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx
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
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from server.consortium import TlsFiles
from shared_models.envelope import BUNDLE_FILES
from shared_models.errors import DocumentError, MachineError, RunError

Request = TypeVar("Request")
Result = TypeVar("Result")

START_S = 60.0
STOP_S = 5.0
POLL_S = 0.1
MARK = "CONSILIA_SUPERLINK"  # in the environment of everything a SuperLink starts

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
    """A running SuperLink; ``flwr_home`` holds the configuration that Flower's commands read."""

    address: str
    flwr_home: Path
    log_file: Path
    process: subprocess.Popen[bytes]
    client: ControlHttpClient

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

    def submit(self, app_dir: Path, run_config: Mapping[str, str | int | float | bool]) -> int:
        """Start a run of the app in ``app_dir`` and return its id.

        Raises:
            RunError: if the SuperLink refuses.
        """
        bundle = build_fab_from_disk(app_dir)
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
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


@contextmanager
def superlink(folder: Path, *, tls: TlsFiles, port: int, log_file: Path) -> Iterator[SuperLink]:
    """Run a SuperLink on ``127.0.0.1:port``; at exit nothing it started is left.

    Raises:
        MachineError: if the port is taken, or the SuperLink ends before it answers.
    """
    _refuse_taken(port)
    home = folder / "flwr"
    home.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{port}"
    (home / "config.toml").write_text(_connection(address, tls.authority))
    mark = secrets.token_hex(16)
    with log_file.open("ab") as handle:
        process = subprocess.Popen(
            _command(tls, port=port),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=_environment(home) | {MARK: mark},
            start_new_session=True,
        )
    try:
        with _control(address, tls.authority) as client:
            link = SuperLink(address, home, log_file, process, client)
            _await_health(link)
            yield link
    finally:
        _end(process, mark=mark)


def _command(tls: TlsFiles, *, port: int) -> list[str]:
    program = Path(sys.executable).with_name("flower-superlink")
    if not program.exists():
        raise MachineError(f"expected {program}; install flwr beside this Python")
    return [
        str(program),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", str(tls.authority)),
        *("--ssl-certfile", str(tls.certificate), "--ssl-keyfile", str(tls.key)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]


def _environment(home: Path) -> dict[str, str]:
    """Return an environment in which Flower stays at home and finds its own programs."""
    programs = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    proxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    direct = ",".join([*([proxied] if proxied else []), "127.0.0.1", "localhost"])
    return dict(os.environ) | {
        "PATH": os.pathsep.join(programs),
        "NO_PROXY": direct,
        "no_proxy": direct,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOG_LEVEL": os.environ.get("FLWR_LOG_LEVEL", "WARNING"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PYTHONUNBUFFERED": "1",
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


def _await_health(link: SuperLink) -> None:
    until = time.monotonic() + START_S
    while link.process.poll() is None and time.monotonic() < until:
        with suppress(httpx.HTTPError):
            if link.client._client.get(f"https://{link.address}/health").is_success:
                return
        time.sleep(POLL_S)
    raise MachineError(
        f"flower-superlink did not start: {_reason(link.log_file)}; more in {link.log_file}"
    )


def _reason(log_file: Path) -> str:
    """Return the last line of a log that names an error, or else its last line."""
    lines = [line.strip() for line in log_file.read_text(errors="replace").splitlines()[-50:]]
    errors = [line for line in lines if "error" in line.lower()]
    return next(filter(None, reversed(errors or lines)), "it said nothing")


def _refuse_taken(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise MachineError(
                f"port {port} of 127.0.0.1 cannot be used ({error.strerror}); "
                "stop what listens there or choose another port"
            ) from error


def _end(process: subprocess.Popen[bytes], *, mark: str) -> None:
    """Stop the SuperLink, then whatever it started: its children lead sessions of their own."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + STOP_S / 2
        for pid in _marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        while _marked(mark) and time.monotonic() < until:
            process.poll()
            time.sleep(0.05)
    process.kill()
    process.wait()


def _marked(mark: str) -> list[int]:
    """Return the processes whose environment carries ``mark`` (where there is a /proc)."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if needle in (entry / "environ").read_bytes().split(b"\0"):
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
