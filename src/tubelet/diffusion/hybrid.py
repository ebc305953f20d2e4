"""Learned variances: the hybrid objective of Improved Denoising Diffusion Probabilistic Models.

After Nichol & Dhariwal 2021 (2102.09672, section 3.1): the network answers eps and, for every value, where the variance of the
step lies between its two bounds, on a logarithmic scale (equation 15). The simple loss says nothing about variances, so the
variational bound is added with a small weight, and with the mean held fixed, so that it trains the variances alone (equation
16). ADM and DiT are trained so. Steps are those of a whole chain, 0 .. N-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.diffusion.paths import VariancePreserving


def variance_bounds(path: VariancePreserving, t: Tensor) -> tuple[Tensor, Tensor]:
    """Log of beta tilde and of beta at integer steps, shaped like `t`, float64 on its device.

    At step 0 beta tilde is 0, and that of step 1 stands in for it, as released.
    """
    table = path.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), table[:-1]])
    beta = 1 - table / before
    tilde = beta * (1 - before) / (1 - table)  # Ho et al. 2020, equation 7
    tilde[0] = tilde[1]
    return tilde.log().to(t.device)[t], beta.log().to(t.device)[t]


def interpolated_log_variance(v: Tensor, t: Tensor, path: VariancePreserving) -> Tensor:
    """The log-variance of the step that `v (B, ...)` names: -1 is beta tilde, 1 is beta (equation 15). Float32 or better.

    `t (B,)` integer steps. The network is free to leave [-1, 1].
    """
    low, high = (_wide(bound, v) for bound in variance_bounds(path, t))
    share = (v.to(torch.promote_types(v.dtype, torch.float32)) + 1) / 2
    return share * high + (1 - share) * low


def vlb_terms(x: Tensor, z: Tensor, t: Tensor, eps: Tensor, v: Tensor, path: VariancePreserving) -> Tensor:
    """The terms L_t of the variational bound, `(B,)`, in bits per value; no gradient flows into `eps`.

    Above step 0 the KL between the posterior q(z_before | z, x) and the network's step, both Gaussian (Ho et al. 2020, equation
    5); at step 0 the negative log-likelihood of x as one of 256 levels in [-1, 1] (their equation 13). DiT keeps the latter
    for latents, which have no levels.

    Args:
        x, z: clean and noised, `(B, C, ...)` each.
        t: integer steps `(B,)`.
        eps, v: the network's answers, shaped like x.
    """
    return _vlb_nats(x, z, t, eps, v, path).flatten(1).mean(1) / math.log(2)


def _vlb_nats(x: Tensor, z: Tensor, t: Tensor, eps: Tensor, v: Tensor, path: VariancePreserving) -> Tensor:
    """`vlb_terms` of every value, `(B, C, ...)`, in nats."""
    low, _ = variance_bounds(path, t)
    table = torch.cat([torch.ones(1, dtype=torch.float64), path.alphas_cumprod]).to(t.device)
    before, now = table[t], table[t + 1]
    of_x = before.sqrt() * (1 - now / before) / (1 - now)  # equation 7 there: the posterior's mean
    of_z = (now / before).sqrt() * (1 - before) / (1 - now)
    x_hat = (z - _wide((1 - now).sqrt(), z) * eps.detach()) / _wide(now.sqrt(), z)
    log_variance, truth = interpolated_log_variance(v, t, path), _wide(low, x)
    gap = _wide(of_x, x) * (x - x_hat)
    divergence = (log_variance - truth - 1 + (truth - log_variance).exp() + gap.square() * (-log_variance).exp()) / 2
    surprise = _level_surprise(x, _wide(of_x, x) * x_hat + _wide(of_z, z) * z, log_variance)
    return torch.where(_wide(t, x) == 0, surprise, divergence)  # (B, C, ...)


def hybrid_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    rng: torch.Generator,
    path: VariancePreserving,
    weight: float = 1e-3,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """L_simple + weight * L_vlb (equation 16), at one random step per sample.

    Args:
        network: `(z, t) -> (B, 2C, ...)`, eps first; `t (B,)` integer steps, a condition is already bound.
        x: clean `(B, C, ...)`.
        rng: the only source of randomness: steps first, then noise.
        path: a chain that ends with some signal, else eps is undefined.
        weight: of the bound over all steps, estimated from the ones that were drawn.
        mask: of 0 and 1, broadcasts against x with one channel, `(B, 1, ...)`: values at 0 do not count, in neither part, the
            others all alike. At least one must. None: all count.

    Returns "loss", to be minimised, and its parts: "simple", the mean squared error of eps, and "vlb" in bits per value.
    """
    if float(path.alphas_cumprod[-1]) == 0:
        raise UserError("eps says nothing about x where no signal is left; take a chain without zero terminal SNR")
    B, N, x = len(x), len(path), x.float()
    t = torch.randint(N, (B,), generator=rng, device=rng.device).to(x.device)
    noise = torch.randn(x.shape, generator=rng, device=rng.device).to(x.device)
    sigma = path.sigma_of_step(t)
    z = _wide(path.alpha(sigma), x) * x + _wide(path.noise(sigma), x) * noise
    answer = network(z, t).float()
    if answer.shape != (B, 2 * x.shape[1], *x.shape[2:]):
        raise UserError(
            f"a network with learned variances gives 2 x {x.shape[1]} channels, got {tuple(answer.shape)}; set it so"
        )
    eps, v = answer.chunk(2, dim=1)  # (B, C, ...) each
    if mask is None:
        simple = (eps - noise).square().mean()
        vlb = N * vlb_terms(x, z, t, eps, v, path).mean()
    else:
        counted = mask.to(x).expand_as(x)
        simple = ((eps - noise).square() * counted).sum() / counted.sum()
        nats = (_vlb_nats(x, z, t, eps, v, path) * counted).sum() / counted.sum()
        vlb = N * nats / math.log(2)
    return {"loss": simple + weight * vlb, "simple": simple, "vlb": vlb}


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """One value per sample in the form that broadcasts against `like (B, ...)`, in its precision, float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32) if value.is_floating_point() else value.dtype
    return value.to(dtype).view(-1, *[1] * (like.ndim - 1))


def _level_surprise(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of what a Gaussian gives to the level of 256 that x stands for; the outer levels reach to infinity."""
    scale = (-log_variance / 2).exp()
    above = torch.special.ndtr((x - mean + 1 / 255) * scale)
    below = torch.special.ndtr((x - mean - 1 / 255) * scale)
    share = torch.where(x > 0.999, 1 - below, torch.where(x < -0.999, above, above - below))
    return -share.clamp(min=1e-12).log()
