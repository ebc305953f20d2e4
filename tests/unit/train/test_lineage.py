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
from tubelet.diffusion.hybrid import hybrid_loss
from tubelet.diffusion.objectives import convert
from tubelet.diffusion.paths import VPLinear, zero_terminal_snr
from tubelet.generate.engine import Engine, Request, Sampling
from tubelet.generate.layouts import Chain
from tubelet.generate.published import OnePicture
from tubelet.models.dit import DiT, DiTConfig
from tubelet.models.unet import UNet, UNetConfig
from tubelet.models.vdt import CONDITIONINGS, VDT, VDTConfig
from tubelet.models.walt import WALT, WALTConfig
from tubelet.tasks.given import Given
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.lineage import FilmObjective, Forecast, ForecastObjective, FrozenText, PictureObjective, Recalling
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


def walt() -> WALT:
    config = WALTConfig(
        32, 2, 2, CHANNELS, patch=2, grid=(5, 2, 2), frame=(2, 2), window=(5, 1, 1), text_width=WIDTH
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
