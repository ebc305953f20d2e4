"""VDT: a DiT for video, whose blocks attend over time and then over space, and one input that serves every task.

After VDT: General-purpose Video Diffusion Transformers via Mask Modeling (Lu et al. 2023). A block is temporal attention, the
same cell of all frames, in front of a DiT block (Peebles & Xie 2023), all cells of one frame. Positions in space and in time
are fixed sin-cos tables. What is known of a film is given in one of four ways (section 3): mixed into the noise by a
mask, which is generation, prediction, interpolation, animation and completion at once; or, for prediction, the earlier frames
by adaptive layer norm, by cross-attention or as tokens of their own. On Physion those three reach FVD 270.8, 134.9 and 129.1.

Sizes are those of the released code: 41.4 M (S) and 859.7 M (L), and 0.4 M and 1.2 M for a table of labels. The paper prints
28.5 M and 595.9 M, which is 16 D^2 per block: no linear behind adaLN and none behind temporal attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.adaln_zero import AdaLNBlock, TimestepEmbedding, init_as_dit, sincos_line, sincos_plane
from tubelet.nn.attention import CrossAttention, SelfAttention
from tubelet.nn.conditioning import AdaLN, modulate
from tubelet.nn.ids import check_ids
from tubelet.nn.patch import patchify, token_grid, unpatchify

CONDITIONINGS = ("mask", "adaln", "cross-attention", "concat")


@dataclass(frozen=True)
class VDTConfig:
    """Sizes of a `VDT`. Raises UserError when they do not fit each other.

    `patch`, `classes` and `learn_sigma` as in DiT: a token's side in latent cells; labels, to which the table adds the null
    label; twice the channels out, noise and variance. `conditioning` "mask": a mask says which cells are clean; the
    others are given earlier frames: "adaln" adds what they say to the condition of every norm; "cross-attention" lets tokens
    look at theirs in every block; "concat" puts theirs in front of the sequence.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    in_channels: int = 4
    classes: int = 1000
    learn_sigma: bool = True
    conditioning: Literal["mask", "adaln", "cross-attention", "concat"] = "mask"

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.patch, self.in_channels, self.classes) < 1:
            raise UserError("every size of a VDT must be at least 1; raise the one that is not")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"{self.heads} heads need a width that they and 4 divide, got {self.width}; try {64 * self.heads}")
        if self.conditioning not in CONDITIONINGS:
            raise UserError(
                f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {self.conditioning!r}; choose one of them"
            )

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


class VDTBlock(nn.Module):
    """Temporal attention, with `cross` a look at the known frames, then an adaLN-Zero block within each frame.

    The temporal residual has a learned norm and a linear of its own; the condition does not touch it and it does not start at
    zero (released code). Where a cross-attention stands the paper leaves open; here it is a plain pre-norm residual.
    """

    def __init__(self, dim: int, heads: int, cross: bool = False) -> None:
        super().__init__()
        self.temporal_norm = nn.LayerNorm(dim, eps=1e-5)
        self.temporal = SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.temporal_out = nn.Linear(dim, dim)
        self.cross_norm = nn.LayerNorm(dim, eps=1e-6) if cross else None
        self.cross = CrossAttention(dim, heads, dim, qk_norm=False, bias=True) if cross else None
        self.spatial = AdaLNBlock(dim, heads)

    def forward(self, x: Tensor, c: Tensor, frames: int, context: Tensor | None = None) -> Tensor:
        """`x (B, L, D)` float32, `frames` equal runs of tokens, condition `c (B, 1, D)`; with `cross`, `context (B, M, D)`."""
        B, L, D = x.shape
        dtype = self.temporal_out.weight.dtype
        h = self.temporal_norm(x.to(dtype)).view(B, frames, L // frames, D).transpose(1, 2)  # (B, H*W, T, D)
        h = self.temporal_out(self.temporal(h.flatten(0, 1)))  # (B*H*W, T, D)
        x = x + h.view(B, L // frames, frames, D).transpose(1, 2).flatten(1, 2)  # (B, L, D)
        if self.cross is not None and self.cross_norm is not None and context is not None:
            x = x + self.cross(self.cross_norm(x.to(dtype)), context.to(dtype))
        return self.spatial(x, c, frames)


class VDT(nn.Module):
    """Noised latent clips, step numbers, labels and what is known in; noise and variance out, zero before training."""

    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        self.config = config
        D, cross = config.width, config.conditioning == "cross-attention"
        self.patch_in = nn.Linear(config.patch**2 * config.in_channels, D)
        self.timestep = TimestepEmbedding(D)
        self.labels = nn.Embedding(config.classes + 1, D)
        # The paper lets features of the known frames enter the norms as time does; an MLP per token, averaged, is our reading.
        self.known_up = nn.Linear(D, D) if config.conditioning == "adaln" else None
        self.known_down = nn.Linear(D, D) if config.conditioning == "adaln" else None
        self.blocks = nn.ModuleList(VDTBlock(D, config.heads, cross) for _ in range(config.depth))
        self.head_norm = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.head_adaln = AdaLN(D, 2)
        self.head = nn.Linear(D, config.patch**2 * config.out_channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        As released (`nn.adaln_zero.init_as_dit`), the head and its modulation zero: the output is zero, though a block is not
        the identity, since its temporal attention is there from the start.
        """
        init_as_dit(self)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head_adaln.out.weight)

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, clean: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Noised latents `x (B, C, T, H, W)` and step numbers `t (B,)` in [0, 1000) to `(B, 2C, T, H, W)`, or C channels.

        Args:
            label: `(B,)`, None for the null label `config.classes`, which a model without classes is trained with.
            clean: what is known. With conditioning "mask" `(B, C, T, H, W)`, of which the mask says what is looked at, or
                None when nothing is known; otherwise `(B, C, K, H, W)`, the K >= 1 frames just before x.
            mask: with conditioning "mask" `(B, T)` or `(B, T, H, W)` of 0 and 1. The input is x (1 - M) + clean M (section 3,
                unified spatial-temporal mask modeling): as in the paper 1 is known, 0 is to be made. The released code and
                `tasks.masks` have it the other way round, 1 to be made: pass 1 - mask.

        The paper trains 16 frames; other lengths run, since no table is stored. What comes out of known cells means nothing: a
        loss counts the others. Raises UserError when x does not divide into patches or the shapes do not belong together.
        """
        c, B = self.config, len(x)
        if x.ndim != 5 or x.shape[1] != c.in_channels:
            raise UserError(f"latents must be (B, {c.in_channels}, T, H, W), got {tuple(x.shape)}; encode clips accordingly")
        if label is None:
            label = torch.full((B,), c.classes, device=x.device)
        if t.shape != (B,) or label.shape != (B,):
            raise UserError(
                f"{B} clips need {B} step numbers and {B} labels, got {tuple(t.shape)} and {tuple(label.shape)}; "
                "give one of each per clip"
            )
        check_ids("labels", label, c.classes + 1)
        patch, dtype = (1, c.patch, c.patch), self.patch_in.weight.dtype
        grid = token_grid((x.shape[2], x.shape[3], x.shape[4]), patch)
        given = (self.timestep(t) + self.labels(label))[:, None]  # (B, 1, D)
        context = None
        if c.conditioning == "mask":
            h = self._embed(_mixed(x, clean, mask))  # (B, L, D)
        else:
            clean = _earlier(x, clean, mask, c.conditioning)
            known = clean.shape[2]
            h, context = self._embed(x, known), self._embed(clean)  # (B, L, D), (B, M, D)
        if self.known_up is not None and self.known_down is not None and context is not None:
            said = F.silu(self.known_up(context.to(dtype))).mean(1, keepdim=True)  # (B, 1, D)
            given = given + self.known_down(said)
        if c.conditioning == "concat" and context is not None:
            h, context = torch.cat([context, h], dim=1), None  # (B, M + L, D)
        L, frames = grid[0] * grid[1] * grid[2], h.shape[1] // (grid[1] * grid[2])
        for block in self.blocks:
            h = block(h, given, frames, context)
        shift, scale = self.head_adaln(given).chunk(2, dim=-1)  # (B, 1, D) each
        h = modulate(self.head_norm(h[:, -L:]), shift, scale)  # (B, L, D)
        return unpatchify(self.head(h.to(dtype)).to(x.dtype), grid, patch)  # (B, 2C, T, H, W)

    def _embed(self, z: Tensor, first: int = 0) -> Tensor:
        """Latents `(B, C, T, H, W)` whose first frame is number `first` as tokens `(B, L, D)` float32, each with its place."""
        p, D = self.config.patch, self.config.width
        T, rows, columns = z.shape[2], z.shape[3] // p, z.shape[4] // p
        times = sincos_line(D, first + T, z.device)[first:]  # (T, D)
        places = times[:, None] + sincos_plane(D, rows, columns, z.device)  # (T, H*W, D)
        cells = patchify(z, (1, p, p)).to(self.patch_in.weight.dtype)  # (B, L, p*p*C)
        return self.patch_in(cells).float() + places.flatten(0, 1)


def _mixed(x: Tensor, clean: Tensor | None, mask: Tensor | None) -> Tensor:
    """x where the mask is 0, clean where it is 1, `(B, C, T, H, W)`; x itself when nothing is known."""
    if clean is None and mask is None:
        return x
    if clean is None or mask is None:
        raise UserError("clean latents and a mask belong together; pass both, or neither when nothing is known")
    B, _, T, H, W = x.shape
    if clean.shape != x.shape or mask.shape not in ((B, T), (B, T, H, W)):
        raise UserError(
            f"for latents {tuple(x.shape)} clean has the same shape and mask is {(B, T)} or {(B, T, H, W)}, "
            f"got {tuple(clean.shape)} and {tuple(mask.shape)}; correct them"
        )
    wide = mask.reshape(*mask.shape, *[1] * (4 - mask.ndim))[:, None]  # (B, 1, T, H or 1, W or 1)
    # A choice, not a product: what stands in clean where nothing is known may be anything.
    return torch.where(wide.bool(), clean, x)


def _earlier(x: Tensor, clean: Tensor | None, mask: Tensor | None, conditioning: str) -> Tensor:
    """The known frames before x, checked."""
    if mask is not None:
        raise UserError(f"a VDT with conditioning {conditioning} knows whole earlier frames; leave the mask out")
    if clean is None or clean.ndim != 5 or clean.shape[2] < 1 or clean[:, :, :1].shape != x[:, :, :1].shape:
        B, C, _, H, W = x.shape
        raise UserError(
            f"a VDT with conditioning {conditioning} predicts from ({B}, {C}, K, {H}, {W}) earlier frames, "
            f"got {None if clean is None else tuple(clean.shape)}; pass at least one as clean"
        )
    return clean


def tiny(config: VDTConfig) -> VDTConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=32, depth=2, heads=2, classes=10)


def example(
    config: VDTConfig, batch: int = 1, frames: int = 16, side: int = 32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Random inputs for `forward`: a clip of `frames` x `side` x `side` latent cells whose first half is known."""
    known = frames // 2
    z = torch.randn(batch, config.in_channels, frames, side, side)  # (B, C, T, H, W)
    t, label = torch.rand(batch) * 999, torch.randint(config.classes, (batch,))
    if config.conditioning == "mask":
        return torch.randn_like(z), t, label, z, (torch.arange(frames) < known).expand(batch, -1)
    return torch.randn_like(z[:, :, known:]), t, label, z[:, :, :known], None


def stated(config: VDTConfig) -> str:
    """The input that `example` makes, in words."""
    return f"{config.in_channels} x 16 x 32 x 32 latents (C, T, H, W), 8 frames known, patch {config.patch} x {config.patch}"


# The two sizes of the released code: DiT's S and XL.
SIZES: dict[str, VDTConfig] = {"S/2": VDTConfig(384, 12, 6), "L/2": VDTConfig(1152, 28, 16)}
