"""MAGVIT-v2's tokenizer: sizes and cost of the paper's shape, causality, streams, inflation, what it is trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tubelet.codecs.magvit2 import (
    MAGVIT2,
    SIZES,
    Discriminator3d,
    MAGVIT2Config,
    Weights,
    discriminator_losses,
    example,
    inflate,
    lecam,
    moved,
    stated,
    tiny,
    tokenizer_losses,
)
from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.types import Strides
from tubelet.core.weights import load_module, save_module
from tubelet.nn.conv3d import blur_halve, normalise_frames

TINY = tiny(SIZES["MAGVIT2"])
REAL = tiny(SIZES["WALT"])


def make(config: MAGVIT2Config = REAL) -> MAGVIT2:
    """As after some training: nothing is zero any more."""
    torch.manual_seed(0)
    codec = MAGVIT2(config)
    with torch.no_grad():
        for p in codec.parameters():
            if not p.any():
                p.normal_(std=0.2)
    return codec.eval()


def clip(frames: int = 9, batch: int = 2, side: int = 16) -> Tensor:
    return torch.rand(batch, 3, frames, side, side + 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# Sizes and cost


def conv(a: int, b: int, cells: int, taps: int = 27, bias: bool = False) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a convolution with that many output cells."""
    return taps * a * b + b * bias, taps * a * b * cells


def residuals(a: int, b: int, n: int, cells: int) -> tuple[int, int]:
    """Of n residual blocks from a to b channels."""
    parts = [(2 * a + 2 * b, 0), conv(a, b, cells), conv(b, b, cells)]
    parts += [conv(a, b, cells, 1)] if a != b else []
    parts += [(4 * b * (n - 1), 0), *[conv(b, b, cells)] * (2 * (n - 1))]
    return sum(p for p, _ in parts), sum(m for _, m in parts)


def test_counts_are_those_of_the_stated_shape() -> None:
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        codec = MAGVIT2(SIZES["MAGVIT2"])
        z = codec.encode(*example(codec.config))
        assert codec.decode(z).shape == (1, 3, 17, 128, 128)
    assert z.shape == (1, 18, 5, 16, 16)
    w, cells = [128, 256, 256, 512], [17 * 128**2, 17 * 64**2, 9 * 32**2, 5 * 16**2]
    middle = residuals(512, 512, 4, cells[3])
    parts = [
        *(conv(3, 128, cells[0]), residuals(128, 128, 4, cells[0])),
        *(conv(128, 128, cells[1], bias=True), residuals(128, 256, 4, cells[1])),
        *(conv(256, 256, cells[2], bias=True), residuals(256, 256, 4, cells[2])),
        *(conv(256, 256, cells[3], bias=True), residuals(256, 512, 4, cells[3])),
        *(middle, (2 * 512, 0), conv(512, 18, cells[3], 1, bias=True)),
        *(conv(18, 512, cells[3], bias=True), middle),
        *(residuals(512, 512, 4, cells[3]), conv(512, 8 * 512, cells[3], bias=True)),
        *(residuals(512, 256, 4, cells[2]), conv(256, 8 * 256, cells[2], bias=True)),
        *(residuals(256, 256, 4, cells[1]), conv(256, 4 * 256, cells[1], bias=True)),
        *(residuals(256, 128, 4, cells[0]), (2 * 128, 0), conv(128, 3, cells[0], bias=True)),
        *((18 * 2 * c + 2 * c, 18 * 2 * c * 5) for c in (512, 512, 256, 256)),  # the adaptive norms' linears
    ]
    assert sum(p.numel() for p in codec.parameters()) == sum(p for p, _ in parts)
    assert counter.get_total_flops() // 2 == sum(m for _, m in parts)
    assert [b.up.conv.out_channels for b in codec.encoder_levels[-1].children()] == [w[3]] * 4
    assert len(codec.blocks) == 2 * 5 * 4


def test_the_stated_shapes() -> None:
    assert SIZES["MAGVIT2"].strides == Strides(4, 8, 8)
    assert stated(SIZES["MAGVIT2"]) == "17 x 128 x 128 pixels (T, H, W) to 5 x 16 x 16 tokens of 18 bits and back"
    codec = make(TINY)
    for frames, expected in ((17, (1, 5, 2, 3)), (1, (1, 1, 2, 3))):
        tokens = codec.tokens(clip(frames, 1))
        assert tokens.shape == expected
        assert codec.from_tokens(tokens).shape == (1, 3, frames, 16, 24)


# Causality


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, REAL], ids=["signs", "real"])
def test_an_image_is_the_first_frame_of_a_film(config: MAGVIT2Config) -> None:
    codec, x = make(config), clip()
    z = codec.encode(x)
    close(codec.encode(x[:, :, :1]), z[:, :, :1])
    close(codec.decode(z[:, :, :1]), codec.decode(z)[:, :, :1])


@torch.no_grad()
def test_nothing_looks_ahead() -> None:
    codec, x = make(), clip()
    z = codec.encode(x)
    y = codec.decode(z)
    for k in (1, 2):
        later, later_z = x.clone(), z.clone()
        later[:, :, 4 * k - 3 :] *= -1  # latent k is the first that may see it
        later_z[:, :, k:] *= -1
        encoded, decoded = codec.encode(later), codec.decode(later_z)
        close(encoded[:, :, :k], z[:, :, :k])
        close(decoded[:, :, : 4 * k - 3], y[:, :, : 4 * k - 3])
        assert (encoded[:, :, k] - z[:, :, k]).abs().max() > 1e-3
        assert (decoded[:, :, 4 * k - 3] - y[:, :, 4 * k - 3]).abs().max() > 1e-3


@torch.no_grad()
def test_norms_keep_frames_apart() -> None:
    x = torch.randn(2, 8, 5, 4, 4)
    brighter = x.clone()
    brighter[:, :, 2] *= 100
    change = (normalise_frames(brighter, 4) - normalise_frames(x, 4)).abs().amax((0, 1, 3, 4))
    assert change[[0, 1, 3, 4]].eq(0).all()
    close(normalise_frames(x, 4)[:, :, 3], F.group_norm(x[:, :, 3], 4, eps=1e-6))


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1, 1, 1), (2, 1)])
def test_streamed_is_whole(chunks: tuple[int, ...]) -> None:
    codec, x = make(), clip()
    z = codec.encode(x)
    frames = [chunks[0] * 4 - 3, *(n * 4 for n in chunks[1:])]
    encoded = list(codec.encode_stream(x.split(frames, dim=2)))
    close(torch.cat(encoded, dim=2), z)
    decoded = list(codec.decode_stream(z.split(list(chunks), dim=2)))
    assert [chunk.shape[2] for chunk in decoded] == frames
    close(torch.cat(decoded, dim=2), codec.decode(z))


@torch.no_grad()
def test_a_batch_is_its_singles() -> None:
    codec, x = make(), clip(5, 3)
    z = codec.encode(x)
    close(z, torch.cat([codec.encode(one) for one in x.split(1)]))
    close(codec.decode(z), torch.cat([codec.decode(one) for one in z.split(1)]))


@torch.no_grad()
def test_the_latents_style_their_own_frames() -> None:
    """With the way of the pixels cut, all that the decoder's norms add comes from the latent frame a pixel frame belongs to."""
    codec = make(replace(REAL, temporal_kernel=1, halve_time=(False, False, False)))
    z = torch.randn(1, 6, 3, 2, 2)
    codec.decoder_in.conv.weight.zero_()
    other = z.clone()
    other[:, :, 1] += 1
    change = (codec.decode(other) - codec.decode(z)).abs().amax((0, 1, 3, 4))
    assert (change > 1e-4).tolist() == [False, True, False]
    moved_within = z.flip(3)  # the same mean over space
    close(codec.decode(moved_within), codec.decode(z))


@torch.no_grad()
def test_saved_with_its_statistics_and_near_in_half_precision(tmp_path: Path) -> None:
    codec, x = make(), clip(5)
    codec.set_statistics(torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6))
    save_module(tmp_path / "codec.safetensors", codec)
    again = MAGVIT2(REAL).eval()
    load_module(tmp_path / "codec.safetensors", again)
    z = codec.encode(x)
    assert torch.equal(again.encode(x), z)
    y = codec.decode(z)
    narrow = again.bfloat16().decode(z)
    assert narrow.dtype == torch.float32
    assert (narrow - y).abs().mean() < 0.05 * y.std()


# Tokens


def test_tokens_are_the_signs_and_return() -> None:
    codec, x = make(TINY), clip(5)
    with torch.no_grad():
        signs = codec.encode(x)
        tokens = codec.tokens(x)
        assert signs.abs().eq(1).all()
        bits = (tokens[:, None] >> torch.arange(6).view(1, 6, 1, 1, 1)) & 1
        assert torch.equal(bits * 2.0 - 1, signs)
        close(codec.from_tokens(tokens), codec.decode(signs))
        assert len(tokens.unique()) > 3
    with pytest.raises(UserError, match="build it with quantized=True"):
        make().tokens(x)
    with pytest.raises(UserError, match="build it with quantized=True"):
        make().from_tokens(tokens)


# From an image model


@torch.no_grad()
def test_inflated_it_treats_an_image_as_the_image_model_does() -> None:
    image = make(replace(REAL, temporal_kernel=1, halve_time=(False, False, False)))
    image.set_statistics(torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6))
    video, x = make(), clip(5)
    inflate(video, image)
    close(video.encode(x[:, :, :1]), image.encode(x[:, :, :1]))
    z = video.encode(x)
    close(z, image.encode(x[:, :, ::4]))  # the last slice in time: a latent frame is its last frame's
    close(video.decode(z)[:, :, :1], image.decode(z[:, :, :1]))
    close(video.decode(z)[:, :, 4], image.decode(z)[:, :, 1])
    close(video.decode(z)[:, :, 1], image.decode(z)[:, :, 1])
    with pytest.raises(UserError, match="its own image model"):
        inflate(video, make(TINY))


# Training


def test_losses_reach_every_parameter_and_weigh_as_stated() -> None:
    codec = make(TINY)
    torch.manual_seed(0)
    judge = Discriminator3d((5, 16, 24), width=4, multipliers=(2, 2), groups=2)
    losses, restored = tokenizer_losses(codec, judge, clip(5), step=1000)
    weights = {"reconstruction": 5, "adversarial": 0.1, "commitment": 0.25, "entropy": 0.2}
    torch.testing.assert_close(losses["loss"], sum(losses[name] * weight for name, weight in weights.items()))
    losses["loss"].backward()
    for name, p in codec.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name
    judge.zero_grad()
    anchors = torch.tensor([0.1, -0.1])
    terms = discriminator_losses(judge, clip(5), restored, anchors)
    torch.testing.assert_close(terms["loss"], terms["adversarial"] + 10 * terms["r1"] + 0.001 * terms["lecam"])
    terms["loss"].backward()
    for name, p in judge.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert moved(anchors, terms["real"], terms["fake"]).shape == (2,)


def test_the_discriminator_speaks_from_its_step_on_and_does_not_learn_from_it() -> None:
    codec, judge = make(TINY), Discriminator3d((5, 16, 24), width=4, multipliers=(2, 2), groups=2)
    weights = Weights(start=10)
    early, _ = tokenizer_losses(codec, judge, clip(5), 9, weights)
    alone, _ = tokenizer_losses(codec, None, clip(5), 9, weights)
    assert early.keys() == {"loss", "reconstruction", "entropy", "commitment"}
    assert early == alone
    late, restored = tokenizer_losses(codec, judge, clip(5), 10, weights)
    torch.testing.assert_close(late["adversarial"], F.softplus(-judge(restored)).mean())
    late["loss"].backward()
    assert all(p.grad is None for p in judge.parameters())


def test_the_perceptual_distance_is_a_mean_over_frames() -> None:
    codec, x = make(TINY), clip(5)

    def absolute(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape == b.shape == (10, 3, 16, 24)
        return (a - b).abs().mean((1, 2, 3))

    plain, restored = tokenizer_losses(codec, None, x, 0)
    seen, _ = tokenizer_losses(codec, None, x, 0, perceptual=absolute)
    torch.testing.assert_close(seen["perceptual"], (x - restored).abs().mean())
    torch.testing.assert_close(seen["loss"], plain["loss"] + 0.1 * seen["perceptual"])
    assert seen["perceptual"].requires_grad


def test_the_weight_of_entropy_falls_to_a_third() -> None:
    at = Weights().entropy_at
    assert [round(at(step), 6) for step in (0, 1000, 2000, 9999)] == [0.3, 0.2, 0.1, 0.1]


def test_r1_is_the_squared_slope() -> None:
    slope = torch.randn(1, 3 * 2 * 2 * 2)

    def plane(x: Tensor) -> Tensor:
        return x.flatten(1) @ slope.T

    real, fake = torch.randn(4, 3, 2, 2, 2), torch.randn(4, 3, 2, 2, 2)
    terms = discriminator_losses(plane, real, fake, torch.zeros(2))  # type: ignore[arg-type]
    torch.testing.assert_close(terms["r1"], slope.square().sum())


def test_the_discriminator_learns_in_full_precision_under_autocast() -> None:
    judge = Discriminator3d((3, 16, 16), width=16, multipliers=(1, 2), groups=4)  # the second block works on two frames
    real, fake = torch.rand(2, 2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = []
    for narrow in (False, True):
        judge.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            losses = discriminator_losses(judge, real, fake, torch.zeros(2))
        losses["loss"].backward()
        found.append([p.grad.clone() for p in judge.parameters() if p.grad is not None])
    assert len(found[0]) == len(list(judge.parameters()))
    for full, half in zip(*found, strict=True):
        assert torch.equal(full, half)


def test_lecam_pulls_where_real_and_fake_are_told_apart() -> None:
    anchors = torch.tensor([1.0, -1.0])
    assert lecam(torch.full((3, 1), 2.0), torch.full((3, 1), -3.0), anchors) == 3.0**2 + 4.0**2
    assert lecam(torch.full((3, 1), -2.0), torch.full((3, 1), 3.0), anchors) == 0
    assert torch.allclose(moved(anchors, torch.tensor(3.0), torch.tensor(0.0), 0.9), torch.tensor([1.2, -0.9]))


def test_the_discriminator_blurs_before_it_halves() -> None:
    x = torch.zeros(1, 1, 5, 5, 5)
    x[0, 0, 2, 2, 2] = 64
    y = blur_halve(x)
    assert y.shape == (1, 1, 3, 3, 3)
    assert y[0, 0, 1, 1, 1] == 8  # 64 / 2^3
    constant = torch.ones(2, 3, 5, 4, 6)
    close(blur_halve(constant), torch.ones(2, 3, 3, 2, 3))
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 1, 4, 4, 16)
    assert blur_halve(stripes)[..., 1:-1].abs().max() == 0, "what would alias is gone"
    with torch.device("meta"):
        assert Discriminator3d((17, 128, 128))(torch.empty(2, 3, 17, 128, 128)).shape == (2, 1)
    with pytest.raises(UserError, match="crop them"):
        Discriminator3d((5, 16, 16), 4, (2,), 2)(torch.zeros(1, 3, 5, 16, 8))


# Bad inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 30}, "try 32"),
        ({"residuals": 0}, "at least 1"),
        ({"halve_time": (False, True)}, "name each"),
        ({"temporal_kernel": 1}, "use a temporal_kernel of 3"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(MAGVIT2Config, to_dict(MAGVIT2Config()) | settings)


def test_pixels_that_do_not_fit_are_named() -> None:
    codec = make(TINY)
    with pytest.raises(UserError, match="frames must be 1 \\+ a multiple of 4, got 4"):
        codec.encode(clip(4))
    with pytest.raises(UserError, match="height must be a positive multiple of 8"):
        tokenizer_losses(codec, codec, clip(1, side=12), 0)
