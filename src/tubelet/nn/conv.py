"""Convolution over frames: space-to-depth, residual 2-D blocks and causal mixing in time, without any Conv3d.

Frames are folded into the batch, `(B*T, C, H, W)` in channels-last memory, so that CPU and GPU both end in matrix products.
Everything in time is a linear layer over the current and earlier frames; no statistic crosses frames (MAGVIT-v2, Yu et al.
2023, section 3.2: causal 3-D CNN; normalising over time would break its causality).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stream:
    """What causal layers remember between chunks of one clip: `begun` after the first chunk, `states` per layer."""

    def __init__(self) -> None:
        self.begun = False
        self.states: dict[nn.Module, Any] = {}


def space_to_depth(x: Tensor, size: int) -> Tensor:
    """`(N, C, H, W)` to `(N, size*size*C, H/size, W/size)` in channels-last memory: each cell holds its patch (y, x, C)."""
    N, C, H, W = x.shape
    x = x.reshape(N, C, H // size, size, W // size, size).permute(0, 2, 4, 3, 5, 1)  # (N, h, w, y, x, C)
    return x.reshape(N, H // size, W // size, size * size * C).permute(0, 3, 1, 2)  # (N, yxC, h, w)


def depth_to_space(x: Tensor, size: int) -> Tensor:
    """The inverse of `space_to_depth`: `(N, size*size*C, h, w)` to `(N, C, h*size, w*size)`."""
    N, depth, h, w = x.shape
    C = depth // (size * size)
    x = x.permute(0, 2, 3, 1).reshape(N, h, w, size, size, C).permute(0, 1, 3, 2, 4, 5)  # (N, h, y, w, x, C)
    return x.reshape(N, h * size, w * size, C).permute(0, 3, 1, 2)  # (N, C, H, W)


def fold_frames(x: Tensor) -> Tensor:
    """`(B, C, T, H, W)` to `(B*T, C, H, W)`."""
    B, C, T, H, W = x.shape
    return x.transpose(1, 2).reshape(B * T, C, H, W)


def unfold_frames(x: Tensor, batch: int) -> Tensor:
    """`(B*T, C, H, W)` to `(B, C, T, H, W)`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class ResidualBlock(nn.Module):
    """`x + conv(silu(conv(norm(x))))`, 3x3, over `(N, C, H, W)`; the norm is over channels, cell by cell.

    Layer norm, not RMS norm: torch has a fused kernel of it on every device, on a CPU four times as fast.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.up = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.down(F.silu(self.up(normed)))


class CausalMix(nn.Module):
    """Adds to every cell a linear map of the same cell in the current and the `kernel - 1` earlier frames.

    Zero at the start, so that a new network treats every frame alone; before the first frame there are zeros.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        assert kernel >= 2, "a kernel of one frame has nothing to mix"
        self.kernel = kernel
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mix = nn.Linear(kernel * width, width, bias=False)
        nn.init.zeros_(self.mix.weight)

    def forward(self, x: Tensor, batch: int, stream: Stream | None = None) -> Tensor:
        """x `(B*T, C, H, W)`; `stream` carries the last frames of the chunk before."""
        cells = x.permute(0, 2, 3, 1)  # (B*T, H, W, C)
        frames = self.norm(cells).unflatten(0, (batch, -1))  # (B, T, H, W, C)
        T = frames.shape[1]
        earlier = stream.states.get(self) if stream is not None else None
        if earlier is None:
            earlier = frames.new_zeros(batch, self.kernel - 1, *frames.shape[2:])
        frames = torch.cat([earlier, frames], dim=1)  # (B, kernel-1+T, H, W, C)
        if stream is not None:
            stream.states[self] = frames[:, T:]
        windows = torch.cat([frames[:, i : i + T] for i in range(self.kernel)], dim=-1)  # (B, T, H, W, kernel*C)
        return x + self.mix(windows).flatten(0, 1).permute(0, 3, 1, 2)


class MergeFrames(nn.Module):
    """`1 + stride*k` frames to `1 + k`: frame 0 by a linear map of its own, then each group of `stride` frames by another."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.group = nn.Linear(stride * width, out)
        # With stride 1 a group is a frame: one map for all, so that a frame's code does not depend on where it stands.
        self.first = nn.Linear(width, out) if stride > 1 else None

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x `(B, T, ..., C)` to `(B, T', ..., out)`; in a stream that has begun, T is a multiple of the stride."""
        if self.first is None:
            return self.group(x)
        merged = []
        if stream is None or not stream.begun:
            merged.append(self.first(x[:, :1]))
            x = x[:, 1:]
        if x.shape[1]:
            groups = x.unflatten(1, (-1, self.stride)).movedim(2, -2).flatten(-2)  # (B, k, ..., stride*C)
            merged.append(self.group(groups))
        return torch.cat(merged, dim=1)


class ExpandFrames(nn.Module):
    """`1 + k` latent frames to `1 + stride*k`: the mirror of `MergeFrames`."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.group = nn.Linear(width, stride * out)
        self.first = nn.Linear(width, out) if stride > 1 else None

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x `(B, T', ..., C)` to `(B, T, ..., out)`."""
        if self.first is None:
            return self.group(x)
        expanded = []
        if stream is None or not stream.begun:
            expanded.append(self.first(x[:, :1]))
            x = x[:, 1:]
        if x.shape[1]:
            groups = self.group(x).unflatten(-1, (self.stride, -1))  # (B, k, ..., stride, out)
            expanded.append(groups.movedim(-2, 2).flatten(1, 2))  # (B, stride*k, ..., out)
        return torch.cat(expanded, dim=1)
