"""GLIDE's U-Net, and what DALL-E 2 makes of it: a decoder that is told a CLIP embedding, and two upsamplers.

After GLIDE (Nichol et al. 2021, 2112.10741, section 4.1), which gives ADM (Dhariwal & Nichol 2021, 2105.05233) text: a
transformer's states join the keys of every attention, and the last of them the timestep. Hierarchical Text-Conditional Image
Generation with CLIP Latents (Ramesh et al. 2022, 2204.06125, section 2.1, appendix C) adds an image embedding to both, and two
upsamplers of convolutions alone that are shown the smaller picture, corrupted (`nn.degradation`), beside the noise.

The network knows no schedule: `t` is a number. With `learn_sigma` the output has twice the channels: the noise, then the
interpolation between the two bounds of the variance.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.adaln_zero import timestep_waves
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.image_blocks import CellAttention, JointCellAttention, ScaledResBlock, check_pictures


@dataclass(frozen=True)
class ADMConfig:
    """Sizes of an `ADM`. Raises UserError when they do not fit each other.

    Level k, 0 the finest, has `width * multipliers[k]` channels and `blocks` residual blocks on the way down, one more on the
    way up. `attention` names the levels whose blocks are followed by attention in heads of `head`; the middle attends where any
    level does. `context` is the width of the states that attention reads beside the cells, 0 for none. `seen` are the channels
    of a smaller picture that is shown, 0 for none. `size` is the side of the input that is counted.
    """

    width: int = 512
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (1, 2, 3)
    head: int = 64
    context: int = 0
    channels: int = 3
    seen: int = 0
    learn_sigma: bool = True
    groups: int = 32
    size: int = 64

    def __post_init__(self) -> None:
        sizes = (self.width, self.blocks, self.head, self.channels, self.groups, self.size, *self.multipliers)
        if min(sizes) < 1 or min(self.context, self.seen) < 0 or not self.multipliers:
            raise UserError("every size of a U-Net must be at least 1, context and seen at least 0; raise the one that is not")
        if self.width % self.groups or self.width % 2:
            raise UserError(f"width must be even and divide into {self.groups} groups, got {self.width}; try {4 * self.groups}")
        if not set(self.attention) <= set(range(len(self.multipliers))):
            raise UserError(
                f"attention names levels 0 to {len(self.multipliers) - 1}, got {self.attention}; drop those that are not there"
            )
        attended = [self.multipliers[k] for k in self.attention] + [self.multipliers[-1]] * bool(self.attention)
        if any(self.width * m % self.head for m in attended):
            raise UserError(f"heads of {self.head} do not divide the width of every level with attention; try {self.groups}")
        if self.context and not self.attention:
            raise UserError("a context is read by attention, and no level has any; name one, or leave the context out")
        if self.size % self.stride:
            raise UserError(f"size must be a multiple of {self.stride}, got {self.size}; try {8 * self.stride}")

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def stride(self) -> int:
        """What height and width must be multiples of."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def time(self) -> int:
        """Width of the timestep's embedding."""
        return 4 * self.width


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `DecoderCondition`: `time` is the width of the U-Net's timestep embedding, `width` that of its context.

    `embed` is the width of the CLIP embedding, `tokens` how many states are made of it.
    """

    embed: int = 1024
    time: int = 2048
    width: int = 2048
    tokens: int = 4

    def __post_init__(self) -> None:
        if min(self.embed, self.time, self.width, self.tokens) < 1:
            raise UserError("every size of a decoder's condition must be at least 1; raise the one that is not")


@dataclass(frozen=True)
class UnCLIPDecoderConfig:
    """Sizes of an `UnCLIPDecoder`: its text transformer, whose width is the U-Net's context, and its embedding.

    `vocab` is GLIDE's byte-pair encoding; `text_context` how many tokens a text may have.
    """

    unet: ADMConfig = field(default_factory=lambda: ADMConfig(context=2048))
    text_depth: int = 24
    text_heads: int = 32
    vocab: int = 50_257
    text_context: int = 256
    embed: int = 1024
    tokens: int = 4

    def __post_init__(self) -> None:
        if min(self.text_depth, self.text_heads, self.vocab, self.text_context, self.embed, self.tokens) < 1:
            raise UserError("every size of a decoder must be at least 1; raise the one that is not")
        if self.unet.context < 1 or self.unet.context % (2 * self.text_heads):
            raise UserError(
                f"{self.text_heads} heads need an even multiple as the U-Net's context, got {self.unet.context}; "
                f"try {64 * self.text_heads}"
            )


Config = ADMConfig | UnCLIPDecoderConfig


class Cell(nn.Module):
    """A residual block, which may change the sides, and, where the network attends, what looks around behind it."""

    def __init__(
        self, config: ADMConfig, width: int, out: int, attends: bool, resample: Literal["", "down", "up"] = ""
    ) -> None:
        super().__init__()
        c = config
        self.block = ScaledResBlock(width, out, c.time, groups=c.groups, resample=resample)
        self.attention: CellAttention | JointCellAttention | None = None
        if attends and c.context:
            self.attention = JointCellAttention(out, out // c.head, c.context, c.groups)
        elif attends:
            self.attention = CellAttention(out, out // c.head, groups=c.groups, eps=1e-5)

    def forward(self, x: Tensor, step: Tensor, context: Condition | None) -> Tensor:
        """`x (B, C, H, W)`, the step's embedding `(B, time)` behind its SiLU, the context where there is one."""
        x = self.block(x, step)
        if isinstance(self.attention, JointCellAttention):
            assert context is not None, "the network has checked its inputs"
            return self.attention(x, context)
        return x if self.attention is None else self.attention(x)


class ADM(nn.Module):
    """Noised pictures and step numbers in, noise out, zero before training."""

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = [c.width * m for m in c.multipliers]
        self.step_in = nn.Linear(c.width, c.time)
        self.step_out = nn.Linear(c.time, c.time)
        self.conv_in = nn.Conv2d(c.channels + c.seen, c.width, 3, padding=1)
        now, kept = c.width, [c.width]  # channels here, and of every map that a skip carries to the way up
        self.down = nn.ModuleList()
        for k, wide in enumerate(widths):
            for _ in range(c.blocks):
                self.down.append(Cell(c, now, wide, k in c.attention))
                now = wide
                kept.append(now)
            if k < len(widths) - 1:
                self.down.append(Cell(c, now, now, attends=False, resample="down"))
                kept.append(now)
        self.middle = nn.ModuleList([Cell(c, now, now, bool(c.attention)), Cell(c, now, now, attends=False)])
        self.up = nn.ModuleList()
        for k, wide in reversed(list(enumerate(widths))):
            cells = []
            for _ in range(c.blocks + 1):
                cells.append(Cell(c, now + kept.pop(), wide, k in c.attention))
                now = wide
            if k:
                cells.append(Cell(c, now, now, attends=False, resample="up"))
            self.up.append(nn.ModuleList(cells))
        self.norm_out = nn.GroupNorm(c.groups, now)
        self.conv_out = nn.Conv2d(now, c.out_channels, 3, padding=1)
        self.init_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """All cells in the order in which they run: what compilation and sharding wrap from outside."""
        return [module for module in self.modules() if isinstance(module, Cell)]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        As torch fills a layer; the last one of every residual block and of every attention is zero, and so is the output.
        """
        last: list[nn.Conv2d | nn.Linear] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
                module.reset_parameters()
            if isinstance(module, ScaledResBlock):
                last.append(module.conv_out)
            elif isinstance(module, JointCellAttention):
                last.append(module.out)
            elif isinstance(module, CellAttention):
                last.append(module.attention.out)
        for layer in last:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def time(self, t: Tensor) -> Tensor:
        """Step numbers `(B,)` in [0, 1000), fractions allowed, as `(B, time)`."""
        waves = timestep_waves(t, self.config.width).to(self.step_in.weight.dtype)  # (B, width)
        return self.step_out(F.silu(self.step_in(waves)))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        low: Tensor | None = None,
        told: Tensor | None = None,
        context: Condition | None = None,
    ) -> Tensor:
        """`x (B, C, H, W)`, step numbers `t (B,)` in [0, 1000) to `(B, C, H, W)`, or 2C channels.

        `low (B, seen, h, w)`: a smaller picture, enlarged here (bilinear) and shown beside the noise, exactly where the config
        has `seen`. `told (B, time)` is added to the timestep's embedding. `context`: states `(B, M, context)` and mask, exactly
        where the config has one. Raises UserError when sides are no multiples of `config.stride` or shapes do not fit.
        """
        self._check(x, t, low, told, context)
        dtype = self.conv_in.weight.dtype
        step = self.time(t)
        # Every block reads the embedding behind a SiLU, so that it is taken once.
        step = F.silu(step if told is None else step + told.to(dtype))  # (B, time)
        if context is not None:
            context = Condition(context.states.to(dtype), context.mask)
        h = x.to(dtype)
        if low is not None:
            large = F.interpolate(low.to(dtype), x.shape[2:], mode="bilinear", align_corners=False)  # (B, seen, H, W)
            h = torch.cat([h, large], dim=1)
        h = self.conv_in(h)  # (B, width, H, W)
        skips = [h]
        for cell in self.down:
            h = cell(h, step, context)
            skips.append(h)
        for cell in self.middle:
            h = cell(h, step, context)
        for level in self.up:
            assert isinstance(level, nn.ModuleList), "cells of one side"
            for cell in level:
                h = cell(h if _enlarges(cell) else torch.cat([h, skips.pop()], dim=1), step, context)
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)  # (B, C or 2C, H, W)

    def _check(self, x: Tensor, t: Tensor, low: Tensor | None, told: Tensor | None, context: Condition | None) -> None:
        c = self.config
        check_pictures(x, t, c.channels, c.stride)
        if (low is None) == bool(c.seen) or (low is not None and low.shape[:2] != (len(x), c.seen)):
            raise UserError(
                f"this U-Net is shown a picture ({len(x)}, {c.seen}, h, w), got {None if low is None else tuple(low.shape)}; "
                "give it the smaller ones"
                if c.seen
                else "this U-Net is shown no smaller picture; leave it out, or build it with seen"
            )
        if told is not None and told.shape != (len(x), c.time):
            raise UserError(f"what is told must be ({len(x)}, {c.time}), got {tuple(told.shape)}; give one row per image")
        if (context is None) == bool(c.context) or (context is not None and context.states.shape[::2] != (len(x), c.context)):
            raise UserError(
                f"this U-Net reads states ({len(x)}, M, {c.context}) and their mask, got "
                f"{None if context is None else tuple(context.states.shape)}; take the text encoder that it was built for"
                if c.context
                else "this U-Net reads no context; leave it out, or build it with one"
            )


def _enlarges(cell: nn.Module) -> bool:
    return isinstance(cell, Cell) and cell.block.resample == "up"


# The decoder


class DecoderInputs(NamedTuple):
    """What the decoder's U-Net takes: timestep embedding `(B, time)`, context `(B, L + tokens, width)` and its mask."""

    time: Tensor
    context: Tensor
    mask: Tensor


class DecoderCondition(nn.Module):
    """How an image embedding enters a U-Net (Ramesh et al. 2022, section 2.1): two linears, into its time and into its text."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.to_time = nn.Linear(config.embed, config.time)
        self.to_context = nn.Linear(config.embed, config.tokens * config.width)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`."""
        for linear in (self.to_time, self.to_context):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, image: Tensor, time: Tensor, states: Tensor, mask: Tensor) -> DecoderInputs:
        """Image embeddings `(B, E)`, the timestep embedding `(B, time)`, text states `(B, L, width)` and their mask `(B, L)`.

        The embedding is added to the time and stands behind the text as `tokens` more states.
        """
        c = self.config
        extra = self.to_context(image).unflatten(1, (c.tokens, c.width))  # (B, tokens, width)
        context = torch.cat([states, extra], dim=1)  # (B, L + tokens, width)
        return DecoderInputs(time + self.to_time(image), context, F.pad(mask, (0, c.tokens), value=True))


class TextTower(nn.Module):
    """GLIDE's text transformer: ids to states, and the state of the last real token as a sentence's."""

    def __init__(self, vocab: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, eps=1e-5) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and their mask `(B, L)` to states `(B, L, width)` and sentences `(B, width)`: zeros for a text without tokens."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]  # (B, L, width)
        for block in self.blocks:
            x = block(x, mask=mask[:, None, None])
        states = self.norm(x)
        places = torch.arange(ids.shape[1], device=ids.device).where(mask, -1).argmax(1)  # (B,): of the last real token
        sentence = states[torch.arange(len(ids), device=ids.device), places]  # (B, width)
        return states, sentence * mask.any(1, keepdim=True)


class UnCLIPDecoder(nn.Module):
    """DALL-E 2's decoder: text and an image embedding told to a U-Net of 64 x 64 pixels."""

    def __init__(self, config: UnCLIPDecoderConfig) -> None:
        super().__init__()
        self.config = c = config
        W, T = c.unet.context, c.unet.time
        self.text = TextTower(c.vocab, c.text_context, W, c.text_depth, c.text_heads)
        self.sentence = nn.Linear(W, T)
        self.condition = DecoderCondition(DecoderConfig(c.embed, T, W, c.tokens))
        self.unet = ADM(c.unet)
        self.init_weights()

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order in which they run: what compilation and sharding wrap from outside."""
        return [*self.text.blocks, *self.unet.blocks]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`."""
        for module in self.text.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.text.tokens.weight, std=0.02)
        nn.init.normal_(self.text.positions, std=0.01)
        nn.init.normal_(self.sentence.weight, std=self.sentence.in_features**-0.5)
        nn.init.zeros_(self.sentence.bias)
        self.condition.init_weights()
        self.unet.init_weights()

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """`x (B, C, H, W)`, step numbers `t (B,)`, ids and their mask `(B, L)`, embeddings `image (B, E)`, as `ADM.forward`.

        A dropped caption is a mask without a token, a dropped embedding zeros. Raises UserError when a text is too long.
        """
        if ids.shape[1] > self.config.text_context:
            raise UserError(f"a text has {ids.shape[1]} tokens, the context holds {self.config.text_context}; cut it")
        states, sentence = self.text(ids, mask)
        given = self.condition(image, self.sentence(sentence), states, mask)
        return self.unet(x, t, told=given.time, context=Condition(given.context, given.mask))


def drop_condition(
    image: Tensor, mask: Tensor, generator: torch.Generator, image_rate: float = 0.1, caption_rate: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Image embeddings `(B, E)`, each zeroed with `image_rate`, and caption masks `(B, L)`, each emptied with `caption_rate`.

    Both independently, so that the decoder sees the caption alone in 5 % of cases. Raises UserError when a rate is outside
    [0, 1].
    """
    gone = []
    for rows, rate in ((image, image_rate), (mask, caption_rate)):
        if not 0 <= rate <= 1:
            raise UserError(f"a drop rate must be in [0, 1], got {rate}; correct it")
        drawn = torch.rand(len(rows), generator=generator, device=generator.device) < rate
        gone.append(drawn.to(rows.device)[:, None])  # (B, 1)
    return image.masked_fill(gone[0], 0.0), mask & ~gone[1]


def build(config: Config) -> nn.Module:
    """The network that a config is of."""
    return ADM(config) if isinstance(config, ADMConfig) else UnCLIPDecoder(config)


def tiny(config: Config) -> Config:
    """A config of the same shape, small enough for tests."""
    if isinstance(config, ADMConfig):
        small = min(len(config.multipliers), 2)
        attention = (1,) if config.attention else ()
        return replace(
            config, width=32, multipliers=(1, 2)[:small], blocks=1, attention=attention, head=16, groups=8, size=16,
            context=min(config.context, 24),
        )  # fmt: skip
    unet = tiny(config.unet)
    assert isinstance(unet, ADMConfig), "of the same kind"
    return replace(config, unet=replace(unet, context=32), text_depth=1, text_heads=2, vocab=50, text_context=6, embed=12)


def example(config: Config, batch: int = 1) -> tuple[Tensor, ...]:
    """Random inputs for `forward` at the side of the config; a text as long as the context; the smaller picture a fourth."""
    unet = config if isinstance(config, ADMConfig) else config.unet
    x, t = torch.randn(batch, unet.channels, unet.size, unet.size), torch.rand(batch) * 999
    if isinstance(config, ADMConfig):
        return (x, t, torch.randn(batch, config.seen, config.size // 4, config.size // 4)) if config.seen else (x, t)
    ids = torch.randint(config.vocab, (batch, config.text_context))
    image = F.normalize(torch.randn(batch, config.embed), dim=-1)
    return x, t, ids, torch.ones(batch, config.text_context, dtype=torch.bool), image


def stated(config: Config) -> str:
    """The input that `example` makes, in words."""
    unet = config if isinstance(config, ADMConfig) else config.unet
    picture = f"{unet.channels} x {unet.size} x {unet.size} (C, H, W)"
    if isinstance(config, ADMConfig):
        return f"{picture}, beside one of a fourth of the side" if config.seen else picture
    return f"{picture}, {config.text_context} text tokens, an image embedding of {config.embed}"


# Appendix C; the second upsampler attends nowhere and neither does the first.
SIZES: dict[str, Config] = {
    "Decoder": UnCLIPDecoderConfig(),
    "Upsampler-256": ADMConfig(width=320, attention=(), seen=3, size=256),
    "Upsampler-1024": ADMConfig(width=192, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(), seen=3, size=1024),
}
