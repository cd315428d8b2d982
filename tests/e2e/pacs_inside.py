"""Acquisition against a real Orthanc and against dcmtk; ``test_pacs.py`` runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
import pytest
import requests
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.association import Association

from client.ingest import catalogue, dimse, sources, web
from client.ingest.pacs import DimsePacs, Query, Series, Station, WebPacs
from client.predict import predict
from client.setup import config_text
from server.link import free_port
from server.release import release
from shared_models import nets, phantoms
from shared_models.contracts import ValidationReport
from shared_models.errors import ConsiliaError, MachineError
from shared_models.nets.base import weights_of
from shared_models.plan import SignedPlan, StudyPlan
from shared_models.signing import create_key, digest, public_key, sign
from shared_models.weights import digest as weights_digest
from shared_models.weights import flatten

PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
PASSWORD = "MARKED-7731"


class Pacs(NamedTuple):
    """A running Orthanc, what it holds by SOP instance, and our station it knows."""

    web: WebPacs
    dimse: DimsePacs
    station: Station
    files: dict[str, Path]


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pacs]:
    folder = tmp_path_factory.mktemp("pacs")
    http, dicom, own = free_port(), free_port(), free_port()
    settings = {
        "Plugins": [PLUGIN],
        "HttpPort": http,
        "DicomPort": dicom,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": True,
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "HttpCompressionEnabled": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"agent": PASSWORD},
        "DicomAlwaysAllowEcho": False,
        "DicomAlwaysAllowStore": False,
        "DicomAlwaysAllowFind": False,
        "DicomAlwaysAllowGet": False,
        "DicomAlwaysAllowMove": False,
        "DicomModalities": {
            "agent": {
                "AET": "CONSILIA",
                "Host": "127.0.0.1",
                "Port": own,
                **{f"Allow{what}": True for what in ("Echo", "Find", "Get", "Move", "Store")},
            }
        },
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    (folder / "password").write_text(PASSWORD)
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen(
            ["Orthanc", str(folder / "orthanc.json")],
            stdout=log,
            stderr=log,
            env=os.environ | {"TCP_NODELAY": "1"},
        )
    address = f"http://127.0.0.1:{http}/dicom-web"
    found = Pacs(
        WebPacs(address=address, user="agent", password=folder / "password"),
        DimsePacs(title="ORTHANC", host="127.0.0.1", port=dicom),
        Station(port=own, bind="127.0.0.1", reserve_mb=0),
        filled(folder / "phantoms"),
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                dimse.echo(found.dimse, found.station)
                break
            except ConsiliaError:
                assert process.poll() is None, (folder / "orthanc.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        files = [str(file) for file in found.files.values()]
        store(files, port=dicom, called="ORTHANC", calling="CONSILIA")
        yield found
    finally:
        process.terminate()
        process.wait(20)


def filled(folder: Path) -> dict[str, Path]:
    """Write a hospital of phantoms and return its files by SOP instance."""
    (site, *_) = phantoms.write_hospitals(folder, seed=1, num_patients=20)
    series = sorted({file.parent for file in site.rglob("*.dcm")})[:4]
    return {
        str(pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID): file
        for one in series
        for file in sorted(one.glob("*.dcm"))
    }


def store(files: list[str], *, port: int, called: str, calling: str) -> int:
    """Send files with dcmtk's storescu."""
    command = ["storescu", "-xs", "-aet", calling, "-aec", called, "127.0.0.1", str(port), *files]
    environment = os.environ | {"TCP_NODELAY": "1"}
    return subprocess.run(command, capture_output=True, env=environment).returncode


def series_of(pacs: Pacs) -> dict[str, int]:
    """Return how many files there are of each series."""
    counts: dict[str, int] = {}
    for file in pacs.files.values():
        uid = str(pydicom.dcmread(file, stop_before_pixels=True).SeriesInstanceUID)
        counts[uid] = counts.get(uid, 0) + 1
    return counts


def arrived(arrivals: Iterator[sources.Arrival]) -> dict[str, pydicom.Dataset]:
    found = {}
    for arrival in arrivals:
        dataset = arrival.read()
        assert str(dataset.SOPInstanceUID) not in found, "an instance came twice"
        found[str(dataset.SOPInstanceUID)] = dataset
        arrival.done()
    return found


def same(pacs: Pacs, found: dict[str, pydicom.Dataset]) -> None:
    assert found.keys() == pacs.files.keys()
    for uid, dataset in found.items():
        sent = pydicom.dcmread(pacs.files[uid])
        assert dataset.PixelData == sent.PixelData
        assert dataset == sent


# --- asking


@pytest.mark.parametrize("way", ["web", "dimse"])
def test_a_search_finds_every_series_once(pacs: Pacs, way: str) -> None:
    found = searched(pacs, way, Query())
    assert {one.series: one.num_instances for one in found} == series_of(pacs)


def searched(pacs: Pacs, way: str, query: Query) -> list[Series]:
    if way == "web":
        return web.search(pacs.web, query)
    return dimse.search(pacs.dimse, pacs.station, query)


@pytest.mark.parametrize("way", ["web", "dimse"])
def test_a_query_narrows_the_search(pacs: Pacs, way: str) -> None:
    (one, *_) = searched(pacs, way, Query())
    first = searched(pacs, way, Query(studies=(one.study,)))
    assert [found.study for found in first] == [one.study]
    assert searched(pacs, way, Query(modalities=("MG",))) == []
    assert len(searched(pacs, way, Query(modalities=("CT",)))) == len(series_of(pacs))
    assert searched(pacs, way, Query.model_validate({"since": "2150-01-01"})) == []


def test_no_answer_is_lost_on_a_busy_machine(pacs: Pacs) -> None:
    """With pynetdicom's own event about one search in twenty misses a series."""
    ended = threading.Event()

    def busy() -> None:
        while not ended.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            assert len(searched(pacs, "dimse", Query())) == len(series_of(pacs))
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_the_event_that_is_replaced_is_still_there() -> None:
    assert isinstance(Association(AE(), "requestor")._reactor_checkpoint, threading.Event)


def test_dicomweb_brings_what_is_stored(pacs: Pacs) -> None:
    same(pacs, arrived(web.pull(pacs.web, Query())))


@pytest.mark.parametrize("retrieve", ["move", "get"])
def test_dimse_brings_what_is_stored(pacs: Pacs, retrieve: str, tmp_path: Path) -> None:
    asked = pacs.dimse.model_copy(update={"retrieve": retrieve})
    told: list[tuple[int, int]] = []
    moved = dimse.pull(
        asked, pacs.station, Query(), tmp_path, advance=lambda *seen: told.append(seen)
    )
    assert moved == (len(series_of(pacs)), 0)
    assert told[-1] == (4, 4)
    same(pacs, arrived(sources.inbox(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["web", "dimse"])
def test_a_series_that_is_here_whole_is_not_fetched(pacs: Pacs, way: str, tmp_path: Path) -> None:
    here = sorted(series_of(pacs))[0]

    def is_whole(series: Series) -> bool:
        return series.series == here

    if way == "web":
        found = arrived(web.pull(pacs.web, Query(), is_whole=is_whole))
    else:
        dimse.pull(pacs.dimse, pacs.station, Query(), tmp_path, is_whole=is_whole)
        found = arrived(sources.inbox(tmp_path))
    assert len(found) == len(pacs.files) - series_of(pacs)[here]
    assert here not in {str(dataset.SeriesInstanceUID) for dataset in found.values()}


# --- giving back what a model says


def test_what_a_model_says_is_taken_back_byte_for_byte(pacs: Pacs, tmp_path: Path) -> None:
    study = next(iter(pacs.files.values())).parent
    key = Ed25519PrivateKey.generate()
    released(tmp_path / "model", key)
    found = predict(tmp_path / "model", study, tmp_path / "out", coordinator=public_key(key))
    sent = {
        str(dataset.SOPInstanceUID): dataset
        for dataset in (pydicom.dcmread(tmp_path / "out" / name) for name in found.files)
    }
    assert [dataset.Modality for dataset in sent.values()][:2] == ["SEG", "SR"]
    files = [str(tmp_path / "out" / name) for name in found.files]
    try:
        command = ["storescu", "-R", "-aet", "CONSILIA", "-aec", "ORTHANC"]  # -R: what these need
        command += ["127.0.0.1", str(pacs.dimse.port), *files]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        series = {str(dataset.StudyInstanceUID) for dataset in sent.values()}
        here = arrived(web.pull(pacs.web, Query(studies=tuple(series))))
        assert len(series) == 1 and len(here) == len(list(study.iterdir())) + len(sent)
        for uid, dataset in sent.items():
            assert here[uid] == dataset
    finally:
        for uid in sent:
            forget(pacs, uid)


def released(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write a release of a small net for CT, with weights as drawn."""
    plan = StudyPlan.model_validate(
        {
            "name": "organs",
            "purpose": "research",
            "coordinator": public_key(key),
            "sites": ["north"],
            "expires": "2099-01-01",
            "task": {"name": "segmentation", "params": {"classes": ["organ", "lesion"]}},
            "net": {"name": "unet", "params": {"channels": [4, 8], "strides": [2]}},
            "imaging": [{"name": "resize", "params": {"size": [32, 32]}}],
            "strategy": {"name": "fedavg"},
            "training": {
                "num_rounds": 1,
                "steps_per_round": 1,
                "sample_rate": 0.1,
                "learning_rate": 0.01,
            },
            "rounds": {"quorum": 1},
        }
    )
    weights = weights_of(nets.make("unet", plan.net.params, seed=3, num_outputs=3))
    validation = ValidationReport(
        study=digest(plan),
        weights_digest=weights_digest(flatten(weights)),
        metrics={},
        num_patients=0,
        num_images=0,
    )
    signed = SignedPlan(plan, sign(plan, key=key))
    release(folder, signed, weights, validation=validation, sites=(), key=key, modalities=("CT",))


def forget(pacs: Pacs, uid: str) -> None:
    """Take an instance out of the PACS again."""
    root = pacs.web.address.removesuffix("/dicom-web")
    with requests.Session() as session:
        session.auth = ("agent", PASSWORD)
        for found in session.post(f"{root}/tools/lookup", data=uid, timeout=20).json():
            session.delete(root + found["Path"], timeout=20).raise_for_status()


# --- by the command, into the store


def test_the_command_takes_a_pacs_in_once(pacs: Pacs, tmp_path: Path) -> None:
    """Over DICOMweb everything comes; over DIMSE, and again, there is nothing left to ask for."""
    create_key(write_site(pacs, tmp_path) / "keys" / "signing.pem")
    first = ingested(tmp_path, "--web")
    assert (first["files"], first["new"]) == (len(pacs.files), len(series_of(pacs)))
    assert first["refused"] == {}
    before = stored(tmp_path)
    assert len(before) == len(pacs.files)
    for way in ("--pacs", "--web"):
        again = ingested(tmp_path, way)
        assert (again["files"], again["new"], again["changed"]) == (0, 0, 0)
    assert stored(tmp_path) == before
    with catalogue.opened(tmp_path / "ingest" / "private" / "catalogue.sqlite") as connection:
        one = catalogue.listed(connection)[0].volume
        connection.execute("UPDATE series SET state = 'refused', reason = 'incomplete'")
        uids = connection.execute("SELECT uid FROM instances WHERE series = ?", (one.series,))
        gone = uids.fetchall()[0]
        connection.execute("DELETE FROM instances WHERE uid = ?", gone)
    again = ingested(tmp_path, "--pacs")  # what is not here whole is asked for
    assert again["files"] == len(pacs.files)
    assert (again["accepted"], again["refused"]) == (len(series_of(pacs)), {})
    assert stored(tmp_path) == before
    assert list((tmp_path / "ingest" / "private" / "inbox").iterdir()) == []


def write_site(pacs: Pacs, folder: Path) -> Path:
    """Write a site that knows the PACS."""
    (folder / "keys").mkdir()
    text = config_text(
        name="north",
        coordinator="3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29",
        address="fl.example.org:443",
        root_certificates="ca.pem",
        manifest="ingest/store/manifest.csv",
        root="ingest/store",
    )
    table = tomllib.loads(text)
    table["pacs"] = {
        "web": pacs.web.model_dump(mode="json", exclude_none=True),
        "dimse": pacs.dimse.model_dump(mode="json"),
        "station": pacs.station.model_dump(mode="json"),
    }
    (folder / "site.toml").write_text(tomli_w.dumps(table))
    return folder


def ingested(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "client.cli", "ingest", *arguments, "--json", "report.json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def stored(folder: Path) -> dict[str, bytes]:
    root = folder / "ingest" / "store"
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*.dcm")}


# --- being sent


def test_a_pushed_image_is_kept_byte_for_byte(pacs: Pacs, tmp_path: Path) -> None:
    with dimse.receiving(pacs.station, tmp_path, also=("SCANNER",)):
        files = [str(file) for file in pacs.files.values()]
        assert store(files, port=pacs.station.port, called="CONSILIA", calling="SCANNER") == 0
    same(pacs, arrived(sources.inbox(tmp_path)))


@pytest.mark.parametrize(("called", "calling"), [("CONSILIA", "STRANGER"), ("OTHER", "SCANNER")])
def test_a_stranger_may_not_send(pacs: Pacs, tmp_path: Path, called: str, calling: str) -> None:
    file = str(next(iter(pacs.files.values())))
    with dimse.receiving(pacs.station, tmp_path, also=("SCANNER",)):
        assert store([file], port=pacs.station.port, called=called, calling=calling) != 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_refuses_images(
    pacs: Pacs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = pacs.station.model_copy(update={"reserve_mb": 2**40})
    file = str(next(iter(pacs.files.values())))
    with dimse.receiving(full, tmp_path, also=("SCANNER",)):
        assert store([file], port=full.port, called="CONSILIA", calling="SCANNER") != 0
    assert list(tmp_path.iterdir()) == []
    assert "less space is left" in caplog.text


def test_a_port_that_is_taken_is_told(pacs: Pacs, tmp_path: Path) -> None:
    with (
        dimse.receiving(pacs.station, tmp_path, also=("SCANNER",)),
        pytest.raises(MachineError, match="cannot be listened on"),
        dimse.receiving(pacs.station, tmp_path, also=("SCANNER",)),
    ):
        pass


SENDING = ["storescu", "-v", "-xs", "-aet", "SCANNER", "-aec", "CONSILIA"]
RECEIVER = """\
import sys, threading
from pathlib import Path
from client.ingest import dimse
from client.ingest.pacs import Station
station = Station(port=int(sys.argv[1]), bind="127.0.0.1", reserve_mb=0, senders=("SCANNER",))
with dimse.receiving(station, Path(sys.argv[2])):
    print("ready", flush=True)
    threading.Event().wait()
"""


def test_a_receiver_that_is_killed_loses_nothing_it_acknowledged(
    pacs: Pacs, tmp_path: Path
) -> None:
    """What the sender was told is here, is here whole; sent again, it is the same images."""
    inbox, port = tmp_path / "inbox", pacs.station.port
    files = many(pacs, tmp_path / "many", number=150)
    acknowledged = 0
    for attempt in range(2):
        receiver = subprocess.Popen(
            [sys.executable, "-c", RECEIVER, str(port), str(inbox)], stdout=subprocess.PIPE
        )
        assert receiver.stdout is not None
        receiver.stdout.readline()
        with (tmp_path / "sent.log").open("w") as log:
            sender = subprocess.Popen(
                [*SENDING, "127.0.0.1", str(port), *map(str, files)],
                stdout=log,
                stderr=log,
                env=os.environ | {"TCP_NODELAY": "1"},
            )
        if attempt == 0:
            deadline = time.monotonic() + 30
            while len(list(inbox.glob("*.dcm"))) < 20 and time.monotonic() < deadline:
                time.sleep(0.01)
            receiver.send_signal(signal.SIGKILL)
        sender.wait(60)
        if attempt == 1:
            receiver.terminate()
        receiver.wait(20)
        receiver.stdout.close()
        acknowledged += (tmp_path / "sent.log").read_text().count("(Success)")
    received = [arrival.read() for arrival in sources.inbox(inbox)]
    assert acknowledged > len(files), "the first receiver was killed too early or too late"
    assert len(received) >= acknowledged
    assert {str(one.SOPInstanceUID) for one in received} == {file.stem for file in files}


def many(pacs: Pacs, folder: Path, *, number: int) -> list[Path]:
    folder.mkdir()
    dataset = pydicom.dcmread(next(iter(pacs.files.values())))
    files = []
    for _ in range(number):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        files.append(folder / f"{dataset.SOPInstanceUID}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    assert dataset.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    return files


# --- what goes wrong, in words


def test_a_wrong_password_is_told_with_its_cure(pacs: Pacs, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("no")
    wrong = pacs.web.model_copy(update={"password": tmp_path / "wrong"})
    with pytest.raises(ConsiliaError, match=r"refuses \(401\); check pacs.web.user"):
        web.search(wrong, Query())


def test_a_wrong_address_is_told_with_its_cure(pacs: Pacs) -> None:
    wrong = pacs.web.model_copy(update={"address": pacs.web.address + "x"})
    with pytest.raises(ConsiliaError, match=r"no DICOMweb service there \(404\)"):
        web.search(wrong, Query())


# pynetdicom leaves the socket of a refused connection to the garbage collector
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket")
def test_nobody_there_is_told_with_its_cure(pacs: Pacs) -> None:
    port = free_port()
    gone = pacs.web.model_copy(update={"address": f"http://127.0.0.1:{port}/dicom-web"})
    with pytest.raises(ConsiliaError, match="cannot be reached"):
        web.search(gone, Query())
    with pytest.raises(ConsiliaError, match=f"cannot be reached at 127.0.0.1:{port}"):
        dimse.search(pacs.dimse.model_copy(update={"port": port}), pacs.station, Query())


def test_a_pacs_that_does_not_know_us_is_told_with_its_cure(pacs: Pacs, tmp_path: Path) -> None:
    stranger = pacs.station.model_copy(update={"title": "STRANGER"})
    with pytest.raises(ConsiliaError, match="have its administrator"):
        dimse.pull(pacs.dimse, stranger, Query(), tmp_path)


def test_a_wrong_title_of_the_pacs_is_told_with_its_cure(pacs: Pacs) -> None:
    wrong = pacs.dimse.model_copy(update={"title": "NOBODY"})
    with pytest.raises(ConsiliaError, match=r"check that pacs\.dimse\.title"):
        dimse.search(wrong, pacs.station, Query())
