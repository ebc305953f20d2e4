"""Single steps of every chain, prediction and variance equal to diffusers' DDPM and DDIM.

Whole trajectories and spacings are in tests/parity, the golden values of the tables in tests/golden. Here both sides step from
the same float64 state with the same answer of a network. Given our float64 table, diffusers' formulas agree with ours to 1e-11.
Its own table is cumulated in float32: with that, steps agree to 1e-5 of the state's scale, and the second ancestral step, whose
beta tilde is a ratio of differences of numbers near 1, to 1e-4.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from tubelet.diffusion.objectives import Prediction, convert  # noqa: E402
from tubelet.diffusion.paths import LDM, Cosine, VariancePreserving, VPLinear, zero_terminal_snr  # noqa: E402
from tubelet.diffusion.solvers import ddim, ddpm  # noqa: E402

CHAINS: dict[str, tuple[VariancePreserving, dict[str, Any]]] = {
    "linear": (VPLinear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (LDM(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}
PREDICTIONS: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction"}
VARIANCES = {"posterior": "fixed_small", "forward": "fixed_large"}
STEPS = (0, 1, 20, 400, 980, 999)


def rng(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=rng(0), dtype=dtype)


def answer(z: Tensor) -> Tensor:
    return torch.tanh(0.8 * z + 0.3)


def exact(scheduler: Any, path: VariancePreserving) -> Any:
    """The same scheduler, reading our float64 table."""
    scheduler.alphas_cumprod = path.alphas_cumprod
    one = torch.ones((), dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = one
    else:
        scheduler.one = one
    return scheduler


def ours(solve: Any, path: VariancePreserving, step: int, before: int, kind: Prediction, z: Tensor, **more: Any) -> Tensor:
    sigmas = path.sigma_of_step(torch.tensor([step, max(before, -1)]))
    return solve(lambda z, sigma: convert(answer(z), z, sigmas[0], kind, "x", path), z, sigmas, path=path, **more)


def close(a: Tensor, b: Tensor, digits: float) -> None:
    # Relative to the state's scale: near the chain's end an eps answer makes x_hat, and every rounding in it, huge.
    torch.testing.assert_close(a, b, rtol=digits, atol=digits * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", CHAINS)
def test_one_ancestral_step(name: str, kind: Prediction, variance: str) -> None:
    path, config = CHAINS[name]
    told = {**config, "prediction_type": PREDICTIONS[kind], "variance_type": VARIANCES[variance], "clip_sample": False}
    scheduler, own = exact(diffusers.DDPMScheduler(**told), path), diffusers.DDPMScheduler(**told)
    for step in STEPS:
        z = state()
        mine = ours(ddpm, path, step, step - 1, kind, z, variance=variance, generator=rng())
        close(mine, scheduler.step(answer(z), step, z, generator=rng()).prev_sample, 1e-11)
        close(mine, own.step(answer(z), step, z, generator=rng()).prev_sample, 1e-4 if step == 1 else 1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", CHAINS)
def test_one_ddim_step(name: str, kind: Prediction, eta: float) -> None:
    path, config = CHAINS[name]
    told = {**config, "prediction_type": PREDICTIONS[kind], "clip_sample": False, "set_alpha_to_one": True}
    scheduler = exact(diffusers.DDIMScheduler(**told), path)
    own = diffusers.DDIMScheduler(**told)
    for one in (scheduler, own):
        one.set_timesteps(50)  # strides of 20
    for step in STEPS:
        z = state()
        mine = ours(ddim, path, step, step - 20, kind, z, eta=eta, generator=rng())
        close(mine, scheduler.step(answer(z), step, z, eta=eta, generator=rng()).prev_sample, 1e-11)
        close(mine, own.step(answer(z), step, z, eta=eta, generator=rng()).prev_sample, 1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_first_step_of_a_chain_without_terminal_signal(eta: float) -> None:
    """With v the last step is defined although nothing is left of x there (Lin et al. 2023)."""
    path = zero_terminal_snr(VPLinear())
    told = {"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction", "clip_sample": False}
    scheduler = exact(diffusers.DDIMScheduler(**told, rescale_betas_zero_snr=True, timestep_spacing="trailing"), path)
    scheduler.set_timesteps(50)
    z = state()
    mine = ours(ddim, path, 999, 979, "v", z, eta=eta, generator=rng())
    close(mine, scheduler.step(answer(z), 999, z, eta=eta, generator=rng()).prev_sample, 1e-11)


@pytest.mark.parametrize("name", CHAINS)
def test_noising_and_its_velocity(name: str) -> None:
    path, config = CHAINS[name]
    scheduler = exact(diffusers.DDPMScheduler(**config), path)
    x, n = state(), state().flip(0)
    for step in STEPS:
        sigma, index = path.sigma_of_step(torch.tensor(step)), torch.tensor([step, step])
        z = path.alpha(sigma) * x + path.noise(sigma) * n
        assert z.dtype == torch.float64
        # It narrows the table to the precision of what it noises.
        close(scheduler.add_noise(x, n, index), z, 1e-11)
        close(scheduler.get_velocity(x, n, index), convert(n, z, sigma, "eps", "v", path), 1e-11)


def test_float32_states_step_as_closely_as_float32_allows() -> None:
    for name, (path, config) in CHAINS.items():
        scheduler = exact(diffusers.DDPMScheduler(**config, clip_sample=False), path)
        for step in (1, 20, 400, 980):
            z = state(torch.float32)
            mine = ours(ddpm, path, step, step - 1, "eps", z, generator=rng())
            assert mine.dtype == torch.float32, name
            close(mine, scheduler.step(answer(z), step, z, generator=rng()).prev_sample.float(), 2e-6)
