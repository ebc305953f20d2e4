"""The recaptioning experiment at toy size: from a finished run and a captioner to its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tubelet.codecs import build_codec
from tubelet.core.config import to_dict
from tubelet.core.files import write_json
from tubelet.core.weights import save_module
from tubelet.curate.captioners import save_captioner
from tubelet.data.shards import ShardDataset
from tubelet.models.coca import CoCa, CoCaConfig
from tubelet.recipes import load_recipe
from tubelet.recipes.worlds import WorldsRecipe
from tubelet.text.bpe import train as train_tokenizer
from tubelet.text.writing import Writing

SMALL = (
    "workers=1", "clips.denoiser=18", "clips.frames=5", "codec_train.steps=1", "denoiser.width=32", "denoiser.depth=1",
    "denoiser.patch=[1,2,2]", "sampling.steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished run of a toy leaves of interest here; its codec is random."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    recipe: WorldsRecipe = load_recipe("smoke", SMALL)
    torch.manual_seed(0)
    save_module(folder / "codec.safetensors", build_codec(recipe.codec, recipe.causal_conv))
    recipe.encode(folder)
    train_tokenizer(["a red ball falls", "a blue box slides left"] * 4, 280).save(folder / "tokenizer.json")
    write_json(folder / "recipe.json", to_dict(recipe))
    write_json(folder / "export.json", {"export": 0.0})
    return folder


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
        f"whole={whole}", "clips=16", "n=9", "sketch=null", "denoise.steps=2", "denoise.batch=4", "denoise.compile=false",
        "denoise.precision=fp32", "denoise.progress=false", *more,
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
    assert list(table) == ["degraded", "recaptioned-095", "truth"]
    for figures in table.values():
        assert {name.split("/")[0] for name in figures} == {"short", "expanded"}
        assert all(0 <= value <= 1 for value in figures.values())
        assert {"short/colour", "short/all", "expanded/event", "expanded/all"} <= set(figures)
    assert table["truth"]["short/colour"] > 0.8
    assert "| recaptioned-095 | 0." in (folder / "table.md").read_text()
    worth = json.loads((folder / "captions.json").read_text())
    assert worth["alt/event"] < 1
    assert "dense@captioner/words" in worth
    assert (folder / "recaptioning.png").exists()

    old, new = ShardDataset(whole / "latents"), ShardDataset(folder / "latents")
    assert len(new) == 16
    for number in range(16):
        before, after = old.read(number), new.read(number)
        assert before is not None
        assert after is not None
        assert torch.equal(before.tensors["latent"], after.tensors["latent"])
        captions = after.meta["captions"]
        assert captions[:3] == before.meta["captions"]
        assert [(one["kind"], one["source"]) for one in captions[3:]] == [("alt", "degraded"), ("dense", "captioner")]
    for name, share in (("degraded", 0.0), ("recaptioned-095", 0.95)):
        begun = json.loads((folder / name / "recipe.json").read_text())
        assert begun["captions"] == pytest.approx({"dense@captioner": share, "alt": 1 - share})
        assert ShardDataset(folder / name / "latents").entries == new.entries

    # Nothing that is done is done again, and the folder belongs to its settings.
    before = {path: path.stat().st_mtime_ns for name in table if name != "truth" for path in (folder / name).rglob("*.*")}
    kept = {path: when for path, when in before.items() if path.name not in ("render.json", "train_codec.json", "encode.json")}
    again = tubelet(*asked, "--set=blends=[0.95]")
    assert again.code == 0, again.err
    changed = [path for path, when in kept.items() if path.suffix != ".safetensors" and path.stat().st_mtime_ns != when]
    assert [path.name for path in changed if path.name != "tokenizer.json"] == []
    assert list(json.loads((folder / "table.json").read_text())) == ["recaptioned-095", "truth"]
    assert "other settings of 'rates'" in refused(*asked, "--set", "rates.missing=0.1")

    # From a given start, on the worlds' own captions.
    start = f"start={folder / 'degraded' / 'system'}"
    said = tubelet(*words(tmp_path / "more", whole, "captioner=world", "blends=[1.0]", start))
    assert said.code == 0, said.err
    assert list(json.loads((tmp_path / "more" / "table.json").read_text())) == ["recaptioned-100", "truth"]
    kinds = {one["kind"] for one in ShardDataset(tmp_path / "more" / "latents").facts(0)["captions"]}
    assert kinds == {"short", "dense", "human", "alt"}


def test_what_does_not_fit_is_one_sentence(whole: Path, captioner: Path, tiny: Path, tmp_path: Path, refused: Callable) -> None:
    out = tmp_path / "out"
    assert "holds no captioner" in refused(*words(out, whole, f"captioner={tmp_path}"))
    assert "holds no finished run on the worlds" in refused(*words(out, tmp_path, f"captioner={captioner}"))
    assert "has another codec" in refused(*words(out, whole, f"captioner={captioner}", f"start={tiny}"))
    assert "blends are different shares" in refused(*words(out, whole, "blends=[2]"))
    assert not out.exists()
