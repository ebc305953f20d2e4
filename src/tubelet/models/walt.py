"""W.A.L.T: a diffusion transformer that attends inside windows, in turn over one frame and over a part of all frames.

After Photorealistic Video Generation with Diffusion Models (Gupta et al. 2023). Latents of a causal tokenizer (MAGVIT-v2
without quantisation, eight channels, standardised) are cut into patches frame by frame. Layers alternate between windows of
whole frames and windows that span time (section 3.2), where an image passes its values through, so that images and videos
train together. One map from the condition to shifts, scales and gates serves all layers, each but the first with a correction
of low rank (AdaLN-LoRA, section 3.3). The network's last estimate (self-conditioning), known frames and, in a stage of
super-resolution, the smaller film stand beside the noise as further channels.

The network knows no schedule: `t` is a number. In the paper the output is v; the schedule, linear in beta from 1e-4 to 0.02
over 1000 steps, is rescaled so that its last step is pure noise (zero terminal SNR, Lin et al. 2023), which excludes predicting
the noise and asks of a sampler to begin at that very step; the estimate is given in nine of ten training steps.

Where the paper is silent the bricks are DiT's (timestep embedding, final layer, gates that start at zero), biases stand in all
linears, and relative positions are a bias per head and offset, as in Swin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.adaln_zero import TimestepEmbedding, init_as_dit
from tubelet.nn.conditioning import AdaLN, gated, modulate
from tubelet.nn.conv import depth_to_space, fold_frames, unfold_frames
from tubelet.nn.ids import check_ids
from tubelet.nn.mlp import MLP
from tubelet.nn.norms import RMSNorm
from tubelet.nn.patch import Grid, patchify, token_grid, unpatchify
from tubelet.nn.window_attention import WindowAttention, WindowCrossAttention, relative_index

TEXT_TOKENS = 64
"""Tokens of a prompt that a size is counted at."""


@dataclass(frozen=True)
class WALTConfig:
    """Sizes of a `WALT`. Raises UserError when they do not fit each other.

    `patch` is a token's side in latent cells; `grid` the frames, rows and columns of tokens with stored positions; `frame` and
    `window` the tokens of the two kinds of windows; `rank` that of AdaLN-LoRA's corrections. `classes` is the number of
    labels, to which the table adds the null label, or 0 for none; `text_width` that of a text encoder's states, at which every
    layer looks, or 0 for none. With `predict` some latent frames may be known; with `upscale` a film of half the height and
    width is. Without `alternate` every layer has windows of `window`: as large as the grid they are full attention, for films
    alone, since windows that span time leave an image's tokens apart.
    """

    width: int = 1024
    depth: int = 24
    heads: int = 16
    channels: int = 8
    patch: int = 1
    grid: Grid = (5, 16, 16)
    frame: tuple[int, int] = (16, 16)
    window: Grid = (5, 8, 8)
    rank: int = 2
    classes: int = 0
    text_width: int = 0
    predict: bool = False
    upscale: bool = False
    alternate: bool = True

    def __post_init__(self) -> None:
        sizes = (self.width, self.depth, self.heads, self.channels, self.patch, self.rank, *self.grid, *self.frame)
        if min(*sizes, *self.window) < 1 or min(self.classes, self.text_width) < 0:
            raise UserError("every size of a WALT must be at least 1, classes and text_width 0; raise the one that is not")
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads need a width that they divide, got {self.width}; try {64 * self.heads}")
        for window in ((1, *self.frame), self.window):
            if any(side % step for side, step in zip(self.grid, window, strict=True)):
                raise UserError(f"windows of {window} tokens do not tile a grid of {self.grid}; choose divisors")

    @property
    def in_channels(self) -> int:
        """Noise and estimate; known frames and their mask; the smaller film."""
        return self.channels * 2 + (self.channels + 1) * self.predict + self.channels * self.upscale


class WALTBlock(nn.Module):
    """Attention in windows, with `text` a look at the window and the prompt, MLP; residual stream and modulation are float32.

    Shift, scale and gate of the first and the last are A + W_b W_a c, where A is every layer's and c the condition (section
    3.3); `rank` 0 adds nothing. How the look at the prompt is normed the paper leaves open; here it is a pre-norm residual
    that starts at zero. It keeps to windows of one frame in every layer, as where images and videos train together.
    """

    def __init__(self, config: WALTConfig, window: Grid, rank: int) -> None:
        super().__init__()
        D, N = config.width, config.heads
        self.lora_down = nn.Parameter(torch.zeros(rank, D)) if rank else None
        self.lora_up = nn.Parameter(torch.zeros(6 * D, rank)) if rank else None
        self.attention_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = WindowAttention(D, N, window)
        self.cross_norm = nn.LayerNorm(D, eps=1e-6) if config.text_width else None
        self.cross = WindowCrossAttention(D, N, (1, *config.frame)) if config.text_width else None
        self.mlp_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(D, 4 * D, "tanh")

    def forward(
        self, x: Tensor, shared: Tensor, c: Tensor, grid: Grid, index: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """`x (B, L, D)` on `grid`, A `shared (B, 1, 6D)`, `c (B, 1, D)`, the window's `index`, `text (B, M, D)`, its `mask`."""
        dtype = self.mlp.down.weight.dtype
        if self.lora_down is not None and self.lora_up is not None:
            shared = shared + F.linear(F.linear(c, self.lora_down), self.lora_up).float()
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = shared.chunk(6, dim=-1)  # (B, 1, D) each
        x = gated(x, gate_a, self.attention(modulate(self.attention_norm(x), shift_a, scale_a).to(dtype), grid, index))
        if self.cross is not None and self.cross_norm is not None and text is not None and mask is not None:
            x = x + self.cross(self.cross_norm(x.to(dtype)), grid, text, mask)
        return gated(x, gate_m, self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m).to(dtype)))


class WALT(nn.Module):
    """Noised latents, step numbers and what is known in; v out, zero before training."""

    def __init__(self, config: WALTConfig) -> None:
        super().__init__()
        self.config = config
        c, D = config, config.width
        self.patch_in = nn.Linear(c.patch**2 * c.in_channels, D)
        self.places, self.times = nn.Parameter(torch.empty(*c.grid[1:], D)), nn.Parameter(torch.empty(c.grid[0], D))
        self.timestep = TimestepEmbedding(D)
        self.labels = nn.Embedding(c.classes + 1, D) if c.classes else None
        self.text_in = nn.Linear(c.text_width, D) if c.text_width else None
        self.enlarge = nn.Conv2d(c.channels, 4 * c.channels, 3, padding=1) if c.upscale else None
        self.augmentation = TimestepEmbedding(D) if c.upscale else None
        self.adaln = AdaLN(D, 6)
        self.blocks = nn.ModuleList(
            WALTBlock(c, c.window if i % 2 or not c.alternate else (1, *c.frame), c.rank if i else 0) for i in range(c.depth)
        )
        self.head_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.head_adaln = AdaLN(D, 2)
        self.head = nn.Linear(D, c.patch**2 * c.channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        As DiT (`nn.adaln_zero.init_as_dit`), with tables of places of deviation 0.02; what drives the gates, the looks at a
        prompt and the head are zero, so that a block starts as the identity and the output is zero.
        """
        init_as_dit(self)
        for module in self.modules():
            if isinstance(module, RMSNorm) and module.weight is not None:
                nn.init.ones_(module.weight)
            elif isinstance(module, WindowAttention):
                nn.init.zeros_(module.offset_bias)
            elif isinstance(module, WindowCrossAttention):
                nn.init.zeros_(module.out.weight)
            elif isinstance(module, WALTBlock) and module.lora_down is not None and module.lora_up is not None:
                nn.init.normal_(module.lora_down, std=0.02)
                nn.init.zeros_(module.lora_up)
        for table in (self.places, self.times):
            nn.init.normal_(table, std=0.02)
        if self.enlarge is not None and self.enlarge.bias is not None:
            nn.init.xavier_uniform_(self.enlarge.weight)
            nn.init.zeros_(self.enlarge.bias)
        for layer in (self.adaln.out, self.head_adaln.out, self.head):
            nn.init.zeros_(layer.weight)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        text: Condition | None = None,
        estimate: Tensor | None = None,
        clean: Tensor | None = None,
        known: Tensor | None = None,
        low: Tensor | None = None,
        low_t: Tensor | None = None,
    ) -> Tensor:
        """Noised latents `z (B, C, T, H, W)` and step numbers `t (B,)` in [0, 1000) to v, `(B, C, T, H, W)`.

        Args:
            label: `(B,)`, with `classes`; None for the null label.
            text: a prompt's token states `(B, M, text_width)`, with `text_width`; an empty prompt's without guidance.
            estimate: what the network said of the clean latents before, as z; None: nothing yet (zeros).
            clean, known: with `predict`, latents as z and `(B, T)` of 0 and 1, 1 where a frame of them is known: `known` times
                `clean` and `known` itself are further channels (the paper prints noised latents there and means clean ones).
                `tasks.masks` have it the other way round, 1 to be made: pass 1 - mask. None: nothing is known.
            low, low_t: with `upscale`, the smaller film's latents `(B, C, T, H/2, W/2)`, noised to step `low_t (B,)`, the
                augmentation (section 3.5); in sampling a small step or 0.

        T is 1, an image, or a multiple of the window's. Raises UserError when sizes do not fit each other or the stored places.
        """
        c, B = self.config, len(z)
        if z.ndim != 5 or z.shape[1] != c.channels:
            raise UserError(f"latents must be (B, {c.channels}, T, H, W), got {tuple(z.shape)}; encode clips accordingly")
        patch, dtype = (1, c.patch, c.patch), self.patch_in.weight.dtype
        grid = token_grid((z.shape[2], z.shape[3], z.shape[4]), patch)
        self._check_grid(grid)
        h = self._channels(z, estimate, clean, known, low)  # (B, in_channels, T, H, W)
        h = self.patch_in(patchify(h, patch).to(dtype)).float()  # (B, L, D)
        T, H, W = grid
        h = h + (self.times[:T, None, None] + self.places[:H, :W]).flatten(0, 2)
        given = self._condition(B, t, label, low_t)[:, None]  # (B, 1, D)
        states, mask = self._prompt(B, text)
        shared = self.adaln(given)  # (B, 1, 6D)
        within, across = (relative_index(window, z.device) for window in ((1, *c.frame), c.window))
        for i, block in enumerate(self.blocks):
            h = block(h, shared, given, grid, across if i % 2 or not c.alternate else within, states, mask)
        shift, scale = self.head_adaln(given).chunk(2, dim=-1)  # (B, 1, D) each
        h = modulate(self.head_norm(h), shift, scale).to(dtype)
        return unpatchify(self.head(h).to(z.dtype), grid, patch)  # (B, C, T, H, W)

    def _check_grid(self, grid: Grid) -> None:
        """Whether places are stored for a grid and windows tile it; an image need not fill a window in time."""
        c = self.config
        wide = (1 if grid[0] == 1 else c.window[0], *c.window[1:])
        fits = all(side % a == side % b == 0 for side, a, b in zip(grid, (1, *c.frame), wide, strict=True))
        if not fits or any(side > most for side, most in zip(grid, c.grid, strict=True)):
            raise UserError(
                f"{grid} tokens (T, H, W) are no multiple of windows of {(1, *c.frame)} and {c.window} up to {c.grid}; "
                "crop the clip or build a WALT with other windows"
            )

    def _channels(
        self, z: Tensor, estimate: Tensor | None, clean: Tensor | None, known: Tensor | None, low: Tensor | None
    ) -> Tensor:
        """Everything that stands beside the noise cell by cell, `(B, in_channels, T, H, W)`."""
        c, (B, C, T, H, W) = self.config, z.shape
        if estimate is not None and estimate.shape != z.shape:
            raise UserError(f"an estimate has the shape of z, {tuple(z.shape)}, got {tuple(estimate.shape)}; pass the last one")
        parts = [z, torch.zeros_like(z) if estimate is None else estimate]
        if (clean is None) != (known is None) or (clean is not None and not c.predict):
            raise UserError("clean and known go together, in a WALT built with predict=True; pass both or neither")
        if c.predict:
            if clean is None or known is None:
                clean, known = torch.zeros_like(z), z.new_zeros(B, T)
            if clean.shape != z.shape or known.shape != (B, T):
                raise UserError(
                    f"for latents {tuple(z.shape)} clean has the same shape and known is {(B, T)}, "
                    f"got {tuple(clean.shape)} and {tuple(known.shape)}; correct them"
                )
            wide = known[:, None, :, None, None].bool().expand(-1, -1, -1, H, W)  # (B, 1, T, H, W)
            # A choice, not a product: what stands in clean where nothing is known may be anything.
            parts += [torch.where(wide, clean, 0.0), wide.to(z.dtype)]
        if (low is not None) != c.upscale:
            raise UserError("a smaller film is given to a WALT with upscale=True, always, and to no other; correct the call")
        if low is not None and self.enlarge is not None:
            if low.shape != (B, C, T, H // 2, W // 2):
                half = (B, C, T, H // 2, W // 2)
                raise UserError(f"the smaller film is {half}, got {tuple(low.shape)}; halve rows and columns")
            frames = depth_to_space(self.enlarge(fold_frames(low.to(self.enlarge.weight.dtype))), 2)  # (B*T, C, H, W)
            parts.append(unfold_frames(frames, B).to(z.dtype))
        return torch.cat(parts, dim=1)

    def _condition(self, batch: int, t: Tensor, label: Tensor | None, low_t: Tensor | None) -> Tensor:
        """Step, label and level of augmentation as one vector, `(B, D)`."""
        c = self.config
        if (label is not None and self.labels is None) or (low_t is None) == c.upscale:
            raise UserError("labels go to a WALT with classes and low_t to one with upscale=True, always; correct the call")
        if t.shape != (batch,) or any(x is not None and x.shape != (batch,) for x in (label, low_t)):
            raise UserError(f"{batch} clips need as many step numbers, labels and low_t; give one of each per clip")
        given = self.timestep(t)  # (B, D)
        if self.labels is not None:
            label = torch.full((batch,), c.classes, device=t.device) if label is None else label
            check_ids("labels", label, c.classes + 1)
            given = given + self.labels(label)
        if self.augmentation is not None and low_t is not None:
            given = given + self.augmentation(low_t)
        return given

    def _prompt(self, batch: int, text: Condition | None) -> tuple[Tensor | None, Tensor | None]:
        """Token states in the network's width and their mask, or nothing."""
        if (text is not None) != (self.text_in is not None):
            raise UserError("a prompt is given to a WALT with text_width, always, and to no other; correct the call")
        if text is None or self.text_in is None:
            return None, None
        if text.states.shape[0] != batch or text.states.shape[2] != self.config.text_width:
            raise UserError(
                f"{batch} prompts have states ({batch}, M, {self.config.text_width}), got {tuple(text.states.shape)}; "
                "give one prompt per clip, of the encoder that the model was built for"
            )
        return self.text_in(text.states.to(self.text_in.weight.dtype)), text.mask  # (B, M, D), (B, M)


def tiny(config: WALTConfig) -> WALTConfig:
    """A config of the same shape, small enough for tests."""
    small = replace(config, width=32, depth=3, heads=2, channels=4, grid=(3, 4, 4), frame=(4, 4), window=(3, 2, 2))
    return replace(small, classes=10 if config.classes else 0, text_width=24 if config.text_width else 0)


def example(config: WALTConfig, batch: int = 1) -> tuple[Tensor | Condition | None, ...]:
    """Random inputs for `forward`: a clip that fills the stored places, and everything that the config takes."""
    T, H, W = config.grid[0], config.grid[1] * config.patch, config.grid[2] * config.patch
    z, t = torch.randn(batch, config.channels, T, H, W), torch.rand(batch) * 999  # (B, C, T, H, W)
    label = torch.randint(config.classes, (batch,)) if config.classes else None
    states = torch.randn(batch, TEXT_TOKENS, config.text_width)
    text = Condition(states, torch.ones(batch, TEXT_TOKENS, dtype=torch.bool)) if config.text_width else None
    clean, known = torch.randn_like(z), (torch.arange(T) < 2).expand(batch, -1)
    low, low_t = torch.randn(batch, config.channels, T, H // 2, W // 2), torch.rand(batch) * 200
    shown = (clean, known) if config.predict else (None, None)
    return z, t, label, text, torch.randn_like(z), *shown, *((low, low_t) if config.upscale else (None, None))


def stated(config: WALTConfig) -> str:
    """The input that `example` makes, in words."""
    T, H, W = config.grid[0], config.grid[1] * config.patch, config.grid[2] * config.patch
    parts = [f"{config.channels} x {T} x {H} x {W} latents (C, T, H, W), patch {config.patch} x {config.patch}"]
    parts += [f"one of {config.classes} classes"] if config.classes else []
    parts += [f"{TEXT_TOKENS} text tokens"] if config.text_width else []
    parts += ["2 frames known"] if config.predict else []
    parts += ["a film of half the size"] if config.upscale else []
    return ", ".join(parts)


# Table 8: class-conditional on UCF-101, frame prediction on Kinetics-600, and the three stages of text to video, 9:16, with the
# states of T5-XL. The paper prints a width of 9216 for the first stage, which cannot be (52 layers would hold 53 B); 1920 gives
# its 3 B. Our reading: 16 heads, windows of one size in all stages, a patch of 2 in the last (its text; the table prints 4).
_STAGE = WALTConfig(grid=(5, 16, 28), frame=(16, 28), window=(5, 8, 14), text_width=2048)
SIZES: dict[str, WALTConfig] = {
    "L": WALTConfig(1024, 24, classes=101),
    "XL": WALTConfig(1152, 28, classes=101),
    "L-K600": WALTConfig(1024, 24, predict=True),
    "T2V": replace(_STAGE, width=1920, depth=52, predict=True),
    "T2V-2x": replace(_STAGE, width=1408, depth=40, grid=(5, 32, 56), upscale=True),
    "T2V-4x": replace(_STAGE, width=1024, depth=24, grid=(5, 32, 56), patch=2, upscale=True),
}
