"""The shipped system: whole, small enough, and its films show their sentences."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import tubelet
from tubelet.core.errors import UserError
from tubelet.evaluate.caption import follow
from tubelet.evaluate.fidelity import psnr
from tubelet.evaluate.reading import Reading, bounces
from tubelet.evaluate.report import make_cases, through_codec
from tubelet.evaluate.tasks import evaluate_tasks
from tubelet.evaluate.tracker import track
from tubelet.generate.clip import read_settings
from tubelet.generate.folder import PIECE, SHIPPED, read_config, shipped
from tubelet.generate.system import System, regenerate
from tubelet.worlds.grammar import parse


@pytest.fixture(scope="module")
def system() -> System:
    return tubelet.load("worlds-64")


def test_the_weights_are_small_enough_to_ship() -> None:
    assert shipped() == ["worlds-64"]
    sizes = [path.stat().st_size for path in (SHIPPED / "worlds-64").iterdir()]
    assert sum(sizes) <= 30e6
    assert max(sizes) <= PIECE


def test_the_film_of_make_demo_shows_its_sentence() -> None:
    (prompt,) = re.findall(r"^PROMPT \?= (.+)$", (Path(__file__).parents[2] / "Makefile").read_text(), re.MULTILINE)
    wanted = parse(prompt)
    clip = tubelet.load("worlds-64").generate(prompt, seed=0)
    reading = Reading(clip.video.to_uint8()[0], clip.video.fps)
    shown = follow(reading, reading.fps, wanted)
    assert set(shown) == {"colour", "shape", "size", "event"}
    assert all(shown.values()), shown
    (ball,) = reading.objects(wanted["objects"])
    assert ball is not None
    assert len(bounces(ball.y, 0.012)) == wanted["count"]


@pytest.mark.parametrize("size", [(64, 64), (64, 112)])
def test_the_sentence_decides_which_colour_fills_the_film(system: System, size: tuple[int, int]) -> None:
    """The most plentiful saturated colour is the named one; by the neighbours' sentences it is not."""
    cases = make_cases(("slide", "fall", "bounce", "parabola"), 12, size=size)
    named = [case.wanted["objects"][0]["color"] for case in cases]
    films = system.generate_batch([case.text for case in cases], [0] * len(cases), size=size)
    found = []
    for film in films:
        areas = {colour: float(np.nansum(seen.area)) for colour, seen in track(film.video.to_uint8()[0]).items()}
        found.append(max(areas, key=lambda colour: areas[colour]))
    assert np.mean([f == n for f, n in zip(found, named, strict=True)]) >= 0.75
    assert np.mean([f == named[i - 1] for i, f in enumerate(found)]) <= 0.4


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 96), (112, 64), (128, 128)])
def test_the_codec_renders_every_size(system: System, size: tuple[int, int]) -> None:
    """Also where the floor begins at another row of a latent cell, and at two sizes that no training had."""
    cases = make_cases(("slide", "fall", "collision", "occlude"), 4, size=size, frames=5, fps=2.0)
    made = through_codec(system.codec, [case.truth for case in cases], 2.0)
    assert np.mean([psnr(case.truth, clip) for case, clip in zip(cases, made, strict=True)]) >= 41


def test_one_set_of_weights_serves_the_tasks(system: System) -> None:
    """Two episodes of each: beside what the simulated truth, doing nothing and a wrong film score."""
    names = (
        "text_to_image",
        "image_to_video",
        "first_and_last",
        "extend",
        "extend_backward",
        "connect",
        "inpaint",
        "storyboard",
    )
    figures = evaluate_tasks(system, 2, names=names, progress=False)
    for name in names:
        own, floor, chance = (figures[f"task/{name}/caption{beside}"] for beside in ("", "/floor", "/chance"))
        assert own >= 0.8, name
        assert floor >= 0.9, name
        assert own > chance or chance > 0.9, name
    for name in ("image_to_video", "first_and_last", "extend", "extend_backward", "connect", "inpaint"):
        assert figures[f"task/{name}/kept"] == 100, name
    for name in ("image_to_video", "first_and_last", "extend", "extend_backward", "connect"):
        seam, floor, control = (figures[f"task/{name}/seam{beside}"] for beside in ("", "/floor", "/control"))
        assert seam < (floor + control) / 2, name
    for name in ("first_and_last", "extend", "extend_backward", "connect"):
        assert figures[f"task/{name}/found"] >= 0.9, name
        still, straight = (figures[f"task/{name}/velocity/{guess}"] for guess in ("copy", "constant"))
        assert figures[f"task/{name}/velocity"] < max(0.1, 0.6 * max(still, straight)), name


def test_it_serves_the_other_tasks_too(system: System) -> None:
    """One episode of each, beside its controls."""
    names = ("loop", "outpaint", "edit", "blend", "refine", "long")
    found = evaluate_tasks(system, 1, names=names, progress=False)
    figures = {name.removeprefix("task/"): value for name, value in found.items()}
    for name in ("outpaint", "refine"):
        assert figures[f"{name}/caption"] >= 0.8, name
    assert figures["outpaint/kept"] == 100
    assert figures["loop/closing"] < 0.5 * figures["loop/closing/control"]
    assert figures["edit/structure/0.3"] >= 0.8 > figures["edit/structure/1.0"]
    assert figures["edit/caption/0.0"] < 0.7 < figures["edit/caption/1.0"]
    assert figures["blend/first/0.5"] > 0.4
    assert figures["blend/last/0.5"] > 0.8
    assert figures["blend/one/0.5"] > figures["blend/one/fade"]
    assert figures["refine/structure"] > 0.5
    for window in range(10):
        assert figures[f"long/one_of_each/{window}"] >= 0.5


def test_a_film_is_made_again_from_its_own_file(system: System, tmp_path: Path) -> None:
    clip = system.generate("A medium green ball slides steadily to the left along the floor.", seed=5, steps=4)
    clip.save(tmp_path / "first.mp4")
    regenerate(read_settings(tmp_path / "first.mp4")).save(tmp_path / "second.mp4")
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "second.mp4").read_bytes()


@pytest.mark.parametrize("file", sorted(read_config(SHIPPED / "worlds-64").files))
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_weights_are_named(tmp_path: Path, file: str, damage: str) -> None:
    folder = tmp_path / "worlds-64"
    shutil.copytree(SHIPPED / "worlds-64", folder)
    data = bytearray((folder / file).read_bytes())
    if damage == "remove":
        (folder / file).unlink()
    else:
        data[len(data) // 2] ^= 1
        (folder / file).write_bytes(data[: len(data) // 3] if damage == "truncate" else data)
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        tubelet.load(str(folder))
