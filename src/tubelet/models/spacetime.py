"""The flagship: a diffusion transformer over spacetime patches, conditioned on text and on a noise level per token.

After Sora (Brooks et al. 2024), on DiT (Peebles & Xie 2023): latents are cut into tubelets and embedded linearly; every block
attends over all of space and time at once; positions are rotary on (t, h, w), so no size is built in and an image is a
one-frame video. Noise levels enter through shared adaLN and may differ per frame or per cell, which is what lets one
network continue, connect, inpaint and stream. It knows no schedule: its output is raw, and `diffusion` says what it means.
"""

from __future__ import annotations

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
from tubelet.nn.patch import Grid, patch_positions, patchify, token_grid, unpatchify
from tubelet.nn.positions import RotaryEmbedding


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
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise UserError(f"{self.heads} heads need a width of 8 * k * heads, got {self.width}; try {64 * self.heads}")
        if self.text not in ("cross", "joint"):
            raise UserError(f"text must be cross or joint, got {self.text!r}; choose one of them")


class Spacetime(nn.Module):
    """Noised latents, their noise levels and a prompt in; a raw output of the latents' shape out, zero before training."""

    def __init__(self, config: SpacetimeConfig) -> None:
        super().__init__()
        self.config = config
        D, head = config.width, config.width // config.heads
        cells = config.patch[0] * config.patch[1] * config.patch[2] * config.in_channels
        self.patch_in = nn.Linear(cells, D)
        self.text_norm = RMSNorm(config.text_width)
        self.text_in = nn.Linear(config.text_width, D)
        self.noise = NoiseEmbedding(D)
        self.adaln = AdaLN(D, 6)
        self.rope = RotaryEmbedding((head // 4, head * 3 // 8, head * 3 // 8))
        self.blocks = nn.ModuleList(SpacetimeBlock(D, config.heads, cross=config.text == "cross") for _ in range(config.depth))
        self.head_norm = RMSNorm(D, affine=False)
        self.head_adaln = AdaLN(D, 2)
        self.head = nn.Linear(D, cells)
        self._angles: dict[tuple[Grid, int, torch.device], Rope] = {}
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
        for linear in (self.adaln.out, self.head_adaln.out, self.head):
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
        grid = token_grid((z.shape[2], z.shape[3], z.shape[4]), patch)
        x = self.patch_in(patchify(z, patch).to(dtype)).float()  # (B, L, D)
        noise = self.noise(token_sigma(sigma, len(z), patch))  # (B, G, D)
        modulation = self.adaln(noise)  # (B, G, 6D)

        real = condition.mask[..., None]
        text = self.text_in(self.text_norm(torch.where(real, condition.states, 0.0).to(dtype)))  # (B, M, D)
        joint = self.config.text == "joint"
        M, L = text.shape[1] if joint else 0, x.shape[1]
        rope = self._rope(grid, M, z.device) if positions is None else self._rope_at(positions, M)
        context, mask = text, condition.mask
        if joint:
            x, context = torch.cat([text.float(), x], dim=1), None  # (B, M + L, D)
            mask = torch.cat([mask, mask.new_ones(len(z), L)], dim=1)  # (B, M + L)
            if modulation.shape[1] > 1:
                # Text has no noise of its own; the clip's mean modulation makes equal levels agree with a single one.
                rows = modulation.repeat_interleave(L // modulation.shape[1], dim=1)  # (B, L, 6D)
                modulation = torch.cat([rows.mean(1, keepdim=True).expand(-1, M, -1), rows], dim=1)  # (B, M + L, 6D)

        for block in self.blocks:
            x = block(x, modulation, rope, context, mask)
        shift, scale = self.head_adaln(noise).chunk(2, dim=-1)
        x = modulate(self.head_norm(x[:, M:]), shift, scale).to(dtype)
        return unpatchify(self.head(x).to(z.dtype), grid, patch)  # (B, C, T, H, W)

    def _rope(self, grid: Grid, text: int, device: torch.device) -> Rope:
        if torch.compiler.is_compiling():
            return self._rope_at(patch_positions(grid, self.config.patch, device), text)
        key = (grid, text, device)
        if key not in self._angles:
            if len(self._angles) >= 64:
                self._angles.clear()
            # Made outside inference mode: a tensor first used for sampling must still serve a later training step.
            with torch.inference_mode(False):
                self._angles[key] = self._rope_at(patch_positions(grid, self.config.patch, device), text)
        return self._angles[key]

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
