"""GRU and LSTM run step by step, so that the gradient of every gate at every step is at hand.

A direction of a layer is two linear maps, of the inputs and of the states, and a recurrence between
them without parameters. The maps are written down like any linear layer; the recurrence is a
function with its derivative written out, for autograd's own would be twice as slow.

References:
    Cho et al. 2014, https://arxiv.org/abs/1406.1078; Hochreiter and Schmidhuber 1997,
    https://doi.org/10.1162/neco.1997.9.8.1735; both in the form torch.nn documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional

from client.bookkeeping.book import Book, OutOfOrder
from client.bookkeeping.layers import write_linear

Answer = Callable[[Tensor, Tensor], None]


class Gates(NamedTuple):
    """The parameters of one direction of one layer, as torch names them."""

    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None


class GRUSteps(torch.autograd.Function):
    """The recurrence of a GRU; ``answer`` is told states and gradients of their linear map."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, inputs: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, answer: Answer
    ) -> Tensor:
        steps, n, hidden = len(inputs), state.shape[0], state.shape[1]
        states = inputs.new_empty(steps + 1, n, hidden)
        gates, maps = torch.empty_like(inputs), inputs.new_empty(steps, n, hidden)
        states[0] = state
        for t in range(steps):
            mapped = functional.linear(states[t], weight, bias)
            both = torch.add(inputs[t, :, : 2 * hidden], mapped[:, : 2 * hidden]).sigmoid_()
            reset, update = both.chunk(2, 1)
            maps[t] = mapped[:, 2 * hidden :]
            new = torch.addcmul(inputs[t, :, 2 * hidden :], reset, maps[t]).tanh_()
            gates[t, :, : 2 * hidden] = both
            gates[t, :, 2 * hidden :] = new
            torch.lerp(new, states[t], update, out=states[t + 1])
        ctx.save_for_backward(states, gates, maps, weight)
        ctx.answer = answer
        return states[1:].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (grad,) = grads
        states, gates, maps, weight = ctx.saved_tensors
        reset, update, new = gates.chunk(3, 2)
        by_new = (1 - update) * (1 - new.square())
        by_reset = by_new * maps * reset * (1 - reset)
        by_update = (states[:-1] - new) * update * (1 - update)
        slopes = torch.cat([by_reset, by_update, by_new * reset], dim=2)
        steps, n, hidden = maps.shape
        arriving, mapped = torch.empty_like(maps), torch.empty_like(gates)
        carried = torch.zeros_like(states[0])
        for t in reversed(range(steps)):
            here = torch.add(grad[t], carried, out=arriving[t])
            three = here.unsqueeze(1)
            torch.mul(slopes[t].view(n, 3, hidden), three, out=mapped[t].view(n, 3, hidden))
            carried = torch.addmm(here * update[t], mapped[t], weight)
        ctx.answer(states[:-1].transpose(0, 1), mapped.transpose(0, 1))
        inputs = torch.cat([mapped[..., : 2 * hidden], by_new * arriving], dim=2)
        return inputs, carried, None, None, None


class LSTMSteps(torch.autograd.Function):
    """The recurrence of an LSTM; ``answer`` is told states and gradients of their linear map."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        inputs: Tensor,
        state: Tensor,
        cell: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        answer: Answer,
    ) -> tuple[Tensor, Tensor]:
        steps, n, hidden = len(inputs), state.shape[0], state.shape[1]
        states = inputs.new_empty(steps + 1, n, hidden)
        cells, gates = torch.empty_like(states), torch.empty_like(inputs)
        states[0], cells[0] = state, cell
        for t in range(steps):
            torch.add(inputs[t], functional.linear(states[t], weight, bias), out=gates[t])
            gates[t, :, : 2 * hidden].sigmoid_()
            gates[t, :, 2 * hidden : 3 * hidden].tanh_()
            gates[t, :, 3 * hidden :].sigmoid_()
            enter, forget, new, out = gates[t].chunk(4, 1)
            torch.addcmul(forget * cells[t], enter, new, out=cells[t + 1])
            torch.mul(out, cells[t + 1].tanh(), out=states[t + 1])
        ctx.save_for_backward(states, cells, gates, weight)
        ctx.answer = answer
        return states[1:].clone(), cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        grad, carried_cell = grads
        states, cells, gates, weight = ctx.saved_tensors
        enter, forget, new, out = gates.chunk(4, 2)
        bent = cells[1:].tanh()
        by_out = bent * out * (1 - out)
        to_cell = out * (1 - bent.square())
        by_cell = torch.cat(
            [
                new * enter * (1 - enter),
                cells[:-1] * forget * (1 - forget),
                enter * (1 - new.square()),
            ],
            dim=2,
        )
        steps, n, hidden = bent.shape
        mapped, carried = torch.empty_like(gates), torch.zeros_like(states[0])
        for t in reversed(range(steps)):
            here = grad[t] + carried
            at_cell = torch.addcmul(carried_cell, here, to_cell[t])
            three = by_cell[t].view(n, 3, hidden) * at_cell.unsqueeze(1)
            mapped[t, :, : 3 * hidden] = three.view(n, 3 * hidden)
            mapped[t, :, 3 * hidden :] = here * by_out[t]
            carried, carried_cell = mapped[t] @ weight, at_cell * forget[t]
        ctx.answer(states[:-1].transpose(0, 1), mapped.transpose(0, 1))
        return mapped, carried, carried_cell, None, None, None


def run_gru(
    layer: nn.GRU, name: str, book: Book, x: Tensor, hx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what ``layer(x, hx)`` does."""

    def direction(inputs: Tensor, index: int, gates: Gates, answer: Answer) -> tuple[Tensor, ...]:
        state = _state(layer, hx, inputs)[index]
        states = GRUSteps.apply(inputs, state, gates.weight_hh, gates.bias_hh, answer)  # type: ignore[no-untyped-call]
        return states, states[-1]

    with torch.autocast(next(layer.parameters()).device.type, enabled=False):
        output, last = _run(layer, name, book, x, direction)
    return output, torch.stack([state for (state,) in last])


def run_lstm(
    layer: nn.LSTM, name: str, book: Book, x: Tensor, hx: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return what ``layer(x, hx)`` does."""
    first, second = (None, None) if hx is None else hx

    def direction(inputs: Tensor, index: int, gates: Gates, answer: Answer) -> tuple[Tensor, ...]:
        state, cell = (_state(layer, given, inputs)[index] for given in (first, second))
        states, cell = LSTMSteps.apply(  # type: ignore[no-untyped-call]
            inputs, state, cell, gates.weight_hh, gates.bias_hh, answer
        )
        return states, states[-1], cell

    with torch.autocast(next(layer.parameters()).device.type, enabled=False):
        output, last = _run(layer, name, book, x, direction)
    states, cells = zip(*last, strict=True)
    return output, (torch.stack(states), torch.stack(cells))


def is_plain(layer: nn.Module) -> bool:
    """Return whether ``layer`` can be run here: without projection or other parameters."""
    plain = {name for names in getattr(layer, "_all_weights", []) for name in names}
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    return own == plain and not getattr(layer, "proj_size", 0)


def _run(
    layer: nn.RNNBase,
    name: str,
    book: Book,
    x: Tensor,
    direction: Callable[[Tensor, int, Gates, Answer], tuple[Tensor, ...]],
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Return all outputs, and for each layer and direction its last states."""
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise OutOfOrder(f"{name} is given packed or single sequences")
    if x.shape[0 if layer.batch_first else 1] != len(book.layout.owner):
        raise OutOfOrder(f"{name} is not given as many sequences as images")
    x = x.to(next(layer.parameters()).dtype)
    x = x.transpose(0, 1) if layer.batch_first else x  # (t, n, features)
    last: list[tuple[Tensor, ...]] = []
    for level in range(layer.num_layers):
        if level:
            x = functional.dropout(x, layer.dropout, layer.training)
        outputs = []
        for backwards in range(1 + layer.bidirectional):
            suffix = f"l{level}{'_reverse' if backwards else ''}"
            gates = Gates(*(getattr(layer, f"{p}_{suffix}", None) for p in Gates._fields))  # type: ignore[arg-type]
            given = x.flip(0) if backwards else x
            inputs = _mapped(gates, given, book, f"{name}.{suffix}")
            answer = _answer(gates.weight_hh, gates.bias_hh, book)
            book.calls.update(_trained(gates.weight_hh, gates.bias_hh))
            states, *ends = direction(inputs, len(last), gates, answer)
            outputs.append(states.flip(0) if backwards else states)
            last.append(tuple(ends))
        x = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    return x.transpose(0, 1) if layer.batch_first else x, last


def _mapped(gates: Gates, x: Tensor, book: Book, name: str) -> Tensor:
    """Return the linear map of the inputs, and have its gradient written down."""
    mapped = functional.linear(x, gates.weight_ih, gates.bias_ih)
    book.calls.update(_trained(gates.weight_ih, gates.bias_ih))
    if not mapped.requires_grad:
        mapped.requires_grad_()
    if not x.requires_grad:
        book.firsts.append(get_gradient_edge(mapped))
    answer = _answer(gates.weight_ih, gates.bias_ih, book)
    kept, version = [x.detach()], x._version

    def enter(grad: Tensor) -> None:
        given = kept.pop()
        if given._version != version:
            raise ValueError(
                f"the input of {name} was changed in place after {name} saw it; set "
                "inplace = False, or write x = x + y for x += y"
            )
        answer(given.transpose(0, 1), grad.transpose(0, 1))

    mapped.register_hook(enter)  # type: ignore[no-untyped-call]
    return mapped


def _answer(weight: Tensor, bias: Tensor | None, book: Book) -> Answer:
    """Return what writes down a linear map from its inputs and gradients: both (n, t, ...)."""

    def answer(x: Tensor, grad: Tensor) -> None:
        if weight.requires_grad:
            write_linear(weight, x, grad, book)
        if bias is not None and bias.requires_grad:
            book.write(bias, book.layout.from_images(grad.sum(1)))

    return answer


def _trained(*parameters: nn.Parameter | None) -> list[nn.Parameter]:
    return [p for p in parameters if p is not None and p.requires_grad]


def _state(layer: nn.RNNBase, given: Tensor | None, inputs: Tensor) -> Tensor:
    """Return the initial states, one for each layer and direction: zeros if none is given."""
    if given is not None:
        return given
    directions = layer.num_layers * (1 + layer.bidirectional)
    return inputs.new_zeros(directions, inputs.shape[1], layer.hidden_size)
