"""Readers of words in small: those that are there are trained with, the others are left out and added later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tubelet.core.config import to_dict
from tubelet.core.errors import UserError
from tubelet.core.files import write_json
from tubelet.core.weights import save_module
from tubelet.evaluate.report import make_cases
from tubelet.models.clip import CLIP, CLIPConfig
from tubelet.recipes import load_recipe
from tubelet.recipes.text_encoders import CLIP_TEXT, MINILM, OWN, CLIPWords, human_cases, started
from tubelet.text.bpe import train as train_tokenizer

TOY = (
    "train.steps=2", "train.batch=2", "train.warmup=0", "train.precision=fp32", "train.progress=false", "train.compile=false",
    "sampling.steps=2", "n=4", "samples=1", "denoiser.width=32", "denoiser.depth=1", "denoiser.heads=2", "own.width=32",
    "own.depth=1", "own.heads=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run of retrieval leaves, at random."""
    folder = tmp_path_factory.mktemp("runs") / "retrieval"
    tokenizer = train_tokenizer(["a red ball falls", "a blue ring slides"] * 4, 280)
    config = CLIPConfig(
        embed=32, image=16, patch=8, image_width=32, image_depth=1, vocab=tokenizer.size + 1, context=12, text_width=48,
        text_depth=2, head=16,
    )  # fmt: skip
    torch.manual_seed(0)
    folder.mkdir()
    save_module(folder / "clip.safetensors", CLIP(config))
    write_json(folder / "clip.json", to_dict(config))
    tokenizer.save(folder / "tokenizer.json")
    return folder


def test_readers_are_trained_with_measured_and_added(whole: Path, clip: Path, tmp_path: Path, tubelet: Callable) -> None:
    place = tmp_path / "clip"
    words = ("train", "text-encoders", "--out", tmp_path / "run", "--set", f"whole={whole}", "--set", f"retrieval={place}")
    words += ("--set", f"minilm={tmp_path / 'no'}", *(word for setting in TOY for word in ("--set", setting)))
    first = tubelet(*words)
    assert first.code == 0
    for name in (MINILM, CLIP_TEXT):
        assert f"{name}: left out" in first.out + first.err
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert list(table) == [OWN, "truth", "truth through the codec"]
    before = table[OWN]

    shutil.copytree(clip, place)
    assert tubelet(*words).code == 0
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert list(table) == [OWN, CLIP_TEXT, "truth", "truth through the codec"]
    assert table[OWN] == before, "measured once"
    for name in (OWN, CLIP_TEXT):
        row = table[name]
        for split in ("in", "held_out", "human"):
            for facet in ("colour", "shape", "event"):
                assert 0 <= row[f"{facet}/{split}"] <= 1
        assert row["all/human"] <= row["colour/human"]
        assert row["text_parameters"] > 1000
        # Taken in two processes at two moments, so a busy machine may turn their order round.
        assert row["prompt_seconds"] > 0
        assert row["start_seconds"] > 0
        assert row["steps"] == 2
    assert table["truth"]["colour/in"] == 1
    assert "all, human" in (tmp_path / "run" / "table.md").read_text()
    own = started(str(tmp_path / "run" / "own--learned-along"), load_recipe("text-encoders", list(TOY)).own)
    assert own.encode(["a red ball"]).states.abs().sum() > 0


def test_words_of_a_clip_are_states_up_to_the_end_token(clip: Path) -> None:
    text = CLIPWords(clip)
    assert not text.trainable
    assert text.width == 48
    both = text.encode(["a red ball falls", ""])
    alone = text.encode(["a red ball falls"])
    torch.testing.assert_close(both.states[0], alone.states[0])
    assert both.mask.sum(1).tolist() == [alone.mask.shape[1], 2], "start and end"
    assert (both.states[1, 2:] == 0).all()
    assert not both.states.requires_grad
    end = int(both.mask[0].sum()) - 1
    ids = torch.tensor([[*text.tokenizer.encode("a red ball falls"), text.tokenizer.size]])
    torch.testing.assert_close(text.tower.out(both.states[0, end]), text.tower(ids)[0], msg="CLIP reads the last")
    assert text.truncated("a red ball falls and a blue ring slides and a red ball falls")
    assert not text.truncated("a red ball")
    with pytest.raises(UserError, match="no finished run of retrieval"):
        CLIPWords(clip / "none")


def test_human_prompts_of_trained_events_are_asked_several_times() -> None:
    like = make_cases(("fall",), 1, size=(32, 32), frames=3, fps=4.0)[0]
    cases = human_cases(("fall", "slide"), 3, like)
    assert len(cases) == 3 * len({case.text for case in cases})
    assert {case.kind for case in cases} == {"fall", "slide"}
    crimson = next(case for case in cases if case.text == "crimson sphere falling")
    assert crimson.wanted == {"kind": "fall", "objects": [{"color": "red", "shape": "ball"}]}
    assert crimson.truth.shape == like.truth.shape
    assert not np.any(crimson.truth)
    assert human_cases(("collision",), 1, like)[0].wanted["kind"] == "collision"
