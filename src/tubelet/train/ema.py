"""Power-function averages of weights (Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion
Models").

The average at update t is the integral of tau^gamma * theta(tau), normalised (section 3.1, eq. 1). Its width is a fixed share
of the whole run, `sigma_rel`, whatever the run's length; early weights, which are far off, have no weight at all.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError


def gamma_of(sigma_rel: float) -> float:
    """The exponent whose profile has the relative standard deviation `sigma_rel`, in (0, 0.28].

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (appendix C): the largest real root of
    gamma^3 + 7 gamma^2 + (16 - sigma_rel^-2) gamma + (12 - sigma_rel^-2) = 0. 0.10 gives 6.94.
    """
    if not 0.0 < sigma_rel <= 0.28:
        raise UserError(f"sigma_rel of the weight average must lie in (0, 0.28], got {sigma_rel}; 0.10 is a good start")
    square = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def sigma_rel_of(gamma: float) -> float:
    """The inverse of `gamma_of`."""
    return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))


class PowerAverage:
    """A frozen copy of `model` that follows it: average <- beta * average + (1 - beta) * weights.

    beta = (1 - 1/t)^(gamma + 1) (eq. 2). `updates` is t, counted from 1; at t = 1 beta is 0 and the average equals the weights.
    Buffers are copied, not averaged.
    """

    def __init__(self, model: nn.Module, sigma_rel: float = 0.10) -> None:
        self.gamma = gamma_of(sigma_rel)
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one optimiser update."""
        self.updates += 1
        beta = (1.0 - 1.0 / self.updates) ** (self.gamma + 1.0)
        averages: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], 1.0 - beta)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
