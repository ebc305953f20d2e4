"""What a network predicts, how that becomes a clean x, and the loss.

Every prediction is a mixture `a * x + b * n` of the two unknowns of `z = alpha * x + noise * n`, so one 2 x 2 solve converts
any into any other. Sources: eps, Ho et al. 2020 (2006.11239); v, Salimans & Ho 2022 (2202.00512, appendix D); velocity, Liu
et al. 2022 (2209.03003); skip, the preconditioning of Karras et al. 2022 (2206.00364, appendix B.6) carried over to rectified
flow; x with a loss in velocity space, Li & He 2025 (2511.13720).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.diffusion.paths import RECTIFIED_FLOW, Path, SigmaSampling, sample_sigma

Prediction = Literal["x", "eps", "v", "velocity", "skip"]
C = TypeVar("C")
Network = Callable[[Tensor, Tensor, C], Tensor]
"""`(z (B, C, T, H, W), sigma (B,) | (B, T) | (B, T, H, W), condition) -> output (B, C, T, H, W)`."""
Denoiser = Callable[[Tensor, Tensor, C], Tensor]
"""`(z, sigma, condition) -> x_hat`, with `sigma` as in `spread`."""
PackedNetwork = Callable[[list[Tensor], list[Tensor], C], Sequence[Tensor]]
"""`(z, sigma, condition) -> output` for S samples of any sizes: z and output `(C, T, H, W)`, sigma `()` or `(T,)` each."""


def _mixture(prediction: Prediction, alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The `(a, b)` with which a prediction is `a * x + b * n`."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction == "x":
        return one, zero
    if prediction == "eps":
        return zero, one
    if prediction == "v":  # Salimans & Ho 2022: the derivative by the angle of a variance preserving path
        return -noise, alpha
    if prediction == "velocity":  # Liu et al. 2022: dz/dsigma of the straight line
        return -one, one
    if prediction == "skip":
        r = (alpha**2 + noise**2).sqrt()
        return noise / r, -alpha / r
    raise UserError(f"prediction must be x, eps, v, velocity or skip, got {prediction!r}; choose one of them")


def spread(sigma: Tensor, z: Tensor) -> Tensor:
    """Noise levels in the form that broadcasts against `z (B, C, T, H, W)`.

    Takes a scalar, one per sample `(B,)`, per frame `(B, T)`, per cell `(B, T, H, W)`, or what broadcasts already
    `(B, 1, T, H, W)`; an axis may be 1. `z` may also have fewer axes (a plain `(B, D)` in tests) when sigma is a scalar or
    `(B,)`. Raises UserError for any other shape.
    """
    if sigma.ndim <= 1:
        wide = sigma.reshape(sigma.shape + (1,) * (z.ndim - sigma.ndim)) if sigma.ndim else sigma
    elif z.ndim == 5 and sigma.ndim == 2:
        wide = sigma[:, None, :, None, None]  # (B, 1, T, 1, 1)
    elif z.ndim == 5 and sigma.ndim == 4:
        wide = sigma[:, None]  # (B, 1, T, H, W)
    else:
        wide = sigma
    allowed = z.shape if z.ndim < 5 else (z.shape[0], 1, *z.shape[2:])
    if wide.ndim and (wide.ndim != z.ndim or any(a not in (1, b) for a, b in zip(wide.shape, allowed, strict=True))):
        raise UserError(
            f"sigma of shape {tuple(sigma.shape)} does not fit z of shape {tuple(z.shape)}; "
            "give one value, or one per sample, per frame or per cell"
        )
    return wide


def gather(sigma: Tensor, z: Tensor) -> Tensor:
    """Noise levels in the form that networks take, the smallest that holds them: `(B,)`, `(B, T)` or `(B, T, H, W)`."""
    wide = spread(sigma, z)
    B = z.shape[0]
    if wide.numel() == 1 or wide[0].numel() == 1:
        return wide.reshape(-1).expand(B)  # (B,)
    if wide.shape[3:] == (1, 1):
        return wide[:, 0, :, 0, 0].expand(B, z.shape[2])  # (B, T)
    return wide[:, 0].expand(B, *z.shape[2:])  # (B, T, H, W)


def convert(
    value: Tensor, z: Tensor, sigma: Tensor, source: Prediction, target: Prediction, path: Path = RECTIFIED_FLOW
) -> Tensor:
    """Turn one prediction at `z` into another, on any path. `sigma` as in `spread`; the result has z's shape.

    `v`, `velocity` and `skip` determine x and n at every noise level; `eps` says nothing of x where alpha is 0, nor `x` of the
    noise at sigma 0: there the result is not finite.
    """
    if source == target:
        return value
    wide = spread(sigma, z)
    alpha, noise = path.alpha(wide), path.noise(wide)
    (a, b), (c, d) = _mixture(source, alpha, noise), _mixture(target, alpha, noise)
    determinant = alpha * b - noise * a
    of_z, of_value = (c * b - d * a) / determinant, (d * alpha - c * noise) / determinant
    return of_z.to(z.dtype) * z + of_value.to(z.dtype) * value


def precondition(output: Tensor, z: Tensor, sigma: Tensor, path: Path = RECTIFIED_FLOW) -> Tensor:
    """`x_hat = c_skip * z + c_out * F`: the "skip" prediction, for data of unit variance. The network sees `c_in * z`.

    With r^2 = alpha^2 + noise^2, the variance of z: c_in = 1 / r makes the input's variance 1; c_skip = alpha / r^2 is the
    least squares estimate of x from z, which leaves the smallest residual, x - c_skip * z = (noise / r) * F
    with F = (noise * x - alpha * n) / r; c_out = noise / r then leaves the network that F, of unit variance at every sigma.
    These are the three demands of Karras et al. 2022, appendix B.6; on rectified flow alpha = 1 - sigma and noise = sigma.
    """
    return convert(output, z, sigma, "skip", "x", path)


def _check(prediction: Prediction, path: Path) -> None:
    end = torch.ones((), dtype=torch.float64)
    _mixture(prediction, end, end)
    if prediction == "eps" and float(path.alpha(end)) == 0:
        raise UserError("eps says nothing about x where no signal is left; on this path predict x, v, velocity or skip")


def denoiser(network: Network[C], prediction: Prediction = "skip", path: Path = RECTIFIED_FLOW) -> Denoiser[C]:
    """Wrap a network as `(z, sigma, condition) -> x_hat`: the same function in training and in sampling.

    `sigma` may take any form of `spread`; the network gets the form of `gather`. x_hat has z's dtype, so
    that a network that answers in bf16 does not round the skip. Raises UserError for `eps` on a path that ends without signal.
    """
    _check(prediction, path)

    def denoise(z: Tensor, sigma: Tensor, condition: C) -> Tensor:
        seen = z
        if prediction == "skip":
            wide = spread(sigma, z)
            seen = z * (path.alpha(wide) ** 2 + path.noise(wide) ** 2).rsqrt().to(z.dtype)
        output = network(seen, gather(sigma, z), condition)
        return convert(output.to(z.dtype), z, sigma, prediction, "x", path)

    return denoise


def flow_loss(
    network: Network[C],
    x: Tensor,
    condition: C,
    rng: torch.Generator,
    *,
    sampling: SigmaSampling | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    haze: Tensor | None = None,
    tokens: int | None = None,
    prediction: Prediction = "skip",
    floor: float = 0.05,
) -> dict[str, Tensor]:
    """Rectified flow's loss: the squared error of x_hat over sigma^2, which is the squared error of the velocity.

    Args:
        network: see `Network`; its raw output is read as `prediction`.
        x: clean `(B, C, T, H, W)` of unit variance (standardised latents); noised in float32.
        rng: the only source of randomness: noise levels first, then noise.
        sampling: distribution of noise levels, one per sample or one per frame.
        weight: `(B, 1, T, H, W)` weights of cells (foreground above 1), at least 0 and not all 0; normalised to mean 1 over
            the batch. An axis may be 1.
        mask: `(B, T)` or `(B, T, H, W)` of 0 and 1: cells at 0 are known. They are shown clean, or at their sample's level in
            `haze (B,)` where that is below its sigma, and their error does not count. Where all are known, the loss is 0.
        tokens: how many each sample has, for a shift by their count.
        prediction: what the network's output stands for; the loss is the same quantity for all, so runs compare.
        floor: the least sigma that divides, so that "x" does not explode near the data (Li & He 2025 use .05).

    Returns:
        "loss", to be minimised, and detached "loss/sigma_q0" .. "loss/sigma_q3": the loss over the quarter of this batch's
        samples (or frames) with the least noise, .. with the most. With fewer than four they share.
    """
    if x.ndim != 5:
        raise UserError(f"training data must be (B, C, T, H, W), got {tuple(x.shape)}; add the missing axes")
    if not floor > 0:
        raise UserError(f"floor must be positive, got {floor}; 0.05 is the usual choice")
    B, _, T, H, W = x.shape
    if weight is not None and (
        weight.ndim != 5 or any(a not in (1, b) for a, b in zip(weight.shape, (B, 1, T, H, W), strict=True))
    ):
        raise UserError(
            f"weight must be (B, 1, T, H, W) for data {tuple(x.shape)}, got {tuple(weight.shape)}; one value per cell"
        )
    sampling = sampling or SigmaSampling()
    x = x.float()
    sigma = sample_sigma((B, T) if sampling.per_frame else B, rng, sampling, tokens).to(x.device)  # (B, T) or (B,)
    n = torch.randn(x.shape, generator=rng, device=rng.device).to(x.device)
    wide = spread(sigma, x)  # (B, 1, T or 1, 1, 1)
    unknown = None if mask is None else spread(mask.to(x), x)  # (B, 1, T, H or 1, W or 1)
    if unknown is not None:
        shown = torch.zeros_like(wide) if haze is None else torch.minimum(wide, spread(haze.to(x), x))
        wide = torch.where(unknown > 0, wide, shown)
    z = (1 - wide) * x + wide * n
    x_hat = denoiser(network, prediction)(z, sigma if unknown is None else wide, condition)
    error = ((x_hat - x) / wide.clamp(min=floor)).square().mean(1, keepdim=True)  # (B, 1, T, H, W)
    if weight is None:
        cells = torch.ones_like(error)
    else:
        cells = weight.to(error).expand_as(error)
    if unknown is not None:
        cells = cells * unknown
    loss = (error * cells).sum() / cells.sum().clamp(min=1e-12)

    over = (1, 3, 4) if sampling.per_frame else (1, 2, 3, 4)
    total, share = (error.detach() * cells).sum(over).flatten(), cells.sum(over).flatten()  # (B,) or (B * T,)
    return {"loss": loss, **_quartiles(sigma.flatten(), total, share)}


def _quartiles(sigma: Tensor, total: Tensor, share: Tensor) -> dict[str, Tensor]:
    """Mean error over the quarter with the least noise, .. with the most, from sums of error and of weight, `(n,)` each."""
    order, count = sigma.argsort(), len(sigma)
    total, share = total[order], share[order]
    result = {}
    for q in range(4):
        low = q * count // 4
        high = max(low + 1, (q + 1) * count // 4)
        result[f"loss/sigma_q{q}"] = total[low:high].sum() / share[low:high].sum().clamp(min=1e-12)
    return result


def packed_flow_loss(
    network: PackedNetwork[C],
    x: Sequence[Tensor],
    condition: C,
    rng: torch.Generator,
    *,
    sampling: SigmaSampling | None = None,
    weight: Sequence[Tensor] | None = None,
    mask: Sequence[Tensor | None] | None = None,
    haze: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    prediction: Prediction = "skip",
    floor: float = 0.05,
) -> dict[str, Tensor]:
    """`flow_loss` of S samples `(C, T, H, W)` of any sizes in one pack: the mean over all their cells.

    weight: S times `(1, T, H, W)`. mask: S times `(T,)` or `(T, H, W)`, or None where nothing is known; haze: S levels, both as
    in `flow_loss`. tokens: S token counts, by which noise levels shift where `sampling.tokens` says so.
    """
    if not len(x):
        raise UserError("a pack without samples has no loss; draw at least one")
    sampling = sampling or SigmaSampling()
    sigma = []  # S times (T,) or ()
    for i, one in enumerate(x):
        shape = (one.shape[1],) if sampling.per_frame else ()
        sigma.append(sample_sigma(shape, rng, sampling, None if tokens is None else tokens[i]).to(one.device))
    middle = torch.stack([level.mean() for level in sigma])  # (S,)
    for i, known in enumerate(mask or ()):
        if known is not None:
            own = sigma[i].view(-1, *[1] * (known.ndim - 1)) if sigma[i].ndim else sigma[i]
            sigma[i] = torch.where(known.to(own.device) > 0, own, own.clamp(max=haze[i] if haze else 0.0))
    noise = [torch.randn(one.shape, generator=rng, device=rng.device).to(one.device) for one in x]
    errors = packed_errors(network, x, noise, sigma, condition, prediction=prediction, floor=floor)
    if weight is None:
        cells = [torch.ones_like(e) for e in errors]
    else:
        cells = [w.to(e).expand_as(e) for w, e in zip(weight, errors, strict=True)]
    for i, known in enumerate(mask or ()):
        if known is not None:
            cells[i] = cells[i] * spread(known.to(cells[i])[None], x[i][None])[0]
    total = torch.stack([(e * w).sum() for e, w in zip(errors, cells, strict=True)])  # (S,)
    share = torch.stack([w.sum() for w in cells])  # (S,)
    # Of a pack that is known as a whole there is nothing to learn: its loss is 0, and so are its gradients.
    return {"loss": total.sum() / share.sum().clamp(min=1e-12), **_quartiles(middle, total.detach(), share)}


def packed_errors(
    network: PackedNetwork[C],
    x: Sequence[Tensor],
    noise: Sequence[Tensor],
    sigma: Sequence[Tensor],
    condition: C,
    *,
    prediction: Prediction = "skip",
    floor: float = 0.05,
) -> list[Tensor]:
    """Squared velocity error of every cell, S times `(1, T, H, W)`, at given noise and levels `()`, `(T,)` or `(T, H, W)`."""
    x = [one.float() for one in x]
    z = [
        ((1 - w) * one + w * n)[0]
        for one, n, w in ((one[None], n[None], spread(s[None], one[None])) for one, n, s in zip(x, noise, sigma, strict=True))
    ]  # S times (C, T, H, W)
    x_hat = packed_denoiser(network, prediction)(z, list(sigma), condition)
    return [
        ((guess - one) / spread(s[None], one[None])[0].clamp(min=floor)).square().mean(0, keepdim=True)
        for guess, one, s in zip(x_hat, x, sigma, strict=True)
    ]


def packed_denoiser(
    network: PackedNetwork[C], prediction: Prediction = "skip", path: Path = RECTIFIED_FLOW
) -> Callable[[list[Tensor], list[Tensor], C], list[Tensor]]:
    """`denoiser` for packs: `(z, sigma, condition) -> x_hat`, S samples each, what each would be alone."""
    _check(prediction, path)

    def denoise(z: list[Tensor], sigma: list[Tensor], condition: C) -> list[Tensor]:
        wide = [spread(s[None], one[None]) for s, one in zip(sigma, z, strict=True)]  # S times (1, 1, T, H, W), axes may be 1
        seen = z
        if prediction == "skip":
            seen = [
                one * (path.alpha(w) ** 2 + path.noise(w) ** 2).rsqrt().to(one.dtype)[0] for one, w in zip(z, wide, strict=True)
            ]
        outputs = network(seen, sigma, condition)
        return [
            convert(out[None].to(one.dtype), one[None], w, prediction, "x", path)[0]
            for out, one, w in zip(outputs, z, wide, strict=True)
        ]

    return denoise
