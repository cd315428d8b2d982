"""Images out of a PACS: ours beside dicomweb-client's own iteration and beside dcmtk.

    python tests/bench/pull.py [--slices 200] [--repeats 5] [--json FILE]

A real Orthanc on loopback, in a network of its own, holds one CT series of 512 x 512 slices. Wall
seconds from the search to the last image, in alternation, medians: over DICOMweb against
``DICOMwebClient.iter_series`` by the same client library; over DIMSE against dcmtk's ``getscu``
and ``movescu``, writing what comes to files as ours does. All with TCP_NODELAY. Needs orthanc with
its DICOMweb plugin, dcmtk, iproute2 and user namespaces.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import pydicom
import requests
from rich.console import Console
from rich.table import Table

from client.ingest import dimse, web
from client.ingest.pacs import DimsePacs, Query, Station, WebPacs
from server.link import free_port
from shared_models import phantoms
from shared_models.errors import ConsiliaError

PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
NODELAY = os.environ | {"TCP_NODELAY": "1"}
INSIDE = "CONSILIA_PULL_INSIDE"


def start(folder: Path, ports: tuple[int, int, int]) -> subprocess.Popen:
    """Start Orthanc with its files in ``folder``; ports are for HTTP, DICOM and ourselves."""
    http, dicom, own = ports
    settings = {
        "Plugins": [PLUGIN],
        "HttpPort": http,
        "DicomPort": dicom,
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "store"),
        "AuthenticationEnabled": False,
        "DicomAlwaysAllowGet": True,
        "DicomAlwaysAllowMove": True,
        "DicomModalities": {"ours": ["CONSILIA", "127.0.0.1", own]},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = (folder / "orthanc.log").open("wb")
    return subprocess.Popen(
        ["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log, env=NODELAY
    )


def wait_for(pacs: DimsePacs, station: Station) -> None:
    """Wait until the PACS answers."""
    until = time.monotonic() + 60
    while True:
        try:
            return dimse.echo(pacs, station)
        except ConsiliaError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def fill(folder: Path, num_slices: int, port: int) -> tuple[str, str]:
    """Send a series to the PACS; return the UIDs of its study and of itself."""
    (site, *_) = phantoms.write_hospitals(folder, seed=1, num_patients=2, size=512)
    first = sorted(site.rglob("*.dcm"))[0]
    made = folder / "series"
    made.mkdir()
    dataset = pydicom.dcmread(first)
    for number in range(num_slices):
        uid = f"{dataset.SeriesInstanceUID}.{number}"[:64]
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
        dataset.InstanceNumber = number + 1
        dataset.save_as(made / f"{number:04}.dcm")
    files = [str(file) for file in sorted(made.iterdir())]
    command = ["storescu", "-xs", "-aet", "CONSILIA", "-aec", "ORTHANC", "127.0.0.1", str(port)]
    subprocess.run([*command, *files], check=True, capture_output=True, env=NODELAY)
    return str(dataset.StudyInstanceUID), str(dataset.SeriesInstanceUID)


def ways(
    pacs: tuple[WebPacs, DimsePacs], station: Station, study: str, series: str
) -> dict[str, tuple[Callable[[Path], int], ...]]:
    """Return ours and the other for each way; each returns how many images came."""
    query, (over_web, over_dimse) = Query(studies=(study,)), pacs

    def ours_web(folder: Path) -> int:
        return sum(1 for arrival in web.pull(over_web, query) if arrival.read())

    def client_web(folder: Path) -> int:
        from dicomweb_client.api import DICOMwebClient

        with closing(requests.Session()) as session:
            client = DICOMwebClient(over_web.address, session=session)
            client.search_for_series(study)
            return sum(1 for _ in client.iter_series(study, series, media_types=web.AS_STORED))

    def ours_dimse(retrieve: str) -> Callable[[Path], int]:
        asked = over_dimse.model_copy(update={"retrieve": retrieve})

        def run(folder: Path) -> int:
            dimse.pull(asked, station, query, folder)
            return sum(1 for _ in folder.iterdir())

        return run

    def dcmtk(program: str, *more: str) -> Callable[[Path], int]:
        def run(folder: Path) -> int:
            folder.mkdir(parents=True, exist_ok=True)
            command = [program, "-S", "-aet", "CONSILIA", "-aec", "ORTHANC", *more]
            command += ["-od", str(folder), "-k", "QueryRetrieveLevel=SERIES"]
            command += ["-k", f"StudyInstanceUID={study}", "-k", f"SeriesInstanceUID={series}"]
            command += ["127.0.0.1", str(over_dimse.port)]
            subprocess.run(command, check=True, capture_output=True, env=NODELAY)
            return sum(1 for _ in folder.iterdir())

        return run

    return {
        "DICOMweb": (ours_web, client_web),
        "C-GET": (ours_dimse("get"), dcmtk("getscu")),
        "C-MOVE": (
            ours_dimse("move"),
            dcmtk("movescu", "-aem", "CONSILIA", "+P", str(station.port)),
        ),
    }


def timed(run: Callable[[Path], int], folder: Path, expected: int) -> float:
    """Return the wall seconds of one pull into an empty folder, and insist that all came."""
    begun = time.perf_counter()
    found = run(folder / "in")
    took = time.perf_counter() - begun
    if found != expected:
        raise SystemExit(f"expected {expected} images, {found} came")
    shutil.rmtree(folder / "in", ignore_errors=True)
    return took


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the seconds of each way, ours and the other's, and their ratio."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, ports = Path(scratch), (free_port(), free_port(), free_port())
        process = start(folder, ports)
        try:
            over_web = WebPacs(address=f"http://127.0.0.1:{ports[0]}/dicom-web")
            over_dimse = DimsePacs(title="ORTHANC", host="127.0.0.1", port=ports[1])
            station = Station(port=ports[2], bind="127.0.0.1", reserve_mb=0)
            wait_for(over_dimse, station)
            study, series = fill(folder / "made", args.slices, ports[1])
            for name, pair in ways((over_web, over_dimse), station, study, series).items():
                took: tuple[list[float], list[float]] = ([], [])
                for _ in range(args.repeats + 1):
                    for kept, run in zip(took, pair, strict=True):
                        kept.append(timed(run, folder, args.slices))
                ours, other = (median(each[1:]) for each in took)  # the first warms up
                found[name] = {"ours_s": ours, "other_s": other, "ratio": ours / other}
        finally:
            process.terminate()
            process.wait(30)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if INSIDE not in os.environ:  # Orthanc listens on every address, so give it its own
        alone = [
            "unshare",
            "--map-root-user",
            "--net",
            "sh",
            "-c",
            'ip link set lo up && exec "$@"',
        ]
        command = [*alone, "sh", sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(command, env=os.environ | {INSIDE: "1"}).returncode)
    found = measure(args)
    shown = Table(title=f"{args.slices} slices of 512 x 512 out of Orthanc, medians")
    for column in ("", "ours, s", "other, s", "ours / other"):
        shown.add_column(column, justify="right")
    others = {"DICOMweb": "dicomweb-client", "C-GET": "getscu", "C-MOVE": "movescu"}
    for name, each in found.items():
        row = (each["ours_s"], each["other_s"], each["ratio"])
        shown.add_row(f"{name} ({others[name]})", *(f"{value:.2f}" for value in row))
    Console().print(shown)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
