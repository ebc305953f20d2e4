"""Prompt -> condition -> words -> pixels: what `engine` is for denoisers, for networks that predict words of a tokenizer.

MAGVIT-v2's masked model chooses all words in a few parallel steps, VideoPoet's language model one after the other
(`decoding`); both also go on from what is `Known` of a film. VideoPoet's super-resolution turns words of small films into those
of films twice as high and wide. Every sample draws from its own generator, so a batch of N is N single runs.
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
from tubelet.models import super_resolution
from tubelet.models.maskgit import MaskGIT, guided
from tubelet.models.super_resolution import SuperResolution
from tubelet.models.videopoet import VideoPoet, cut, film_rows, reads_words
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
class Known:
    """What is known of films besides their prompts, and as which of `videopoet.FILM_TASKS` the rest is made.

    `words` are the first token frames of image to video and frame prediction `(B, K, h, w)`, or of in- and outpainting all of
    a film whose pixels have a hole `(B, T, h, w)`; then `hidden`, like `words`, may say of which cells nothing is left. A
    language model reads the task and the words, and goes on behind a beginning. To a masked model all words that are not
    hidden are hints, which it makes anew. Raises UserError when they do not fit each other.
    """

    task: str
    words: Tensor
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        reads_words(self.task)
        if self.task.startswith("text"):
            raise UserError(f"{self.task} goes on from nothing but a prompt; leave out what is known")
        if self.words.ndim != 4 or (self.hidden is not None and self.hidden.shape != self.words.shape):
            raise UserError(f"known words are (B, frames, rows, columns) and hidden like them, got {tuple(self.words.shape)}")

    @property
    def begins(self) -> bool:
        """Whether it is a film's beginning that is known."""
        return self.task in ("image to video", "frame prediction")

    def part(self, begin: int, end: int) -> Known:
        """That of some of the films."""
        return Known(self.task, self.words[begin:end], None if self.hidden is None else self.hidden[begin:end])

    def checked(self, batch: int, shape: Grid) -> Known:
        """Itself. Raises UserError when it is not of so many films of `shape`, or leaves nothing to be made."""
        frames, *cells = self.words.shape[1:]
        right = 0 < frames < shape[0] if self.begins else frames == shape[0]
        if len(self.words) != batch or tuple(cells) != shape[1:] or not right or (self.task == "image to video" and frames > 1):
            raise UserError(
                f"{self.task} of {batch} films of {shape} words cannot go on from {tuple(self.words.shape)}; "
                "give one frame to image to video, fewer than all to frame prediction, whole films with a hole to the others"
            )
        return self


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
        known: Known | None = None,
        batch: int = 8,
        progress: Progress | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Films `(B, 3, T, H, W)` in [-1, 1], float32 on the CPU, one per request; and seconds spent on text, words, decode.

        `known`: what there is of each film, one for each request. `progress` counts batches. Raises UserError when the size or
        what is known does not fit, or nothing is asked for.
        """
        words, timings = self.words(requests, size, frames, sampling, known=known, batch=batch, progress=progress)
        clock = time.perf_counter()
        films = [self.tokenizer.from_tokens(part).clamp(-1, 1).cpu() for part in words.split(batch)]  # (b, 3, T, H, W)
        timings["decode"] = 0.0
        _lap(timings, "decode", clock)
        return torch.cat(films), timings

    @torch.inference_mode()
    def words(
        self,
        requests: Sequence[Request],
        size: tuple[int, int],
        frames: int,
        sampling: WordSampling,
        *,
        known: Known | None = None,
        batch: int = 8,
        progress: Progress | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The words of such films `(B, T', h, w)`, and seconds spent on text and words: what an `Enlarger` reads."""
        if not requests or batch < 1:
            raise UserError("nothing to generate; give at least one prompt, and a batch of at least 1")
        shape = self.tokenizer.strides.latent_shape(frames, *size)
        if known is not None:
            known.checked(len(requests), shape)
        timings = {"text": 0.0, "words": 0.0}
        made = []
        for begin in range(0, len(requests), batch):
            part = requests[begin : begin + batch]
            clock = time.perf_counter()
            condition, null = self.text.encode([request.text for request in part]), self.text.null(len(part))
            clock = _lap(timings, "text", clock)
            rngs = [torch.Generator().manual_seed(request.seed) for request in part]
            there = None if known is None else known.part(begin, begin + len(part))
            if isinstance(self.network, MaskGIT):
                words = _filled_in(self.network, condition, null, shape, rngs, sampling, there)
            else:
                words = _written(self.network, condition, null, shape, rngs, sampling, there)
            made.append(words)
            _lap(timings, "words", clock)
            if progress is not None:
                progress(min(begin + batch, len(requests)), len(requests))
        return torch.cat(made), timings


def _filled_in(
    network: MaskGIT,
    condition: Condition,
    null: Condition,
    shape: Grid,
    rngs: list[torch.Generator],
    how: WordSampling,
    known: Known | None,
) -> Tensor:
    """Words `(B, T, h, w)`, many at once; what is known are hints."""
    device = condition.states.device
    start = torch.full((len(rngs), *shape), MASK, device=device)  # (B, T, h, w)
    if known is not None:
        words = known.words.to(device)
        there = words if known.hidden is None else words.masked_fill(known.hidden.to(device), MASK)
        start[:, : words.shape[1]] = there

    def predict(tokens: Tensor, hinted: Tensor, _progress: float) -> Tensor:
        return guided(network, tokens, condition, hinted, how.guidance, null)

    flat = start.flatten(1)  # (B, L)
    steps = min(how.steps, flat.shape[1])
    return decode(predict, flat, rngs, steps, how.temperature, how.choice_temperature).unflatten(1, shape)


def _written(
    network: VideoPoet,
    condition: Condition,
    null: Condition,
    shape: Grid,
    rngs: list[torch.Generator],
    how: WordSampling,
    known: Known | None,
) -> Tensor:
    """Words `(B, T, h, w)`, one after the other, behind those of a known beginning."""
    layout, device = network.config.layout, condition.states.device
    task = "text to video" if known is None else known.task
    film = torch.zeros(len(rngs), *shape, dtype=torch.long, device=device)  # what is to be made may be anything
    words = film[:, :0] if known is None else known.words.to(film)  # (B, K, h, w)
    first = words.shape[1] if known is not None and known.begins else 0
    film[:, :first] = words[:, :first]

    told = reads_words(task)

    def behind(prompt: Condition) -> tuple[autoregressive.Context, Tensor]:
        """What is gone on from, and the ids of some clip that follow."""
        row, ids = film_rows(task, layout, film, words, first, prompt.states.shape[1])
        step = network.step(row.prefix, prompt if told else None)
        return autoregressive.Context(step, ids[:, : row.prefix], network.cache), row.ids[row.prefix :]

    context, follows = behind(cut(condition))
    rest = (shape[0] - first, *shape[1:])
    limit = 1 + math.prod(rest)  # the mark that begins a video, and its words; what ends it goes without saying
    ids = autoregressive.sample(
        context,
        limit,
        rngs,
        sampling=autoregressive.Sampling(how.temperature, how.top_k),
        unguided=behind(cut(null))[0] if told else None,  # without a prompt there is nothing to be guided by
        scale=how.guidance if told else 1.0,
        choices=layout.choices(follows[:limit]),
    )  # (B, limit)
    return torch.cat([film[:, :first], layout.visual_codes(ids[:, 1:], rest)], dim=1)


@dataclass(frozen=True)
class EnlargeSampling:
    """How words of larger films are chosen: `steps` and temperatures of `decoding.masked.decode`, and the scales of guidance by
    text and by the small film (`super_resolution.guided`). Steps and scales are VideoPoet's of its first stage.

    Raises UserError when a value is out of range.
    """

    steps: int = 24
    text: float = 4.0
    coarse: float = 1.0
    temperature: float = 1.0
    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        if not (0 <= self.text <= GREATEST_GUIDANCE and 0 <= self.coarse <= GREATEST_GUIDANCE):
            raise UserError(f"guidance is 0 to {GREATEST_GUIDANCE:g}, got {self.text} and {self.coarse}; 1 is none")
        if self.steps < 1 or not (0 <= self.temperature < math.inf and 0 <= self.choice_temperature < math.inf):
            raise UserError("steps must be at least 1 and temperatures at least 0; 24, 1 and 4.5 are usual")


@dataclass(frozen=True)
class Enlarger:
    """Tokenizer, super-resolution and words of prompts: words of small films to films twice as high and wide."""

    tokenizer: VideoTokenizer
    network: SuperResolution
    text: TextEncoder

    @torch.inference_mode()
    def enlarge(
        self, requests: Sequence[Request], coarse: Tensor, sampling: EnlargeSampling, *, batch: int = 8
    ) -> tuple[Tensor, dict[str, float]]:
        """Films as `WordEngine.sample` returns them, one per request, and seconds; `coarse (B, T, h, w)` are those of small
        films.

        Raises UserError when nothing is asked for or there is not one small film for each request.
        """
        if not requests or batch < 1 or len(coarse) != len(requests):
            raise UserError(f"{len(requests)} prompts need as many small films, got {len(coarse)}; give one of each at least")
        timings = {"text": 0.0, "words": 0.0, "decode": 0.0}
        films = []
        for begin in range(0, len(requests), batch):
            part = requests[begin : begin + batch]
            clock = time.perf_counter()
            condition, null = self.text.encode([request.text for request in part]), self.text.null(len(part))
            clock = _lap(timings, "text", clock)
            rngs = [torch.Generator().manual_seed(request.seed) for request in part]
            words = self._words(coarse[begin : begin + batch], condition, null, rngs, sampling)
            clock = _lap(timings, "words", clock)
            films.append(self.tokenizer.from_tokens(words).clamp(-1, 1).cpu())  # (b, 3, T, H, W)
            _lap(timings, "decode", clock)
        return torch.cat(films), timings

    def _words(
        self, coarse: Tensor, condition: Condition, null: Condition, rngs: list[torch.Generator], how: EnlargeSampling
    ) -> Tensor:
        """Words `(B, T, 2h, 2w)`, many at once."""
        coarse = coarse.to(condition.states.device)
        B, T, h, w = coarse.shape
        shape = (T, 2 * h, 2 * w)

        def predict(tokens: Tensor, _hinted: Tensor, _progress: float) -> Tensor:
            codes = tokens.unflatten(1, shape)
            logits = super_resolution.guided(self.network, codes, coarse, condition, null, how.text, how.coarse)
            return logits.flatten(1, 3)  # (B, L, 2, factor)

        start = torch.full((B, math.prod(shape)), MASK, device=coarse.device)
        steps = min(how.steps, start.shape[1])
        return decode(predict, start, rngs, steps, how.temperature, how.choice_temperature).unflatten(1, shape)


def _lap(timings: dict[str, float], name: str, begin: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # queued work would otherwise be charged to the next stage
    now = time.perf_counter()
    timings[name] += now - begin
    return now
