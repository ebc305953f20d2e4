"""Attention inside windows of a grid of tokens (Swin, Liu et al. 2021, section 3.2; W.A.L.T, Gupta et al. 2023, section 3.2).

A window is `(t, h, w)` tokens; windows tile the grid without overlap. A sequence `(B, L, D)` runs over the grid time slowest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.nn.attention import attention
from tubelet.nn.norms import RMSNorm
from tubelet.nn.patch import Grid
from tubelet.nn.window_rows import from_windows, to_windows


def relative_index(window: Grid, device: torch.device | str | None = None) -> Tensor:
    """Which row of a table of offsets belongs to query i and key j of a window, `(l, l)` in [0, (2t-1)(2h-1)(2w-1))."""
    axes = [torch.arange(n, device=device) for n in window]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)  # (l, 3)
    index = torch.zeros(len(places), len(places), dtype=torch.long, device=device)
    for axis, n in enumerate(window):
        index = index * (2 * n - 1) + places[:, None, axis] - places[None, :, axis] + n - 1
    return index


class WindowAttention(nn.Module):
    """Self-attention inside windows, with QK-norm (Dehghani et al. 2023) and a learned bias per head and offset.

    The biases are zero at the start. In a window that spans time an image attends by the identity (W.A.L.T, section 3.2): every
    token gets its own value, since there is nothing to mix.
    """

    def __init__(self, dim: int, heads: int, window: Grid) -> None:
        super().__init__()
        assert dim % heads == 0, f"width {dim} does not divide into {heads} heads"
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.offset_bias = nn.Parameter(torch.zeros(heads, offsets))

    def forward(self, x: Tensor, grid: Grid, index: Tensor) -> Tensor:
        """x `(B, L, D)` over `grid`; `index` is `relative_index(window)`, which all layers of a model share."""
        D = x.shape[-1]
        if grid[0] == 1 and self.window[0] > 1:
            return self.out(F.linear(x, self.qkv.weight[2 * D :], self.qkv.bias[2 * D :]))
        whole = self.qkv(x).unflatten(1, grid)  # (B, T, H, W, 3D)
        rows = to_windows(whole, self.window)  # (B*n, l, 3D)
        q, k, v = rows.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B*n, N, l, d)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = self.offset_bias[:, index][None].to(q.dtype)  # (1, N, l, l)
        # Not `nn.attention`, whose masks are boolean: this one is added to the scores.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)  # (B*n, l, D)
        return self.out(from_windows(out, self.window, torch.Size((len(x), *grid, D))).flatten(1, 3))  # (B, L, D)


class WindowCrossAttention(nn.Module):
    """Each token looks at the tokens of its window and at a text: both are keys and values of one softmax, with QK-norm."""

    def __init__(self, dim: int, heads: int, window: Grid) -> None:
        super().__init__()
        assert dim % heads == 0, f"width {dim} does not divide into {heads} heads"
        self.heads, self.window = heads, window
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm, self.k_norm = RMSNorm(dim // heads), RMSNorm(dim // heads)

    def forward(self, x: Tensor, grid: Grid, text: Tensor, mask: Tensor) -> Tensor:
        """x `(B, L, D)` over `grid`, `text (B, M, D)` and its `mask (B, M)`, True where a token is real."""
        (B, L, D), (t, h, w) = x.shape, self.window
        n = L // (t * h * w)
        whole = torch.cat([self.q(x), self.kv(x)], dim=-1).unflatten(1, grid)  # (B, T, H, W, 3D)
        rows = to_windows(whole, self.window)  # (B*n, l, 3D)
        q, k, v = rows.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B*n, N, l, d)
        said = self.kv(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (2, B, N, M, d)
        said_k, said_v = said.repeat_interleave(n, dim=1)  # 2 x (B*n, N, M, d)
        k, v = torch.cat([k, said_k], dim=2), torch.cat([v, said_v], dim=2)  # (B*n, N, l + M, d)
        seen = F.pad(mask, (t * h * w, 0), value=True).repeat_interleave(n, dim=0)[:, None, None]  # (B*n, 1, 1, l + M)
        out = attention(self.q_norm(q), self.k_norm(k), v, mask=seen).transpose(1, 2).flatten(2)  # (B*n, l, D)
        return self.out(from_windows(out, self.window, torch.Size((B, *grid, D))).flatten(1, 3))  # (B, L, D)
