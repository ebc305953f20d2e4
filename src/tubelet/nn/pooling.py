"""Attentional pooling: learned queries read a set of tokens through one cross-attention.

Multi-head attention pooling (Set Transformer, Lee et al. 2019, section 3.2), as CoCa (Yu et al. 2022, section 3.2) and
NaViT (Dehghani et al. 2023, section 2.1) use it. There is no norm and no MLP here: what stands before and after a pooler
differs from paper to paper and is said in the room.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tubelet.nn.attention import CrossAttention
from tubelet.nn.packing import Segments


class AttentionPool(nn.Module):
    """Tokens `(B, M, C)` to `queries` vectors of width `dim`, however many tokens there are.

    `context_dim` is C, by default `dim`; `qk_norm` and `bias` as in `CrossAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        queries: int = 1,
        context_dim: int | None = None,
        qk_norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        assert queries >= 1, "a pooler has at least one query"
        self.queries = nn.Parameter(torch.randn(queries, dim) * dim**-0.5)
        self.attention = CrossAttention(dim, heads, dim if context_dim is None else context_dim, qk_norm, bias)

    def forward(self, context: Tensor, mask: Tensor | None = None, segments: Segments | None = None) -> Tensor:
        """`context (B, M, C)` and its `mask (B, M)`, True where real, to `(B, queries, dim)`.

        `segments`: the context is a pack (B = 1) whose samples have `segments.keys` tokens each; every sample gets queries of
        its own, `(1, S*queries, dim)`, sample after sample. A sample without tokens yields what the output bias says.
        """
        samples = len(context) if segments is None else len(segments.keys)
        # A copy, not a view: under `no_grad` a view of a parameter still claims a gradient, which breaks torch's FLOP counter.
        x = self.queries.repeat(samples, 1, 1)  # (B or S, queries, dim)
        if segments is None:
            return self.attention(x, context, mask)
        each = Segments((x.shape[1],) * samples, segments.keys)
        return self.attention(x.flatten(0, 1)[None], context, mask, segments=each)  # (1, S*queries, dim)
