"""language-tasks in small: every network is trained, every row is measured; stopped and resumed; with a lent tokenizer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tubelet.codecs.tokenizer import TokenizerConfig, VideoTokenizer
from tubelet.core.config import to_dict
from tubelet.core.files import write_json
from tubelet.core.weights import save_module
from tubelet.evaluate.fidelity import psnr
from tubelet.evaluate.report import make_cases
from tubelet.evaluate.tasks import MOVING
from tubelet.recipes.language_tasks import ROWS, TASKS, TRAIN_SEED, LanguageTasks, backdrop, halve, hole_of, unseen, with_hole
from tubelet.train.tokens import FilmTasksObjective
from tubelet.worlds.constants import TRAIN_SEEDS

SETTINGS = (
    *(
        f"{part}_train.{one}"
        for part in ("tokenizer", "language", "masked", "large")
        for one in ("steps=2", "batch=2", "warmup=0", "precision=fp32", "progress=false")
    ),
    *("size=[64,64]", "frames=5", "clips=6", "n=4", "enlarged=3", "workers=1", "tokenizer.bits=4", "seen=2", "given=2"),
    *("width=16", "depth=1", "heads=2", "large_width=16", "large_depth=1", "large_heads=2"),
    *("sampling.steps=2", "large_sampling.steps=2"),
)
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]


def test_language_tasks_stopped_and_resumed(
    tiny: Path, tmp_path: Path, tubelet: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "language-tasks", "--out", tmp_path, "--set", f"text={tiny}", *SMALL)
    loss = FilmTasksObjective.__call__

    def interrupted(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(FilmTasksObjective, "__call__", interrupted)
        assert tubelet(*words).code == 130
    assert not (tmp_path / "table.md").exists()
    assert (tmp_path / "inpainting--backdrop" / "figures.json").exists()
    made = (tmp_path / "words.safetensors").stat().st_mtime_ns
    assert tubelet(*words).code == 0
    assert (tmp_path / "words.safetensors").stat().st_mtime_ns == made, "clips are not rendered again"

    table = json.loads((tmp_path / "table.json").read_text())
    assert tuple(table) == ROWS
    for name, row in table.items():
        if "constant" not in name:
            for facet in ("colour", "shape", "size", "direction", "event", "all"):
                assert 0 <= row[f"{facet}/in"] <= 1, name
                held_out = "another" not in name and not name.startswith("large")
                assert (f"{facet}/held_out" in row) == held_out, name
    whole = {"first", "found", "psnr/inpainting", "psnr/outpainting"}
    own = {"text to video": set(), "image to video": {"first"}, "frame prediction": {"found"}}
    own |= {task: {f"psnr/{task}"} for task in ("inpainting", "outpainting")}
    for task in TASKS:
        for name in (task, f"{task}, another's condition", f"masked model: {task}"):
            assert set(table[name]) & whole == own[task], name
            assert table[name]["seconds"] > 0
            assert ("parameters" in table[name]) == ("another" not in name)
    truth, coded = table["truth"], table["truth through the tokenizer"]
    assert truth["first"] == truth["psnr/inpainting"] == truth["psnr/outpainting"] == 100
    assert coded["first"] < 100
    assert table["image to video, held"]["first"] == 100
    assert table["image to video"]["first"] == pytest.approx(coded["first"], abs=1e-3), "what is given is kept"
    assert table["image to video, another's condition"]["first"] < table["image to video"]["first"]
    assert truth["velocity"] < min(table[f"frame prediction, {what}"]["velocity"] for what in ("held", "constant velocity"))
    assert 15 < table["inpainting, backdrop"]["psnr/inpainting"] < 100
    assert table["image to video"]["macs"] > table["text to video"]["macs"]
    assert table["inpainting"]["macs"] > 1.5 * table["text to video"]["macs"], "it reads a film and makes one"
    assert len({table[task]["parameters"] for task in TASKS}) == 1, "one language model"

    large = {name: row for name, row in table.items() if name.startswith("large")}
    assert large["large: truth"]["psnr"] == 100
    for name, row in large.items():
        assert ("psnr" in row) == (name != "large: text to video")
        assert ("macs" in row) == (name in ("large: super-resolution", "large: text to video"))
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(ROWS)
    assert Image.open(tmp_path / "sheet.png").height > 32 * len(ROWS)

    before = (tmp_path / "table.json").read_text()
    (tmp_path / "truth" / "figures.json").unlink()
    assert tubelet(*words).code == 0
    assert (tmp_path / "table.json").read_text() == before, "what is there is not measured again, what is missing is"
    assert "no row 'smell'" in refused(*words, "--set", 'rows=["smell"]')
    assert "begun with other settings of 'depth'" in refused(*words, "--set", "depth=2")
    elsewhere = ("train", "language-tasks", "--out", tmp_path / "no", "--set", f"text={tiny}", *SMALL)
    for wrong, said in (
        ("size=[48,64]", "multiples of 32"),
        ("size=[64,32]", "from 64 on"),
        ("enlarged=5", "2 to n=4 clips"),
        ("given=5", "of 5 token frames 5"),
        ("tokenizer.bits=5", "5 bits are odd"),
        ('shares={"smell":1}', "no task 'smell'"),
        ('kinds=["paint"]', "kinds are some of"),
    ):
        assert said in refused(*elsewhere, "--set", wrong)


def test_a_lent_tokenizer_of_another_stride_is_taken_as_it_is(tiny: Path, tmp_path: Path, tubelet: Callable) -> None:
    torch.manual_seed(3)
    config = TokenizerConfig(6, "vq", temporal_stride=2)
    save_module(tmp_path / "lent" / "tokenizer.safetensors", VideoTokenizer(config))
    write_json(tmp_path / "lent" / "tokenizer.json", to_dict(config))
    rows = ["truth through the tokenizer", "frame prediction", "masked model: frame prediction", "large: super-resolution"]
    words = ("train", "language-tasks", "--out", tmp_path / "out", "--set", f"text={tiny}", *SMALL)
    words += ("--set", f"lent={tmp_path / 'lent'}", "--set", f"rows={json.dumps(rows)}")
    assert tubelet(*words).code == 0
    assert list(json.loads((tmp_path / "out" / "table.json").read_text())) == rows
    assert not (tmp_path / "out" / "tokenizer").exists()


def test_clips_are_of_training_seeds() -> None:
    assert TRAIN_SEED + LanguageTasks().clips - 1 in TRAIN_SEEDS


def test_a_small_clip_is_the_mean_of_four_pixels() -> None:
    video = torch.randint(0, 256, (70, 2, 4, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = halve(video)
    assert small.shape == (70, 2, 2, 3, 3)
    mean = video.float().unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))
    assert (small.float() - mean).abs().max() <= 0.5


def test_holes_take_out_what_is_to_be_made_and_nothing_else() -> None:
    video = torch.randint(0, 128, (2, 2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask, film = hole_of("inpainting", (2, 32, 32)), with_hole("inpainting", video)
    assert mask.sum() == 2 * 16 * 16
    assert mask[0, 8:24, 8:24].all()
    assert torch.equal(film == 128, mask[..., None].expand_as(film))
    assert torch.equal(film[:, ~mask], video[:, ~mask])
    mask, film = hole_of("outpainting", (2, 32, 32)), with_hole("outpainting", video)
    assert mask.sum() == 2 * 32 * 16
    assert not mask[..., 8:24].any()
    assert torch.equal(film[:, ~mask], video[:, ~mask])
    assert torch.equal(film[:, :, :, :8], video[:, :, :, 8:9].expand_as(film[:, :, :, :8]))
    assert torch.equal(film[:, :, :, 24:], video[:, :, :, 23:24].expand_as(film[:, :, :, 24:]))
    tokenizer = VideoTokenizer(TokenizerConfig(4, temporal_stride=1))
    assert unseen(tokenizer, mask)[0].tolist() == [[True, False, False, True]] * 4
    mask[:, :, 7] = False
    assert unseen(tokenizer, mask)[0].tolist() == [[False, False, False, True]] * 4, "a column of it can be seen"


def test_a_backdrop_is_what_stands_beside_the_hole() -> None:
    for case in make_cases(MOVING, 8, frames=9, fps=4.0):
        for task in ("inpainting", "outpainting"):
            mask = hole_of(task, (9, 64, 64)).numpy()
            filled = backdrop(case.truth, mask)
            assert np.array_equal(filled[~mask], case.truth[~mask])
            assert psnr(case.truth, filled, mask) > 12
            black = np.where(mask[..., None], 0, case.truth).astype(np.uint8)
            assert psnr(case.truth, filled, mask) > psnr(case.truth, black, mask)
