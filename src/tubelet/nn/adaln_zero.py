"""The bricks of DiT (Peebles & Xie 2023, section 3.2) as its authors released them; its video descendants use them too.

Unlike in `nn.conditioning`, every block owns the linear that drives its norms, noise is told as a step number in [0, 1000) with
cosines before sines, and positions are fixed tables. All of it is what published weights were trained with.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.nn.attention import SelfAttention
from tubelet.nn.conditioning import AdaLN, gated, modulate
from tubelet.nn.mlp import MLP


def timestep_waves(t: Tensor, features: int = 256) -> Tensor:
    """Step numbers `(B,)`, fractions allowed, as `(B, features)` float32: cosines, then sines, of t / 10000^(k / half).

    k runs from 0 to half - 1, so the slowest wave does not reach 1 / 10000.
    """
    half = features // 2
    # In the released order of operations: at t = 999 another rounding of a frequency moves the angle by 1e-4.
    omega = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = t.float()[:, None] * omega  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (B, features)


class TimestepEmbedding(nn.Module):
    """Step numbers `(B,)` as `(B, D)`: 256 waves, then two linears around a SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(256, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.down(F.silu(self.up(timestep_waves(t).to(self.up.weight.dtype))))


def drop_labels(label: Tensor, classes: int, rng: torch.Generator, rate: float = 0.1) -> Tensor:
    """Labels `(B,)` of which each has become the null label `classes` with probability `rate`, for classifier-free guidance.

    Called by the training step, which owns the randomness: networks themselves drop nothing.
    """
    dropped = torch.rand(len(label), generator=rng, device=rng.device) < rate
    return torch.where(dropped.to(label.device), classes, label)


def sincos_line(dim: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed embeddings of the places 0 .. count - 1 on one axis, `(count, dim)` float32: sines, then cosines."""
    # In float64, as published tables were made, and therefore on the CPU: not every device has it.
    omega = 10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim // 2))
    angle = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * omega  # (count, dim / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float().to(device)  # (count, dim)


def sincos_plane(dim: int, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed embeddings of the places of a grid, `(rows * columns, dim)`, row after row; `dim` is a multiple of 4.

    The first half of the width says the column, the second the row.
    """
    x, y = sincos_line(dim // 2, columns, device), sincos_line(dim // 2, rows, device)
    return torch.cat([x.expand(rows, -1, -1), y[:, None].expand(-1, columns, -1)], dim=-1).flatten(0, 1)  # (L, dim)


class AdaLNBlock(nn.Module):
    """Self-attention, then MLP (tanh GELU); the condition sets shift and scale behind both layer norms.

    With `gates` (adaLN-Zero) it also sets the weight of both residuals, zero at the start, so that the block starts as the
    identity; without them it is plain adaLN. The residual stream and the modulation are float32, as in `SpacetimeBlock`.
    """

    def __init__(self, dim: int, heads: int, gates: bool = True) -> None:
        super().__init__()
        self.gates = gates
        self.adaln = AdaLN(dim, 6 if gates else 4)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, 4 * dim, "tanh")

    def forward(self, x: Tensor, c: Tensor, frames: int = 1) -> Tensor:
        """`x (B, L, D)` float32, condition `c (B, 1, D)`; tokens attend within each of `frames` equal runs of the sequence."""
        B, L, D = x.shape
        dtype = self.mlp.down.weight.dtype
        parts = self.adaln(c).chunk(6 if self.gates else 4, dim=-1)  # (B, 1, D) each
        first, second = parts[: len(parts) // 2], parts[len(parts) // 2 :]  # shift, scale and, with gates, the gate
        h = modulate(self.attention_norm(x), first[0], first[1]).to(dtype)
        h = self.attention(h.reshape(B * frames, L // frames, D)).reshape(B, L, D)
        x = gated(x, first[2], h) if self.gates else x + h
        h = self.mlp(modulate(self.mlp_norm(x), second[0], second[1]).to(dtype))
        return gated(x, second[2], h) if self.gates else x + h


def init_as_dit(model: nn.Module) -> None:
    """Fill every linear, layer norm and embedding of a model as DiT is released.

    Linears are Xavier uniform without bias, the linears of a `TimestepEmbedding` and all tables normal of deviation 0.02, gains
    one; what drives a gated `AdaLNBlock` is zero. A model zeroes its own head afterwards.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():  # again, since a parent comes before its children
        if isinstance(module, TimestepEmbedding):
            nn.init.normal_(module.up.weight, std=0.02)
            nn.init.normal_(module.down.weight, std=0.02)
        elif isinstance(module, AdaLNBlock) and module.gates:
            nn.init.zeros_(module.adaln.out.weight)
