"""cascade in small: two stages trained on a few clips, every way of enlarging measured, stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tubelet.media.encode import save
from tubelet.recipes.cascade import FILTERS, ROWS, halved, perceptual, resized, textures
from tubelet.train.upscaling import UpscaleObjective
from tubelet.worlds import WORLDS

SETTINGS = (
    "clips=6",
    "frames=2",
    "width=16",
    "depth=2",
    "heads=2",
    "n=3",
    "steps=2",
    "unclip.width=8",
    *(
        f"{part}.{one}"
        for part in ("first", "second", "unclip_train")
        for one in ("steps=2", "batch=2", "warmup=0", "precision=fp32", "progress=false")
    ),
)
SMALL = [word for setting in SETTINGS for word in ("--set", setting)]


def test_cascade_stopped_and_resumed(
    tiny: Path, tmp_path: Path, tubelet: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "cascade", "--out", tmp_path, "--set", f"system={tiny}", *SMALL)
    calls, loss = 0, UpscaleObjective.__call__

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:  # the second stage's first step
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(UpscaleObjective, "__call__", interrupted)
        assert tubelet(*words).code == 130
    assert not (tmp_path / "table.md").exists()
    first = (tmp_path / "stage-1.safetensors").read_bytes()
    assert not (tmp_path / "stage-2.safetensors").exists()
    assert tubelet(*words).code == 0
    assert (tmp_path / "stage-1.safetensors").read_bytes() == first, "trained once"

    table = json.loads((tmp_path / "table.json").read_text())
    assert tuple(table) == ROWS
    for name, row in table.items():
        if "other truth" in name:
            assert set(row) == {"frechet", "kid"}
            continue
        # After two updates a network that adds nothing to an enlargement makes noise.
        least = 2 if "unCLIP" in name else 5
        assert row["psnr"] > least
        assert row["foreground"] > least
        assert row["perceptual"] > 0
        if "codec" not in name:
            assert row["seconds"] > 0
            assert row["psnr/textures"] > least
            assert row["perceptual/textures"] > 0
            assert np.isfinite(row["kid"])
        assert ("parameters" in row) == ("W.A.L.T" in name or "unCLIP" in name)
    assert table["4x: W.A.L.T"]["parameters"] > 2 * table["2x: W.A.L.T"]["parameters"] - 1
    assert table["2x: bicubic"]["psnr"] != table["2x: W.A.L.T, one step"]["psnr"]
    assert table["4x: W.A.L.T"]["psnr"] != table["4x: W.A.L.T, no noise added"]["psnr"]
    assert table["2x: lanczos"]["psnr/textures"] > table["4x: lanczos"]["psnr/textures"]
    assert "PSNR, textures" in (tmp_path / "table.md").read_text()
    assert Image.open(tmp_path / "sheet.png").size[1] > 500

    assert "begun with other settings of 'depth'" in refused(*words, "--set", "depth=3")
    other = ("train", "cascade", "--out", tmp_path / "other", "--set", f"system={tiny}", *SMALL)
    assert "do not divide into windows" in refused(*other, "--set", "window=5")
    assert "at least 2 test clips" in refused(*other, "--set", "n=1")


def test_real_films_stand_beside_textures(tiny: Path, tmp_path: Path, tubelet: Callable, refused: Callable) -> None:
    film = WORLDS["phys2d"].sample(1, 160, 200, 3, 8.0, kind="slide").video
    save(np.concatenate([film, np.zeros_like(film)]), tmp_path / "film.mp4", 8.0)
    words = ("train", "cascade", "--out", tmp_path / "out", "--set", f"system={tiny}", *SMALL, "--set", 'rows=["2x: bicubic"]')
    words += ("--set", f'footage=["{tmp_path / "film.mp4"}"]')
    assert tubelet(*words).code == 0
    assert "PSNR, textures | perceptual, textures | PSNR, footage |" in (tmp_path / "out" / "table.md").read_text()
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert 25 < table["2x: bicubic"]["psnr/footage"] < 80
    assert tubelet(*words[:3], tmp_path / "first", *words[4:], "--set", "takes=1").code == 0
    first = json.loads((tmp_path / "first" / "table.json").read_text())
    assert table["2x: bicubic"]["psnr/footage"] > first["2x: bicubic"]["psnr/footage"] + 5  # its other moments are black
    end = tubelet(*words[:3], tmp_path / "more", *words[4:], "--set", "frames=9")
    assert end.code == 2
    assert "holds only 6 frames" in end.err


@pytest.mark.parametrize("how", FILTERS)
def test_resizing_is_by_frame_and_keeps_means(how: str) -> None:
    clips = textures(2, 3, (32, 48))
    large = resized(clips, 2, how)
    assert large.shape == (2, 3, 64, 96, 3)
    assert large.dtype == np.uint8
    assert np.array_equal(resized(clips[1:, 2:], 2, how)[0, 0], large[1, 2])
    np.testing.assert_allclose(large.mean((1, 2, 3)), clips.mean((1, 2, 3)), atol=1)
    assert np.abs(halved(large).astype(float) - clips).mean() < 12


def test_textures_drift_by_whole_pixels_and_have_the_spectrum_of_photographs() -> None:
    films = textures(4, 3, (64, 96))
    assert np.array_equal(films, textures(4, 3, (64, 96)))
    assert not np.array_equal(films[0], films[1])
    for film in films:
        moves = [(y, x) for y in range(1, 9) for x in range(1, 9) if np.array_equal(film[0, y:, x:], film[1, :-y, :-x])]
        assert len(moves) == 1
        assert film.std() > 30
    power = np.abs(np.fft.rfft2(films[:, 0].mean(-1) - 127.5)).mean(0)
    low, high = power[2:5, 2:5].mean(), power[16:24, 16:24].mean()
    assert 3 < low / high < 12, "amplitudes fall as one over frequency"


def test_the_perceptual_distance_grows_with_blur() -> None:
    truth = np.stack([WORLDS["phys2d"].sample(n, 64, 64, 2, 8.0, kind="bounce").video for n in range(4)])
    assert perceptual(truth, truth) == 0
    little, much = (resized(_shrunk(truth, by), by, "bilinear") for by in (2, 4))
    assert 0 < perceptual(truth, little) < perceptual(truth, much)


def _shrunk(clips: np.ndarray, by: int) -> np.ndarray:
    return halved(clips) if by == 2 else halved(halved(clips))
