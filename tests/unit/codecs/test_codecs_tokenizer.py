"""Codecs whose latents are words: signs and nearest codes against plain arithmetic, causality, and what training is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tubelet.codecs.tokenizer import LookupFree, Nearest, TokenizerConfig, VideoTokenizer, usage
from tubelet.core.config import from_dict
from tubelet.core.errors import UserError

CODECS = ("causal_conv", "transformer")
WAYS: list[dict[str, Any]] = [{"quantizer": way, "codec": codec} for way in ("lfq", "vq") for codec in CODECS]


def tokenizer(bits: int = 5, **settings: Any) -> VideoTokenizer:
    """As after some training: later frames are heard of."""
    torch.manual_seed(0)
    made = VideoTokenizer(TokenizerConfig(bits, **settings))
    for p in made.parameters():
        if p.eq(0).all():
            torch.nn.init.normal_(p, std=0.05)
    return made.eval()


def pixels(frames: int = 9, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("settings", WAYS)
@torch.no_grad()
def test_words_are_causal_and_come_back_as_pixels(settings: dict[str, Any]) -> None:
    made, x = tokenizer(**settings), pixels()
    words = made.tokens(x)
    assert words.shape == (2, 3, 2, 3)
    assert (words >= 0).all()
    assert (words < made.words).all()
    assert len(words.unique()) > 4
    assert torch.equal(made.tokens(x[:, :, :1]), words[:, :1]), "an image is a film's first frame"
    other = x.clone()
    other[:, :, 5:] = 0.9
    assert torch.equal(made.tokens(other)[:, :2], words[:, :2])
    restored = made.from_tokens(words)
    assert restored.shape == x.shape
    torch.testing.assert_close(restored, made(x))
    torch.testing.assert_close(torch.cat(list(made.encode_stream(x.split([1, 4, 4], 2))), 2), made.encode(x))
    changed = words.clone()
    changed[:, 2] = (changed[:, 2] + 1) % made.words
    assert torch.equal(made.from_tokens(changed)[:, :, :5], restored[:, :, :5])
    assert (made.from_tokens(changed)[:, :, 5:] - restored[:, :, 5:]).abs().max() > 1e-4


@torch.no_grad()
def test_a_frame_is_normalised_alone() -> None:
    z = tokenizer().before_words(pixels())  # (B, T', h, w, bits)
    torch.testing.assert_close(z.mean((2, 3, 4)), torch.zeros(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.var((2, 3, 4), correction=0), torch.ones(2, 3), atol=1e-2, rtol=0)


def test_signs_are_the_decoders_input_and_the_word() -> None:
    z = torch.tensor([[0.3, -2.0, 0.1], [-0.5, 0.0, 4.0]])
    quantizer = LookupFree(3)
    ids = quantizer.ids(z)
    assert ids.tolist() == [0b101, 0b100]
    assert quantizer.codes(ids).tolist() == [[1, -1, 1], [-1, -1, 1]]
    assert set(quantizer.penalties(z, ids)) == {"entropy", "commitment"}


def test_the_entropy_has_a_slope_where_latents_are_normalised() -> None:
    z = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = LookupFree(6)
    quantizer.penalties(z, quantizer.ids(z))["entropy"].backward()
    assert z.grad is not None
    assert (z.grad.abs() > 1e-6).float().mean() > 0.9


def test_the_nearest_code_is_the_nearest() -> None:
    torch.manual_seed(0)
    quantizer, z = Nearest(6), torch.randn(3, 50, 6)
    near = (z[..., None, :] - quantizer.table).square().sum(-1).argmin(-1)
    assert torch.equal(quantizer.ids(z), near)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.ids(z), near)
    assert torch.equal(quantizer.codes(near), quantizer.table[near])


def test_codes_learn_from_latents_and_latents_from_codes() -> None:
    torch.manual_seed(0)
    quantizer, z = Nearest(4), torch.randn(20, 4, requires_grad=True)
    ids = quantizer.ids(z)
    terms = quantizer.penalties(z, ids)
    distance = (z - quantizer.table[ids]).square().mean()
    torch.testing.assert_close(terms["codebook"], distance)
    torch.testing.assert_close(terms["commitment"], distance)
    (of_table,) = torch.autograd.grad(terms["codebook"], quantizer.table, retain_graph=True)
    assert torch.equal(of_table.abs().sum(-1) > 0, torch.bincount(ids, minlength=16) > 0), "codes in use, no other"
    (of_z,) = torch.autograd.grad(terms["commitment"], z)
    torch.testing.assert_close(of_z, 2 * (z - quantizer.table[ids]).detach() / z.numel())


def test_the_entropy_of_a_table_is_that_of_its_softmax_and_moves_every_code() -> None:
    torch.manual_seed(0)
    quantizer, z = Nearest(3), torch.randn(40, 3)
    p = (-(z[:, None] - quantizer.table).square().sum(-1)).softmax(-1)  # (40, 8)
    expected = torch.special.entr(p).sum(-1).mean() - torch.special.entr(p.mean(0)).sum()
    found = quantizer.penalties(z, quantizer.ids(z))["entropy"]
    torch.testing.assert_close(found, expected)
    far = Nearest(3)
    with torch.no_grad():
        far.table[7] = 4.5
    assert 7 not in far.ids(z)
    far.penalties(z, far.ids(z))["entropy"].backward()
    assert far.table.grad is not None
    assert (far.table.grad.abs().sum(-1) > 0).all()
    many = torch.randn(1000, 3)
    torch.testing.assert_close(quantizer._entropy(many), quantizer._entropy(many[::4]))


def test_both_ways_measure_entropy_alike() -> None:
    """A table of all signs is lookup-free."""
    signs, table = LookupFree(4), Nearest(4)
    table.table.data = signs.codes(torch.arange(16))
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(signs.ids(z), table.ids(z))
    for name, value in signs.penalties(z, signs.ids(z)).items():
        torch.testing.assert_close(table.penalties(z, table.ids(z))[name], value)


@pytest.mark.parametrize("way", ["lfq", "vq"])
def test_the_gradient_passes_and_the_decoder_sees_codes_alone(way: Any) -> None:
    made = tokenizer(quantizer=way)
    z = torch.randn(2, 1, 2, 3, 5, requires_grad=True)
    read, ids = made.quantize(z)
    assert torch.equal(read.movedim(1, -1), made.quantizer.codes(ids)), "exactly"
    weight = torch.randn_like(read)
    (grad,) = torch.autograd.grad((read * weight).sum(), z)
    assert torch.equal(grad.movedim(-1, 1), weight)


def test_use_of_a_vocabulary() -> None:
    assert usage(torch.arange(8).view(2, 4), 8) == pytest.approx({"used": 1.0, "perplexity": 8.0})
    assert usage(torch.full((3, 3), 5), 8) == pytest.approx({"used": 1 / 8, "perplexity": 1.0})
    some = usage(torch.tensor([0, 0, 0, 3]), 4)
    assert some["used"] == 0.5
    assert some["perplexity"] == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "1 to 24 bits"),
        ({"bits": 25}, "1 to 24 bits"),
        ({"quantizer": "fsq"}, "one of"),
        ({"codec": "kl"}, "one of"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(TokenizerConfig, settings)


@pytest.mark.parametrize("way", ["lfq", "vq"])
def test_what_does_not_fit_is_named(way: Any) -> None:
    made = tokenizer(quantizer=way)
    for wrong in (-1, 32):
        with pytest.raises(UserError, match="check their source"):
            made.from_tokens(torch.full((1, 1, 2, 2), wrong))
    with pytest.raises(UserError, match="frames must be 1"):
        made.tokens(pixels(frames=3))
    with pytest.raises(UserError, match="quantizer"):
        TokenizerConfig(quantizer="fsq")  # type: ignore[arg-type]
