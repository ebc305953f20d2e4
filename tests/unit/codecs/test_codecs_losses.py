"""The codec's loss: where it looks, what it counts, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from tubelet.codecs import Codec, build_codec
from tubelet.codecs.losses import CodecLossConfig, CodecObjective, codec_loss, foreground_mask, psnr, to_pixels
from tubelet.core.errors import UserError
from tubelet.core.types import Video

PALETTE = [
    (214, 48, 49),
    (232, 126, 20),
    (240, 200, 20),
    (39, 158, 72),
    (0, 178, 190),
    (40, 90, 215),
    (132, 60, 190),
    (236, 100, 170),
]
GREYS = [(232, 236, 242), (196, 190, 180), (120, 124, 130)]


def plain(color: tuple[int, int, int], size: int = 16) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8).expand(1, 1, size, size, 3).clone()


@pytest.fixture
def codec() -> Codec:
    torch.manual_seed(0)
    return build_codec("causal_conv", {"channels": 4, "fine_width": 16, "coarse_width": 16})


@pytest.fixture
def video() -> torch.Tensor:
    return (torch.rand(3, 5, 16, 16, 3, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)


@pytest.mark.parametrize("color", PALETTE)
def test_objects_are_foreground(color: tuple[int, int, int]) -> None:
    assert foreground_mask(to_pixels(plain(color))).all()


@pytest.mark.parametrize("color", GREYS)
def test_scenery_is_not(color: tuple[int, int, int]) -> None:
    assert not foreground_mask(to_pixels(plain(color))).any()


def test_the_mask_grows_by_its_reach_within_a_frame() -> None:
    frames = plain(GREYS[0]).expand(1, 3, 16, 16, 3).clone()
    frames[0, 1, 8, 8] = torch.tensor(PALETTE[0], dtype=torch.uint8)
    for reach in (0, 2):
        mask = foreground_mask(to_pixels(frames), reach=reach)
        assert mask.shape == (1, 1, 3, 16, 16)
        assert mask.dtype == torch.bool
        assert mask.sum() == (2 * reach + 1) ** 2
        assert mask[0, 0, 1, 8 - reach : 9 + reach, 8 - reach : 9 + reach].all()


def test_psnr_against_the_formula() -> None:
    a = torch.zeros(1, 3, 2, 4, 4)
    assert psnr(a, a + 0.2).item() == pytest.approx(20.0, abs=1e-4)  # an error of a tenth of the range
    assert psnr(a, a).item() == pytest.approx(99.0)
    assert psnr(a + 1, a + 1.7).item() == pytest.approx(99.0), "clipped"
    b = a.clone()
    b[..., 0, 0] = 2 * math.sqrt(0.1)
    mask = torch.zeros(1, 1, 2, 4, 4, dtype=torch.bool)
    mask[..., 0, :] = True
    assert psnr(a, b, mask).item() == pytest.approx(10 + 10 * math.log10(4), abs=1e-3)
    assert psnr(a, b, ~mask).item() == pytest.approx(99.0)
    assert psnr(a, b, mask.expand_as(a).float()).item() == pytest.approx(psnr(a, b, mask).item())
    assert psnr(a, b, torch.zeros_like(mask)).item() == pytest.approx(99.0)


def test_pixels_of_both_forms(video: torch.Tensor) -> None:
    pixels = to_pixels(video)
    torch.testing.assert_close(pixels, Video.from_uint8(video.numpy(), 8.0).pixels)
    assert to_pixels(pixels) is pixels
    with pytest.raises(UserError, match="five axes"):
        to_pixels(video[0])


def test_terms_add_up(codec: Codec, video: torch.Tensor) -> None:
    config = CodecLossConfig(l1=0.5, l2=2.0, gradient=3.0, temporal=0.25)
    out = codec_loss(codec, video, torch.Generator().manual_seed(0), config)
    total = 0.5 * out["l1"] + 2 * out["l2"] + 3 * out["gradient"] + 0.25 * out["temporal"]
    torch.testing.assert_close(out["loss"], total)
    assert out["loss"].requires_grad
    assert not out["psnr"].requires_grad
    assert all(value.ndim == 0 for value in out.values())
    assert out["temporal"] > 0
    assert "temporal" not in codec_loss(codec, video[:, :1], torch.Generator().manual_seed(0), config)
    assert "temporal" not in codec_loss(codec, video, torch.Generator().manual_seed(0))


def test_the_generator_decides(codec: Codec, video: torch.Tensor) -> None:
    objective = CodecObjective()
    a, b, c = (objective(codec, {"video": video}, torch.Generator().manual_seed(s))["loss"] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    silent = CodecObjective(CodecLossConfig(noise=0.0))
    d, e = (silent(codec, {"video": video}, torch.Generator().manual_seed(s))["loss"] for s in (0, 1))
    assert torch.equal(d, e)
    with torch.no_grad():
        restored = codec.decode(codec.encode(to_pixels(video)))
    assert restored.abs().max() < 1, "nothing to clip in what a new codec paints"
    out, pixels = silent(codec, {"video": video}, torch.Generator()), to_pixels(video)
    torch.testing.assert_close(out["psnr"], psnr(restored, pixels))
    torch.testing.assert_close(out["psnr_foreground"], psnr(restored, pixels, foreground_mask(pixels)))


def test_noise_follows_the_latents_deviation(codec: Codec, video: torch.Tensor) -> None:
    """Latents a thousand times as large meet noise a thousand times as large: growing is no way out."""
    config = CodecLossConfig(noise=1.0)
    before = codec_loss(codec, video, torch.Generator().manual_seed(0), config)
    with torch.no_grad():
        codec.get_submodule("encoder_out").weight.mul_(1000)
        codec.get_submodule("encoder_out").bias.mul_(1000)
        codec.get_submodule("decoder_in").weight.div_(1000)
    after = codec_loss(codec, video, torch.Generator().manual_seed(0), config)
    torch.testing.assert_close(after["loss"], before["loss"], rtol=1e-3, atol=1e-4)


def test_foreground_weighs_more(codec: Codec) -> None:
    """The same error costs more on an object than beside it."""
    video = torch.cat([plain(GREYS[0], 32), plain(GREYS[0], 32)])
    video[0, :, 12:20, 12:20] = torch.tensor(PALETTE[5], dtype=torch.uint8)
    with torch.no_grad():
        for parameter in codec.get_submodule("decoder_out").parameters():
            parameter.zero_()  # paints everything mid-grey: error .5 to .9 everywhere
    one = codec_loss(codec, video[:1], torch.Generator().manual_seed(0), CodecLossConfig(foreground=1.0))
    five = codec_loss(codec, video[:1], torch.Generator().manual_seed(0), CodecLossConfig(foreground=5.0))
    pixels = to_pixels(video[:1])
    mask = foreground_mask(pixels).expand_as(pixels)
    inside, outside, share = pixels.abs()[mask].mean(), pixels.abs()[~mask].mean(), mask.float().mean()
    torch.testing.assert_close(one["l1"], pixels.abs().mean())
    torch.testing.assert_close(five["l1"], (5 * share * inside + (1 - share) * outside) / (1 + 4 * share))


def test_a_batch_without_video_is_refused(codec: Codec) -> None:
    with pytest.raises(UserError, match="trained on 'video', the batch has latent"):
        CodecObjective()(codec, {"latent": torch.zeros(1)}, torch.Generator())


def test_training_lowers_the_loss(codec: Codec, video: torch.Tensor) -> None:
    smooth = torch.nn.functional.interpolate(
        torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1, size=(32, 32)
    )
    clip = smooth[:, :, None].expand(2, 3, 3, 32, 32)
    optimizer, rng = torch.optim.AdamW(codec.parameters(), 3e-3), torch.Generator().manual_seed(0)
    history = []
    for _ in range(40):
        out = CodecObjective()(codec, {"video": clip}, rng)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        history.append(out["loss"].item())
    assert history[-1] < 0.5 * history[0]


def test_one_cell_is_enough(codec: Codec) -> None:
    losses = codec_loss(codec, plain(PALETTE[0], 8), torch.Generator().manual_seed(0))
    assert all(value.isfinite() for value in losses.values())
