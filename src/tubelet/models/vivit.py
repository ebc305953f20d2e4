"""ViViT: a vision transformer for video, joint or factorised over space and time (Arnab et al. 2021).

A clip is cut into tubelets, and a transformer classifies the tokens. The paper's four models differ in who attends to whom:
all tokens to all (1), frames first and then time with a second encoder (2), space then time inside every block (3), half of
the heads over space and half over time (4); a baseline averages the frames (table 2). Where paper and code leave a choice,
the authors' code decides (google-research/scenic, projects/vivit): tanh GELU, layer norms with eps 1e-6, class tokens and
head zero at the start, one learned position per token of each encoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.attention import SelfAttention, attention
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.mlp import MLP
from tubelet.nn.patch import patchify

Kind = Literal["joint", "encoder", "self-attention", "dot-product", "average"]
Pool = Literal["cls", "mean"]
EPS = 1e-6


@dataclass(frozen=True)
class ViViTConfig:
    """Sizes of a `ViViT`. Raises UserError when they do not fit each other.

    `kind`: "joint" is Model 1, "encoder" Model 2 (with `temporal_depth` layers over time), "self-attention" Model 3,
    "dot-product" Model 4, "average" the baseline. `tubelet` is (frames, rows, columns) of pixels a token spans. `embedding`
    "frames" is uniform frame sampling: of every clip `frames // tubelet[0]` frames are kept and cut into flat patches.
    `pool` "cls" reads a class token, "mean" the mean token; Models 3 and 4 have no class token.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    kind: Kind = "joint"
    temporal_depth: int = 4
    frames: int = 32
    size: int = 224
    tubelet: tuple[int, int, int] = (2, 16, 16)
    embedding: Literal["tubelet", "frames"] = "tubelet"
    pool: Pool = "cls"
    classes: int = 400

    def __post_init__(self) -> None:
        counts = (self.width, self.depth, self.heads, self.temporal_depth, self.frames, self.size, self.classes, *self.tubelet)
        if min(counts) < 1:
            raise UserError("every size of a ViViT must be at least 1; raise the one that is not")
        if self.width % self.heads:
            raise UserError(f"{self.heads} heads need a width of k * heads, got {self.width}; try {64 * self.heads}")
        if self.frames < self.tubelet[0]:
            raise UserError(f"{self.frames} frames do not fill a tubelet of {self.tubelet[0]}; give more frames")
        if self.size % self.tubelet[1] or self.size % self.tubelet[2]:
            raise UserError(f"{self.size} pixels do not divide into tubelets of {self.tubelet[1:]}; choose a multiple")
        if self.kind in ("self-attention", "dot-product") and self.pool == "cls":
            raise UserError(f"kind {self.kind} has no class token; set pool to mean")
        if self.kind == "dot-product" and self.heads % 2:
            raise UserError(f"kind dot-product shares heads between space and time, got {self.heads}; choose an even number")

    @property
    def grid(self) -> tuple[int, int]:
        """Token frames, and tokens in each of them."""
        pt, ph, pw = self.tubelet
        return self.frames // pt, (self.size // ph) * (self.size // pw)


def uniform_frames(frames: int, count: int) -> list[int]:
    """Which `count` of `frames` frames uniform sampling keeps: at i * frames / (count + 1), i = 1 .. count (section 3.2)."""
    if count >= frames:
        return list(range(frames))
    return [min(round(i * frames / (count + 1)), frames - 1) for i in range(1, count + 1)]


def central_frame(weight: Tensor, frames: int) -> Tensor:
    """A tubelet embedding from a flat one: the map of one frame `(D, n)` for the central of `frames`, zeros for the others.

    Section 3.4, equation 9. Returns `(D, frames * n)`, the weight of `TubeletEmbedding.map`.
    """
    out = weight.new_zeros(weight.shape[0], frames, weight.shape[1])
    out[:, frames // 2] = weight
    return out.flatten(1)


def inflate(weight: Tensor, frames: int) -> Tensor:
    """A tubelet embedding from a flat one: every frame gets the map `(D, n)`, divided by their number (section 3.4,
    equation 8). Returns `(D, frames * n)`."""
    return weight.repeat(1, frames) / frames


def repeat_positions(table: Tensor, frames: int) -> Tensor:
    """Positions of one frame's tokens behind a class token `(1 + L, D)`, for all frames alike: `(1 + frames * L, D)`.

    How the joint model starts from an image model (section 3.4).
    """
    return torch.cat([table[:1], table[1:].repeat(frames, 1)])


class TubeletEmbedding(nn.Module):
    """Video to tokens, `(B, C, T, H, W)` to `(B, T', L, D)`: one linear map of every tubelet (section 3.2).

    A tubelet's numbers are ordered (frame, row, column, channel). Frames at the end that fill no tubelet are left out, as by
    an unpadded convolution.
    """

    def __init__(self, dim: int, tubelet: tuple[int, int, int], channels: int = 3) -> None:
        super().__init__()
        self.tubelet = tubelet
        self.map = nn.Linear(tubelet[0] * tubelet[1] * tubelet[2] * channels, dim)

    def forward(self, video: Tensor) -> Tensor:
        pt = self.tubelet[0]
        T = video.shape[2] // pt
        cells = patchify(video[:, :, : T * pt], (1, *self.tubelet[1:])).unflatten(1, (T, pt, -1))  # (B, T', pt, L, n)
        return self.map(cells.transpose(2, 3).flatten(3))  # (B, T', L, D)


class SelfAttentionBlock(nn.Module):
    """Model 3: attention inside every frame, then along time at every place, then the MLP (section 3.3, equations 4 to 6).

    Tokens `(B, T*L, D)`, frame by frame. The paper's order; the code's default is time first.
    """

    def __init__(self, dim: int, heads: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.space_norm, self.space = nn.LayerNorm(dim, EPS), SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.time_norm, self.time = nn.LayerNorm(dim, EPS), SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, EPS), MLP(dim, 4 * dim, "tanh")

    def forward(self, x: Tensor) -> Tensor:
        B = len(x)
        x = x.unflatten(1, (self.frames, -1)).flatten(0, 1)  # (B*T, L, D)
        x = x + self.space(self.space_norm(x))
        x = x.unflatten(0, (B, -1)).transpose(1, 2).flatten(0, 1)  # (B*L, T, D)
        x = x + self.time(self.time_norm(x))
        x = x.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)  # (B, T*L, D)
        return x + self.mlp(self.mlp_norm(x))


class DotProductAttention(nn.Module):
    """Model 4: self-attention whose first half of heads looks along time, the second inside the frame (section 3.3).

    Tokens `(B, T*L, D)`, frame by frame. The parameters are those of plain self-attention.
    """

    def __init__(self, dim: int, heads: int, frames: int) -> None:
        super().__init__()
        self.heads, self.frames = heads, frames
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, D = len(x), x.shape[-1]
        qkv = self.qkv(x).view(B, self.frames, -1, 3, self.heads, D // self.heads)  # (B, T, L, 3, N, d)
        time, space = qkv.chunk(2, dim=4)
        q, k, v = time.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # 3 x (B*L, N/2, T, d)
        along_time = attention(q, k, v).unflatten(0, (B, -1)).permute(0, 3, 1, 2, 4)  # (B, T, L, N/2, d)
        q, k, v = space.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # 3 x (B*T, N/2, L, d)
        in_frame = attention(q, k, v).unflatten(0, (B, -1)).transpose(2, 3)  # (B, T, L, N/2, d)
        return self.out(torch.cat([along_time, in_frame], dim=3).flatten(3).flatten(1, 2))  # (B, T*L, D)


class DotProductBlock(nn.Module):
    """Model 4: the pre-norm block of Model 1 with its heads divided."""

    def __init__(self, dim: int, heads: int, frames: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim, EPS), DotProductAttention(dim, heads, frames)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim, EPS), MLP(dim, 4 * dim, "tanh")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """Tokens `(B, L, D)` to one vector `(B, D)`: class token, learned positions, blocks, final norm, pooling (equation 1)."""

    def __init__(self, dim: int, tokens: int, pool: Pool, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(dim)) if pool == "cls" else None
        self.positions = nn.Parameter(torch.zeros(tokens + (pool == "cls"), dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, EPS)

    def embed(self, x: Tensor) -> Tensor:
        """The sequence that enters the first block."""
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)  # (B, 1 + L, D)
        return x + self.positions

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0] if self.cls is not None else x.mean(1)  # (B, D)


def attention_map(layer: SelfAttention, x: Tensor) -> Tensor:
    """How much each of the tokens `x (B, L, D)` looks at each: softmaxed weights `(B, N, L, L)` of a layer without QK-norm."""
    q, k, _ = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, N, L, d)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


class ViViT(nn.Module):
    """Video `(B, 3, T, H, W)` in [-1, 1] to logits `(B, classes)`, zero before training."""

    def __init__(self, config: ViViTConfig) -> None:
        super().__init__()
        self.config = config
        D, N, (T, L) = config.width, config.heads, config.grid
        pt, ph, pw = config.tubelet
        self.embedding = TubeletEmbedding(D, (pt if config.embedding == "tubelet" else 1, ph, pw))

        def block() -> nn.Module:
            if config.kind == "self-attention":
                return SelfAttentionBlock(D, N, T)
            if config.kind == "dot-product":
                return DotProductBlock(D, N, T)
            return EncoderBlock(D, N, eps=EPS, activation="tanh")

        self.by_frame = config.kind in ("encoder", "average")
        self.encoder = Encoder(D, L if self.by_frame else T * L, config.pool, (block() for _ in range(config.depth)))
        layers = config.temporal_depth if config.kind == "encoder" else 0
        self.temporal = Encoder(D, T, config.pool, (block() for _ in range(layers))) if layers else None
        self.head = nn.Linear(D, config.classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`. Class tokens and head are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # Queries, keys and values are three maps, although one weight holds them.
                parts = 3 if module.out_features == 3 * module.in_features else 1
                for part in module.weight.chunk(parts):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, Encoder):
                nn.init.normal_(module.positions, std=0.02)
                if module.cls is not None:
                    nn.init.zeros_(module.cls)
        for module in self.modules():
            if isinstance(module, SelfAttentionBlock):
                # Section 3.4: attention along time starts as the identity. Zeros in the output suffice; zeros in every
                # weight of it, as the paper has it, are a saddle that no gradient leaves.
                nn.init.zeros_(module.time.out.weight)
        nn.init.normal_(self.embedding.map.weight, std=self.embedding.map.in_features**-0.5)
        nn.init.zeros_(self.head.weight)

    def tokens(self, video: Tensor) -> Tensor:
        """Tokens before positions, `(B, T', L, D)`. Raises UserError when the video is not of the config's size."""
        T, size = self.config.frames, self.config.size
        if video.ndim != 5 or video.shape[1:] != (3, T, size, size):
            raise UserError(
                f"this ViViT takes video (B, 3, {T}, {size}, {size}), got {tuple(video.shape)}; resize or sample the clip"
            )
        if self.config.embedding == "frames":
            video = video[:, :, uniform_frames(T, self.config.grid[0])]  # (B, 3, T', H, W)
        return self.embedding(video)

    def features(self, video: Tensor) -> Tensor:
        """What the head reads, `(B, D)`."""
        if not self.by_frame:
            return self.encoder(self.tokens(video).flatten(1, 2))
        frames = self.frame_features(video)
        return frames.mean(1) if self.temporal is None else self.temporal(frames)

    def frame_features(self, video: Tensor) -> Tensor:
        """Model 2 and the baseline: one vector per token frame, `(B, T', D)`."""
        assert self.by_frame, "only kinds encoder and average see frame by frame"
        x = self.tokens(video)  # (B, T', L, D)
        return self.encoder(x.flatten(0, 1)).unflatten(0, (len(x), -1))  # (B, T', D)

    def forward(self, video: Tensor) -> Tensor:
        return self.head(self.features(video))

    def time_maps(self, video: Tensor) -> Tensor:
        """Who looks at whom over time in Model 2, `(B, temporal_depth, N, L, L)`; rows sum to 1.

        L is the class token, if there is one, and then the token frames: row 0 says which frames decide. Raises UserError for
        another kind, which has no temporal encoder.
        """
        if self.temporal is None:
            raise UserError(f"kind {self.config.kind} has no temporal encoder; use kind encoder")
        x, maps = self.temporal.embed(self.frame_features(video)), []
        for block in self.temporal.blocks:
            assert isinstance(block, EncoderBlock), "the temporal encoder is made of plain blocks"
            maps.append(attention_map(block.attention, block.attention_norm(x)))
            x = block(x)
        return torch.stack(maps, dim=1)


class WideBlock(nn.Module):
    """Pre-norm block whose heads have a width of their own, `dim_head`, and whose queries, keys and values have no bias."""

    def __init__(self, dim: int, heads: int, dim_head: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))
        up, down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), nn.Dropout(dropout), down, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, N, L, d)
        x = x + self.out(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, L, D)
        return x + self.mlp(x)


class FlatViViT(nn.Module):
    """Model 2 as a widely read analysis of Sora writes it; the paper's is `ViViT` with kind "encoder".

    Flat patches of every frame, one position per patch *and* frame, `(1, T, L + 1, D)`, and none in the temporal encoder, which
    is as deep as the spatial one. Video `(B, in_channels, num_frames, image_size, image_size)` to logits `(B, num_classes)`.
    Raises UserError when the sizes do not fit, or the video has other than `num_frames` frames: the table has one row for each.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_classes: int,
        num_frames: int,
        dim: int = 192,
        depth: int = 4,
        heads: int = 3,
        pool: Pool = "cls",
        in_channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        scale_dim: int = 4,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"{image_size} pixels do not divide into patches of {patch_size}; choose a multiple")
        if pool not in ("cls", "mean"):
            raise UserError(f"pool must be cls or mean, got {pool!r}; choose one of them")
        self.shape, self.pool = (in_channels, num_frames, image_size, image_size), pool
        self.embedding = TubeletEmbedding(dim, (1, patch_size, patch_size), in_channels)
        self.positions = nn.Parameter(torch.randn(1, num_frames, (image_size // patch_size) ** 2 + 1, dim))
        self.space_cls, self.time_cls = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.dropout = nn.Dropout(emb_dropout)

        def transformer() -> nn.Sequential:
            blocks = (WideBlock(dim, heads, dim_head, scale_dim * dim, dropout) for _ in range(depth))
            return nn.Sequential(*blocks, nn.LayerNorm(dim))

        self.space, self.time = transformer(), transformer()
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(self, video: Tensor) -> Tensor:
        if video.ndim != 5 or video.shape[1:] != self.shape:
            raise UserError(f"this model takes video (B, *{self.shape}), got {tuple(video.shape)}; resize or sample the clip")
        x = self.embedding(video)  # (B, T, L, D)
        B, T = x.shape[:2]
        x = torch.cat([self.space_cls.expand(B, T, 1, -1), x], dim=2)  # (B, T, 1 + L, D)
        x = self.space(self.dropout(x + self.positions).flatten(0, 1))[:, 0].unflatten(0, (B, T))  # (B, T, D)
        x = self.time(torch.cat([self.time_cls.expand(B, 1, -1), x], dim=1))  # (B, 1 + T, D)
        return self.head(x[:, 0] if self.pool == "cls" else x.mean(1))


def tiny(config: ViViTConfig) -> ViViTConfig:
    """A config of the same shape, small enough for tests."""
    return replace(
        config, width=32, depth=2, heads=4, temporal_depth=2, frames=6, size=16, tubelet=(config.tubelet[0], 8, 8), classes=5
    )


def example(config: ViViTConfig, batch: int = 1) -> tuple[Tensor]:
    """Random inputs for `forward`: videos of the config's size."""
    return (torch.randn(batch, 3, config.frames, config.size, config.size),)  # (B, 3, T, H, W)


def stated(config: ViViTConfig) -> str:
    """The input that `example` makes, in words."""
    tubelet = " x ".join(map(str, config.tubelet))
    return f"3 x {config.frames} x {config.size} x {config.size} video (C, T, H, W), tubelet {tubelet}"


# Section 4.1: /16x2 is a tubelet of 16 x 16 pixels and 2 frames. The factorised encoder has 4 layers over time (table 3).
SIZES: dict[str, ViViTConfig] = {
    "B/16x2": ViViTConfig(),
    "B/16x2-FE": ViViTConfig(kind="encoder"),
    "B/16x2-FSA": ViViTConfig(kind="self-attention", pool="mean"),
    "B/16x2-FDP": ViViTConfig(kind="dot-product", pool="mean"),
    "B/16x2-AVG": ViViTConfig(kind="average"),
    "L/16x2": ViViTConfig(1024, 24, 16),
    "L/16x2-FE": ViViTConfig(1024, 24, 16, kind="encoder"),
}
