"""The codec of sound: any multiple of the hop, never the future, streamed as whole, and words that lead back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.codecs.soundstream import (
    CausalConv1d,
    Codebook,
    SoundLossConfig,
    SoundObjective,
    SoundStream,
    SoundStreamConfig,
    Upsample1d,
    spectral_distance,
)
from tubelet.core.errors import UserError

TINY = SoundStreamConfig(width=4, strides=(2, 5), dilations=(1, 3), dim=8, levels=3, codes=16)


@pytest.fixture
def codec() -> SoundStream:
    """As after some training: it speaks, and its words are where latents are."""
    torch.manual_seed(0)
    codec = SoundStream(TINY)
    for p in codec.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    codec(noise(8, 20 * TINY.hop))
    return codec.eval()


def noise(batch: int, samples: int) -> Tensor:
    return torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(samples)).clamp(-1, 1)


@pytest.mark.parametrize("frames", [1, 2, 7, 30])
def test_any_multiple_of_the_hop_passes(codec: SoundStream, frames: int) -> None:
    sound = noise(2, frames * TINY.hop)
    codes = codec.tokens(sound)
    assert codes.shape == (2, TINY.levels, frames)
    assert 0 <= int(codes.min()) <= int(codes.max()) < TINY.codes
    assert codec.from_tokens(codes).shape == sound.shape
    torch.testing.assert_close(codec.from_tokens(codes), codec(sound), rtol=1e-4, atol=1e-5)


def test_no_word_and_no_sample_hears_of_what_comes_later(codec: SoundStream) -> None:
    sound = noise(1, 12 * TINY.hop)
    for frame in (1, 5, 11):
        later = sound.clone()
        later[..., frame * TINY.hop :] += 1.0
        a, b = codec.latents(sound), codec.latents(later)
        torch.testing.assert_close(a[..., :frame], b[..., :frame], rtol=0, atol=0)
        assert not torch.equal(a[..., frame], b[..., frame]), "the first sample that differs is heard at once"
        codes = codec.tokens(sound)
        other = codes.clone()
        other[..., frame:] = (other[..., frame:] + 1) % TINY.codes
        a, b = codec.from_tokens(codes), codec.from_tokens(other)
        torch.testing.assert_close(a[..., : frame * TINY.hop], b[..., : frame * TINY.hop], rtol=0, atol=0)
        assert not torch.equal(a[..., frame * TINY.hop :], b[..., frame * TINY.hop :])


def test_streamed_is_whole(codec: SoundStream) -> None:
    sound = noise(2, 12 * TINY.hop)
    chunks = sound.split([TINY.hop, 5 * TINY.hop, 2 * TINY.hop, 4 * TINY.hop], dim=2)
    codes = codec.tokens(sound)
    assert torch.equal(torch.cat(list(codec.encode_stream(chunks)), dim=2), codes)
    pieces = codes.split([3, 1, 8], dim=2)
    torch.testing.assert_close(
        torch.cat(list(codec.decode_stream(pieces)), dim=2), codec.from_tokens(codes), rtol=1e-4, atol=1e-6
    )


def test_a_batch_is_its_rows(codec: SoundStream) -> None:
    sound = noise(3, 6 * TINY.hop)
    alone = torch.cat([codec.tokens(one[None]) for one in sound])
    assert torch.equal(codec.tokens(sound), alone)


def test_an_upsampling_is_a_transposed_convolution_cut_off_behind() -> None:
    torch.manual_seed(0)
    layer = Upsample1d(3, 2, 5)
    x = noise(3, 8).view(1, 3, 8)
    weight = layer.up.conv.weight.detach().unflatten(0, (2, 5))  # (out, stride, C, 2), the second tap is the present
    kernel = torch.cat([weight[..., 1], weight[..., 0]], dim=1).permute(2, 0, 1)  # (C, out, 2 * stride)
    expected = F.conv_transpose1d(x, kernel, stride=5)[..., :40]
    bias = layer.up.conv.bias
    assert bias is not None
    torch.testing.assert_close(layer(x), expected + bias.unflatten(0, (2, 5)).tile(1, 8))


def test_a_strided_convolution_sees_its_own_step_last() -> None:
    layer = CausalConv1d(1, 1, 4, 2)
    with torch.no_grad():
        layer.conv.weight.copy_(torch.tensor([[[0.0, 0.0, 0.0, 1.0]]]))
        layer.conv.bias.zero_()  # type: ignore[union-attr]
    assert layer(torch.arange(6.0).view(1, 1, 6)).flatten().tolist() == [1.0, 3.0, 5.0]


def test_each_level_refines_and_the_first_ones_are_a_codec(codec: SoundStream) -> None:
    x = torch.randn(2, TINY.dim, 20, generator=torch.Generator().manual_seed(0))
    quantizer = codec.quantizer
    whole = quantizer(x)
    for k in (1, 2, 3):
        few = quantizer(x, torch.full((2,), k))
        assert torch.equal(few.codes, whole.codes)
        torch.testing.assert_close(few.latents, quantizer.latents(whole.codes[:, :k]))
    mixed = quantizer(x, torch.tensor([1, 3]))
    torch.testing.assert_close(mixed.latents[0], quantizer(x, torch.tensor([1, 1])).latents[0])
    torch.testing.assert_close(mixed.latents[1], whole.latents[1])


def test_the_nearest_word_is_found(codec: SoundStream) -> None:
    x = torch.randn(2, TINY.dim, 9, generator=torch.Generator().manual_seed(1))
    book = codec.quantizer.books[0]
    assert isinstance(book, Codebook)
    expected = torch.cdist(x.transpose(1, 2), book.words[None]).argmin(-1)
    assert torch.equal(codec.quantizer(x).codes[:, 0], expected)


def test_words_move_to_the_mean_of_what_they_stand_for_in_training_alone() -> None:
    book = Codebook(4, 2)
    places = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [9.0, 9.0]])
    random = torch.Generator().manual_seed(0)
    for step in range(60):
        # The last place is rare, and is missed most until a word moves there.
        chosen = places[:3] if step % 20 else places
        x = chosen.repeat(5, 1) + 0.1 * torch.randn(5 * len(chosen), 2, generator=random)
        book(x.T[None])
    gaps = torch.cdist(places, book.words)
    assert sorted(gaps.argmin(1).tolist()) == [0, 1, 2, 3], "a word each"
    assert float(gaps.min(1).values.max()) < 0.2
    before = book.words.clone()
    book.eval()(torch.randn(1, 2, 50))
    assert torch.equal(book.words, before)


def test_a_word_that_is_not_used_any_more_is_moved() -> None:
    book = Codebook(2, 1)
    book(torch.tensor([[[0.0, 8.0]]]))
    for _ in range(150):
        book(torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]))
    assert sorted(book.words.flatten().tolist()) == pytest.approx([0.0, 1.0], abs=0.1)


def test_gradients_pass_the_words_and_reach_every_part(codec: SoundStream) -> None:
    audio = (noise(4, 3000)[:, 0] * 10_000).to(torch.int16)
    objective = SoundObjective(SoundLossConfig(dropout=0.0, seconds=0.2))
    losses = objective(codec.train(), {"audio": audio}, torch.Generator().manual_seed(0))
    losses["loss"].backward()
    still = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert still == []


def test_pieces_and_levels_are_drawn_from_the_generator_alone(codec: SoundStream) -> None:
    audio = (noise(4, 3000)[:, 0] * 10_000).to(torch.int16)
    objective = SoundObjective(SoundLossConfig(seconds=0.2))
    with torch.no_grad():
        several = [objective(codec, {"audio": audio}, torch.Generator().manual_seed(seed))["loss"] for seed in (3, 3, 4)]
    one, two, other = map(float, several)
    assert one == two != other


def test_a_tone_is_learned() -> None:
    torch.manual_seed(0)
    codec = SoundStream(TINY)
    t = torch.arange(2000) / 8000
    tone = (20_000 * torch.sin(2 * torch.pi * 400 * t) * (t > 0.1)).to(torch.int16)[None].repeat(2, 1)
    objective = SoundObjective(SoundLossConfig(dropout=0.0, seconds=0.25))
    optimizer = torch.optim.Adam(codec.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(0)
    first = last = 0.0
    for step in range(40):
        loss = objective(codec, {"audio": tone}, rng)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (float(loss.detach()), last) if step == 0 else (first, float(loss.detach()))
    assert last < 0.75 * first


def test_distances_of_spectra() -> None:
    sound = noise(2, 2048)
    assert [float(d) for d in spectral_distance(sound, sound)] == [0, 0]
    near, far = spectral_distance(sound, 0.9 * sound), spectral_distance(sound, 0.1 * sound)
    assert float(near[0]) == pytest.approx(0.1, rel=0.01)
    assert float(near[1]) < float(far[1])
    silence = torch.zeros(1, 1, 2048, requires_grad=True)
    sum(spectral_distance(torch.zeros(1, 1, 2048), silence)).backward()  # type: ignore[union-attr]
    assert silence.grad is not None
    assert silence.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c: c.tokens(torch.zeros(1, 1, 11)), "a multiple of 10"),
        (lambda c: c.tokens(torch.zeros(1, 1, 0)), "a multiple of 10"),
        (lambda c: c.tokens(torch.zeros(1, 2, 20)), r"\(B, 1, S\)"),
        (lambda c: c.tokens(torch.zeros(20)), r"\(B, 1, S\)"),
        (lambda c: c.from_tokens(torch.zeros(1, 4, 2, dtype=torch.long)), "1 to 3 levels"),
        (lambda c: c.from_tokens(torch.full((1, 3, 2), 16)), "in .0, 16."),
        (lambda c: c.from_tokens(torch.full((1, 3, 2), -1)), "in .0, 16."),
        (lambda c: SoundObjective()(c, {"video": torch.zeros(1)}, torch.Generator()), "has video"),
        (lambda c: SoundObjective()(c, {"audio": torch.zeros(1, 99)}, torch.Generator()), "set seconds lower"),
        (lambda c: SoundStreamConfig(width=0), "at least 1"),
        (lambda c: SoundStreamConfig(codes=1), "at least 2 words"),
    ],
)
def test_wrong_input_is_one_sentence(codec: SoundStream, call, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        call(codec)
    assert "\n" not in str(caught.value)
