"""Every task on the command line: real films and pictures of any shape in, a film out that keeps what was known."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tubelet.cli.films import Generate
from tubelet.generate.clip import read_settings
from tubelet.generate.system import load
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
    strokes = np.repeat(mask[..., None], 4, 2)
    Image.fromarray(strokes, "RGBA").save(folder / "mask_strokes.png")
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


def test_what_is_kept_ends_with_the_picture_not_with_the_sound(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    known, path = pixels(folder / "film.mp4"), tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8, options={"crf": "8"})
        video.height, video.width, video.pix_fmt = 32, 32, "yuv420p"
        hum = container.add_stream("libopus", rate=48000, layout="mono")
        for number in range(200):  # four seconds
            block = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.int16), format="s16", layout="mono")
            block.sample_rate, block.pts = 48000, 960 * number
            container.mux(hum.encode(block))
        for frame in known.astype(np.uint8):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in (hum, video):
            container.mux(stream.encode(None))
    said = tubelet("extend", path, WORDS, "--system", tiny, "--frames", 2, "--keep", 0.375, "--out", tmp_path / "a.mp4")
    assert said.code == 0, said.err
    assert gap(pixels(tmp_path / "a.mp4")[:3], known[-3:]) < NEAR


def test_a_picture_is_one_frame(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    first, alpha = folder / "first.png", folder / "alpha.png"
    for words, frames in {
        ("extend", first, WORDS, "--frames", 4): 5,
        ("extend", first, WORDS, "--frames", 4, "--keep", 0.5): 5,
        ("connect", first, alpha, WORDS, "--frames", 3): 5,
        ("edit", first, WORDS): 1,
        ("edit", first, WORDS, "--frames", 3): 3,
        ("inpaint", first, WORDS, "--box", "8,8,16,24"): 1,
        ("outpaint", first, WORDS, "--size", "32x64"): 1,
        ("generate", WORDS, "--refine-from", first, "--size", "48x48"): 1,
    }.items():
        said = tubelet(*words, "--system", tiny, "--out", tmp_path / "a.mp4")
        assert (said.code, said.err) == (0, ""), words
        assert len(pixels(tmp_path / "a.mp4")) == frames, words


@pytest.mark.parametrize(
    "words", [("edit", WORDS), ("inpaint", WORDS, "--box", "8,8,16,24"), ("outpaint", WORDS, "--size", "32x64")]
)
def test_what_is_left_out_of_a_long_film_is_said(tubelet, tiny: Path, folder: Path, tmp_path: Path, words) -> None:
    call = (words[0], folder / "film.mp4", *words[1:], "--system", tiny, "--out", tmp_path / "a.mp4")
    said = tubelet(*call)
    assert said.code == 0
    assert said.err.startswith("warning: only the first 5 of the 8 frames of")
    assert "--frames" in said.err
    assert said.err.count("\n") == 1
    assert tubelet(*call, "--frames", 5).err == "", "who says how many knows"
    assert tubelet(*call, "--frames", 8).err == ""


def test_what_is_too_long_is_refused_before_it_is_read(
    refused, tubelet, tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tubelet.generate.engine.GREATEST_PIXELS", 12 * 32 * 32)
    film, end = folder / "film.mp4", ("--system", tiny, "--out", tmp_path / "a.mp4")
    assert tubelet("extend", film, WORDS, "--frames", 7, "--keep", 0.5, *end).code == 0
    assert tubelet("generate", WORDS, "--refine-from", film, "--size", "64x64", "--frames", 2, *end).code == 0

    def read(*_: object, **__: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("tubelet.media.decode.decode", read)
    for said in (
        refused("extend", film, WORDS, "--frames", 7, *end),
        refused("extend", film, WORDS, "--frames", 7, "--keep", 60, *end),
    ):
        assert "film.mp4 is too long: a film of 15 frames of 32x32" in said
        assert "--keep" in said
    assert "a film of 19 frames" in refused("connect", film, folder / "other.gif", WORDS, "--frames", 3, *end)
    assert "--frames" in refused("generate", WORDS, "--refine-from", film, "--size", "64x64", *end)


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
        (("--mask", "mask_strokes.png"), np.s_[:, 8:16, 8:24]),
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
    assert "no cell" not in said.err
    save(pixels(folder / "film.mp4")[:5, :8, :8].astype(np.uint8), tmp_path / "small.mp4", 8.0)
    said = tubelet("outpaint", tmp_path / "small.mp4", WORDS, "--system", tiny, "--size", "32x48", "--out", out)
    assert said.code == 0, said.err
    assert "no cell of 8x8 pixels lies wholly in what is to stay" in said.err


def test_a_large_film_is_made_to_lie_in_the_canvas(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    said = tubelet("outpaint", folder / "tall.mp4", WORDS, "--system", tiny, "--size", "32x32", "--frames", 3, "--out", out)
    assert said.code == 0, said.err
    known = decode_uint8(folder / "tall.mp4", fps=8.0, frames=3, size=(32, 16), fit="stretch")[0].astype(int)
    assert gap(pixels(out)[:, :, 8:24], known) < NEAR


def test_a_storyboard_follows_its_shots(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    said = tubelet("storyboard", folder / "board.json", "--system", tiny, "--out", out, "--no-expand")
    assert said.code == 0, said.err
    film = pixels(out)
    assert len(film) == 9
    assert gap(film[4], pixels(folder / "first.png")[0]) < NEAR
    assert read_settings(out)["text"] == f"{WORDS} | a red box falls"


def test_a_shot_after_a_cut_sees_nothing_of_the_one_before(tubelet, tiny: Path, tmp_path: Path) -> None:
    films = {}
    for name, board in {
        "cut": [{"words": WORDS, "frames": 5}, {"words": "a red box falls", "frames": 5, "cut": True}],
        "other": [{"words": "a green ring slides", "frames": 5}, {"words": "a red box falls", "frames": 5, "cut": True}],
        "on": [{"words": WORDS, "frames": 5}, {"words": "a red box falls", "frames": 5}],
    }.items():
        (tmp_path / "board.json").write_text(json.dumps(board))
        out = tmp_path / f"{name}.mp4"
        said = tubelet("storyboard", tmp_path / "board.json", "--system", tiny, "--out", out, "--sheet", tmp_path / "a.png")
        assert said.code == 0, said.err
        films[name] = pixels(out)
    assert gap(films["cut"][5:], films["other"][5:]) < 4, "up to what the file's compression and the codec carry over"
    assert gap(films["cut"][5:], films["on"][5:]) > 4
    again = tmp_path / "again.mp4"
    assert tubelet("generate", "--like", tmp_path / "cut.mp4", "--system", tiny, "--out", again).code == 0
    assert again.read_bytes() == (tmp_path / "cut.mp4").read_bytes()


def test_a_long_film_is_made_again_from_its_file(tubelet, tiny: Path, tmp_path: Path) -> None:
    first, second, short = tmp_path / "a.gif", tmp_path / "b.gif", tmp_path / "c.gif"
    words = ("generate", WORDS, "--system", tiny)
    assert tubelet(*words, "--frames", 23, "--out", first).code == 0
    assert len(pixels(first)) == 23
    assert tubelet("generate", "--like", first, "--system", tiny, "--out", second).code == 0
    assert first.read_bytes() == second.read_bytes()
    assert tubelet(*words, "--window", 5, "--out", short).code == 0
    assert tubelet(*words, "--out", second).code == 0
    assert np.array_equal(pixels(short), pixels(second)), "a film of one window is the film made at once"
    assert gap(pixels(short), pixels(first)[:5]) < 4, "up to the colours that a gif of other frames has"
    assert tubelet(*words, "--frames", 23, "--window", 23, "--out", second).code == 0
    assert gap(pixels(second), pixels(first)) > 4, "made at once it is another film"


def test_a_small_film_is_made_large(tubelet, tiny: Path, tmp_path: Path) -> None:
    small, large, plain = (tmp_path / f"{name}.mp4" for name in ("small", "large", "plain"))
    words = ("generate", WORDS, "--system", tiny)
    assert tubelet(*words, "--out", small).code == 0
    more = ("--size", "48x48", "--out")
    assert tubelet(*words, *more, large, "--refine-from", small, "--strength", 0.4).code == 0
    assert tubelet(*words, *more, plain).code == 0
    assert pixels(large).shape == (5, 48, 48, 3)
    assert gap(pixels(large), pixels(plain)) > 1


def test_a_film_of_any_shape_is_fitted_before_it_is_refined(tubelet, tiny: Path, folder: Path, tmp_path: Path) -> None:
    odd = np.random.RandomState(0).randint(0, 256, (5, 34, 58, 3)).astype(np.uint8)
    save(odd, tmp_path / "odd.mp4", 8.0)
    system, paths = load(tiny), {"odd": tmp_path / "odd.mp4", "tall": folder / "tall.mp4", "film": folder / "film.mp4"}
    for name, size, fitted in (
        ("odd", "48x96", (32, 64)),
        ("odd", "96x192", (32, 64)),
        ("tall", "96x48", (64, 32)),  # of this shape already
        ("film", "64x64", (32, 32)),
        ("film", "16x16", (16, 16)),
        ("film", "48x80", (48, 80)),
    ):
        assert Generate(size=size)._small(system, paths[name]).size == fitted
    made = []
    for fit in ("pad", "crop", "stretch"):
        more = ("--refine-from", paths["odd"], "--size", "48x48", "--fit", fit, "--strength", 0.2)
        said = tubelet("generate", WORDS, "--system", tiny, *more, "--out", tmp_path / "a.mp4")
        assert said.code == 0, said.err
        made.append(pixels(tmp_path / "a.mp4"))
    assert min(gap(made[0], made[1]), gap(made[1], made[2]), gap(made[0], made[2])) > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("extend", "words.mp4", WORDS), "words.mp4"),
        (("extend", "none.mp4", WORDS), "check the name"),
        (("extend", "film.mp4", " "), "words are needed"),
        (("extend", "film.mp4", WORDS, "--frames", "0"), "a shot lasts"),
        (("extend", "film.mp4", WORDS, "--keep", "0"), "--keep"),
        (("extend", "film.mp4", WORDS, "--frames", "100000000"), "too many for one film; lower --frames"),
        (("extend", "film.mp4", WORDS, "--frames", "100000000", "--keep", "1"), "too many for one film; lower --frames"),
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
        (("outpaint", "film.mp4", WORDS, "--size", "32x64", "--fit", "crop"), "--fit crop does not go with it"),
        (("outpaint", "tall.mp4", WORDS, "--size", "32x16"), "leaves nothing around"),
        (("storyboard", "film.mp4"), "film.mp4"),
        (("storyboard", "none.json"), "none.json"),
        (("storyboard", "board.json", "--frames", "5"), "leave out --frames"),
        (("generate", WORDS, "--loop", "--first", "first.png"), "neither beginning nor end"),
        (("generate", WORDS, "--loop", "--window", "5"), "--loop does not go with --window"),
        (("generate", WORDS, "--frames", "23", "--window", "0"), "--window must be at least 1, got 0"),
        (("generate", WORDS, "--frames", "3", "--window", "1"), "cannot look back on 1 and add another; widen it"),
        (("generate", WORDS, "--refine-from", "film.mp4", "--strength", "2"), "tubelet: strength must be above 0"),
        (("generate", WORDS, "--strength", "0.5"), "--strength is for --refine-from"),
        (("generate", WORDS, "--refine-from", "film.mp4", "--window", "5"), "leave out --first"),
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
        ([{"words": WORDS, "cut": "yes"}], "must be true or false"),
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
    assert "from a picture or film" in refused("generate", "--like", out, "--system", tiny, "--out", tmp_path / "b.mp4")
