"""The experiments on words in small: every tokenizer and every model of words is trained, measured and resumed."""

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

from tubelet.codecs.tokenizer import TokenizerConfig
from tubelet.evaluate.report import make_cases
from tubelet.evaluate.tasks import MOVING
from tubelet.recipes import codec_table, token_models, tokenizers
from tubelet.recipes.tokenizers import (
    BITS,
    TOKENIZERS,
    Tokenizers,
    clips_of,
    curves,
    load_tokenizer,
    read_back,
    to_words,
    train_tokenizer,
)
from tubelet.train.loop import TrainConfig
from tubelet.train.tokens import TokenizerObjective
from tubelet.worlds.constants import TRAIN_SEEDS


def settings(*several: str) -> list[str]:
    return [word for one in several for word in ("--set", one)]


def training(name: str, steps: int = 2) -> list[str]:
    return settings(*(f"{name}.{one}" for one in (f"steps={steps}", "batch=2", "warmup=0", "precision=fp32", "progress=false")))


CLIPS = settings("size=[32,32]", "frames=5", "clips=6", "n=4", "workers=1")


def table_of(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "table.json").read_text())


def test_tokenizers_stopped_and_resumed(
    tiny: Path, tmp_path: Path, tubelet: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["LFQ, 2^6", "VQ, 2^6", "VQ, 2^9", "C-ViViT, LFQ, 2^12"]
    words = ["train", "tokenizers", "--out", tmp_path, *CLIPS, *training("train"), *training("generate")]
    words += settings(f"text={tiny}", "seen=5", "width=32", "depth=1", "heads=2", "sampling.steps=2")
    words += settings(f"rows={json.dumps(rows)}", 'generators=["VQ, 2^9"]')
    calls, loss = 0, TokenizerObjective.__call__

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first step of the second row
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerObjective, "__call__", interrupted)
        assert tubelet(*words).code == 130
    assert not (tmp_path / "table.md").exists()
    assert tubelet(*words).code == 0

    table = table_of(tmp_path)
    assert list(table) == [*rows, "median frame", "truth"]
    for name in rows:
        row = table[name]
        assert 0 < row["used"] <= 1
        assert 1 <= row["perplexity"] <= 2 ** TOKENIZERS[name].bits
        assert row["psnr"] < table["truth"]["psnr"] == 100
        assert row["macs"] > 0
        assert ("colour/in" in row) == (name == "VQ, 2^9")
    assert table["LFQ, 2^6"]["steps"] == table["VQ, 2^9"]["steps"] == 2
    assert table["truth"]["caption/shape"] == 1
    assert table["truth"]["law/steady"] > 0.5, "a motion of five frames in two seconds is not always read"
    assert table["median frame"]["law/steady"] == 0
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(table)
    assert np.asarray(Image.open(tmp_path / "curve.png")).ndim == 3
    assert (tmp_path / "sheet.png").exists()
    assert "no tokenizer 'LFQ'" in refused(*words, *settings('generators=["LFQ"]'))
    assert "begun with other settings of 'clips'" in refused(*words, *settings("clips=7"))


def test_token_models_at_equal_compute_and_with_a_lent_tokenizer(
    tiny: Path, tmp_path: Path, tubelet: Callable, refused: Callable
) -> None:
    words = ["train", "token-models", *CLIPS, *training("train", 8), *training("codec_train")]
    words += settings(f"text={tiny}", "width=32", "depth=1", "heads=2", "channels=4", "tokenizer.bits=6", "patch=2")
    words += settings("word_sampling.steps=2", "walt_sampling.steps=2", "sampling.steps=2")
    out = tmp_path / "own"
    assert tubelet(*words, "--out", out).code == 0
    table = table_of(out)
    models = ["language model", "masked model", "W.A.L.T", "spacetime"]
    assert list(table) == ["words", "latents", *models, "truth"]
    for name, row in table.items():
        for split in ("in", "held_out"):
            for facet in ("colour", "shape", "size", "direction", "event"):
                assert 0 <= row[f"{facet}/{split}"] <= 1, name
        assert np.isfinite(row["kid"])
    assert table["truth"]["colour/in"] == table["truth"]["shape/held_out"] == 1
    assert 0 < table["words"]["used"] <= 1
    # Equal compute, to half a step.
    costs = {name: table[name]["macs"] * (3.9 if name == "W.A.L.T" else 3) for name in models}
    for name in models:
        assert table[name]["seconds"] > 0
        assert abs(table[name]["steps"] * costs[name] - 8 * costs["language model"]) <= costs[name] / 2
    assert table["language model"]["steps"] == 8 < table["spacetime"]["steps"], "a denoiser has a quarter of the tokens"

    # The tokenizer of another run, of a stride of its own.
    video, _ = clips_of(MOVING, 4, (32, 32), 5, 8.0, 1)
    how = TrainConfig(steps=1, batch=2, warmup=0, precision="fp32", progress=False)
    assert train_tokenizer(TokenizerConfig(5, temporal_stride=4), video, 0, how, tmp_path / "lent") is not None
    out = tmp_path / "other"
    words += ["--out", out, *settings(f"lent={tmp_path / 'lent'}", 'rows=["masked model"]')]
    assert tubelet(*words).code == 0
    table = table_of(out)
    assert list(table) == ["words", "latents", "masked model", "truth"]
    assert load_tokenizer(out / "words").config.bits == 5
    assert "frames must be 1 + a multiple of 4" in refused(*words, *settings("frames=4"))
    assert "tokenizer.json does not exist" in refused(*words, *settings(f"lent={tmp_path}"))


def test_codecs_and_equal_denoisers_on_them(tiny: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    rows = ["causal_conv-t1-c4", "transformer-t4-c4"]
    words = ["train", "codec-table", "--out", tmp_path, *training("train"), *training("codec_train")]
    words += settings("size=[32,32]", "frames=5", "clips=4", "codec_clips=4", "n=9", "workers=1", f"text={tiny}")
    words += settings("width=32", "depth=1", "heads=2", "sampling.steps=2")
    assert tubelet(*words, *settings(f"rows={json.dumps(rows)}")).code == 0
    table = table_of(tmp_path)
    assert list(table) == [*rows, "truth"]
    one, four = (table[row] for row in rows)
    assert one["rate"] == pytest.approx(5 * 4 * 4 * 4 / (5 * 32 * 32 * 3))
    assert four["rate"] == pytest.approx(one["rate"] * 2 / 5), "the first frame alone, then four"
    for row in (one, four):
        assert row["psnr"] < 40
        assert row["encode"] > 0 < row["decode"]
        assert {"films/caption/colour", "films/law/steady", "law/gravity", "frechet"} <= set(row)
    assert table["truth"]["films/caption/colour"] == 1
    assert table["truth"]["caption/colour"] > 0.8, "of so few pixels not all is read"
    made = (tmp_path / "causal-conv-t1-c4" / "codec" / "latents.safetensors").stat().st_mtime_ns
    # Another row joins, the others stay as they are.
    assert tubelet(*words, *settings(f"rows={json.dumps([*rows, 'causal_conv-t2-c4'])}")).code == 0
    assert list(table_of(tmp_path)) == [*rows, "causal_conv-t2-c4", "truth"]
    assert (tmp_path / "causal-conv-t1-c4" / "codec" / "latents.safetensors").stat().st_mtime_ns == made
    for wrong in ("causal_conv-t3-c8", "vae-t1-c8", "causal_conv-t1-c0", "causal_conv"):
        assert "e.g. causal_conv-t4-c8" in refused(*words, *settings(f"rows={json.dumps([wrong])}"))


def test_training_clips_are_of_training_seeds_and_kinds_in_turn() -> None:
    video, captions = clips_of(("fall", "slide"), 4, (32, 32), 2, 8.0, 1)
    assert video.shape == (4, 2, 32, 32, 3)
    assert [("falls" in said[0]["text"]) for said in captions] == [True, False, True, False]
    assert tokenizers.TRAIN_SEED + Tokenizers().clips - 1 in TRAIN_SEEDS
    assert token_models.TRAIN_SEED + token_models.TokenModels().clips - 1 in TRAIN_SEEDS
    assert codec_table.CODEC_SEED + codec_table.CodecTable().codec_clips - 1 in TRAIN_SEEDS
    assert codec_table.FILM_SEED + codec_table.CodecTable().clips - 1 in TRAIN_SEEDS


def test_what_is_read_of_truth_is_all_of_it() -> None:
    cases = make_cases(MOVING, 4)
    truth = np.stack([case.truth for case in cases])
    figures = read_back(truth, cases)
    assert figures["psnr"] == figures["psnr_foreground"] == 100
    assert figures["caption/shape"] == figures["law/inertia"] == 1
    noisy = np.clip(truth.astype(int) + np.random.RandomState(0).randint(-20, 21, truth.shape), 0, 255).astype(np.uint8)
    assert 20 < read_back(noisy, cases)["psnr"] < 30


def test_a_kept_tokenizer_makes_the_same_words(tmp_path: Path) -> None:
    video, _ = clips_of(MOVING, 4, (32, 32), 5, 8.0, 1)
    how = TrainConfig(steps=1, batch=2, warmup=0, precision="fp32", progress=False)
    made = train_tokenizer(TokenizerConfig(8, "vq"), video, 0, how, tmp_path)
    assert made is not None
    words = to_words(made[0], video, batch=3)
    assert words.shape == (4, 2, 4, 4)
    assert torch.equal(to_words(load_tokenizer(tmp_path), video), words)


def test_the_curves_draw_what_there_is() -> None:
    def row(value: float) -> dict[str, float]:
        return {"psnr_foreground": 20 + value, "caption/shape": value, "used": value}

    blank = curves({})
    half = curves({f"LFQ, 2^{bits}": row(bits / 20) for bits in BITS})
    whole = curves({f"{way}, 2^{bits}": row(bits / 20 * (way == "LFQ")) for way in ("LFQ", "VQ") for bits in BITS})
    red, blue = (196, 60, 40), (40, 90, 190)
    assert [[bool((picture == colour).all(-1).any()) for colour in (red, blue)] for picture in (blank, half, whole)] == [
        [False, False],
        [True, False],
        [True, True],
    ]
