"""What the processes of one measurement held at most, by the part they play, and spent."""

import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

INTERVAL_S = 0.1
SCAN_EVERY = 10
TICKS = os.sysconf("SC_CLK_TCK")
PARTS = {
    "server.fleet": "SuperLink",
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "flower-supernode": "SuperNode",
    "flwr-clientapp": "ClientApp",
    "client.cli": "site agent",
    "client.worker": "training",
    "flower-superexec": "SuperExec",
}


class Watch:
    """High-water marks in MB and CPU seconds of every process whose environment has a mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark.encode()
        self.peaks = dict[int, tuple[str, float]]()
        self.spent = dict[int, float]()
        self.total_mb = self.most_total_mb = 0.0
        self.strangers = set[int]()
        self.clock = list[tuple[float, float]]()

    def look(self, *, is_scan: bool) -> None:
        """Read every known process's mark; look for new processes too if ``is_scan``."""
        ids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")] if is_scan else []
        total = 0.0
        for pid in {*self.peaks, *ids} - self.strangers:
            with suppress(OSError, ProcessLookupError):
                total += self._read(pid)
        self.total_mb, self.most_total_mb = total, max(total, self.most_total_mb)
        self.clock.append((time.monotonic(), sum(self.spent.values())))

    def cpu_s(self, start: float, stop: float) -> float:
        """Return the CPU seconds all of them spent between two moments (monotonic)."""
        times, spent = zip(*self.clock, strict=True)
        return float(np.diff(np.interp([start, stop], times, spent))[0])

    def by_part(self) -> dict[str, float]:
        """Return the largest peak of each part."""
        found = defaultdict[str, float](float)
        for part, peak in self.peaks.values():
            found[part] = max(found[part], peak)
        return dict(found)

    def _read(self, pid: int) -> float:
        """Note what one process held at most, and return what it holds, in MB."""
        folder = Path("/proc") / str(pid)
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        is_known = pid in self.peaks or int(fields[1]) in self.peaks  # a worker forgets its mark
        if not is_known and self.mark not in (folder / "environ").read_bytes():
            self.strangers.add(pid)
            return 0.0
        words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        part = next((part for word, part in PARTS.items() if word in words), None)
        found = re.search(r"VmHWM:\s+(\d+) kB\nVmRSS:\s+(\d+) kB", (folder / "status").read_text())
        if not part or not found:
            return 0.0
        peak, now = (int(number) * 1024 / 1e6 for number in found.groups())
        self.peaks[pid] = part, max(self.peaks.get(pid, (part, 0.0))[1], peak)
        self.spent[pid] = (int(fields[11]) + int(fields[12])) / TICKS
        return now


@contextmanager
def watched(mark: str) -> Iterator[Watch]:
    """Watch from a thread until the block is left."""
    watch, ended = Watch(mark), threading.Event()

    def run() -> None:
        turn = 0
        while not ended.wait(INTERVAL_S):
            watch.look(is_scan=turn % SCAN_EVERY == 0)
            turn += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.look(is_scan=True)
        ended.set()
        thread.join()
