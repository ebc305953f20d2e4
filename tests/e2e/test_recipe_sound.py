"""The recipe for sound in small: three networks are trained, every row is measured, and what is made plays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tubelet.media.decode import decode_audio, decode_uint8
from tubelet.media.encode import read_metadata
from tubelet.recipes.sound import KEPT, ROWS

SMALL = [
    word
    for setting in (
        *(
            f"{stage}_train.{name}"
            for stage in ("codec", "tokenizer", "language")
            for name in ("steps=2", "batch=2", "warmup=0")
        ),
        *(f"{stage}_train.progress=false" for stage in ("codec", "tokenizer", "language")),
        *(f"{stage}_train.precision=fp32" for stage in ("tokenizer", "language")),
        "codec.width=2",
        "codec.dim=4",
        "codec.codes=4",
        "tokenizer.bits=4",
        "width=16",
        "heads=2",
        "depth=1",
        "clips=8",
        "n=8",
        "workers=1",
    )
    for word in ("--set", setting)
]


def test_sound(tiny: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    words = ("train", "sound", "--out", tmp_path, "--set", f"text={tiny}", *SMALL)
    assert tubelet(*words).code == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert tuple(table) == ROWS
    for name, row in table.items():
        for figure in ("precision", "recall", "f1", "count"):
            assert 0 <= row[f"{figure}/in"] <= 1, name
            assert 0 <= row[f"{figure}/held_out"] <= 1, name
    truth = table["truth"]
    assert truth["f1/in"] > 0.9
    assert table["seen: truth"]["f1/in"] > 0.7
    assert table["late"]["f1/in"] < truth["f1/in"]
    assert table["loudness"]["loudness/in"] < truth["loudness/in"]
    assert table["another clip"]["f1/in"] < truth["f1/in"]
    assert table["video to audio"]["parameters"] > 1000
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(ROWS)
    assert Image.open(tmp_path / "sheet.png").height > 64 * len(ROWS)

    for name in ("video-to-audio", "audio-to-video", "text-to-audio", "truth"):
        for number in range(KEPT):
            path = tmp_path / name / f"{number}.mp4"
            frames, fps = decode_uint8(path)
            assert (frames.shape, fps) == ((17, 256, 256, 3), 8.0)
            assert len(decode_audio(path).samples) == 17_000
            assert read_metadata(path)["prompt"]
    heard = decode_audio(tmp_path / "truth" / "0.mp4").to_float()
    assert np.abs(heard).max() > 0.05
    still = decode_uint8(tmp_path / "text-to-audio" / "0.mp4")[0].astype(int)
    assert np.abs(still - still[:1]).max() < 8, "a sentence has no film"

    before = (tmp_path / "table.json").read_text()
    (tmp_path / "truth" / "figures.json").unlink()
    assert tubelet(*words).code == 0
    assert (tmp_path / "table.json").read_text() == before, "what is there is not measured again, what is missing is"
    assert "no row 'smell'" in refused(*words, "--set", 'rows=["smell"]')
    assert "begun with other settings of 'depth'" in refused(*words, "--set", "depth=2")
    elsewhere = ("train", "sound", "--out", tmp_path / "no", "--set", f"text={tiny}", *SMALL)
    assert "no multiple of the hop of 7" in refused(*elsewhere, "--set", "codec.strides=[7]")
    assert "kinds are some of" in refused(*elsewhere, "--set", 'kinds=["paint"]')
