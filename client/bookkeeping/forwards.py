"""Layers that run differently while the book is open, so that their gradients come apart by image.

Normalizations and PReLU get a copy of their weights for each image: then autograd's own backward
pass leaves the gradient of every image behind, at no further cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from client.bookkeeping import recurrent
from client.bookkeeping.book import Book, OutOfOrder

Run = Callable[[Any, str, Book, Any, Any], Any]


def run_group_norm(layer: nn.GroupNorm, name: str, book: Book, x: Tensor, _: None) -> Tensor:
    """Return what ``layer(x)`` does, all images as the channels of one."""
    return _normalized(layer, name, book, x, layer.num_groups)


def run_instance_norm(
    layer: nn.modules.instancenorm._InstanceNorm, name: str, book: Book, x: Tensor, _: None
) -> Tensor:
    """Return what ``layer(x)`` does: a group normalization of one channel a group."""
    if x.ndim != AXES[type(layer)]:
        raise OutOfOrder(f"{name} is not given images of the dimensions it is for")
    if x[0, 0].numel() == 1:
        raise ValueError(f"expected more than one value in each channel, as {name} normalizes it")
    return _normalized(layer, name, book, x, x.shape[1])


def _normalized(layer: Any, name: str, book: Book, x: Tensor, num_groups: int) -> Tensor:
    n = _num_images(x, name, book)
    weight, bias = (
        None if p is None else _for_each_image(p, n, book, of=p) for p in (layer.weight, layer.bias)
    )
    one = x.reshape(1, -1, *x.shape[2:])
    return torch.group_norm(one, n * num_groups, weight, bias, layer.eps).view(x.shape)


def run_prelu(layer: nn.PReLU, name: str, book: Book, x: Tensor, _: None) -> Tensor:
    """Return what ``layer(x)`` does."""
    n = _num_images(x, name, book)
    slopes = _for_each_image(layer.weight.to(x.dtype), n, book, of=layer.weight)
    slopes = slopes.view(n, layer.num_parameters, *[1] * (x.ndim - 2))
    return torch._prelu_kernel(x, slopes)


def _num_images(x: Tensor, name: str, book: Book) -> int:
    if x.ndim < 2 or len(x) != len(book.layout.owner):
        raise OutOfOrder(f"{name} is not given images first")
    return len(x)


def _for_each_image(values: Tensor, n: int, book: Book, *, of: Tensor) -> Tensor:
    """Return ``values`` (c,) repeated to (n c,), whose gradients are those of the parameter."""
    copies = values.repeat(n)
    if copies.requires_grad:
        book.calls[of] += 1
        book.firsts.append(get_gradient_edge(copies))

        def enter(grad: Tensor) -> None:
            per_image = grad.view(n, -1).to(of.dtype)
            book.write(of, book.layout.from_images(per_image))

        copies.register_hook(enter)  # type: ignore[no-untyped-call]
    return copies


# How many axes an input has when its first is the images.
AXES: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: 3,
    nn.InstanceNorm2d: 4,
    nn.InstanceNorm3d: 5,
}

FORWARDS: dict[type[nn.Module], Run] = {
    nn.GroupNorm: run_group_norm,
    nn.InstanceNorm1d: run_instance_norm,
    nn.InstanceNorm2d: run_instance_norm,
    nn.InstanceNorm3d: run_instance_norm,
    nn.PReLU: run_prelu,
    nn.GRU: recurrent.run_gru,
    nn.LSTM: recurrent.run_lstm,
}


@contextmanager
def replaced(layer: nn.Module, name: str, book: Book) -> Iterator[None]:
    """Run ``layer`` by ``FORWARDS`` while the context lasts."""
    run, original = FORWARDS[type(layer)], layer.forward

    def forward(input: Any, hx: Any = None) -> Any:  # noqa: A002
        if not torch.is_grad_enabled():
            return original(input) if hx is None else original(input, hx)
        return run(layer, name, book, input, hx)

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
