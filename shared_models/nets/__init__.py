"""Networks, one family per file, each trainable under differential privacy.

``BUILTIN`` names each family's ``make(**params) -> torch.nn.Module``. No net keeps batch statistics
or works in place: a patient's gradient must not depend on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from shared_models.registry import find
from shared_models.weights import Weights

if TYPE_CHECKING:
    from torch.nn import Module

BUILTIN = {
    "autoencoder": "shared_models.nets.autoencoder:make",
    "centres": "shared_models.nets.centres:make",
    "centernet": "shared_models.nets.centernet:make",
    "densenet": "shared_models.nets.densenet:make",
    "dncnn": "shared_models.nets.dncnn:make",
    "gan": "shared_models.nets.gan:make",
    "recurrent": "shared_models.nets.recurrent:make",
    "unet": "shared_models.nets.unet:make",
    "unrolled": "shared_models.nets.unrolled:make",
    "walker": "shared_models.nets.walker:make",
}


def make(
    name: str,
    params: Mapping[str, Any],
    *,
    seed: int,
    num_outputs: int,
    plugins: Collection[str] = (),
) -> Module:
    """Return the net called ``name`` with weights drawn from ``seed`` alone.

    Args:
        name: as in the plan.
        params: the family's own parameters.
        seed: the global random state is neither used nor changed.
        num_outputs: output channels, which the task decides.
        plugins: distributions whose nets may be used, as ``name==version``.

    Raises:
        ValueError: if the name or a parameter is unknown, or the net cannot be trained privately.
    """
    import torch

    from shared_models.nets.base import made_private_ready

    function = find("nets", name, builtin=BUILTIN, plugins=plugins)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made_private_ready(function(num_outputs=num_outputs, **params))


def filled(
    name: str,
    params: Mapping[str, Any],
    weights: Weights,
    *,
    num_outputs: int,
    plugins: Collection[str] = (),
) -> Module:
    """Return the net called ``name`` with ``weights``, which are read one array at a time.

    None of ours is drawn first, for all that it holds is among its weights.

    Raises:
        ValueError: as ``make`` does.
        RuntimeError: if the weights are not the net's.
    """
    import torch

    from shared_models.nets.base import load_weights

    if name in BUILTIN:
        with torch.device("meta"):
            net = make(name, params, seed=0, num_outputs=num_outputs)
        net.to_empty(device="cpu")
    else:
        net = make(name, params, seed=0, num_outputs=num_outputs, plugins=plugins)
    load_weights(net, weights)
    return net
