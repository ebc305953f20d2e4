"""Stored numbers: the noise tables of DDPM, LDM and the cosine schedule, and DiT's respacing."""

from __future__ import annotations

import pytest
import torch

from tubelet.diffusion.paths import LDM, Cosine, VPLinear, spaced_sigmas, zero_terminal_snr


@pytest.mark.parametrize(
    ("path", "step", "value"),
    [
        (VPLinear(), 0, 0.9999),
        (VPLinear(), 499, 0.0785872),
        (VPLinear(), 999, 4.03583e-5),
        (Cosine(), 499, 0.4938436),
        (Cosine(), 999, 2.429e-9),
        (LDM(), 499, 0.2776697),
        (LDM(), 999, 0.0046601),
    ],
)
def test_alphas_cumprod(path, step, value):
    digits = 1e-3 if value == 2.429e-9 else 1e-5 if value < 0.01 else 1e-6  # as many as the value is written with
    assert path.alphas_cumprod[step].item() == pytest.approx(value, rel=digits)
    sigma = path.sigma_of_step(torch.tensor(step))
    assert path.alpha(sigma).item() ** 2 == pytest.approx(value, rel=digits)
    assert path.alpha(sigma).item() ** 2 == pytest.approx(path.alphas_cumprod[step].item(), rel=1e-12)


def test_root_of_the_last_linear_step():
    assert VPLinear().alpha(torch.ones((), dtype=torch.float64)).item() == pytest.approx(0.0063528, abs=5e-8)


@pytest.mark.parametrize("path", [VPLinear(), Cosine(), LDM()])
def test_zero_terminal_snr_keeps_the_first_step_and_ends_at_nothing(path):
    rescaled = zero_terminal_snr(path)
    assert rescaled.alphas_cumprod[-1].item() == 0
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(path.alphas_cumprod[0].item(), rel=1e-12)


def test_dit_respacing():
    path = VPLinear()
    steps = path.step_of_sigma(spaced_sigmas(path, 250, "linspace")[:-1]).round().int().tolist()[::-1]
    assert steps[:4] == [0, 4, 8, 12]
    assert steps[-3:] == [991, 995, 999]
    assert len(steps) == 250


def test_ddim_stride_20_skips_the_last_step_unless_trailing():
    path = VPLinear()
    visited = {
        kind: path.step_of_sigma(spaced_sigmas(path, 50, kind)[:-1]).round().int().tolist() for kind in ("leading", "trailing")
    }
    assert visited["leading"][0] == 980
    assert visited["leading"][-1] == 0
    assert visited["trailing"][0] == 999
    assert visited["trailing"][-1] == 19
