"""What a round costs beyond the training: seconds, bytes and memory, beside stock Flower.

    python tests/bench/rounds.py [--sizes 0 25 100 400] [--rounds 4] [--repeats 2]
        [--only ours|flower] [--flower-sizes 0 25] [--limit-s 3600] [--most-gb 12] [--json FILE]

A run ends when all its processes together hold more than so many GB: at 400 MB stock Flower takes
about ten. For a short look: ``--sizes 25 --rounds 1 --repeats 1``.

Both train one model at three sites on this machine, over TLS with node authentication, and take
turns. The model is a DenseNet of about so many MB in some 150 tensors (0 MB: in 14, some KB).

Ours is the real thing from end to end: a SuperLink, the ServerApp of ``server.app`` with its run
directory, checkpoints and signatures, and three ``consilia-site start`` with their journals,
outboxes and gates, which evaluate the model and train it for one step on small pictures.
Stock is Flower's own FedAvg with SuperLink, SuperNodes and settings as they come, and an app that
adds a constant to each array (``tests/bench/stock``): it trains nothing, evaluates nothing and
imports no torch, all in its favour. Its SuperNodes come in by the SuperLink's loopback port: the
one that hospitals are shown gives nobody an app.

A round's overhead is its wall time (ours: from one line in rounds.jsonl to the next) minus the
seconds the slowest site says it trained; the first round is left out. CPU seconds are those of all
processes in a round, training with them, and say more than the clock on a busy machine. Bytes are
those of orders and replies at the coordinator, all sites together. Memory is the high-water mark of
each process; what it takes beyond its start is what it takes more than the same process with the
model of 0 MB, which is therefore always run; ``training`` is the process that computes gradients,
which stock's app does not. A ratio is ours over stock, of medians.

Stock Flower needs no setting for large models: since 1.40 it cuts every array into objects of
5 MiB, each a request of its own, and has no limit on messages.
"""

import argparse
import csv
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from watching import Watch, watched

from client import config as configs
from client import setup, studies
from client.agent import create_node_key
from server import link, store
from server.consortium import TlsFiles, certificates
from shared_models import nets
from shared_models import plan as plans
from shared_models.envelope import BUNDLE_FILES
from shared_models.plan import StudyPlan
from shared_models.signing import create_key, load_key, public_key, sign

SITES = ("north", "south", "west")
SIZES = (0, 25, 100, 400)
ROOT = Path(__file__).parents[2]
STOCK = Path(__file__).parent / "stock"
MARK = "CONSILIA_BENCH"
LIMIT_S = 3600.0
NUM_TRAIN, NUM_TEST = 8, 2
Schema = list[tuple[str, list[int]]]


class Limits(NamedTuple):
    """Of one run: how long it may take, and how much its processes may hold together."""

    seconds: float
    most_gb: float

    def check(self, watch: Watch, until: float) -> None:
        if watch.total_mb > 1000 * self.most_gb:
            raise SystemExit(f"its processes hold more than {self.most_gb:g} GB; see --most-gb")
        if time.monotonic() > until:
            raise SystemExit(f"it took longer than {self.seconds:g} s; see --limit-s")


class Measured(NamedTuple):
    """One run: seconds beyond training by round, CPU seconds and bytes of one, MB by part.

    ``total_mb`` is what all processes held together at most.
    """

    overheads_s: list[float]
    cpu_s: float
    bytes_per_round: int
    peaks_mb: dict[str, float]
    total_mb: float


def main() -> None:
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that all it started ends too
    sizes = sorted({0, *options.sizes})
    stock_sizes = sizes if options.flower_sizes is None else sorted({0, *options.flower_sizes})
    found: dict[tuple[str, int], list[Measured]] = {}
    results: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Callable[[int, int, Path, Limits], Measured]]
    contenders, limits = {"ours": ours, "flower": stock}, Limits(options.limit_s, options.most_gb)
    for size in sizes:
        repeats = options.repeats if size in options.sizes else 1
        for repeat in range(repeats):
            for name, measure in contenders.items():
                if options.only not in (None, name):
                    continue
                if name == "flower" and size not in stock_sizes:
                    continue
                say(f"{name}, {size} MB, run {repeat + 1} of {repeats}")
                with tempfile.TemporaryDirectory(prefix="rounds-") as folder:
                    one = measure(size, options.rounds + 1, Path(folder), limits)
                found.setdefault((name, size), []).append(one)
                say("  seconds beyond training: " + " ".join(f"{s:.2f}" for s in one.overheads_s))
                say("  MB at most: " + ", ".join(f"{k} {v:.0f}" for k, v in one.peaks_mb.items()))
        results[str(size)] = result_of(size, found)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="MB of float32")
    parser.add_argument("--flower-sizes", type=int, nargs="*", help="sizes stock Flower runs too")
    parser.add_argument("--rounds", type=int, default=4, help="rounds that count, after the first")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=("ours", "flower"))
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of one run")
    parser.add_argument("--most-gb", type=float, default=12.0, help="of all processes of a run")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def ours(size: int, num_rounds: int, folder: Path, limits: Limits) -> Measured:
    tls, port = certificates(folder / "tls", hosts=["127.0.0.1"]), link.free_port()
    run_dir = laid_out(folder, size, num_rounds, tls=tls, port=port)
    settings = store.read_settings(run_dir)
    with marked() as mark, watched(mark) as watch, ExitStack() as stack:
        superlink = stack.enter_context(
            link.superlink(folder, tls=tls, port=port, log_file=folder / "superlink.log")
        )
        for site, keys in settings.sites.items():
            superlink.register(keys.node or "", site)
            command = [sys.executable, "-m", "client.cli", "start", "--config"]
            config = folder / site / "site.toml"
            stack.enter_context(started([*command, str(config)], folder / f"{site}.log", mark))
        app = link.thin_app(folder / "app")
        run_id = superlink.submit(app, {"run-dir": str(run_dir)})
        check = partial(limits.check, watch, time.monotonic() + limits.seconds)
        lines = line_times(run_dir / store.ROUNDS, num_rounds, superlink, run_id, check=check)
        marks = list(lines)
        records = store.read_rounds(run_dir)[:num_rounds]
        watch.look(is_scan=True)
    walls = [after - before for before, after in pairwise(marks)]
    trained = [max(reply.seconds for reply in record.replies) for record in records[1:]]
    last = records[-1]
    return Measured(
        [wall - seconds for wall, seconds in zip(walls, trained, strict=True)],
        watch.cpu_s(marks[0], marks[-1]) / len(walls),
        last.sent_bytes + last.received_bytes,
        watch.by_part(),
        watch.most_total_mb,
    )


def line_times(
    file: Path,
    number: int,
    superlink: link.SuperLink,
    run_id: int,
    *,
    check: Callable[[], None],
) -> Iterator[float]:
    """Yield when each of the file's lines was there."""
    asked, seen = time.monotonic(), 0
    while seen < number:
        lines = file.read_bytes().count(b"\n") if file.exists() else 0
        yield from [time.monotonic()] * (min(lines, number) - seen)
        seen = lines
        if time.monotonic() > asked + 5:
            asked = time.monotonic()
            check()
            if superlink.status(run_id).is_finished:
                raise SystemExit("the study did not end well; its logs are gone with its folder")
        time.sleep(0.005)


def laid_out(folder: Path, size: int, num_rounds: int, *, tls: TlsFiles, port: int) -> Path:
    """Make keys, pictures, sites that have approved the plan, and the run directory."""
    key = create_key(folder / "coordinator.pem")
    identities = {
        site: setup.create_unenrolled(
            folder / site,
            name=site,
            coordinator=public_key(key),
            address=f"127.0.0.1:{port}",
            root_certificates=tls.authority.resolve(),
            manifest=pictures(folder / site),
            root=folder / site,
            allow_without_privacy=True,
        )
        for site in SITES
    }
    plan = plan_for(size, num_rounds, coordinator=public_key(key))
    run_dir = folder / "run"
    (run_dir / "approvals").mkdir(parents=True)
    signed = plans.SignedPlan(plan, sign(plan, key=key))
    (run_dir / "plan.toml").write_text(plans.render(*signed))
    for site in SITES:
        config = configured(folder / site / "site.toml")
        if found := studies.objections(signed, config, today=datetime.now(UTC).date()):
            raise SystemExit(f"{site}: {found}")
        approval = studies.approve(signed, config, key=load_key(config.signing_key), who="bench")
        (run_dir / "approvals" / f"{site}.json").write_text(approval.model_dump_json())
    keys = {
        site: store.SiteKeys(signing=identity.signing, node=identity.node)
        for site, identity in identities.items()
    }
    store.write_settings(
        run_dir, store.RunSettings(signing_key=folder / "coordinator.pem", sites=keys)
    )
    return run_dir


def configured(file: Path) -> configs.SiteConfig:
    """Raise the site's limits to what the bench needs, as its people would in site.toml."""
    text = file.read_text()
    for name, value in {"max_update_mb": "1000.0", "min_patients": "2"}.items():
        text, number = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        if number != 1:
            raise SystemExit(f"expected one {name} in a site.toml")
    file.write_text(text)
    return configs.read(file)


def pictures(folder: Path) -> Path:
    """Write a few small pictures and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    rows = [["image", "patient", "label", "split"]]
    for number in range(NUM_TRAIN + NUM_TEST):
        pixels = random.integers(0, 255, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = "train" if number < NUM_TRAIN else "test"
        rows.append([f"{number}.png", str(number), str(number % 2), split])
    with (folder / "manifest.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)
    return folder / "manifest.csv"


def plan_for(size: int, num_rounds: int, *, coordinator: str) -> StudyPlan:
    return StudyPlan.model_validate(
        {
            "name": "rounds",
            "purpose": "demonstration",
            "coordinator": coordinator,
            "sites": SITES,
            "expires": (datetime.now(UTC) + timedelta(days=2)).date(),
            "min_patients": 2,
            "task": {"name": "classification", "params": {"classes": ["no", "yes"]}},
            "net": {"name": "densenet", "params": net_params(size)},
            "imaging": [{"name": "resize", "params": {"size": [16, 16]}}],
            "strategy": {"name": "fedavg"},
            "training": {
                "num_rounds": num_rounds,
                "steps_per_round": 1,
                "sample_rate": 0.25,
                "optimizer": "sgd",
                "learning_rate": 0.001,
            },
            "rounds": {"quorum": len(SITES), "deadline_s": LIMIT_S},
        }
    )


def net_params(size: int) -> dict[str, Any]:
    """Return the parameters of the DenseNet whose weights come nearest to ``size`` MB."""

    def params(growth: int) -> dict[str, Any]:
        config = [8, 8, 8] if size else [1]
        features = 2 * growth
        return {
            "init_features": features,
            "growth_rate": growth,
            "block_config": config,
            "num_groups": 1,
        }

    if not size:
        return params(4)
    return params(min(range(8, 400, 2), key=lambda growth: abs(megabytes(params(growth)) - size)))


def megabytes(params: dict[str, Any]) -> float:
    return sum(int(np.prod(shape)) for _, shape in schema(params)) * 4 / 1e6


def schema(params: dict[str, Any]) -> Schema:
    """Return names and shapes of a net's weights, without making them."""
    with torch.device("meta"):
        net = nets.make("densenet", params, seed=0, num_outputs=2)
    return [(name, list(value.shape)) for name, value in net.state_dict().items()]


def stock(size: int, num_rounds: int, folder: Path, limits: Limits) -> Measured:
    tls, port = certificates(folder / "tls", hosts=["127.0.0.1"]), link.free_port()
    tensors, out = schema(net_params(size)), folder / "out.json"
    nodes = list[subprocess.Popen[bytes]]()
    (folder / "schema.json").write_text(json.dumps(tensors))
    with marked() as mark, watched(mark) as watch, ExitStack() as stack:
        superlink = stack.enter_context(
            link.superlink(folder, tls=tls, port=port, log_file=folder / "superlink.log")
        )
        for site in SITES:
            superlink.register(create_node_key(folder / site), site)
            command = [str(Path(sys.executable).with_name("flower-supernode"))]
            command += ["--superlink", superlink.control, "--port", str(link.free_port())]
            command += ["--root-certificates", str(tls.authority)]
            command += ["--auth-supernode-private-key", str(folder / site)]
            home = {"FLWR_HOME": str(folder / f"home-{site}")}
            nodes.append(stack.enter_context(started(command, folder / f"{site}.log", mark, home)))
        values = {"schema": str(folder / "schema.json"), "out": str(out), "rounds": num_rounds}
        app = shutil.copytree(STOCK, folder / "app")
        (app / "LICENSE").write_text(BUNDLE_FILES["LICENSE"])
        run_id = superlink.submit(app, values)
        until = time.monotonic() + limits.seconds
        while not superlink.status(run_id).is_finished:
            limits.check(watch, until)
            if any(node.poll() is not None for node in nodes):
                raise SystemExit(f"a SuperNode ended: {link._reason(folder / 'north.log')}")
            time.sleep(1.0)
        if not out.exists():
            raise SystemExit(f"stock Flower did not end well: {superlink.status(run_id)}")
    said = json.loads(out.read_text())
    marks = said["marks"][1:]
    walls = [after - before for before, after in pairwise(marks)]
    vector_bytes = sum(int(np.prod(shape)) for _, shape in tensors) * 4
    return Measured(
        [wall - seconds for wall, seconds in zip(walls, said["seconds"][1:], strict=True)],
        watch.cpu_s(marks[0], marks[-1]) / len(walls),
        3 * len(SITES) * vector_bytes,  # to train, to evaluate, and back
        watch.by_part(),
        watch.most_total_mb,
    )


@contextmanager
def marked() -> Iterator[str]:
    """Set what this measurement's processes inherit, so that they are found again."""
    mark = secrets.token_hex(16)
    added = {
        MARK: mark,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield mark
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def started(
    command: Sequence[str], log_file: Path, mark: str, more: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, and at exit end it and all it started."""
    own = secrets.token_hex(16)
    with log_file.open("wb") as handle:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | (more or {}) | {MARK: mark, link.MARK: own},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        link._end(process, mark=own)


def result_of(size: int, found: dict[tuple[str, int], list[Measured]]) -> dict[str, Any]:
    """Return what the JSON says of one size."""
    result: dict[str, Any] = {"model_mb": round(megabytes(net_params(size)), 1)}
    for name in ("ours", "flower"):
        if runs := found.get((name, size)):
            seconds = [value for run in runs for value in run.overheads_s]
            peaks, least = highest(runs), highest(found[name, 0])
            result |= {
                f"{name}_overhead_s": round(median(seconds), 3),
                f"{name}_overhead_range_s": [round(min(seconds), 3), round(max(seconds), 3)],
                f"{name}_cpu_s": round(median(run.cpu_s for run in runs), 2),
                f"{name}_bytes": runs[-1].bytes_per_round,
                f"{name}_peak_mb": {part: round(peak) for part, peak in peaks.items()},
                f"{name}_total_peak_mb": round(max(run.total_mb for run in runs)),
                f"{name}_beyond_start_mb": {
                    part: max(0, round(peak - least.get(part, 0.0))) for part, peak in peaks.items()
                },
            }
            prefix = "" if name == "ours" else "flower_"
            result[f"{prefix}server_peak_mb"] = result[f"{name}_beyond_start_mb"]["ServerApp"]
    if {"ours_overhead_s", "flower_overhead_s"} <= result.keys():
        result["ratio"] = round(result["ours_overhead_s"] / result["flower_overhead_s"], 3)
    return result


def highest(runs: Sequence[Measured]) -> dict[str, float]:
    parts = {part for run in runs for part in run.peaks_mb}
    return {part: max(run.peaks_mb.get(part, 0.0) for run in runs) for part in sorted(parts)}


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="A round beyond the training, three sites; median [least, most]")
    for column in (
        "MB",
        "",
        "overhead, s",
        "CPU s",
        "MB moved",
        "MB of memory beyond start (and in all)",
    ):
        table.add_column(column)
    table.add_column("ours / stock")
    for size, result in results.items():
        for name in ("ours", "flower"):
            if f"{name}_overhead_s" not in result:
                continue
            low, high = result[f"{name}_overhead_range_s"]
            beyond, peaks = result[f"{name}_beyond_start_mb"], result[f"{name}_peak_mb"]
            table.add_row(
                size,
                name,
                f"{result[f'{name}_overhead_s']:.2f} [{low:.2f}, {high:.2f}]",
                f"{result[f'{name}_cpu_s']:.1f}",
                f"{result[f'{name}_bytes'] / 1e6:.1f}",
                ", ".join(f"{part} {beyond[part]} ({peaks[part]})" for part in peaks),
                f"{result['ratio']:.3f}" if name == "ours" and "ratio" in result else "",
            )
    Console(width=160).print(table)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
