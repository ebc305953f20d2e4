"""What makes words of clips, and what models them: a tokenizer, MAGVIT-v2's masked model and VideoPoet's language model.

A tokenizer is trained on what comes back and on the penalties of its quantiser, without a discriminator. A model of words is a
`TextToVideo` like every other system that reads prompts: its `denoiser` predicts words where others predict noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tubelet.codecs.losses import foreground_mask, to_pixels
from tubelet.codecs.tokenizer import VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.decoding.masked import commit, draw_hidden
from tubelet.models.maskgit import MaskGIT, token_loss
from tubelet.models.videopoet import VideoPoet, cut, loss, text_to_video
from tubelet.train.lineage import read_words
from tubelet.train.text_to_video import TextToVideo


@dataclass(frozen=True, kw_only=True)
class TokenizerObjective:
    """Pixels through words and back; a batch has `video (B, T, H, W, 3)` uint8. Raises UserError when a weight is below 0.

    Weights are MAGVIT-v2's as released (reconstruction 5, commitment 0.25, entropy 0.1) and, of a table's codes, van den Oord's
    (1).
    """

    frames: int = 0
    """Frames of each clip that a step sees, in one stretch that begins anywhere; 0: all."""
    foreground: float = 5.0
    """Weight of pixels of saturated colour against 1 for the rest."""
    weights: dict[str, float] = field(
        default_factory=lambda: {"reconstruction": 5.0, "commitment": 0.25, "entropy": 0.1, "codebook": 1.0}
    )

    def __post_init__(self) -> None:
        if self.frames < 0 or min(self.foreground, *self.weights.values()) < 0:
            raise UserError("frames and weights must be at least 0; correct the objective's settings")

    def __call__(self, model: VideoTokenizer, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and its unweighted terms: "reconstruction" (squared plus absolute error) and the penalties."""
        video = batch["video"]
        if self.frames and self.frames < video.shape[1]:
            begin = int(torch.randint(video.shape[1] - self.frames + 1, (), generator=rng, device=rng.device))
            video = video[:, begin : begin + self.frames]
        pixels = to_pixels(video)  # (B, 3, T, H, W)
        model.strides.latent_shape(*pixels.shape[2:])
        z = model.before_words(pixels)  # (B, T', h, w, d)
        read, ids = model.quantize(z)
        error = model.decode_raw(read) - pixels
        weight = 1 + (self.foreground - 1) * foreground_mask(pixels).to(error.dtype)  # (B, 1, T, H, W)
        both = (error.square() + error.abs()).mean(1, keepdim=True)
        terms = {"reconstruction": (both * weight).mean() / weight.mean(), **model.quantizer.penalties(z, ids)}
        total = sum((self.weights[name] * term for name, term in terms.items()), error.new_zeros(()))
        return {"loss": total, **terms}


def _read(model: TextToVideo, batch: dict[str, Any], drop: float, rng: torch.Generator) -> tuple[Tensor, Condition]:
    """A batch's words `(B, T, h, w)` and the states of its captions."""
    missing = [name for name in ("tokens", "caption") if name not in batch]
    if missing:
        raise UserError(f"a model of words is trained on captioned ones, the batch lacks {missing[0]!r}; encode them first")
    tokens = batch["tokens"].long()
    return tokens, read_words(model, {"caption": batch["caption"], "latent": tokens}, drop, rng)


@dataclass(frozen=True, kw_only=True)
class MaskedObjective:
    """Hidden words of a clip, `decoding.masked`; the model's denoiser is a `MaskGIT` that reads prompts.

    `(model, batch, rng) -> losses`; a batch has `tokens (B, T, h, w)` and `caption`.
    """

    text_drop: float = 0.1
    """Share of captions emptied."""

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", nats a word over all places, as MAGVIT trains (`token_loss`)."""
        network = model.denoiser
        assert isinstance(network, MaskGIT), "a network that fills in words"
        tokens, condition = _read(model, batch, self.text_drop, rng)
        ids = tokens.flatten(1)  # (B, L)
        shown, _ = commit(ids, draw_hidden(len(ids), ids.shape[1], rng))
        return {"loss": token_loss(network(shown, condition), ids, torch.ones_like(ids, dtype=torch.bool))}


@dataclass(frozen=True, kw_only=True)
class LanguageObjective:
    """Every word after the ones before it, behind a prompt; the model's denoiser is a `VideoPoet`.

    `(model, batch, rng) -> losses`; a batch has `tokens (B, T, h, w)` and `caption`.
    """

    text_drop: float = 0.1
    """Share of captions emptied."""

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", nats an id of the output."""
        network = model.denoiser
        assert isinstance(network, VideoPoet), "a network that reads words in a row"
        tokens, condition = _read(model, batch, self.text_drop, rng)
        layout, condition = network.config.layout, cut(condition)
        row = text_to_video(layout, tokens[0].cpu(), condition.states.shape[1])
        words = layout.visual_ids(tokens)  # (B, T*h*w)
        ids = row.ids.to(words.device).repeat(len(tokens), 1)  # (B, L)
        ids[:, row.prefix + 1 : row.prefix + 1 + words.shape[1]] = words
        prefix = torch.full((len(ids),), row.prefix, device=ids.device)
        return {"loss": loss(network(ids, prefix, condition), ids, prefix)}
