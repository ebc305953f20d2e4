"""Sizes against squares in small: every way is trained on the tokens it may have, and what it saw is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tubelet.core.errors import UserError
from tubelet.models.navit import NaViT
from tubelet.nn.dropping import BetaRate
from tubelet.recipes import load_recipe
from tubelet.recipes.navit_sizes import (
    FACETS,
    FRAMES,
    KINDS,
    SIDE,
    SIZES,
    WAYS,
    Clips,
    NamingObjective,
    _job,
    blank_share,
    measure,
    shown,
    squared,
    tokens_of,
)
from tubelet.worlds import WORLDS
from tubelet.worlds.constants import COLORS, TEST_SEEDS, TRAIN_SEEDS

PATCH = (2, 16, 16)
TOY = (
    "clips=30", "n=10", "budget=600", "workers=1", "train.steps=2", "train.warmup=0", "train.precision=fp32",
    "train.progress=false", "navit.width=32", "navit.depth=1",
)  # fmt: skip


def clip(height: int, width: int, value: int = 200) -> torch.Tensor:
    return torch.full((FRAMES, height, width, 3), value, dtype=torch.uint8)


def test_every_way_is_trained_and_measured(tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    words = ("train", "navit-sizes", "--out", tmp_path, *(word for setting in TOY for word in ("--set", setting)))
    assert tubelet(*words).code == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == [*WAYS, "chance"]
    for name, row in table.items():
        for split in ("in", "held_out"):
            assert row[f"both/{split}"] <= min(row[f"event/{split}"], row[f"colour/{split}"]) <= 1, name
    assert table["chance"]["both/in"] == 1 / (len(KINDS) * len(COLORS))
    for name in WAYS:
        assert 0 <= table[name]["padding"] < 1
        assert table[name]["clips_per_second"] == pytest.approx(table[name]["clips"] / table[name]["train_seconds"])
    assert table["packed, tokens dropped"]["clips"] > 1.5 * table["packed"]["clips"]
    assert table["padded to a square"]["padding"] > 0.3
    assert table["stretched to a square"]["padding"] == pytest.approx(1 - 512 / 600, abs=0.08)
    assert (tmp_path / "sheet.png").exists()
    assert "| packed | " in (tmp_path / "table.md").read_text()
    assert "no row 'cropped'" in refused(*words, "--set", 'rows=["cropped"]')
    assert "set navit.outputs" in refused(*words, "--set", "navit.outputs=9")


def test_every_event_comes_in_every_size_and_no_test_clip_in_training() -> None:
    train, test, held = ([_job(split, place) for place in range(300)] for split in ("train", "in", "held_out"))
    assert set(Counter((job.kind, job.size) for job in train).values()) == {300 // (len(KINDS) * len(SIZES))}
    assert all(job.seed in TRAIN_SEEDS for job in train)
    assert all(job.seed in TEST_SEEDS for job in test + held)
    assert {job.split for job in train + test} == {"train"}
    assert {job.split for job in held} == {"held_out"}


def test_labels_are_what_the_clip_shows() -> None:
    recipe = load_recipe("navit-sizes", ["clips=12", "workers=1"])
    clips = recipe._clips("train")
    for place in range(12):
        job = _job("train", place)
        episode = WORLDS[job.world].sample(job.seed, *job.size, job.frames, job.fps, kind=job.kind)
        assert torch.equal(clips.video[place], torch.from_numpy(episode.video))
        event, colour = clips.label[place].tolist()
        assert KINDS[event] == episode.tags["kind"]
        assert COLORS[colour] == episode.tags["objects"][0]["color"]


def test_squares_are_stretched_or_padded() -> None:
    wide = clip(48, 96)
    stretched, padded = squared(wide, "stretch"), squared(wide, "pad")
    assert stretched.shape == padded.shape == (FRAMES, SIDE, SIDE, 3)
    assert (stretched == 200).all()
    assert (padded[:, 16:48] == 200).all()
    assert ((padded[:, :16] == 128) & (padded[:, 48:] == 128)).all()
    assert blank_share([(48, 96), (64, 64)]) == pytest.approx(float((padded != 200).float().mean()) / 2)
    assert tokens_of(wide, PATCH) == 8 * 3 * 6
    assert tokens_of(padded, PATCH) == 8 * 4 * 4


def test_dropped_tokens_are_gray_on_the_sheet() -> None:
    drop = BetaRate(0.5, 0.85)
    seen = shown(clip(48, 96), drop, PATCH)
    assert float((seen == 127).float().mean()) == pytest.approx(0.5, abs=0.06)
    cells = seen[:, ::16, ::16, 0]
    assert torch.equal(cells[1], cells[2])
    assert torch.equal(seen, cells.repeat_interleave(16, 1).repeat_interleave(16, 2)[..., None].expand_as(seen))
    assert torch.equal(shown(clip(48, 96), None, PATCH), clip(48, 96))


def test_the_objective_names_both_and_drops_tokens_by_its_generator() -> None:
    torch.manual_seed(0)
    recipe = load_recipe("navit-sizes", ["navit.width=32", "navit.depth=1"])
    model = NaViT(recipe.navit)
    batch = {"video": [clip(64, 64, 30), clip(48, 96, 220)], "label": [torch.tensor([0, 1]), torch.tensor([3, 7])]}
    whole = NamingObjective()(model, batch, torch.Generator().manual_seed(0))
    assert whole.keys() == {"loss", "event", "colour"}
    whole["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    dropping = NamingObjective(BetaRate(0.5, 0.85))
    first, same, other = (dropping(model, batch, torch.Generator().manual_seed(seed))["loss"] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, whole["loss"])


def test_shares_are_of_events_colours_and_both() -> None:
    torch.manual_seed(0)
    recipe = load_recipe("navit-sizes", ["navit.width=32", "navit.depth=1"])
    model = NaViT(recipe.navit).eval()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.bias[2] = model.head.bias[len(KINDS) + 5] = 1.0
    labels = [torch.tensor(pair) for pair in ([2, 5], [2, 0], [1, 5], [2, 5])]
    videos = [clip(*SIZES[place]) for place in (0, 3, 1, 3)]
    assert measure(model, Clips(videos, labels)) == {"event": 0.75, "colour": 0.75, "both": 0.5}
    assert set(FACETS) == {"event", "colour", "both"}
    with pytest.raises(UserError, match="set navit"):
        load_recipe("navit-sizes", ["navit.outputs=3"])
