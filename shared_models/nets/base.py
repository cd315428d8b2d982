"""What every net must be: without batch statistics, without in-place work, all float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from shared_models.weights import Array

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
    state = net.state_dict()
    odd = [name for name, value in state.items() if not value.is_floating_point()]
    if odd:
        raise ValueError(f"expected float parameters only, got others in {', '.join(odd[:5])}")
    return {name: value.detach().float().cpu().numpy().copy() for name, value in state.items()}


def load_weights(net: nn.Module, weights: Mapping[str, Array]) -> None:
    """Put ``weights`` into ``net``; names and shapes must match exactly."""
    state: dict[str, Tensor] = {
        name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in weights.items()
    }
    net.load_state_dict(state, strict=True)
