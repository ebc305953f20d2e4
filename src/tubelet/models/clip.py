"""CLIP: an image tower and a text tower that put what belongs together at one place of the unit sphere.

After Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", and the code published with
it: pre-norm transformers with QuickGELU, the image read at a class token, the text at its end token, a symmetric loss over
the batch with a learned temperature (figure 3). Videos are read frame by frame; their frames are averaged, which knows no
order, or pooled by one learned query that sees the number of each frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.core.errors import UserError
from tubelet.core.weights import load_tensors
from tubelet.nn.blocks import EncoderBlock
from tubelet.nn.contrastive import contrastive_loss
from tubelet.nn.images import ImageTokens
from tubelet.nn.pooling import AttentionPool
from tubelet.nn.positions import sincos

EPS = 1e-5
MAX_SCALE = 100.0
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a `CLIP`. Raises UserError when they do not fit each other.

    `embed` is the width of the common space, `image` the side in pixels, `head` the width of one head in both towers. The end
    token must be the largest id of every text: with a tokenizer of n ids, `vocab` n + 1 and end token n. `video` is how the
    frames of a video become one vector.
    """

    embed: int = 512
    image: int = 224
    patch: int = 32
    image_width: int = 768
    image_depth: int = 12
    vocab: int = 49_408
    context: int = 77
    text_width: int = 512
    text_depth: int = 12
    head: int = 64
    video: Literal["mean", "attention"] = "mean"

    def __post_init__(self) -> None:
        sizes = (self.embed, self.image, self.patch, self.image_width, self.image_depth, self.vocab, self.context)
        if min(*sizes, self.text_width, self.text_depth, self.head) < 1:
            raise UserError("every size of a CLIP must be at least 1; raise the one that is not")
        for name, width in (("image_width", self.image_width), ("text_width", self.text_width), ("embed", self.embed)):
            if width % self.head:
                near = max(1, round(width / self.head)) * self.head
                raise UserError(f"{name} {width} is not a multiple of the head's width {self.head}; try {near}")
        if self.image % self.patch:
            near = max(1, round(self.image / self.patch)) * self.patch
            raise UserError(f"{self.image} pixels do not divide into patches of {self.patch}; try {near}")
        if self.video not in ("mean", "attention"):
            raise UserError(f"video must be mean or attention, got {self.video!r}; choose one of them")


def _blocks(width: int, depth: int, head: int) -> nn.ModuleList:
    return nn.ModuleList(EncoderBlock(width, width // head, eps=EPS, activation="quick") for _ in range(depth))


class ImageTower(nn.Module):
    """A ViT with a norm before its blocks and no bias in its patches: images `(B, 3, H, W)` to `(B, E)`."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        D = config.image_width
        self.embed = ImageTokens(D, config.image, config.patch, bias=False)
        self.norm_in = nn.LayerNorm(D, EPS)
        self.blocks = _blocks(D, config.image_depth, config.head)
        self.norm_out = nn.LayerNorm(D, EPS)
        self.out = nn.Linear(D, config.embed, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm_in(self.embed(images))  # (B, 1 + L, D)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm_out(x[:, 0]))  # (B, E)


class TextTower(nn.Module):
    """A causal transformer read at the end token: ids `(B, L)` to `(B, E)`. What follows the end token changes nothing."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        D = config.text_width
        self.tokens = nn.Embedding(config.vocab, D)
        self.positions = nn.Parameter(torch.zeros(config.context, D))
        self.blocks = _blocks(D, config.text_depth, config.head)
        self.norm = nn.LayerNorm(D, EPS)
        self.out = nn.Linear(D, config.embed, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Raises UserError when a text is longer than the context."""
        L = ids.shape[1]
        if len(self.positions) < L:
            raise UserError(f"a text has {L} tokens, the context holds {len(self.positions)}; cut it, and keep its end token")
        x = self.tokens(ids) + self.positions[:L]  # (B, L, D)
        for block in self.blocks:
            x = block(x, causal=True)
        end = ids.argmax(-1)  # (B,): the first of the largest ids
        x = x[torch.arange(len(ids), device=ids.device), end]  # (B, D)
        return self.out(self.norm(x))  # (B, E)


class CLIPOutput(NamedTuple):
    """Unit vectors of images (or videos) `(B, E)` and of texts `(B', E)`, and what their cosines are multiplied by `()`."""

    image: Tensor
    text: Tensor
    scale: Tensor

    @property
    def logits(self) -> Tensor:
        """Scaled similarities of every image with every text, `(B, B')`."""
        return self.scale * self.image @ self.text.T


class CLIP(nn.Module):
    """Images (or videos) and texts in, their places on the unit sphere out."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config)
        self.text = TextTower(config)
        self.frames = AttentionPool(config.embed, config.embed // config.head) if config.video == "attention" else None
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: for a module built on the meta device, after `to_empty`.

        Standard deviations of the published code (`initialize_parameters`). It gives those of the blocks to the text tower and
        leaves the image tower's blocks to the defaults of torch; here both towers get them. Biases are zero.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tower in (self.image, self.text):
            for block in tower.blocks:
                assert isinstance(block, EncoderBlock)
                width = block.attention.out.in_features
                # Every block adds twice to the residual stream.
                for linear in (block.attention.out, block.mlp.down):
                    nn.init.normal_(linear.weight, std=(width * 2 * len(tower.blocks)) ** -0.5)
                nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
        scale = self.config.image_width**-0.5
        assert self.image.embed.cls is not None
        nn.init.normal_(self.image.embed.cls, std=scale)
        nn.init.normal_(self.image.embed.positions, std=scale)
        nn.init.normal_(self.text.tokens.weight, std=0.02)
        nn.init.normal_(self.text.positions, std=0.01)
        if self.frames is not None:
            nn.init.normal_(self.frames.queries, std=self.config.embed**-0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by, at most 100 (section 2.5), `()`.

        The limit stops the value and not the gradient, so that a temperature that has reached it can come back.
        """
        excess = (self.logit_scale - math.log(MAX_SCALE)).clamp(min=0)
        return (self.logit_scale - excess.detach()).exp()

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` or videos `(B, 3, T, H, W)`, normalised by `normalise`, to unit vectors `(B, E)`.

        A video is the mean of its frames' unit vectors, or what one learned query reads in its frames and their numbers.
        Raises UserError on sizes that do not divide into patches.
        """
        if pixels.ndim == 4:
            return F.normalize(self.image(pixels), dim=-1)
        if pixels.ndim != 5:
            raise UserError(f"pixels must be (B, 3, H, W) or (B, 3, T, H, W), got {tuple(pixels.shape)}; rearrange them")
        B, _, T = pixels.shape[:3]
        frames = self.image(pixels.transpose(1, 2).flatten(0, 1)).unflatten(0, (B, T))  # (B, T, E)
        if self.frames is None:
            return F.normalize(F.normalize(frames, dim=-1).mean(1), dim=-1)
        numbers = sincos(frames.shape[-1], torch.arange(T, device=frames.device), max_period=100.0)  # (T, E)
        return F.normalize(self.frames(frames + numbers.to(frames.dtype))[:, 0], dim=-1)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Ids `(B, L)`, at most `context` of them and the end token the largest of each row, to unit vectors `(B, E)`."""
        return F.normalize(self.text(ids), dim=-1)

    def forward(self, pixels: Tensor, ids: Tensor) -> CLIPOutput:
        """Images `(B, 3, H, W)` or videos `(B, 3, T, H, W)` and texts `(B', L)`, as for `embed_image` and `embed_text`."""
        return CLIPOutput(self.embed_image(pixels), self.embed_text(ids), self.scale)


def loss(output: CLIPOutput) -> Tensor:
    """The symmetric loss of a batch in which image i belongs with text i (figure 3), in nats, `()`.

    Raises UserError when there are not as many images as texts.
    """
    return contrastive_loss(output.logits)


def normalise(video: Tensor) -> Tensor:
    """Pixels in [-1, 1], `(B, 3, H, W)` or `(B, 3, T, H, W)`, standardised by channel as published weights expect."""
    mean, std = (torch.tensor(v, device=video.device).view(3, *[1] * (video.ndim - 2)) for v in (MEAN, STD))
    return ((video + 1) / 2 - mean) / std


# Names in published checkpoints and ours; replaced in this order.
_OPENAI = {
    "visual.class_embedding": "image.embed.cls",
    "visual.positional_embedding": "image.embed.positions",
    "visual.conv1.": "image.embed.project.",
    "visual.ln_pre.": "image.norm_in.",
    "visual.transformer.resblocks.": "image.blocks.",
    "visual.ln_post.": "image.norm_out.",
    "visual.proj": "image.out.weight",
    "token_embedding.": "text.tokens.",
    "positional_embedding": "text.positions",
    "transformer.resblocks.": "text.blocks.",
    "ln_final.": "text.norm.",
    "text_projection": "text.out.weight",
    ".ln_1.": ".attention_norm.",
    ".attn.in_proj_": ".attention.qkv.",
    ".attn.out_proj.": ".attention.out.",
    ".ln_2.": ".mlp_norm.",
    ".mlp.c_fc.": ".mlp.up.",
    ".mlp.c_proj.": ".mlp.down.",
}
_HUGGING_FACE = {
    "vision_model.embeddings.class_embedding": "image.embed.cls",
    "vision_model.embeddings.position_embedding.weight": "image.embed.positions",
    "vision_model.embeddings.patch_embedding.": "image.embed.project.",
    "vision_model.pre_layrnorm.": "image.norm_in.",
    "vision_model.encoder.layers.": "image.blocks.",
    "vision_model.post_layernorm.": "image.norm_out.",
    "visual_projection.": "image.out.",
    "text_model.embeddings.token_embedding.": "text.tokens.",
    "text_model.embeddings.position_embedding.weight": "text.positions",
    "text_model.encoder.layers.": "text.blocks.",
    "text_model.final_layer_norm.": "text.norm.",
    "text_projection.": "text.out.",
    ".layer_norm1.": ".attention_norm.",
    ".self_attn.qkv_proj.": ".attention.qkv.",
    ".self_attn.out_proj.": ".attention.out.",
    ".layer_norm2.": ".mlp_norm.",
    ".mlp.fc1.": ".mlp.up.",
    ".mlp.fc2.": ".mlp.down.",
}
# Numbers and counters that some files carry beside the weights.
_BESIDE = ("input_resolution", "context_length", "vocab_size", "position_ids")


def load_checkpoint(path: str | Path, model: CLIP) -> None:
    """Fill a CLIP from published weights, a safetensors file in OpenAI's or in Hugging Face's layout.

    A pooler of frames keeps its values: no published file has one. Raises UserError when the file is broken or of neither
    layout, or when names, shapes or finiteness do not hold.
    """
    tensors = _in_our_layout(load_tensors(path), path)
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("frames.")}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = sorted(n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape)
    if missing or unknown or wrong:
        raise UserError(
            f"{path} does not fit this CLIP (missing {missing[:3]}, unknown {unknown[:3]}, wrong shape {wrong[:3]}); "
            "build the model with the sizes of that checkpoint"
        )
    broken = sorted(n for n, value in tensors.items() if not value.isfinite().all())
    if broken:
        raise UserError(f"{path} holds values that are not finite ({broken[:3]}); restore it from its source")
    model.load_state_dict(tensors, strict=False)


def _in_our_layout(found: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Tensors under our names and in our shapes; what has no counterpart keeps its name."""
    tensors = {name: value for name, value in found.items() if not name.endswith(_BESIDE)}
    if "visual.conv1.weight" in tensors:
        names = _OPENAI
        for matrix in ("visual.proj", "text_projection"):  # these multiply from the right
            if matrix in tensors:
                tensors[matrix] = tensors[matrix].T
    elif "vision_model.embeddings.patch_embedding.weight" in tensors:
        names = _HUGGING_FACE
        for q in [name for name in tensors if ".self_attn.q_proj." in name]:
            parts = [q.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            if all(part in tensors for part in parts):
                tensors[q.replace(".q_proj.", ".qkv_proj.")] = torch.cat([tensors.pop(part) for part in parts])
    else:
        raise UserError(f"{path} has neither OpenAI's nor Hugging Face's names of CLIP; give a safetensors file of one of them")
    ours: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        # A kernel (D, C, p, p) of a convolution is a linear map of patches with channels last.
        ours[name] = value.movedim(1, -1).flatten(1) if value.ndim == 4 else value
    return ours


def tiny(config: CLIPConfig) -> CLIPConfig:
    """A config of the same shape, small enough for tests."""
    small = replace(config, head=8, embed=32, image=2 * config.patch, image_width=32, image_depth=2)
    return replace(small, vocab=64, context=8, text_width=16, text_depth=2)


def example(config: CLIPConfig, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Random inputs for `forward`: images `(B, 3, H, W)` and as many texts `(B, context)` that end with the end token."""
    ids = torch.randint(0, config.vocab - 1, (batch, config.context))
    ids[:, -1] = config.vocab - 1
    return torch.randn(batch, 3, config.image, config.image), ids


def stated(config: CLIPConfig) -> str:
    """The input that `example` makes, in words."""
    return f"3 x {config.image} x {config.image} image (C, H, W), patch {config.patch}, {config.context} text tokens"


def _large(image: int) -> CLIPConfig:
    return CLIPConfig(768, image, 14, image_width=1024, image_depth=24, text_width=768)


# Table 20 of the paper.
SIZES: dict[str, CLIPConfig] = {
    "B/32": CLIPConfig(patch=32),
    "B/16": CLIPConfig(patch=16),
    "L/14": _large(224),
    "L/14@336": _large(336),
}
