"""Learned variances against closed forms: Gaussian divergences, levels that add up to one, and diffusers' interpolation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tubelet.core.errors import UserError
from tubelet.diffusion.hybrid import hybrid_loss, interpolated_log_variance, variance_bounds, vlb_terms
from tubelet.diffusion.paths import Cosine, VPLinear, zero_terminal_snr

LINEAR = VPLinear()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps(*values: int) -> Tensor:
    return torch.tensor(values)


def noised(x: Tensor, n: Tensor, t: Tensor) -> Tensor:
    abar = LINEAR.alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt() * x + (1 - abar).sqrt() * n


def test_bounds_are_those_of_ddpm() -> None:
    """Written out from equations 4 and 7 with betas, not from the table."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    low, high = variance_bounds(LINEAR, torch.arange(1000))
    torch.testing.assert_close(high.exp(), betas, rtol=1e-9, atol=0)
    torch.testing.assert_close(low[1:].exp(), (1 - abar[:-1]) / (1 - abar[1:]) * betas[1:], rtol=1e-9, atol=0)
    assert low[0] == low[1], "beta tilde is 0 at the first step"
    assert low.isfinite().all()
    assert (low[1:] < high[1:]).all()


def test_the_interpolation_runs_from_beta_tilde_to_beta() -> None:
    t = steps(0, 1, 500, 999)
    low, high = variance_bounds(LINEAR, t)
    for share in (0.0, 0.3, 1.0):
        v = torch.full((4, 2, 3), 2 * share - 1, dtype=torch.float64)
        expected = (share * high + (1 - share) * low)[:, None, None].expand(4, 2, 3)
        torch.testing.assert_close(interpolated_log_variance(v, t, LINEAR), expected)
    assert interpolated_log_variance(torch.zeros(4, 1, dtype=torch.bfloat16), t, LINEAR).dtype == torch.float32


@pytest.mark.parametrize("step", [1, 2, 500, 999])
def test_the_interpolation_is_that_of_diffusers(step: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    for path, schedule in ((VPLinear(), "linear"), (Cosine(), "squaredcos_cap_v2")):
        scheduler = diffusers.DDPMScheduler(beta_schedule=schedule, variance_type="learned_range")
        scheduler.alphas_cumprod, scheduler.one = path.alphas_cumprod, torch.ones((), dtype=torch.float64)
        v = torch.linspace(-1, 1, 9, dtype=torch.float64)[None]
        theirs = scheduler._get_variance(step, predicted_variance=v)
        torch.testing.assert_close(interpolated_log_variance(v, steps(step), path), theirs, rtol=1e-10, atol=1e-10)


def test_a_term_is_the_divergence_of_two_gaussians() -> None:
    t = steps(1, 2, 77, 500, 999)
    x, n, wrong, v = torch.randn(4, 5, 2, 3, 3, generator=rng(), dtype=torch.float64)
    eps = n + 0.1 * wrong
    z = noised(x, n, t)
    # The posterior from DDPM's equations 6 and 7, by betas; the network's mean from its equation 11.
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)
    beta, now, before = (one[at].view(-1, 1, 1, 1) for one, at in ((betas, t), (abar, t), (abar, t - 1)))
    truth = before.sqrt() * beta / (1 - now) * x + (1 - beta).sqrt() * (1 - before) / (1 - now) * z
    guess = (z - beta / (1 - now).sqrt() * eps) / (1 - beta).sqrt()
    deviation = (interpolated_log_variance(v, t, LINEAR) / 2).exp()
    nats = kl_divergence(Normal(truth, ((1 - before) / (1 - now) * beta).sqrt().expand_as(x)), Normal(guess, deviation))
    expected = nats.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(vlb_terms(x, z, t, eps, v, LINEAR), expected, rtol=1e-8, atol=1e-10)


def test_a_term_is_zero_where_the_network_is_right_and_known_where_only_its_variance_is_wrong() -> None:
    t = steps(500)
    x, n = torch.randn(2, 1, 2, 3, 3, generator=rng(), dtype=torch.float64)
    z, v = noised(x, n, t), torch.full_like(x, -1.0)
    assert vlb_terms(x, z, t, n, v, LINEAR).abs().max() < 1e-12
    abar, beta = LINEAR.alphas_cumprod, 1e-4 + 500 * (0.02 - 1e-4) / 999
    ratio = float((1 - abar[499]) / (1 - abar[500]))  # beta tilde over beta
    assert beta == pytest.approx(0.01006, abs=1e-5)
    nats = (ratio - 1 - math.log(ratio)) / 2
    assert vlb_terms(x, z, t, n, -v, LINEAR).item() == pytest.approx(nats / math.log(2), rel=1e-6)


def test_the_256_levels_of_the_first_step_add_up_to_one() -> None:
    levels = (torch.arange(256, dtype=torch.float64) * 2 / 255 - 1).view(256, 1, 1, 1)
    for centre in (-1.0, -0.3, 0.5, 1.0):
        one, eps = torch.full_like(levels, centre), torch.full_like(levels, 0.2)
        for v in (-1.0, 1.0):
            bits = vlb_terms(levels, noised(one, eps, steps(0)), steps(*[0] * 256), eps, torch.full_like(levels, v), LINEAR)
            assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-8)
            assert abs(int(bits.argmin()) - (centre + 1) * 127.5) <= 0.5


def test_the_bound_trains_variances_alone() -> None:
    t = steps(0, 3, 600)
    x, n, eps, v = torch.randn(4, 3, 2, 4, 4, generator=rng())
    eps.requires_grad_()
    v.requires_grad_()
    vlb_terms(x.clamp(-1, 1), noised(x.clamp(-1, 1), n, t).float(), t, eps, v, LINEAR).sum().backward()
    assert eps.grad is None
    assert v.grad is not None
    assert v.grad.isfinite().all()
    assert (v.grad.flatten(1).abs().sum(1) > 0).all(), "at every step, the first one too"


def test_the_hybrid_loss_is_its_parts() -> None:
    x = torch.rand(64, 3, 2, 2, generator=rng(1)) * 2 - 1
    seen = {}

    def network(z: Tensor, t: Tensor) -> Tensor:
        seen.update(z=z, t=t)
        return torch.cat([0.5 * z, torch.full_like(z, 0.3)], dim=1)

    losses = hybrid_loss(network, x, rng(), LINEAR)
    z, t = seen["z"], seen["t"]
    assert t.dtype == torch.int64
    assert 0 <= t.min() < 100
    assert 900 < t.max() < 1000
    abar = LINEAR.alphas_cumprod[t].view(-1, 1, 1, 1).float()
    noise = (z - abar.sqrt() * x) / (1 - abar).sqrt()
    torch.testing.assert_close(losses["simple"], (0.5 * z - noise).square().mean(), rtol=1e-3, atol=0)
    terms = vlb_terms(x, z, t, 0.5 * z, torch.full_like(z, 0.3), LINEAR)
    torch.testing.assert_close(losses["vlb"], 1000 * terms.mean())
    torch.testing.assert_close(losses["loss"], losses["simple"] + 0.001 * losses["vlb"])
    assert torch.equal(losses["loss"], hybrid_loss(network, x, rng(), LINEAR)["loss"])
    assert not torch.equal(losses["loss"], hybrid_loss(network, x, rng(1), LINEAR)["loss"])


def test_under_a_mask_only_what_it_counts_matters_and_each_value_alike() -> None:
    x = torch.rand(3, 2, 4, 4, generator=rng(1)) * 2 - 1
    mask = torch.zeros(3, 1, 4, 4)
    mask[0, :, :1], mask[1, :, :3], mask[2] = 1, 1, 1  # 4, 12 and 16 cells

    def network(z: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.5 * z, torch.full_like(z, 0.3)], dim=1)

    def astray(z: Tensor, t: Tensor) -> Tensor:
        return torch.where(mask > 0, network(z, t), 7.0)

    losses = hybrid_loss(network, x, rng(), LINEAR, mask=mask)
    for name, value in hybrid_loss(astray, x, rng(), LINEAR, mask=mask).items():
        torch.testing.assert_close(value, losses[name])
    parts = []
    for row in range(3):
        alone = torch.zeros_like(mask)
        alone[row] = mask[row]
        parts.append(hybrid_loss(network, x, rng(), LINEAR, mask=alone))
    for name in ("loss", "simple", "vlb"):
        torch.testing.assert_close(losses[name], sum(n * part[name] for n, part in zip((4, 12, 16), parts, strict=True)) / 32)
    everywhere = hybrid_loss(network, x, rng(), LINEAR, mask=torch.ones(3, 1, 1, 1))
    for name, value in hybrid_loss(network, x, rng(), LINEAR).items():
        torch.testing.assert_close(everywhere[name], value)


def test_bad_input_is_refused() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(UserError, match="no signal is left; take a chain"):
        hybrid_loss(lambda z, t: torch.cat([z, z], 1), x, rng(), zero_terminal_snr(LINEAR))
    with pytest.raises(UserError, match=r"2 x 3 channels, got \(2, 3, 4, 4\)"):
        hybrid_loss(lambda z, t: z, x, rng(), LINEAR)
