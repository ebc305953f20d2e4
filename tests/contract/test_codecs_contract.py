"""What every codec of the catalogue promises, at every temporal stride."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tubelet.codecs import CODECS, Codec, build_codec
from tubelet.codecs.losses import CodecObjective
from tubelet.core.config import from_dict, to_dict
from tubelet.core.errors import UserError
from tubelet.core.weights import load_module, save_module

SMALL: dict[str, dict[str, Any]] = {
    "transformer": {"width": 32, "heads": 2, "head_width": 16},
    "causal_conv": {"fine_width": 16, "coarse_width": 32},
}
CASES = [(name, stride, kernel) for name, stride, kernel in itertools.product(CODECS, (1, 2, 4), (1, 3))]


def make(name: str, stride: int = 1, kernel: int = 3, channels: int = 4) -> Codec:
    """A small codec whose every layer does something: layers that start at zero are given values, and so are the statistics."""
    torch.manual_seed(0)
    codec = build_codec(name, {"channels": channels, "temporal_stride": stride, "temporal_kernel": kernel, **SMALL[name]})
    with torch.no_grad():
        for parameter in codec.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    codec.set_statistics(torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels))
    return codec.eval()


def clip(frames: int, batch: int = 2, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-t{case[1]}-k{case[2]}")
def codec(request: pytest.FixtureRequest) -> Codec:
    return make(*request.param)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 40), (64, 32)])
def test_shapes_of_any_size(codec: Codec, height: int, width: int) -> None:
    x = clip(9, 1, height, width)
    z = codec.encode(x)
    assert z.shape == (1, codec.channels, *codec.strides.latent_shape(9, height, width))
    assert z.shape[2] == 1 + 8 // codec.strides.t
    y = codec.decode(z)
    assert y.shape == x.shape
    assert y.dtype == z.dtype == torch.float32


@torch.no_grad()
def test_an_image_is_a_one_frame_clip(codec: Codec) -> None:
    x = clip(9)
    z = codec.encode(x)
    close(codec.encode(x[:, :, :1]), z[:, :, :1])
    close(codec.decode(z[:, :, :1]), codec.decode(z)[:, :, :1])


@torch.no_grad()
def test_nothing_looks_ahead(codec: Codec) -> None:
    x, st = clip(9), codec.strides.t
    z = codec.encode(x)
    y = codec.decode(z)
    for k in range(1, z.shape[2]):
        later, later_z = x.clone(), z.clone()
        later[:, :, 1 + st * (k - 1) :] *= -1  # latent k is the first that may see it
        later_z[:, :, k:] *= -1
        encoded, decoded = codec.encode(later), codec.decode(later_z)
        close(encoded[:, :, :k], z[:, :, :k])
        close(decoded[:, :, : 1 + st * (k - 1)], y[:, :, : 1 + st * (k - 1)])
        assert (encoded[:, :, k] - z[:, :, k]).abs().max() > 1e-3
        assert (decoded[:, :, 1 + st * (k - 1)] - y[:, :, 1 + st * (k - 1)]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
def test_a_kernel_of_one_frame_codes_frames_alone(name: str) -> None:
    x = clip(3)
    alone = make(name, stride=1, kernel=1)
    close(alone.encode(x)[:, :, 2:], alone.encode(x[:, :, 2:]))
    mixing = make(name, stride=1, kernel=3)
    assert (mixing.encode(x)[:, :, 2:] - mixing.encode(x[:, :, 2:])).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("latent_chunks", [(1, 1, 1, 1, 1), (2, 3), (1, 4), (4, 1), (5,)])
def test_streamed_is_whole(codec: Codec, latent_chunks: tuple[int, ...]) -> None:
    st = codec.strides.t
    x = clip(1 + 4 * st)
    z = codec.encode(x)
    y = codec.decode(z)
    frames = [latent_chunks[0] * st - st + 1, *(n * st for n in latent_chunks[1:])]
    encoded = list(codec.encode_stream(x.split(frames, dim=2)))
    assert [chunk.shape[2] for chunk in encoded] == list(latent_chunks)
    close(torch.cat(encoded, dim=2), z)
    decoded = list(codec.decode_stream(z.split(list(latent_chunks), dim=2)))
    assert [chunk.shape[2] for chunk in decoded] == frames
    close(torch.cat(decoded, dim=2), y)


@torch.no_grad()
@pytest.mark.parametrize("name", CODECS)
def test_a_long_stream_keeps_a_short_memory(name: str) -> None:
    codec = make(name, stride=1, kernel=3)
    x = clip(12, 1, 8, 8)
    close(torch.cat(list(codec.encode_stream(x.split(1, dim=2))), dim=2), codec.encode(x))


@torch.no_grad()
def test_a_batch_is_its_singles(codec: Codec) -> None:
    x = clip(5, batch=3)
    z = codec.encode(x)
    close(z, torch.cat([codec.encode(one) for one in x.split(1)]))
    close(codec.decode(z), torch.cat([codec.decode(one) for one in z.split(1)]))


def test_gradients_reach_every_parameter(codec: Codec) -> None:
    video = (torch.rand(2, 9, 16, 16, 3, generator=torch.Generator().manual_seed(2)) * 255).to(torch.uint8)
    losses = CodecObjective()(codec, {"video": video}, torch.Generator().manual_seed(0))
    losses["loss"].backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_pixels_depend_on_their_latents_only_where_they_should(codec: Codec) -> None:
    z = torch.zeros(1, codec.channels, 3, 2, 2, requires_grad=True)
    codec.decode(z)[:, :, 0].square().sum().backward()
    assert z.grad is not None
    assert z.grad[:, :, 0].abs().max() > 0
    assert not z.grad[:, :, 1:].any()


@torch.no_grad()
def test_saved_with_its_statistics(codec: Codec, tmp_path: Path) -> None:
    x = clip(5)
    save_module(tmp_path / "codec.safetensors", codec)
    name = next(name for name, entry in CODECS.items() if isinstance(codec.config, entry.config))
    again = build_codec(name, to_dict(codec.config)).eval()
    assert again.config == codec.config
    assert not torch.equal(again.mean, codec.mean)
    load_module(tmp_path / "codec.safetensors", again)
    assert torch.equal(again.mean, codec.mean)
    assert torch.equal(again.std, codec.std)
    assert torch.equal(again.encode(x), codec.encode(x))


@torch.no_grad()
def test_standardised_by_the_statistics(codec: Codec) -> None:
    x = clip(5)
    raw = codec.encode_raw(x)
    mean, std = raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4))
    codec.set_statistics(mean, std)
    z = codec.encode(x)
    close(z.mean(dim=(0, 2, 3, 4)), torch.zeros(codec.channels))
    close(z.std(dim=(0, 2, 3, 4)), torch.ones(codec.channels))
    close(codec.decode(z), codec.decode_raw(raw))


@torch.no_grad()
def test_wrong_sizes_are_refused(codec: Codec) -> None:
    st = codec.strides.t
    with pytest.raises(UserError, match="height must be a positive multiple of 8, got 12: try 8 or 16"):
        codec.encode(clip(1, height=12))
    with pytest.raises(UserError, match="width must be a positive multiple of 8, got 4"):
        codec.encode(clip(1, width=4))
    with pytest.raises(UserError, match="frames must be"):
        codec.encode(clip(1)[:, :, :0])
    if st > 1:
        with pytest.raises(UserError, match=f"frames must be 1 \\+ a multiple of {st}, got {st}"):
            codec.encode(clip(st))
        with pytest.raises(UserError, match=f"a multiple of {st} frames, got {st - 1}"):
            list(codec.encode_stream([clip(1), clip(st - 1)]))
    with pytest.raises(UserError, match=r"pixels \(B, 3, T, H, W\)"):
        codec.encode(clip(1)[:, :2])
    with pytest.raises(UserError, match=r"pixels \(B, 3, T, H, W\)"):
        codec.encode(clip(1)[:, :, 0])
    with pytest.raises(UserError, match=f"latents \\(B, {codec.channels}, T, h, w\\)"):
        codec.decode(torch.zeros(1, codec.channels + 1, 1, 2, 2))
    with pytest.raises(UserError, match="latents"):
        codec.decode(torch.zeros(1, codec.channels, 0, 2, 2))


def test_wrong_statistics_are_refused(codec: Codec) -> None:
    good = torch.ones(codec.channels)
    with pytest.raises(UserError, match="one value for each"):
        codec.set_statistics(torch.ones(codec.channels + 1), good)
    with pytest.raises(UserError, match="positive"):
        codec.set_statistics(good, torch.zeros(codec.channels))
    with pytest.raises(UserError, match="finite"):
        codec.set_statistics(good * torch.nan, good)


def test_first_and_last_layers_are_named(codec: Codec) -> None:
    outer = {id(p) for p in codec.outer_parameters()}
    names = {name for name, p in codec.named_parameters() if id(p) in outer}
    assert len(names) == len(outer) == len(codec.outer_parameters())
    assert {"encoder_out.weight", "decoder_in.weight", "decoder_out.weight"} <= names
    inside = {id(p) for block in codec.blocks for p in block.parameters()}
    assert inside
    assert not inside & outer


@torch.no_grad()
def test_bf16_stays_near(codec: Codec) -> None:
    x = clip(5)
    z = codec.encode(x)
    y = codec.decode(z)
    with torch.autocast("cpu", torch.bfloat16):
        narrow_z, narrow_y = codec.encode(x), codec.decode(z)
    assert narrow_z.dtype == narrow_y.dtype == torch.float32
    assert (narrow_z - z).abs().mean() < 0.05 * z.std()
    assert (narrow_y - y).abs().mean() < 0.05 * y.std()
    narrow = codec.bfloat16()
    assert (narrow.decode(z) - y).abs().mean() < 0.05 * y.std()


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_catalogue_is_balanced(stride: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    cost = {}
    for name, entry in CODECS.items():
        codec = build_codec(name, entry.config.balanced(stride, 8))
        x = clip(9, 1, 64, 64)
        with torch.no_grad():
            with FlopCounterMode(display=False) as encoding:
                z = codec.encode(x)
            with FlopCounterMode(display=False) as decoding:
                codec.decode(z)
        assert decoding.get_total_flops() > 1.5 * encoding.get_total_flops(), "the decoder is what pays"
        cost[name] = encoding.get_total_flops() + decoding.get_total_flops()
    assert max(cost.values()) < 1.25 * min(cost.values()), cost


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="no codec 'vae'; choose one of"):
        build_codec("vae")
    for name, entry in CODECS.items():
        assert to_dict(from_dict(entry.config, {})) == to_dict(entry.config())
        assert isinstance(build_codec(name).config, entry.config)
        with pytest.raises(UserError, match="no setting 'chanels'"):
            build_codec(name, {"chanels": 8})
        with pytest.raises(UserError, match="temporal_stride must be 1, 2 or 4, got 3"):
            build_codec(name, {"temporal_stride": 3})
        with pytest.raises(UserError, match="at least 1"):
            build_codec(name, {"channels": 0})
        with pytest.raises(UserError, match="at least 0"):
            build_codec(name, {"encoder_blocks": (-1, 1) if name == "causal_conv" else -1})
        other = next(e for n, e in CODECS.items() if n != name)
        with pytest.raises(UserError, match="use its own settings"):
            build_codec(name, other.config())
    with pytest.raises(UserError, match="heads"):
        build_codec("transformer", {"width": 100, "heads": 3})
