"""Adam that knows how much noise was added to its gradients.

The second moment of a noisy gradient is that of the gradient plus the noise's variance, which under
differential privacy is most of it and makes Adam step as if by sign. The variance is known, so it
is taken out again. Post-processing: no privacy is spent.

References:
    Tang, Shpilevskiy and Lecuyer 2024, DP-AdamBC: your DP-Adam is actually DP-SGD (unless you apply
    bias correction), AAAI, https://arxiv.org/abs/2312.14334, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

#: Below this the corrected second moment is not believed (the paper's gamma', squared).
FLOOR = 1e-8


class AdamCorrected(torch.optim.Optimizer):
    """Adam whose second moment lacks the variance of Gaussian noise of a known ``deviation``."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        deviation: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(parameters, {"lr": lr, "deviation": deviation, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients the parameters hold."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros_like(parameter)
                state["step"] += 1
                state["mean"].lerp_(parameter.grad, 1 - first)
                state["square"].lerp_(parameter.grad.square(), 1 - second)
                mean = state["mean"] / (1 - first ** state["step"])
                square = state["square"] / (1 - second ** state["step"])
                signal = (square - group["deviation"] ** 2).clamp(min=FLOOR)
                parameter.sub_(mean / signal.sqrt(), alpha=group["lr"])
