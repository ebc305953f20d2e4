"""Rows of words, films and sound: built together as one by one, and learned."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.core.types import Condition
from tubelet.models.videopoet import (
    Layout,
    VideoPoet,
    VideoPoetConfig,
    audio_to_video,
    text_to_audio,
    video_to_audio,
)
from tubelet.text.base import TextEncoder
from tubelet.train.sound import TASKS, SoundRowsObjective, reads_words, rows_of
from tubelet.train.text_to_video import TextToVideo

LAYOUT = Layout(visual=16, levels=2, codes=8)


class Lengths(TextEncoder):
    """A state for every letter, so that captions differ in length."""

    trainable = False
    width = 4

    def truncated(self, prompt: str) -> bool:
        return False

    def _encode(self, prompts: Sequence[str]) -> Condition:
        longest = max(1, *map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        return Condition(torch.ones(len(prompts), longest, 4), torch.arange(longest) < lengths[:, None])


def words() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 16, (3, 2, 2, 2), generator=random), torch.randint(0, 8, (3, 2, 5), generator=random)


def model() -> TextToVideo:
    torch.manual_seed(0)
    return TextToVideo(Lengths(), VideoPoet(VideoPoetConfig(width=32, heads=2, depth=1, text=4, layout=LAYOUT)))


@pytest.mark.parametrize("task", TASKS)
def test_rows_together_are_rows_one_by_one(task: str) -> None:
    video, audio = words()
    alone = {
        "video to audio": lambda v, a: video_to_audio(LAYOUT, v, a),
        "audio to video": lambda v, a: audio_to_video(LAYOUT, a, v, 3),
        "text to audio": lambda v, a: text_to_audio(LAYOUT, a, 3),
    }[task]
    row, ids = rows_of(task, LAYOUT, video, audio, 3)
    for place, (v, a) in enumerate(zip(video, audio, strict=True)):
        expected = alone(v, a)
        assert torch.equal(ids[place], expected.ids)
        assert row.prefix == expected.prefix


def test_every_task_is_trained_by_its_share_and_learned() -> None:
    video, audio = words()
    batch = {"tokens": video, "audio": audio, "caption": ["a", "bcd", "ef"]}
    for task in TASKS:
        network = model()
        objective = SoundRowsObjective({one: float(one == task) for one in TASKS})
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        losses = []
        for _ in range(25):
            loss = objective(network, batch, torch.Generator().manual_seed(0))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.6 * losses[0], task
    mixed, rng = SoundRowsObjective(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn = {round(float(mixed(model(), batch, rng)["loss"]), 5) for _ in range(30)}
    assert len(drawn) == 3, "one loss a task, since rows and network stay the same"


def test_only_a_film_alone_reads_no_words() -> None:
    assert [task for task in TASKS if not reads_words(task)] == ["video to audio"]
    video, audio = words()
    seen = SoundRowsObjective({"video to audio": 1.0})
    told = SoundRowsObjective({"text to audio": 1.0})
    with torch.no_grad():
        losses = [
            float(objective(model(), {"tokens": video, "audio": audio, "caption": captions}, torch.Generator())["loss"])
            for objective in (seen, told)
            for captions in (["a", "b", "c"], ["abc", "bc", "c"])
        ]
    assert losses[0] == losses[1]
    assert losses[2] != losses[3]


def test_wrong_batches_and_tasks_are_one_sentence() -> None:
    video, audio = words()
    with pytest.raises(UserError, match="lacks 'audio'"):
        SoundRowsObjective()(model(), {"tokens": video, "caption": ["a"] * 3}, torch.Generator())
    with pytest.raises(UserError, match="no task 'smell'"):
        SoundRowsObjective({"smell": 1.0})
    with pytest.raises(UserError, match="at least 0"):
        SoundRowsObjective({"text to audio": -1.0})
    with pytest.raises(UserError, match="audio code"):
        rows_of("text to audio", LAYOUT, video, audio + 8, 2)
