"""Bricks of convolutional image networks: what DDPM's U-Net, Stable Diffusion's and its autoencoder are made of.

Group norm and SiLU before every convolution (Ho et al. 2020, 2006.11239, appendix B); the spatial transformer carries text
into a U-Net (Rombach et al. 2022, 2112.10752, appendix E.2.1), `JointCellAttention` does without a second attention (Nichol et
al. 2021, 2112.10741, section 4.1). Statistics are of one image, so that frames which are folded into the batch stay apart.
Nothing here starts at zero: which last layers do is said by the network.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.attention import CrossAttention, SelfAttention, attention


def check_pictures(x: Tensor, t: Tensor, channels: int, stride: int) -> None:
    """Raises UserError unless a U-Net of `channels` that halves its input to a `stride`-th can take `x (B, C, H, W)` and steps
    `t (B,)`."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise UserError(f"this U-Net takes (B, {channels}, H, W), got {tuple(x.shape)}; rearrange the images")
    if min(x.shape[2:]) < stride or x.shape[2] % stride or x.shape[3] % stride:
        raise UserError(
            f"sides must be positive multiples of {stride}, got {x.shape[2]} x {x.shape[3]}; resize or crop the images"
        )
    if t.shape != (len(x),):
        raise UserError(f"{len(x)} images need {len(x)} step numbers, got {tuple(t.shape)}; give one per image")


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


class ScaledResBlock(nn.Module):
    """A residual block whose step scales and shifts what the second norm leaves, and which may halve or double the sides.

    Diffusion Models Beat GANs (Dhariwal & Nichol 2021, 2105.05233, section 3, with BigGAN's resampling): the mean of 2 x 2
    cells, or every cell four times, behind the first activation and on the skip.
    """

    def __init__(
        self,
        width: int,
        out: int,
        step: int,
        *,
        groups: int = 32,
        dropout: float = 0.0,
        resample: Literal["", "down", "up"] = "",
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = nn.GroupNorm(groups, width)
        self.conv_in = nn.Conv2d(width, out, 3, padding=1)
        self.step = nn.Linear(step, 2 * out)
        self.norm_out = nn.GroupNorm(groups, out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """`x (B, C, H, W)`, the embedding `step (B, D)` behind its SiLU, to `(B, out, H, W)`, sides halved or doubled."""
        h = self.conv_in(self._resampled(F.silu(self.norm_in(x))))
        scale, shift = self.step(step)[:, :, None, None].chunk(2, dim=1)  # (B, out, 1, 1) each
        h = self.norm_out(h) * (1 + scale) + shift
        return self.skip(self._resampled(x)) + self.conv_out(self.dropout(F.silu(h)))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)  # (B, C, H/2, W/2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample else x  # (B, C, 2H, 2W)


class JointCellAttention(nn.Module):
    """The cells of an image look at each other and at a context in one softmax, as a residual, over `(B, C, H, W)`."""

    def __init__(self, width: int, heads: int, context: int, groups: int = 32) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} does not divide into {heads} heads"
        self.heads = heads
        self.norm = nn.GroupNorm(groups, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.context = nn.Linear(context, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Condition) -> Tensor:
        """`x (B, C, H, W)`; token states `(B, M, context)` and their mask, True where a token may be looked at."""
        B, C, H, W = x.shape
        cells = self.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        q, k, v = self.qkv(cells).view(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, N, H*W, d)
        kv = self.context(context.states).view(B, context.states.shape[1], 2, self.heads, -1)  # (B, M, 2, N, d)
        told_k, told_v = kv.permute(2, 0, 3, 1, 4)  # 2 x (B, N, M, d)
        seen = F.pad(context.mask, (0, H * W), value=True)[:, None, None]  # (B, 1, 1, M + H*W)
        h = attention(q, torch.cat([told_k, k], dim=2), torch.cat([told_v, v], dim=2), mask=seen)  # (B, N, H*W, d)
        return x + self.out(h.transpose(1, 2).reshape(B, H * W, C)).transpose(1, 2).unflatten(2, (H, W))


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
