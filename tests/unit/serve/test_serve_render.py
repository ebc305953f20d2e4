"""A job's request becomes the film that was asked for: its size, its length, its task; and its files, the same every time."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from render_rig import WORDS, ask
from torch import nn

from tubelet.core.errors import UserError
from tubelet.core.types import Strides, Video
from tubelet.generate.clip import read_settings
from tubelet.generate.engine import Cancelled
from tubelet.generate.system import Rolling, Shot, System, regenerate
from tubelet.media.decode import decode, decode_uint8
from tubelet.media.encode import save
from tubelet.serve import render as room
from tubelet.serve.records import StorageFull
from tubelet.serve.render import OutOfMemory, Rendered, grid, render, sheet
from tubelet.text.expand import Expansion

NEAR = 4.0
"""Levels of brightness by which noise that went through a file's compression differs, on average; other noise differs by 8."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures and clips by the names that requests give them."""
    folder = tmp_path_factory.mktemp("sources")
    rows, columns = np.mgrid[0:36, 0:64]
    still = np.stack([30 + 3 * columns, 220 - 5 * rows, np.full_like(rows, 90)], -1).clip(0, 255).astype(np.uint8)
    film = np.stack([np.roll(still, 2 * t, 1) for t in range(12)])
    save(film, folder / "wide.mp4", 8.0)
    save(film[:4, ::-1].copy(), folder / "short.mp4", 8.0)
    save(np.repeat(film, 2, 0), folder / "quick.mp4", 16.0)
    Image.fromarray(still).save(folder / "picture.png")
    Image.fromarray(still[::-1]).save(folder / "other.png")
    Image.fromarray(still[:, :20]).save(folder / "tall.png")
    (folder / "torn.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:-50])
    return {path.name: path for path in folder.iterdir()}


Make = Callable[..., Rendered]


@pytest.fixture
def make(system: System, sources: dict[str, Path]) -> Make:
    """`make(request)`: what is rendered for it."""

    def call(request: dict[str, Any], journal: Path | None = None, **more: Any) -> Rendered:
        more = {"on_step": lambda done, steps: None, "on_preview": lambda data: None, **more}
        return render(more.pop("system", system), request, sources, journal, **more)

    return call


def seen(system: System, path: Path, size: tuple[int, int], frames: int | None = None) -> Video:
    return decode(path, frames=frames, fps=system.config.fps, size=size, fit="stretch")


def gap(one: Any, other: Any) -> float:
    """Mean difference in brightness, in levels."""
    a, b = (np.asarray(pixels, float) @ [0.2126, 0.7152, 0.0722] for pixels in (one, other))
    assert a.shape == b.shape
    return float(np.abs(a - b).mean())


def files(rendered: Rendered, folder: Path) -> dict[str, Path]:
    return {made.role: made.path for made in rendered.write(folder)}


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ((720, 1280), (64, 112)),
        ((1280, 720), (112, 64)),
        ((1024, 1792), (64, 112)),
        ((1080, 1920), (64, 112)),
        ((64, 64), (64, 64)),
        ((1024, 1024), (64, 64)),
        ((100, 150), (64, 96)),
        ((100, 400), (64, 256)),
    ],
)
def test_the_grid_has_the_native_short_side_and_the_asked_shape(asked: tuple[int, int], made: tuple[int, int]) -> None:
    like: Any = SimpleNamespace(config=SimpleNamespace(size=(64, 64)), engine=SimpleNamespace(strides=Strides(1, 16, 16)))
    assert grid(asked, like) == made


def test_a_film_of_words_has_the_size_and_length_that_were_asked_for(make: Make, system: System, tmp_path: Path) -> None:
    rendered = make(ask(size=[90, 160], seconds=0.6))
    said = {"task": "create", "seed": 3, "fps": 8.0, "frames": 5, "size": [90, 160], "rendered": [32, 64], "text": WORDS}
    assert {name: rendered.result[name] for name in said} == said
    assert rendered.result["system"] == "tiny"
    assert rendered.result["seconds"] == 5 / 8
    assert rendered.result["digest"] == system.digest
    assert json.loads(json.dumps(rendered.result)) == rendered.result
    assert torch.equal(rendered.clips[0].video.pixels, system.generate(WORDS, (32, 64), 5, seed=3).video.pixels)
    made = files(rendered, tmp_path)
    assert set(made) == {"video", "thumbnail", "spritesheet"}
    frames, fps = decode_uint8(made["video"])
    assert frames.shape == (5, 90, 160, 3)
    assert fps == 8
    small = rendered.clips[0].video.to_uint8()[0]
    large = np.stack([np.asarray(Image.fromarray(f).resize((160, 90), Image.Resampling.LANCZOS)) for f in small])
    assert gap(frames, large) < NEAR
    settings = read_settings(made["video"])
    assert settings == rendered.result["settings"]
    assert torch.equal(regenerate(settings, system).video.pixels, rendered.clips[0].video.pixels), (
        "the file says how to make it"
    )
    with Image.open(made["thumbnail"]) as picture:
        assert (picture.format, picture.size) == ("WEBP", (160, 90))
        assert gap(picture.convert("RGB"), frames[2]) < NEAR, "from the middle"


def test_the_native_size_and_length_are_the_default(make: Make) -> None:
    rendered = make(ask())
    assert rendered.result["frames"] == 5
    assert rendered.result["size"] == rendered.result["rendered"] == [32, 32]


def test_the_spritesheet_lies_as_the_result_says(make: Make, tmp_path: Path) -> None:
    rendered = make(ask(size=[90, 160], frames=19))
    cell = rendered.result["spritesheet"]
    assert cell == {"columns": 16, "rows": 1, "height": 90, "width": 160, "frames": cell["frames"]}
    assert len(cell["frames"]) == 16
    assert (cell["frames"][0], cell["frames"][-1]) == (0, 18)
    made = files(rendered, tmp_path)
    film = decode_uint8(made["video"])[0]
    row = np.asarray(Image.open(made["spritesheet"]))
    assert row.shape == (90, 16 * 160, 3)
    for place, frame in enumerate(cell["frames"]):
        assert gap(row[:, place * 160 : (place + 1) * 160], film[frame]) < NEAR
    assert sheet(3, (1920, 1080)) == {"columns": 3, "rows": 1, "height": 160, "width": 90, "frames": [0, 1, 2]}


def test_a_long_film_is_made_in_windows(make: Make, system: System) -> None:
    rendered = make(ask(seconds=2))
    assert rendered.result["frames"] == 16
    assert rendered.result["settings"]["task"] == "film"
    assert torch.equal(rendered.clips[0].video.pixels, system.film([Shot(WORDS, 16)], seed=3).video.pixels)


def test_pictures_stand_first_and_last(make: Make, system: System, sources: dict[str, Path]) -> None:
    shape = (32, 64)
    named = {"picture": seen(system, sources["picture.png"], shape, 1), "other": seen(system, sources["other.png"], shape, 1)}
    for inputs, where in (
        ({"reference": "picture.png"}, {0: "picture"}),
        ({"last": "other.png"}, {-1: "other"}),
        ({"reference": "picture.png", "last": "other.png"}, {0: "picture", -1: "other"}),
    ):
        clip = make(ask(size=[90, 160], inputs=inputs)).clips[0]
        shot = Shot(WORDS, 5, {place: named[name] for place, name in where.items()})
        assert torch.equal(clip.video.pixels, system.film([shot], shape, seed=3).video.pixels)
        for place, name in where.items():
            assert torch.equal(clip.video.pixels[:, :, place], named[name].pixels[:, :, 0])


def test_a_picture_of_another_shape_is_shown_whole(make: Make) -> None:
    first = make(ask(size=[90, 160], inputs={"reference": "tall.png"})).clips[0].video.pixels[0, :, 0]  # (3, 32, 64)
    width = round(20 * 90 / 36 * 64 / 160)
    left = (64 - width) // 2
    assert bool((first[:, :, :left] == -1).all())
    assert bool((first[:, :, left + width :] == -1).all())
    assert bool((first[:, :, left : left + width].amax(0) > -0.9).all())


def test_a_clip_may_be_the_beginning(make: Make, tmp_path: Path, sources: dict[str, Path]) -> None:
    rendered = make(ask(size=[36, 64], seconds=1, inputs={"reference": "short.mp4"}))
    assert rendered.result["frames"] == 8, "the film is as long as was asked for, the clip included"
    film = decode_uint8(files(rendered, tmp_path)["video"])[0]
    assert gap(film[:4], decode_uint8(sources["short.mp4"])[0]) < NEAR
    with pytest.raises(UserError, match="already lasts"):
        make(ask(size=[36, 64], seconds=0.5, inputs={"reference": "short.mp4"}))


def test_an_extension_is_the_whole_with_the_clip_as_it_was(
    make: Make, system: System, sources: dict[str, Path], tmp_path: Path
) -> None:
    rendered = make(ask("extend", {"video": "wide.mp4"}, seconds=0.5))
    assert rendered.result["frames"] == 12 + 4
    assert rendered.result["size"] == [36, 64], "as the clip"
    film = decode_uint8(files(rendered, tmp_path)["video"])[0]
    assert film.shape == (16, 36, 64, 3)
    assert gap(film[:12], decode_uint8(sources["wide.mp4"])[0]) < NEAR
    # All of the clip, though longer than a window, makes the same frames: what is further away is never seen.
    whole = system.film([Shot(WORDS, 4)], (32, 64), seed=3, past=seen(system, sources["wide.mp4"], (32, 64)))
    fresh = rendered.clips[0].video.pixels[:, :, rendered.fresh]
    assert torch.equal(fresh, whole.video.pixels[:, :, 12:])
    short = make(ask("extend", {"video": "wide.mp4"}, frames=1))
    whole_short = system.film([Shot(WORDS, 1)], (32, 64), seed=3, past=seen(system, sources["wide.mp4"], (32, 64)))
    assert torch.equal(short.clips[0].video.pixels[:, :, short.fresh], whole_short.video.pixels[:, :, 12:])
    large = np.asarray(Image.fromarray(whole.video.to_uint8()[0, 13]).resize((64, 36), Image.Resampling.LANCZOS))
    assert gap(film[13], large) < NEAR


def test_a_clip_of_another_rate_is_read_at_the_systems(make: Make) -> None:
    assert make(ask("extend", {"video": "quick.mp4"}, frames=3)).result["frames"] == 12 + 3


def test_a_clip_of_another_shape_goes_on_in_the_middle(make: Make, tmp_path: Path) -> None:
    rendered = make(ask("extend", {"video": "short.mp4"}, size=[64, 64], frames=2))
    film = decode_uint8(files(rendered, tmp_path)["video"])[0].astype(int)
    assert film[0, :12].max() < 12, "black above"
    assert film[0, -12:].max() < 12, "and below"
    assert film[0, 16:48].max(2).min() > 60, "all of it between"
    assert bool((rendered.clips[0].video.pixels[0, :, 0, :6] == -1).all()), "and so the system saw it"


def test_an_extension_lasts_as_long_as_a_native_film_by_itself_and_may_end_with_a_picture(make: Make) -> None:
    rendered = make(ask("extend", {"video": "short.mp4", "last": "other.png"}))
    assert rendered.result["frames"] == 4 + 5
    assert rendered.clips[0].settings["shots"] == [[WORDS, WORDS, 5]]


def test_an_extension_may_lead_back_to_the_beginning(make: Make, system: System, sources: dict[str, Path]) -> None:
    rendered = make(ask("extend", {"video": "short.mp4"}, frames=3, loop=True))
    assert rendered.result["frames"] == 4 + 3
    clip = seen(system, sources["short.mp4"], (32, 64))
    between = system.film([Shot(WORDS, 3)], (32, 64), seed=3, past=clip, future=clip)
    assert torch.equal(rendered.clips[0].video.pixels[:, :, rendered.fresh], between.video.pixels[:, :, 4:7])


def test_two_clips_are_connected(make: Make, system: System, sources: dict[str, Path], tmp_path: Path) -> None:
    rendered = make(ask("extend", {"video": "wide.mp4", "second": "short.mp4"}, frames=3))
    assert rendered.result["frames"] == 12 + 3 + 4
    film = decode_uint8(files(rendered, tmp_path)["video"])[0]
    assert gap(film[:12], decode_uint8(sources["wide.mp4"])[0]) < NEAR
    assert gap(film[15:], decode_uint8(sources["short.mp4"])[0]) < NEAR
    ends = {name: seen(system, sources[path], (32, 64)) for name, path in (("past", "wide.mp4"), ("future", "short.mp4"))}
    whole = system.film([Shot(WORDS, 3)], (32, 64), seed=3, rolling=Rolling(), **ends)
    assert torch.equal(rendered.clips[0].video.pixels[:, :, rendered.fresh], whole.video.pixels[:, :, 12:15])


@pytest.mark.parametrize("task", ["edit", "remix"])
def test_a_clip_is_made_again_by_words(task: str, make: Make, system: System, sources: dict[str, Path]) -> None:
    film = seen(system, sources["wide.mp4"], (32, 64))
    rendered = make(ask(task, {"video": "wide.mp4"}, strength=0.4))
    assert rendered.result["frames"] == 12
    assert torch.equal(rendered.clips[0].video.pixels, system.edit(film, WORDS, 0.4, seed=3).video.pixels)
    assert make(ask(task, {"video": "wide.mp4"})).clips[0].settings["strength"] == 0.6
    assert make(ask(task, {"video": "wide.mp4"}, seconds=0.5)).result["frames"] == 4
    assert make(ask(task, {"video": "wide.mp4"}, seconds=9)).result["frames"] == 12, "no longer than the clip"


def test_two_clips_are_blended(make: Make, system: System, sources: dict[str, Path]) -> None:
    rendered = make(ask("edit", {"video": "wide.mp4", "second": "short.mp4"}, strength=0.5))
    first, second = (seen(system, sources[name], (32, 64), 4) for name in ("wide.mp4", "short.mp4"))
    assert torch.equal(rendered.clips[0].video.pixels, system.edit(first, WORDS, 0.5, seed=3, into=second).video.pixels)
    named = make(ask("create", {"video": "wide.mp4", "second": "short.mp4"}, strength=0.5, mode="blend"))
    assert torch.equal(named.clips[0].video.pixels, rendered.clips[0].video.pixels)


def test_a_loop_has_no_end(make: Make, system: System) -> None:
    rendered = make(ask(loop=True, seconds=1))
    assert torch.equal(rendered.clips[0].video.pixels, system.generate(WORDS, None, 8, seed=3, loop=True).video.pixels)
    for more in ({"inputs": {"reference": "picture.png"}}, {"shots": [{"prompt": WORDS}]}):
        with pytest.raises(UserError, match="neither beginning nor end"):
            make(ask(loop=True, **more))


def test_a_storyboard_has_its_shots(make: Make, system: System, sources: dict[str, Path]) -> None:
    shots = [{"prompt": WORDS, "seconds": 0.5}, {"prompt": "a blue box", "frames": 3}, {"prompt": WORDS, "cut": True}]
    rendered = make(ask(prompt="", shots=shots, inputs={"reference": "picture.png"}))
    assert rendered.result["frames"] == 4 + 3 + 5
    assert [shot[0] for shot in rendered.result["settings"]["shots"]] == [WORDS, "a blue box", WORDS]
    first = {0: room.Canvas((32, 32), (32, 32)).video(sources["picture.png"], 8.0, first=1)[0]}
    board = [Shot(WORDS, 4, first), Shot("a blue box", 3), Shot(WORDS, 5, cut=True)]
    assert torch.equal(rendered.clips[0].video.pixels, system.film(board, seed=3).video.pixels)


@pytest.mark.parametrize(("format", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_pictures_of_every_format(format: str, kind: str, make: Make, system: System, tmp_path: Path) -> None:
    rendered = make(ask("image", size=[48, 48], n=3, format=format))
    made = rendered.write(tmp_path)
    assert [file.role for file in made] == ["image"] * 3
    assert len({file.path.read_bytes() for file in made}) == 3
    for number, file in enumerate(made):
        with Image.open(file.path) as picture:
            assert (picture.format, picture.size, file.media) == (kind, (48, 48), f"image/{format}")
            assert gap(picture.convert("RGB"), alone(system, 3 + number, (48, 48))) < NEAR
        assert read_settings(file.path)["seed"] == 3 + number


def alone(system: System, seed: int, size: tuple[int, int]) -> np.ndarray:
    """A picture of that seed at that size."""
    frame = system.generate(WORDS, frames=1, seed=seed).video.to_uint8()[0, 0]
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def test_pictures_are_made_from_a_picture(make: Make, system: System, sources: dict[str, Path]) -> None:
    steps: list[tuple[int, int]] = []
    request = ask("image", {"reference": "picture.png"}, n=2, strength=0.3, size=[90, 160])
    rendered = make(request, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    film = seen(system, sources["picture.png"], (32, 64), 1)
    for number, clip in enumerate(rendered.clips):
        assert torch.equal(clip.video.pixels, system.edit(film, WORDS, 0.3, seed=3 + number).video.pixels)


def test_a_picture_is_made_anew_where_its_mask_is_black(
    make: Make, system: System, sources: dict[str, Path], tmp_path: Path
) -> None:
    Image.fromarray(np.where(np.arange(64) < 30, 0, 255).astype(np.uint8)[None].repeat(36, 0)).convert("RGB").save(
        tmp_path / "mask.png"
    )
    sources = {**sources, "mask.png": tmp_path / "mask.png"}
    request = ask("image", {"reference": "picture.png", "mask": "mask.png"}, size=[36, 64], n=2)
    rendered = render(system, request, sources, None, lambda *_: None, lambda _: None)
    film = seen(system, sources["picture.png"], (32, 64), 1)
    stays = seen(system, sources["mask.png"], (32, 64), 1).pixels[0].amin(0)
    for number, clip in enumerate(rendered.clips):
        assert torch.equal(clip.video.pixels, system.inpaint(film, (stays < 0.98).float(), WORDS, seed=3 + number).video.pixels)
    one, two = (np.asarray(Image.open(made.path)) for made in rendered.write(tmp_path / "out"))
    known = np.asarray(Image.open(sources["picture.png"]))
    assert (one[:, 30:] == known[:, 30:]).all(), "what stays is the picture itself, at its own resolution"
    assert gap(one[:, :30], known[:, :30]) > NEAR
    assert gap(one[:, :30], two[:, :30]) > 0


def test_around_a_masked_picture_of_another_shape_all_is_made(
    make: Make, system: System, sources: dict[str, Path], tmp_path: Path
) -> None:
    stays = Image.new("RGB", (20, 36), "white")
    stays.paste("black", (0, 0, 2, 2))
    stays.save(tmp_path / "mask.png")
    sources = {**sources, "mask.png": tmp_path / "mask.png"}
    request = ask("image", {"reference": "tall.png", "mask": "mask.png"}, size=[36, 64], format="png")
    rendered = render(system, request, sources, None, lambda *_: None, lambda _: None)
    (made,) = rendered.write(tmp_path / "out")
    shown, known = np.asarray(Image.open(made.path)), np.asarray(Image.open(sources["tall.png"]))
    assert (shown[2:, 22:42] == known[2:]).all()
    assert (shown[:, :20] > 0).any(), "no black beside it"
    assert (shown[:, 44:] > 0).any(), "no black beside it"


def test_a_variation_reads_no_words(make: Make, system: System, sources: dict[str, Path]) -> None:
    request = ask("image", {"reference": "picture.png"}, prompt="", size=[36, 64], strength=0.5)
    (one,) = make(request).clips
    film = seen(system, sources["picture.png"], (32, 64), 1)
    worded = system.edit(film, one.settings["prompt"], 0.5, seed=3)
    assert not torch.equal(one.video.pixels, worded.video.pixels)
    (other,) = make({**request, "guidance": 9.0}).clips
    assert torch.equal(one.video.pixels, other.video.pixels), "there is nothing to guide to"


def test_what_the_model_read_is_in_the_result_and_stays_when_a_job_goes_on(make: Make, tmp_path: Path) -> None:
    class Fickle:
        """An expander that never says the same twice."""

        said = 0

        def expand(self, prompt: str) -> Expansion:
            self.said += 1
            return Expansion(prompt, f"{prompt}, take {self.said}", "fickle")

    fickle = Fickle()
    assert make(ask(), expander=fickle).result["text"] == WORDS, "not asked for"
    whole = make(ask(expand=True), tmp_path / "job", expander=fickle)
    assert whole.result["text"] == f"{WORDS}, take 1"
    again = make(ask(expand=True), tmp_path / "job", expander=fickle)
    assert again.result["text"] == f"{WORDS}, take 1"
    assert make(ask(expand=True), tmp_path / "other", expander=fickle).result["text"] == f"{WORDS}, take 2"

    shown = ask(expand=True, text="A red ball, and a wall.")
    told = make(shown, tmp_path / "shown", expander=fickle)
    assert told.result["text"] == "A red ball, and a wall.", "what was shown wins over what would be said now"
    assert (told.clips[0].settings["prompt"], fickle.said) == (WORDS, 2)
    assert make(shown).result["text"] == "A red ball, and a wall.", "whatever this worker can expand"

    class Down:
        def expand(self, prompt: str) -> Expansion:
            raise UserError("http://10.0.0.7/secret answered 500; check the address")

    with pytest.raises(UserError, match="could not be expanded") as caught:
        make(ask(expand=True), expander=Down())
    assert "10.0.0.7" not in str(caught.value)


def test_an_interrupted_job_goes_on_to_the_same_bytes(make: Make, tmp_path: Path) -> None:
    request = ask("extend", {"video": "wide.mp4"}, frames=9, size=[72, 128])
    whole = {role: path.read_bytes() for role, path in files(make(request), tmp_path / "whole").items()}
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if done == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        make(request, tmp_path / "job", on_step=stop)
    assert calls == [1, 2, 3]
    assert len(list((tmp_path / "job" / "answers").iterdir())) == 3
    rendered = make(request, tmp_path / "job")
    for name in ("first", "again"):
        assert {role: path.read_bytes() for role, path in files(rendered, tmp_path / name).items()} == whole
    make({**request, "seed": 4}, tmp_path / "job")


def test_previews_show_some_frames_in_a_row(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PREVIEW_PAUSE", 0.0)
    monkeypatch.setattr(room, "PREVIEW_SHARE", float("inf"))
    shown: list[bytes] = []
    rendered = make(ask(seconds=2, steps=3), on_preview=shown.append)
    assert len(shown) == 3 * 4, "one a step of each window"
    path = np.asarray(Image.open(room.io.BytesIO(shown[2])))
    assert path.shape == (32, 5 * 32, 3)
    film = rendered.clips[0].video.to_uint8()[0]
    first, second = (np.concatenate(list(film[begin : begin + 5]), 1) for begin in (0, 5))
    assert gap(path, first) < 0.6 * gap(path, second), "the last look at the first window is its film"


def test_previews_are_seldom(make: Make) -> None:
    shown: list[bytes] = []
    make(ask(), on_preview=shown.append)
    assert shown == [], "a job that is done in less than a second shows none"


class Hungry(nn.Module):
    """A denoiser that has memory for so many latent frames of so many films."""

    def __init__(self, network: nn.Module, frames: int, error: Exception) -> None:
        super().__init__()
        self.network, self.config, self.frames, self.error = network, network.config, frames, error

    def forward(self, z: torch.Tensor, *question: Any, **more: Any) -> torch.Tensor:
        if z.shape[0] * z.shape[2] > self.frames:
            raise self.error
        return self.network(z, *question, **more)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA")]
)
def test_too_little_memory_is_told_apart_and_the_lean_way_needs_less(
    error: Exception, make: Make, system: System, tmp_path: Path
) -> None:
    def poor(frames: int) -> System:
        return replace(system, engine=replace(system.engine, denoiser=Hungry(system.denoiser, frames, error)))

    for request, needed in ((ask(seconds=2), 3), (ask("image", n=4), 1)):
        guided = 2 * needed
        with pytest.raises(OutOfMemory):
            make(request, system=poor(guided))
        assert make(request, system=poor(guided), lean=True).result["settings"]["seed"] == 3
        with pytest.raises(OutOfMemory):
            make(request, system=poor(guided - 1), lean=True)
    with pytest.raises(RuntimeError, match="broken"):
        make(
            ask(),
            system=replace(system, engine=replace(system.engine, denoiser=Hungry(system.denoiser, 0, RuntimeError("broken")))),
        )


def test_wrong_wishes_are_one_sentence(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Sequence[tuple[dict[str, Any], str]] = (
        (ask(prompt=" "), "prompt is empty"),
        (ask(task="dance"), "no task"),
        (ask("extend"), "needs a clip"),
        (ask("edit"), "needs a clip"),
        (ask(size=[100, 500]), "too long a shape"),
        (ask(steps=0), "steps"),
        (ask(guidance=1e9), "guidance"),
        (ask("edit", {"video": "wide.mp4"}, strength=2), "strength"),
        (ask(inputs={"reference": "picture.png", "last": "other.png"}, frames=1), "cannot begin and end"),
        (ask(shots=[{"prompt": WORDS}, {"prompt": ""}]), "prompt is empty"),
        (ask("image", format="bmp"), "no format"),
        (ask(seconds=2000, size=[1080, 1920]), "too large for one film"),
        (ask("extend", {"video": "missing.mp4"}), "cannot be read"),
    )
    for request, says in wrong:
        with pytest.raises(UserError, match=says) as caught:
            make(request)
        assert "\n" not in str(caught.value)


def test_a_torn_input_is_refused_without_its_place(make: Make, tmp_path: Path) -> None:
    for task, role in (("extend", "video"), ("edit", "video"), ("create", "reference")):
        with pytest.raises(UserError, match="cannot be read any more") as caught:
            make(ask(task, {role: "torn.mp4"}))
        assert "/" not in str(caught.value)


def test_characters_are_said_to_be_unused(make: Make) -> None:
    assert make(ask(characters=[{"id": "char_1", "name": "Mossy"}])).result["unused"] == ["characters"]
    assert "unused" not in make(ask()).result


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_apart_and_writing_works_later(
    code: int, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = make(ask())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, "no room")

    monkeypatch.setattr(room.encode, "save", full)
    with pytest.raises(StorageFull):
        rendered.write(tmp_path / "one")
    monkeypatch.undo()
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StorageFull):
        rendered.write(tmp_path / "one")
    monkeypatch.undo()
    again = files(make(ask()), tmp_path / "two")
    assert {n: p.read_bytes() for n, p in files(rendered, tmp_path / "one").items()} == {
        n: p.read_bytes() for n, p in again.items()
    }


def test_every_frame_is_marked_and_writing_can_be_stopped(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered, counts = make(ask(seconds=1)), []
    monkeypatch.setattr(room, "MARKED_BYTES", 3 * 32 * 32 * 3 + 1)

    def negative(frames: np.ndarray) -> np.ndarray:
        counts.append(len(frames))
        return 255 - frames

    made = {file.role: file.path for file in rendered.write(tmp_path / "marked", negative)}
    assert counts == [3, 3, 2], "not all at once: that may be too much"
    plain = files(rendered, tmp_path / "plain")
    assert gap(decode_uint8(made["video"])[0], 255 - decode_uint8(plain["video"])[0]) < NEAR
    picture = make(ask("image", n=1)).write(tmp_path, lambda frames: 255 - frames)[0].path
    assert np.array_equal(np.asarray(Image.open(picture)), 255 - make(ask("image")).clips[0].video.to_uint8()[0, 0])

    def stop() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        rendered.write(tmp_path / "stopped", step=stop)
