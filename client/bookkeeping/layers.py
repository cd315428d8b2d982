"""The weight gradient of each kind of layer, patient by patient.

A rule takes a layer, the input it saw, the gradient of its output and the book, and writes down
the gradient of each of its trainable parameters. Inputs are (n, ...), the images first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.bookkeeping.book import ROUNDING, Book, Ghost

Conv = nn.modules.conv._ConvNd


Rule = Callable[[Any, Tensor, Tensor, Book], None]


def is_cheaper_as_ghost(positions: int, parameter: Tensor) -> bool:
    """Return whether two matrices of positions x positions are smaller than the gradient."""
    return 2 * positions**2 < parameter.numel()


def write_bias(bias: Tensor | None, per_image: Callable[[], Tensor], book: Book) -> None:
    """Write the gradient of a small parameter, given for each image: (n, *shape)."""
    if bias is not None and bias.requires_grad:
        book.write(bias, book.layout.from_images(per_image()))


def write_linear(weight: Tensor, x: Tensor, grad: Tensor, book: Book) -> None:
    """Write the gradient of ``weight`` (out, in): x (n, [...,] in), grad (n, [...,] out)."""
    rows = book.layout.units(x).flatten(1, -2)
    grads = book.layout.units(grad).flatten(1, -2)
    if book.may_be_ghost(weight) and is_cheaper_as_ghost(rows.shape[1], weight):

        def weighted(factors: Tensor) -> Tensor:
            scaled = scaled_rows(grad, factors).flatten(0, -2)
            return scaled.t() @ finite_rows(x, factors).flatten(0, -2)

        book.write(weight, Ghost(ghost_norm(rows.mT, grads.mT), weighted))
    else:
        book.write(weight, book.layout.from_units(grads.mT @ rows))


def ghost_norm(columns: Tensor, grads: Tensor) -> Tensor:
    """Return |grads columns^T|^2, rounded up: (units, k, t), (units, o, t) to (units,)."""
    if columns.shape[2] == 1:
        return columns.flatten(1).square().sum(1) * grads.flatten(1).square().sum(1)
    return product_norm(columns.mT @ columns, grads.mT @ grads)


def product_norm(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of the products of two (units, t, t), rounded up: (units,).

    The sum can cancel, and what cancels leaves rounding errors behind: their bound is added.
    """
    first, second = first.flatten(1), second.flatten(1)
    norms = torch.linalg.vecdot(first, second).clamp(min=0)
    bound = torch.linalg.vector_norm(first, dim=1) * torch.linalg.vector_norm(second, dim=1)
    rounded_up: Tensor = norms + ROUNDING * torch.finfo(norms.dtype).eps * bound
    return rounded_up


def scaled_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Return rows (n, ...) times factors (n,); a factor 0 also drops what is not finite."""
    return finite_rows(rows, factors) * factors.view(-1, *[1] * (rows.ndim - 1))


def finite_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Return rows (n, ...) with those of factor 0 set to zero."""
    if not bool((factors == 0).any()):
        return rows
    return torch.where(factors.view(-1, *[1] * (rows.ndim - 1)) == 0, 0, rows)


def linear(layer: nn.Linear, x: Tensor, grad: Tensor, book: Book) -> None:
    """Write a fully connected layer."""
    if layer.weight.requires_grad:
        write_linear(layer.weight, x, grad, book)
    write_bias(layer.bias, lambda: _inner_sum(grad, 1), book)


def convolution(layer: Conv, x: Tensor, grad: Tensor, book: Book) -> None:
    """Write a convolution, transposed or not."""
    x, padding = _padded(layer, x)
    image, other = (grad, x) if layer.transposed else (x, grad)
    positions = prod(other.shape[2:]) * book.layout.width
    if (
        not layer.weight.requires_grad
        or layer.groups > 1
        or any(e >= s for e, s in zip(_extra(layer, x, grad), layer.stride, strict=True))
        or not book.may_be_ghost(layer.weight)
        or not is_cheaper_as_ghost(positions, layer.weight)
    ):
        _convolution_whole(layer, x, grad, padding, book)
        return

    def weighted(factors: Tensor) -> Tensor:
        scaled, clean = scaled_rows(grad, factors), finite_rows(x, factors)
        return _weight_gradient(layer, clean, scaled, padding, 1)[0]

    others = _side_by_side(book.layout.units(other))
    seen = _seen_products(layer, image, padding, prod(other.shape[2:]), book)
    book.write(layer.weight, Ghost(product_norm(seen, others.mT @ others), weighted))
    write_bias(layer.bias, lambda: grad.flatten(2).sum(2), book)


def _seen_products(
    layer: Conv, image: Tensor, padding: Sequence[int], positions: int, book: Book
) -> Tensor:
    """Return the products of what the kernel sees at any two positions: (units, t, t).

    Where the kernel moves by single steps, they are sums over the kernel of products of pixels,
    which is the cheaper way unless there are many pixels to few positions.
    """
    pixels = prod(image.shape[2:])
    if any(s > 1 for s in layer.stride) or pixels**2 > prod(layer.kernel_size) * positions**2:
        columns = _side_by_side(book.layout.units(_columns(layer, image, padding)))
        return columns.mT @ columns
    dims, shape = len(padding), (book.layout.width, *image.shape[2:])
    images = _side_by_side(book.layout.units(image))
    products = (images.mT @ images).view(-1, *shape, *shape)
    around = [p for p in reversed(padding) for _ in range(2)]
    products = functional.pad(products, [*around, 0, 0, *around]) if any(padding) else products
    sizes = [
        products.shape[2 + i] - layer.dilation[i] * (layer.kernel_size[i] - 1) for i in range(dims)
    ]
    total: Tensor | None = None
    for offset in product(*(range(k) for k in layer.kernel_size)):
        window = products
        for axis, (place, step) in enumerate(zip(offset, layer.dilation, strict=True)):
            window = window.narrow(2 + axis, place * step, sizes[axis])
            window = window.narrow(3 + dims + axis, place * step, sizes[axis])
        total = window.clone() if total is None else total.add_(window)
    assert total is not None  # a kernel has at least one place
    return total.view(len(total), book.layout.width * prod(sizes), -1)


def _convolution_whole(
    layer: Conv, x: Tensor, grad: Tensor, padding: Sequence[int], book: Book
) -> None:
    """Write all weight gradients by one convolution in which every patient is a group."""
    if not layer.weight.requires_grad:
        write_bias(layer.bias, lambda: grad.flatten(2).sum(2), book)
        return
    if _is_pointwise(layer, padding) and layer.groups == 1 and x.shape[2:] == grad.shape[2:]:
        rows, grads = (_side_by_side(book.layout.units(t)) for t in (x, grad))
        first, second = (rows, grads) if layer.transposed else (grads, rows)
        weights = book.layout.from_units(first @ second.mT)
        book.write(layer.weight, weights.view(-1, *layer.weight.shape))
        write_bias(layer.bias, lambda: grad.flatten(2).sum(2), book)
        return
    x, grad = (book.layout.units(t).transpose(0, 1).flatten(1, 2) for t in (x, grad))
    units = grad.shape[1] // layer.out_channels
    weights, biases = _weight_gradient(layer, x, grad, padding, units)
    layout = book.layout
    book.write(layer.weight, layout.from_units(weights.view(units, *layer.weight.shape)))
    if layer.bias is not None and layer.bias.requires_grad:
        book.write(layer.bias, layout.from_units(biases.view(units, -1)))


def _weight_gradient(
    layer: Conv, x: Tensor, grad: Tensor, padding: Sequence[int], units: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias of ``units`` equal convolutions side by side."""
    weight = layer.weight.new_empty((units * layer.weight.shape[0], *layer.weight.shape[1:]))
    has_bias = layer.bias is not None and layer.bias.requires_grad
    _, weights, biases = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [units * layer.out_channels] if has_bias else None,
        layer.stride,
        padding,
        layer.dilation,
        layer.transposed,
        _extra(layer, x, grad),
        layer.groups * units,
        [False, True, has_bias],
    )
    return cast(Tensor, weights), cast(Tensor, biases)


def _extra(layer: Conv, x: Tensor, grad: Tensor) -> list[int]:
    """Return the output padding of one use: a transposed convolution may be told its output."""
    if not layer.transposed:
        return [0] * (x.ndim - 2)
    extra = []
    for axis, (k, s, d) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ):
        around = 2 * int(layer.padding[axis])
        extra.append(
            grad.shape[2 + axis] - ((x.shape[2 + axis] - 1) * s - around + d * (k - 1) + 1)
        )
    return extra


def _padded(layer: Conv, x: Tensor) -> tuple[Tensor, Sequence[int]]:
    """Return the input as the bare convolution sees it, and the zero padding still to come."""
    around = layer._reversed_padding_repeated_twice
    if layer.padding_mode != "zeros":
        return functional.pad(x, around, mode=layer.padding_mode), [0] * (x.ndim - 2)
    if isinstance(layer.padding, str):
        return functional.pad(x, around), [0] * (x.ndim - 2)
    return x, layer.padding


def _columns(layer: Conv, image: Tensor, padding: Sequence[int]) -> Tensor:
    """Return what the kernel sees at each position: (n, channel x kernel, positions)."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if image.ndim == 4:
        return functional.unfold(
            image,
            cast(tuple[int, int], kernel),
            cast(tuple[int, int], dilation),
            cast(tuple[int, int], tuple(padding)),
            cast(tuple[int, int], stride),
        )
    image = functional.pad(image, [p for p in reversed(padding) for _ in range(2)])
    dims = image.ndim - 2
    for axis in range(dims):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        image = image.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return image.permute(order).flatten(1, 1 + dims).flatten(2)


def _is_pointwise(layer: Conv, padding: Sequence[int]) -> bool:
    return {*layer.kernel_size, *layer.stride} == {1} and not any(padding)


def _side_by_side(units: Tensor) -> Tensor:
    """Return (units, width, k, ...) as (units, k, positions)."""
    return units.transpose(1, 2).flatten(2)


def layer_norm(layer: nn.LayerNorm, x: Tensor, grad: Tensor, book: Book) -> None:
    """Write a layer normalization."""
    shape = layer.normalized_shape
    normal = functional.layer_norm(x, shape, eps=layer.eps)
    write_bias(layer.weight, lambda: _inner_sum(grad * normal, len(shape)), book)
    write_bias(layer.bias, lambda: _inner_sum(grad, len(shape)), book)


def _inner_sum(rows: Tensor, dims: int) -> Tensor:
    """Sum (n, ..., *shape) over what lies between, ``shape`` being the last ``dims`` axes."""
    between = list(range(1, rows.ndim - dims))
    return rows.sum(dim=between) if between else rows


def embedding(layer: nn.Embedding, x: Tensor, grad: Tensor, book: Book) -> None:
    """Write an embedding: indices (n, ...)."""
    layout, (words, features) = book.layout, layer.weight.shape
    if layer.padding_idx is not None:
        grad = grad * (x != layer.padding_idx)[..., None]
    place = layout.owner.view(-1, *[1] * (x.ndim - 1)) * words + x
    sums = grad.new_zeros((layout.num_patients * words, features))
    sums.index_add_(0, place.flatten(), grad.flatten(0, -2))
    book.write(layer.weight, sums.view(layout.num_patients, words, features))


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: convolution,
    nn.ConvTranspose2d: convolution,
    nn.ConvTranspose3d: convolution,
    nn.LayerNorm: layer_norm,
    nn.Embedding: embedding,
}


def has_images_first(layer: nn.Module, x: Tensor, num_images: int) -> bool:
    """Return whether the first axis of a layer's input can be the images."""
    if x.ndim == 0 or len(x) != num_images:
        return False
    if isinstance(layer, Conv):
        return x.ndim == layer.weight.ndim
    if isinstance(layer, nn.LayerNorm):
        return x.ndim > len(layer.normalized_shape)
    return x.ndim > 1 or isinstance(layer, nn.Embedding)
