"""A stage of super-resolution: what it adds to enlarging, how it is shown the smaller film, and what it learns by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.diffusion.chain import v_loss
from tubelet.diffusion.paths import VPLinear, zero_terminal_snr
from tubelet.models.walt import WALT, WALTConfig
from tubelet.train.classify import as_pixels
from tubelet.train.upscaling import Stage, UpscaleObjective, doubled

PATH = zero_terminal_snr(VPLinear())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def walt() -> WALT:
    torch.manual_seed(0)
    network = WALT(WALTConfig(16, 2, 2, 3, 4, (2, 4, 4), (2, 2), (2, 2, 2), upscale=True))
    for p in network.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.05)  # as after some training
    return network


@pytest.fixture
def low() -> Tensor:
    return torch.rand(3, 3, 2, 8, 8, generator=rng(1)) * 2 - 1


def test_doubling_keeps_what_is_flat_and_each_film_for_itself(low: Tensor) -> None:
    flat = torch.tensor([-1.0, 0.2, 1.0]).view(1, 3, 1, 1, 1).expand(2, 3, 2, 8, 6)
    torch.testing.assert_close(doubled(flat), flat[..., :1, :1].expand(2, 3, 2, 16, 12))
    assert doubled(low).abs().max() <= 1
    torch.testing.assert_close(doubled(low)[1:2], doubled(low[1:2]))
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 1, 8, 16)
    middle = doubled(ramp)[0, 0, 0, 8, 8:24]
    torch.testing.assert_close(middle.diff(), torch.full((15,), 1 / 15), atol=1e-3, rtol=0.01)


class Oracle(nn.Module):
    """A network that knows what is missing, and what it was shown."""

    def __init__(self, missing: Tensor) -> None:
        super().__init__()
        self.missing, self.asked = missing, []

    def forward(self, z: Tensor, t: Tensor, *, low: Tensor, low_t: Tensor) -> Tensor:
        sigma = PATH.sigma_of_step(t)[0]
        self.asked.append((float(t[0]), float(low_t[0]), low))
        return (PATH.alpha(sigma).float() * z - self.missing) / PATH.noise(sigma).float()


@pytest.mark.parametrize("steps", [1, 5])
def test_what_is_missing_is_added(low: Tensor, steps: int) -> None:
    high = (doubled(low) + 0.1 * torch.randn(3, 3, 2, 16, 16, generator=rng(2))).clamp(-1, 1)
    stage = Stage(walt(), PATH, 0.1)
    missing = stage.missing(low, high)
    torch.testing.assert_close(0.1 * missing + doubled(low), high)
    stage.network = Oracle(missing)  # type: ignore[assignment]
    made = stage.upscale(low, [rng(i) for i in range(3)], steps, shown=30)
    torch.testing.assert_close(made, high, atol=1e-4, rtol=1e-4)
    asked = stage.network.asked
    assert [t for t, _, _ in asked] == [999.0, 799.0, 599.0, 399.0, 199.0][: len(asked)]
    assert len(asked) == steps
    assert {shown for _, shown, _ in asked} == {30.0}
    assert all(torch.equal(seen, asked[0][2]) for _, _, seen in asked), "one noise for a whole film"
    sigma = PATH.sigma_of_step(torch.tensor(30))
    noise = (asked[0][2] - PATH.alpha(sigma).float() * low) / PATH.noise(sigma).float()
    assert noise.std() == pytest.approx(1, abs=0.1)


def test_a_batch_is_its_films_and_noise_is_their_generators(low: Tensor) -> None:
    stage = Stage(walt().eval(), PATH)
    made = stage.upscale(low, [rng(i) for i in range(3)], 2, 10)
    assert made.shape == (3, 3, 2, 16, 16)
    assert made.abs().max() <= 1
    torch.testing.assert_close(stage.upscale(low[1:2], [rng(1)], 2, 10), made[1:2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(stage.upscale(low[1:2], [rng(7)], 2, 10), made[1:2], atol=1e-2)
    for shown in (-1, 1000):
        with pytest.raises(UserError, match="step of a chain"):
            stage.upscale(low, [rng(i) for i in range(3)], shown=shown)
    with pytest.raises(UserError, match="at most 1000"):
        stage.upscale(low, [rng(i) for i in range(3)], steps=1001)


def test_a_stage_learns_v_of_what_is_missing_beside_the_noised_film() -> None:
    stage = Stage(walt(), PATH, 0.5)
    batch: dict[str, Any] = {
        "low": torch.randint(256, (4, 2, 8, 8, 3), generator=rng(1), dtype=torch.uint8),
        "high": torch.randint(256, (4, 2, 16, 16, 3), generator=rng(2), dtype=torch.uint8),
    }
    losses = UpscaleObjective(augmentation=50)(stage, batch, rng())
    generator = rng()
    step = torch.randint(50, (4,), generator=generator)
    low = as_pixels(batch["low"])
    seen = stage.noised(low, step, torch.randn(low.shape, generator=generator))
    missing = (as_pixels(batch["high"]) - doubled(low)) / 0.5
    same = v_loss(lambda z, t, _: stage.network(z, t, low=seen, low_t=step), missing, generator, PATH)
    torch.testing.assert_close(losses["loss"], same["loss"])
    losses["loss"].backward()
    assert all(p.grad is not None for p in stage.parameters())
    clean = stage.noised(low, torch.zeros(4, dtype=torch.long), torch.ones_like(low))
    torch.testing.assert_close(clean, low, atol=0.0101, rtol=1e-3)
