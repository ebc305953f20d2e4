"""Transformer blocks: the spacetime transformer's, and the plain one of everything that came before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tubelet.nn.attention import CrossAttention, Rope, SelfAttention
from tubelet.nn.conditioning import gated, modulate
from tubelet.nn.mlp import MLP, SwiGLU
from tubelet.nn.norms import RMSNorm
from tubelet.nn.packing import Segments


def swiglu_width(dim: int) -> int:
    """Hidden width of a SwiGLU with about the parameters of a four-fold MLP: 8/3 of `dim`, to the nearest multiple of 64."""
    return max(64, round(dim * 8 / 3 / 64) * 64)


class SpacetimeBlock(nn.Module):
    """Self-attention over all tokens of a clip, cross-attention to text, gated MLP; no biases.

    Pre-norm residuals modulated and gated by adaLN (DiT, Peebles & Xie 2023, section 3.2); the text residual has neither
    and starts at zero through its output projection (PixArt-alpha, Chen et al. 2023, section 2.3). With `cross=False` there is
    no text residual: text tokens then stand in the sequence itself.

    Text has no rotation, it stands at the origin, so what a text token says can differ by place ("left", "first"): relative
    positions alone tell a token in a clip of pure noise nothing about where it is.

    The residual stream and the modulation are float32, whatever the precision of the weights or of autocast.
    """

    def __init__(self, dim: int, heads: int, cross: bool = True) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(6 * dim))
        self.attention_norm = RMSNorm(dim, affine=False)
        self.attention = SelfAttention(dim, heads)
        self.cross_norm = RMSNorm(dim) if cross else None
        self.cross = CrossAttention(dim, heads, dim) if cross else None
        self.mlp_norm = RMSNorm(dim, affine=False)
        self.mlp = SwiGLU(dim, swiglu_width(dim))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rope: Rope,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        segments: Segments | None = None,
        context_segments: Segments | None = None,
    ) -> Tensor:
        """`x (B, L, D)` float32; `modulation (B, G, 6D)`, shared by all blocks.

        With cross-attention: `context (B, M, D)` and its `mask (B, M)`; without: `mask (B, L)` of the sequence, or None. A pack
        is one row (B = 1) with `segments` and, with cross-attention, `context_segments` in place of masks.
        """
        dtype = self.mlp.down.weight.dtype
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + self.modulation.float()).chunk(6, dim=-1)
        h = modulate(self.attention_norm(x), shift_a, scale_a).to(dtype)
        sequence = mask[:, None, None, :] if self.cross is None and mask is not None else None  # (B, 1, 1, L)
        x = gated(x, gate_a, self.attention(h, rope, sequence, segments=segments))
        if self.cross is not None and self.cross_norm is not None and context is not None:
            x = x + self.cross(self.cross_norm(x).to(dtype), context, mask, rope, context_segments)
        h = modulate(self.mlp_norm(x), shift_m, scale_m).to(dtype)
        return gated(x, gate_m, self.mlp(h))


class EncoderBlock(nn.Module):
    """Pre-norm residual block: self-attention, then MLP, each behind a layer norm, with biases (ViT, Dosovitskiy et al. 2021,
    equations 2 and 3; CLIP, Radford et al. 2021).

    `hidden` 0 is four widths. `activation` as in `MLP.approximate`. `qk_norm` as in NaViT (Dehghani et al. 2023, section 3.1).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int = 0,
        *,
        eps: float = 1e-6,
        activation: str = "none",
        qk_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.attention = SelfAttention(dim, heads, qk_norm=qk_norm, bias=True)
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.mlp = MLP(dim, hidden or 4 * dim, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False, segments: Segments | None = None) -> Tensor:
        """`x (B, L, D)`; `mask`, `causal` and `segments` as in `nn.attention.attention`."""
        h = self.attention(self.attention_norm(x), mask=mask, causal=causal, segments=segments)
        x = x + self.dropout(h)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))
