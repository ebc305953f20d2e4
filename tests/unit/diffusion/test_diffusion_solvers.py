"""Solvers against problems whose answer is known: Gaussian data, whose denoiser and probability flow are closed forms."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.diffusion.paths import PATHS, RECTIFIED_FLOW, VPLinear, spaced_sigmas, uniform_sigmas, zero_terminal_snr
from tubelet.diffusion.solvers import SOLVERS, ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, euler, heun, unipc

MEAN, STD = 0.7, 0.4
DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]


class Gaussian:
    """x ~ N(MEAN, STD^2): E[x | z] and the probability flow, exactly."""

    def __init__(self, path):
        self.path = path
        self.calls = 0

    def spread(self, sigma: Tensor) -> Tensor:
        return (self.path.alpha(sigma) ** 2 * STD**2 + self.path.noise(sigma) ** 2).sqrt()

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.ndim == 0
        self.calls += 1
        alpha = self.path.alpha(sigma)
        return MEAN + alpha * STD**2 / self.spread(sigma) ** 2 * (z - alpha * MEAN)

    def flow(self, z: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return self.path.alpha(end) * MEAN + self.spread(end) / self.spread(start) * (z - self.path.alpha(start) * MEAN)


def start() -> Tensor:
    return torch.tensor([[-1.3], [0.4], [2.0]], dtype=torch.float64)


def error(name, path, sigmas) -> float:
    problem = Gaussian(path)
    found = SOLVERS[name].solve(problem, start(), sigmas, path=path)
    return (found - problem.flow(start(), sigmas[0], sigmas[-1])).abs().max().item()


def grid(steps, high, low):
    return torch.linspace(high, low, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_measured_order(name, path):
    errors = [error(name, PATHS[path](), grid(steps, 0.9, 0.2)) for steps in (128, 256, 512)]
    slope = math.log2(errors[0] / errors[2]) / 2
    assert slope == pytest.approx(SOLVERS[name].order, abs=0.25), errors


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("ddim", 1), ("dpmpp_2m", 2), ("unipc", 2)])
def test_measured_order_from_pure_noise_to_clean_data(name, order):
    """Both ends have infinite log-SNR on rectified flow: the schedule that is really used."""
    errors = [error(name, RECTIFIED_FLOW, uniform_sigmas(steps)) for steps in (128, 512)]
    assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(order, abs=0.25), errors


def test_multistep_beats_euler_at_the_steps_that_are_used():
    sigmas = uniform_sigmas(16)
    assert error("dpmpp_2m", RECTIFIED_FLOW, sigmas) < error("euler", RECTIFIED_FLOW, sigmas) / 5


@pytest.mark.parametrize("path", PATHS)
def test_ddim_without_noise_is_euler_on_the_straight_line(path):
    path = PATHS[path]()
    sigmas = grid(7, 1, 0)
    problem = Gaussian(path)
    torch.testing.assert_close(
        ddim(problem, start(), sigmas, path=path), euler(problem, start(), sigmas, path=path), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("path", PATHS)
def test_two_step_schedule_agrees_with_the_equations_by_hand(path):
    """DPM-Solver++(2M), algorithm 2, and Heun written out for three levels."""
    path = PATHS[path]()
    sigmas = torch.tensor([0.8, 0.6, 0.3], dtype=torch.float64)
    alpha, noise = path.alpha(sigmas), path.noise(sigmas)
    lam = torch.log(alpha / noise)
    problem, z = Gaussian(path), start()
    x0 = problem(z, sigmas[0])
    h1, h2 = lam[1] - lam[0], lam[2] - lam[1]
    z1 = noise[1] / noise[0] * z - alpha[1] * torch.expm1(-h1) * x0
    x1 = problem(z1, sigmas[1])
    D = (1 + h2 / (2 * h1)) * x1 - h2 / (2 * h1) * x0
    z2 = noise[2] / noise[1] * z1 - alpha[2] * torch.expm1(-h2) * D
    torch.testing.assert_close(dpmpp_2m(problem, z, sigmas, path=path), z2)

    s, y = noise / (alpha + noise), z / (alpha + noise)[0]
    d0 = (y - x0) / s[0]
    y_euler = y + (s[1] - s[0]) * d0
    d1 = (y_euler - problem(y_euler * (alpha + noise)[1], sigmas[1])) / s[1]
    expected = (alpha + noise)[1] * (y + (s[1] - s[0]) * (d0 + d1) / 2)
    torch.testing.assert_close(heun(problem, z, sigmas[:2], path=path), expected)


@pytest.mark.parametrize("path", [*PATHS, "zero_snr"])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_the_last_step_returns_the_denoised_state_exactly(name, path, steps):
    path = zero_terminal_snr(VPLinear()) if path == "zero_snr" else PATHS[path]()
    answers, problem = [], Gaussian(path)

    def denoise(z, sigma):
        answers.append(problem(z, sigma))
        return answers[-1]

    z = start().float()
    found = SOLVERS[name].solve(denoise, z, uniform_sigmas(steps), path=path, generator=torch.Generator().manual_seed(0))
    assert found.isfinite().all()
    assert found.dtype == torch.float32
    assert torch.equal(found, answers[-1])
    expected = SOLVERS[name].evaluations * steps - (SOLVERS[name].evaluations - 1)
    assert len(answers) == expected


@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_ancestral_sampling_makes_the_data_distribution(variance):
    path = VPLinear()
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = ddpm(Gaussian(path), z, spaced_sigmas(path, 200), path=path, generator=generator, variance=variance)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    skew = ((x - x.mean()) / x.std()).pow(3).mean().item()
    assert abs(skew) < 0.05


@pytest.mark.parametrize(
    ("solve", "path"),
    [(ddpm, VPLinear()), (functools.partial(ddim, eta=0.5), VPLinear()), (ddpm, RECTIFIED_FLOW)],
)
def test_stochastic_variance_is_what_the_linear_recursion_says(solve, path):
    """With a linear denoiser each step is linear: its exact output variance follows from two noise-free probes."""
    sigmas = torch.tensor([0.7, 0.5], dtype=torch.float64)
    n = 200_000
    alpha, noise = path.alpha(sigmas), path.noise(sigmas)
    z = torch.zeros(n, 1, dtype=torch.float64)
    z1 = solve(Gaussian(path), z, sigmas, path=path, generator=torch.Generator().manual_seed(1))
    snr = (alpha / noise) ** 2
    posterior = noise[1] ** 2 * (1 - snr[0] / snr[1])
    eta = 0.5 if isinstance(solve, functools.partial) else 1.0
    assert z1.std().item() == pytest.approx(eta * posterior.sqrt().item(), rel=0.01)
    if path is not RECTIFIED_FLOW:  # DDPM eq. 7, written with a jump's beta
        beta = 1 - alpha[0] ** 2 / alpha[1] ** 2
        tilde = (1 - alpha[1] ** 2) / (1 - alpha[0] ** 2) * beta
        assert posterior.item() == pytest.approx(tilde.item(), rel=1e-9)
    x_hat = Gaussian(path)(torch.zeros(1, dtype=torch.float64), sigmas[0])
    if eta == 1.0:
        mean = alpha[1] * (1 - snr[0] / snr[1]) * x_hat
        assert z1.mean().item() == pytest.approx(mean.item(), abs=0.005)


def test_forward_variance_is_beta():
    path = VPLinear()
    steps = torch.tensor([400, 399])
    sigmas = path.sigma_of_step(steps)
    z = torch.zeros(200_000, 1, dtype=torch.float64)
    z1 = ddpm(Gaussian(path), z, sigmas, path=path, generator=torch.Generator().manual_seed(1), variance="forward")
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[400].item()
    assert z1.var().item() == pytest.approx(beta, rel=0.01)
    jump = path.sigma_of_step(torch.tensor([400, 300]))
    z1 = ddpm(Gaussian(path), z, jump, path=path, generator=torch.Generator().manual_seed(1), variance="forward")
    assert z1.var().item() == pytest.approx(1 - (path.alphas_cumprod[400] / path.alphas_cumprod[300]).item(), rel=0.01)


@pytest.mark.parametrize("path", PATHS)
def test_ddim_with_full_noise_is_ancestral(path):
    path = PATHS[path]()
    sigmas = uniform_sigmas(9)
    runs = [
        solve(Gaussian(path), start(), sigmas, path=path, generator=torch.Generator().manual_seed(4))
        for solve in (functools.partial(ddim, eta=1.0), ddpm)
    ]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
def test_without_fresh_noise_the_sde_is_the_flow(path):
    path = PATHS[path]()
    sigmas, runs = uniform_sigmas(9), []
    for solve in (dpmpp_2m, functools.partial(dpmpp_2m_sde, eta=0.0), functools.partial(dpmpp_2m_sde, eta_above=1.0)):
        runs.append(solve(Gaussian(path), start(), sigmas, path=path, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    drawn = functools.partial(dpmpp_2m_sde, eta_above=0.5)
    run = drawn(Gaussian(path), start(), sigmas, path=path, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(run, runs[0])
    # Levels are 1, 7/8, ...: the step that ends at 1/2 itself follows the flow, the one before it does not.
    for at, same in ((0.55, True), (0.45, False)):
        again = functools.partial(dpmpp_2m_sde, eta_above=at)
        other = again(Gaussian(path), start(), uniform_sigmas(8), path=path, generator=torch.Generator().manual_seed(4))
        half = drawn(Gaussian(path), start(), uniform_sigmas(8), path=path, generator=torch.Generator().manual_seed(4))
        assert torch.equal(half, other) is same


def test_one_step_of_the_sde_is_ancestral():
    sigmas = torch.tensor([0.7, 0.5], dtype=torch.float64)
    for path in (RECTIFIED_FLOW, VPLinear()):
        runs = [
            solve(Gaussian(path), start(), sigmas, path=path, generator=torch.Generator().manual_seed(4))
            for solve in (dpmpp_2m_sde, ddpm)
        ]
        torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [1.0, 3.0])
def test_the_sde_makes_the_data_distribution_whatever_its_noise(eta):
    """Much noise wants small steps: with 400 of them the flow and the SDE agree."""
    path, n = VPLinear(), 40_000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x = dpmpp_2m_sde(Gaussian(path), z, spaced_sigmas(path, 400), path=path, generator=generator, eta=eta)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    corr = torch.corrcoef(torch.stack([z[:, 0], x[:, 0]]))[0, 1].item()
    assert abs(corr) < 0.2, "where it began is forgotten"


def test_the_sdes_noise_is_at_least_none():
    with pytest.raises(UserError, match="eta must be at least 0"):
        dpmpp_2m_sde(nonlinear, start(), uniform_sigmas(4), path=RECTIFIED_FLOW, eta=-1.0)


def nonlinear(z, sigma):
    return torch.tanh(1.3 * z + sigma) * (1 - 0.5 * sigma)


def every(solve_name):
    return functools.partial(ddim, eta=0.7) if solve_name == "ddim_eta" else SOLVERS[solve_name].solve


@pytest.mark.parametrize("path", ["rectified_flow", "ldm"])
@pytest.mark.parametrize("name", [*SOLVERS, "ddim_eta"])
def test_a_batch_equals_its_singles_bitwise_and_repeats(name, path):
    path, solve = PATHS[path](), every(name)
    z = torch.randn(5, 3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    sigmas = uniform_sigmas(6, shift=2.0)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(5)]

    batch = solve(nonlinear, z, sigmas, path=path, generator=generators())
    for i, single in enumerate(generators()):
        alone = solve(nonlinear, z[i : i + 1], sigmas, path=path, generator=[single])
        assert torch.equal(alone[0], batch[i])
    assert torch.equal(batch, solve(nonlinear, z, sigmas, path=path, generator=generators()))
    once, twice = (solve(nonlinear, z, sigmas, path=path, generator=torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(once, twice)
    drawn = name in ("ddpm", "dpmpp_2m_sde", "ddim_eta")
    other = solve(nonlinear, z, sigmas, path=path, generator=torch.Generator().manual_seed(10))
    assert torch.equal(once, other) != drawn


@pytest.mark.parametrize("name", SOLVERS)
def test_the_input_is_left_alone_and_the_callback_counts_and_cancels(name):
    z = start().float()
    kept, seen = z.clone(), []
    SOLVERS[name].solve(nonlinear, z, uniform_sigmas(4), path=RECTIFIED_FLOW, callback=lambda *told: seen.append(told))
    assert torch.equal(z, kept)
    assert [(step, total) for step, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(x_hat.shape == z.shape for _, _, x_hat in seen)

    class Cancelled(Exception):  # noqa: N818
        pass

    def cancel(step, total, x_hat):
        if step == 2:
            raise Cancelled

    calls = []

    def counted(z, sigma):
        calls.append(float(sigma))
        return nonlinear(z, sigma)

    with pytest.raises(Cancelled):
        SOLVERS[name].solve(counted, z, uniform_sigmas(8), path=RECTIFIED_FLOW, callback=cancel)
    assert len(calls) <= 4


def test_step_scalars_are_float64():
    """float32 states through many steps stay at float32 rounding of the float64 run."""
    sigmas = uniform_sigmas(400)
    for solve in (euler, dpmpp_2m, unipc):
        fine = solve(Gaussian(RECTIFIED_FLOW), start(), sigmas, path=RECTIFIED_FLOW)
        coarse = solve(Gaussian(RECTIFIED_FLOW), start().float(), sigmas.float().double(), path=RECTIFIED_FLOW)
        torch.testing.assert_close(coarse.double(), fine, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "sigmas", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.2, 0.0], [1.0, -0.1], [[1.0, 0.0]], [1.0, float("nan"), 0.0]]
)
def test_bad_levels_are_refused(name, sigmas):
    with pytest.raises(UserError, match="sigmas must"):
        SOLVERS[name].solve(nonlinear, start(), torch.tensor(sigmas), path=RECTIFIED_FLOW)


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="eta"):
        ddim(nonlinear, start(), uniform_sigmas(2), path=RECTIFIED_FLOW, eta=1.5)
    with pytest.raises(UserError, match="variance"):
        ddpm(nonlinear, start(), uniform_sigmas(2), path=RECTIFIED_FLOW, variance="learned")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="generators"):
        ddpm(nonlinear, start(), uniform_sigmas(2), path=RECTIFIED_FLOW, generator=[torch.Generator()])


@pytest.mark.parametrize("path", [VPLinear(), RECTIFIED_FLOW])
def test_learned_variances_lie_between_the_two(path):
    z, sigmas = start(), uniform_sigmas(9)[1:]
    sigmas, asked = torch.cat([sigmas[:5], sigmas[-1:]]), 0

    def drawn(variance):
        return ddpm(nonlinear, z, sigmas, path=path, generator=torch.Generator().manual_seed(3), variance=variance)

    def between(value):
        def variance():
            nonlocal asked
            asked += 1
            return torch.full_like(z, value)

        return variance

    torch.testing.assert_close(drawn(between(-1.0)), drawn("posterior"))
    torch.testing.assert_close(drawn(between(1.0)), drawn("forward"))
    assert asked == 2 * (len(sigmas) - 2), "the step to sigma 0 draws nothing"

    one = sigmas[:2]
    low, middle, high = (
        first - second
        for first, second in (
            [
                ddpm(nonlinear, z, one, path=path, generator=torch.Generator().manual_seed(seed), variance=between(value))
                for seed in range(2)
            ]
            for value in (-1.0, 0.0, 1.0)
        )
    )
    torch.testing.assert_close(middle**2, low * high)  # the logarithm is interpolated

    half = torch.where(torch.arange(z.numel()).view(z.shape) % 2 == 0, -1.0, 1.0)
    small, mixed, large = (
        ddpm(nonlinear, z, one, path=path, generator=torch.Generator().manual_seed(0), variance=variance)
        for variance in ("posterior", lambda: half, "forward")
    )
    torch.testing.assert_close(mixed, torch.where(half < 0, small, large))
