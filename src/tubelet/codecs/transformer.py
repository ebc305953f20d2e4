"""A causal transformer codec: linear patches, attention in a frame, causal attention along time, a small convolutional head.

After C-ViViT (Villegas et al. 2022, section 2.1: frame 0 has an embedding of its own, attention along time is causal) and
ViTok (Hansen-Estruch et al. 2025, section 3: the decoder is what pays). For a 64x64 clip the shapes are

    pixels (B, 3, T, 64, 64) -> patches of 8x8 (B, T, 8, 8, 192) -> merge `st` frames (B, T', 64, D) -> blocks
    -> latents (B, C, T', 8, 8) -> (B, T', 64, D) -> blocks -> expand to frames and 2x2 cells (B*T, 64, 16, 16) -> pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.codecs.base import Codec
from tubelet.core.errors import UserError
from tubelet.core.types import Strides
from tubelet.nn.attention import KeyValues, Rope, SelfAttention
from tubelet.nn.conv import ExpandFrames, MergeFrames, Stream, depth_to_space, fold_frames, space_to_depth, unfold_frames
from tubelet.nn.mlp import SwiGLU
from tubelet.nn.positions import RotaryEmbedding, grid_positions

PATCH = 8
"""Side of a token's patch in pixels."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a `Transformer`. Every layer but the head runs at latent rate."""

    channels: int = 8
    """Latent channels C."""
    temporal_stride: int = 1
    """Frames per latent frame: 1, 2 or 4."""
    temporal_kernel: int = 4
    """Latent frames that attention along time sees, its own included; 1 leaves it out."""
    width: int = 192
    heads: int = 3
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    head_width: int = 64
    """Channels of the head at 4x4 pixels a cell, before its one 3x3 convolution."""

    def __post_init__(self) -> None:
        if self.temporal_stride not in (1, 2, 4):
            raise UserError(f"temporal_stride must be 1, 2 or 4, got {self.temporal_stride}; choose one of them")
        if min(self.channels, self.temporal_kernel, self.width, self.heads, self.head_width) < 1:
            raise UserError("channels, kernel, widths and heads must be at least 1; correct the codec's settings")
        if min(self.encoder_blocks, self.decoder_blocks) < 0:
            raise UserError("blocks must be at least 0; correct the codec's settings")
        if self.width % self.heads or self.width // self.heads % 4:
            raise UserError(
                f"width {self.width} must divide into {self.heads} heads of a multiple of 4 channels; change one of them"
            )

    @classmethod
    def balanced(cls, temporal_stride: int, channels: int, temporal_kernel: int = 4) -> TransformerConfig:
        """About the multiply-accumulates of `CausalConvConfig.balanced` per pixel frame, at every stride."""
        width, decoder_blocks = {1: (192, 2), 2: (256, 3), 4: (384, 2)}.get(temporal_stride, (192, 2))
        return cls(channels, temporal_stride, temporal_kernel, width, width // 64, decoder_blocks=decoder_blocks)


class _Block(nn.Module):
    """Pre-norm: attention among the cells of a frame, attention along time at each cell, SwiGLU."""

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        # Layer norm for its fused kernel: RMS norm is four times slower on a CPU.
        self.space_norm = nn.LayerNorm(width, bias=False)
        self.space = SelfAttention(width, heads, qk_norm=False)
        self.time_norm = nn.LayerNorm(width, bias=False) if kernel > 1 else None
        self.time = SelfAttention(width, heads, qk_norm=False) if kernel > 1 else None
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp = SwiGLU(width, -(-width * 8 // 3) // 64 * 64 or 64)

    def forward(self, x: Tensor, space_rope: Rope, time_rope: Rope, stream: Stream | None) -> Tensor:
        """x `(B, T, L, D)` with L the cells of a frame."""
        B, T, L, D = x.shape
        x = x + self.space(self.space_norm(x).view(B * T, L, D), space_rope).view(B, T, L, D)
        if self.time is not None and self.time_norm is not None:
            along = self.time_norm(x).transpose(1, 2).reshape(B * L, T, D)
            x = x + self._along_time(self.time, along, time_rope, stream).view(B, L, T, D).transpose(1, 2)
        return x + self.mlp(self.mlp_norm(x))

    def _along_time(self, attend: SelfAttention, x: Tensor, rope: Rope, stream: Stream | None) -> Tensor:
        T = x.shape[1]
        past: KeyValues | None = stream.states.setdefault(self, KeyValues()) if stream is not None else None
        earlier = past.k.shape[-2] if past is not None and past.k is not None else 0
        recent = torch.ones(T, earlier + T, dtype=torch.bool, device=x.device).triu(earlier - self.kernel + 1)  # (T, M)
        out = attend(x, rope, mask=recent, causal=True, past=past)
        if past is not None and past.k is not None and past.v is not None:
            past.k, past.v = past.k[..., -(self.kernel - 1) :, :], past.v[..., -(self.kernel - 1) :, :]
        return out


class _Tower(nn.Module):
    """Blocks and a last norm, with positions for any grid."""

    def __init__(self, config: TransformerConfig, blocks: int) -> None:
        super().__init__()
        head = config.width // config.heads
        self.space_positions = RotaryEmbedding((head // 2, head // 2))
        self.time_positions = RotaryEmbedding((head,))
        self.blocks = nn.ModuleList([_Block(config.width, config.heads, config.temporal_kernel) for _ in range(blocks)])
        self.norm = nn.LayerNorm(config.width, bias=False)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        """x `(B, T', h, w, D)`, same shape back."""
        B, T, h, w, D = x.shape
        seen = stream.states.get(self, 0) if stream is not None else 0
        if stream is not None:
            stream.states[self] = seen + T
        space_rope = self.space_positions(grid_positions(h, w, device=x.device))
        time_rope = self.time_positions(grid_positions(T, device=x.device) + seen)
        x = x.reshape(B, T, h * w, D)
        for block in self.blocks:
            x = block(x, space_rope, time_rope, stream)
        return self.norm(x).view(B, T, h, w, D)


class Transformer(Codec):
    """The codec named `transformer`."""

    config: TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, config.channels, Strides(config.temporal_stride, PATCH, PATCH))
        width, head = config.width, config.head_width
        self.merge = MergeFrames(3 * PATCH * PATCH, width, config.temporal_stride)
        self.encoder = _Tower(config, config.encoder_blocks)
        self.encoder_out = nn.Linear(width, config.channels)
        self.decoder_in = nn.Linear(config.channels, width)
        self.decoder = _Tower(config, config.decoder_blocks)
        self.expand = ExpandFrames(width, 4 * head, config.temporal_stride)
        self.decoder_out = nn.Conv2d(head, 3 * PATCH * PATCH // 4, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *self.decoder.blocks]

    def outer_parameters(self) -> list[nn.Parameter]:
        layers = (self.merge, self.encoder_out, self.decoder_in, self.decoder_out)
        return [parameter for layer in layers for parameter in layer.parameters()]

    def _encode(self, pixels: Tensor, stream: Stream | None) -> Tensor:
        B = pixels.shape[0]
        patches = space_to_depth(fold_frames(pixels.to(self.encoder_out.weight.dtype)), PATCH)  # (B*T, 192, h, w)
        x = self.merge(patches.permute(0, 2, 3, 1).unflatten(0, (B, -1)), stream)  # (B, T', h, w, D)
        return self.encoder_out(self.encoder(x, stream)).permute(0, 4, 1, 2, 3)  # (B, C, T', h, w)

    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        B = latents.shape[0]
        x = self.decoder_in(latents.permute(0, 2, 3, 4, 1).to(self.decoder_in.weight.dtype))  # (B, T', h, w, D)
        x = self.expand(self.decoder(x, stream), stream)  # (B, T, h, w, 4*head)
        x = depth_to_space(x.flatten(0, 1).permute(0, 3, 1, 2), 2)  # (B*T, head, 2h, 2w)
        return unfold_frames(depth_to_space(self.decoder_out(F.silu(x)), PATCH // 2), B)  # (B, 3, T, H, W)
