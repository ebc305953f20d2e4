"""Position-wise feed-forward layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """Gated MLP without biases: `down(silu(gate(x)) * up(x))` (Shazeer 2020, eq. 6). `hidden` is usually 8/3 of `dim`."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MLP(nn.Module):
    """Two linears around a GELU, as in ViT, DiT and CLIP.

    `approximate` "none" is exact, "tanh" Hendrycks & Gimpel's, "quick" CLIP's `x * sigmoid(1.702 x)`.
    """

    def __init__(self, dim: int, hidden: int, approximate: str = "none", bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(
            h * torch.sigmoid(1.702 * h) if self.approximate == "quick" else F.gelu(h, approximate=self.approximate)
        )
