"""The codec's encode and decode against diffusers' AutoencoderKL of equal stride, latent channels and about equal work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch

from benchmarks.timing import Figure, Settings, compare, macs
from tubelet.codecs import build_codec
from tubelet.codecs.base import Codec
from tubelet.recipes.worlds_64 import recipe

Module = TypeVar("Module", bound=torch.nn.Module)
CLIPS, FRAMES, SIZE = 1, 17, 64


def codec(settings: Settings) -> Iterator[Figure]:
    """Both directions, both precisions; the peer is an image codec and sees the frames as a batch."""
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    settings_of = recipe()
    torch.manual_seed(0)
    ours = build_codec(settings_of.codec, getattr(settings_of, settings_of.codec)).eval()
    peer = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 4,  # pyright: ignore[reportArgumentType]
        block_out_channels=(16, 32, 64, 64),  # pyright: ignore[reportArgumentType]
        latent_channels=ours.channels,
        norm_num_groups=8,
        sample_size=SIZE,
    ).eval()
    for dtype in (torch.float32, torch.bfloat16):
        yield from _both_ways(_in(ours, dtype), _in(peer, dtype), dtype, settings)
    for whose, module in (("ours", ours), ("peer", peer)):
        yield Figure(f"codec/parameters/{whose}", sum(p.numel() for p in module.parameters()) / 1e6, "million")


def _in(codec: Module, dtype: torch.dtype) -> Module:
    """Parameters alone: latent statistics stay exact."""
    for parameter in codec.parameters():
        parameter.data = parameter.data.to(dtype)
    return codec


def _both_ways(ours: Codec, peer: torch.nn.Module, dtype: torch.dtype, settings: Settings) -> Iterator[Figure]:
    precision = "fp32" if dtype == torch.float32 else "bf16"
    against = f"diffusers AutoencoderKL, {CLIPS} x {FRAMES} frames of {SIZE}x{SIZE}, {precision}"
    video = torch.rand(CLIPS, 3, FRAMES, SIZE, SIZE) * 2 - 1  # (B, 3, T, H, W)
    images = video.transpose(1, 2).flatten(0, 1).to(dtype)  # (B*T, 3, H, W)
    with torch.inference_mode():
        latents = ours.encode(video)  # (B, C, T, h, w)
        cells = latents.transpose(1, 2).flatten(0, 1).to(dtype)  # (B*T, C, h, w)
        ways = {
            "encode": {"ours": lambda: ours.encode(video), "peer": lambda: peer.encode(images).latent_dist.mode()},  # type: ignore[operator]
            "decode": {"ours": lambda: ours.decode(latents), "peer": lambda: peer.decode(cells).sample},  # type: ignore[operator]
        }
        for way, contestants in ways.items():
            work = {name: macs(call) for name, call in contestants.items()}
            seconds = compare(contestants, settings)
            ratio = seconds["peer"] / seconds["ours"]
            yield Figure(f"codec/{way}/{precision}", ratio, "x faster", against)
            per_mac = ratio * work["ours"] / work["peer"]
            yield Figure(f"codec/{way}/{precision}/per_mac", per_mac, "x faster per multiply-accumulate", against)
            yield Figure(f"codec/{way}/{precision}/seconds", seconds["ours"], "s", f"{seconds['peer']:.4f} s of AutoencoderKL")
            for name, count in work.items():
                yield Figure(f"codec/{way}/{precision}/macs/{name}", count / 1e9, "billion")
