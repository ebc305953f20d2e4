"""How close pixels and feature distributions are to the truth: PSNR, SSIM, Frechet distance, KID.

PSNR and SSIM compare uint8 clips with exact counterparts (codec reconstruction, continuation of a known film). The
Frechet distance (Heusel et al. 2017, arXiv 1706.08500, eq. 6) and the kernel distance (Binkowski et al. 2018,
arXiv 1801.01401, section 4) compare two sets of feature vectors, whatever network made them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tubelet.core.errors import UserError

PEAK_DB = 100.0
"""PSNR given to identical clips, so that means stay finite."""


def psnr(truth: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two equal uint8 arrays `(..., H, W, C)`, at most `PEAK_DB`.

    `mask` is boolean `(..., H, W)`: only its pixels count. Raises UserError on unequal shapes or an empty mask.
    """
    _same_shape(truth, other)
    difference = truth.astype(np.float32) - other.astype(np.float32)
    if mask is not None:
        if mask.shape != truth.shape[:-1]:
            raise UserError(f"the mask is {mask.shape} but the clip is {truth.shape}; give one boolean per pixel")
        if not mask.any():
            raise UserError("the mask is empty; give a mask with at least one pixel or none at all")
        difference = difference[mask]
    error = float(np.mean(np.square(difference, dtype=np.float64)))
    return PEAK_DB if error == 0 else min(PEAK_DB, 10 * float(np.log10(255.0**2 / error)))


def foreground(clip: np.ndarray, reach: int = 1, threshold: int = 24) -> np.ndarray:
    """Where something is: pixels of a uint8 clip `(T, H, W, 3)` that differ by more than `threshold` levels in a channel
    from the clip's own median frame, or that are saturated (object colours), widened by `reach` pixels. Boolean `(T, H, W)`.
    """
    background = np.median(clip, axis=0)
    moving = (np.abs(clip - background) > threshold).any(-1)
    mask = moving | (clip.max(-1).astype(np.int16) - clip.min(-1) > 60)
    for _ in range(reach):
        wide = mask.copy()
        wide[:, 1:] |= mask[:, :-1]
        wide[:, :-1] |= mask[:, 1:]
        mask = wide.copy()
        mask[:, :, 1:] |= wide[:, :, :-1]
        mask[:, :, :-1] |= wide[:, :, 1:]
    return mask


def foreground_psnr(truth: np.ndarray, other: np.ndarray, mask: np.ndarray | None = None) -> float:
    """PSNR in dB over the foreground of the true clip (`foreground`, or a given boolean `(T, H, W)` mask)."""
    _same_shape(truth, other)
    mask = foreground(truth) if mask is None else mask.astype(bool)
    return psnr(truth, other, mask) if mask.any() else psnr(truth, other)


def ssim(truth: np.ndarray, other: np.ndarray, sigma: float = 1.5, radius: int = 5) -> float:
    """Structural similarity of uint8 arrays `(..., H, W, C)`, mean over windows, channels and frames.

    Wang et al. 2004 (Image quality assessment: from error visibility to structural similarity), eq. 13, with their
    11x11 Gaussian window of sigma 1.5, K1 = .01, K2 = .03, and valid windows only. Raises UserError on frames below 11x11.
    """
    _same_shape(truth, other)
    if min(truth.shape[-3:-1]) < 2 * radius + 1:
        raise UserError(f"SSIM needs frames of at least {2 * radius + 1} pixels a side, got {truth.shape[-3:-1]}; use larger")
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()

    def blurred(x: np.ndarray) -> np.ndarray:
        rows = np.lib.stride_tricks.sliding_window_view(x, len(taps), axis=-3) @ taps
        return np.lib.stride_tricks.sliding_window_view(rows, len(taps), axis=-2) @ taps

    a, b = truth.astype(np.float64), other.astype(np.float64)
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(values.mean())


def frechet_distance(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> float:
    """Frechet distance of two feature sets `(n, D)` and `(m, D)` seen as Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1
    S2)^1/2).

    Heusel et al. 2017, eq. 6, with unbiased covariances. The trace of the root is taken from the symmetric product
    S1^1/2 S2 S1^1/2, which has the eigenvalues of S1 S2, so no complex matrix root is needed.
    Raises UserError with fewer than two vectors a side or unequal widths.
    """
    a, b = _features(first, second)
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ cov_b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(gap + cov_a.trace() + cov_b.trace() - 2 * cross))


def kernel_distance(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> float:
    """KID: the unbiased squared MMD of feature sets `(n, D)` and `(m, D)` with the kernel (x.y / D + 1)^3.

    Binkowski et al. 2018, section 4. Unbiased, so values a little below zero occur for equal distributions.
    Raises UserError with fewer than two vectors a side or unequal widths.
    """
    a, b = _features(first, second)
    n, m, width = len(a), len(b), a.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / width + 1) ** 3

    own_a, own_b = kernel(a, a), kernel(b, b)
    within_a = (own_a.sum() - own_a.diagonal().sum()) / (n * (n - 1))
    within_b = (own_b.sum() - own_b.diagonal().sum()) / (m * (m - 1))
    return float(within_a + within_b - 2 * kernel(a, b).mean())


def _features(first: np.ndarray | Tensor, second: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(x).to(torch.float64) for x in (first, second))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"features must be (n, D) with one width, got {tuple(a.shape)} and {tuple(b.shape)}; reshape them")
    if min(len(a), len(b)) < 2:
        raise UserError(f"a distribution needs at least 2 feature vectors a side, got {len(a)} and {len(b)}; give more")
    return a, b


def _same_shape(truth: np.ndarray, other: np.ndarray) -> None:
    if truth.shape != other.shape:
        raise UserError(f"cannot compare clips of shapes {truth.shape} and {other.shape}; give both one size and length")
