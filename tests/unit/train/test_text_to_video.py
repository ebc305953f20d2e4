"""The objective: what is dropped, what is weighed, what the networks see, and that all of it comes from one generator."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.diffusion.objectives import Prediction
from tubelet.diffusion.paths import SigmaSampling
from tubelet.models.spacetime import Spacetime, SpacetimeConfig
from tubelet.nn.patch import patch_positions
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.text_to_video import TextToVideo, TextToVideoObjective, _dice, some_frames

CAPTIONS = ["a red ball falls", "a blue box slides", "a ring", "a small green triangle bounces twice"]


class Watching(TextToVideo):
    """Keeps what the denoiser is given."""

    def __init__(self, text: OwnTextEncoder, denoiser: nn.Module) -> None:
        super().__init__(text, denoiser)
        self.seen: list[tuple[Tensor, Tensor, Condition]] = []
        self.places: list[Tensor | None] = []

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition, positions: Tensor | None = None) -> Tensor:
        self.seen.append((z.detach(), sigma.detach(), condition))
        self.places.append(positions)
        return super().forward(z, sigma, condition, positions)


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
    assert objective(model, batch, rng(1))["loss"].item() != first["loss"].item()
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
    plain = objective(model, batch, rng())["loss"].item()
    batch["foreground"] = torch.full_like(batch["foreground"], 255)
    even = TextToVideoObjective(image_share=0.0, foreground=4.0)(model, batch, rng())["loss"].item()
    assert even == pytest.approx(plain, rel=1e-5), "the same weight everywhere changes nothing"
    batch["foreground"][:, :, 2:] = 0
    uneven = TextToVideoObjective(image_share=0.0, foreground=4.0)(model, batch, rng())["loss"].item()
    assert uneven != pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("missing", ["latent", "foreground", "caption"])
def test_an_incomplete_batch_is_refused(model: Watching, batch: dict, missing: str) -> None:
    del batch[missing]
    with pytest.raises(UserError, match=f"lacks '{missing}'"):
        TextToVideoObjective()(model, batch, rng())


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 2)])
def test_some_frames_keep_their_places_in_time(patch: tuple[int, int, int]) -> None:
    chosen = set()
    for seed in range(40):
        frames, places = some_frames(3, (9, 4, 6), patch, rng(seed))
        assert len(frames) == (3 if patch[0] == 1 else 5)
        assert (frames.diff() > 0).all()
        whole = patch_positions((9 if patch[0] == 1 else 5, 2, 3), patch)
        rows = {tuple(row) for row in places.tolist()}
        assert len(rows) == 3 * 6
        assert rows <= {tuple(row) for row in whole.tolist()}
        # A token stands at the middle of the frames that it spans.
        spans = (
            frames.float().view(-1, 1) if patch[0] == 1 else torch.cat([frames[:1].repeat(2), frames[1:]]).float().view(-1, 2)
        )
        assert sorted({row[0] for row in rows}) == sorted(spans.mean(1).tolist())
        chosen |= set(frames.tolist())
    assert chosen == set(range(9))


def test_a_sketch_sees_some_frames_and_all_of_them_is_the_whole(model: Watching, batch: dict) -> None:
    TextToVideoObjective(image_share=0.0, frames=2)(model, batch, rng())
    assert model.seen[-1][0].shape == (4, 4, 3, 4, 4)
    assert model.places[-1] is not None
    assert model.places[-1].shape == (2 * 4, 3)
    frames, places = some_frames(3, (5, 4, 4), (2, 2, 2), rng())
    z, sigma, condition = torch.randn(1, 4, 5, 4, 4), torch.rand(1), model.text.encode(["a ball"])
    assert frames.tolist() == [0, 1, 2, 3, 4]
    with torch.no_grad():
        torch.testing.assert_close(model(z, sigma, condition, places), model(z, sigma, condition))
    with pytest.raises(UserError, match="frames must be at least 0"):
        TextToVideoObjective(frames=-1)


def pack() -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    shapes = [(5, 4, 4), (1, 4, 6), (5, 4, 4), (3, 2, 2)]
    return {
        "latent": [torch.randn(4, *shape, generator=g) for shape in shapes],
        "foreground": [torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) for shape in shapes],
        "caption": CAPTIONS,
    }


def test_a_pack_is_trained_on_as_it_is(model: Watching) -> None:
    losses = TextToVideoObjective(text_drop=0.0)(model, pack(), rng())
    losses["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert torch.equal(losses["loss"], TextToVideoObjective(text_drop=0.0)(model, pack(), rng())["loss"])


EVERY_WAY: list[dict[str, Any]] = [
    *({"prediction": kind} for kind in get_args(Prediction) if kind != "eps"),
    {"masks": {"first": 1.0, "box": 1.0, "prefix": 1.0}, "haze": 0.3},
    {"frames": 2},
    {"image_share": 0.5},
    {"sampling": SigmaSampling(shift=3.0, tokens=8), "foreground": 1.0, "text_drop": 0.5, "split": 0.0},
]


@pytest.mark.parametrize("how", EVERY_WAY, ids=str)
def test_a_pack_has_the_loss_and_gradients_of_its_samples_one_by_one(model: Watching, how: dict[str, Any]) -> None:
    def one_by_one(z, sigma, condition, positions):
        return [
            model.denoiser(one[None], s[None], condition[i : i + 1], places)[0]
            for i, (one, s, places) in enumerate(zip(z, sigma, positions, strict=True))
        ]

    objective, found = TextToVideoObjective(**({"image_share": 0.0} | how)), []
    for forward in (model.denoiser.forward_packed, one_by_one):
        model.denoiser.forward_packed = forward
        losses = objective(model, pack(), rng(5))
        gradients = torch.autograd.grad(losses["loss"], list(model.parameters()), allow_unused=True)
        found.append((losses, gradients))
    (packed, ours), (singles, theirs) = found
    assert packed.keys() == singles.keys()
    for name, loss in packed.items():
        torch.testing.assert_close(loss, singles[name], rtol=1e-5, atol=0, equal_nan=True, msg=name)
    for (name, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        assert one is not None, name
        assert other is not None, name
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()), msg=name)


def test_a_pack_knows_masks_sketches_and_images(model: Watching) -> None:
    seen: list[tuple] = []
    whole = model.denoiser.forward_packed

    def watch(z, sigma, condition, positions=None):
        seen.append((z, sigma, positions))
        return whole(z, sigma, condition, positions)

    model.denoiser.forward_packed = watch
    TextToVideoObjective(image_share=0.0, masks={"first": 1.0})(model, pack(), rng())
    shapes = [tuple(s.shape) for s in seen[-1][1]]
    assert shapes == [(5,), (), (5,), (3,)], "an image has nothing to know"
    assert all(s[0] == 0 and (s[1:] > 0).all() for s in seen[-1][1] if s.ndim)
    TextToVideoObjective(image_share=1.0)(model, pack(), rng())
    assert [one.shape[1] for one in seen[-1][0]] == [1, 1, 1, 1]
    TextToVideoObjective(image_share=0.0, frames=2)(model, pack(), rng())
    assert [one.shape[1] for one in seen[-1][0]] == [3, 1, 3, 3]
    assert [len(p) for p in seen[-1][2]] == [2 * 4, 6, 2 * 4, 2]


@pytest.mark.parametrize("name", ["first", "box", "prefix", "ends"])
def test_a_step_may_know_a_part_of_its_films(model: Watching, batch: dict, name: str) -> None:
    objective = TextToVideoObjective(image_share=0.0, masks={name: 1.0}, haze=0.2)
    losses = objective(model, batch, rng(3))
    losses["loss"].backward()
    assert losses["loss"].isfinite()
    sigma = model.seen[-1][1]
    assert sigma.shape == ((4, 5, 4, 4) if name == "box" else (4, 5))
    assert (sigma <= 0.2).any()
    # Patches span two frames here: both are known or neither is.
    assert torch.equal(sigma[:, 1], sigma[:, 2])
    with pytest.raises(UserError, match="no mask 'middle'"):
        TextToVideoObjective(masks={"middle": 1.0})
    with pytest.raises(UserError, match="haze is a noise level"):
        TextToVideoObjective(haze=1.0)


def test_dice_of_an_accelerator_are_thrown_on_the_processor() -> None:
    class Far:
        device = torch.device("meta")

    own = rng()
    assert _dice(own) is own
    real = torch.randint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda top, size, *, generator, device: real(top, size, generator=own))
        one, other = _dice(Far()), _dice(Far())  # type: ignore[arg-type]
    assert one.device.type == other.device.type == "cpu"
    assert one.initial_seed() != other.initial_seed(), "each step throws its own"


def test_an_unconditional_step_is_plain_text_to_video(model: Watching, batch: dict) -> None:
    TextToVideoObjective(image_share=0.0, masks={"unconditional": 1.0})(model, batch, rng())
    assert model.seen[-1][1].shape == (4,)


def test_films_of_one_form_are_the_same_films(model: Watching, batch: dict) -> None:
    how: dict[str, Any] = {"image_share": 0.0, "text_drop": 0.3, "split": 0.0}
    for masks in ({}, {"prefix": 1.0}, {"box": 1.0}):
        ways = (TextToVideoObjective(**how, masks=masks, haze=0.2, uniform=one) for one in (False, True))
        losses = [way(model, batch, rng(5)) for way in ways]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
        plain, uniform = (seen[2].mask for seen in model.seen[-2:])
        assert uniform.shape == (4, model.text.config.max_tokens)  # type: ignore[union-attr]
        assert torch.equal(uniform.sum(1), plain.sum(1))
        assert model.seen[-1][1].shape == ((4, 5, 4, 4) if masks == {"box": 1.0} else (4, 5))


def test_films_of_one_form_make_one_graph_a_size(model: Watching, batch: dict) -> None:
    torch.compiler.reset()
    counters.clear()
    for blocks in (model.text.blocks, model.denoiser.blocks):  # type: ignore[union-attr]
        for block in blocks:  # type: ignore[union-attr]
            block.compile(backend="eager", dynamic=False)
    masks = {"unconditional": 1.0, "prefix": 1.0, "box": 1.0}
    objective = TextToVideoObjective(image_share=0.3, text_drop=0.3, masks=masks, uniform=True)
    wide = batch | {"latent": torch.cat([batch["latent"]] * 2, -1), "foreground": torch.cat([batch["foreground"]] * 2, -1)}
    try:
        for number in range(12):
            objective(model, wide if number % 3 else batch, rng(number))["loss"].backward()
        shapes = {sigma.shape for _, sigma, _ in model.seen}
        assert shapes == {(4,), (4, 5), (4, 5, 4, 8)}, "images, films and boxes came"
        assert {z.shape[-1] for z, sigma, _ in model.seen if sigma.ndim == 2} == {4, 8}, "films came in both sizes"
        assert counters["stats"]["unique_graphs"] == 3, "one for the words, one for each size of films"
    finally:
        torch.compiler.reset()
