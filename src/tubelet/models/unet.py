"""The U-Nets of DDPM and of Stable Diffusion: convolutions at falling resolutions and back, joined by skips.

After Denoising Diffusion Probabilistic Models (Ho et al. 2020, 2006.11239, appendix B): residual blocks with group norm, the
step number told to every block, self-attention where the image is small. High-Resolution Image Synthesis with Latent Diffusion
Models (Rombach et al. 2022, 2112.10752, section 3.3) moves it to latents and lets it look at text by cross-attention. One
network serves both: with `context` it is Stable Diffusion's, without it DDPM's, each with the conventions of its released code:

    DDPM                                              Stable Diffusion
    sines, then cosines; slowest wave 1 / 10000       cosines, then sines; slowest wave just above it
    attention among cells                             spatial transformers
    halving pads below and on the right               halving pads all sides
    norms with eps 1e-6                               norms of residual blocks with eps 1e-5

It knows no schedule: `t` is a number. What its output means, with two values per channel for learned variances (Nichol &
Dhariwal 2021, 2102.09672, section 3.1), is said by the objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.adaln_zero import timestep_waves
from tubelet.nn.image_blocks import CellAttention, Downsample, ResBlock, SpatialTransformer, Upsample, check_pictures


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a `UNet`. Raises UserError when they do not fit each other.

    Level k, 0 the finest, has `width * multipliers[k]` channels and `blocks` residual blocks on the way down, one more on the
    way up; each level after the first halves both sides. `attention` names the levels whose blocks are followed by attention,
    the middle always is. `context` is the width of the tokens that cross-attention reads, 0 leaves it out. With
    `learn_sigma` the output has twice the channels: the noise, then the interpolation between the two bounds of the
    variance. `size` is the side of the input that is counted; other sides work too.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    heads: int = 1
    context: int = 0
    channels: int = 3
    learn_sigma: bool = False
    dropout: float = 0.1
    groups: int = 32
    size: int = 32

    def __post_init__(self) -> None:
        sizes = (self.width, self.blocks, self.heads, self.channels, self.groups, self.size, *self.multipliers)
        if min(sizes) < 1 or self.context < 0 or not self.multipliers:
            raise UserError("every size of a U-Net must be at least 1, and context at least 0; raise the one that is not")
        if self.width % self.groups or self.width % 2 or self.width < 4:
            raise UserError(
                f"width must be even, at least 4 and divide into {self.groups} groups, got {self.width}; try {4 * self.groups}"
            )
        if not set(self.attention) <= set(range(len(self.multipliers))):
            raise UserError(
                f"attention names levels 0 to {len(self.multipliers) - 1}, got {self.attention}; drop those that are not there"
            )
        attended = [self.multipliers[k] for k in self.attention] + [self.multipliers[-1]]
        if any(self.width * m % self.heads for m in attended):
            raise UserError(f"{self.heads} heads do not divide the width of every level with attention; try 1 or 8")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is a share in [0, 1), got {self.dropout}; 0.1 is DDPM's")
        if self.size % self.stride:
            raise UserError(f"size must be a multiple of {self.stride}, got {self.size}; try {8 * self.stride}")

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def stride(self) -> int:
        """What height and width must be multiples of."""
        return 2 ** (len(self.multipliers) - 1)


def ddpm_waves(t: Tensor, features: int) -> Tensor:
    """Step numbers `(B,)` as `(B, features)` float32: sines, then cosines, of t / 10000^(k / (half - 1)), k = 0 .. half - 1."""
    half = features // 2
    omega = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device, dtype=torch.float32) / (half - 1))
    angle = t.float()[:, None] * omega  # (B, half)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (B, features)


class Cell(nn.Module):
    """A residual block and, where the network attends, what looks around behind it."""

    def __init__(self, config: UNetConfig, width: int, out: int, attends: bool) -> None:
        super().__init__()
        c, eps = config, 1e-5 if config.context else 1e-6
        self.block = ResBlock(width, out, step=4 * c.width, groups=c.groups, eps=eps, dropout=c.dropout)
        self.attention: CellAttention | SpatialTransformer | None = None
        if attends and c.context:
            self.attention = SpatialTransformer(out, c.heads, c.context, c.groups)
        elif attends:
            self.attention = CellAttention(out, c.heads, groups=c.groups, eps=eps)

    def forward(self, x: Tensor, step: Tensor, context: Condition | None) -> Tensor:
        """`x (B, C, H, W)`, the step's embedding `(B, 4 * width)` behind its SiLU, the context where there is one."""
        x = self.block(x, step)
        if isinstance(self.attention, SpatialTransformer):
            assert context is not None, "the network has checked its inputs"
            return self.attention(x, context)
        return x if self.attention is None else self.attention(x)


class Down(nn.Module):
    """One level on the way down; `resample` leads to the next one, None at the last."""

    def __init__(self, cells: Sequence[Cell], resample: Downsample | None) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.resample = resample

    def forward(self, x: Tensor, step: Tensor, context: Condition | None) -> list[Tensor]:
        """Every map that is made here, the last of them what goes on."""
        made = []
        for cell in self.cells:
            x = cell(x, step, context)
            made.append(x)
        return made if self.resample is None else [*made, self.resample(x)]


class Up(nn.Module):
    """One level on the way up; `resample` leads to the next one, None at the last."""

    def __init__(self, cells: Sequence[Cell], resample: Upsample | None) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.resample = resample

    def forward(self, x: Tensor, skips: Sequence[Tensor], step: Tensor, context: Condition | None) -> Tensor:
        """`skips` are the maps of the way down, one per cell, in the order in which they are read."""
        for cell, skip in zip(self.cells, skips, strict=True):
            x = cell(torch.cat([x, skip], dim=1), step, context)
        return x if self.resample is None else self.resample(x)


class UNet(nn.Module):
    """Noised images or latents and step numbers in, with text where there is a context; noise out, zero before training."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = [c.width * m for m in c.multipliers]
        self.step_in = nn.Linear(c.width, 4 * c.width)
        self.step_out = nn.Linear(4 * c.width, 4 * c.width)
        self.conv_in = nn.Conv2d(c.channels, c.width, 3, padding=1)
        now, kept = c.width, [c.width]  # channels here, and of every map that a skip carries to the way up
        self.down = nn.ModuleList()
        for k, wide in enumerate(widths):
            cells = []
            for _ in range(c.blocks):
                cells.append(Cell(c, now, wide, k in c.attention))
                now = wide
                kept.append(now)
            last = k == len(widths) - 1
            self.down.append(Down(cells, None if last else Downsample(now, corner=not c.context)))
            kept += [] if last else [now]
        self.middle = nn.ModuleList([Cell(c, now, now, attends=True), Cell(c, now, now, attends=False)])
        self.up = nn.ModuleList()
        for k, wide in reversed(list(enumerate(widths))):
            cells = []
            for _ in range(c.blocks + 1):
                cells.append(Cell(c, now + kept.pop(), wide, k in c.attention))
                now = wide
            self.up.append(Up(cells, Upsample(now) if k else None))
        self.norm_out = nn.GroupNorm(c.groups, now, 1e-5 if c.context else 1e-6)
        self.conv_out = nn.Conv2d(now, c.out_channels, 3, padding=1)
        self.init_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """All cells in the order in which they run: what compilation and sharding wrap from outside."""
        return [module for module in self.modules() if isinstance(module, Cell)]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        DDPM's weights are uniform by fans in and out with zero biases, Stable Diffusion's what torch gives a layer; in both the
        last layer of every residual block and of every attention is zero, and so is the output.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)):
                module.reset_parameters()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not self.config.context:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last: list[nn.Conv2d | nn.Linear] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, CellAttention):
                if not self.config.context:
                    for part in module.attention.qkv.weight.chunk(3):  # three layers in the released code
                        nn.init.xavier_uniform_(part)
                last.append(module.attention.out)
            elif isinstance(module, SpatialTransformer):
                last.append(module.out)
            elif isinstance(module, ResBlock):
                last.append(module.conv_out)
        for layer in last:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, context: Condition | None = None, told: Tensor | None = None) -> Tensor:
        """`x (B, C, H, W)`, step numbers `t (B,)` in [0, 1000), fractions allowed, to `(B, C, H, W)`, or 2C channels.

        `context`: token states `(B, M, context)` and mask, exactly where the config has a context. Stable Diffusion was trained
        with all its 77 tokens in view, padding included: give it a mask of ones. `told (B, 4 * width)` is added to the step's
        embedding. Raises UserError when sides are no multiples of `config.stride` or the shapes do not belong together.
        """
        c, dtype = self.config, self.conv_in.weight.dtype
        self._check(x, t, context, told)
        waves = timestep_waves(t, c.width) if c.context else ddpm_waves(t, c.width)  # (B, width)
        step = self.step_out(F.silu(self.step_in(waves.to(dtype))))  # (B, 4 * width)
        # Every block reads the embedding behind a SiLU, so that it is taken once.
        step = F.silu(step if told is None else step + told.to(dtype))
        if context is not None:
            context = Condition(context.states.to(dtype), context.mask)
        h = self.conv_in(x.to(dtype))  # (B, width, H, W)
        skips = [h]
        for level in self.down:
            skips += level(h, step, context)
            h = skips[-1]
        for cell in self.middle:
            h = cell(h, step, context)
        for level in self.up:
            h = level(h, [skips.pop() for _ in range(c.blocks + 1)], step, context)
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)  # (B, C or 2C, H, W)

    def _check(self, x: Tensor, t: Tensor, context: Condition | None, told: Tensor | None) -> None:
        c = self.config
        check_pictures(x, t, c.channels, c.stride)
        if told is not None and told.shape != (len(x), 4 * c.width):
            raise UserError(f"what is told must be ({len(x)}, {4 * c.width}), got {tuple(told.shape)}; give one row per image")
        if context is None and c.context:
            raise UserError(f"this U-Net reads a context of width {c.context}; give it token states and their mask")
        if context is not None and not c.context:
            raise UserError("this U-Net reads no context; leave it out, or build it with one")
        if context is None:
            return
        states, mask = context.states.shape, context.mask.shape
        if len(states) != 3 or states[::2] != (len(x), c.context) or mask != states[:2]:
            raise UserError(
                f"the context must be ({len(x)}, M, {c.context}) with a mask ({len(x)}, M), got {tuple(states)} and "
                f"{tuple(mask)}; take the text encoder that this U-Net was built for"
            )


def tiny(config: UNetConfig) -> UNetConfig:
    """A config of the same shape, small enough for tests."""
    # Several channels in a group: alone in it, a channel would lose again whatever the step has shifted it by.
    return replace(config, width=32, groups=8, blocks=1, heads=min(config.heads, 2), context=min(config.context, 24), size=16)


def example(config: UNetConfig, batch: int = 1) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Condition]:
    """Random inputs for `forward` at the side of the config; a context has 77 tokens, all in view."""
    x, t = torch.randn(batch, config.channels, config.size, config.size), torch.rand(batch) * 999
    if not config.context:
        return x, t
    return x, t, Condition(torch.randn(batch, 77, config.context), torch.ones(batch, 77, dtype=torch.bool))


def stated(config: UNetConfig) -> str:
    """The input that `example` makes, in words."""
    tokens = f", 77 tokens of width {config.context}" if config.context else ""
    return f"{config.channels} x {config.size} x {config.size} (C, H, W){tokens}"


# DDPM: appendix B, CIFAR-10, attention at 16 x 16. Stable Diffusion: the configuration released with version 1.
SIZES: dict[str, UNetConfig] = {
    "DDPM-CIFAR": UNetConfig(),
    "SD-UNet": UNetConfig(
        width=320, multipliers=(1, 2, 4, 4), attention=(0, 1, 2), heads=8, context=768, channels=4, dropout=0.0, size=64
    ),
}
