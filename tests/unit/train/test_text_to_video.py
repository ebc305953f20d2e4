"""The objective: what is dropped, what is weighed, what the networks see, and that all of it comes from one generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.text_to_video import TextToVideo, TextToVideoObjective

CAPTIONS = ["a red ball falls", "a blue box slides", "a ring", "a small green triangle bounces twice"]


class Watching(TextToVideo):
    """Keeps what the denoiser is given."""

    def __init__(self, text: OwnTextEncoder, denoiser: nn.Module) -> None:
        super().__init__(text, denoiser)
        self.seen: list[tuple[Tensor, Tensor, Condition]] = []

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        self.seen.append((z.detach(), sigma.detach(), condition))
        return super().forward(z, sigma, condition)


@pytest.fixture
def model() -> Watching:
    torch.manual_seed(0)
    denoiser = Spacetime(SpacetimeConfig(width=32, depth=1, heads=2, in_channels=4, patch=(2, 2, 2), text_width=32))
    for parameter in denoiser.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return Watching(OwnTextEncoder(OwnTextConfig(vocab_size=300, width=32, depth=1, heads=2)), denoiser)


@pytest.fixture
def batch() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    return {
        "latent": torch.randn(4, 4, 5, 4, 4, generator=rng).to(torch.bfloat16),
        "foreground": torch.randint(0, 256, (4, 5, 4, 4), generator=rng, dtype=torch.uint8),
        "caption": CAPTIONS,
    }


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_same_generator_gives_the_same_loss_and_gradients_reach_both_networks(model: Watching, batch: dict) -> None:
    objective = TextToVideoObjective(image_share=0.0, text_drop=0.0)
    first = objective(model, batch, rng())
    torch.manual_seed(99)  # global randomness plays no part
    again = objective(model, batch, rng())
    assert all(torch.equal(first[name], again[name]) for name in first.keys() | again.keys())
    assert float(objective(model, batch, rng(1))["loss"]) != float(first["loss"])
    assert {"loss", "loss/sigma_q0", "loss/sigma_q3"} <= set(first)
    first["loss"].backward()
    for part in (model.text, model.denoiser):
        norms = [float(p.grad.norm()) for p in part.parameters() if p.grad is not None]
        assert max(norms) > 0


def test_dropped_captions_are_the_empty_prompt(model: Watching, batch: dict) -> None:
    TextToVideoObjective(text_drop=1.0, image_share=0.0)(model, batch, rng())
    TextToVideoObjective(text_drop=0.0, image_share=0.0, split=0.0)(model, batch, rng())
    dropped, kept = (condition for _, _, condition in model.seen)
    null = model.text.null(4)
    torch.testing.assert_close(dropped.states, null.states)
    assert torch.equal(dropped.mask, null.mask)
    plain = model.text.encode(CAPTIONS)
    torch.testing.assert_close(kept.states, plain.states)
    assert torch.equal(kept.mask, plain.mask)


def test_a_share_of_captions_is_dropped(model: Watching, batch: dict) -> None:
    objective = TextToVideoObjective(text_drop=0.3, image_share=0.0, split=0.0)
    empty = int(model.text.null(1).mask.sum())
    for seed in range(100):
        objective(model, batch, rng(seed))
    counts = torch.cat([condition.mask.sum(1) for _, _, condition in model.seen])
    assert (counts == empty).float().mean().item() == pytest.approx(0.3, abs=0.09)  # 400 draws: 4 sigma


def test_pictures_are_the_first_latent_frame(model: Watching, batch: dict) -> None:
    TextToVideoObjective(image_share=1.0)(model, batch, rng())
    TextToVideoObjective(image_share=0.0)(model, batch, rng())
    (picture, _, _), (film, _, _) = model.seen
    assert picture.shape == (4, 4, 1, 4, 4)
    assert film.shape == (4, 4, 5, 4, 4)


def test_the_foreground_weighs_more(model: Watching, batch: dict) -> None:
    objective = TextToVideoObjective(image_share=0.0, foreground=1.0)
    plain = float(objective(model, batch, rng())["loss"])
    batch["foreground"] = torch.full_like(batch["foreground"], 255)
    even = float(TextToVideoObjective(image_share=0.0, foreground=4.0)(model, batch, rng())["loss"])
    assert even == pytest.approx(plain, rel=1e-5), "the same weight everywhere changes nothing"
    batch["foreground"][:, :, 2:] = 0
    uneven = float(TextToVideoObjective(image_share=0.0, foreground=4.0)(model, batch, rng())["loss"])
    assert uneven != pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("missing", ["latent", "foreground", "caption"])
def test_an_incomplete_batch_is_refused(model: Watching, batch: dict, missing: str) -> None:
    del batch[missing]
    with pytest.raises(UserError, match=f"lacks '{missing}'"):
        TextToVideoObjective()(model, batch, rng())
