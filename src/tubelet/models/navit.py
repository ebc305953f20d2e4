"""NaViT: a vision transformer for images and clips of any size, several of them as one row of tokens.

After Patch n' Pack (Dehghani et al. 2023): a ViT (Dosovitskiy et al. 2021) in which every sample keeps its size and aspect
ratio. Samples stand one after the other in a row and attend to themselves alone (section 2.1, masked attention); a learned
query per sample pools them (masked pooling); positions are learned separately along each axis and summed, so that not every
pair (x, y) must be seen in training. From ViT-22B it takes QK-norm and the omission of biases, from Zhai et al. (2022) the
attention pooling (section 3). An image is a one-frame clip; time is one more axis of the positions (section 3.6, video).

In training a sample may be shown in part: `forward_packed` takes the indices of the kept tokens; `nn.dropping` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.attention import SelfAttention
from tubelet.nn.mlp import MLP
from tubelet.nn.norms import RMSNorm
from tubelet.nn.packing import Segments
from tubelet.nn.patch import Grid, patchify, token_grid
from tubelet.nn.pooling import AttentionPool
from tubelet.nn.positions import grid_positions


@dataclass(frozen=True)
class NaViTConfig:
    """Sizes of a `NaViT`; the defaults suit clips of 64 px. Raises UserError when they do not fit each other.

    `patch` is (frames, rows, columns) of pixels a token spans. `max_frames` and `max_side` are the entries of the position
    tables, in patches: along time, and along either side. `positions` "absolute": a patch's index is its entry, and a clip that
    is longer is refused; "fractional": its index as a share of the clip's own length, so that every size fits, but the aspect
    ratio shows only in the number of patches. `head` "classes": `outputs` logits; "contrastive": a unit vector of that width.
    """

    width: int = 192
    depth: int = 6
    heads: int = 3
    in_channels: int = 3
    patch: Grid = (1, 8, 8)
    max_frames: int = 32
    max_side: int = 16
    positions: Literal["absolute", "fractional"] = "absolute"
    head: Literal["classes", "contrastive"] = "classes"
    outputs: int = 64

    def __post_init__(self) -> None:
        sizes = (self.width, self.depth, self.heads, self.in_channels, self.max_frames, self.max_side, self.outputs)
        if min(*sizes, *self.patch) < 1:
            raise UserError("every size of a NaViT must be at least 1; raise the one that is not")
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads need a width that they divide, got {self.width}; try {64 * self.heads}")
        if self.positions not in ("absolute", "fractional"):
            raise UserError(f"positions must be absolute or fractional, got {self.positions!r}; choose one of them")
        if self.head not in ("classes", "contrastive"):
            raise UserError(f"head must be classes or contrastive, got {self.head!r}; choose one of them")


def places(grid: Grid, config: NaViTConfig, device: torch.device | str | None = None) -> Tensor:
    """Where the tokens of a clip of `grid` (T, H, W) patches stand in the position tables, `(L, 3)` floats (t, y, x).

    Absolute: index p. Fractional: r = p / length (section 2.1) times the table's entries, so that a clip as long as the table
    has absolute places, and a shorter or longer one is spread over it. Raises UserError when a clip is longer than the table.
    """
    entries = (config.max_frames, config.max_side, config.max_side)
    index = grid_positions(*grid, device=device)  # (L, 3)
    if config.positions == "fractional":
        scale = [n / length for n, length in zip(entries, grid, strict=True)]
        return torch.minimum(index * index.new_tensor(scale), index.new_tensor(entries) - 1)
    for name, length, n in zip(("frames", "rows", "columns"), grid, entries, strict=True):
        if length > n:
            raise UserError(
                f"{length} {name} of patches exceed the {n} learned places; shrink the clip or take fractional positions"
            )
    return index


def look_up(table: Tensor, at: Tensor) -> Tensor:
    """Entries of a `table (n, D)` at places `(...)` from 0 to n - 1, linear between two entries, `(..., D)`.

    At a whole number it is the entry itself; between them it is how fractional embeddings are read from learned absolute ones
    (appendix C.1: bilinear interpolation, which is linear along each axis of a sum).
    """
    low = at.floor().clamp(0, len(table) - 1)
    high = (low + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[low.long()], table[high.long()], (at - low)[..., None].to(table.dtype))


class NaViTBlock(nn.Module):
    """Pre-norm residual block of a ViT with QK-norm; no bias in its linears, none in its layer norms (section 3).

    ViT-22B, which the paper cites for it, keeps the biases of the MLP; here the sentence is taken as it stands.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.attention = SelfAttention(dim, heads, qk_norm=True)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.mlp = MLP(dim, 4 * dim, bias=False)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """`x (1, L, D)`, a pack of `segments`."""
        x = x + self.attention(self.attention_norm(x), segments=segments)
        return x + self.mlp(self.mlp_norm(x))


class NaViT(nn.Module):
    """Images and clips in, one vector per sample out: class logits, or a unit vector for contrastive training.

    The classifier alone has a bias, the logits of a sample of which nothing is shown.
    """

    def __init__(self, config: NaViTConfig) -> None:
        super().__init__()
        self.config = config
        D, (pt, ph, pw) = config.width, config.patch
        self.patch_in = nn.Linear(pt * ph * pw * config.in_channels, D, bias=False)
        self.t_table = nn.Parameter(torch.empty(config.max_frames, D))
        self.y_table = nn.Parameter(torch.empty(config.max_side, D))
        self.x_table = nn.Parameter(torch.empty(config.max_side, D))
        self.blocks = nn.ModuleList(NaViTBlock(D, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6, bias=False)
        self.pool = AttentionPool(D, config.heads, qk_norm=True, bias=False)
        self.pool_norm = nn.LayerNorm(D, eps=1e-6, bias=False)
        self.pool_mlp = MLP(D, 4 * D, bias=False)
        self.head = nn.Linear(D, config.outputs, bias=config.head == "classes")
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        Linears get variance 1 / fan-in, position tables a standard deviation of 0.02, gains are one.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, RMSNorm)) and module.weight is not None:
                nn.init.ones_(module.weight)
        for table in (self.t_table, self.y_table, self.x_table):
            nn.init.normal_(table, std=0.02)
        nn.init.normal_(self.pool.queries, std=self.config.width**-0.5)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips `(B, C, T, H, W)` of one size, in [-1, 1], to `(B, outputs)`.

        Raises UserError when they do not divide into patches, are longer than the position tables or have other channels.
        """
        cells, at = self.cut(clips)
        B, L = cells.shape[:2]
        # A batch is a pack of equals: attention computes neighbours of one length in one call.
        return self.answer(self.encode(cells.flatten(0, 1)[None], at.repeat(B, 1), Segments.of_self([L] * B)))  # (B, outputs)

    def forward_packed(self, clips: Sequence[Tensor], kept: Sequence[Tensor] | None = None) -> Tensor:
        """`forward` for S clips `(C, T, H, W)` of any sizes as one row of tokens, `(S, outputs)`.

        kept: per clip the indices of the tokens that are shown, `(K,)` integers (`nn.dropping.keep_tokens`); they keep their
        positions. A clip of which none is shown yields the classifier's bias, or a zero vector. Errors as in `forward`,
        and UserError when there are not as many `kept` as clips.
        """
        if kept is not None and len(kept) != len(clips):
            raise UserError(f"{len(clips)} clips, {len(kept)} lists of kept tokens; give one per clip")
        rows = [self.cut(clip[None]) for clip in clips]
        if not rows:
            return self.head.weight.new_zeros(0, self.config.outputs)
        if kept is not None:
            index = [one.to(cells.device, torch.long) for one, (cells, _) in zip(kept, rows, strict=True)]
            rows = [(cells[:, one], at[one]) for one, (cells, at) in zip(index, rows, strict=True)]
        cells = torch.cat([cells for cells, _ in rows], dim=1)  # (1, L, cells)
        at = torch.cat([at for _, at in rows])  # (L, 3)
        return self.answer(self.encode(cells, at, Segments.of_self([len(at) for _, at in rows])))  # (S, outputs)

    def cut(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Patches of clips `(B, C, T, H, W)` as tokens `(B, L, cells)`, and their `places (L, 3)`. Errors as in `forward`."""
        if clips.shape[1] != self.config.in_channels:
            raise UserError(f"clips have {clips.shape[1]} channels, the network takes {self.config.in_channels}; convert them")
        grid = token_grid((clips.shape[2], clips.shape[3], clips.shape[4]), self.config.patch)
        return patchify(clips, self.config.patch), places(grid, self.config, clips.device)

    def encode(self, cells: Tensor, at: Tensor, segments: Segments) -> Tensor:
        """A pack of tokens `(1, L, cells)` at `places (L, 3)` to one vector per sample, `(S, D)`."""
        x = self.patch_in(cells.to(self.patch_in.weight.dtype))  # (1, L, D)
        for axis, table in enumerate((self.t_table, self.y_table, self.x_table)):
            x = x + look_up(table, at[:, axis])
        for block in self.blocks:
            x = block(x, segments)
        pooled = self.pool(self.norm(x), segments=segments)[0]  # (S, D)
        # The head of Zhai et al. (2022): what was pooled passes an MLP of its own.
        return pooled + self.pool_mlp(self.pool_norm(pooled))

    def answer(self, features: Tensor) -> Tensor:
        """Features `(S, D)` as logits or unit vectors, `(S, outputs)`."""
        out = self.head(features)  # (S, outputs)
        # The floor bounds the gradient of a vector that is zero because nothing of its sample was shown.
        return out if self.config.head == "classes" else F.normalize(out.float(), dim=-1, eps=1e-3)


def tiny(config: NaViTConfig) -> NaViTConfig:
    """A config of the same shape, small enough for tests."""
    return replace(config, width=48, depth=2, heads=4, outputs=10)


def example(config: NaViTConfig, batch: int = 1, size: Grid = (1, 224, 224)) -> tuple[Tensor]:
    """Random inputs for `forward`: clips of `size` (T, H, W), by default the one counted, an image of 224 px."""
    return (torch.randn(batch, config.in_channels, *size),)  # (B, C, T, H, W)


def stated(config: NaViTConfig) -> str:
    """The input that `example` makes, in words."""
    return f"{config.in_channels} x 1 x 224 x 224 pixels (C, T, H, W), patch {' x '.join(map(str, config.patch))}"


# The paper leaves the lengths of the tables open: 64 patches of 16 px are a side of 1024 px. 1000 classes are ImageNet's.
SIZES: dict[str, NaViTConfig] = {
    "B/16": NaViTConfig(768, 12, 12, patch=(1, 16, 16), max_frames=32, max_side=64, outputs=1000),
}
