"""Whether patients meet inside a net, seen by what it answers and whatever its layers are.

Layers known to keep statistics over images are refused by their type (``client.dp``); this finds
the others: a plug-in net that compares or averages the images of a batch has no gradient of one
patient alone, and nothing bounds what one patient changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Rounding differs a little with the size of a batch; mixing differs by far more.
TOLERANCE = 1e-3


def mixes_images(net: nn.Module, images: Tensor) -> bool:
    """Tell whether the answer to any of ``images`` (n, channel, [z,] y, x) depends on the others.

    A probe, no proof. The net is asked as it evaluates, without dropout. Statistics used only in
    training have to be kept for evaluation, in buffers, and a buffer that changed stops a private
    round.
    """
    was_training = net.training
    net.eval()
    with torch.no_grad():
        together = net(images)
        alone = torch.cat([net(image[None]) for image in images])
    net.train(was_training)
    if together.shape != alone.shape:
        return True
    return bool((together - alone).abs().max() > TOLERANCE * alone.abs().max())
