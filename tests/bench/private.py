"""What a private step costs: CPU time and memory, as ratios to the same step without privacy.

    python tests/bench/private.py [--nets unet2d,gru] [--engines ours] [--repeats 5] [--json FILE]

A step is forward, loss, gradients and plain SGD; a private step clips every patient's gradient but
adds no noise (a cost of its own, the same for all engines). Every patient has one image. Times are
CPU seconds of one thread, each engine in alternation with the step without privacy; the ratio of
medians. Memory is the peak resident size of a child process over three steps, above what it held
before the first.
"""

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import thread_time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from client.bookkeeping import bookkeeping_engine
from client.dp import Batch, plain_engine
from shared_models import nets

Step = Callable[[], None]
NORM = 1.0


class Gated(nn.Module):
    """A classifier of slice sequences: one GRU and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(256, 256, batch_first=True)
        self.head = nn.Linear(256, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.gru(images.flatten(1, 2))[0].mean(1))


def unet(spatial_dims: int, channels: list[int]) -> nn.Module:
    params = {
        "spatial_dims": spatial_dims,
        "channels": channels,
        "strides": [2] * (len(channels) - 1),
        "num_res_units": 2,
    }
    return nets.make("unet", params, seed=0, num_outputs=4)


def densenet() -> nn.Module:
    params = {"init_features": 64, "growth_rate": 32, "block_config": [6, 12, 24, 16]}
    return nets.make("densenet", {**params, "num_groups": 8}, seed=0, num_outputs=4)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet2d": (lambda: unet(2, [16, 32, 64, 128, 256]), (32, 1, 128, 128)),
    "unet3d": (lambda: unet(3, [16, 32, 64, 128]), (4, 1, 64, 64, 64)),
    "densenet121": (densenet, (32, 1, 64, 64)),
    "gru": (Gated, (32, 1, 64, 256)),
}


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    each = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return each.flatten(1).mean(1) if each.ndim > 1 else each


def batch_for(net: nn.Module, shape: tuple[int, ...]) -> Batch:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = net(images[:1])
    targets = torch.randint(0, 4, (shape[0], *outputs.shape[2:]))
    return Batch(images, targets, torch.arange(shape[0]), shape[0])


def ours(net: nn.Module, batch: Batch) -> Step:
    gradient_of = bookkeeping_engine(net, loss, max_grad_norm=NORM).__enter__()
    return lambda: descend(net, gradient_of(batch).gradients)


def without_privacy(net: nn.Module, batch: Batch) -> Step:
    gradient_of = plain_engine(net, loss).__enter__()
    return lambda: descend(net, gradient_of(batch).gradients)


def descend(net: nn.Module, gradients: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter -= 1e-6 * gradient


def opacus_hooks(net: nn.Module, batch: Batch, *, functorch: bool = False) -> Step:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(net, loss_reduction="sum", force_functorch=functorch)

    def step() -> None:
        loss(wrapped(batch.images), batch.targets).sum().backward()
        grads = [p.grad_sample for p in net.parameters()]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        factors = (NORM / norms).clamp(max=1)
        descend(net, [torch.einsum("i,i...->...", factors, g) for g in grads])
        wrapped.zero_grad(set_to_none=True)

    return step


def opacus_functorch(net: nn.Module, batch: Batch) -> Step:
    return opacus_hooks(net, batch, functorch=True)


def opacus_ghost(net: nn.Module, batch: Batch) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        net, loss_reduction="sum", max_grad_norm=NORM, use_ghost_clipping=True
    )

    def step() -> None:
        each = loss(wrapped(batch.images), batch.targets)
        each.sum().backward(retain_graph=True)
        factors = wrapped.get_clipping_coef()
        wrapped.zero_grad(set_to_none=True)
        wrapped.disable_hooks()
        (factors * each).sum().backward()
        wrapped.enable_hooks()
        descend(net, [p.grad for p in net.parameters()])
        wrapped.zero_grad(set_to_none=True)

    return step


ENGINES: dict[str, Callable[[nn.Module, Batch], Step]] = {
    "ours": ours,
    "opacus_hooks": opacus_hooks,
    "opacus_functorch": opacus_functorch,
    "opacus_ghost": opacus_ghost,
}


def seconds(step: Step) -> float:
    begun = thread_time()
    step()
    return thread_time() - begun


def time_ratio(name: str, engine: str, repeats: int) -> float:
    make, shape = NETS[name]
    plain_net, net = make(), make()
    plain = without_privacy(plain_net, batch_for(plain_net, shape))
    private = ENGINES[engine](net, batch_for(net, shape))
    plain(), private()
    pairs = [(seconds(private), seconds(plain)) for _ in range(repeats)]
    return median(p for p, _ in pairs) / median(q for _, q in pairs)


def peak_bytes(name: str, engine: str) -> int:
    """Return the extra memory of three steps of ``engine``, in this process."""
    make, shape = NETS[name]
    net = make()
    batch = batch_for(net, shape)
    step = {"plain": without_privacy, **ENGINES}[engine](net, batch)
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return this process's resident size now (VmRSS) or at its highest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory(name: str, engine: str) -> int:
    """Return ``peak_bytes`` of a fresh process."""
    command = [sys.executable, __file__, "--peak", name, engine]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(name: str, engines: list[str], repeats: int) -> dict[str, float]:
    results: dict[str, float] = {}
    plain = memory(name, "plain")
    for engine in engines:
        try:
            results[engine] = round(time_ratio(name, engine, repeats), 3)
            results[f"memory_{engine}"] = round(memory(name, engine) / plain, 3)
        except (NotImplementedError, ValueError, RuntimeError, AttributeError) as error:
            print(f"{name}: {engine} fails: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        except subprocess.CalledProcessError:
            print(f"{name}: {engine} fails when its memory is measured", file=sys.stderr)
    return {**results, "plain_mib": round(plain / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if args.peak:
        print(peak_bytes(*args.peak))
        return
    engines = args.engines.split(",")
    table = Table("net", *engines, *(f"memory {e}" for e in engines), "without, MiB")
    found = {}
    for name in args.nets.split(","):
        found[name] = measure(name, engines, args.repeats)
        columns = [*engines, *(f"memory_{e}" for e in engines), "plain_mib"]
        table.add_row(name, *(str(found[name].get(c, "-")) for c in columns))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
