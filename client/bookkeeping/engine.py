"""Chunks through the net, hooks on and off, and the proof that nothing was missed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from client.bookkeeping import recurrent
from client.bookkeeping.book import Book, Layout, OutOfOrder
from client.bookkeeping.forwards import FORWARDS, replaced
from client.bookkeeping.layers import RULES, has_images_first
from client.dp import (
    Batch,
    Clipping,
    GradientOf,
    Loss,
    Sums,
    _chunks,
    _mixing,
    _zeros,
    clip_factors,
    trainable,
)

log = logging.getLogger(__name__)


@contextmanager
def bookkeeping_engine(
    net: nn.Module,
    loss: Loss,
    *,
    max_grad_norm: float | None,
    most_images: int = 32,
    clipping: Clipping = "flat",
) -> Iterator[GradientOf]:
    """Yield sums of clipped patient gradients, from one backward pass a chunk.

    Raises:
        ValueError: if patients meet in the net, a layer changes its weights as it runs, or there
            is no clipping norm; on use, if a parameter received no per-patient gradient or an
            input was changed in place.
    """
    if max_grad_norm is None:
        raise ValueError("expected a max_grad_norm to clip to")
    objections = _objections(net)
    if not trainable(net):
        objections.append("expected some parameters to train, all are frozen")
    if objections:
        raise ValueError("; ".join(objections))
    factors_of = partial(clip_factors, max_grad_norm=max_grad_norm, clipping=clipping)
    yield _Chunks(net, loss, factors_of, most_images).sums


class _Chunks:
    """One net's way through its batches: by book while that can be trusted, else one by one."""

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        factors_of: Callable[[Tensor], Tensor],
        most_images: int,
    ) -> None:
        self.net = net
        self.loss = loss
        self.factors_of = factors_of
        self.most_images = most_images
        self.names = {p: n for n, p in net.named_parameters() if p.requires_grad}
        self.tried: set[torch.Size] = set()
        unknown = _unknown(net)
        self.is_by_book = not unknown
        if unknown:
            self._say_slow(f"no rule for {', '.join(unknown[:5])}")

    def sums(self, batch: Batch) -> Sums:
        """Return the batch's sum of clipped patient gradients."""
        torch.clear_autocast_cache()  # it would hold the weights of the step before
        total, value, num_non_finite = _zeros(trainable(self.net)), 0.0, 0
        for chunk, weight in _chunks(batch, self.most_images):
            found = self._chunk(chunk, weight)
            for kept, new in zip(total, found.gradients, strict=True):
                kept += new
            value += found.loss
            num_non_finite += found.num_non_finite
        return Sums(total, value / max(batch.num_patients, 1), num_non_finite)

    def _chunk(self, chunk: Batch, weight: Tensor) -> Sums:
        if self.is_by_book:
            try:
                self._try_one_image(chunk.images[:1])
                return self._by_book(chunk, weight)
            except OutOfOrder as error:
                self.is_by_book = False
                self._say_slow(str(error))
        return self._one_by_one(chunk, weight, range(chunk.num_patients))

    def _say_slow(self, why: str) -> None:
        log.warning("patients pass one by one, which is slow: %s", why)

    def _try_one_image(self, image: Tensor) -> None:
        """Pass one image of each new shape: an axis as long as the batch by chance stands out."""
        if image.shape[1:] in self.tried:
            return
        devices = [image.device] if image.device.type == "cuda" else []
        layout = Layout.of(torch.zeros(1, dtype=torch.long, device=image.device), 1)
        with (
            torch.random.fork_rng(devices=devices),
            Book(layout) as book,
            _hooked(self.net, book),
            torch.enable_grad(),
        ):
            self.net(image)
        self.tried.add(image.shape[1:])

    def _by_book(self, chunk: Batch, weight: Tensor) -> Sums:
        with Book(Layout.of(chunk.owner, chunk.num_patients)) as book:
            with _hooked(self.net, book):
                value = (self.loss(self.net(chunk.images), chunk.targets) * weight).sum()
            book.uses = _uses(value)
            self._refuse_holes(book.uses, book.calls)
            with torch.autocast(chunk.images.device.type, enabled=False):
                torch.autograd.grad(value, book.firsts, allow_unused=True)
                self._refuse_holes(book.uses, book.answered)
                norms = book.norms()
                factors = self.factors_of(norms)
                gradients = [book.weighted(p, factors) for p in self.names]
        found = Sums(gradients, float(torch.nan_to_num(value.detach())), 0)
        doubtful = norms.isfinite().logical_not().nonzero().flatten().tolist()
        if not doubtful:
            return found
        again = self._one_by_one(chunk, weight, doubtful)  # in float64 a norm may yet be finite
        gradients = [a + b for a, b in zip(gradients, again.gradients, strict=True)]
        return Sums(gradients, found.loss, again.num_non_finite)

    def _refuse_holes(self, uses: Mapping[Tensor, int], seen: Mapping[Tensor, int]) -> None:
        """Stop if some use of a parameter was seen by no hook; each use is an edge of the graph."""
        for parameter, name in self.names.items():
            used, found = uses.get(parameter, 0), seen.get(parameter, 0)
            if used == 0 or used > found:
                where = "anywhere" if used == 0 else "a use outside its own layer"
                raise ValueError(
                    f"the parameter '{name}' received no per-patient gradient from {where}; it "
                    "cannot be protected: freeze it, call its layer, or choose another net"
                )

    def _one_by_one(self, chunk: Batch, weight: Tensor, patients: Sequence[int]) -> Sums:
        parameters = list(self.names)
        total, sum_of_losses, num_non_finite = _zeros(parameters), 0.0, 0
        for patient in patients:
            ours = chunk.owner == patient
            outputs = self.net(chunk.images[ours])
            value = (self.loss(outputs, chunk.targets[ours]) * weight[ours]).sum()
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            reached = Counter[Tensor](
                p for p, g in zip(parameters, found, strict=True) if g is not None
            )
            self._refuse_holes(reached, reached)
            gradients = [g for g in found if g is not None]
            norm = torch.stack([g.double().norm() for g in gradients]).norm()
            factor = float(self.factors_of(norm))
            num_non_finite += factor == 0
            if factor:
                for kept, new in zip(total, gradients, strict=True):
                    kept += factor * new
            sum_of_losses += float(torch.nan_to_num(value.detach()))
        return Sums(total, sum_of_losses, num_non_finite)


def _objections(net: nn.Module) -> list[str]:
    """Return what no engine could make private, with the cure."""
    objections = []
    mixing = _mixing(net)
    if mixing:
        objections.append(
            "expected layers that keep no statistics over images, got them in "
            f"{', '.join(mixing[:5])}; use group normalization"
        )
    for name, module in net.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            for setting in ("max_norm", "scale_grad_by_freq", "sparse"):
                if getattr(module, setting):
                    objections.append(f"expected an embedding without {setting}, got it in {name}")
    return objections


def _unknown(net: nn.Module) -> list[str]:
    """Return the modules with trainable parameters of their own for which there is no rule."""
    return [
        f"{name or 'the net'} ({type(module).__name__})"
        for name, module in net.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False)) and not _is_known(module)
    ]


def _is_known(module: nn.Module) -> bool:
    if "forward" in vars(module):
        return False
    if isinstance(module, nn.RNNBase):
        return type(module) in FORWARDS and recurrent.is_plain(module)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return type(module) in {*FORWARDS, *RULES} and own <= {"weight", "bias"}


@contextmanager
def _hooked(net: nn.Module, book: Book) -> Iterator[None]:
    """Let every layer that is trained write into ``book`` while the net runs."""
    with ExitStack() as stack:
        for name, module in net.named_modules():
            if not any(p.requires_grad for p in module.parameters(recurse=False)):
                continue
            if type(module) in FORWARDS:
                stack.enter_context(replaced(module, name, book))
                continue
            handle = module.register_forward_hook(
                _remember(name, book), prepend=True, with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


def _remember(name: str, book: Book) -> Any:
    """Return a hook that keeps a layer's input until its output's gradient arrives."""

    def hook(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not output.requires_grad:
            return None
        x = args[0] if args else kwargs["input"]
        if not has_images_first(layer, x, len(book.layout.owner)):
            raise OutOfOrder(f"{name} is not given images first")
        is_view = output._is_view()
        output = output.clone() if is_view else output  # a view changed in place loses its hook
        parameters = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        book.calls.update(parameters)
        if not x.requires_grad:
            book.firsts.append(get_gradient_edge(output))
        kept, version = [x.detach()], x._version

        def enter(grad: Tensor) -> None:
            remembered, dtype = kept.pop(), parameters[0].dtype  # and let go of the input
            if remembered._version != version:
                raise ValueError(
                    f"the input of {name} was changed in place after {name} saw it; set "
                    "inplace = False, or write x = x + y for x += y"
                )
            if remembered.is_floating_point():
                remembered = remembered.to(dtype)
            RULES[type(layer)](layer, remembered, grad.to(dtype), book)

        output.register_hook(enter)  # type: ignore[no-untyped-call]
        return output if is_view else None

    return hook


def _uses(value: Tensor) -> Counter[Tensor]:
    """Count the edges of the graph that end in each parameter, through casts of it too."""
    uses: Counter[Tensor] = Counter()
    stack = [value.grad_fn] if value.grad_fn is not None else []
    seen: set[Node] = set(stack)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is None:
                continue
            leaf = _leaf(child)
            if leaf is not None:
                uses[leaf] += 1
            elif child not in seen:
                seen.add(child)
                stack.append(child)
    return uses


def _leaf(node: Node) -> Tensor | None:
    """Return the parameter that a node stands for, be it cast to another type."""
    if node.name() == "ToCopyBackward0":
        following = node.next_functions[0][0]
        return None if following is None else _leaf(following)
    if node.name() != "torch::autograd::AccumulateGrad":
        return None
    variable: Tensor = node.variable  # type: ignore[attr-defined]
    return variable
