"""`tubelet edit`: a real film of any shape in, a film made again by words out; and loops."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tubelet.generate.clip import read_settings
from tubelet.media.decode import decode_uint8
from tubelet.media.encode import save

WORDS = "a blue ball bounces"


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 frames at 16 a second, wide, of even sides that no codec divides."""
    frames = np.random.RandomState(0).randint(0, 256, (12, 34, 58, 3)).astype(np.uint8)
    return save(frames, tmp_path_factory.mktemp("films") / "wide.mp4", 16.0)


def test_film_and_words_in_film_out(tubelet, tiny: Path, film: Path, tmp_path: Path) -> None:
    out = tmp_path / "edit.gif"
    said = tubelet("edit", film, WORDS, "--system", tiny, "--strength", 0.3, "--frames", 3, "--out", out, "--json")
    assert said.code == 0, said.err
    settings = json.loads(said.out)["settings"]
    assert {"task": "edit", "strength": 0.3, "size": [32, 32], "frames": 3, "prompt": WORDS}.items() <= settings.items()
    assert read_settings(out) == settings
    assert decode_uint8(out)[0].shape == (3, 32, 32, 3)


def test_the_same_again_is_the_same_and_strength_seed_and_words_matter(tubelet, tiny: Path, film: Path, tmp_path: Path) -> None:
    def made(*more: object, words: str = WORDS) -> bytes:
        assert tubelet("edit", film, words, "--system", tiny, "--frames", 3, "--out", tmp_path / "a.gif", *more).code == 0
        return decode_uint8(tmp_path / "a.gif")[0].tobytes()

    base = made()
    assert base == made()
    for other in (made("--strength", 0.9), made("--seed", 1), made("--fit", "crop"), made("--into", film, "--strength", 0.9)):
        assert other != base


def test_a_picture_is_a_film_of_one_frame(tubelet, tiny: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40, 4), 200, np.uint8), "RGBA").save(tmp_path / "a.png")
    said = tubelet("edit", tmp_path / "a.png", WORDS, "--system", tiny, "--frames", 1, "--out", tmp_path / "b.png")
    assert said.code == 0, said.err


def test_a_film_shorter_than_the_systems_is_edited_as_it_is(tubelet, tiny: Path, film: Path, tmp_path: Path) -> None:
    short = save(decode_uint8(film)[0][:6], tmp_path / "short.mp4", 16.0)  # 3 frames of the system's rate
    for verb in (("edit", short, WORDS), ("inpaint", short, WORDS, "--box", "0,0,16,16")):
        said = tubelet(*verb, "--system", tiny, "--out", tmp_path / "a.gif", "--json")
        assert said.code == 0, said.err
        assert json.loads(said.out)["settings"]["frames"] == 3


def test_an_edit_is_not_made_again_from_its_own_file(refused, tubelet, tiny: Path, film: Path, tmp_path: Path) -> None:
    out = tmp_path / "edit.mp4"
    assert tubelet("edit", film, WORDS, "--system", tiny, "--frames", 3, "--out", out).code == 0
    assert "from a picture or film (edit)" in refused("generate", "--like", out, "--system", tiny, "--out", tmp_path / "b.mp4")


def test_loops_are_made_again_from_their_files(tubelet, tiny: Path, tmp_path: Path) -> None:
    first, second, plain = (tmp_path / f"{name}.gif" for name in ("first", "second", "plain"))
    assert tubelet("generate", WORDS, "--system", tiny, "--loop", "--out", first).code == 0
    assert read_settings(first)["loop"] is True
    assert tubelet("generate", "--like", first, "--system", tiny, "--out", second).code == 0
    assert first.read_bytes() == second.read_bytes()
    assert tubelet("generate", WORDS, "--system", tiny, "--out", plain).code == 0
    assert decode_uint8(plain)[0].tobytes() != decode_uint8(first)[0].tobytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--strength", "0"), "strength"),
        (("--strength", "5"), "tubelet: strength must be above 0 and at most 1, got 5.0"),
        (("--fit", "squeeze"), "no fit 'squeeze'"),
        (("--frames", "40"), "holds only"),
        (("--frames", "0"), "frames"),
        (("--size", "33x32"), "height must be a positive multiple of 16"),
        (("--into", "missing.mp4"), "missing.mp4"),
        (("--out", "edit.txt"), "must end in"),
    ],
)
def test_wrong_wishes_are_one_sentence(
    refused, tiny: Path, film: Path, tmp_path: Path, more: tuple[str, str], said: str
) -> None:
    out = () if more[0] == "--out" else ("--out", tmp_path / "a.mp4")
    assert said in refused("edit", film, WORDS, "--system", tiny, *out, *more)
    assert not list(tmp_path.iterdir())


def test_what_is_no_film_is_refused(refused, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "words.mp4").write_text("not a film")
    refused("edit", tmp_path / "words.mp4", WORDS, "--system", tiny, "--out", tmp_path / "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    for words in (("edit", tmp_path / "pipe.mp4", WORDS, "--system", tiny), ("generate", "--like", tmp_path / "pipe.mp4")):
        assert "pipe.mp4 is no regular file" in refused(*words, "--out", tmp_path / "a.mp4")
    refused("edit", tmp_path / "missing.mp4", WORDS, "--system", tiny, "--out", tmp_path / "a.mp4")
    assert "words are needed" in refused("edit", tmp_path / "words.mp4", " ", "--system", tiny, "--out", tmp_path / "a.mp4")
