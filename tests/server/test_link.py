from __future__ import annotations

import hashlib
import inspect
import io
import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import zipfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.grid.http_grid import HttpGrid

from server import link
from server.consortium import TlsFiles, certificates
from shared_models.envelope import BUNDLE_DIGEST
from shared_models.errors import DocumentError, MachineError, RunError
from shared_models.files import locked


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return certificates(tmp_path / "tls", hosts=["127.0.0.1", "coordinator.example.org"])


def certificate_in(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def test_the_certificate_names_its_hosts_and_its_authority(tls: TlsFiles) -> None:
    authority, certificate = certificate_in(tls.authority), certificate_in(tls.certificate)
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example.org"]
    assert [str(name) for name in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    lives = [
        made.not_valid_after_utc - made.not_valid_before_utc for made in (certificate, authority)
    ]
    assert [life // timedelta(days=1) for life in lives] == [397, 3653]


def test_a_private_key_is_readable_by_its_owner_alone(tls: TlsFiles) -> None:
    keys = [tls.key, tls.key.with_name("ca.key")]
    assert [stat.S_IMODE(key.stat().st_mode) for key in keys] == [0o600, 0o600]


def test_a_certificate_is_renewed_by_the_same_authority(tmp_path: Path, tls: TlsFiles) -> None:
    before = tls.authority.read_bytes(), tls.certificate.read_bytes()
    renewed = certificates(tmp_path / "tls", hosts=["127.0.0.1"])
    assert renewed == tls
    assert renewed.authority.read_bytes() == before[0]
    assert renewed.certificate.read_bytes() != before[1]


def test_a_strict_client_accepts_the_certificate(tls: TlsFiles) -> None:
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.create_default_context(cafile=tls.authority),
    )
    server.load_cert_chain(tls.certificate, tls.key)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname="coordinator.example.org"),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    done = [False, False]
    for turn in range(10):
        try:
            ends[turn % 2].do_handshake()
            done[turn % 2] = True
        except ssl.SSLWantReadError:
            continue
    assert done == [True, True]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_holds_no_code(tmp_path: Path) -> None:
    bundle = build_fab_from_disk(link.thin_app(tmp_path / "app"))
    names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert sorted(names) == [".info/CONTENT", "LICENSE", "pyproject.toml"]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_is_the_same_bytes_whatever_compresses_on_this_machine(tmp_path: Path) -> None:
    bundle = build_fab_from_disk(link.thin_app(tmp_path / "app"))
    packed = zipfile.ZipFile(io.BytesIO(bundle)).infolist()
    assert {entry.compress_type for entry in packed} == {zipfile.ZIP_STORED}
    assert {entry.date_time[:3] for entry in packed} == {(2024, 10, 1)}
    assert hashlib.sha256(bundle).hexdigest() == BUNDLE_DIGEST


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_a_bundle_that_sites_would_not_obey_is_not_submitted(tmp_path: Path) -> None:
    started = list[str]()

    def start(request: StartRunRequest) -> SimpleNamespace:
        started.append(request.fab.hash_str)
        return SimpleNamespace(run_id=7)

    client: Any = SimpleNamespace(StartRun=start)
    process: Any = SimpleNamespace(poll=lambda: None)
    superlink = link.SuperLink("", "", tmp_path, tmp_path / "log", process, client)
    app_dir = link.thin_app(tmp_path / "app")
    assert superlink.submit(app_dir, {}, bundle=BUNDLE_DIGEST) == 7
    (app_dir / "LICENSE").write_text("Another licence.")
    with pytest.raises(RunError, match=r"packs the app bundle as .* constraints\.txt"):
        superlink.submit(app_dir, {}, bundle=BUNDLE_DIGEST)
    assert started == [BUNDLE_DIGEST]


def test_a_taken_port_is_told_with_its_cure(tmp_path: Path, tls: TlsFiles) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(MachineError, match=rf"port {port}.*choose another port"),
            link.superlink(tmp_path, tls=tls, port=port, log_file=tmp_path / "log"),
        ):
            pytest.fail("it started")


def test_a_superlink_that_does_not_start_says_why(tmp_path: Path, tls: TlsFiles) -> None:
    broken = tls._replace(key=tls.authority)
    with (
        pytest.raises(MachineError, match=r"did not start: .*SSL"),
        link.superlink(tmp_path, tls=broken, port=link.free_port(), log_file=tmp_path / "log"),
    ):
        pytest.fail("it started")


def test_a_certificate_that_the_coordinators_own_processes_would_not_believe_is_refused(
    tmp_path: Path, tls: TlsFiles
) -> None:
    elsewhere = certificates(tmp_path / "tls", hosts=["coordinator.example.org"])
    with pytest.raises(MachineError, match=r"does not name 127\.0\.0\.1; issue it anew"):
        link._refuse_certificate(elsewhere.certificate)
    with pytest.raises(DocumentError, match="cannot read the certificate"):
        link._refuse_certificate(elsewhere.key)


def test_two_coordinators_do_not_run_one_folder_at_once(tmp_path: Path, tls: TlsFiles) -> None:
    with (
        locked(tmp_path / link.LOCK, refusal="held"),
        pytest.raises(MachineError, match=rf"another coordinator .*stop it .*{os.getpid()}"),
        link.superlink(tmp_path, tls=tls, port=link.free_port(), log_file=tmp_path / "log"),
    ):
        pytest.fail("it started")


def test_what_an_earlier_coordinator_left_running_is_ended_first(
    tmp_path: Path, tls: TlsFiles
) -> None:
    """It was killed, so nothing but the mark tells whose this process is."""
    broken = tls._replace(certificate=tls.key)
    environment = os.environ | {link.MARK: link._mark_of(tmp_path)}
    with subprocess.Popen(["sleep", "60"], env=environment, start_new_session=True) as left:
        reaper = threading.Thread(target=left.wait)
        reaper.start()
        wait_for_mark(tmp_path)
        with (
            pytest.raises(DocumentError, match="certificate"),
            link.superlink(tmp_path, tls=broken, port=link.free_port(), log_file=tmp_path / "log"),
        ):
            pytest.fail("it started")
        reaper.join(10)
        assert left.returncode is not None


def wait_for_mark(folder: Path) -> None:
    until = time.monotonic() + 10
    while not link._marked(link._mark_of(folder)):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_log_over_its_limit_is_moved_while_its_writer_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "superlink.log"
    assert not link.bound_log(file, most_bytes=1000), "there is none"
    line = "import sys\nfor each in sys.stdin: print(each * 100, end='', flush=True)\n"
    with file.open("ab") as handle:
        command = [sys.executable, "-c", line]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=handle, text=True)
    with writer:
        assert writer.stdin is not None

        def say(word: str) -> None:
            before = file.stat().st_size
            print(word, file=writer.stdin, flush=True)
            until = time.monotonic() + 20
            while file.stat().st_size < before + 600:
                assert time.monotonic() < until
                time.sleep(0.01)

        say("first")
        assert not link.bound_log(file, most_bytes=1000)
        say("again")
        assert link.bound_log(file, most_bytes=1000)
        assert file.read_bytes() == b""
        say("later")
        assert file.read_text() == "later\n" * 100, "no gap where the earlier lines were"
        earlier = (tmp_path / "superlink.log.1").read_text()
        assert len(earlier) == 1000
        assert earlier.endswith("again\n" * 100)
        say("later")
        assert link.bound_log(file, most_bytes=1000)
        assert "again" not in (tmp_path / "superlink.log.1").read_text()
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        "superlink.log",
        "superlink.log.1",
    ]


def test_flower_stays_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
    environment = link._environment(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["no_proxy"] == environment["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert "FLWR_INTERNAL_GRPC_CONTROL_API" not in environment


@pytest.mark.parametrize("line", ["", "nonsense", "ssh-ed25519 AAAA"])
def test_what_is_no_ec_key_is_not_registered(line: str) -> None:
    with pytest.raises(DocumentError, match="expected"):
        link._pem(line)


def test_an_ed25519_key_is_not_registered() -> None:
    public = ed25519.Ed25519PrivateKey.generate().public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with pytest.raises(DocumentError, match="EC key"):
        link._pem(line.decode())


def test_processes_are_found_by_their_mark() -> None:
    environment = os.environ | {link.MARK: "this one"}
    with subprocess.Popen(["sleep", "30"], env=environment, start_new_session=True) as process:
        started = time.monotonic()  # the kernel shows a new program's environment a little later
        while not link._marked("this one") and time.monotonic() - started < 10:
            time.sleep(0.01)
        assert link._marked("this one") == [process.pid]
        assert link._marked("this") == []
        link._end(process, mark="this one")
    assert link._marked("this one") == []


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (build_fab_from_disk, ["app"]),
        (Fab, ["hash_str", "content", "verifications"]),
        (fab_to_proto, ["fab"]),
        (user_config_to_proto, ["user_config"]),
        (public_key_to_bytes, ["public_key"]),
        *[
            (getattr(ControlHttpClient, name), ["self", "request"])
            for name in (
                "RegisterNode",
                "UnregisterNode",
                "ListNodes",
                "StartRun",
                "ListRuns",
                "StopRun",
            )
        ],
        (iterate_object_tree, ["tree"]),
        (make_pull_object_fn_protobuf, ["pull_object_protobuf", "node", "run_id"]),
        (
            make_push_object_fn_protobuf,
            ["push_object_protobuf", "node", "run_id", "session_id"],
        ),
        (
            inflate_object_from_contents,
            ["object_id", "object_contents", "keep_object_contents", "objects"],
        ),
        (
            pull_objects,
            [
                "object_ids",
                "pull_object_fn",
                "max_concurrent_pulls",
                "max_time",
                "max_tries_per_object",
                "initial_backoff",
                "backoff_cap",
            ],
        ),
        (HttpGrid.get_nodes, ["self"]),
    ],
)
def test_flower_still_has_what_the_coordinator_uses(function: Any, parameters: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("request_type", "fields"),
    [
        (RegisterNodeRequest, {"public_key", "name"}),
        (UnregisterNodeRequest, {"node_id"}),
        (StartRunRequest, {"fab", "override_config"}),
        (ListRunsRequest, {"run_id"}),
        (StopRunRequest, {"run_id"}),
        (PullAppMessagesRequest, {"message_ids"}),
        (PushAppMessagesRequest, {"messages_list", "message_object_trees"}),
        (PushObjectRequest, {"node", "run_id", "session_id", "object_id", "object_content"}),
        (NodeInfo, {"node_id", "public_key", "online_until", "last_activated_at"}),
    ],
)
def test_flower_still_asks_for_the_same_fields(request_type: Any, fields: set[str]) -> None:
    assert fields <= set(request_type.DESCRIPTOR.fields_by_name)


def test_flowers_grid_still_has_the_parts_below_its_calls() -> None:
    assert isinstance(inspect.getattr_static(HttpGrid, "_runtime_client"), property)
    assert isinstance(inspect.getattr_static(HttpGrid, "run"), property)
    assert HttpGrid(token="token").node.node_id == 1  # what the SuperLink calls itself
