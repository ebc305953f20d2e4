"""The flagship: a diffusion transformer over spacetime patches, conditioned on text and on a noise level per token.

After Sora (Brooks et al. 2024), on DiT (Peebles & Xie 2023): latents are cut into tubelets and embedded linearly; every block
attends over all of space and time at once; positions are rotary on (t, h, w), so no size is built in and an image is a
one-frame video. Noise levels enter through shared adaLN and may differ per frame or per cell, which is what lets one
network continue, connect, inpaint and stream. It knows no schedule: its output is raw, and `diffusion` says what it means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.nn.attention import Rope
from tubelet.nn.blocks import SpacetimeBlock
from tubelet.nn.conditioning import AdaLN, NoiseEmbedding, modulate, token_sigma
from tubelet.nn.norms import RMSNorm
from tubelet.nn.packing import Segments
from tubelet.nn.patch import Grid, patch_positions, patchify, token_grid, unpatchify
from tubelet.nn.positions import RotaryEmbedding, sincos


@dataclass(frozen=True)
class SpacetimeConfig:
    """Sizes of a `Spacetime`. Raises UserError when they do not fit each other.

    `patch` is (frames, rows, columns) of latent cells a token spans. `text` "cross": visual tokens are queries, text tokens
    keys and values of a cross-attention in every block; "joint": text tokens stand in front of the visual ones in one sequence.
    """

    width: int = 256
    depth: int = 8
    heads: int = 4
    in_channels: int = 8
    patch: tuple[int, int, int] = (2, 2, 2)
    text_width: int = 256
    text: Literal["cross", "joint"] = "cross"

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.in_channels, self.text_width, *self.patch) < 1:
            raise UserError("every size of a Spacetime must be at least 1; raise the one that is not")
        if self.width % self.heads or (self.width // self.heads) % 16:  # a quarter and twice three eighths
            raise UserError(f"{self.heads} heads need a width of 16 * k * heads, got {self.width}; try {64 * self.heads}")
        if self.text not in ("cross", "joint"):
            raise UserError(f"text must be cross or joint, got {self.text!r}; choose one of them")


PLACE_FEATURES = 160
"""Width of `place_features`."""


def place_features(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a token is: `positions (..., L, 3)` of (t, h, w) in latent frames and cells of a clip `size` (H, W) cells.

    Sines and cosines of t, h and w themselves, and of h and w as fractions of the clip (NaViT, Dehghani et al. 2023, section
    3.1), so that "on the floor" is one place at every size. Functions, no tables: no size is built in. `(..., L, 160)`.
    """
    extent = torch.tensor(size, device=positions.device, dtype=torch.float32)
    cells = sincos(32, positions.float(), max_period=100.0)  # (..., L, 3, 32)
    turns = torch.arange(1, 17, device=positions.device, dtype=torch.float32) * torch.pi
    angle = ((positions[..., 1:] + 0.5) / extent)[..., None] * turns  # (..., L, 2, 16)
    return torch.cat([cells.flatten(-2), angle.sin().flatten(-2), angle.cos().flatten(-2)], dim=-1)


class Spacetime(nn.Module):
    """Noised latents, their noise levels and a prompt in; a raw output of the latents' shape out, zero before training."""

    def __init__(self, config: SpacetimeConfig) -> None:
        super().__init__()
        self.config = config
        D, head = config.width, config.width // config.heads
        cells = config.patch[0] * config.patch[1] * config.patch[2] * config.in_channels
        self.patch_in = nn.Linear(cells, D)
        self.place_in = nn.Linear(PLACE_FEATURES, D, bias=False)
        self.text_norm = RMSNorm(config.text_width)
        self.text_in = nn.Linear(config.text_width, D)
        self.noise = NoiseEmbedding(D)
        self.adaln = AdaLN(D, 6)
        self.rope = RotaryEmbedding((head // 4, head * 3 // 8, head * 3 // 8))
        self.blocks = nn.ModuleList(SpacetimeBlock(D, config.heads, cross=config.text == "cross") for _ in range(config.depth))
        self.head_norm = RMSNorm(D, affine=False)
        self.head_adaln = AdaLN(D, 2)
        self.head = nn.Linear(D, cells)
        self.gain = nn.Linear(D, cells)
        self._places: dict[tuple[Grid, int, torch.device], tuple[Rope, Tensor]] = {}
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        Linears get variance 1 / fan-in; the head, all modulation and the text residual are zero, so that every block
        is the identity and the output zero (adaLN-Zero).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm) and module.weight is not None:
                nn.init.ones_(module.weight)
            elif isinstance(module, SpacetimeBlock):
                nn.init.zeros_(module.modulation)
        for linear in (self.adaln.out, self.head_adaln.out, self.head, self.gain):
            nn.init.zeros_(linear.weight)
        for block in self.blocks:
            if isinstance(block, SpacetimeBlock) and block.cross is not None:
                nn.init.zeros_(block.cross.out.weight)

    def forward(self, z: Tensor, sigma: Tensor, condition: Condition, positions: Tensor | None = None) -> Tensor:
        """Raw output F, `(B, C, T, H, W)` like `z`.

        `sigma` in [0, 1]: `()`, `(B,)`, `(B, T)` or `(B, T, H, W)`; a patch that spans several takes their mean. `positions`
        `(L, 3)` or `(B, L, 3)` replaces the tokens' own (t, h, w) in latent frames and cells. Raises UserError when z does
        not divide into patches.
        """
        patch, dtype = self.config.patch, self.patch_in.weight.dtype
        size = (z.shape[2], z.shape[3], z.shape[4])
        grid = token_grid(size, patch)
        seen = patchify(z, patch).to(dtype)  # (B, L, cells)
        M = condition.mask.shape[1] if self.config.text == "joint" else 0
        if positions is None:
            rope, features = self._own_places(grid, size, M, z.device)
        else:
            rope, features = self._rope_at(positions, M), place_features(positions, size[1:])
        x = self._embed(seen, features)  # (B, L, D)
        noise = self.noise(token_sigma(sigma, len(z), patch))  # (B, G, D)
        modulation = self.adaln(noise)  # (B, G, 6D)

        real = condition.mask[..., None]
        text = self._read(torch.where(real, condition.states, 0.0))  # (B, M, D)
        context, mask, L = text, condition.mask, x.shape[1]
        if self.config.text == "joint":
            x, context = torch.cat([text.float(), x], dim=1), None  # (B, M + L, D)
            mask = torch.cat([mask, mask.new_ones(len(z), L)], dim=1)  # (B, M + L)
            if modulation.shape[1] > 1:
                # Text has no noise of its own; the clip's mean modulation makes equal levels agree with a single one.
                rows = modulation.repeat_interleave(L // modulation.shape[1], dim=1)  # (B, L, 6D)
                modulation = torch.cat([rows.mean(1, keepdim=True).expand(-1, M, -1), rows], dim=1)  # (B, M + L, 6D)

        for block in self.blocks:
            x = block(x, modulation, rope, context, mask)
        return unpatchify(self._answer(x[:, M:], noise, seen).to(z.dtype), grid, patch)  # (B, C, T, H, W)

    def forward_packed(
        self,
        z: Sequence[Tensor],
        sigma: Sequence[Tensor],
        condition: Condition,
        positions: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """`forward` for S samples of any sizes as one row of tokens, each with its own noise, words and places.

        z: S latents `(C, T, H, W)`, of which none, some or all may differ in size; sigma: S noise levels `()`, `(T,)` or
        `(T, H, W)`; `condition` of S; positions: S times `(L, 3)`. Returns what `forward` returns of each alone.
        """
        patch, dtype = self.config.patch, self.patch_in.weight.dtype
        if not len(z) == len(sigma) == len(condition):
            raise UserError(
                f"{len(z)} samples, {len(sigma)} noise levels, {len(condition)} prompts; give one of each per sample"
            )
        if not len(z):
            return []
        sizes = [(one.shape[1], one.shape[2], one.shape[3]) for one in z]
        grids = [token_grid(size, patch) for size in sizes]
        seen = torch.cat([patchify(one[None], patch).to(dtype) for one in z], dim=1)  # (1, L, cells)
        places = [patch_positions(grid, patch, z[0].device) for grid in grids] if positions is None else list(positions)
        features = torch.cat([place_features(p, size[1:]) for p, size in zip(places, sizes, strict=True)])  # (L, 160)
        x = self._embed(seen, features)  # (1, L, D)
        levels = [token_sigma(one[None], 1, patch)[0] for one in sigma]  # S times (G,)
        lengths = [len(p) for p in places]
        noise = self.noise(torch.cat(levels)[None])  # (1, sum of G, D)
        each = [length // len(level) for length, level in zip(lengths, levels, strict=True) for _ in level]
        noise = noise.repeat_interleave(torch.tensor(each, device=noise.device), dim=1)  # (1, L, D)
        modulation = self.adaln(noise)  # (1, L, 6D)

        text = self._read(condition.states[condition.mask][None])  # (1, M, D)
        words = condition.mask.sum(1).tolist()
        rope = self._rope_at(torch.cat(places), 0)
        context: Tensor | None = text
        segments = Segments.of_self(lengths)
        context_segments: Segments | None = Segments(tuple(lengths), tuple(words))
        film = slice(None)
        if self.config.text == "joint":
            # Each sample's words stand in front of its own tokens.
            parts = zip(text.float().split(words, 1), x.split(lengths, 1), modulation.split(lengths, 1), places, strict=True)
            rows = [
                (t, v, m.mean(1, keepdim=True).expand(-1, t.shape[1], -1), m, p.new_zeros(t.shape[1], 3), p)
                for t, v, m, p in parts
            ]
            x = torch.cat([part for row in rows for part in row[:2]], dim=1)  # (1, M + L, D)
            modulation = torch.cat([part for row in rows for part in row[2:4]], dim=1)  # (1, M + L, 6D)
            rope = self._rope_at(torch.cat([part for row in rows for part in row[4:]]), 0)
            both = [m + n for m, n in zip(words, lengths, strict=True)]
            context, segments, context_segments = None, Segments.of_self(both), None
            film = torch.cat([torch.arange(m + n, device=x.device) >= m for m, n in zip(words, lengths, strict=True)])

        for block in self.blocks:
            x = block(x, modulation, rope, context, None, segments, context_segments)
        tokens = self._answer(x[:, film], noise, seen).split(lengths, dim=1)
        return [
            unpatchify(row.to(one.dtype), grid, patch)[0] for row, one, grid in zip(tokens, z, grids, strict=True)
        ]  # S times (C, T, H, W)

    def _embed(self, seen: Tensor, features: Tensor) -> Tensor:
        """Tokens' numbers and places as the residual stream, `(B, L, D)` float32."""
        return self.patch_in(seen).float() + self.place_in(features.to(seen.dtype)).float()

    def _read(self, states: Tensor) -> Tensor:
        """Token states of words at this network's width, `(B, M, D)`."""
        return self.text_in(self.text_norm(states.to(self.patch_in.weight.dtype)))

    def _answer(self, x: Tensor, noise: Tensor, seen: Tensor) -> Tensor:
        """The output's tokens `(B, L, cells)`.

        What was seen is let through element by element, as much as its token says: a place whose content is certain lets
        nothing through and needs no width to carry its own noise to the output.
        """
        shift, scale = self.head_adaln(noise).chunk(2, dim=-1)
        x = modulate(self.head_norm(x), shift, scale).to(seen.dtype)
        return self.head(x) + self.gain(x) * seen

    def _own_places(self, grid: Grid, size: Grid, text: int, device: torch.device) -> tuple[Rope, Tensor]:
        """Rotations of the sequence and features of the tokens of a whole clip, kept for the next call."""
        if torch.compiler.is_compiling():
            places = patch_positions(grid, self.config.patch, device)
            return self._rope_at(places, text), place_features(places, size[1:])
        key = (grid, text, device)
        found = self._places.get(key)
        if found is None:
            if len(self._places) >= 64:
                self._places.clear()  # another thread's, too: what is found is not looked up again
            # Made outside inference mode: a tensor first used for sampling must still serve a later training step.
            with torch.inference_mode(False):
                places = patch_positions(grid, self.config.patch, device)
                found = self._places[key] = self._rope_at(places, text), place_features(places, size[1:])
        return found

    def _rope_at(self, positions: Tensor, text: int) -> Rope:
        """Cos and sin of the sequence; `text` unrotated tokens in front stand at the origin of space and time."""
        if text:
            positions = torch.cat([positions.new_zeros(*positions.shape[:-2], text, 3), positions], dim=-2)
        return self.rope(positions)


def tiny(config: SpacetimeConfig) -> SpacetimeConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=64, depth=2, heads=4, text_width=24)


def example(config: SpacetimeConfig, batch: int = 1, size: Grid | None = None) -> tuple[Tensor, Tensor, Condition]:
    """Random inputs for `forward`: latents of `size` (T, H, W), by default those counted, a noise level per sample and text."""
    (counted, text) = COUNTED[config.patch]
    z = torch.randn(batch, config.in_channels, *(size or counted))  # (B, C, T, H, W)
    states, mask = torch.randn(batch, text, config.text_width), torch.ones(batch, text, dtype=torch.bool)
    return z, torch.rand(batch), Condition(states, mask)


def stated(config: SpacetimeConfig) -> str:
    """The input that `example` makes, in words."""
    (T, H, W), text = COUNTED[config.patch]
    patch = " x ".join(map(str, config.patch))
    return (
        f"{config.in_channels} x {T} x {H} x {W} latents (C, T, H, W), patch {patch}, "
        f"{text} text tokens of width {config.text_width}"
    )


# Latent (T, H, W) and text tokens that a size is counted at, by patch.
COUNTED: dict[Grid, tuple[Grid, int]] = {
    (2, 2, 2): ((17, 8, 8), 48),
    (1, 2, 2): ((5, 32, 32), 48),
}


def _size(width: int, depth: int, text_width: int, in_channels: int = 16, patch: Grid = (1, 2, 2)) -> SpacetimeConfig:
    return SpacetimeConfig(width, depth, width // 64, in_channels, patch, text_width)


SIZES: dict[str, SpacetimeConfig] = {
    "XS": _size(256, 8, text_width=256, in_channels=8, patch=(2, 2, 2)),
    "S": _size(384, 12, text_width=384),
    "B": _size(768, 12, text_width=768),
    "L": _size(1024, 24, text_width=1024),
    "XL": _size(1152, 28, text_width=4096),
}
