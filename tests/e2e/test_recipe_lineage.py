"""The experiments on the lineage in small: every row is trained, measured and resumed on what a tiny run has left."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tubelet.diffusion.paths import VPLinear
from tubelet.generate.published import OnePicture
from tubelet.models.dit import DiT, DiTConfig
from tubelet.recipes.lent import borrow
from tubelet.recipes.lineage import macs
from tubelet.recipes.unet_or_dit import EQUAL
from tubelet.recipes.vdt_conditioning import judged
from tubelet.train.lineage import FilmObjective
from tubelet.worlds import WORLDS

KINDS = ("slide", "fall", "bounce", "parabola", "collision", "billiard")
SMALL = [
    word
    for setting in (
        "train.steps=2",
        "train.batch=2",
        "train.warmup=0",
        "train.precision=fp32",
        "train.progress=false",
        "sampling.steps=2",
        "n=4",
    )
    for word in ("--set", setting)
]
TRUTH = ("truth", "truth through the codec")


def table_of(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "table.json").read_text())


def sheet_rows(folder: Path) -> int:
    """How many rows of clips a sheet has: runs of lines that are not paper alone in its first column of pixels with a clip."""
    pixels = np.asarray(Image.open(folder / "sheet.png").convert("RGB"))
    inked = (pixels[:, 14] != np.array((250, 250, 248))).any(-1)
    starts = np.flatnonzero(np.diff(np.concatenate([[0], inked.astype(int)])) == 1)
    ends = np.flatnonzero(np.diff(np.concatenate([inked.astype(int), [0]])) == -1)
    return int((ends - starts > 40).sum())


def test_unet_or_dit(whole: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    words = ("train", "unet-or-dit", "--out", tmp_path, "--set", f"whole={whole}", *SMALL)
    words += ("--set", "dit.width=64", "--set", "dit.heads=2", "--set", "unet.width=16", "--set", "unet.groups=8")
    words += ("--set", "dit.depth=4", "--set", "train.steps=6")
    assert tubelet(*words).code == 0
    table = table_of(tmp_path)
    dits = ["DiT, adaLN-Zero", "DiT, adaLN", "DiT, cross-attention", "DiT, in-context"]
    assert list(table) == ["U-Net", *dits, *TRUTH]
    for name, row in table.items():
        for split in ("in", "held_out"):
            for facet in ("colour", "shape", "size"):
                assert 0 <= row[f"{facet}/{split}"] <= 1, name
        assert row["frechet"] > 0
        assert np.isfinite(row["kid"])
    assert table["truth"]["frechet"] < table["truth through the codec"]["frechet"], "this codec is random"
    for name in ("U-Net", *dits):
        assert table[name]["seconds"] > 0
        assert np.isfinite(table[name]["loss"])
        assert table[name]["train_seconds"] > 0
        assert table[name]["parameters"] > 1000
    # Equal compute, to half a step; equal steps.
    unet, dit = table["U-Net"], table[EQUAL]
    assert abs(unet["steps"] * unet["macs"] - dit["steps"] * dit["macs"]) <= unet["macs"] / 2
    assert unet["steps"] != dit["steps"] or unet["macs"] == pytest.approx(dit["macs"], rel=0.1)
    assert {table[name]["steps"] for name in dits} == {6}
    assert table["DiT, adaLN-Zero"]["parameters"] > table["DiT, adaLN"]["parameters"] > table["DiT, in-context"]["parameters"]
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n") == 2 + len(table)
    assert "| U-Net | " in text
    assert sheet_rows(tmp_path) == len(table)

    said = refused(*words, "--set", "train.steps=7")
    assert "begun with other settings of 'train'" in said
    assert "no row 'GAN'" in refused(*words, "--set", 'rows=["GAN"]')
    assert "kinds are some of" in refused(*words, "--set", 'kinds=["paint"]')
    assert "no finished run" in refused("train", "unet-or-dit", "--out", tmp_path / "no", "--set", f"whole={tmp_path}")


def test_vdt_conditioning(whole: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    words = ("train", "vdt-conditioning", "--out", tmp_path, "--set", f"whole={whole}", *SMALL, "--set", "n=5")
    words += ("--set", "vdt.width=32", "--set", "vdt.heads=2", "--set", "vdt.depth=1", "--set", "known=2")
    assert tubelet(*words).code == 0
    table = table_of(tmp_path)
    ways = ["adaptive layer norm", "cross-attention", "token concatenation"]
    assert list(table) == [*ways, "last velocity kept", "last frame held", "truth through the codec", "truth"]
    for name in ways:
        assert 0 <= table[name]["found"] <= 1
        assert table[name]["seconds"] > 0
        assert np.isfinite(table[name]["loss"])
        assert 0 <= table[name]["law/gravity"] <= 1
    assert table["token concatenation"]["macs"] > table["cross-attention"]["macs"] > table["adaptive layer norm"]["macs"]
    assert table["truth"]["found"] > 0.9
    assert table["truth"]["velocity"] < table["last velocity kept"]["velocity"]
    assert table["truth"]["velocity"] < table["last frame held"]["velocity"]
    assert sheet_rows(tmp_path) == len(table) - 1, "a velocity is no film"
    assert "known must lie in 2 .. 2" in refused(*words, "--set", "known=3")


def test_walt_ablations_stopped_and_resumed(
    whole: Path, tmp_path: Path, tubelet: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "walt-ablations", "--out", tmp_path, "--set", f"whole={whole}", *SMALL)
    words += ("--set", "width=32", "--set", "heads=2", "--set", "depth=2", "--set", "every=2", "--set", "train.steps=3")
    calls, loss = 0, FilmObjective.__call__

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 9:  # three steps and four measures of the base, then the second step of the second row
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(FilmObjective, "__call__", interrupted)
        assert tubelet(*words).code == 130
    assert not (tmp_path / "table.md").exists()
    base = (tmp_path / "base" / "figures.json").read_bytes()
    assert tubelet(*words).code == 0
    assert (tmp_path / "base" / "figures.json").read_bytes() == base, "measured once"

    table = table_of(tmp_path)
    rows = ["base", "windows of whole frames", "full attention", "rank 32", "no self-conditioning", "no zero terminal SNR"]
    assert list(table) == [*rows, *TRUTH]
    for name in rows:
        assert table[name]["seconds"] > 0
        assert table[name]["steps"] == 3
        assert np.isfinite(table[name]["loss"])
        assert np.isfinite(table[name]["frechet"])
    counts = {name: table[name]["macs"] for name in rows}
    assert counts["base"] < counts["windows of whole frames"] < counts["full attention"]
    assert counts["base"] < counts["rank 32"]
    assert counts["base"] == counts["no self-conditioning"] == counts["no zero terminal SNR"]
    assert table["rank 32"]["parameters"] > table["base"]["parameters"]
    large = {name: table[name]["large/macs"] for name in rows}
    assert large["base"] < large["windows of whole frames"] < large["full attention"]
    assert large["full attention"] / large["base"] > counts["full attention"] / counts["base"], (
        "windows save more where there is more"
    )
    assert all(table[name]["large/seconds"] > 0 for name in rows)
    assert {"law/steady"} <= set(table["base"]) & set(table["truth"])
    assert "direction/in" in table["truth"]
    assert sheet_rows(tmp_path) == len(table)
    assert "frames can be left out" in refused(*words, "--set", "every=0")


def test_multiply_accumulates_are_those_of_the_formula_attention_included(whole: Path, tmp_path: Path) -> None:
    """What torch leaves out on a CPU: two products of all pairs of tokens."""
    lent = borrow(str(whole), tmp_path / "one", "cpu")
    D, L, cells = 32, 4 * 4, 4
    network = DiT(DiTConfig(D, 3, 2, 1, lent.codec.channels, 1, text_width=lent.text.width))
    found = macs(OnePicture(network, VPLinear()), lent, 1)
    block = 12 * L * D**2 + 2 * L**2 * D + 6 * D**2
    assert found == 3 * block + 3 * L * cells * D + 256 * D + D**2 + lent.text.width * D + 2 * D**2


def test_a_film_is_judged_from_where_it_was_made() -> None:
    episodes = [WORLDS["phys2d"].sample(n, 64, 64, 17, 8.0, kind=kind) for n, kind in enumerate(("slide", "fall", "bounce"))]
    truth = np.stack([episode.video for episode in episodes])
    figures = judged(truth, episodes, 8)
    assert figures["found"] == 1
    assert figures["velocity"] < 0.1 < figures["velocity/constant"] < figures["velocity/copy"] * 3
    assert figures["law/gravity"] == figures["law/inertia"] == figures["law/steady"] == 1
    still = truth.copy()
    still[:, 8:] = truth[:, 7:8]
    held = judged(still, episodes, 8)
    assert held["velocity"] == pytest.approx(held["velocity/copy"], abs=0.1)
    assert held["law/inertia"] == 0
