"""VTN: a video transformer network (Neimark et al. 2021).

An image ViT describes every frame by itself (section 3.1); a shallow Longformer over those vectors relates the frames, each
with its neighbours and all with a class token (section 3.2); a small MLP classifies the class token (section 3.3). The cost
grows linearly with the frames, so that a whole video passes at once. Sizes follow the authors' code (bomri/SlowFast,
configs/Kinetics/VIT_B_VTN.yaml).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.conv import fold_frames
from tubelet.nn.images import ImageTokens
from tubelet.nn.longformer import LongformerBlock

EPS = 1e-6


@dataclass(frozen=True)
class VTNConfig:
    """Sizes of a `VTN`. Raises UserError when they do not fit each other.

    `frames` is the length that is counted; any other passes as well. `window`: frames that a frame sees, half on each side.
    `positions`: rows of the temporal table, of which the last two are the class token's and padding's. `dropout` is of the
    temporal encoder, `head_dropout` of the head.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    temporal_depth: int = 3
    temporal_hidden: int = 3072
    window: int = 18
    positions: int = 288
    frames: int = 250
    size: int = 224
    patch: int = 16
    classes: int = 400
    dropout: float = 0.1
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        counts = (self.width, self.depth, self.heads, self.temporal_depth, self.temporal_hidden, self.frames, self.size)
        if min(*counts, self.patch, self.classes) < 1:
            raise UserError("every size of a VTN must be at least 1; raise the one that is not")
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads need a width of k * heads, got {self.width}; try {64 * self.heads}")
        if self.size % self.patch:
            raise UserError(f"{self.size} pixels do not divide into patches of {self.patch}; choose a multiple")
        if self.window < 2 or self.window % 2:
            raise UserError(f"the window must be even and at least 2, got {self.window}; the paper's code has 18")
        if self.positions < 3:
            raise UserError(f"the temporal table needs at least 3 rows, got {self.positions}; the paper's code has 288")
        if not (0 <= self.dropout < 1 and 0 <= self.head_dropout < 1):
            raise UserError("a dropout must be at least 0 and below 1; correct the one that is not")


class FrameEncoder(nn.Module):
    """An image ViT (Dosovitskiy et al. 2021, equations 1 to 4): frames `(B, 3, T, H, W)` to one vector each, `(B, T, D)`."""

    def __init__(self, config: VTNConfig) -> None:
        super().__init__()
        self.embed = ImageTokens(config.width, config.size, config.patch)
        self.blocks = nn.ModuleList(EncoderBlock(config.width, config.heads, eps=EPS) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, EPS)

    def forward(self, video: Tensor) -> Tensor:
        x = self.embed(fold_frames(video))  # (B*T, 1 + L, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0]).unflatten(0, (len(video), -1))  # (B, T, D)


class TemporalEncoder(nn.Module):
    """Vectors of frames `(B, T, D)` to one of the clip, `(B, D)`: the class token after a few Longformer blocks.

    Longformer's table of token types is not here: its two rows are constants that the position table holds as well.
    """

    def __init__(self, config: VTNConfig) -> None:
        super().__init__()
        D = config.width
        self.cls = nn.Parameter(torch.zeros(D))
        self.positions = nn.Parameter(torch.zeros(config.positions, D))
        self.norm = nn.LayerNorm(D, 1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            LongformerBlock(D, config.heads, config.temporal_hidden, config.window, config.dropout)
            for _ in range(config.temporal_depth)
        )

    def forward(self, x: Tensor, numbers: Tensor | None = None) -> Tensor:
        """`numbers (T,)` or `(B, T)`: integers, which frame of its video each is; by default 0, 1, 2, ..."""
        if numbers is None:
            numbers = torch.arange(x.shape[1], device=x.device)
        # A table row is a frame number, counted round in longer videos; the last two rows are reserved.
        table, cls = self.positions[:-2], self.cls + self.positions[-2]
        x = torch.cat([cls.expand(len(x), 1, -1), x + table[numbers % len(table)]], dim=1)  # (B, 1 + T, D)
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


class VTN(nn.Module):
    """Video `(B, 3, T, H, W)` in [-1, 1], of any number of frames, to logits `(B, classes)`."""

    def __init__(self, config: VTNConfig) -> None:
        super().__init__()
        self.config = config
        D = config.width
        self.spatial = FrameEncoder(config)
        self.temporal = TemporalEncoder(config)
        self.head = nn.Sequential(
            nn.LayerNorm(D), nn.Linear(D, D), nn.GELU(), nn.Dropout(config.head_dropout), nn.Linear(D, config.classes)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Fill every parameter, normal with deviation 0.02: for a module built on the meta device, after `to_empty`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ImageTokens | TemporalEncoder):
                assert module.cls is not None, "frames and clip have a class token"
                nn.init.trunc_normal_(module.cls, std=0.02)
                nn.init.trunc_normal_(module.positions, std=0.02)

    def forward(self, video: Tensor, numbers: Tensor | None = None) -> Tensor:
        """`numbers (T,)` or `(B, T)`: integers, which frame of its video each is, so that every 8th frame in training and all
        frames later are the same moments; by default 0, 1, 2, ... Raises UserError when there is no frame, or the sides do not
        divide into patches."""
        if video.ndim != 5 or not video.shape[2]:
            raise UserError(f"video must be (B, 3, T, H, W) with T at least 1, got {tuple(video.shape)}; correct it")
        return self.head(self.temporal(self.spatial(video), numbers))


def tiny(config: VTNConfig) -> VTNConfig:
    """A config of the same shape, small enough for tests and without dropout."""
    small = replace(config, width=32, depth=1, heads=4, temporal_depth=2, temporal_hidden=64, window=4, positions=40)
    return replace(small, frames=11, size=16, patch=8, classes=5, dropout=0.0, head_dropout=0.0)


def example(config: VTNConfig, batch: int = 1) -> tuple[Tensor]:
    """Random inputs for `forward`: videos of the config's frames and size."""
    return (torch.randn(batch, 3, config.frames, config.size, config.size),)  # (B, 3, T, H, W)


def stated(config: VTNConfig) -> str:
    """The input that `example` makes, in words."""
    return f"3 x {config.frames} x {config.size} x {config.size} video (C, T, H, W), patch {config.patch}"


# ViT-B per frame, then three layers over time; a video of 250 frames passes whole.
SIZES: dict[str, VTNConfig] = {"B": VTNConfig()}
