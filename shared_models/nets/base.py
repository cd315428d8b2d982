"""What every net must be: without batch statistics, without in-place work, all float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from shared_models.weights import Array, Schema
from shared_models.weights import schema_of as schema_of_weights

BATCH_NORMS = (nn.modules.batchnorm._NormBase,)


def made_private_ready(net: nn.Module) -> nn.Module:
    """Return ``net`` with in-place activations switched off.

    Raises:
        ValueError: if it keeps batch statistics; the message names the layers and the cure.
    """
    mixing = [
        name
        for name, module in net.named_modules()
        if isinstance(module, BATCH_NORMS)
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
    ]
    if mixing:
        raise ValueError(
            f"expected a net without batch statistics, got them in {', '.join(mixing[:5])}; "
            "use group or instance normalization"
        )
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return net


def weights_of(net: nn.Module) -> dict[str, Array]:
    """Return a copy of the net's parameters and buffers as float32 arrays.

    Raises:
        ValueError: if some are not floating point.
    """
    return {name: weight_of(value).copy() for name, value in _floating(net).items()}


def weight_of(value: Tensor) -> Array:
    """Return one of a net's tensors as float32; it may be the tensor's own memory."""
    array: Array = value.detach().float().cpu().numpy()
    return array


def schema_of(net: nn.Module) -> Schema:
    """Return names and shapes of the net's parameters and buffers, sorted by name.

    Raises:
        ValueError: if some are not floating point.
    """
    return tuple((name, tuple(value.shape)) for name, value in sorted(_floating(net).items()))


def load_weights(net: nn.Module, weights: Mapping[str, Array]) -> None:
    """Put ``weights`` into ``net``, one array at a time; names and shapes must match exactly.

    Raises:
        RuntimeError: if they do not.
    """
    state = net.state_dict()
    found, expected = schema_of_weights(weights), {n: tuple(v.shape) for n, v in state.items()}
    odd = sorted(n for n, _ in dict(found).items() ^ expected.items())
    if odd:
        raise RuntimeError(
            f"expected the weights of {type(net).__name__}, got others: {', '.join(odd[:5])}"
        )
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(torch.from_numpy(np.array(weights[name], dtype=np.float32)))


def _floating(net: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = net.state_dict()
    odd = [name for name, value in state.items() if not value.is_floating_point()]
    if odd:
        raise ValueError(f"expected float parameters only, got others in {', '.join(odd[:5])}")
    return state
