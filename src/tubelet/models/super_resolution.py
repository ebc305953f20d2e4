"""VideoPoet's super-resolution: all codes of a finer grid at once, in steps, and not one after the other.

After Kondratyuk et al. 2023, "VideoPoet: A Large Language Model for Zero-Shot Video Generation", section 3.3: layers of
attention in windows that are upright, level or go through time, each with the coarse codes of the same window and the text
beside it; learned as a masked model is, guided by the coarse codes and by the text. The paper prints parameters (1 and 0.5
billion) and neither widths nor depths: those here are ours and make about as many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.attention import CrossAttention, SelfAttention
from tubelet.nn.ids import check_ids
from tubelet.nn.mlp import MLP
from tubelet.nn.positions import grid_positions, sincos
from tubelet.nn.subtokens import MASK, split_ids
from tubelet.nn.window_rows import from_windows, to_windows

EPS = 1e-6
COUNTED_TEXT = 64
"""Text states that a size is counted with."""


@dataclass(frozen=True)
class SuperResolutionConfig:
    """Sizes of a `SuperResolution`. Raises UserError when they do not fit each other.

    `depth` is in rounds of three layers, one for each of `windows (T, H, W)`: upright, level and through time. A code is two
    digits below `factor`. The paper gives parameters (1 and 0.5 billion), no widths: there is no default.
    """

    width: int
    heads: int
    depth: int
    windows: tuple[tuple[int, int, int], ...]
    text: int = 2048
    factor: int = 512

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.depth, self.text, self.factor) < 1:
            raise UserError("every size of a SuperResolution must be at least 1; raise the one that is not")
        if self.width % self.heads or self.width % 16:
            raise UserError(f"the width must be a multiple of 16 and of {self.heads} heads, got {self.width}; correct it")
        if len(self.windows) != 3 or any(t < 1 or h < 2 or w < 2 or h % 2 or w % 2 for t, h, w in self.windows):
            raise UserError(f"three windows of even height and width are needed, got {self.windows}; take those of STAGES")


STAGES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "5x56x32": ((1, 56, 4), (1, 8, 32), (5, 8, 8)),
    "5x112x64": ((1, 112, 2), (1, 4, 64), (5, 8, 8)),
}
"""Windows of both stages of the paper, by the tokens they make; each doubles height and width."""


class WindowLayer(nn.Module):
    """Self-attention within windows, cross-attention to the coarse tokens of the same window, to text, and an MLP; pre-norm."""

    def __init__(self, dim: int, heads: int, window: tuple[int, int, int]) -> None:
        super().__init__()
        self.window = window
        self.attention_norm, self.attention = nn.LayerNorm(dim, EPS), SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.coarse_norm, self.coarse = nn.LayerNorm(dim, EPS), CrossAttention(dim, heads, dim, qk_norm=False, bias=True)
        self.text_norm, self.text = nn.LayerNorm(dim, EPS), CrossAttention(dim, heads, dim, qk_norm=False, bias=True)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, EPS), MLP(dim, 4 * dim)

    def forward(self, x: Tensor, coarse: Tensor, keep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """`x (B, T, H, W, D)`; `coarse (B, T, H/2, W/2, D)` where `keep (B,)`; `text (B, K, D)` and its `mask (B, K)`."""
        shape = x.shape
        t, h, w = self.window
        seen = to_windows(coarse, (t, h // 2, w // 2))  # (B*n, t*h*w / 4, D)
        rows = to_windows(x, self.window)  # (B*n, t*h*w, D)
        rows = rows + self.attention(self.attention_norm(rows))
        kept = keep.repeat_interleave(len(rows) // len(keep))[:, None].expand(seen.shape[:2])  # (B*n, t*h*w / 4)
        rows = rows + self.coarse(self.coarse_norm(rows), seen, kept)
        x = from_windows(rows, self.window, shape).flatten(1, 3)  # (B, T*H*W, D)
        x = x + self.text(self.text_norm(x), text, mask)
        return (x + self.mlp(self.mlp_norm(x))).view(shape)


class SuperResolution(nn.Module):
    """Codes of a fine grid, some of them masked, and all of a coarse one to logits of every fine code."""

    def __init__(self, config: SuperResolutionConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        # A code is two digits, so two small tables stand for one of 2^18 rows; the last row of each is the mask.
        self.high, self.low = nn.Embedding(config.factor + 1, D), nn.Embedding(config.factor + 1, D)
        self.coarse_high, self.coarse_low = nn.Embedding(config.factor, D), nn.Embedding(config.factor, D)
        self.text = nn.Linear(config.text, D)
        self.blocks = nn.ModuleList(
            WindowLayer(D, config.heads, window) for _ in range(config.depth) for window in config.windows
        )
        self.norm = nn.LayerNorm(D, EPS)
        self.head = nn.Linear(D, 2 * config.factor)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`. Tables of deviation 0.02, the rest as
        torch does."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()

    def forward(self, codes: Tensor, coarse: Tensor, text: Condition, keep: Tensor | None = None) -> Tensor:
        """Codes `(B, T, H, W)`, MASK where unknown, coarse codes `(B, T, H/2, W/2)` and text to `(B, T, H, W, 2, factor)`.

        These are logits of both digits of a code, as `nn.subtokens` splits it. Where `keep (B,)` is False the coarse codes are
        hidden; text is hidden by its mask: each in a tenth of training, and for guidance. Raises UserError when grids or
        windows do not fit, and for codes that are none.
        """
        B, T, H, W = codes.shape
        if coarse.shape != (B, T, H // 2, W // 2) or H % 2 or W % 2:
            raise UserError(f"{tuple(codes.shape)} codes need half the height and width below, got {tuple(coarse.shape)}")
        n = self.config.factor
        check_ids("codes", codes, n**2, MASK)
        check_ids("coarse codes", coarse, n**2)
        low, high = split_ids(codes, 2, n).masked_fill((codes == MASK)[..., None], n).unbind(-1)  # 2 x (B, T, H, W)
        x = self.high(high) + self.low(low) + self._places(codes, 1)  # (B, T, H, W, D)
        low, high = split_ids(coarse, 2, n).unbind(-1)  # 2 x (B, T, H/2, W/2)
        below = self.coarse_high(high) + self.coarse_low(low) + self._places(coarse, 2)  # (B, T, H/2, W/2, D)
        keep = torch.ones(B, dtype=torch.bool, device=codes.device) if keep is None else keep
        states = self.text(text.states)  # (B, K, D)
        for block in self.blocks:
            x = block(x, below, keep, states, text.mask)
        return self.head(self.norm(x)).unflatten(-1, (2, n))

    def _places(self, codes: Tensor, scale: int) -> Tensor:
        """Sines of the middle of each cell, in fine cells: a quarter of the width for time, the rest for both sides."""
        _, T, H, W = codes.shape
        D, at = self.config.width, grid_positions(T, H, W, device=codes.device).view(T, H, W, 3)
        middle = (at[..., 1:] + 0.5) * scale - 0.5
        parts = (sincos(D // 4, at[..., 0]), sincos(3 * D // 8, middle[..., 0]), sincos(3 * D // 8, middle[..., 1]))
        return torch.cat(parts, dim=-1).to(self.high.weight.dtype)  # (T, H, W, D)


def resampled(codes: Tensor, share: Tensor, words: int, generator: torch.Generator) -> Tensor:
    """Codes `(B, ...)` of which each is drawn anew among `words` with the probability `share (B,)` of its sample.

    Noise in the space of codes (section 3.3): what a super-resolution reads in training is then no better than what a language
    model makes for it.
    """
    where, device = generator.device, codes.device
    chance = share.to(where).view(-1, *[1] * (codes.ndim - 1))  # (B, 1, ...)
    again = torch.rand(codes.shape, generator=generator, device=where) < chance
    drawn = torch.randint(words, codes.shape, generator=generator, device=where)
    return torch.where(again.to(device), drawn.to(device), codes)


def guided(
    model: SuperResolution,
    codes: Tensor,
    coarse: Tensor,
    text: Condition,
    null: Condition | None = None,
    text_scale: float = 4.0,
    coarse_scale: float = 1.0,
) -> Tensor:
    """`model(codes, coarse, text)` guided by the coarse codes and by the text, each at its own scale, in one batch.

    nothing + coarse_scale * (coarse - nothing) + text_scale * (both - coarse), as Brooks et al. 2023 ("InstructPix2Pix",
    equation 3) guide by a picture and its text; the scales are those of the first stage, the second's are 8 and 2 (section
    3.3). `null` are as many empty prompts. What a scale of 1 does not need is not computed. Raises UserError where empty
    prompts are needed and missing.
    """
    branches = [(text, True)]
    if text_scale != 1.0 or coarse_scale != 1.0:
        if null is None:
            raise UserError("guidance of a super-resolution needs empty prompts; give them as null, or set both scales to 1")
        branches += [(null, True)] + ([(null, False)] if coarse_scale != 1.0 else [])
    B, n = len(codes), len(branches)
    keep = torch.tensor([kept for _, kept in branches], device=codes.device).repeat_interleave(B)  # (n*B,)
    words = Condition.cat([said for said, _ in branches]) if n > 1 else text
    whole = model(codes.repeat(n, 1, 1, 1), coarse.repeat(n, 1, 1, 1), words, keep)  # (n*B, T, H, W, 2, factor)
    both, *rest = whole.chunk(n)
    if not rest:
        return both
    seen = rest[0]
    base = seen if n == 2 else rest[1] + coarse_scale * (seen - rest[1])
    return base + text_scale * (both - seen)


def masked_loss(logits: Tensor, codes: Tensor, hidden: Tensor) -> Tensor:
    """Mean cross-entropy of both digits of the `hidden (B, T, H, W)` ones of `codes (B, T, H, W)`, in nats, `()`."""
    goals = split_ids(codes[hidden], 2, logits.shape[-1])  # (K, 2)
    total = F.cross_entropy(logits[hidden].flatten(0, 1).float(), goals.flatten(), reduction="sum")
    return total / max(1, goals.numel())


def tiny(config: SuperResolutionConfig) -> SuperResolutionConfig:
    """A config of the same shape, small enough for tests."""
    windows = ((1, 4, 2), (1, 2, 4), (2, 2, 2))
    return replace(config, width=32, heads=4, depth=1, windows=windows, text=24, factor=4)


def _made(config: SuperResolutionConfig) -> tuple[int, int, int]:
    """Tokens (T, H, W) that a stage makes: each of its windows is whole along its own axis."""
    (_, height, _), (_, _, width), (time, _, _) = config.windows
    return time, height, width


def example(config: SuperResolutionConfig, batch: int = 1) -> tuple[Tensor, Tensor, Condition]:
    """Random inputs for `forward`: codes `(B, T, H, W)`, half of them masked, coarse ones `(B, T, H/2, W/2)`, text states."""
    T, H, W = _made(config)
    text = Condition(torch.randn(batch, COUNTED_TEXT, config.text), torch.ones(batch, COUNTED_TEXT, dtype=torch.bool))
    codes = torch.randint(config.factor**2, (batch, T, H, W))
    hidden = torch.arange(T * H * W).view(T, H, W) % 2 == 0
    return codes.masked_fill(hidden, MASK), torch.randint(config.factor**2, (batch, T, H // 2, W // 2)), text


def stated(config: SuperResolutionConfig) -> str:
    """The input that `example` makes, in words."""
    T, H, W = _made(config)
    return f"{COUNTED_TEXT} text tokens, {T} x {H // 2} x {W // 2} video tokens below {T} x {H} x {W}, {config.factor**2:,} ids"


# The names are the paper's parameters; widths and rounds of layers are ours.
SIZES: dict[str, SuperResolutionConfig] = {
    "SR-1B": SuperResolutionConfig(2048, 32, 4, STAGES["5x56x32"]),
    "SR-500M": SuperResolutionConfig(1280, 20, 5, STAGES["5x112x64"]),
}
