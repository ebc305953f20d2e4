"""Bricks of convolutional image networks: what DDPM's U-Net, Stable Diffusion's and its autoencoder are made of.

Group norm and SiLU before every convolution (Ho et al. 2020, 2006.11239, appendix B); the spatial transformer carries text
into a U-Net (Rombach et al. 2022, 2112.10752, appendix E.2.1). Statistics are of one image, so that frames which are folded
into the batch stay apart. Nothing here starts at zero: which last layers do is said by the network.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.types import Condition
from tubelet.nn.attention import CrossAttention, SelfAttention


class ResBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, around a skip, over `(B, C, H, W)`; a 1x1 convolution where the width changes.

    `step` is the width of an embedding that shifts every channel between the two convolutions; 0 takes none.
    """

    def __init__(
        self, width: int, out: int, *, step: int = 0, groups: int = 32, eps: float = 1e-6, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, width, eps)
        self.conv_in = nn.Conv2d(width, out, 3, padding=1)
        self.step = nn.Linear(step, out) if step else None
        self.norm_out = nn.GroupNorm(groups, out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """`x (B, C, H, W)` and, where the block has one, the embedding `step (B, D)` behind its SiLU."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        if self.step is not None and step is not None:
            h = h + self.step(step)[:, :, None, None]
        return self.skip(x) + self.conv_out(self.dropout(F.silu(self.norm_out(h))))


class CellAttention(nn.Module):
    """Self-attention among the cells of an image behind a group norm, as a residual, over `(B, C, H, W)`."""

    def __init__(self, width: int, heads: int = 1, *, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps)
        self.attention = SelfAttention(width, heads, qk_norm=False, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.norm(x).flatten(2).transpose(1, 2))  # (B, H*W, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class GEGLU(nn.Module):
    """Gated MLP: `down(value * gelu(gate))`, both from one linear (Shazeer 2020, 2002.05202, eq. 6)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """The cells of an image as tokens that look at each other, then at a context, as a residual, over `(B, C, H, W)`.

    Group norm, a linear, one block of self-attention, cross-attention and GEGLU, a linear. Published as 1x1 convolutions, the
    two linears are the same map. Projections to queries, keys and values have no bias, those back have one.
    """

    def __init__(self, width: int, heads: int, context: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.into = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, qk_norm=False)
        self.attention.out = nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width)
        self.cross = CrossAttention(width, heads, context, qk_norm=False)
        self.cross.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = GEGLU(width, 4 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Condition) -> Tensor:
        """`x (B, C, H, W)`; token states `(B, M, context)` and their mask, True where a token may be looked at."""
        h = self.into(self.norm(x).flatten(2).transpose(1, 2))  # (B, H*W, C)
        h = h + self.attention(self.attention_norm(h))
        h = h + self.cross(self.cross_norm(h), context.states, context.mask)
        h = h + self.mlp(self.mlp_norm(h))
        return x + self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """Half the height and width by a 3x3 convolution of stride 2.

    With `corner` zeros are appended below and on the right only, as TensorFlow pads even sides; without, on all sides.
    """

    def __init__(self, width: int, corner: bool) -> None:
        super().__init__()
        self.corner = corner
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=0 if corner else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.corner else x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Twice the height and width: every cell four times, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)
