"""Every task on the command line: real films and pictures of any shape in, a film out that keeps what was known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tubelet.generate.clip import read_settings
from tubelet.media.decode import decode_uint8
from tubelet.media.encode import save

WORDS = "a blue ball bounces"
NEAR = 12
"""Levels by which pixels that went through the file's own compression differ from those that were read."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Films of the system's own rate and of twice it, pictures with and without alpha, masks."""
    folder = tmp_path_factory.mktemp("films")
    smooth = np.linspace(30, 220, 32).astype(np.uint8)
    still = np.stack([np.broadcast_to(smooth, (32, 32)), np.broadcast_to(smooth[:, None], (32, 32)), np.full((32, 32), 90)], -1)
    film = np.stack([np.roll(still, 2 * t, 1) for t in range(8)]).astype(np.uint8)
    save(film, folder / "film.mp4", 8.0)
    save(film[:, ::-1].copy(), folder / "other.gif", 8.0)
    save(np.repeat(film, 2, 0).repeat(2, 1), folder / "tall.mp4", 16.0)
    Image.fromarray(film[0]).save(folder / "first.png")
    alpha = np.concatenate([film[3], np.full((32, 32, 1), 128, np.uint8)], -1)
    Image.fromarray(alpha, "RGBA").save(folder / "alpha.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 8:24] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "small_mask.png")
    moving = np.zeros((8, 32, 32, 3), np.uint8)
    moving[2:, :8] = 255
    save(moving, folder / "mask.mp4", 8.0)
    (folder / "words.mp4").write_text("not a film")
    board = [
        {"words": WORDS, "frames": 4},
        {"words": "a red box falls", "frames": 5, "first": "first.png", "last": "alpha.png"},
    ]
    (folder / "board.json").write_text(json.dumps(board))
    return folder


def pixels(path: Path) -> np.ndarray:
    return decode_uint8(path)[0].astype(int)


def gap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference in levels."""
    assert a.shape == b.shape
    return float(np.abs(a - b).mean())


def test_pictures_begin_and_end_a_film(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    out, known = tmp_path / "a.mp4", pixels(folder / "first.png")[0]
    ends = ("--first", folder / "first.png", "--last", folder / "other.gif")
    said = tubelet("generate", WORDS, "--system", tiny, *ends, "--out", out, "--json")
    assert said.code == 0, said.err
    film = pixels(out)
    assert film.shape == (5, 32, 32, 3)
    assert gap(film[0], known) < NEAR
    assert gap(film[-1], pixels(folder / "other.gif")[0]) < NEAR
    assert gap(film[2], known) > NEAR
    assert json.loads(said.out)["settings"]["task"] == "known"


def test_a_film_goes_on_and_begins_earlier(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    known = pixels(folder / "film.mp4")
    for more, where, made in (((), slice(0, 8), slice(8, None)), (("--backward",), slice(7, None), slice(0, 7))):
        out = tmp_path / "a.mp4"
        said = tubelet("extend", folder / "film.mp4", WORDS, "--system", tiny, "--frames", 7, *more, "--out", out)
        assert said.code == 0, said.err
        film = pixels(out)
        assert len(film) == 15
        assert gap(film[where], known) < NEAR
        assert gap(film[made], known[:7]) > NEAR


def test_only_what_is_kept_is_read(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    known = pixels(folder / "tall.mp4")
    for more, where, kept in (((), slice(0, 3), known[-6::2]), (("--backward",), slice(2, None), known[:6:2])):
        out = tmp_path / "a.mp4"
        words = ("extend", folder / "tall.mp4", WORDS, "--system", tiny, "--size", "64x32", "--frames", 2, "--keep", 0.375)
        said = tubelet(*words, *more, "--out", out)
        assert said.code == 0, said.err
        assert pixels(out).shape == (5, 64, 32, 3)
        assert gap(pixels(out)[where], kept) < NEAR


def test_one_film_leads_to_another(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    said = tubelet("connect", folder / "film.mp4", folder / "other.gif", WORDS, "--system", tiny, "--frames", 3, "--out", out)
    assert said.code == 0, said.err
    film = pixels(out)
    assert len(film) == 19
    assert gap(film[:8], pixels(folder / "film.mp4")) < NEAR
    assert gap(film[11:], pixels(folder / "other.gif")) < NEAR


@pytest.mark.parametrize(
    ("how", "made"),
    [
        (("--mask", "mask.png"), np.s_[:, 8:16, 8:24]),
        (("--mask", "mask.mp4"), np.s_[2:, :8]),
        (("--box", "8,8,16,24"), np.s_[:, 8:16, 8:24]),
        (("--box", "8,8,16,24", "--during", "1,3"), np.s_[1:3, 8:16, 8:24]),
    ],
)
def test_what_a_mask_leaves_free_stays(tubelet, tiny: Path, folder: Path, tmp_path: Path, how, made) -> None:
    out = tmp_path / "a.png"
    how = [folder / word if word.startswith("mask") else word for word in how]
    said = tubelet("inpaint", folder / "film.mp4", WORDS, "--system", tiny, *how, "--out", tmp_path / "a.mp4", "--sheet", out)
    assert said.code == 0, said.err
    film, known = pixels(tmp_path / "a.mp4"), pixels(folder / "film.mp4")[:5]
    free = np.ones(film.shape[:3], bool)
    free[made] = False
    assert float(np.abs(film - known)[free].mean()) < NEAR
    assert float(np.abs(film - known)[~free].mean()) > NEAR


def test_more_is_painted_around_a_film(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    said = tubelet("outpaint", folder / "film.mp4", WORDS, "--system", tiny, "--size", "32x64", "--out", out)
    assert said.code == 0, said.err
    assert pixels(out).shape == (5, 32, 64, 3)
    assert gap(pixels(out)[:, :, 16:48], pixels(folder / "film.mp4")[:5]) < NEAR


def test_a_storyboard_follows_its_shots(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    said = tubelet("storyboard", folder / "board.json", "--system", tiny, "--out", out, "--no-expand")
    assert said.code == 0, said.err
    film = pixels(out)
    assert len(film) == 9
    assert gap(film[4], pixels(folder / "first.png")[0]) < NEAR
    assert read_settings(out)["text"] == f"{WORDS} | a red box falls"


def test_a_long_film_is_made_again_from_its_file(tubelet, tiny: Path, tmp_path: Path) -> None:
    first, second, short = tmp_path / "a.gif", tmp_path / "b.gif", tmp_path / "c.gif"
    words = ("generate", WORDS, "--system", tiny, "--rolling")
    assert tubelet(*words, "--frames", 23, "--out", first).code == 0
    assert len(pixels(first)) == 23
    assert tubelet("generate", "--like", first, "--system", tiny, "--out", second).code == 0
    assert first.read_bytes() == second.read_bytes()
    assert tubelet(*words, "--out", short).code == 0
    assert tubelet("generate", WORDS, "--system", tiny, "--out", second).code == 0
    assert np.array_equal(pixels(short), pixels(second)), "a film of one window is the film made at once"
    assert gap(pixels(short), pixels(first)[:5]) < 4, "up to the colours that a gif of other frames has"


def test_a_small_film_is_made_large(tubelet, tiny: Path, tmp_path: Path) -> None:
    small, large, plain = (tmp_path / f"{name}.mp4" for name in ("small", "large", "plain"))
    words = ("generate", WORDS, "--system", tiny)
    assert tubelet(*words, "--out", small).code == 0
    more = ("--size", "48x48", "--out")
    assert tubelet(*words, *more, large, "--refine-from", small, "--strength", 0.4).code == 0
    assert tubelet(*words, *more, plain).code == 0
    assert pixels(large).shape == (5, 48, 48, 3)
    assert gap(pixels(large), pixels(plain)) > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("extend", "words.mp4", WORDS), "words.mp4"),
        (("extend", "none.mp4", WORDS), "check the name"),
        (("extend", "film.mp4", " "), "words are needed"),
        (("extend", "film.mp4", WORDS, "--frames", "0"), "a shot lasts"),
        (("extend", "film.mp4", WORDS, "--keep", "0"), "--keep"),
        (("extend", "film.mp4", WORDS, "--fit", "squeeze"), "no fit 'squeeze'"),
        (("connect", "film.mp4", "words.mp4", WORDS), "words.mp4"),
        (("inpaint", "film.mp4", WORDS), "either --mask FILE or --box"),
        (("inpaint", "film.mp4", WORDS, "--mask", "small_mask.png"), "give a mask of the film's size"),
        (("inpaint", "film.mp4", WORDS, "--mask", "words.mp4"), "words.mp4"),
        (("inpaint", "film.mp4", WORDS, "--box", "1,2,3"), "must be 4 whole numbers"),
        (("inpaint", "film.mp4", WORDS, "--box", "0,0,40,40"), "leaves the film"),
        (("inpaint", "film.mp4", WORDS, "--mask", "mask.png", "--during", "0,1"), "--during says when"),
        (("outpaint", "film.mp4", WORDS), "needs the --size"),
        (("outpaint", "film.mp4", WORDS, "--size", "32x32"), "leaves nothing around"),
        (("outpaint", "film.mp4", WORDS, "--size", "32x40"), "width must be a positive multiple of 16"),
        (("storyboard", "film.mp4"), "film.mp4"),
        (("storyboard", "none.json"), "none.json"),
        (("storyboard", "board.json", "--frames", "5"), "leave out --frames"),
        (("generate", WORDS, "--loop", "--first", "first.png"), "neither beginning nor end"),
        (("generate", WORDS, "--strength", "0.5"), "--strength is for --refine-from"),
        (("generate", WORDS, "--refine-from", "film.mp4", "--rolling"), "leave out --first"),
        (("generate", WORDS, "--frames", "1", "--first", "first.png", "--last", "first.png"), "ask for more frames"),
        (("generate", WORDS, "--frames", "1", "--first", "first.png"), "nothing is left to make"),
        (("generate", WORDS, "--first", "none.png"), "none.png"),
    ],
)
def test_what_cannot_be_is_refused(refused, tiny: Path, folder: Path, tmp_path: Path, monkeypatch, words, says: str) -> None:
    monkeypatch.chdir(folder)
    before = sorted(tmp_path.rglob("*"))
    assert says in refused(*words, "--system", tiny, "--out", tmp_path / "no.mp4")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("board", "says"),
    [
        ({"words": WORDS}, "must be a list of shots"),
        ([], "must be a list of shots"),
        ([{"word": WORDS}], "no setting 'word'"),
        ([{"frames": 4}], "needs its words"),
        ([{"words": WORDS, "frames": "4"}], "whole number"),
        ([{"words": WORDS, "frames": 4, "first": "none.png"}], "none.png"),
        ([{"words": ""}], "prompt is empty"),
    ],
)
def test_a_wrong_board_is_refused(refused, tiny: Path, tmp_path: Path, board: object, says: str) -> None:
    (tmp_path / "board.json").write_text(json.dumps(board))
    assert says in refused("storyboard", tmp_path / "board.json", "--system", tiny, "--out", tmp_path / "no.mp4")


def test_a_film_made_from_files_is_not_made_again_from_its_own(
    refused, tubelet, tiny: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.mp4"
    assert tubelet("extend", folder / "film.mp4", WORDS, "--system", tiny, "--frames", 2, "--out", out).code == 0
    assert "from another film" in refused("generate", "--like", out, "--system", tiny, "--out", tmp_path / "b.mp4")
