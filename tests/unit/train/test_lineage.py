"""The lineage's denoisers as networks of films and noise levels, and the losses they learn by."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tubelet.codecs import build_codec
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.diffusion.chain import v_loss
from tubelet.diffusion.hybrid import hybrid_loss
from tubelet.diffusion.objectives import convert
from tubelet.diffusion.paths import VPLinear, zero_terminal_snr
from tubelet.generate.engine import Engine, Request, Sampling
from tubelet.generate.layouts import Chain
from tubelet.generate.published import OnePicture
from tubelet.generate.roll import roll
from tubelet.models.dit import DiT, DiTConfig
from tubelet.models.unet import UNet, UNetConfig
from tubelet.models.vdt import CONDITIONINGS, VDT, VDTConfig
from tubelet.models.walt import WALT, WALTConfig
from tubelet.tasks.given import Given
from tubelet.tasks.masks import RELEASED
from tubelet.tasks.timeline import Span, Timeline, plan
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.lineage import (
    Completing,
    Continuing,
    FilmObjective,
    Forecast,
    ForecastObjective,
    FrozenText,
    MaskedFilmObjective,
    PictureObjective,
    Recalling,
)
from tubelet.train.loop import TrainConfig, train
from tubelet.train.optim import Optimizer, OptimizerConfig
from tubelet.train.text_to_video import TextToVideo

WIDTH, CHANNELS, PATH = 32, 4, VPLinear()
CAPTIONS = ["a red ball falls", "a blue box slides", "a ring", "a small green triangle bounces twice"]


def filled(module: nn.Module) -> Any:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    for p in module.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.05)
    return module


def text() -> FrozenText:
    torch.manual_seed(1)
    return FrozenText(OwnTextEncoder(OwnTextConfig(vocab_size=300, width=WIDTH, depth=1, heads=2)))


def dit() -> DiT:
    return filled(DiT(DiTConfig(32, 1, 2, 2, CHANNELS, 1, text_width=WIDTH)))


def unet() -> UNet:
    config = UNetConfig(
        width=8, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, context=WIDTH, channels=CHANNELS, learn_sigma=True,
        dropout=0.0, groups=4, size=4,
    )  # fmt: skip
    return filled(UNet(config))


def vdt(conditioning: Any = "concat") -> VDT:
    return filled(VDT(VDTConfig(32, 1, 2, 2, CHANNELS, 1, conditioning=conditioning)))


def walt(predict: bool = False) -> WALT:
    config = WALTConfig(
        32, 2, 2, CHANNELS, patch=2, grid=(5, 2, 2), frame=(2, 2), window=(5, 1, 1), text_width=WIDTH, predict=predict
    )  # fmt: skip
    return filled(WALT(config))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch() -> dict[str, Any]:
    return {"latent": torch.randn(4, CHANNELS, 5, 4, 4, generator=rng(7)).to(torch.bfloat16), "caption": CAPTIONS}


# Words that do not learn


def test_frozen_words_are_the_encoders_own_and_learn_nothing(batch: dict[str, Any]) -> None:
    frozen = text()
    own = frozen.inner.encode(CAPTIONS)
    for mine, theirs in ((frozen.encode(CAPTIONS), own), (frozen.null(2), frozen.inner.null(2))):
        assert torch.equal(mine.states, theirs.states)
        assert torch.equal(mine.mask, theirs.mask)
    assert not frozen.encode(CAPTIONS).states.requires_grad
    assert copy.deepcopy(frozen) is frozen
    assert (frozen.width, frozen.trainable) == (WIDTH, False)
    model = TextToVideo(frozen, OnePicture(dit(), PATH))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(name.startswith("denoiser.") for name in names)
    Optimizer(model, OptimizerConfig())  # it can be split
    PictureObjective()(model, batch, rng())["loss"].backward()
    assert all(p.grad is None for p in frozen.parameters())


# Pictures


@pytest.mark.parametrize("build", [dit, unet])
def test_pictures_learn_noise_and_variance_of_the_first_frame(build: Callable[[], Any], batch: dict[str, Any]) -> None:
    model = TextToVideo(text(), OnePicture(build(), PATH))
    losses = PictureObjective(text_drop=0.0)(model, batch, rng())
    condition = model.text.encode(CAPTIONS)
    generator = rng()
    torch.rand(4, generator=generator)  # which captions are dropped
    network = model.denoiser.network  # type: ignore[union-attr]
    same = hybrid_loss(lambda z, t: network(z, t, condition), batch["latent"][:, :, 0], generator, PATH)  # type: ignore[operator]
    for name in ("loss", "simple", "vlb"):
        torch.testing.assert_close(losses[name], same[name])
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.denoiser.parameters())
    later = {**batch, "latent": torch.cat([batch["latent"][:, :, :1], 0 * batch["latent"][:, :, 1:]], 2)}
    assert torch.equal(PictureObjective(text_drop=0.0)(model, later, rng())["loss"], losses["loss"])


def test_dropped_captions_are_the_empty_one(batch: dict[str, Any]) -> None:
    model = TextToVideo(text(), OnePicture(dit(), PATH))
    losses = [
        PictureObjective(text_drop=drop)(model, {**batch, "caption": captions}, rng())["loss"]
        for drop, captions in ((1.0, CAPTIONS), (0.0, [""] * 4), (0.0, CAPTIONS))
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


# Forecasts


@pytest.mark.parametrize("conditioning", CONDITIONINGS[1:])
def test_a_forecast_is_its_network_on_the_frames_to_be_made(conditioning: str) -> None:
    network, z = vdt(conditioning), torch.randn(2, CHANNELS, 5, 4, 4, generator=rng(1))
    sigma = torch.tensor([[0.0, 0.0, 0.4, 0.4, 0.4]] * 2)
    nothing = Condition(torch.zeros(2, 1, WIDTH), torch.ones(2, 1, dtype=torch.bool))
    with torch.no_grad():
        out = Forecast(network, PATH)(z, sigma, nothing)
        whole = network(z[:, :, 2:], torch.full((2,), 399.0), clean=z[:, :, :2])
    assert out.shape == z.shape
    assert not out[:, :, :2].any()
    torch.testing.assert_close(out[:, :, 2:], whole[:, :CHANNELS], atol=1e-5, rtol=1e-5)
    for bad in (sigma.new_full((2,), 0.4), sigma.new_full((2, 5), 0.4), sigma * 0):
        with pytest.raises(UserError, match="give a film's beginning"):
            Forecast(network, PATH)(z, bad, nothing)


@pytest.mark.parametrize("conditioning", CONDITIONINGS[1:])
def test_a_forecast_learns_what_follows_and_looks_at_what_is_known(conditioning: str, batch: dict[str, Any]) -> None:
    model, objective = TextToVideo(text(), Forecast(vdt(conditioning), PATH)), ForecastObjective(known=2)
    loss = objective(model, batch, rng())["loss"]
    loss.backward()
    assert all(p.grad is not None for name, p in model.denoiser.named_parameters() if "labels" not in name)
    other = batch["latent"].clone()
    other[:, :, :2] += 1
    assert not torch.equal(objective(model, {**batch, "latent": other}, rng())["loss"], loss)


def codec() -> Any:
    torch.manual_seed(0)
    return build_codec(
        "causal_conv", {"channels": CHANNELS, "fine_width": 16, "coarse_width": 16, "decoder_blocks": [1, 1, 1]}
    ).eval()


def test_the_engine_gives_a_forecast_its_beginning_and_hides_the_rest() -> None:
    chain = Chain(PATH, "eps", spacing="trailing")
    engine = Engine(codec(), Forecast(vdt(), PATH).eval(), text().eval(), "eps", (1, 2, 2), path=PATH, levels=chain.levels)
    clean, mask = torch.randn(1, CHANNELS, 5, 4, 4, generator=rng(2)), torch.ones(1, 5, 4, 4)
    mask[:, :2] = 0
    request, sampling = [Request("anything", 3)], Sampling(steps=4, guidance=1.0, solver="ddim")
    out = engine.denoise(request, (CHANNELS, 5, 4, 4), sampling, given=Given(clean, mask))
    assert torch.equal(out[:, :, :2], clean[:, :, :2])
    other = clean.clone()
    other[:, :, 2:] = 9
    assert torch.equal(engine.denoise(request, (CHANNELS, 5, 4, 4), sampling, given=Given(other, mask)), out)
    other[:, :, :2] += 1
    moved = engine.denoise(request, (CHANNELS, 5, 4, 4), sampling, given=Given(other, mask))
    assert (moved - out)[:, :, 2:].abs().max() > 1e-3


# Any cells known


def test_completing_is_its_network_on_what_the_levels_say_is_known() -> None:
    """Given clean cells and the mask as the paper has it, 1 where known."""
    network, z = vdt("mask"), torch.randn(2, CHANNELS, 5, 4, 4, generator=rng(1))
    nothing = Condition(torch.zeros(2, 1, WIDTH), torch.ones(2, 1, dtype=torch.bool))
    known = torch.rand(2, 5, 4, 4, generator=rng(2)) < 0.4
    frames = torch.tensor([[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]]).bool()
    wide = frames[:, :, None, None].expand(-1, -1, 4, 4)
    for mask, sigma in (
        (known, 0.4 * (~known).float()),
        (wide, 0.4 * (~frames).float()),
        (0 * known > 0, torch.full((2,), 0.4)),
    ):
        with torch.no_grad():
            out = Completing(network, PATH)(z, sigma, nothing)
            noisy = torch.where(mask[:, None], 9.0, z)  # what stands there is not looked at
            expected = network(noisy, torch.full((2,), 399.0), clean=z, mask=mask.float())[:, :CHANNELS]
        torch.testing.assert_close(out, torch.where(mask[:, None], 0.0, expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="give a mask of 0 and 1 alone"):
        Completing(network, PATH)(z, torch.where(known, 0.2, 0.4), nothing)


def test_a_masked_film_learns_from_unknown_cells_alone(batch: dict[str, Any]) -> None:
    network, seen = vdt("mask"), []
    network.register_forward_pre_hook(lambda _, args, more: seen.append((args, more)), with_kwargs=True)
    model, objective = TextToVideo(text(), Completing(network, PATH)), MaskedFilmObjective(masks={"predict": 1, "blocks": 1})
    losses = objective(model, batch, rng())
    losses["loss"].backward()
    assert all(p.grad is not None for p in network.parameters())
    (z, _), told = seen[0]
    known, x = told["mask"][:, None].bool().expand_as(z), batch["latent"].float()
    assert 0 < known.float().mean() < 1
    assert torch.equal(told["clean"][known], x[known])
    torch.testing.assert_close(
        losses["loss"],
        hybrid_loss(lambda z, t: network(torch.where(known, x, z), t), x, _after_masks(), PATH, mask=~known[:, :1])["loss"],
    )

    def astray(_: Any, args: Any, more: Any, out: Tensor) -> Tensor:
        return torch.where(more["mask"][:, None].bool(), 7.0, out)

    network.register_forward_hook(astray, with_kwargs=True)
    torch.testing.assert_close(objective(model, batch, rng())["loss"], losses["loss"])


def _after_masks() -> torch.Generator:
    """Where the objective's generator stands when the masks are drawn."""
    generator = rng()
    torch.randint(2**31 - 1, (), generator=generator)
    return generator


def test_every_film_of_a_batch_has_a_mask_of_its_own() -> None:
    network, seen = vdt("mask"), []
    network.register_forward_pre_hook(lambda _, args, more: seen.append(more["mask"]), with_kwargs=True)
    model = TextToVideo(text(), Completing(network, PATH))
    many = {"latent": torch.randn(120, CHANNELS, 8, 4, 4, generator=rng(7)), "caption": ["a ball"] * 120}
    with torch.no_grad():
        MaskedFilmObjective()(model, many, rng())
    shapes = [mask.flatten(1).mean(1) for mask in seen[0]]
    frames = [tuple(shape.gt(0.99).int().tolist()) for shape in shapes]
    assert {(1, 1, 1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1, 1, 1), (1, 0, 0, 0, 1, 0, 0, 0), (0,) * 8} <= set(frames)
    assert sum(frame == (0,) * 8 and bool(shape.gt(0).any()) for frame, shape in zip(frames, shapes, strict=True)) > 0
    assert MaskedFilmObjective().masks == RELEASED
    with pytest.raises(UserError, match="no mask 'middle'"):
        MaskedFilmObjective(masks={"middle": 1.0})


@pytest.mark.parametrize("kind", ["frames", "cells", "nothing"])
def test_the_engine_gives_any_cells_and_hides_the_rest(kind: str) -> None:
    chain = Chain(PATH, "eps", spacing="trailing")
    engine = Engine(
        codec(), Completing(vdt("mask"), PATH).eval(), text().eval(), "eps", (1, 2, 2), path=PATH, levels=chain.levels
    )
    clean, mask = torch.randn(1, CHANNELS, 5, 4, 4, generator=rng(2)), torch.ones(1, 5, 4, 4)
    if kind == "frames":
        mask[:, [0, 4]] = 0
    elif kind == "cells":
        mask[:, 1:, :, :3] = 0
    request, sampling = [Request("anything", 3)], Sampling(steps=4, guidance=1.0, solver="ddim")

    def made(clean: Tensor) -> Tensor:
        return engine.denoise(request, (CHANNELS, 5, 4, 4), sampling, given=Given(clean, mask))

    out, known = made(clean), (mask == 0)[:, None].expand_as(clean)
    assert torch.equal(out[known], clean[known])
    assert torch.equal(made(torch.where(known, clean, 9.0)), out)
    if kind == "nothing":
        assert torch.equal(engine.denoise(request, (CHANNELS, 5, 4, 4), sampling), out)
    else:
        assert (made(clean + 1) - out)[~known].abs().max() > 1e-3


# Films that recall


class Watching(Recalling):
    """Keeps the noise levels and estimates that it is given."""

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition, estimate: Tensor | None = None) -> Tensor:
        v = super().forward(z, sigma, condition, estimate)
        self.seen.append((z, sigma, estimate, v))
        return v

    seen: list[tuple[Tensor, Tensor, Tensor | None, Tensor]]


def test_each_step_of_a_run_is_told_the_estimate_of_the_one_before_and_the_first_none() -> None:
    path = zero_terminal_snr(PATH)
    denoiser = Watching(walt(), path, True).eval()
    denoiser.seen = []
    chain = Chain(path, "v", spacing="trailing")
    engine = Engine(codec(), denoiser, text().eval(), "v", (1, 2, 2), path=path, levels=chain.levels)
    sampling = Sampling(steps=3, guidance=2.0, solver="ddim")
    films, _ = engine.sample([Request(prompt, 0) for prompt in CAPTIONS[:3]], (32, 32), 5, sampling, batch=2)
    assert films.shape == (3, 3, 5, 32, 32)
    assert len(denoiser.seen) == 6, "two runs of three steps"
    for place, (z, sigma, estimate, _) in enumerate(denoiser.seen):
        assert len(z) == (4 if place < 3 else 2), "with words and without"
        if place % 3 == 0:
            assert estimate is None
            assert float(sigma[0]) == 1, "the step of pure noise is visited"
            continue
        before, level, _, v = denoiser.seen[place - 1]
        torch.testing.assert_close(estimate, convert(v, before, level, "v", "x", path), atol=1e-5, rtol=1e-5)
    # Recalling changes what is made; a network that does not recall is never told.
    forgetful = Watching(denoiser.network, path, False).eval()
    forgetful.seen = []
    plain = Engine(codec(), forgetful, text().eval(), "v", (1, 2, 2), path=path, levels=chain.levels)
    other, _ = plain.sample([Request(CAPTIONS[0], 0)], (32, 32), 5, sampling)
    assert all(estimate is None for _, _, estimate, _ in forgetful.seen)
    assert (other - films[:1]).abs().max() > 1e-4


def test_the_estimate_does_not_take_the_gradient_away_under_autocast(batch: dict[str, Any]) -> None:
    """A forward without gradients comes first; weights cast for it must not serve the one that learns."""

    def gradients(enabled: bool) -> Tensor:
        torch.manual_seed(0)
        model = TextToVideo(text(), Recalling(walt(), zero_terminal_snr(PATH), True))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = FilmObjective(self_conditioning=1.0)(model, batch, rng())["loss"]
        loss.backward()
        return torch.stack([p.grad.norm() for p in model.denoiser.parameters() if p.grad is not None])

    exact, cast = gradients(False), gradients(True)
    assert len(exact) == len(cast)
    assert ((cast > 0) == (exact > 0)).all()
    assert (cast[exact > 1e-3] / exact[exact > 1e-3] - 1).abs().max() < 0.3


@pytest.mark.parametrize(("recalls", "forwards"), [(True, 2), (False, 1)])
def test_films_learn_with_an_estimate_where_they_recall(recalls: bool, forwards: int, batch: dict[str, Any]) -> None:
    network, calls = walt(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    model = TextToVideo(text(), Recalling(network, zero_terminal_snr(PATH), recalls))
    FilmObjective(self_conditioning=1.0)(model, batch, rng())["loss"].backward()
    assert len(calls) == forwards
    assert all(p.grad is not None for p in network.parameters())


# Films that go on


def beside(frames: int, side: int = 4) -> Given:
    """Two films whose first frames are known."""
    mask = torch.ones(2, 5, side, side)
    mask[:, :frames] = 0
    return Given(torch.randn(2, CHANNELS, 5, side, side, generator=rng(4)), mask)


def continuing(guidance: float = 1.0) -> Continuing:
    torch.manual_seed(0)  # the same weights each time
    return Continuing(walt(predict=True), zero_terminal_snr(PATH), True, guidance).eval()


def continued(denoiser: Continuing, given: Given | None, guidance: float = 1.0) -> Tensor:
    """Two films of the same two seeds, in three steps."""
    chain = Chain(denoiser.path, "v", spacing="trailing")
    engine = Engine(codec(), denoiser, text().eval(), "v", (1, 2, 2), path=denoiser.path, levels=chain.levels)
    sampling = Sampling(steps=3, guidance=guidance, solver="ddim")
    requests = [Request(prompt, seed) for seed, prompt in enumerate(CAPTIONS[:2])]
    return engine.denoise(requests, (CHANNELS, 5, 4, 4), sampling, given=given)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_films_is_told_its_first_frames(share: float) -> None:
    network, seen = walt(predict=True), []
    network.register_forward_pre_hook(lambda _, args, more: seen.append((args, more)), with_kwargs=True)
    model = TextToVideo(text(), Continuing(network, zero_terminal_snr(PATH), True))
    many = {"latent": torch.randn(200, CHANNELS, 5, 4, 4, generator=rng(7)), "caption": ["a ball"] * 200}
    with torch.no_grad():
        FilmObjective(frame_prediction=share, self_conditioning=1.0)(model, many, rng())
    assert len(seen) == 2, "once for the estimate, told the same"
    for (z, _), told in seen:
        if share == 0:
            assert told.get("known") is None
            continue
        counts = told["known"].sum(1)
        assert set(counts.tolist()) <= {0.0, 1.0, 2.0}
        assert bool((told["known"][:, :-1] >= told["known"][:, 1:]).all()), "the first ones"
        assert abs((counts > 0).float().mean() - share) < 0.12
        assert 0.3 < (counts[counts > 0] == 1).float().mean() < 0.7
        assert torch.equal(told["clean"], many["latent"])
        assert (z[:, :, 0] - many["latent"][:, :, 0]).abs().mean() > 0.1, "in the noise they stay"


def test_steps_on_pictures_see_one_frame_and_learn_too(batch: dict[str, Any]) -> None:
    network, frames = walt(predict=True), []
    network.register_forward_pre_hook(lambda _, args: frames.append(args[0].shape[2]))
    model = TextToVideo(text(), Continuing(network, zero_terminal_snr(PATH), True))
    objective = FilmObjective(image_share=0.5, frame_prediction=1.0, self_conditioning=0.0)
    losses = [objective(model, batch, rng(seed))["loss"] for seed in range(24)]
    assert set(frames) == {1, 5}
    assert 6 < frames.count(1) < 18
    losses[frames.index(1)].backward()
    assert network.patch_in.weight.grad is not None
    assert network.patch_in.weight.grad.abs().max() > 0
    later = {**batch, "latent": torch.cat([batch["latent"][:, :, :1], 0 * batch["latent"][:, :, 1:]], 2)}
    seed = frames.index(1)
    assert torch.equal(objective(model, later, rng(seed))["loss"], losses[seed]), "the first one"


def test_without_these_shares_films_are_trained_as_before(batch: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="image_share is a share"):
        FilmObjective(image_share=1.5)
    path = zero_terminal_snr(PATH)
    model = TextToVideo(text(), Recalling(walt(), path, True))
    generator = rng()
    torch.rand(4, generator=generator)  # which captions are dropped
    condition = model.text.encode(CAPTIONS)
    network = model.denoiser.network  # type: ignore[union-attr]
    same = v_loss(lambda z, t, e: network(z, t, text=condition, estimate=e), batch["latent"], generator, path, 0.9)  # type: ignore[operator]
    assert torch.equal(FilmObjective(text_drop=0.0)(model, batch, rng())["loss"], same["loss"])


def test_known_frames_stand_beside_the_noise_and_come_out_as_they_went_in() -> None:
    denoiser, seen, given = continuing(), [], beside(2)
    denoiser.network.register_forward_pre_hook(lambda _, args, more: seen.append((args, more)), with_kwargs=True)
    out = continued(denoiser, given, guidance=2.0)
    assert torch.equal(out[:, :, :2], given.clean[:, :, :2])
    assert len(seen) == 3
    for (z, t), told in seen:
        assert t.shape == (4,), "one step for each film, with words and without"
        assert len(t.unique()) == 1
        assert told["known"].tolist() == [[1, 1, 0, 0, 0]] * 4
        assert torch.equal(told["clean"], given.clean.repeat(2, 1, 1, 1, 1))
        assert not torch.equal(z[:2, :, :2], given.clean[:, :, :2])
    assert float(seen[0][0][1][0]) == 999, "from pure noise"
    hidden = Given(torch.where((given.mask == 0)[:, None], given.clean, 5.0), given.mask)
    assert torch.equal(continued(continuing(), hidden, guidance=2.0), out)
    moved = continued(continuing(), Given(given.clean + 1, given.mask), guidance=2.0)
    assert (moved - out)[:, :, 2:].abs().max() > 1e-4
    part = given.mask.clone()
    part[:, 2, :2] = 0
    with pytest.raises(UserError, match="whole frames"):
        continued(continuing(), Given(given.clean, part))


def test_nothing_known_is_a_film_from_words() -> None:
    assert torch.equal(continued(continuing(1.5), beside(0), 2.0), continued(continuing(), None, 2.0))
    engine = Engine(codec(), continuing(), text().eval(), "v", (1, 2, 2), path=zero_terminal_snr(PATH))
    with pytest.raises(UserError, match="cannot make a loop"):
        engine.denoise([Request("a", 0)] * 2, (CHANNELS, 5, 4, 4), Sampling(steps=2, solver="ddim"), given=beside(2), loop=True)


def test_guidance_over_frames_goes_away_from_what_is_made_without_them() -> None:
    given, z = beside(2), torch.randn(2, CHANNELS, 5, 4, 4, generator=rng(5))
    condition, sigma = text().encode(CAPTIONS[:2]), torch.full((2,), 0.5)
    answers = {}
    for scale in (0.0, 1.0, 3.0):
        denoiser, calls = continuing(scale), []
        denoiser.network.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        network = denoiser.begin()
        with torch.no_grad():
            first = network(z, sigma, condition, given=given)
            answers[scale] = (first, network(z - 0.1, sigma - 0.1, condition, given=given))
        assert len(calls) == (2 if scale == 1 else 4)
    for step in range(2):  # each answer recalls its own estimate
        plain, told, far = (answers[scale][step] for scale in (0.0, 1.0, 3.0))
        assert (told - plain).abs().max() > 1e-4
        torch.testing.assert_close(far, plain + 3 * (told - plain), atol=1e-5, rtol=1e-5)


def test_a_film_goes_on_window_after_window_through_the_roll() -> None:
    denoiser, seen = continuing(1.5), []
    path = denoiser.path
    chain = Chain(path, "v", spacing="trailing")
    engine = Engine(codec(), denoiser, text().eval(), "v", (1, 2, 2), path=path, levels=chain.levels)
    sampling, T = Sampling(steps=2, guidance=2.0, solver="ddim"), 5 + 3 * 3
    windows = plan((False,) * T, [Span(0, T)], 5, 2)
    assert [window.frames for window in windows] == [tuple(range(begin, begin + 5)) for begin in (0, 3, 6, 9)]
    denoiser.network.register_forward_pre_hook(lambda _, args, more: seen.append(more), with_kwargs=True)
    film = roll(engine, [CAPTIONS[0]], 7, Timeline(torch.zeros(1, CHANNELS, T, 4, 4), (False,) * T), windows, sampling)
    assert film.shape == (1, CHANNELS, T, 4, 4)
    assert torch.equal(film[:, :, :5], engine.denoise([Request(CAPTIONS[0], 7)], (CHANNELS, 5, 4, 4), sampling))
    asked = [more for more in seen if more.get("known") is not None]
    assert len(asked) == 3 * 2
    for number, told in enumerate(asked):
        begin = 3 + 3 * (number // 2)
        assert told["known"].tolist() == [[1, 1, 0, 0, 0]] * 2
        assert torch.equal(told["clean"][0, :, :2], film[0, :, begin : begin + 2])


def test_the_one_loop_trains_them(tmp_path: Any) -> None:
    plain = torch.tensor([2.0, -1.0, 0.5, -2.0]).view(1, CHANNELS, 1, 1, 1).expand(4, -1, 5, 4, 4)
    batch = {"latent": plain, "caption": CAPTIONS}

    class Same:
        """A source that always draws films of one colour."""

        def draw(self, count: int) -> dict[str, Any]:
            return batch

        def state(self) -> dict[str, Any]:
            return {}

        def restore(self, state: object) -> None:
            pass

    config = TrainConfig(
        steps=40,
        batch=4,
        warmup=0,
        optimizer=OptimizerConfig(learning_rate=1e-2, learning_rate_adamw=1e-2),
        precision="fp32",
        progress=False,
        device="cpu",
        log_every=1,
    )
    model = TextToVideo(text(), Recalling(walt(), zero_terminal_snr(PATH), True))
    objective = FilmObjective(text_drop=0.0)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(objective(model, batch, rng(seed))["loss"]) for seed in range(8)) / 8

    before = loss()
    train(model, objective, Same(), config, tmp_path)
    assert loss() < 0.6 * before
