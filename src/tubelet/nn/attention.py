"""Attention: one entry for every kind, and the two modules that most rooms need.

Backends are chosen per device, dtype and shape by `runtime` (docs/runtime.md), which calls `use_backend` from outside;
the mathematics stays here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.nn.norms import RMSNorm
from tubelet.nn.packing import Segments
from tubelet.nn.positions import rotate

Rope = tuple[Tensor, Tensor]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    segments: Segments | None = None,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    q `(B, N, L, d)`; k, v `(B, N, M, d)`; `mask` boolean, broadcastable to `(B, N, L, M)`, True where a query may look.
    `causal`: query i sees keys j <= i + M - L, so that a cache of earlier keys needs no mask.
    `segments`: the row (B = 1) is a pack, each sample's queries see its own keys; neither mask nor causal goes with it.
    A query that may look nowhere yields zeros, never NaN. Returns `(B, N, L, d)`.
    """
    if k.shape[-2] == 0:
        return torch.zeros_like(q)
    if segments is not None:
        assert mask is None, "a pack is told apart by its segments alone"
        assert not causal, "a pack is told apart by its segments alone"
        return _pack_backend(q, k, v, segments)
    if causal:
        length, keys = q.shape[-2], k.shape[-2]
        past = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)  # (L, M)
        mask = past if mask is None else mask & past
    return _backend(q, k, v, mask)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The reference backend: torch's own fused kernel."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    # A row without any key is opened and its result dropped: some kernels' backward turns such a row into NaN.
    some = mask.any(-1, keepdim=True)
    return torch.where(some, F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some), 0.0)


def by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """A pack sample by sample, neighbours of equal lengths in one call: no product between samples is ever computed."""
    assert q.shape[0] == 1, "a pack is one row"
    assert (sum(segments.queries), sum(segments.keys)) == (q.shape[2], k.shape[2]), "segments do not fill the row"
    pieces = []
    for n, where_q, one_q, where_k, one_k in segments.runs():
        if not one_q:
            continue
        if not one_k:
            pieces.append(torch.zeros_like(q[:, :, where_q]))
            continue
        q_rows, k_rows, v_rows = (
            x[0, :, where].unflatten(1, (n, one)).transpose(0, 1)  # (n, N, one, d)
            for x, where, one in ((q, where_q, one_q), (k, where_k, one_k), (v, where_k, one_k))
        )
        out = _backend(q_rows, k_rows, v_rows, None)  # (n, N, one_q, d)
        pieces.append(out.transpose(0, 1).flatten(1, 2)[None])  # (1, N, n*one_q, d)
    return torch.cat(pieces, dim=2) if pieces else torch.zeros_like(q)


def by_mask(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """A pack in one call under its block-diagonal mask: the reference, which computes every product between samples, too."""
    assert q.shape[0] == 1, "a pack is one row"
    if k.shape[-2] == 0:
        return torch.zeros_like(q)
    return _backend(q, k, v, segments.mask(q.device))


Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
PackBackend = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
_backend: Backend = fused
_pack_backend: PackBackend = by_segment


def use_backend(backend: Backend) -> None:
    """Replace how attention is computed in this process; `runtime` calls it, the result stays the same."""
    global _backend
    _backend = backend


def use_pack_backend(backend: PackBackend) -> None:
    """The same for packs."""
    global _pack_backend
    _pack_backend = backend


class SelfAttention(nn.Module):
    """Multi-head self-attention over `(B, L, D)`, with optional QK-norm (Dehghani et al. 2023) and rotary positions."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = True, bias: bool = False) -> None:
        super().__init__()
        assert dim % heads == 0, f"width {dim} does not divide into {heads} heads"
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rope: Rope | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        past: KeyValues | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """`past` (streaming): keys and values of earlier positions; this call's are appended to it in place. `segments`: x is a
        pack."""
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, N, L, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if past is not None:
            k, v = past.append(k, v)
        out = attention(q, k, v, mask=mask, causal=causal, segments=segments)
        return self.out(out.transpose(1, 2).reshape(B, L, D))


class CrossAttention(nn.Module):
    """Queries from `x (B, L, D)`, keys and values from `context (B, M, context_dim)`; `mask (B, M)`, True where real."""

    def __init__(self, dim: int, heads: int, context_dim: int, qk_norm: bool = True, bias: bool = False) -> None:
        super().__init__()
        assert dim % heads == 0, f"width {dim} does not divide into {heads} heads"
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor | None = None,
        rope: Rope | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """`rope` turns the queries alone: the context then stands at the origin, and a query knows where it is from it.
        `segments`: x and context are packs."""
        B, L, D = x.shape
        M = context.shape[1]
        d = D // self.heads
        q = self.q(x).view(B, L, self.heads, d).transpose(1, 2)  # (B, N, L, d)
        k, v = self.kv(context).view(B, M, 2, self.heads, d).permute(2, 0, 3, 1, 4)  # 2 x (B, N, M, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q = rotate(q, rope)
        out = attention(q, k, v, mask=None if mask is None else mask[:, None, None, :], segments=segments)
        return self.out(out.transpose(1, 2).reshape(B, L, D))


class KeyValues:
    """A growing cache of keys and values, `(B, N, M, d)`: what makes a causal layer stream exactly."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat([self.k, k], dim=-2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=-2)
        return self.k, self.v
