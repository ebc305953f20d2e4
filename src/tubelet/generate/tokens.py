"""Prompt -> condition -> words -> pixels: what `engine` is for denoisers, for networks that predict words of a tokenizer.

MAGVIT-v2's masked model chooses all words in a few parallel steps, VideoPoet's language model one after the other
(`decoding`). Every sample draws from its own generator, so a batch of N is N single runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.codecs.tokenizer import VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.decoding import autoregressive
from tubelet.decoding.masked import decode
from tubelet.generate.engine import GREATEST_GUIDANCE, Progress, Request
from tubelet.models.maskgit import MaskGIT, guided
from tubelet.models.videopoet import VideoPoet, cut, text_to_video
from tubelet.nn.patch import Grid
from tubelet.nn.subtokens import MASK
from tubelet.text.base import TextEncoder


@dataclass(frozen=True)
class WordSampling:
    """How words are drawn: guidance scale (1 is none) and temperature (0 takes the likeliest), `steps` and
    `choice_temperature` of a masked model (`decoding.masked.decode`), the `top_k` likeliest of a language model (0: all).

    Raises UserError when a value is out of range.
    """

    guidance: float = 2.0
    temperature: float = 1.0
    steps: int = 24
    choice_temperature: float = 4.5
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.guidance <= GREATEST_GUIDANCE:
            raise UserError(f"guidance must be between 0 and {GREATEST_GUIDANCE:g}, got {self.guidance}; 1 is none, 2 is usual")
        if self.steps < 1 or not 0 <= self.choice_temperature < math.inf:
            raise UserError("steps must be at least 1 and choice_temperature at least 0; 24 and 4.5 are MAGVIT-v2's")
        autoregressive.Sampling(self.temperature, self.top_k)


@dataclass(frozen=True)
class WordEngine:
    """Tokenizer, network and words of prompts, together able to sample."""

    tokenizer: VideoTokenizer
    network: MaskGIT | VideoPoet
    text: TextEncoder

    @torch.inference_mode()
    def sample(
        self,
        requests: Sequence[Request],
        size: tuple[int, int],
        frames: int,
        sampling: WordSampling,
        *,
        batch: int = 8,
        progress: Progress | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Films `(B, 3, T, H, W)` in [-1, 1], float32 on the CPU, one per request; and seconds spent on text, words, decode.

        `progress` counts batches. Raises UserError when the size does not fit or nothing is asked for.
        """
        if not requests or batch < 1:
            raise UserError("nothing to generate; give at least one prompt, and a batch of at least 1")
        shape = self.tokenizer.strides.latent_shape(frames, *size)
        timings = {"text": 0.0, "words": 0.0, "decode": 0.0}
        films = []
        for begin in range(0, len(requests), batch):
            part = requests[begin : begin + batch]
            clock = time.perf_counter()
            condition, null = self.text.encode([request.text for request in part]), self.text.null(len(part))
            clock = _lap(timings, "text", clock)
            rngs = [torch.Generator().manual_seed(request.seed) for request in part]
            if isinstance(self.network, MaskGIT):
                words = _filled_in(self.network, condition, null, shape, rngs, sampling)
            else:
                words = _written(self.network, condition, null, shape, rngs, sampling)
            clock = _lap(timings, "words", clock)
            films.append(self.tokenizer.from_tokens(words).clamp(-1, 1).cpu())  # (b, 3, T, H, W)
            _lap(timings, "decode", clock)
            if progress is not None:
                progress(min(begin + batch, len(requests)), len(requests))
        return torch.cat(films), timings


def _filled_in(
    network: MaskGIT, condition: Condition, null: Condition, shape: Grid, rngs: list[torch.Generator], how: WordSampling
) -> Tensor:
    """Words `(B, T, h, w)`, many at once."""
    start = torch.full((len(rngs), math.prod(shape)), MASK, device=condition.states.device)

    def predict(tokens: Tensor, hinted: Tensor, _progress: float) -> Tensor:
        return guided(network, tokens, condition, hinted, how.guidance, null)

    steps = min(how.steps, start.shape[1])
    return decode(predict, start, rngs, steps, how.temperature, how.choice_temperature).unflatten(1, shape)


def _written(
    network: VideoPoet, condition: Condition, null: Condition, shape: Grid, rngs: list[torch.Generator], how: WordSampling
) -> Tensor:
    """Words `(B, T, h, w)`, one after the other."""
    layout, device = network.config.layout, condition.states.device

    def behind(prompt: Condition) -> tuple[autoregressive.Context, Tensor]:
        """What is gone on from, and the ids of some clip that follow."""
        row = text_to_video(layout, torch.zeros(shape, dtype=torch.long), prompt.states.shape[1])
        given = row.ids[: row.prefix].to(device).expand(len(rngs), -1)  # (B, P)
        return autoregressive.Context(network.step(row.prefix, prompt), given, network.cache), row.ids[row.prefix :]

    context, follows = behind(cut(condition))
    limit = 1 + math.prod(shape)  # the mark that begins a video, and its words; what ends it goes without saying
    ids = autoregressive.sample(
        context,
        limit,
        rngs,
        sampling=autoregressive.Sampling(how.temperature, how.top_k),
        unguided=behind(cut(null))[0],
        scale=how.guidance,
        choices=layout.choices(follows[:limit]),
    )  # (B, limit)
    return layout.visual_codes(ids[:, 1:], shape)


def _lap(timings: dict[str, float], name: str, begin: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # queued work would otherwise be charged to the next stage
    now = time.perf_counter()
    timings[name] += now - begin
    return now
