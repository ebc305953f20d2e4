"""What a language model of words, films and sound is trained on: sound for a film, a film for a sound, sound for a sentence.

The rows are VideoPoet's (Kondratyuk et al. 2023, section 4.1): what is given is the prefix, what is learned follows it. The
model is a `TextToVideo` whose denoiser is a `VideoPoet`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.videopoet import (
    Layout,
    Mixture,
    Row,
    VideoPoet,
    audio_to_video,
    cut,
    loss,
    text_to_audio,
    video_to_audio,
)
from tubelet.train.lineage import read_words
from tubelet.train.text_to_video import TextToVideo

TASKS = ("video to audio", "audio to video", "text to audio")
"""The first reads no words, so that all it knows of a clip is what is seen."""


def reads_words(task: str) -> bool:
    """Whether a prompt stands in a task's prefix. Raises UserError when there is no such task."""
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    return task != "video to audio"


def rows_of(task: str, layout: Layout, video: Tensor, audio: Tensor, text: int) -> tuple[Row, Tensor]:
    """The row of one clip, which says what stands where, and the ids of all `(B, L)`.

    Codes of films `video (B, T, H, W)` and of their sound `audio (B, levels, S)`; `text` is the number of a prompt's tokens.
    """
    if task == "video to audio":
        row = video_to_audio(layout, video[0], audio[0])
    elif task == "audio to video":
        row = audio_to_video(layout, audio[0], video[0], text)
    else:
        row = text_to_audio(layout, audio[0], text)
    ids = row.ids.to(video.device).repeat(len(video), 1)  # (B, L)
    heard = row.ids >= layout.visual_range.stop
    seen = (row.ids >= layout.visual_range.start) & ~heard
    if seen.any():
        ids[:, seen] = layout.visual_ids(video)
    ids[:, heard] = layout.audio_ids(audio)
    return row, ids


@dataclass(frozen=True)
class SoundRowsObjective:
    """`(model, batch, rng) -> losses`; each batch is of one task.

    A batch has words `tokens (B, T, h, w)` of films, words `audio (B, levels, S)` of their sound, and `caption`. Raises
    UserError on a task that is not there.
    """

    shares: dict[str, float] = field(default_factory=lambda: dict(zip(TASKS, (0.5, 0.3, 0.2), strict=True)))
    """How often each task is trained."""

    def __post_init__(self) -> None:
        for task in self.shares:
            reads_words(task)
        Mixture(self.shares)

    def __call__(self, model: TextToVideo, batch: dict[str, Any], rng: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss", nats an id of the output."""
        missing = [name for name in ("tokens", "audio", "caption") if name not in batch]
        if missing:
            raise UserError(f"rows of sound are made of films, sound and captions, the batch lacks {missing[0]!r}; encode them")
        network, video, audio = model.denoiser, batch["tokens"].long(), batch["audio"].long()
        assert isinstance(network, VideoPoet), "a network that reads words in a row"
        # A mixture draws on the CPU, wherever the run's random numbers come from.
        draw = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        task = Mixture(self.shares).draw(torch.Generator().manual_seed(draw))
        text: Condition | None = None
        if reads_words(task):
            text = cut(read_words(model, {"caption": batch["caption"], "latent": video}, 0.0, rng))
        row, ids = rows_of(task, network.config.layout, video, audio, 0 if text is None else text.states.shape[1])
        prefix = torch.full((len(ids),), row.prefix, device=ids.device)
        return {"loss": loss(network(ids, prefix, text), ids, prefix)}
