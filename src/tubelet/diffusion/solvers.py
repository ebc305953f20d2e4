"""Solvers: functions from noise to data that know neither the network nor its condition.

Each takes `denoise(z, sigma) -> x_hat` and falling noise levels, works on every path, and computes its per-step scalars in
float64. A path enters through alpha, noise and the log-SNR only: with `lam = log(alpha / noise)` every Gaussian path has the
same probability-flow solution,

    z_next = noise_next / noise * z + noise_next * integral from lam to lam_next of exp(l) * x_hat(l) dl

(Lu et al. 2022, 2211.01095, eq. 8), and solvers differ in how they guess x_hat inside the integral.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.diffusion.paths import Path

Denoise = Callable[[Tensor, Tensor], Tensor]
"""`(z, sigma) -> x_hat`; solvers pass a scalar sigma, and wrappers may spread it over samples, frames or cells."""
Callback = Callable[[int, int, Tensor], None]
"""`(steps done, steps in all, x_hat)` after each step; whatever it raises stops the solver (a cancelled job)."""
Generators = torch.Generator | Sequence[torch.Generator]
"""One for the batch, or one per sample: then a batch of N equals N single runs."""


class Solve(Protocol):
    """The one form of a solver.

    Args:
        denoise: the guided denoiser.
        z: the state at `sigmas[0]`, any shape with the batch first; float32 or better.
        sigmas: `(S + 1,)`, strictly falling within [0, 1]. They end at 0 for a finished sample; a last level above 0 returns z
            at that level.
        path: how sigma mixes signal and noise.
        generator: randomness of the stochastic solvers; the others ignore it.
        callback: see `Callback`.

    Returns:
        x, shaped like z. The step to sigma 0 is exact: it returns x_hat itself.
    """

    def __call__(
        self,
        denoise: Denoise,
        z: Tensor,
        sigmas: Tensor,
        *,
        path: Path,
        generator: Generators | None = None,
        callback: Callback | None = None,
    ) -> Tensor: ...


class _Level(NamedTuple):
    sigma: float
    alpha: float
    noise: float
    lam: float  # log(alpha / noise), half the log-SNR


def _levels(sigmas: Tensor, path: Path) -> list[_Level]:
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise UserError(
            f"sigmas must be one row of at least 2 noise levels, got shape {tuple(sigmas.shape)}; ask for a step more"
        )
    sigmas = sigmas.detach().to("cpu", torch.float64)
    if not bool((sigmas.diff() < 0).all()) or not 0 <= float(sigmas[-1]) < float(sigmas[0]) <= 1:
        raise UserError("sigmas must fall strictly from at most 1 to at least 0; sort them and drop repeated ones")
    alpha, noise, lam = path.alpha(sigmas), path.noise(sigmas), path.log_snr(sigmas) / 2
    return [_Level(*values) for values in zip(sigmas.tolist(), alpha.tolist(), noise.tolist(), lam.tolist(), strict=True)]


def _sigma_like(level: _Level, z: Tensor) -> Tensor:
    return torch.tensor(level.sigma, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)


def _draw(z: Tensor, generator: Generators | None) -> Tensor:
    """Unit noise shaped like z, drawn where the generator lives so that every device sees the same."""
    if generator is None or isinstance(generator, torch.Generator):
        device = z.device if generator is None else generator.device
        return torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
    if len(generator) != len(z):
        raise UserError(f"{len(generator)} generators for a batch of {len(z)}; give one, or one per sample")
    return torch.stack([torch.randn(z.shape[1:], generator=g, device=g.device, dtype=z.dtype).to(z.device) for g in generator])


def euler(
    denoise: Denoise,
    z: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on the straight line that every path becomes when z is divided by alpha + noise. Order 1.

    With y = z / (alpha + noise) and s = noise / (alpha + noise), y = (1 - s) x + s n and dy/ds = (y - x_hat) / s
    (Liu et al. 2022, eq. 1).
    """
    levels = _levels(sigmas, path)
    for step, (now, after) in enumerate(pairwise(levels), 1):
        x_hat = denoise(z, _sigma_like(now, z))
        (from_z, from_x) = _straight(now, after)
        z = from_z * z + from_x * x_hat
        if callback:
            callback(step, len(levels) - 1, x_hat)
    return z


def _straight(now: _Level, after: _Level) -> tuple[float, float]:
    """Coefficients of z and x_hat in a step along a constant estimate of x and n (exact when both estimates are)."""
    return after.noise / now.noise, -after.alpha * math.expm1(now.lam - after.lam)


def heun(
    denoise: Denoise,
    z: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method on the straight line of `euler`, two evaluations a step, one in the step to 0. Order 2.

    Karras et al. 2022 (2206.00364), algorithm 1.
    """
    levels = _levels(sigmas, path)
    for step, (now, after) in enumerate(pairwise(levels), 1):
        x_hat = denoise(z, _sigma_like(now, z))
        from_z, from_x = _straight(now, after)
        guess = from_z * z + from_x * x_hat
        if after.noise > 0:
            x_after = denoise(guess, _sigma_like(after, z))
            size, size_after = now.alpha + now.noise, after.alpha + after.noise
            s, s_after = now.noise / size, after.noise / size_after
            slope = (z / size - x_hat) / s
            slope_after = (guess / size_after - x_after) / s_after
            guess = size_after * (z / size + (s_after - s) / 2 * (slope + slope_after))
        z = guess
        if callback:
            callback(step, len(levels) - 1, x_hat)
    return z


def ddim(
    denoise: Denoise,
    z: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    generator: Generators | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, 2010.02502, eq. 12 and 16). Order 1.

    `eta` in [0, 1] is the share of the posterior's standard deviation that is drawn anew: 0 follows the probability flow, 1 is
    ancestral sampling. Their eq. 16 is written for any path through the posterior variance of `ddpm`.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta must be in [0, 1], got {eta}; 0 adds no noise, 1 is ancestral")
    levels = _levels(sigmas, path)
    for step, (now, after) in enumerate(pairwise(levels), 1):
        x_hat = denoise(z, _sigma_like(now, z))
        fresh = eta * math.sqrt(_posterior_variance(now, after))
        kept = math.sqrt(max(after.noise**2 - fresh**2, 0.0))
        # n_hat = (z - alpha x_hat) / noise, folded into the two coefficients.
        z = kept / now.noise * z + (after.alpha - kept * now.alpha / now.noise) * x_hat
        if fresh > 0:
            z = z + fresh * _draw(z, generator)
        if callback:
            callback(step, len(levels) - 1, x_hat)
    return z


def _posterior_variance(now: _Level, after: _Level) -> float:
    """Variance of q(z_after | z_now, x): noise_after^2 * (1 - SNR_now / SNR_after).

    Kingma et al. 2021 (2107.00630), appendix A; on a variance preserving path this is DDPM's beta tilde (eq. 7).
    """
    return -(after.noise**2) * math.expm1(2 * (now.lam - after.lam))


def ddpm(
    denoise: Denoise,
    z: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    generator: Generators | None = None,
    callback: Callback | None = None,
    variance: Literal["posterior", "forward"] | Callable[[], Tensor] = "posterior",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2, eq. 7), on any path and any subset of its levels. Order 1.

    `variance` is beta tilde ("posterior", right for a point of data) or beta ("forward", right for unit Gaussian data), section
    3.2 there; or, of a network that has learned its variances, what gives its answer to the question that `denoise` was just
    asked: where between the two each value's lies, -1 to 1 on a logarithmic scale, like z (Nichol & Dhariwal 2021, eq. 15). The
    step to sigma 0 adds no noise.
    """
    if not callable(variance) and variance not in ("posterior", "forward"):
        raise UserError(f"variance must be posterior or forward, got {variance!r}; choose one of them")
    levels = _levels(sigmas, path)
    for step, (now, after) in enumerate(pairwise(levels), 1):
        x_hat = denoise(z, _sigma_like(now, z))
        remembered = math.exp(2 * (now.lam - after.lam))  # SNR_now / SNR_after
        # Kingma et al. 2021, appendix A: alpha_ts * noise_after^2 / noise_now^2 is the ratio below, free of 0 / 0 at alpha 0.
        from_z = now.alpha / after.alpha * (after.noise / now.noise) ** 2
        z = from_z * z + after.alpha * (1 - remembered) * x_hat
        if after.noise > 0:
            low, high = math.sqrt(_posterior_variance(now, after)), now.noise * math.sqrt(1 - remembered)
            if callable(variance):
                share = (variance().to(z) + 1) / 2  # the deviation's logarithm is half the variance's
                z = z + (share * math.log(high) + (1 - share) * math.log(low)).exp() * _draw(z, generator)
            else:
                z = z + (low if variance == "posterior" else high) * _draw(z, generator)
        if callback:
            callback(step, len(levels) - 1, x_hat)
    return z


def dpmpp_2m(
    denoise: Denoise,
    z: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M): x_hat extrapolated linearly in log-SNR from the step before. One evaluation a step. Order 2.

    Lu et al. 2022 (2211.01095), algorithm 2. The first step, one after an infinite log-SNR and the one to sigma 0 have no
    finite line to extrapolate along and hold x_hat constant; on rectified flow, from 1 to 0, the whole stays of order 2.
    """
    return dpmpp_2m_sde(denoise, z, sigmas, path=path, callback=callback, eta=0.0)


def dpmpp_2m_sde(
    denoise: Denoise,
    z: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    generator: Generators | None = None,
    callback: Callback | None = None,
    eta: float = 1.0,
    eta_above: float = 0.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M): `dpmpp_2m` with some of the noise drawn anew in each step. One evaluation a step.

    Lu et al. 2022 (2211.01095), their solver of the reverse SDE in place of the probability flow: what is decided early can
    still be taken back. `eta` scales the log-SNR that noise drawn anew makes up for: 0 is the flow, 1 the paper's. Steps that
    end at or below sigma `eta_above` follow the flow, as does the one to sigma 0. Raises UserError unless eta is at least 0.
    """
    if not eta >= 0:
        raise UserError(f"eta must be at least 0, got {eta}; 0 adds no noise, 1 is the paper's")
    levels = _levels(sigmas, path)
    before: Tensor | None = None
    h_before = math.inf
    for step, (now, after) in enumerate(pairwise(levels), 1):
        x_hat = denoise(z, _sigma_like(now, z))
        h = after.lam - now.lam
        inside = x_hat
        if before is not None and math.isfinite(h) and math.isfinite(h_before):
            inside = x_hat + h / (2 * h_before) * (x_hat - before)
        if eta == 0 or after.sigma <= eta_above:
            from_z, from_x = _straight(now, after)
            z = from_z * z + from_x * inside
        else:
            from_z, from_x = after.noise / now.noise * math.exp(-eta * h), -after.alpha * math.expm1(-(1 + eta) * h)
            z = from_z * z + from_x * inside + after.noise * math.sqrt(-math.expm1(-2 * eta * h)) * _draw(z, generator)
        before, h_before = x_hat, h
        if callback:
            callback(step, len(levels) - 1, x_hat)
    return z


def unipc(
    denoise: Denoise,
    z: Tensor,
    sigmas: Tensor,
    *,
    path: Path,
    generator: Generators | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """UniPC-2 with B2(h) on the x prediction: predictor as `dpmpp_2m`, corrector from the evaluation that the next step needs.

    Zhao et al. 2023 (2302.04867), algorithms 1 and 2 in their data prediction form. One evaluation a step. The corrector lifts
    the predictor's order 2 to 3 (their section 3); the step to sigma 0 has none and holds x_hat constant, so that a run down
    to 0 is of order 2 at best.
    """
    levels = _levels(sigmas, path)
    before: Tensor | None = None
    h_before = math.inf
    x_hat = denoise(z, _sigma_like(levels[0], z))
    for step, (now, after) in enumerate(pairwise(levels), 1):
        h = after.lam - now.lam
        from_z, from_x = _straight(now, after)
        # Divided difference of the past, in units of this step; its place is -r on an axis where this step is [0, 1].
        past: Tensor | None = None
        r = math.inf
        if before is not None and math.isfinite(h) and math.isfinite(h_before):
            r = h_before / h
            past = (x_hat - before) / r
        guess = from_z * z + from_x * (x_hat if past is None else x_hat + 0.5 * past)
        used = x_hat
        if step < len(levels) - 1:
            x_after = denoise(guess, _sigma_like(after, z))
            gain = x_after - x_hat
            if past is None:
                inside = x_hat + 0.5 * gain
            else:
                of_past, of_gain = _corrector_weights(h, r)
                inside = x_hat + of_past * past + of_gain * gain
            guess = from_z * z + from_x * inside
            before, x_hat, h_before = x_hat, x_after, h
        z = guess
        if callback:
            callback(step, len(levels) - 1, used)
    return z


def _corrector_weights(h: float, r: float) -> tuple[float, float]:
    """Weights of the two divided differences, at -r and 1, that make the corrector exact for a quadratic x_hat.

    Zhao et al. 2023, section 3, with B(h) = e^h - 1 and h negated, as the x prediction has it: solve w_past + w_gain = b1 and
    -r * w_past + w_gain = b2.
    """
    scale = math.expm1(-h)
    first = scale / -h - 1
    second = first / -h - 0.5
    b1, b2 = first / scale, 2 * second / scale
    of_past = (b1 - b2) / (1 + r)
    return of_past, b1 - of_past


@dataclass(frozen=True)
class Solver:
    """A catalogue entry: the function, its global order (between levels above 0), evaluations a step, whether it draws.

    `options`: what a `Sampling` says of it beyond the levels.
    """

    solve: Solve
    order: int
    evaluations: int = 1
    stochastic: bool = False
    options: tuple[str, ...] = ()


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, order=1),
    "heun": Solver(heun, order=2, evaluations=2),
    "ddim": Solver(ddim, order=1),
    "ddpm": Solver(ddpm, order=1, stochastic=True),
    "dpmpp_2m": Solver(dpmpp_2m, order=2),
    "dpmpp_2m_sde": Solver(dpmpp_2m_sde, order=1, stochastic=True, options=("eta", "eta_above")),
    "unipc": Solver(unipc, order=3),
}
