"""DDPM in pixels: what it learns by, and shortened chains that draw as the solvers do and cost what their terms sum up to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tubelet.diffusion.hybrid import hybrid_loss, vlb_terms
from tubelet.diffusion.paths import VPLinear
from tubelet.diffusion.solvers import ddpm
from tubelet.models.unet import UNet, UNetConfig
from tubelet.train.classify import as_pixels
from tubelet.train.pixels import PixelObjective, ShortChain, answers, noised

PATH = VPLinear()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unet(learned: bool) -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        width=8, multipliers=(1, 2), blocks=1, attention=(1,), dropout=0.0, groups=4, size=8, learn_sigma=learned
    )  # fmt: skip
    model = UNet(config)
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.05)  # as after some training
    return model


@pytest.fixture
def batch() -> dict[str, Any]:
    return {"video": torch.randint(256, (4, 1, 8, 8, 3), generator=rng(1), dtype=torch.uint8)}


@pytest.fixture
def x() -> Tensor:
    return torch.randint(256, (2, 3, 8, 8), generator=rng(3)) / 127.5 - 1


def knows(x: Tensor, v: float = -1.0) -> Any:
    """A network that knows the picture: exact noise at every step of the whole chain."""

    def ask(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        signal = float(PATH.alphas_cumprod[t[0]])
        return (z - math.sqrt(signal) * x) / math.sqrt(1 - signal), torch.full_like(z, v)

    return ask


def test_noise_alone_is_learned_by_l_simple_and_with_variances_by_the_hybrid(batch: dict[str, Any]) -> None:
    pixels, generator = as_pixels(batch["video"])[:, :, 0], rng()
    t, noise = torch.randint(1000, (4,), generator=generator), torch.randn(4, 3, 8, 8, generator=generator)
    z = PATH.alpha(PATH.sigma_of_step(t)).float().view(-1, 1, 1, 1) * pixels
    z = z + PATH.noise(PATH.sigma_of_step(t)).float().view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(noised(pixels, noise, t, PATH), z, atol=1e-5, rtol=1e-4)
    simple = unet(False)
    losses = PixelObjective()(simple, batch, rng())
    torch.testing.assert_close(losses["loss"], (simple(z, t) - noise).square().mean())
    learned = unet(True)
    losses = PixelObjective()(learned, batch, rng())
    torch.testing.assert_close(losses["vlb"], hybrid_loss(learned, pixels, rng(), PATH)["vlb"])
    losses["loss"].backward()
    assert all(p.grad is not None for p in learned.parameters())


def test_what_a_network_does_not_say_of_variance_is_fixed(x: Tensor) -> None:
    t = torch.tensor([3, 900])
    noise, v = answers(unet(False), 1.0)(x, t)
    assert torch.equal(noise, unet(False)(x, t))
    assert v.eq(1).all()
    noise, v = answers(unet(True), 1.0)(x, t)
    assert torch.equal(torch.cat([noise, v], dim=1), unet(True)(x, t))


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "posterior"), (1.0, "forward")])
@pytest.mark.parametrize("count", [2, 7])
def test_a_short_chain_draws_as_the_solver_does(x: Tensor, v: float, variance: Any, count: int) -> None:
    model, chain, noise = unet(False), ShortChain(PATH, count), torch.randn(2, 3, 8, 8, generator=rng(5))
    assert chain.steps[0] == 0
    assert chain.steps[-1] == 999

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        step = PATH.told_step(sigma)
        signal = float(PATH.alphas_cumprod[int(step)])
        return ((z - math.sqrt(1 - signal) * model(z, step.expand(2))) / math.sqrt(signal)).clamp(-1, 1)

    sigmas = torch.cat([PATH.sigma_of_step(chain.steps.flip(0)), torch.zeros(1, dtype=torch.float64)])
    with torch.no_grad():
        same = ddpm(denoise, noise, sigmas, path=PATH, generator=rng(9), variance=variance)
        drawn = chain.draw(answers(model, v), noise, rng(9))
    assert drawn.abs().max() <= 1
    torch.testing.assert_close(drawn, same, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(chain.draw(knows(x, v), noise, rng(9)), x, atol=1e-4, rtol=1e-3)


def test_the_bound_is_the_sum_of_its_terms(x: Tensor) -> None:
    chain = ShortChain(PATH, 5)
    path, generator, expected = chain.path, rng(2), torch.zeros(2)
    signal = PATH.alphas_cumprod[-1]
    mean, variance = signal.sqrt() * x.double(), 1 - signal
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    )
    expected = kl.mean((1, 2, 3)).float() / math.log(2)
    for i in range(5):
        t, noise = torch.full((2,), i), torch.randn(x.shape, generator=generator)
        expected = expected + vlb_terms(x, noised(x, noise, t, path), t, noise, torch.full_like(x, 0.3), path)
    exact = chain.bound(knows(x, 0.3), x, rng(2))
    torch.testing.assert_close(exact, expected, atol=1e-3, rtol=1e-3)
    guess = chain.bound(lambda z, t: (torch.zeros_like(z), torch.full_like(z, 0.3)), x, rng(2))
    assert (guess > 2 * exact).all()


def test_a_bound_needs_fewer_bits_where_the_variance_is_right(x: Tensor) -> None:
    """One who knows the picture takes the smaller variance, one who guesses the larger."""
    chain = ShortChain(PATH, 20)
    for ask, better in ((knows, -1.0), (lambda _, v: lambda z, t: (z, torch.full_like(z, v)), 1.0)):
        small, large = (chain.bound(ask(x, v), x, rng()).mean() for v in (-1.0, 1.0))
        assert (small < large) == (better < 0)
