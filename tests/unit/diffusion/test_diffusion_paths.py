from __future__ import annotations

import math

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.diffusion.paths import (
    LDM,
    PATHS,
    RECTIFIED_FLOW,
    Cosine,
    RectifiedFlow,
    SigmaSampling,
    VariancePreserving,
    VPLinear,
    sample_sigma,
    shift_sigma,
    spaced_sigmas,
    uniform_sigmas,
    zero_terminal_snr,
)

ALL = [*(make() for make in PATHS.values()), zero_terminal_snr(VPLinear()), zero_terminal_snr(LDM())]
CHAINS = [path for path in ALL if isinstance(path, VariancePreserving)]


@pytest.mark.parametrize("path", ALL, ids=lambda p: type(p).__name__)
def test_a_path_runs_from_signal_to_noise(path):
    sigma = torch.linspace(0, 1, 4321, dtype=torch.float64)
    alpha, noise, log_snr = path.alpha(sigma), path.noise(sigma), path.log_snr(sigma)
    assert alpha[0] == 1
    assert noise[0] == 0
    assert log_snr[0] == math.inf
    assert not torch.isnan(torch.stack([alpha, noise, log_snr])).any()
    assert (alpha.diff() <= 0).all()
    assert (noise.diff() >= 0).all()
    assert (log_snr.diff() < 0).all()
    inner = slice(1, -1)
    torch.testing.assert_close(log_snr[inner], 2 * torch.log(alpha / noise)[inner], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ALL, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3, 1, 1)])
def test_a_path_keeps_shape_and_dtype(path, shape):
    sigma = torch.full(shape, 0.4)
    for value in (path.alpha(sigma), path.noise(sigma), path.log_snr(sigma)):
        assert value.shape == shape
        assert value.dtype == torch.float32


@pytest.mark.parametrize("path", CHAINS, ids=lambda p: type(p).__name__)
def test_chains_preserve_variance_and_are_their_table_at_integer_steps(path):
    sigma = torch.linspace(0, 1, 777, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(sigma) ** 2 + path.noise(sigma) ** 2, torch.ones_like(sigma), rtol=0, atol=1e-14)
    steps = torch.arange(len(path))
    at = path.sigma_of_step(steps)
    torch.testing.assert_close(path.alpha(at) ** 2, path.alphas_cumprod, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(path.step_of_sigma(at), steps.double(), rtol=0, atol=1e-9)
    # As a network is told them: a level that went through float32 is still its step, and what lies between stays there.
    assert torch.equal(path.told_step(at.float()), steps.double())
    told = path.told_step(torch.tensor([0.0, 0.50025], dtype=torch.float32))
    torch.testing.assert_close(told, torch.tensor([0.0, 499.25], dtype=torch.float64), rtol=0, atol=1e-3)
    # float32 levels may sit a rounding away from the step, not more.
    torch.testing.assert_close(path.alpha(at.float()).double() ** 2, path.alphas_cumprod, rtol=2e-5, atol=1e-7)


def test_between_steps_log_snr_is_linear():
    path = Cosine()
    left, mid, right = (path.log_snr(path.sigma_of_step(torch.tensor(s, dtype=torch.float64))) for s in (400.0, 400.25, 401.0))
    torch.testing.assert_close(mid, 0.75 * left + 0.25 * right)


def test_below_the_first_step_noise_is_proportional_to_sigma():
    path = VPLinear()
    sigma = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64) * path.sigma_of_step(torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(path.noise(sigma), torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64) * 1e-4**0.5)


def test_rectified_flow_is_the_straight_line():
    sigma = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(RectifiedFlow().alpha(sigma) + RECTIFIED_FLOW.noise(sigma), torch.ones(3))
    assert RECTIFIED_FLOW.log_snr(sigma)[2] == -math.inf


@pytest.mark.parametrize(
    "table",
    [torch.tensor([0.5]), torch.tensor([0.5, 0.6]), torch.tensor([1.0, 0.5]), torch.tensor([0.5, -0.1]), torch.ones(2, 2)],
)
def test_a_broken_table_is_refused(table):
    with pytest.raises(UserError, match="noise table"):
        VariancePreserving(table)


def test_uniform_and_shifted_sigmas():
    torch.testing.assert_close(uniform_sigmas(4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))
    shifted = uniform_sigmas(4, shift=3.0)
    torch.testing.assert_close(shifted, torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64))
    sigma = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, 4.0), 0.25), sigma)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 16, 50, 1000])
def test_spaced_sigmas_fall_to_zero_over_integer_steps(spacing, steps):
    path = VPLinear()
    sigmas = spaced_sigmas(path, steps, spacing)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    visited = path.step_of_sigma(sigmas[:-1])
    torch.testing.assert_close(visited, visited.round(), rtol=0, atol=1e-9)
    assert (sigmas[0] == 1) == (spacing != "leading" or steps == 1000)


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [
        ("trailing", [999, 856, 713, 570, 428, 285, 142]),  # 1000 - round(i * 1000 / 7) - 1
        ("leading", [852, 710, 568, 426, 284, 142, 0]),
        ("linspace", [999, 832, 666, 500, 333, 166, 0]),  # 832.5, 499.5 and 166.5 round to even
    ],
)
def test_spacing_when_the_steps_do_not_divide_the_chain(spacing, steps):
    path = VPLinear()
    assert path.step_of_sigma(spaced_sigmas(path, 7, spacing)[:-1]).round().int().tolist() == steps


@pytest.mark.parametrize(
    "call",
    [
        lambda: uniform_sigmas(0),
        lambda: uniform_sigmas(4, shift=0.0),
        lambda: spaced_sigmas(VPLinear(10), 11),
        lambda: spaced_sigmas(VPLinear(), 4, "middle"),  # type: ignore[arg-type]
        lambda: SigmaSampling(std=0.0),
        lambda: SigmaSampling(uniform=1.5),
        lambda: SigmaSampling(shift=-1.0),
    ],
)
def test_bad_settings_are_refused(call):
    with pytest.raises(UserError, match=r"; "):
        call()


def test_training_sigmas_follow_the_stated_law():
    n = 200_000
    pure = sample_sigma(n, torch.Generator().manual_seed(0), SigmaSampling(mean=0.5, std=0.8, uniform=0.0)).double()
    logit = torch.logit(pure)
    assert logit.mean().item() == pytest.approx(0.5, abs=0.01)
    assert logit.std().item() == pytest.approx(0.8, abs=0.01)
    even = sample_sigma(n, torch.Generator().manual_seed(0), SigmaSampling(uniform=1.0))
    assert even.mean().item() == pytest.approx(0.5, abs=0.005)
    assert even.std().item() == pytest.approx(12**-0.5, abs=0.005)
    mixed = sample_sigma(n, torch.Generator().manual_seed(0))
    # A logit-normal(0, 1) has 1.4e-6 of its mass below .01, the uniform part .1 * .01.
    assert (mixed < 0.01).double().mean().item() == pytest.approx(0.001, abs=0.0003)
    shifted = sample_sigma(n, torch.Generator().manual_seed(0), SigmaSampling(shift=3.0))
    torch.testing.assert_close(shifted, shift_sigma(mixed, 3.0))


def test_training_sigmas_repeat_and_use_the_same_number_of_draws_whatever_the_settings():
    states = []
    for sampling in (None, SigmaSampling(mean=1.0, uniform=1.0, shift=2.0)):
        rng = torch.Generator().manual_seed(3)
        sigma = sample_sigma((4, 5), rng, sampling)
        assert sigma.shape == (4, 5)
        assert torch.equal(sigma, sample_sigma((4, 5), torch.Generator().manual_seed(3), sampling))
        states.append(rng.get_state())
    assert torch.equal(*states)
