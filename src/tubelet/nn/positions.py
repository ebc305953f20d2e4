"""Where a token is: n-D rotary embedding and fixed sin-cos tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def grid_positions(*sizes: int, device: torch.device | str | None = None) -> Tensor:
    """Coordinates of every cell of a grid, first axis slowest: `(T, H, W)` sizes give `(T*H*W, 3)` floats."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(sizes))  # (L, axes)


class RotaryEmbedding(nn.Module):
    """Rotary positions over several axes (RoFormer, eq. 15, one share of the head per axis), so no size is built in.

    `axes` are even head widths per coordinate, e.g. (16, 24, 24) for (t, h, w) in a 64-wide head; channels beyond their
    sum stay unrotated. Positions are floats: fractions and offsets are allowed.
    """

    def __init__(self, axes: tuple[int, ...], base: float = 100.0) -> None:
        super().__init__()
        assert all(a % 2 == 0 for a in axes), "each axis takes an even number of channels"
        self.axes, self.base = axes, base

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions (..., L, axes)` -> cos and sin, each `(..., 1, L, sum(axes) / 2)`, to broadcast over heads."""
        angles = []
        for i, width in enumerate(self.axes):
            exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
            angles.append(positions[..., i : i + 1].float() * self.base**-exponent)
        angle = torch.cat(angles, dim=-1).unsqueeze(-3)  # (..., 1, L, sum/2)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs of `x (B, N, L, d)` by the angles of `rope`; a pair is (i, i + half) of the rotated share."""
    cos, sin = (r.to(x.dtype) for r in rope)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def sincos(dim: int, positions: Tensor, max_period: float = 10_000.0) -> Tensor:
    """Fixed embedding of scalars `(...)` as `(..., dim)`: sines, then cosines (Vaswani et al. 2017, section 3.5)."""
    assert dim % 2 == 0, "a sin-cos embedding has an even width"
    omega = max_period ** (-torch.arange(dim // 2, device=positions.device, dtype=torch.float32) / (dim // 2))
    angle = positions.float()[..., None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (..., dim)
