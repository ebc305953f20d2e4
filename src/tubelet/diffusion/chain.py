"""The loss of a network that predicts v on a chain of whole steps, with or without its own last estimate in view.

v: Salimans & Ho 2022 (2202.00512, appendix D). Self-conditioning: Chen et al. 2022, "Analog Bits" (2208.04202, section 3.2), as
W.A.L.T trains it (Gupta et al. 2023, 2312.06662): in most steps the network is first asked without an estimate, and that
answer, through which no gradient flows, stands beside the noise when it is asked again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.diffusion.objectives import convert
from tubelet.diffusion.paths import VariancePreserving

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`(z (B, C, ...), t (B,), estimate of x or None) -> v (B, C, ...)`; a condition is already bound."""


def v_loss(
    network: Network, x: Tensor, rng: torch.Generator, path: VariancePreserving, self_conditioning: float = 0.0
) -> dict[str, Tensor]:
    """The mean squared error of v = alpha * n - noise * x at one random step per sample.

    Args:
        network: see `Network`.
        x: clean `(B, C, ...)`, noised in float32.
        rng: the only source of randomness: steps, then noise, then whether there is an estimate.
        path: a chain; with zero terminal SNR its last step is trained too, which eps could not be.
        self_conditioning: how often the network is given an estimate; 0 never asks it twice.

    Returns "loss". Raises UserError when `self_conditioning` is no share.
    """
    if not 0 <= self_conditioning <= 1:
        raise UserError(f"self_conditioning is a share and must lie in [0, 1], got {self_conditioning}; 0.9 is W.A.L.T's")
    x = x.float()
    t = torch.randint(len(path), (len(x),), generator=rng, device=rng.device).to(x.device)
    n = torch.randn(x.shape, generator=rng, device=rng.device).to(x.device)
    given = bool(torch.rand((), generator=rng, device=rng.device) < self_conditioning)
    sigma = path.sigma_of_step(t)  # (B,)
    alpha, noise = (
        value.float().view(-1, *[1] * (x.ndim - 1)) for value in (path.alpha(sigma), path.noise(sigma))
    )  # (B, 1, ...) each
    z = alpha * x + noise * n
    estimate = None
    if given:
        with torch.no_grad():
            estimate = estimate_of(network(z, t, None), z, sigma, path)
    v = network(z, t, estimate).float()
    return {"loss": (v - (alpha * n - noise * x)).square().mean()}


def estimate_of(v: Tensor, z: Tensor, sigma: Tensor, path: VariancePreserving) -> Tensor:
    """The clean x that an answer v at `z (B, C, ...)` stands for; `sigma (B,)`, one noise level per sample."""
    return convert(v.to(z.dtype), z, sigma, "v", "x", path)
