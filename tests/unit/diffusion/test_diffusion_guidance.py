from __future__ import annotations

import math

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.diffusion.guidance import guided
from tubelet.diffusion.objectives import convert, denoiser
from tubelet.diffusion.paths import RECTIFIED_FLOW, uniform_sigmas
from tubelet.diffusion.solvers import euler

B, SHAPE = 3, (3, 2, 1, 4, 4)


def condition(value: float, tokens: int = 4, batch: int = B) -> Condition:
    return Condition(torch.full((batch, tokens, 2), value), torch.ones(batch, tokens, dtype=torch.bool))


class Spy:
    """x_hat = z * (mean of the real tokens) + sigma, and a record of the calls."""

    def __init__(self):
        self.batches: list[int] = []

    def __call__(self, z, sigma, c):
        self.batches.append(len(z))
        assert len(c) == len(z)
        mean = (c.states * c.mask[..., None]).sum((1, 2)) / (2 * c.mask.sum(1))
        wide = sigma.reshape(-1, *(1,) * (z.ndim - 1)) if sigma.ndim else sigma
        return z * mean[:, None, None, None, None] + wide


def state() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def test_guidance_is_the_stated_formula_in_one_doubled_call():
    spy, z, sigma = Spy(), state(), torch.tensor(0.5)
    x_hat = guided(spy, condition(2.0), condition(0.5, tokens=1), 3.0)(z, sigma)
    assert spy.batches == [2 * B]
    torch.testing.assert_close(x_hat, (0.5 * z + 0.5) + 3 * ((2 * z + 0.5) - (0.5 * z + 0.5)))


@pytest.mark.parametrize(("scale", "value"), [(1.0, 2.0), (0.0, 0.5)])
def test_scale_one_is_the_conditional_branch_and_zero_the_null_one(scale, value):
    spy, z, sigma = Spy(), state(), torch.tensor(0.5)
    x_hat = guided(spy, condition(2.0), condition(0.5), scale)(z, sigma)
    torch.testing.assert_close(x_hat, value * z + 0.5)
    assert spy.batches == [B if scale == 1 else 2 * B]


def test_outside_the_interval_only_the_conditional_branch_runs():
    spy, z = Spy(), state()
    denoise = guided(spy, condition(2.0), condition(0.5), 3.0, interval=(0.25, 0.75))
    for sigma, doubled in ((1.0, False), (0.75, True), (0.5, True), (0.25, True), (0.2, False)):
        spy.batches.clear()
        x_hat = denoise(z, torch.tensor(sigma))
        assert spy.batches == [2 * B if doubled else B]
        if not doubled:
            torch.testing.assert_close(x_hat, 2 * z + sigma)


def test_sigma_per_sample_is_doubled_with_the_batch_and_the_noisiest_decides():
    spy, z = Spy(), state()
    sigma = torch.tensor([0.0, 0.3, 0.6])
    x_hat = guided(spy, condition(2.0), condition(0.5), 2.0, interval=(0.5, 1.0))(z, sigma)
    assert spy.batches == [2 * B]
    torch.testing.assert_close(x_hat, 3.5 * z + sigma[:, None, None, None, None])
    spy.batches.clear()
    guided(spy, condition(2.0), condition(0.5), 2.0, interval=(0.0, 0.5))(z, sigma)
    assert spy.batches == [B]


def test_guiding_x_is_guiding_the_velocity():
    z, sigma, scale = state(), torch.tensor(0.4), 2.5

    def network(z, sigma, c):
        return torch.sin(z) * c.states.mean((1, 2))[:, None, None, None, None]

    x_hat = guided(denoiser(network, "velocity"), condition(2.0), condition(0.5), scale)(z, sigma)
    spread = sigma.expand(B)
    u_cond, u_null = (network(z, spread, condition(value)) for value in (2.0, 0.5))
    torch.testing.assert_close(x_hat, convert(u_null + scale * (u_cond - u_null), z, sigma, "velocity", "x"))


@pytest.mark.parametrize("channels", [1, None])
def test_some_channels_alone_are_guided(channels):
    spy = Spy()
    z, sigma = state(), torch.tensor(0.5)
    seen, unseen = (guided(spy, condition(value), condition(0.5), 1.0)(z, sigma) for value in (2.0, 0.5))
    led = guided(spy, condition(2.0), condition(0.5), 3.0, channels=channels)(z, sigma)
    torch.testing.assert_close(led[:, :channels], (unseen + 3 * (seen - unseen))[:, :channels])
    if channels is not None:
        torch.testing.assert_close(led[:, channels:], seen[:, channels:])


def test_a_solver_drives_a_guided_denoiser():
    spy = Spy()
    denoise = guided(spy, condition(0.1), condition(0.0), 2.0, interval=(0.3, 0.8))
    x = euler(denoise, state(), uniform_sigmas(4), path=RECTIFIED_FLOW)
    assert x.isfinite().all()
    assert spy.batches == [B, 2 * B, 2 * B, B]


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(UserError, match="guidance"):
        guided(Spy(), condition(1.0), condition(0.0), scale)


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_a_bad_interval_is_refused(interval):
    with pytest.raises(UserError, match="interval"):
        guided(Spy(), condition(1.0), condition(0.0), 2.0, interval)


def test_unequal_batches_are_refused():
    with pytest.raises(UserError, match="conditions"):
        guided(Spy(), condition(1.0), condition(0.0, batch=1), 2.0)
    with pytest.raises(UserError, match="conditions"):
        guided(Spy(), condition(1.0), condition(0.0), 2.0)(state()[:2], torch.tensor(0.5))
