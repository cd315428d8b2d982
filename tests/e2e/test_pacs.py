"""Runs ``pacs_inside.py`` in a network of its own, for Orthanc 1.10 listens on every address."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = Path(__file__).with_name("pacs_inside.py")
NEEDED = ("unshare", "ip", "Orthanc", "storescu")
ALONE = ["unshare", "--map-root-user", "--net"]


def test_a_real_pacs() -> None:
    if missing := [program for program in NEEDED if shutil.which(program) is None]:
        pytest.skip(f"needs {', '.join(missing)}: orthanc, orthanc-dicomweb, dcmtk, iproute2")
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("this system gives no network namespaces")
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INSIDE)]
    script = 'ip link set lo up && exec "$@"'
    done = subprocess.run(
        [*ALONE, "sh", "-c", script, "sh", *tests],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=INSIDE.parents[2],
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
