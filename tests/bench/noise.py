"""What the noise costs: CPU time of ``add_noise`` beside that of a private step without it.

    python tests/bench/noise.py [--nets unet2d,gru] [--repeats 7] [--json FILE]

The nets and steps are those of ``private.py``, the engine is ours. Times are CPU seconds of
one thread, noise and step in alternation; medians.
"""

import argparse
import json
import warnings
from pathlib import Path
from statistics import median
from time import thread_time

import torch
from private import NETS, NORM, batch_for, ours
from rich.console import Console
from rich.table import Table

from client.dp import add_noise, trainable
from client.noise import secure


def measure(name: str, repeats: int) -> dict[str, float]:
    make, shape = NETS[name]
    net = make()
    sums, source = [torch.zeros_like(p) for p in trainable(net)], secure()
    step = ours(net, batch_for(net, shape))

    def noise() -> None:
        add_noise(sums, noise_multiplier=1.0, max_grad_norm=NORM, randomness=source)

    taken: dict[str, list[float]] = {"noise": [], "step": []}
    for _ in range(repeats + 1):
        for what, run in (("noise", noise), ("step", step)):
            begun = thread_time()
            run()
            taken[what].append(1000 * (thread_time() - begun))
    noise_ms, step_ms = (median(taken[what][1:]) for what in ("noise", "step"))  # the first warms
    return {
        "parameters": sum(s.numel() for s in sums),
        "noise_ms": round(noise_ms, 1),
        "step_ms": round(step_ms, 1),
        "percent": round(100 * noise_ms / step_ms, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = {name: measure(name, args.repeats) for name in args.nets.split(",")}
    table = Table("net", "parameters", "noise, ms", "step, ms", "%")
    for name, figures in found.items():
        table.add_row(name, *(str(value) for value in figures.values()))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
