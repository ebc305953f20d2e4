"""unclip in small, on what a tiny run has left: every row from one decoder; stopped and resumed; its own CLIP or a lent one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tubelet.core.config import to_dict
from tubelet.core.files import write_json
from tubelet.core.weights import save_module
from tubelet.evaluate.report import make_cases
from tubelet.models.clip import CLIP
from tubelet.nn.principal import fit_buckets, fit_pca
from tubelet.recipes import load_recipe
from tubelet.recipes.unclip import ROWS, Codes, UnCLIP, _recoloured
from tubelet.text.bpe import train as train_tokenizer
from tubelet.train.unclip import PriorObjective

KINDS = ("slide", "fall", "bounce", "parabola")
CLIP_SIZES = ("head=8", "embed=16", "image=32", "image_width=16", "image_depth=1", "text_width=16", "text_depth=1", "vocab=300")
SETTINGS = (
    *(f"clip.{size}" for size in CLIP_SIZES),
    *(f"unet.{size}" for size in ("width=16", "groups=8")),
    *(f"prior.{size}" for size in ("width=16", "depth=1", "heads=2", "context=128")),
    *(f"codes.{size}" for size in ("width=16", "depth=1", "heads=2", "text_width=16", "text_depth=1", "text_heads=2")),
    *(f"codes.{size}" for size in ("components=3", "buckets=4", "dots=4")),
    *(
        f"{part}_train.{one}"
        for part in ("clip", "decoder", "prior", "codes")
        for one in ("steps=2", "batch=2", "warmup=0", "precision=fp32", "progress=false")
    ),
    "sampling.steps=2",
    "prior_sampling.steps=2",
    "n=4",
)
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]


def test_unclip_stopped_and_resumed(
    whole: Path, tmp_path: Path, tubelet: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "unclip", "--out", tmp_path, "--set", f"whole={whole}", *SMALL)
    loss = PriorObjective.__call__

    def interrupted(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(PriorObjective, "__call__", interrupted)
        assert tubelet(*words).code == 130
    assert not (tmp_path / "table.md").exists()
    first = (tmp_path / "text-alone" / "figures.json").read_bytes()
    assert not (tmp_path / "diffusion-prior" / "figures.json").exists()
    assert tubelet(*words).code == 0
    assert (tmp_path / "text-alone" / "figures.json").read_bytes() == first, "measured once"

    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == [*ROWS, "truth", "truth through the codec"]
    for name in ROWS:
        row = table[name]
        for split in ("in", "held_out", "wordless"):
            for facet in ("colour", "shape", "size"):
                assert 0 <= row[f"{facet}/{split}"] <= 1, name
        assert row["seconds"] > 0
        assert np.isfinite(row["kid"])
        assert -1 <= row["picture"] <= 1
        assert ("cosine/in" in row) == (name != "text alone")
        assert ("prior/parameters" in row) == ("prior" in name)
    assert len({table[name]["parameters"] for name in ROWS}) == 1, "one decoder"
    assert table["true embedding"]["cosine/in"] == pytest.approx(1, abs=1e-5)
    assert table["another's embedding"]["cosine/in"] < 1
    assert table["diffusion prior, best of two"]["prior/parameters"] == table["diffusion prior"]["prior/parameters"]
    assert table["diffusion prior"]["cosine/in"] != table["diffusion prior, best of two"]["cosine/in"]
    free, guided = (table[f"autoregressive prior{more}"] for more in ("", ", guided"))
    assert 0 < free["codes"] == guided["codes"] <= 1
    assert free["cosine/in"] != guided["cosine/in"]

    figures = json.loads((tmp_path / "manipulations.json").read_text())
    assert figures["inversion/psnr"] > figures["inversion/psnr/other noise"]
    assert sum(name.startswith("colour/towards") for name in figures) == 6
    assert Image.open(tmp_path / "manipulations.png").size[1] > 400
    assert "begun with other settings of 'tokens'" in refused(*words, "--set", "tokens=2")
    assert "no row 'GLIDE'" in refused(*words, "--set", 'rows=["GLIDE"]')


def test_a_lent_clip_is_taken_as_it_is(whole: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    lent, out = tmp_path / "retrieval", tmp_path / "out"
    words = ("train", "unclip", "--out", out, "--set", f"whole={whole}", "--set", f"retrieval={lent}", *SMALL)
    words += ("--set", 'rows=["caption\'s embedding"]')
    assert "no finished run of retrieval" in refused(*words)
    config: UnCLIP = load_recipe("unclip", SETTINGS)
    other = replace(config.clip, embed=24)
    torch.manual_seed(5)
    save_module(lent / "clip.safetensors", CLIP(other))
    write_json(lent / "clip.json", to_dict(other))
    train_tokenizer(["a red ball falls"] * 2, 270).save(lent / "tokenizer.json")
    assert tubelet(*words).code == 0
    assert not (out / "clip").exists()
    assert not (out / "tokenizer.json").exists()


def test_one_prompt_has_no_other(whole: Path, tmp_path: Path, refused: Callable) -> None:
    assert "at least 2 prompts" in refused("train", "unclip", "--out", tmp_path, "--set", f"whole={whole}", "--set", "n=1")


def test_codes_of_all_components_are_embeddings_up_to_their_buckets() -> None:
    image = torch.nn.functional.normalize(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    pca = fit_pca(image, 6)
    fine, coarse = (Codes(pca, fit_buckets(pca.project(image), count), torch.zeros(1)) for count in (512, 2))
    kept = [(codes.write(codes.read(image)) * image).sum(-1) for codes in (fine, coarse)]
    assert kept[0].min() > 0.999
    assert kept[1].mean() < 0.99


def test_a_recoloured_wish_differs_in_the_colour_of_its_main_object_alone() -> None:
    for case in make_cases((*KINDS, "collision"), 30, frames=1):
        other = _recoloured(case)
        (one, *rest), (two, *others) = case.wanted["objects"], other.wanted["objects"]
        assert two["color"] not in {thing["color"] for thing in case.wanted["objects"]}
        assert {**one, "color": ""} == {**two, "color": ""}
        assert rest == others
        assert other.text != case.text
        assert other.text.replace(two["color"], one["color"]) == case.text
