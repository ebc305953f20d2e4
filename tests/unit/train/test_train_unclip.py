"""unCLIP's parts: conditions that hold an embedding, a decoder and two priors that learn by them, and what is drawn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.types import Condition
from tubelet.decoding.autoregressive import Sampling as Drawing
from tubelet.diffusion.hybrid import hybrid_loss
from tubelet.diffusion.paths import Cosine, VPLinear
from tubelet.generate.engine import Sampling
from tubelet.models.glide import ADM, ADMConfig, DecoderCondition, DecoderConfig
from tubelet.models.unclip import (
    SCALE,
    AutoregressiveConfig,
    AutoregressivePrior,
    DiffusionPrior,
    PriorConfig,
    high_dots,
)
from tubelet.models.unet import UNet, UNetConfig
from tubelet.text.bpe import Tokenizer
from tubelet.text.own import OwnTextConfig, OwnTextEncoder
from tubelet.train.lineage import FrozenText
from tubelet.train.text_to_video import TextToVideo
from tubelet.train.unclip import (
    CodesObjective,
    Decoder,
    DecoderObjective,
    Prepared,
    PriorObjective,
    Upsampler,
    UpsamplerObjective,
    draw,
    draw_codes,
    heard,
    ids_and_mask,
    told,
    wordless,
)

E, W, CHANNELS, PATH = 12, 16, 4, VPLinear()
CAPTIONS = ["a red ball falls", "a blue box slides", "a ring", "a small green triangle bounces twice"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, E, generator=rng(seed)), dim=-1)


def filled(module: nn.Module) -> Any:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    for p in module.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.05)
    return module


@pytest.fixture(scope="module")
def text() -> FrozenText:
    torch.manual_seed(1)
    return FrozenText(OwnTextEncoder(OwnTextConfig(vocab_size=300, width=W, depth=1, heads=2)))


def decoder() -> Decoder:
    config = UNetConfig(
        width=8, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, context=W, channels=CHANNELS, learn_sigma=True,
        dropout=0.0, groups=4, size=4,
    )  # fmt: skip
    return filled(Decoder(UNet(config), DecoderCondition(DecoderConfig(E, 32, W, 2)), PATH))


# Embeddings among words


@pytest.mark.parametrize("width", [E - 4, E, E + 4])
def test_what_is_told_is_heard(width: int) -> None:
    image = unit(2)
    words = Condition(torch.randn(2, 3, width), torch.tensor([[True, True, True], [True, False, False]]))
    condition = told(image, words)
    assert condition.states.shape == (2, 4, max(E, width))
    embedding, states = heard(condition, E, width)
    assert torch.equal(embedding, image)
    assert torch.equal(states.states, words.states)
    assert torch.equal(states.mask, words.mask)
    assert condition.mask.sum(1).tolist() == [4, 2]
    assert told(image, wordless(words)).mask.sum(1).tolist() == [1, 1]


def test_prepared_conditions_go_by_their_numbers_and_nothing_is_an_embedding_of_zeros() -> None:
    condition = told(unit(3), Condition(torch.randn(3, 2, W), torch.ones(3, 2, dtype=torch.bool)))
    prepared = Prepared(condition)
    given = prepared.encode(["2", "0", ""])
    assert torch.equal(given.states[:2], condition.states[[2, 0]])
    assert given.mask.sum(1).tolist() == [3, 3, 1]
    assert given.mask[2, 0]
    assert not given.states[2].any()
    assert torch.equal(prepared.null(2).states, given.states[2:].expand(2, -1, -1))
    with pytest.raises(IndexError):
        prepared.encode(["4"])


# The decoder


@torch.no_grad()
def test_the_decoder_is_its_u_net_with_the_embedding_in_step_and_words(text: FrozenText) -> None:
    model, words, image = decoder(), text.encode(CAPTIONS), unit(4)
    z = torch.randn(4, CHANNELS, 1, 4, 4, generator=rng(1))
    out = model(z, torch.full((4,), 0.5), told(image, words))
    assert out.shape == z.shape
    given = model.condition(image, torch.zeros(4, 32), words.states, words.mask)
    bias = model.unet.step_out.bias.clone()
    for i in range(4):  # the embedding's share of a step as a bias of its own
        model.unet.step_out.bias.copy_(bias + given.time[i])
        context = Condition(given.context[i : i + 1], given.mask[i : i + 1])
        one = model.unet(z[i : i + 1, :, 0], torch.tensor([499.0]), context)
        torch.testing.assert_close(out[i : i + 1, :, 0], one[:, :CHANNELS], atol=1e-5, rtol=1e-4)
    model.unet.step_out.bias.copy_(bias)
    assert torch.equal(out, model(z, torch.full((4,), 0.5), told(image, words))), "a call leaves nothing behind"
    for other in (told(-image, words), told(image, wordless(words)), told(image, text.encode(CAPTIONS[::-1]))):
        assert not torch.allclose(out, model(z, torch.full((4,), 0.5), other), atol=1e-4)


def test_the_decoder_learns_noise_and_variance_and_every_part_of_it_learns(text: FrozenText) -> None:
    model = TextToVideo(text, decoder())
    batch = {"latent": torch.randn(4, CHANNELS, 1, 4, 4).to(torch.bfloat16), "image": unit(4), "caption": CAPTIONS}
    losses = DecoderObjective(image_drop=0.0, text_drop=0.0)(model, batch, rng())
    generator = rng()
    torch.rand(4, generator=generator)  # as `read_words`, then which images and which captions are dropped
    torch.rand(4, generator=generator), torch.rand(4, generator=generator)
    condition = told(batch["image"], text.encode(CAPTIONS))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model.denoiser.picture(x, t, *heard(condition, E, W))  # type: ignore[operator]

    same = hybrid_loss(network, batch["latent"][:, :, 0], generator, PATH)
    for name in ("loss", "simple", "vlb"):
        torch.testing.assert_close(losses[name], same[name])
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.denoiser.parameters())
    assert all(p.grad is None for p in text.parameters())
    blind = [DecoderObjective(image_drop=1.0, text_drop=1.0)(model, {**batch, "image": unit(4, s)}, rng()) for s in (2, 3)]
    assert torch.equal(blind[0]["loss"], blind[1]["loss"])
    deaf = [
        DecoderObjective(image_drop=0.0, text_drop=1.0)(model, {**batch, "caption": said}, rng())["loss"]
        for said in (CAPTIONS, [CAPTIONS[0]] * 4)
    ]
    torch.testing.assert_close(*deaf)


# The diffusion prior


def prior() -> DiffusionPrior:
    return filled(DiffusionPrior(PriorConfig(32, 1, 2, E, W, 64)))


def test_a_prior_s_loss_is_that_of_scaled_embeddings(text: FrozenText) -> None:
    model = prior()
    batch = {"image": unit(4), "text": unit(4, 1), "caption": CAPTIONS}
    losses = PriorObjective(text=text)(model, batch, rng())
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model.out.weight.zero_()
        model.out.bias.zero_()
    nothing = PriorObjective(text=text)(model, batch, rng())["loss"]
    assert nothing.item() == pytest.approx(SCALE**2 / E, rel=1e-4), "the square of an embedding, over its components"
    other = prior()
    dropped = [PriorObjective(text=text, text_drop=1.0)(other, {**batch, "text": unit(4, s)}, rng()) for s in (5, 6)]
    assert torch.equal(dropped[0]["loss"], dropped[1]["loss"])


class Knows(DiffusionPrior):
    """A prior that has learned where every caption's picture is: at its text embedding, times `SCALE`."""

    def forward(self, z: Tensor, t: Tensor, text: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        assert ((t >= 0) & (t < 1000)).all()
        return SCALE * text


def rngs(seed: int = 0) -> list[torch.Generator]:
    return [rng(10 * seed + row) for row in range(4)]


def test_what_is_drawn_is_what_the_prior_knows(text: FrozenText) -> None:
    knows, embeddings, words = Knows(PriorConfig(32, 1, 2, E, W, 64)), unit(4), text.encode(CAPTIONS)
    for guidance in (1.0, 2.0):
        drawn = draw(knows, embeddings, words, Sampling(steps=8, guidance=guidance, solver="ddim"), rngs())
        torch.testing.assert_close(drawn, embeddings, atol=1e-5, rtol=1e-4)
    sampling = Sampling(steps=3, guidance=1.0, solver="ddim")
    model = prior()
    one, same, other = (draw(model, embeddings, words, sampling, rngs(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(4))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-3)
    for row in range(4):
        alone = draw(model, embeddings[row : row + 1], text.encode(CAPTIONS[row : row + 1]), sampling, rngs()[row : row + 1])
        torch.testing.assert_close(alone, one[row : row + 1], atol=1e-6, rtol=1e-5)


# The autoregressive prior


def test_codes_are_learned_from_captions_as_clip_reads_them() -> None:
    tokenizer = Tokenizer()
    ids, mask = ids_and_mask(tokenizer, ["ab", ""], 24)  # start, a space and two letters, end
    assert mask.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert ids[0, -1] == ids[1, 1] == tokenizer.size
    torch.manual_seed(0)
    sizes = AutoregressiveConfig(32, 1, 2, 16, 1, 2, E, tokenizer.size + 1, 24, components=3, buckets=8, dots=4)
    model = AutoregressivePrior(sizes)
    batch = {
        "codes": torch.randint(8, (4, 3), generator=rng()),
        "dot": torch.tensor([0, 1, 2, 3]),
        "text": unit(4),
        "caption": CAPTIONS,
    }
    losses = CodesObjective(tokenizer=tokenizer)(model, batch, rng())
    losses["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model.out.weight.zero_()
        model.out.bias.zero_()
    assert CodesObjective(tokenizer=tokenizer)(model, batch, rng())["loss"].item() == pytest.approx(2.0794, abs=1e-3)


def autoregressive() -> tuple[AutoregressivePrior, tuple[Tensor, Tensor, Tensor]]:
    """A prior of five codes, far from its small initial weights, and three captions as it reads them."""
    torch.manual_seed(0)
    model = AutoregressivePrior(AutoregressiveConfig(32, 2, 2, 16, 1, 2, E, 50, 6, components=5, buckets=8, dots=4)).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.2)
    ids, lengths = torch.randint(50, (3, 6), generator=rng(1)), torch.tensor([6, 3, 4])
    return model, (ids, torch.arange(6) < lengths[:, None], unit(3, 2))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_codes_are_drawn_as_the_whole_row_says_and_each_row_from_its_own_numbers(guidance: float) -> None:
    model, (ids, mask, text) = autoregressive()
    codes = draw_codes(model, ids, mask, text, [rng(s) for s in (7, 8, 9)], guidance=guidance)
    assert codes.shape == (3, 5)
    generators = [rng(s) for s in (7, 8, 9)]
    dot = torch.cat([high_dots(1, 4, g) for g in generators])
    slow = torch.zeros(3, 5, dtype=torch.long)
    for k in range(5):
        logits = model(ids, mask, text, dot, slow)[:, k]
        null = model(ids, torch.zeros_like(mask), torch.zeros_like(text), dot, slow)[:, k]
        slow[:, k] = Drawing().draw(null + guidance * (logits - null), generators)
    assert torch.equal(codes, slow)
    for row, seed in enumerate((7, 8, 9)):
        one = slice(row, row + 1)
        assert torch.equal(draw_codes(model, ids[one], mask[one], text[one], [rng(seed)], guidance=guidance), codes[one])
    others = draw_codes(model, ids, mask, text, [rng(s) for s in (7, 8, 10)], guidance=guidance)
    assert torch.equal(others[:2], codes[:2])
    assert not torch.equal(others[2], codes[2])
    told = draw_codes(model, ids, mask, text, [rng(s) for s in (7, 8, 9)], torch.zeros(3, dtype=torch.long), guidance)
    assert not torch.equal(told, codes), "a level that is given is not drawn"


def test_a_dropped_caption_leaves_codes_nothing_to_read() -> None:
    tokenizer = Tokenizer()
    torch.manual_seed(0)
    sizes = AutoregressiveConfig(32, 1, 2, 16, 1, 2, E, tokenizer.size + 1, 24, components=3, buckets=8, dots=4)
    model = AutoregressivePrior(sizes)
    batch = {"codes": torch.randint(8, (4, 3), generator=rng()), "dot": torch.tensor([0, 1, 2, 3])}

    def loss(drop: float, seed: int, captions: list[str]) -> Tensor:
        objective = CodesObjective(tokenizer=tokenizer, text_drop=drop)
        return objective(model, {**batch, "text": unit(4, seed), "caption": captions}, rng())["loss"]

    assert torch.equal(loss(1.0, 5, CAPTIONS), loss(1.0, 6, CAPTIONS[::-1]))
    assert not torch.equal(loss(0.0, 5, CAPTIONS), loss(0.0, 6, CAPTIONS))
    assert not torch.equal(loss(0.0, 5, CAPTIONS), loss(0.0, 5, CAPTIONS[::-1]))
    loss(1.0, 5, CAPTIONS).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# The upsamplers


def upsampler(corrupt: str = "blur", **changed: Any) -> Upsampler:
    torch.manual_seed(0)
    config = ADMConfig(width=16, multipliers=(1, 2), blocks=1, attention=(), seen=3, groups=8, learn_sigma=False)
    return filled(Upsampler(ADM(replace(config, **changed)), Cosine(), corrupt=corrupt)).eval()  # type: ignore[arg-type]


class SeesThrough(nn.Module):
    """A network that knows the picture, and keeps what it was shown."""

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.picture, self.asked = picture, []

    def forward(self, z: Tensor, t: Tensor, low: Tensor) -> Tensor:
        self.asked.append(low)
        sigma = Cosine().sigma_of_step(t)[0]
        return (z - Cosine().alpha(sigma).float() * self.picture) / Cosine().noise(sigma).float()


def test_an_upsampler_makes_the_picture_that_its_network_sees_in_the_noise() -> None:
    model, g = upsampler(), rng(1)
    film = torch.rand(2, 3, 3, 4, 6, generator=g) * 2 - 1
    large = torch.rand(6, 3, 16, 24, generator=g) * 2 - 1
    model.network = SeesThrough(large)  # type: ignore[assignment]
    made = model.upscale(film, [rng(0), rng(1)], steps=4)
    torch.testing.assert_close(made, large.view(2, 3, 3, 16, 24).transpose(1, 2), atol=1e-4, rtol=1e-4)
    assert len(model.network.asked) == 4
    frames = film.transpose(1, 2).flatten(0, 1)
    assert all(torch.equal(seen, frames) for seen in model.network.asked), "as it is: corruption is for training"


def test_every_film_is_enlarged_by_its_own_noise() -> None:
    model = upsampler()
    film = torch.rand(2, 3, 2, 4, 4, generator=rng(1)) * 2 - 1
    both = model.upscale(film, [rng(3), rng(4)], steps=2)
    assert both.shape == (2, 3, 2, 16, 16)
    assert both.abs().max() <= 1
    torch.testing.assert_close(model.upscale(film[1:], [rng(4)], steps=2), both[1:], atol=1e-5, rtol=0)
    assert (model.upscale(film, [rng(5), rng(4)], steps=2) - both)[0].abs().max() > 1e-3


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("corrupt", ["blur", "bsr"])
def test_an_upsampler_learns_from_crops(corrupt: str, learn_sigma: bool) -> None:
    model = upsampler(corrupt, learn_sigma=learn_sigma)
    g = rng(2)
    batch = {
        "low": torch.randint(0, 256, (2, 1, 32, 32, 3), generator=g, dtype=torch.uint8),
        "high": torch.randint(0, 256, (2, 1, 128, 128, 3), generator=g, dtype=torch.uint8),
    }
    seen: list[tuple[torch.Size, torch.Size]] = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape, inputs[2].shape)))
    losses = UpsamplerObjective()(model, batch, rng(3))
    assert set(losses) == ({"loss", "simple", "vlb"} if learn_sigma else {"loss"})
    assert seen[0] == (torch.Size((2, 3, 32, 32)), torch.Size((2, 3, 8, 8)))
    value = float(losses["loss"].detach())
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        again, other = (float(UpsamplerObjective()(model, batch, rng(seed))["loss"]) for seed in (3, 4))
    assert again == value != other, "all chance is the generator's"
    blurred = model.shown(torch.randn(1, 3, 16, 16, generator=rng(5)), rng(6))
    assert blurred.shape == (1, 3, 16, 16)
    assert blurred.std() < 0.9
