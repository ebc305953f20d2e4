"""The recaptioning experiment at toy size: from a finished run and a captioner to its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tubelet.curate.captioners import save_captioner
from tubelet.data.shards import ShardDataset
from tubelet.models.coca import CoCa, CoCaConfig
from tubelet.recipes.recaptioning import kind_of
from tubelet.text.bpe import train as train_tokenizer
from tubelet.text.writing import Writing


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "captioner"
    torch.manual_seed(0)
    writing = Writing(train_tokenizer(["a red ball falls", "a blue box slides left"] * 4, 280), limit=10)
    model = CoCa(CoCaConfig(32, 2, 1, 32, 1, 32, image=16, patch=8, vocab=writing.size, queries=4, frames=3))
    save_captioner(folder, model, writing, frames=3, fps=4.0)
    return folder


def words(folder: Path, whole: Path, *more: str) -> list[str]:
    settings = (
        f"whole={whole}", "clips=24", "n=4", "train.steps=2", "train.batch=4", "train.warmup=0", "train.compile=false",
        "train.precision=fp32", "train.progress=false", "sampling.steps=2", "denoiser.width=32", "denoiser.depth=1",
        "denoiser.heads=2", "words.width=32", "words.depth=1", "words.heads=2", *more,
    )  # fmt: skip
    return ["train", "recaptioning", "--out", str(folder), *[f"--set={setting}" for setting in settings]]


def test_blends_are_trained_and_measured(
    whole: Path, captioner: Path, tmp_path: Path, tubelet: Callable, refused: Callable
) -> None:
    folder = tmp_path / "run"
    asked = words(folder, whole, f"captioner={captioner}", "blends=[0,0.95]")
    said = tubelet(*asked)
    assert said.code == 0, said.err
    table = json.loads((folder / "table.json").read_text())
    assert list(table) == ["degraded", "recaptioned-095", "truth", "truth through the codec"]
    for figures in table.values():
        for asking in ("short", "expanded"):
            assert 0 <= figures[f"all/{asking}"] <= figures[f"colour/{asking}"] <= 1
    assert table["truth"]["colour/short"] == table["truth"]["colour/expanded"] == 1
    assert (table["degraded"]["steps"], table["recaptioned-095"]["steps"]) == (2, 2)
    assert "| recaptioned-095 | 0." in (folder / "table.md").read_text()
    worth = json.loads((folder / "captions.json").read_text())
    assert worth["alt/event"] < 1
    assert "dense@captioner/words" in worth
    assert (folder / "sheet.png").exists()

    old, new = ShardDataset(whole / "latents"), ShardDataset(folder / "latents")
    assert len(new) == min(24, len(old))
    for number in range(len(new)):
        before, after = old.read(number), new.read(number)
        assert before is not None
        assert after is not None
        assert torch.equal(before.tensors["latent"], after.tensors["latent"])
        own, captions = before.meta["captions"], after.meta["captions"]
        assert captions[: len(own)] == own
        seen = [("dense", "captioner")] if kind_of(before) in ("slide", "fall", "bounce", "parabola") else []
        assert [(one["kind"], one["source"]) for one in captions[len(own) :]] == [("alt", "degraded"), *seen]

    # Nothing that is done is done again, and the folder belongs to its settings.
    before = {
        path: path.stat().st_mtime_ns
        for name in ("latents", "degraded", "recaptioned-095")
        for path in (folder / name).rglob("*.*")
    }
    again = tubelet(*asked, "--set=blends=[0.95]")
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(json.loads((folder / "table.json").read_text())) == ["recaptioned-095", "truth", "truth through the codec"]
    assert "other settings of 'rates'" in refused(*asked, "--set", "rates.missing=0.1")

    # On the worlds' own captions, which are what they say.
    said = tubelet(*words(tmp_path / "more", whole, "captioner=world", "blends=[1.0]"))
    assert said.code == 0, said.err
    worth = json.loads((tmp_path / "more" / "captions.json").read_text())
    assert worth["dense/colour"] == worth["dense/event"] == 1


def test_what_does_not_fit_is_one_sentence(whole: Path, captioner: Path, tmp_path: Path, refused: Callable) -> None:
    out = tmp_path / "out"
    assert "holds no captioner" in refused(*words(out, whole, f"captioner={tmp_path}"))
    assert "holds no finished run of worlds-64" in refused(*words(out, tmp_path, f"captioner={captioner}"))
    assert "blends are different shares" in refused(*words(out, whole, "blends=[2]"))
    assert not out.exists()
