"""A causal convolutional codec: patches first, then 2-D residual convolutions, time by linear layers.

After MAGVIT-v2 (Yu et al. 2023, section 3.2), which is causal in time so that an image is the first frame of a film, with
patchify-first as in LTX-Video (HaCohen et al. 2024, section 2.1): no layer runs at full resolution. For a 64x64 clip the
shapes are

    pixels (B, 3, T, 64, 64) -> patches (B*T, 48, 16, 16) -> fine stage (B*T, 64, 16, 16)
    -> merge 2x2 cells and `st` frames (B*T', 128, 8, 8) -> coarse stage -> latents (B, C, T', 8, 8)

and the decoder runs the same road back with more blocks and one stage more, at 2x2 pixels a cell: an edge inside a patch
is no linear function of what the patch knows (docs/log.md, 2026-11-25: 1 dB of foreground at equal steps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tubelet.codecs.base import Codec
from tubelet.core.errors import UserError
from tubelet.core.types import Strides
from tubelet.nn.conv import (
    CausalMix,
    ExpandFrames,
    MergeFrames,
    ResidualBlock,
    Stream,
    depth_to_space,
    fold_frames,
    space_to_depth,
    unfold_frames,
)

PATCH = 4
"""Side of the patches of the fine stage; the coarse stage halves it again, 8x8 in all."""
SHARP = 2
"""Side of the cells of the decoder's last stage."""


@dataclass(frozen=True)
class CausalConvConfig:
    """Sizes of a `CausalConv`. `fine` is the stage of 4x4 patches at frame rate, `coarse` the one of 8x8 at latent rate,
    `sharp` the decoder's last one, of 2x2 cells."""

    channels: int = 8
    """Latent channels C."""
    temporal_stride: int = 1
    """Frames per latent frame: 1, 2 or 4."""
    temporal_kernel: int = 1
    """Frames that a causal mixing layer sees, its own included; 1 mixes nothing: at stride 1 each frame is coded alone."""
    fine_width: int = 64
    coarse_width: int = 128
    sharp_width: int = 32
    encoder_blocks: tuple[int, int] = (1, 1)
    """Residual blocks of the fine and the coarse stage."""
    decoder_blocks: tuple[int, int, int] = (1, 1, 2)
    """Residual blocks of the sharp, the fine and the coarse stage."""

    def __post_init__(self) -> None:
        if self.temporal_stride not in (1, 2, 4):
            raise UserError(f"temporal_stride must be 1, 2 or 4, got {self.temporal_stride}; choose one of them")
        small = min(self.channels, self.temporal_kernel, self.fine_width, self.coarse_width, self.sharp_width)
        if small < 1 or min(*self.encoder_blocks, *self.decoder_blocks) < 0:
            raise UserError(
                "channels, kernel and widths must be at least 1 and blocks at least 0; correct the codec's settings"
            )

    @classmethod
    def balanced(cls, temporal_stride: int, channels: int, temporal_kernel: int = 1) -> CausalConvConfig:
        """About equal multiply-accumulates per pixel frame at every stride: the coarse stage widens as its frames get fewer."""
        width = {1: 128, 2: 192, 4: 256}.get(temporal_stride, 128)
        return cls(channels, temporal_stride, temporal_kernel, coarse_width=width)


class _Stage(nn.Module):
    """Residual blocks, each behind a causal mixing layer when the kernel has one."""

    def __init__(self, width: int, blocks: int, kernel: int) -> None:
        super().__init__()
        self.mixes = nn.ModuleList([CausalMix(width, kernel) for _ in range(blocks)] if kernel > 1 else [])
        self.blocks = nn.ModuleList([ResidualBlock(width) for _ in range(blocks)])

    def forward(self, x: Tensor, batch: int, stream: Stream | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            if len(self.mixes):
                x = self.mixes[i](x, batch, stream)
            x = block(x)
        return x


class CausalConv(Codec):
    """The codec named `causal_conv`."""

    config: CausalConvConfig

    def __init__(self, config: CausalConvConfig) -> None:
        super().__init__(config, config.channels, Strides(config.temporal_stride, 2 * PATCH, 2 * PATCH))
        fine, coarse, stride, kernel = config.fine_width, config.coarse_width, config.temporal_stride, config.temporal_kernel
        depth = 3 * PATCH * PATCH
        self.encoder_in = nn.Conv2d(depth, fine, 3, padding=1)
        self.encoder_fine = _Stage(fine, config.encoder_blocks[0], kernel)
        self.merge = MergeFrames(4 * fine, coarse, stride)
        self.encoder_coarse = _Stage(coarse, config.encoder_blocks[1], kernel)
        self.encoder_out = nn.Conv2d(coarse, config.channels, 1)
        self.decoder_in = nn.Conv2d(config.channels, coarse, 3, padding=1)
        self.decoder_coarse = _Stage(coarse, config.decoder_blocks[2], kernel)
        self.expand = ExpandFrames(coarse, 4 * fine, stride)
        self.decoder_fine = _Stage(fine, config.decoder_blocks[1], kernel)
        self.split = nn.Conv2d(fine, (PATCH // SHARP) ** 2 * config.sharp_width, 3, padding=1)
        self.decoder_sharp = _Stage(config.sharp_width, config.decoder_blocks[0], 1)
        self.decoder_out = nn.Conv2d(config.sharp_width, 3 * SHARP * SHARP, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def blocks(self) -> list[nn.Module]:
        """All residual blocks, encoder first."""
        stages = (self.encoder_fine, self.encoder_coarse, self.decoder_coarse, self.decoder_fine, self.decoder_sharp)
        return [block for stage in stages for block in stage.blocks]

    def outer_parameters(self) -> list[nn.Parameter]:
        layers = (self.encoder_in, self.encoder_out, self.decoder_in, self.decoder_out)
        return [parameter for layer in layers for parameter in layer.parameters()]

    def _encode(self, pixels: Tensor, stream: Stream | None) -> Tensor:
        B = pixels.shape[0]
        x = space_to_depth(fold_frames(pixels.to(self.encoder_in.weight.dtype)), PATCH)  # (B*T, 48, H/4, W/4)
        x = self.encoder_fine(self.encoder_in(x), B, stream)
        x = space_to_depth(x, 2).permute(0, 2, 3, 1).unflatten(0, (B, -1))  # (B, T, h, w, 4*fine)
        x = self.merge(x, stream).flatten(0, 1).permute(0, 3, 1, 2)  # (B*T', coarse, h, w)
        x = self.encoder_coarse(x, B, stream)
        return unfold_frames(self.encoder_out(x), B)  # (B, C, T', h, w)

    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        B = latents.shape[0]
        x = self.decoder_in(fold_frames(latents.to(self.decoder_in.weight.dtype)).contiguous(memory_format=torch.channels_last))
        x = self.decoder_coarse(x, B, stream)  # (B*T', coarse, h, w)
        x = self.expand(x.permute(0, 2, 3, 1).unflatten(0, (B, -1)), stream)  # (B, T, h, w, 4*fine)
        x = depth_to_space(x.flatten(0, 1).permute(0, 3, 1, 2), 2)  # (B*T, fine, H/4, W/4)
        x = self.decoder_fine(x, B, stream)
        x = depth_to_space(self.split(x), PATCH // SHARP)  # (B*T, sharp, H/2, W/2)
        x = self.decoder_sharp(x, B, stream)
        return unfold_frames(depth_to_space(self.decoder_out(x), SHARP), B)  # (B, 3, T, H, W)
