"""Classifier-free guidance (Ho & Salimans 2022, 2207.12598), in one batched call, inside an interval of noise levels.

The interval: Kynkäänniemi et al. 2024 (2404.07724): guidance hurts at the noisiest levels and does nothing at the cleanest, so
outside the interval only the conditional branch is run, at half the cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.diffusion.objectives import Denoiser
from tubelet.diffusion.solvers import Denoise


def guided(
    network_denoise: Denoiser[Condition],
    condition: Condition,
    null_condition: Condition,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
) -> Denoise:
    """Bind a condition: `x_null + scale * (x_cond - x_null)` inside `interval`, the conditional x_hat outside.

    Guiding x_hat, eps or any velocity is the same, since each is affine in the other with weights that do not depend on the
    condition (Ho & Salimans 2022, eq. 6, whose w is scale - 1).

    Args:
        network_denoise: from `objectives.denoiser`; called once a step, on a doubled batch while guiding.
        condition, null_condition: one entry per sample each.
        scale: 1 runs the conditional branch alone, 0 would be the null one, above 1 follows the prompt more closely.
        interval: `(low, high)` noise levels, both included. Where sigma differs between cells the noisiest one decides.
        channels: how many of the first are guided, None all; the others are what the condition alone says. DiT's published
            scores guide 3 of 4 (Peebles & Xie 2023, appendix A; 1 + 3/4 of the strength in all comes close).

    Raises UserError for a scale that is not finite, an interval outside [0, 1] or upside down, or unequal batches.
    """
    low, high = interval
    if not math.isfinite(scale):
        raise UserError(f"guidance must be a finite number, got {scale}; 1 means none, 2 to 5 is usual")
    if not 0 <= low <= high <= 1:
        raise UserError(f"guidance interval must lie in [0, 1], low before high, got {interval}; (0, 1) means always")
    if len(condition) != len(null_condition):
        raise UserError(f"{len(condition)} conditions but {len(null_condition)} empty ones; give one empty prompt per prompt")
    both = Condition.cat([condition, null_condition]) if scale != 1 else condition

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        if len(z) != len(condition):
            raise UserError(f"{len(condition)} conditions for a batch of {len(z)}; give one condition per sample")
        if scale == 1 or not low <= float(sigma.max()) <= high:
            return network_denoise(z, sigma, condition)
        twice = torch.cat([sigma, sigma]) if sigma.ndim and len(sigma) == len(z) else sigma
        x_cond, x_null = network_denoise(torch.cat([z, z]), twice, both).chunk(2)  # 2 x (B, C, T, H, W)
        led = x_null + scale * (x_cond - x_null)
        return led if channels is None else torch.cat([led[:, :channels], x_cond[:, channels:]], dim=1)

    return denoise
