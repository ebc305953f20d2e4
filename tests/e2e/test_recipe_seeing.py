"""The recipes of what sees and tells, at toy length: classifiers, captioner and search are trained, measured and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.curate.captioners import load_captioner
from tubelet.models.vivit import ViViT
from tubelet.recipes import events, load_recipe
from tubelet.recipes.captioner import score
from tubelet.recipes.events import ROOMS, attended, decisive, lit, macs, measure
from tubelet.recipes.retrieval import FACETS, WAYS, distinct, found, load_clip, sheet
from tubelet.recipes.worlds import Job
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import KINDS, TEST_SEEDS, TRAIN_SEEDS

TOY = ("train.steps=1", "train.batch=1", "train.precision=fp32", "train.progress=false", "workers=1")


def words(name: str, folder: Path, *settings: str) -> tuple[str, ...]:
    """The command that trains a recipe at toy length."""
    return ("train", name, "--out", str(folder), *(word for setting in (*TOY, *settings) for word in ("--set", setting)))


def test_every_classifier_of_the_lineage_is_trained_and_measured(tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    asked = words("events", tmp_path, "clips=9", "n=9")
    assert tubelet(*asked).code == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == [*ROOMS, "chance"]
    for name in ROOMS:
        figures = table[name]
        for split in ("in", "held_out"):
            assert figures[split] == pytest.approx(np.mean([figures[f"{split}/{kind}"] for kind in KINDS]))
            for control in ("shuffled", "still"):
                assert 0 <= figures[f"{split}/{control}"] <= 1, name
        assert figures["macs"] > 1e6, name
        assert figures["train_seconds"] > 0
    ours, published = ({name: table[name][key] for name in ROOMS if key in table[name]} for key in ("macs", "macs/published"))
    assert ours["ViViT 4"] < ours["ViViT 1"]
    assert published["ViViT 1"] / published["ViViT 4"] == pytest.approx(455.2 / 277.1, abs=0.02), "table 2 of the paper"
    assert table["ViViT 4"]["parameters"] < table["ViViT 3"]["parameters"]
    assert table["chance"]["in"] == 1 / len(KINDS)
    assert "| ViViT 1 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "sheet.png").exists()
    for name in ROOMS:
        assert (tmp_path / name.replace(" ", "-") / "attention.png").exists() is (name in events.ATTENDED)
    assert "no row 'AlexNet'" in refused(*asked, "--set", 'rows=["AlexNet"]')
    assert "other settings of 'clips'" in refused(*asked, "--set", "clips=18")


def test_labels_are_the_events_of_their_clips_however_many(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Job] = []

    def blank(jobs: list[Job], _workers: int, _title: str) -> tuple[torch.Tensor, list[object]]:
        asked.extend(jobs)
        return torch.zeros(len(jobs), 1), []

    monkeypatch.setattr(events, "in_memory", blank)
    for split, seeds in (("train", TRAIN_SEEDS), ("held_out", TEST_SEEDS)):
        asked.clear()
        clips = events.Events(clips=600, n=600)._clips(split)
        assert [KINDS[label] for label in clips["label"].tolist()] == [job.kind for job in asked]
        assert {job.seed in seeds for job in asked} == {True}
        assert {job.split for job in asked} == {split}


class Clock(torch.nn.Module):
    """Names the event whose number the brightness of the last frame is."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        level = (video[:, :, -1].mean((1, 2, 3)) + 1) * 127.5  # (B,)
        return -self.gain * (level[:, None] - torch.arange(len(KINDS))).abs()


def test_accuracy_stands_beside_what_is_left_without_time() -> None:
    video = torch.zeros(18, events.FRAMES, events.SIZE, events.SIZE, 3, dtype=torch.uint8)
    label = torch.arange(18) % len(KINDS)
    video[:, -1] = label[:, None, None, None].to(torch.uint8)
    figures = measure(Clock(), {"in": {"video": video, "label": label}})
    assert figures["in"] == figures["in/bounce"] == 1
    assert figures["in/shuffled"] == figures["in/still"] == pytest.approx(1 / len(KINDS)), "only the first kind is dark"


def test_multiply_accumulates_count_attention() -> None:
    D, L, depth, cells = events.WIDTH, 8 * 16, events.DEPTH, 2 * 16 * 16 * 3
    tokens = L + 1
    block = 12 * tokens * D**2 + 2 * tokens**2 * D
    assert macs(ROOMS["ViViT 1"]) == L * cells * D + depth * block + D * len(KINDS)


def test_light_falls_where_a_clip_is_looked_at() -> None:
    torch.manual_seed(0)
    clip = torch.from_numpy(WORLDS["phys2d"].sample(3, frames=events.FRAMES, kind="fall").video)
    for name in events.ATTENDED:
        model = ROOMS[name]()
        assert isinstance(model, ViViT)
        heat = attended(model.eval(), clip)
        assert heat.shape == (8, 4, 4)
        assert 0 < float(heat.sum()) < 1, "the class tokens keep the rest"
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter)
        gradient = decisive(model, clip, 1)
        assert gradient.shape == (8, 16, 16)
        assert (gradient > 0).any()
    spot = torch.zeros(8, 4, 4)
    spot[2, 0, 3] = 1.0
    drawn = lit(clip, spot)
    assert drawn.shape == (8, 72, 64, 3)
    np.testing.assert_array_equal(drawn[2, :4, -4:], clip[4, :4, -4:])
    np.testing.assert_allclose(drawn[5, :64], 0.2 * clip[10].numpy(), atol=0.51)
    assert (drawn[2, 66:] == 60).all()
    assert (drawn[5, 66:] == 250).all()
    flat = lit(clip, torch.full((8, 4, 4), 0.5))
    np.testing.assert_allclose(flat[0, :64], 0.2 * clip[0].numpy(), atol=0.51)


def test_a_captioner_is_trained_and_measured(tmp_path: Path, tubelet: Callable) -> None:
    assert tubelet(*words("captioner", tmp_path, "clips=18", "n=9", "train.batch=2", "train.compile=false")).code == 0
    table = json.loads((tmp_path / "table.json").read_text())
    text = (tmp_path / "table.md").read_text()
    for style in ("short", "dense"):
        assert (tmp_path / f"{style}.png").exists()
        for split in ("test seeds", "held-out compositions"):
            for row in (f"{style}, {split}", f"{style}, {split}, of other clips"):
                assert set(table[row]) == {"colour", "shape", "size", "direction", "event"}
                assert all(0 <= value <= 1 for value in table[row].values())
                assert f"| {row} |" in text
    captioner = load_captioner(tmp_path)
    assert captioner.view.frames == 9


def test_a_search_is_trained_and_measured(tmp_path: Path, tubelet: Callable) -> None:
    assert tubelet(*words("retrieval", tmp_path, "clips=18", "n=9", "train.batch=4", "train.compile=false")).code == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == ["test seeds", "held-out compositions", "chance"]
    assert (tmp_path / "found.png").exists()
    assert "| chance | 0.111 | 0.556 |" in (tmp_path / "table.md").read_text()
    for split in ("test seeds", "held-out compositions"):
        for direction in WAYS:
            assert 0 <= table[split][f"{direction}/R@1"] <= table[split][f"{direction}/R@5"] <= 1
    model, tokenizer = load_clip(tmp_path)
    assert model.config.vocab > tokenizer.size


def test_captions_of_a_search_all_differ_and_mistakes_are_told_apart() -> None:
    jobs = distinct("held_out", 40)
    episodes = [WORLDS[job.world].sample(job.seed, 64, 64, 9, 4.0, kind=job.kind, split=job.split) for job in jobs]
    assert len({e.short for e in episodes}) == len(jobs) == 40
    scenes = [e.tags["scene"] for e in episodes]
    own = torch.eye(40)
    perfect = found(own, scenes)
    assert {v for k, v in perfect.items() if "R@" in k} == {1.0}
    assert not any(k.startswith("confused") for k in perfect)
    swapped = own[[1, 0, *range(2, 40)]]
    mistaken = found(swapped, scenes)
    assert mistaken["text_to_clip/R@1"] == mistaken["clip_to_text/R@1"] == pytest.approx(38 / 40)
    assert mistaken["confused/event"] == float(scenes[0]["kind"] != scenes[1]["kind"])
    for facet, key in FACETS.items():
        assert mistaken[f"confused/{facet}"] == float(scenes[0].get(key) != scenes[1].get(key)), facet


def test_what_is_found_wrongly_says_whose_it_is() -> None:
    texts = ["A small red ring falls.", "A large blue ball falls."]
    clips = torch.stack([torch.full((2, 24, 200, 3), level, dtype=torch.uint8) for level in (40, 90)])
    right = sheet(torch.eye(2), clips, texts)
    wrong = sheet(torch.eye(2)[[1, 0]], clips, texts)
    assert [int(level) in right[:, 20] for level in (40, 90)] == [True, True]
    assert (wrong[:, 20, 0] == 90).argmax() < (wrong[:, 20, 0] == 40).argmax(), "each finds the other"
    inked = [(one < 60).all(-1).sum() for one in (right, wrong)]
    assert wrong.shape[0] >= right.shape[0]
    assert inked[1] != inked[0]


def test_a_search_is_lent_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run of retrieval"):
        load_clip(tmp_path)


def test_true_captions_score_one_and_those_of_others_less() -> None:
    jobs = [load_recipe("captioner")._job("in", place) for place in range(27)]
    episodes = [WORLDS[job.world].sample(job.seed, 64, 64, 9, 4.0, kind=job.kind) for job in jobs]
    for style in ("short", "dense"):
        figures = score([getattr(e, style) for e in episodes], [e.tags["scene"] for e in episodes])
        assert {value for name, value in figures.items() if "chance" not in name} == {1.0}
        assert max(value for name, value in figures.items() if "chance" in name) < 0.6
