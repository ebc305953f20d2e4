"""Equal to diffusers' schedulers where the conventions agree: same table, same model output, same step."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from tubelet.diffusion.objectives import convert  # noqa: E402
from tubelet.diffusion.paths import LDM, Cosine, VPLinear, spaced_sigmas, zero_terminal_snr  # noqa: E402
from tubelet.diffusion.solvers import ddim, ddpm, dpmpp_2m, unipc  # noqa: E402

TABLES = {
    "linear": (VPLinear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (LDM(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}


def eps_network(z, step):
    """Any smooth function of the state and the integer step will do: both sides are given the same output."""
    return torch.tanh(0.8 * z + 0.3) * (0.4 + 0.6 * step / 1000)


def ours(solve, path, z, sigmas, **more):
    def denoise(z, sigma):
        step = round(float(path.step_of_sigma(sigma)))
        return convert(eps_network(z, step), z, sigma, "eps", "x", path)

    return solve(denoise, z, sigmas, path=path, **more)


def theirs(scheduler, z, steps, **more):
    scheduler.set_timesteps(steps)
    for step in scheduler.timesteps:
        z = scheduler.step(eps_network(z, int(step)), step, z, **more).prev_sample
    return z


def start():
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def close(a, b):
    # Relative to the state's scale: without signal an eps prediction makes x_hat, and every rounding in it, huge.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    path, config = TABLES[name]
    scheduler = diffusers.DDPMScheduler(**config)
    torch.testing.assert_close(path.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=2e-5, atol=1e-7)
    rescaled = diffusers.DDIMScheduler(**config, rescale_betas_zero_snr=True)
    torch.testing.assert_close(zero_terminal_snr(path).alphas_cumprod.float(), rescaled.alphas_cumprod, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("step", [0, 10, 500, 999])
def test_noising_and_v(step):
    path, config = TABLES["linear"]
    scheduler = diffusers.DDPMScheduler(**config)
    x, n = start(), start().flip(0)
    sigma = path.sigma_of_step(torch.tensor(step))
    z = path.alpha(sigma) * x.double() + path.noise(sigma) * n.double()
    index = torch.tensor([step, step])
    close(scheduler.add_noise(x, n, index), z.float())
    close(scheduler.get_velocity(x, n, index), convert(n.double(), z, sigma, "eps", "v", path).float())


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_ddim(name, spacing):
    path, config = TABLES[name]
    scheduler = diffusers.DDIMScheduler(**config, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    sigmas = spaced_sigmas(path, 20, spacing)
    assert path.step_of_sigma(sigmas[:-1]).round().int().tolist() == scheduler.timesteps.tolist()
    if spacing != "linspace":  # there diffusers steps to t - 50, which is not the next level it visits
        close(ours(ddim, path, start(), sigmas), theirs(scheduler, start(), 20))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(eta):
    path, config = TABLES["scaled_linear"]
    scheduler = diffusers.DDIMScheduler(**config, clip_sample=False, timestep_spacing="trailing")
    a = ours(ddim, path, start(), spaced_sigmas(path, 10), eta=eta, generator=torch.Generator().manual_seed(3))
    close(a, theirs(scheduler, start(), 10, eta=eta, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(("ours_name", "theirs_name"), [("posterior", "fixed_small"), ("forward", "fixed_large")])
@pytest.mark.parametrize("step", [0, 1, 400, 999])
def test_ddpm_one_step(ours_name, theirs_name, step):
    path, config = TABLES["linear"]
    scheduler = diffusers.DDPMScheduler(**config, clip_sample=False, variance_type=theirs_name)
    # Its float32 1 - alphas_cumprod keeps three digits at the first steps; on our table the formulas must agree.
    scheduler.alphas_cumprod, scheduler.one = path.alphas_cumprod, torch.ones((), dtype=torch.float64)
    z = start()
    expected = scheduler.step(eps_network(z, step), step, z, generator=torch.Generator().manual_seed(5)).prev_sample
    sigmas = path.sigma_of_step(torch.tensor([step, step - 1]))
    close(ours(ddpm, path, z, sigmas, variance=ours_name, generator=torch.Generator().manual_seed(5)), expected)


def test_ddpm_respaced():
    path, config = TABLES["linear"]
    scheduler = diffusers.DDPMScheduler(**config, clip_sample=False, timestep_spacing="leading")
    a = ours(ddpm, path, start(), spaced_sigmas(path, 20, "leading"), generator=torch.Generator().manual_seed(3))
    close(a, theirs(scheduler, start(), 20, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_dpm_solver_2m(name, steps):
    path, config = TABLES[name]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    close(ours(dpmpp_2m, path, start(), spaced_sigmas(path, steps)), theirs(scheduler, start(), steps))


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_unipc(name, steps):
    path, config = TABLES[name]
    scheduler = diffusers.UniPCMultistepScheduler(
        **config, solver_order=2, solver_type="bh2", predict_x0=True, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    close(ours(unipc, path, start(), spaced_sigmas(path, steps)), theirs(scheduler, start(), steps))
