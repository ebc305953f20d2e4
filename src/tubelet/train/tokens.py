"""What makes words of clips, and what models them: a tokenizer, MAGVIT-v2's masked model and VideoPoet's language model.

A tokenizer is trained on what comes back and on the penalties of its quantiser, without a discriminator. A model of words is a
`TextToVideo` like every other system that reads prompts: its `denoiser` predicts words where others predict noise.

Beside text to video both learn to go on from what is known of a film: the masked model by hints in hidden places (COMMIT), the
language model by a mixture of tasks that differ in their prefix. VideoPoet's super-resolution fills in the words of larger
films beside those of small ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.codecs.losses import foreground_mask, to_pixels
from tubelet.codecs.tokenizer import VideoTokenizer
from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.data.stream import Batch, Source, State
from tubelet.decoding.masked import commit, draw_hidden
from tubelet.models.maskgit import MaskGIT, token_loss
from tubelet.models.super_resolution import SuperResolution, masked_loss, resampled
from tubelet.models.videopoet import Mixture, VideoPoet, cut, draw_task, film_rows, loss, reads_words, text_to_video
from tubelet.nn.subtokens import MASK
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
    halved: float = 0.0
    """Share of steps that see clips of half their height and width, each pixel the mean of four: for words at both sizes."""
    foreground: float = 5.0
    """Weight of pixels of saturated colour against 1 for the rest."""
    weights: dict[str, float] = field(
        default_factory=lambda: {"reconstruction": 5.0, "commitment": 0.25, "entropy": 0.1, "codebook": 1.0}
    )

    def __post_init__(self) -> None:
        if self.frames < 0 or min(self.foreground, *self.weights.values()) < 0:
            raise UserError("frames and weights must be at least 0; correct the objective's settings")
        if not 0 <= self.halved <= 1:
            raise UserError(f"halved is a share of steps and must lie in [0, 1], got {self.halved}; 0 is never")

    def __call__(self, model: VideoTokenizer, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and its unweighted terms: "reconstruction" (squared plus absolute error) and the penalties."""
        video = batch["video"]
        if self.frames and self.frames < video.shape[1]:
            begin = int(torch.randint(video.shape[1] - self.frames + 1, (), generator=rng, device=rng.device))
            video = video[:, begin : begin + self.frames]
        pixels = to_pixels(video)  # (B, 3, T, H, W)
        if self.halved and float(torch.rand((), generator=rng, device=rng.device)) < self.halved:
            pixels = F.avg_pool3d(pixels, (1, 2, 2))
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

    `(model, batch, rng) -> losses`; a batch has `tokens (B, T, h, w)` and `caption`, and the tensors that `hints` names. Raises
    UserError when shares are negative or sum to more than 1.
    """

    text_drop: float = 0.1
    """Share of captions emptied."""
    hints: dict[str, float] = field(default_factory=dict)
    """COMMIT (MAGVIT, section 3.2): how often a sample's hidden places show what a condition says of them, for each of these
    tensors of a batch, `(B, T, h, w)`: words of a film of which only the first frames or what surrounds a hole is left, MASK
    where nothing of a cell is. The rest of the time there is no condition. MAGVIT's token for the task is left out."""

    def __post_init__(self) -> None:
        if min(self.hints.values(), default=0.0) < 0 or sum(self.hints.values()) > 1:
            raise UserError("shares of hints must be at least 0 and sum to 1 at most, the rest goes without; correct them")

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", nats a word over all places, as MAGVIT trains (`token_loss`)."""
        network = model.denoiser
        assert isinstance(network, MaskGIT), "a network that fills in words"
        tokens, condition = _read(model, batch, self.text_drop, rng)
        ids = tokens.flatten(1)  # (B, L)
        hidden = draw_hidden(len(ids), ids.shape[1], rng)
        if not self.hints:
            shown, _ = commit(ids, hidden)
            logits = network(shown, condition)
        else:
            shown, hinted = commit(ids, hidden, self._hints(batch, ids, rng))
            logits = network(shown, condition, hinted)
        return {"loss": token_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool))}

    def _hints(self, batch: dict[str, Any], ids: Tensor, rng: torch.Generator) -> Tensor:
        """What each sample's condition says, `(B, L)`, MASK where it has none."""
        missing = [name for name in self.hints if name not in batch]
        if missing:
            raise UserError(f"hints are words of what is known of a film, the batch lacks {missing[0]!r}; encode them first")
        draws = torch.rand(len(ids), 1, generator=rng, device=rng.device)  # (B, 1)
        hints, reached = torch.full_like(ids, MASK), 0.0
        for name, share in self.hints.items():
            chosen = (draws >= reached) & (draws < reached + share)  # (B, 1)
            hints = torch.where(chosen, batch[name].long().flatten(1), hints)
            reached += share
        return hints


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


class Progressing:
    """A source whose batches also have `progress`, the share of a training of `items` that is done before them."""

    def __init__(self, source: Source, items: int) -> None:
        self.source, self.items, self.drawn = source, items, 0

    def draw(self, count: int) -> Batch:
        progress = min(1.0, self.drawn / self.items)
        self.drawn += count
        return {**self.source.draw(count), "progress": progress}

    def state(self) -> State:
        return {"source": self.source.state(), "drawn": self.drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.source.restore(state["source"])
        self.drawn = int(state["drawn"])


PAINTING = ("inpainting", "outpainting")
"""Tasks that read words of films with a hole, by these names in a batch."""


@dataclass(frozen=True, kw_only=True)
class FilmTasksObjective:
    """One language model on a mixture of tasks on films and their first frames (VideoPoet, section 4); each batch is of one.

    `(model, batch, rng) -> losses`; the model's denoiser is a `VideoPoet`. A batch has `tokens (B, T, h, w)`, `caption`,
    `progress` (`Progressing`) by which pictures come before films (`image_share`), and, for in- and outpainting, words of films
    with a hole like `tokens` under their names. Raises UserError on a task that is not there.
    """

    videos: dict[str, float] = field(
        default_factory=lambda: {
            "text to video": 0.4,
            "image to video": 0.15,
            "frame prediction": 0.15,
            "inpainting": 0.15,
            "outpainting": 0.15,
        }
    )
    """Tasks of batches of films, by their shares; the paper states none. Pictures have one, text to image."""
    given: int = 3
    """Token frames that frame prediction knows."""
    text_drop: float = 0.1
    """Share of captions emptied."""

    def __post_init__(self) -> None:
        for task in self.videos:
            reads_words(task)
        Mixture(self.videos)

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", nats an id of the output."""
        network = model.denoiser
        assert isinstance(network, VideoPoet), "a network that reads words in a row"
        if "progress" not in batch:
            raise UserError("pictures come before films by a training's progress, the batch lacks it; draw from a Progressing")
        # A mixture draws on the CPU, wherever the run's random numbers come from.
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        task = self.task(batch["progress"], torch.Generator().manual_seed(seed))
        tokens, condition = _read(model, batch, self.text_drop, rng)
        if task in PAINTING and task not in batch:
            raise UserError(f"{task} reads words of films with a hole, the batch lacks {task!r}; encode them first")
        masked = batch[task].long() if task in PAINTING else None
        text = cut(condition) if reads_words(task) else None
        length = 0 if text is None else text.states.shape[1]
        row, ids = film_rows(task, network.config.layout, tokens, masked, self.given, length)
        prefix = torch.full((len(ids),), row.prefix, device=ids.device)
        return {"loss": loss(network(ids, prefix, text), ids, prefix)}

    def task(self, progress: float, generator: torch.Generator) -> str:
        """Which task a batch trains when a share of the training is done."""
        return draw_task(Mixture({"text to image": 1.0}), Mixture(self.videos), progress, generator)[1]


@dataclass(frozen=True, kw_only=True)
class SuperResolutionObjective:
    """Hidden words of a film beside those of the same film at half its size (VideoPoet, section 3.3).

    `(model, batch, rng) -> losses`; the model's denoiser is a `SuperResolution`. A batch has `tokens (B, T, H, W)`, `coarse (B,
    T, H/2, W/2)` and `caption`. Raises UserError when a share is outside [0, 1].
    """

    text_drop: float = 0.1
    """Share of captions emptied."""
    coarse_drop: float = 0.1
    """Share of samples whose coarse words are hidden, whether or not they keep their caption."""
    noise: float = 0.3
    """Greatest share of the coarse words that is drawn anew; each sample's is uniform below it. The paper states none."""

    def __post_init__(self) -> None:
        for name in ("text_drop", "coarse_drop", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is a share and must lie in [0, 1], got {getattr(self, name)}; correct it")

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", nats a digit of the hidden words."""
        network = model.denoiser
        assert isinstance(network, SuperResolution), "a network that fills in the words of larger films"
        if "coarse" not in batch:
            raise UserError("a super-resolution reads words of small films, the batch lacks 'coarse'; encode them first")
        tokens, condition = _read(model, batch, self.text_drop, rng)
        B = len(tokens)
        draws = torch.rand(2, B, generator=rng, device=rng.device)  # which are dropped, and how much noise
        coarse = resampled(batch["coarse"].long(), self.noise * draws[1], network.config.factor**2, rng)
        keep = draws[0] >= self.coarse_drop
        hidden = draw_hidden(B, tokens[0].numel(), rng).view(tokens.shape)
        return {"loss": masked_loss(network(tokens.masked_fill(hidden, MASK), coarse, condition, keep), tokens, hidden)}
