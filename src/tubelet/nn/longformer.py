"""Attention of cost linear in length: a window around every token, and one token that sees and is seen by all
(Longformer, Beltagy et al. 2020, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.nn.attention import attention
from tubelet.nn.mlp import MLP


def window_attention(q: Tensor, k: Tensor, v: Tensor, global_k: Tensor, global_v: Tensor, reach: int) -> Tensor:
    """Query i sees keys i - reach ... i + reach and all global keys; softmax over both together.

    q, k, v `(B, N, L, d)`; global_k, global_v `(B, N, G, d)`. Computed by chunks of 2 * reach queries against the 4 * reach
    keys that they can see, so that cost and memory grow with L, not its square. Returns `(B, N, L, d)`.
    """
    B, _, L, _ = q.shape
    chunk = 2 * reach
    n = -(-L // chunk)
    tail = n * chunk - L
    q = F.pad(q, (0, 0, 0, tail)).unflatten(2, (n, chunk)).transpose(1, 2).flatten(0, 1)  # (B*n, N, chunk, d)

    def seen(x: Tensor, everywhere: Tensor) -> Tensor:
        windows = F.pad(x, (0, 0, reach, reach + tail)).unfold(2, 2 * chunk, chunk).permute(0, 2, 1, 4, 3)
        return torch.cat([everywhere[:, None].expand(-1, n, -1, -1, -1), windows], dim=3).flatten(0, 1)  # (B*n, N, G+2chunk, d)

    key = torch.arange(2 * chunk, device=q.device) - reach  # (2chunk,) places relative to the chunk's first query
    near = (key - torch.arange(chunk, device=q.device)[:, None]).abs() <= reach  # (chunk, 2chunk)
    place = key + chunk * torch.arange(n, device=q.device)[:, None]  # (n, 2chunk)
    mask = near & ((place >= 0) & (place < L))[:, None]  # (n, chunk, 2chunk)
    mask = F.pad(mask, (global_k.shape[2], 0), value=True)[:, None].repeat(B, 1, 1, 1)  # (B*n, 1, chunk, G+2chunk)
    out = attention(q, seen(k, global_k), seen(v, global_v), mask=mask)  # (B*n, N, chunk, d)
    return out.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :L]  # (B, N, L, d)


class GlobalWindowAttention(nn.Module):
    """Windowed self-attention over `(B, 1 + L, D)`, whose token 0 is global and looks through projections of its own.

    `window` is even: half of it on each side, as in the public Longformer (transformers.LongformerModel).
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        assert dim % heads == 0, f"width {dim} does not divide into {heads} heads"
        assert window >= 2, f"a window of {window} has no half on each side"
        assert window % 2 == 0, f"a window of {window} has no half on each side"
        self.heads, self.reach = heads, window // 2
        self.qkv = nn.Linear(dim, 3 * dim)
        self.global_q = nn.Linear(dim, dim)
        self.global_kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, N, 1 + L, d)
        local = window_attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], k[:, :, :1], v[:, :, :1], self.reach)  # (B, N, L, d)
        q = self.global_q(x[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, 1, d)
        k, v = self.global_kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 2 x (B, N, 1 + L, d)
        out = torch.cat([attention(q, k, v), local], dim=2)  # (B, N, 1 + L, d)
        return self.out(out.transpose(1, 2).flatten(2))  # (B, 1 + L, D)


class LongformerBlock(nn.Module):
    """Post-norm residual block, as in BERT: the norm stands behind each sum, and there is no final one."""

    def __init__(self, dim: int, heads: int, hidden: int, window: int, dropout: float = 0.0, eps: float = 1e-12) -> None:
        super().__init__()
        self.attention, self.attention_norm = GlobalWindowAttention(dim, heads, window), nn.LayerNorm(dim, eps)
        self.mlp, self.mlp_norm = MLP(dim, hidden), nn.LayerNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, 1 + L, D)`, the global token first."""
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))
