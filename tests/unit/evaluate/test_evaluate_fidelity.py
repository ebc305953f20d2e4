from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage

from tubelet.core.errors import UserError
from tubelet.evaluate import fidelity


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def test_psnr_closed_form_and_identity():
    a = np.full((2, 16, 16, 3), 100, np.uint8)
    assert fidelity.psnr(a, a) == fidelity.PEAK_DB
    assert fidelity.psnr(a, a + np.uint8(10)) == pytest.approx(20 * np.log10(255 / 10))


def test_psnr_does_not_wrap_uint8():
    black, white = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    assert fidelity.psnr(black, white) == pytest.approx(0.0)
    assert fidelity.psnr(white, black) == pytest.approx(0.0)


def test_masked_psnr_counts_only_the_mask():
    a = np.full((1, 8, 8, 3), 50, np.uint8)
    b = a.copy()
    b[0, :4] += 20
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :2] = True
    assert fidelity.psnr(a, b, mask) == pytest.approx(20 * np.log10(255 / 20))
    assert fidelity.psnr(a, b, ~mask) > fidelity.psnr(a, b, mask)


def test_foreground_finds_a_coloured_square_and_its_rim():
    clip = np.full((3, 16, 16, 3), 230, np.uint8)
    clip[:, 5:9, 5:9] = (214, 48, 49)
    mask = fidelity.foreground(clip, reach=1)
    assert mask.sum() == 3 * 36
    spoiled = clip.copy()
    spoiled[:, 0, 0] = 0
    assert fidelity.foreground_psnr(clip, spoiled) == fidelity.PEAK_DB
    assert fidelity.psnr(clip, spoiled) < 50


def test_ssim_against_scipy_gaussian_windows():
    a, b = noise(0, (24, 30, 3)), noise(1, (24, 30, 3))
    b = ((a.astype(int) * 3 + b) // 4).astype(np.uint8)

    def blurred(x: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(x, (1.5, 1.5, 0), truncate=5 / 1.5)[5:-5, 5:-5]

    x, y = a.astype(float), b.astype(float)
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    expected = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    assert fidelity.ssim(a, b) == pytest.approx(expected, rel=1e-6)
    assert fidelity.ssim(a, a) == pytest.approx(1.0)
    assert fidelity.ssim(a, noise(2, (24, 30, 3))) < 0.1


def test_frechet_distance_against_scipy_sqrtm():
    rng = np.random.RandomState(0)
    a = rng.randn(400, 6) @ rng.randn(6, 6)
    b = rng.randn(300, 6) @ rng.randn(6, 6) + rng.randn(6)
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(scipy.linalg.sqrtm(ca @ cb)))
    assert fidelity.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert fidelity.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_of_diagonal_gaussians_is_closed_form():
    rng = np.random.RandomState(1)
    white = rng.randn(2000, 3)
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T)).T)
    a, b = white * [1.0, 2.0, 3.0], white * [2.0, 2.0, 1.0] + [1.0, 0.0, 0.0]
    assert fidelity.frechet_distance(a, b) == pytest.approx(1 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, rel=1e-8)


def test_frechet_distance_survives_rank_deficient_features():
    a = np.random.RandomState(2).randn(5, 32)
    assert np.isfinite(fidelity.frechet_distance(a, a + 1.0))
    assert fidelity.frechet_distance(a, a + 1.0) == pytest.approx(32.0, rel=1e-6)


def test_kernel_distance_is_unbiased_and_grows():
    rng = np.random.RandomState(3)
    draws = [fidelity.kernel_distance(rng.randn(40, 8), rng.randn(40, 8)) for _ in range(200)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))
    a, b = rng.randn(50, 8), rng.randn(60, 8) + 1
    kernel = lambda x, y: (x @ y.T / 8 + 1) ** 3  # noqa: E731
    kaa, kbb = kernel(a, a), kernel(b, b)
    expected = (kaa.sum() - np.trace(kaa)) / (50 * 49) + (kbb.sum() - np.trace(kbb)) / (60 * 59) - 2 * kernel(a, b).mean()
    assert fidelity.kernel_distance(a, b) == pytest.approx(expected)
    assert fidelity.kernel_distance(a, b) > max(draws)


@pytest.mark.parametrize("measure", [fidelity.psnr, fidelity.ssim, fidelity.foreground_psnr])
def test_unequal_clips_are_refused(measure):
    with pytest.raises(UserError, match="shapes"):
        measure(noise(0, (2, 16, 16, 3)), noise(0, (3, 16, 16, 3)))


@pytest.mark.parametrize("measure", [fidelity.frechet_distance, fidelity.kernel_distance])
def test_bad_features_are_refused(measure):
    with pytest.raises(UserError, match="at least 2"):
        measure(np.zeros((1, 4)), np.zeros((5, 4)))
    with pytest.raises(UserError, match="width"):
        measure(np.zeros((5, 4)), np.zeros((5, 3)))


def test_bad_masks_and_small_frames_are_refused():
    a = noise(0, (2, 8, 8, 3))
    with pytest.raises(UserError, match="empty"):
        fidelity.psnr(a, a, np.zeros((2, 8, 8), bool))
    with pytest.raises(UserError, match="mask"):
        fidelity.psnr(a, a, np.ones((8, 8), bool))
    with pytest.raises(UserError, match="SSIM"):
        fidelity.ssim(a, a)
