"""TimeSformer: divided space-time attention (Bertasius, Wang & Torresani 2021, "Is Space-Time Attention All You Need for
Video Understanding?").

A ViT on the patches of a few frames. In every block a patch attends first to the same place in all frames, then to the other
patches of its frame (section 3, "divided space-time"), so the cost is L + T per token instead of L * T. The attention along
time ends in a linear map that starts at zero: before training the network is an image ViT that averages over frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.attention import SelfAttention
from tubelet.nn.conv import fold_frames
from tubelet.nn.images import ImageTokens
from tubelet.nn.mlp import MLP

EPS = 1e-6


@dataclass(frozen=True)
class TimeSformerConfig:
    """Sizes of a `TimeSformer`; `patch` in pixels. Raises UserError when they do not fit each other."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    frames: int = 8
    size: int = 224
    patch: int = 16
    classes: int = 400

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.frames, self.size, self.patch, self.classes) < 1:
            raise UserError("every size of a TimeSformer must be at least 1; raise the one that is not")
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads need a width of k * heads, got {self.width}; try {64 * self.heads}")
        if self.size % self.patch:
            raise UserError(f"{self.size} pixels do not divide into patches of {self.patch}; choose a multiple")


class DividedBlock(nn.Module):
    """Attention along time, attention inside the frame, MLP; each pre-norm and residual (section 3).

    The class token takes no part along time. In space every frame has a copy of it, and what the copies gather is averaged.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.time_norm, self.time = nn.LayerNorm(dim, EPS), SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.temporal_fc = nn.Linear(dim, dim)
        self.space_norm, self.space = nn.LayerNorm(dim, EPS), SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, EPS), MLP(dim, 4 * dim)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """`x (B, 1 + T*L, D)`: class token, then the patches frame by frame."""
        B, T = len(x), frames
        cls, x = x[:, :1], x[:, 1:].unflatten(1, (T, -1))  # (B, 1, D), (B, T, L, D)
        along = x.transpose(1, 2).flatten(0, 1)  # (B*L, T, D)
        along = self.temporal_fc(self.time(self.time_norm(along)))
        x = x + along.unflatten(0, (B, -1)).transpose(1, 2)  # (B, T, L, D)

        inside = torch.cat([cls[:, None].expand(-1, T, -1, -1), x], dim=2).flatten(0, 1)  # (B*T, 1 + L, D)
        inside = self.space(self.space_norm(inside)).unflatten(0, (B, T))  # (B, T, 1 + L, D)
        cls, x = cls + inside[:, :, 0].mean(1, keepdim=True), x + inside[:, :, 1:]

        x = torch.cat([cls, x.flatten(1, 2)], dim=1)  # (B, 1 + T*L, D)
        return x + self.mlp(self.mlp_norm(x))


class TimeSformer(nn.Module):
    """Video `(B, 3, T, H, W)` in [-1, 1] to logits `(B, classes)`."""

    def __init__(self, config: TimeSformerConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.embed = ImageTokens(D, config.size, config.patch)
        self.times = nn.Parameter(torch.zeros(config.frames, D))
        self.blocks = nn.ModuleList(DividedBlock(D, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, EPS)
        self.head = nn.Linear(D, config.classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        Normal with deviation 0.02; the time table and each block's `temporal_fc`, and these alone, are zero
        (facebookresearch/TimeSformer, models/vit.py).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for block in self.blocks:
            if isinstance(block, DividedBlock):
                nn.init.zeros_(block.temporal_fc.weight)
        assert self.embed.cls is not None, "the frames have a class token"
        nn.init.trunc_normal_(self.embed.cls, std=0.02)
        nn.init.trunc_normal_(self.embed.positions, std=0.02)
        nn.init.zeros_(self.times)

    def tokens(self, video: Tensor) -> Tensor:
        """The normed tokens after the last block, `(B, 1 + T*L, D)`: class token, then the patches frame by frame.

        Raises UserError when the video has another number of frames or its sides do not divide into patches.
        """
        T = self.config.frames
        if video.ndim != 5 or video.shape[2] != T:
            raise UserError(f"this TimeSformer takes video (B, 3, {T}, H, W), got {tuple(video.shape)}; sample {T} frames")
        x = self.embed(fold_frames(video)).unflatten(0, (-1, T))  # (B, T, 1 + L, D)
        cls, x = x[:, 0, :1], (x[:, :, 1:] + self.times[:, None]).flatten(1, 2)  # (B, 1, D), (B, T*L, D)
        x = torch.cat([cls, x], dim=1)  # (B, 1 + T*L, D)
        for block in self.blocks:
            x = block(x, T)
        return self.norm(x)

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.tokens(video)[:, 0])


def tiny(config: TimeSformerConfig) -> TimeSformerConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=32, depth=2, heads=4, frames=3, size=16, patch=8, classes=5)


def example(config: TimeSformerConfig, batch: int = 1) -> tuple[Tensor]:
    """Random inputs for `forward`: videos of the config's size."""
    return (torch.randn(batch, 3, config.frames, config.size, config.size),)  # (B, 3, T, H, W)


def stated(config: TimeSformerConfig) -> str:
    """The input that `example` makes, in words."""
    return f"3 x {config.frames} x {config.size} x {config.size} video (C, T, H, W), patch {config.patch}"


# The paper's default: 8 frames at 224 pixels on ViT-B/16.
SIZES: dict[str, TimeSformerConfig] = {"B": TimeSformerConfig()}
