"""CoCa, the contrastive captioner: one forward gives an embedding of the image, one of the caption, and the caption itself.

After Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models". Two attentional poolers read an image
encoder (section 3.2): 256 queries for the decoder, one for the contrast; the second reads the first ("cascade", the default of
all models) or the encoder ("parallel", as drawn in figure 2). The decoder is cut in half: the first half never sees the image,
and a class token behind the caption makes its embedding; the second half looks at the image and predicts the next token.

What the paper leaves open is done as in Google's VILA (Ke et al. 2023), which is built on it: a norm behind each pooler, sine
and cosine positions of tokens and none of the class token, embeddings scaled by the root of the width, the mean of both
directions in the contrastive loss. The poolers are plain attention layers, as the paper says. No public CoCa has all of this,
so blocks are compared with public ones, not the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.nn.attention import CrossAttention, SelfAttention
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.contrastive import contrastive_loss
from tubelet.nn.images import ImageTokens
from tubelet.nn.mlp import MLP
from tubelet.nn.pooling import AttentionPool
from tubelet.nn.positions import sincos

EPS = 1e-6
CAPTIONING, CONTRASTIVE = 2.0, 1.0
TEMPERATURE = 0.07


@dataclass(frozen=True)
class CoCaConfig:
    """Sizes of a `CoCa`. Raises UserError when they do not fit each other.

    `width` and `heads` are those of the encoder and of both halves of the decoder; `text_depth` is the depth of one half.
    `image` is the side in pixels that the positions are made for; `queries` is how many vectors the decoder sees of an image.
    `frames` above 0 tells the poolers of a video which of so many frames a token is from: not in the paper, whose poolers know
    no order and so cannot tell a fall from a rise. `video_depth` blocks then read all of its tokens together, before the
    poolers: not in the paper either; docs/lineage.md says what they and audible places together bought.
    """

    width: int = 768
    heads: int = 12
    image_depth: int = 12
    image_hidden: int = 3072
    text_depth: int = 12
    text_hidden: int = 3072
    image: int = 288
    patch: int = 18
    vocab: int = 64_000
    queries: int = 256
    frames: int = 0
    video_depth: int = 0
    pooling: Literal["cascade", "parallel"] = "cascade"

    def __post_init__(self) -> None:
        sizes = (self.width, self.heads, self.image_depth, self.image_hidden, self.text_depth, self.text_hidden)
        if min(*sizes, self.image, self.patch, self.vocab, self.queries) < 1 or min(self.frames, self.video_depth) < 0:
            raise UserError(
                "every size of a CoCa must be at least 1, its frames and video_depth at least 0; raise the one that is not"
            )
        if self.width % (2 * self.heads):
            raise UserError(f"{self.heads} heads need an even multiple as width, got {self.width}; try {64 * self.heads}")
        if self.image % self.patch:
            near = max(1, round(self.image / self.patch)) * self.patch
            raise UserError(f"{self.image} pixels do not divide into patches of {self.patch}; try {near}")
        if self.pooling not in ("cascade", "parallel"):
            raise UserError(f"pooling must be cascade or parallel, got {self.pooling!r}; choose one of them")


class CaptionBlock(nn.Module):
    """A layer of the multimodal half: causal self-attention, cross-attention to the image, one MLP; 16 D^2 weights.

    Pre-norm like every block of the model. (Two whole blocks with an MLP each would be 24 D^2, and not the published counts.)
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, EPS)
        self.attention = SelfAttention(dim, heads, qk_norm=False, bias=True)
        self.cross_norm = nn.LayerNorm(dim, EPS)
        self.cross = CrossAttention(dim, heads, dim, qk_norm=False, bias=True)
        self.mlp_norm = nn.LayerNorm(dim, EPS)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Tokens `x (B, L, D)` and what is seen, `memory (B, M, D)`. Padding stands behind a caption, which never sees it."""
        x = x + self.attention(self.attention_norm(x), causal=True)
        x = x + self.cross(self.cross_norm(x), memory)
        return x + self.mlp(self.mlp_norm(x))


class ImageEncoder(nn.Module):
    """A ViT without a class token: images `(B, 3, H, W)` to tokens `(B, L, D)`."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        D, hidden = config.width, config.image_hidden
        self.embed = ImageTokens(D, config.image, config.patch, cls=False)
        self.blocks = nn.ModuleList(EncoderBlock(D, config.heads, hidden, eps=EPS) for _ in range(config.image_depth))
        self.norm = nn.LayerNorm(D, EPS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)  # (B, L, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VideoEncoder(nn.Module):
    """Blocks over the tokens of all frames of a video at once, `(B, T*L, D)`; an image's are those of one frame."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        D, hidden = config.width, config.image_hidden
        self.blocks = nn.ModuleList(EncoderBlock(D, config.heads, hidden, eps=EPS) for _ in range(config.video_depth))
        self.norm = nn.LayerNorm(D, EPS)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class UnimodalDecoder(nn.Module):
    """The half that reads captions alone; a class token stands behind them, seen by none and seeing all of them."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        D, hidden = config.width, config.text_hidden
        self.tokens = nn.Embedding(config.vocab, D)
        self.cls = nn.Parameter(torch.zeros(D))
        self.blocks = nn.ModuleList(EncoderBlock(D, config.heads, hidden, eps=EPS) for _ in range(config.text_depth))
        self.norm = nn.LayerNorm(D, EPS)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids `(B, L)` and their `mask (B, L)` to states `(B, L, D)`, not normed, and the class token's, normed, `(B, D)`."""
        B, L = ids.shape
        D = len(self.cls)
        x = self.tokens(ids) * D**0.5
        x = x + sincos(D, torch.arange(L, device=ids.device)).to(x.dtype)  # (B, L, D)
        x = torch.cat([x, (self.cls * D**0.5).to(x.dtype).expand(B, 1, -1)], dim=1)  # (B, L + 1, D)
        keys = None if mask is None else torch.cat([mask, mask.new_ones(B, 1)], dim=1)[:, None, None]  # (B, 1, 1, L + 1)
        for block in self.blocks:
            x = block(x, mask=keys, causal=True)
        return x[:, :-1], self.norm(x[:, -1])


class MultimodalDecoder(nn.Module):
    """The half that looks at the image and predicts the next token; its output layer is not tied to the embedding."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        D, hidden = config.width, config.text_hidden
        self.blocks = nn.ModuleList(CaptionBlock(D, config.heads, hidden) for _ in range(config.text_depth))
        self.norm = nn.LayerNorm(D, EPS)
        self.head = nn.Linear(D, config.vocab)

    def forward(self, states: Tensor, memory: Tensor, last: bool = False) -> Tensor:
        """Unimodal `states (B, L, D)` and what is seen, `memory (B, M, D)`, to logits `(B, L, V)`, or the last `(B, 1, V)`."""
        for block in self.blocks:
            states = block(states, memory)
        return self.head(self.norm(states[:, -1:] if last else states))


class CoCaOutput(NamedTuple):
    """Unit vectors of images and of captions `(B, D)`, logits of the next token `(B, L, V)`, the scale of cosines `()`."""

    image: Tensor
    text: Tensor
    logits: Tensor
    scale: Tensor


class CoCa(nn.Module):
    """Images (or videos) and captions in; both embeddings and the logits of every next token out."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        self.config = config
        D, N = config.width, config.heads
        self.image = ImageEncoder(config)
        self.caption_pool, self.caption_norm = AttentionPool(D, N, config.queries), nn.LayerNorm(D, EPS)
        self.contrast_pool, self.contrast_norm = AttentionPool(D, N), nn.LayerNorm(D, EPS)
        self.frame_positions = nn.Parameter(torch.zeros(config.frames, D)) if config.frames else None
        self.video = VideoEncoder(config) if config.video_depth else None
        self.unimodal = UnimodalDecoder(config)
        self.multimodal = MultimodalDecoder(config)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        Linears get variance 1 / fan-in; embeddings, the class token and the queries 1 / D; places 0.5^2.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        for one in (self.unimodal.tokens.weight, self.unimodal.cls, self.caption_pool.queries, self.contrast_pool.queries):
            nn.init.normal_(one, std=self.config.width**-0.5)
        # A place must be heard beside a patch, most of which is its mean colour: at 0.02 left and right are told apart last.
        nn.init.normal_(self.image.embed.positions, std=0.5)
        if self.frame_positions is not None:
            # The encoder's tokens are normed: a place must be heard beside them.
            nn.init.normal_(self.frame_positions, std=0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / TEMPERATURE))

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder sees of images or videos, `(B, queries, D)`, and their unit vectors, `(B, D)`.

        Images are `(B, 3, H, W)`. The frames of a video `(B, 3, T, H, W)` are encoded each alone, and one pooler reads the
        tokens of all (section 3.3), which `video_depth` blocks may have read before; their order is known by `frames` alone.
        Raises UserError on sizes that do not divide into patches and on more frames than there are places.
        """
        if pixels.ndim == 5:
            frames = self.image(pixels.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(pixels), -1))  # (B, T, L, D)
            if self.frame_positions is not None:
                T = frames.shape[1]
                if len(self.frame_positions) < T:
                    raise UserError(f"a video has {T} frames, there are places for {len(self.frame_positions)}; leave some out")
                frames = frames + self.frame_positions[:T, None].to(frames.dtype)
            seen = frames.flatten(1, 2)  # (B, T*L, D)
        else:
            seen = self.image(pixels)  # (B, L, D)
        if self.video is not None:
            seen = self.video(seen)
        memory = self.caption_norm(self.caption_pool(seen))  # (B, queries, D)
        pooled = self.contrast_pool(memory if self.config.pooling == "cascade" else seen)  # (B, 1, D)
        return memory, F.normalize(self.contrast_norm(pooled[:, 0]), dim=-1)

    def embed_frames(self, video: Tensor) -> Tensor:
        """The mean of the embeddings of a video's frames `(B, 3, T, H, W)`, a unit vector `(B, D)`: zero-shot retrieval."""
        frames = self.look(video.transpose(1, 2).flatten(0, 1))[1].unflatten(0, (len(video), -1))  # (B, T, D)
        return F.normalize(frames.mean(1), dim=-1)

    def read(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unimodal states of captions, `(B, L, D)`, and their unit vectors, `(B, D)`.

        ids `(B, L)`; mask `(B, L)`, True where a token is real, by default everywhere; padding stands behind a caption.
        """
        states, cls = self.unimodal(ids, mask)
        return states, F.normalize(cls, dim=-1)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor | None = None) -> CoCaOutput:
        """Images `(B, 3, H, W)` or videos `(B, 3, T, H, W)`, captions `(B, L)` from start to end token and their `mask (B, L)`.

        Logits at token i are of token i + 1. Raises UserError when there are not as many captions as images.
        """
        if len(pixels) != len(ids):
            raise UserError(f"{len(pixels)} images and {len(ids)} captions do not pair up; give one caption per image")
        memory, image = self.look(pixels)
        states, text = self.read(ids, mask)
        return CoCaOutput(image, text, self.multimodal(states, memory), self.logit_scale.exp())


def losses(output: CoCaOutput, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Both losses of a batch and what is trained on, 2 * captioning + 1 * contrastive (section 4.1), in nats, each `()`.

    `mask` is the one that `forward` was given. Captioning is the mean over all real tokens but the first of each caption; a
    batch that has none loses 0 there.
    """
    real = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:]
    each = F.cross_entropy(output.logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")  # (B, L - 1)
    captioning = torch.where(real, each, 0.0).sum() / real.sum().clamp(min=1)
    contrastive = contrastive_loss(output.scale * output.image @ output.text.T)
    total = CAPTIONING * captioning + CONTRASTIVE * contrastive
    return {"loss": total, "captioning": captioning, "contrastive": contrastive}


@torch.no_grad()
def caption(model: CoCa, pixels: Tensor, start: int, end: int, limit: int = 64, pad: int = 0) -> Tensor:
    """Greedy captions of images or videos: ids `(B, <= limit)` with `start` and, where it was reached, `end`; `pad` behind it.

    Every row is what it would be alone. Raises UserError on a limit below 1.
    """
    if limit < 1:
        raise UserError(f"a caption has at least its start token, got a limit of {limit}; raise it")
    memory, _ = model.look(pixels)
    ids = torch.full((len(pixels), 1), start, device=pixels.device)  # (B, 1)
    done = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    while ids.shape[1] < limit and not done.all():
        states, _ = model.read(ids)
        best = model.multimodal(states, memory, last=True)[:, 0].argmax(-1).masked_fill(done, pad)  # (B,)
        done = done | (best == end)
        ids = torch.cat([ids, best[:, None]], dim=1)
    return ids


def tiny(config: CoCaConfig) -> CoCaConfig:
    """A config of the same shape, small enough for tests."""
    small = replace(config, width=32, heads=4, image_depth=2, image_hidden=48, text_depth=2, text_hidden=40)
    return replace(small, image=2 * config.patch, vocab=48, queries=6)


COUNTED_TOKENS = 64
"""Tokens of a caption that a size is counted at."""


def example(config: CoCaConfig, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Random inputs for `forward`: images `(B, 3, H, W)` and captions of `COUNTED_TOKENS` tokens."""
    ids = torch.randint(0, config.vocab, (batch, COUNTED_TOKENS))
    return torch.randn(batch, 3, config.image, config.image), ids


def stated(config: CoCaConfig) -> str:
    """The input that `example` makes, in words."""
    return f"3 x {config.image} x {config.image} image (C, H, W), patch {config.patch}, {COUNTED_TOKENS} text tokens"


# Table 1 of the paper.
SIZES: dict[str, CoCaConfig] = {
    "CoCa-Base": CoCaConfig(768, 12, 12, 3072, 12, 3072),
    "CoCa-Large": CoCaConfig(1024, 16, 24, 4096, 12, 4096),
    "CoCa": CoCaConfig(1408, 16, 40, 6144, 18, 5632),
}
