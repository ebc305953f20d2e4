"""A job's request as a film: seconds and pixels become tasks of the system, and what it makes becomes files.

A film is made at the system's own scale, on the grid nearest to the shape that was asked for, and brought to the asked size
when it is written. Clips that it goes on from stand in the result at their own resolution; the network sees them on its grid.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tubelet import __version__
from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json
from tubelet.core.types import Condition, Video
from tubelet.generate.clip import Clip, metadata_of
from tubelet.generate.engine import GREATEST_SEED, Progress
from tubelet.generate.journal import recorded
from tubelet.generate.system import Rolling, Shot, System
from tubelet.media import encode
from tubelet.media.decode import probe, stream
from tubelet.serve.records import StorageFull
from tubelet.text.base import TextEncoder
from tubelet.text.expand import Expander, Expansion

Size = tuple[int, int]
"""Height and width in pixels."""
Inputs = Mapping[str, Path]
"""The files of a request's inputs, by asset id."""
Mark = Callable[[np.ndarray], np.ndarray]
"""Puts an invisible mark into uint8 frames `(T, H, W, 3)`."""
Look = Callable[[np.ndarray], None]
"""Is shown uint8 frames `(T, H, W, 3)`, and raises to keep them from everybody else."""

GREATEST_ASPECT = 4.0
GREATEST_BYTES = 2 << 30  # of one film's frames at the asked size, which the encoder is handed whole
MARKED_BYTES = 512 << 20  # of frames that are marked together: a mark needs a second copy of them
STRENGTH = 0.6
"""How much of a clip is made anew when an edit does not say."""
VARIATION = "a variation"
"""What stands for the words of a picture that was made from another one and no words."""
MOSTLY = 0.98
"""Value, from -1 to 1, from which on a pixel of a mask that was made smaller counts as white."""
SHEET_FRAMES, SHEET_SIDE = 16, 160
THUMBNAIL_SIDE = 640
PREVIEW_FRAMES = 8
PREVIEW_PAUSE, PREVIEW_SHARE = 1.0, 0.05
"""A preview is made at most once in so many seconds, and takes at most so much of the time."""
IMAGE_MEDIA = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}


class OutOfMemory(Exception):  # noqa: N818  the request may be fine on another machine
    """The film does not fit into this machine's memory."""


@dataclass(frozen=True)
class Made:
    """A file that a job made: its role among the job's outputs, its MIME type, and where it lies."""

    role: str
    media: str
    path: Path


@dataclass(frozen=True)
class Canvas:
    """The size that was asked for, and that of the grid the system works on. Both show the same picture."""

    asked: Size
    grid: Size

    def video(self, path: Path, fps: float, last: int | None = None, first: int | None = None) -> tuple[Video, int]:
        """A clip or picture as the system sees it, shown whole with black around it, and how many frames the whole of it has.

        `last`, `first`: only so many frames of its end or beginning.
        """
        with _reading():
            about = probe(path)
            scale = min(self.asked[0] / about.height, self.asked[1] / about.width)
            inner = tuple(
                min(cells, max(1, round(side * scale * cells / asked)))
                for side, asked, cells in zip((about.height, about.width), self.asked, self.grid, strict=True)
            )
            frames = stream(path, fps=fps, size=(inner[0], inner[1]), fit="stretch")
            kept: collections.deque[np.ndarray] = collections.deque(maxlen=last)
            count = 0
            with contextlib.closing(frames):
                for frame in frames:
                    count += 1
                    if first is None or count <= first:
                        kept.append(frame)
        video = Video.from_uint8(np.stack(kept), fps)
        top, left = ((cells - side) // 2 for cells, side in zip(self.grid, inner, strict=True))
        edges = (left, self.grid[1] - inner[1] - left, top, self.grid[0] - inner[0] - top)
        return replace(video, pixels=F.pad(video.pixels, edges, value=-1.0)), count  # (1, 3, T, *grid)

    def frames(self, path: Path, fps: float) -> Iterator[np.ndarray]:
        """A clip at the asked size, frame by frame."""
        with _reading(), contextlib.closing(stream(path, fps=fps, size=self.asked, fit="pad")) as frames:
            yield from frames


@dataclass(frozen=True)
class Rendered:
    """What was made: `clips` on the system's grid (several only for pictures), and `result`, what a job says of it.

    `fresh` are the first clip's frames that the file takes from it; `before` and `after` are clips that stand around them.
    `around` is a picture and its mask: where the mask is white, every picture that was made shows that one.
    """

    clips: tuple[Clip, ...]
    canvas: Canvas
    result: dict[str, Any]
    fresh: slice
    before: Path | None = None
    after: Path | None = None
    format: str = "mp4"
    around: tuple[Path, Path] | None = None

    def write(
        self, folder: Path, mark: Mark | None = None, step: Callable[[], None] = lambda: None, look: Look | None = None
    ) -> tuple[Made, ...]:
        """Write all files into `folder`; the same bytes every time. `step` is called between frames and may raise to stop.

        `look` is shown each picture, or all frames of the film, as they will be but for the mark, and may raise, too.
        Raises StorageFull when there is no room; the same call works once there is.
        """
        with _room():
            folder.mkdir(parents=True, exist_ok=True)
            if self.format != "mp4":
                return tuple(
                    self._picture(clip, folder / f"{number}.{self.format}", mark, look)
                    for number, clip in enumerate(self.clips)
                )
            film = self._film(step)
            if look is not None:
                look(film)
            if mark is not None:
                together = max(1, MARKED_BYTES // film[0].nbytes)
                for begin in range(0, len(film), together):
                    film[begin : begin + together] = mark(film[begin : begin + together])
                    step()
            fps, settings = self.result["fps"], self.clips[0].settings
            video = encode.save(film, folder / "video.mp4", fps, metadata_of(settings))
            step()
            thumbnail, sheet = folder / "thumbnail.webp", folder / "spritesheet.jpg"
            _within(film[len(film) // 2], THUMBNAIL_SIDE).save(thumbnail, "WEBP", quality=88)
            cell = self.result["spritesheet"]
            _row(film[cell["frames"]], (cell["height"], cell["width"])).save(sheet, "JPEG", quality=85)
            return (
                Made("video", "video/mp4", video),
                Made("thumbnail", "image/webp", thumbnail),
                Made("spritesheet", "image/jpeg", sheet),
            )

    def _film(self, step: Callable[[], None]) -> np.ndarray:
        """All frames at the asked size, uint8 `(T, H, W, 3)`."""
        film = np.empty((self.result["frames"], *self.canvas.asked, 3), np.uint8)
        fps = self.result["fps"]
        before = iter(()) if self.before is None else self.canvas.frames(self.before, fps)
        after = iter(()) if self.after is None else self.canvas.frames(self.after, fps)
        fresh = self.clips[0].video.to_uint8()[0][self.fresh]
        made = (_resized(frame, self.canvas.asked) for frame in fresh)
        for place, frame in zip(film, itertools.chain(before, made, after), strict=True):
            place[:] = frame
            step()
        return film

    def _picture(self, clip: Clip, path: Path, mark: Mark | None, look: Look | None) -> Made:
        picture = _resized(clip.video.to_uint8()[0, 0], self.canvas.asked)
        if self.around is not None:
            known, stays = (next(self.canvas.frames(file, clip.video.fps)) for file in self.around)
            picture = np.where(stays > 127, known, picture)  # (*asked, 3)
        if look is not None:
            look(picture[None])
        picture = picture if mark is None else mark(picture[None])[0]
        said = metadata_of(clip.settings)
        if self.format == "jpeg":
            comment = json.dumps(said, separators=(",", ":")).encode("ascii")
            Image.fromarray(picture).save(path, "JPEG", quality=95, comment=comment)
        else:
            encode.save(picture[None], path, clip.video.fps, said)
        return Made("image", IMAGE_MEDIA[self.format], path)


def render(
    system: System,
    request: Mapping[str, Any],
    inputs: Inputs,
    journal: Path | None,
    on_step: Progress,
    on_preview: Callable[[bytes], None],
    *,
    expander: Expander | None = None,
    lean: bool = False,
) -> Rendered:
    """Make what a job asks for.

    `journal`: a folder of this job's own, in which its answers are kept; with what is in there an interrupted job goes on.
    `on_step(done, in all)` is called after every step of the solver and may raise to stop; `on_preview` gets a JPEG with some
    frames of the film so far in a row. `lean`: a way that needs less memory, and more time.

    Raises UserError, one sentence for the one who asked, and OutOfMemory.
    """
    try:
        return _Job(system, request, inputs, journal, on_step, on_preview, expander, lean).made()
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemory("the film does not fit into this machine's memory; ask for less") from error
        raise


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a failed allocation is behind an error. On the CPU torch has no kind of its own for it."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and "allocate" in str(error):
            return True
        error = error.__cause__
    return False


def grid(size: Size, system: System) -> Size:
    """The size at which a film asked for at `size` is made: the native short side, the nearest sides that the system can make.

    Raises UserError for a shape that is too long.
    """
    short = min(system.config.size)
    long = max(size) / min(size) * short
    if long > GREATEST_ASPECT * short:
        raise UserError(
            f"{size[1]}x{size[0]} is too long a shape; its long side may be {GREATEST_ASPECT:g} times the short one"
        )
    strides = system.engine.strides
    wanted = (short, long) if size[0] <= size[1] else (long, short)
    height, width = (
        max(stride, round(side / stride) * stride) for side, stride in zip(wanted, (strides.h, strides.w), strict=True)
    )
    return height, width


@dataclass(frozen=True)
class _Job:
    """One request on its way to films."""

    system: System
    request: Mapping[str, Any]
    inputs: Inputs
    journal: Path | None
    on_step: Progress
    on_preview: Callable[[bytes], None]
    expander: Expander | None
    lean: bool

    def made(self) -> Rendered:
        match (self.request["task"], self._mode):
            case ("image", _):
                return self._pictures()
            case ("edit" | "remix", _) | (_, "blend"):
                return self._edited()
            case ("extend", _) | (_, "connect"):
                return self._extended()
            case ("create", _):
                return self._created()
        raise UserError(f"there is no task {self.request['task']!r}; ask for create, remix, edit, extend or image")

    @property
    def _mode(self) -> str | None:
        """What is done with a second clip."""
        if self._file("second") is None:
            return None
        named = {"extend": "connect", "edit": "blend", "remix": "blend"}
        return self.request.get("mode") or named.get(self.request["task"], "connect")

    # What was asked for.

    def _file(self, role: str, kind: str = "") -> Path | None:
        """The input of a role whose MIME type begins with `kind`."""
        for item in self.request.get("inputs") or ():
            if item["role"] == role and item["media"].startswith(kind):
                if item["asset"] not in self.inputs:
                    raise UserError(_UNREADABLE)
                return self.inputs[item["asset"]]
        return None

    def _clip(self) -> Path:
        """The clip that is worked on."""
        path = self._file("video") or self._file("reference", "video/")
        if path is None:
            raise UserError(f"{self.request['task']} needs a clip to work on; give one")
        return path

    def _canvas(self, source: Path | None = None) -> Canvas:
        """As asked for, else as the source, else the system's own."""
        size = self.request.get("size")
        if size is not None:
            asked = (int(size[0]), int(size[1]))
        elif source is not None:
            with _reading():
                about = probe(source)
            asked = (about.height, about.width)
        else:
            asked = self.system.config.size
        return Canvas(asked, grid(asked, self.system))

    def _count(self, default: int, begins: bool = True, asked: Mapping[str, Any] | None = None) -> int:
        """Frames to make, the nearest number that can be: by `frames` or `seconds` of what was asked for, or `default`.

        `begins`: of a film from its first frame on, of which there may be 1 + k strides; otherwise of a part, k strides.
        """
        asked = self.request if asked is None else asked
        stride = self.system.engine.strides.t
        frames, seconds = asked.get("frames"), asked.get("seconds")
        if frames is None:
            wanted = default if seconds is None else seconds * self.system.config.fps
            return max(0, round((wanted - 1) / stride)) * stride + 1 if begins else max(1, round(wanted / stride)) * stride
        self.system.engine.latent_shape(self.system.config.size, frames if begins else frames + 1)
        return frames

    def _fitting(self, count: int, begins: bool = True) -> int:
        """The most frames, at most `count`, that a film or a part of one may have. Raises UserError when there are none."""
        stride = self.system.engine.strides.t
        fitting = count - (count - 1) % stride if begins else count - count % stride
        if fitting < 1:
            raise UserError(f"the clip has only {count} frames at {self.system.config.fps:g} a second; give a longer one")
        return fitting

    @property
    def _window(self) -> int:
        """Frames that the network sees together."""
        stride = self.system.engine.strides.t
        trained = self.system.config.frames
        return trained if not self.lean else 1 + max(1, (trained - 1) // (2 * stride)) * stride

    @property
    def _rolling(self) -> Rolling:
        return Rolling() if not self.lean else Rolling(window=1 + (self._window - 1) // self.system.codec.strides.t)

    @property
    def _words(self) -> str:
        return str(self.request.get("prompt") or "")

    @property
    def _seed(self) -> int:
        return int(self.request.get("seed") or 0)

    def _settings(self, progress: Progress | None = None) -> dict[str, Any]:
        """What every task takes."""
        expander, text = None, self.request.get("text")
        if text is not None:
            expander = _Told(text)
        elif self.request.get("expand") and self.expander is not None:
            expander = _Remembered(self.expander, None if self.journal is None else self.journal / "words.json")
        return {
            "steps": self.request.get("steps"),
            "guidance": self.request.get("guidance"),
            "progress": progress or self.on_step,
            "expander": expander,
        }

    def _watched(self) -> System:
        """The system with its answers kept and previews shown."""
        system = self.system
        if self.journal is not None:
            wish = json.dumps([dict(self.request), self.lean, __version__], sort_keys=True)
            system, _ = recorded(system, self.journal / "answers", hashlib.sha256(wish.encode()).hexdigest())
        return replace(system, engine=replace(system.engine, watch=_Previews(self.system, self.on_preview)))

    # The tasks.

    def _created(self) -> Rendered:
        past, shots = self._file("reference", "video/") or self._file("video", "video/"), self.request.get("shots")
        named = {0: self._file("reference", "image/"), -1: self._file("last", "image/")}
        if self.request.get("loop"):
            if past or shots or any(named.values()):
                raise UserError("a loop has neither beginning nor end; leave out the pictures, clips and shots, or the loop")
            return self._looped()
        if past is not None:
            if shots:
                raise UserError("a storyboard makes a film from its shots; leave out the clip, or the shots")
            return self._extended(past, whole=True)
        canvas = self._canvas()
        if shots:
            board = self._board(shots)
        else:
            board = [Shot(self._words, self._count(self.system.config.frames))]
        frames = sum(shot.frames for shot in board)
        pictures = {place: path for place, path in named.items() if path is not None}
        self._check(canvas, frames)
        if len(pictures) == 2 and frames == 1:
            raise UserError("a film of one frame cannot begin and end with a picture; ask for more frames")
        for place, path in pictures.items():
            shot = board[place]
            known = {**shot.pictures, place: canvas.video(path, self.system.config.fps, first=1)[0]}
            board[place] = replace(shot, pictures=known)
        if not shots and not pictures and frames <= self._window:
            clip = self._watched().generate(self._words, canvas.grid, frames, self._seed, **self._settings())
        else:
            clip = self._watched().film(board, canvas.grid, self._seed, rolling=self._rolling, **self._settings())
        return self._rendered(canvas, clip, frames)

    def _looped(self) -> Rendered:
        canvas, frames = self._canvas(), self._count(self.system.config.frames)
        self._check(canvas, frames)
        clip = self._watched().generate(self._words, canvas.grid, frames, self._seed, loop=True, **self._settings())
        return self._rendered(canvas, clip, frames)

    def _board(self, asked: Sequence[Mapping[str, Any]]) -> list[Shot]:
        """The shots of a storyboard; one without seconds lasts as long as the system's own films."""
        shots: list[Shot] = []
        for shot in asked:
            frames = self._count(self.system.config.frames, not shots, shot)
            shots.append(Shot(str(shot.get("prompt") or ""), frames, cut=bool(shot.get("cut"))))
        return shots

    def _extended(self, source: Path | None = None, whole: bool = False) -> Rendered:
        """A clip goes on, up to a second one if there is one, or back to its own beginning if it is to be a loop.

        `whole`: the length asked for is that of clip and all.
        """
        before, after = source or self._clip(), self._file("second")
        canvas, fps, stride = self._canvas(before), self.system.config.fps, self.system.engine.strides.t
        # What is further away than a window is never seen.
        past, count = canvas.video(before, fps, last=self._window)
        past = _cut(past, slice(past.frames - self._fitting(past.frames), None))
        future, behind = None, 0
        ahead = after or (before if self.request.get("loop") else None)
        if ahead is not None:
            future, behind = canvas.video(ahead, fps, first=self._window)
            future = _cut(future, slice(0, self._fitting(future.frames, begins=False)))
        total = count if after is None else count + behind
        if whole:
            frames = (self._count(self.system.config.frames) - count) // stride * stride
            if frames < 1:
                raise UserError(f"the clip already lasts {count / fps:g} seconds; ask for more")
        else:
            frames = self._count(self.system.config.frames, begins=False)
        self._check(canvas, total + frames)
        last = self._file("last", "image/")
        pictures = {} if last is None else {-1: canvas.video(last, fps, first=1)[0]}
        shot = Shot(self._words, frames, pictures)
        known: dict[str, Any] = {"past": past, "future": future, "rolling": self._rolling}
        clip = self._watched().film([shot], canvas.grid, self._seed, **known, **self._settings())
        fresh = slice(past.frames, past.frames + frames)
        return self._rendered(canvas, clip, total + frames, fresh, before, after)

    def _edited(self) -> Rendered:
        """A clip made again by words, or turned into a second one."""
        source, second = self._clip(), self._file("second")
        canvas, fps = self._canvas(source), self.system.config.fps
        film, count = canvas.video(source, fps)
        into = None
        if second is not None:
            into, behind = canvas.video(second, fps)
            count = min(count, behind)
        if self.request.get("frames") is not None or self.request.get("seconds") is not None:
            count = min(count, self._count(count))
        frames = self._fitting(count)
        self._check(canvas, frames)
        film, into = _cut(film, slice(0, frames)), None if into is None else _cut(into, slice(0, frames))
        clip = self._watched().edit(film, self._words, self._strength, self._seed, into=into, **self._settings())
        return self._rendered(canvas, clip, frames)

    @property
    def _strength(self) -> float:
        strength = self.request.get("strength")
        return STRENGTH if strength is None else float(strength)

    def _pictures(self) -> Rendered:
        count = int(self.request.get("n") or 1)
        seeds = [(self._seed + number) % (GREATEST_SEED + 1) for number in range(count)]
        source = self._file("reference") or self._file("video")
        canvas = self._canvas(source)
        self._check(canvas, count)
        system, format = self._watched(), self.request.get("format") or "png"
        if source is None:
            more = {"size": canvas.grid, "frames": 1, "batch": 1 if self.lean else 8}
            clips = system.generate_batch([self._words] * count, seeds, **more, **self._settings())
            return self._rendered(canvas, clips, 1, format=format)
        film, mask, words = canvas.video(source, self.system.config.fps, first=1)[0], self._file("mask"), self._words
        if not words:
            words, system = VARIATION, replace(system, engine=replace(system.engine, text=cast(Any, _Wordless(system.text))))
        # A cell of the grid is made anew where any of its pixels is; around a picture of another shape everything is.
        stays = None if mask is None else canvas.video(mask, self.system.config.fps, first=1)[0].pixels[0].amin(0)  # (1, *grid)
        clips = []
        for number, seed in enumerate(seeds):

            def stepped(done: int, steps: int, before: int = number) -> None:
                self.on_step(before * steps + done, count * steps)

            settings = self._settings(stepped)
            if stays is None:
                clips.append(system.edit(film, words, self._strength, seed, **settings))
            else:
                clips.append(system.inpaint(film, (stays < MOSTLY).float(), words, seed, **settings))
        return self._rendered(canvas, clips, 1, format=format, around=None if mask is None else (source, mask))

    # The end.

    def _check(self, canvas: Canvas, frames: int) -> None:
        """Refuse before any work what could not be written."""
        if frames * math.prod(canvas.asked) * 3 > GREATEST_BYTES:
            height, width = canvas.asked
            raise UserError(f"{frames} frames of {width}x{height} are too large for one film; ask for fewer or a smaller size")

    def _rendered(
        self,
        canvas: Canvas,
        clips: Clip | Sequence[Clip],
        frames: int,
        fresh: slice | None = None,
        before: Path | None = None,
        after: Path | None = None,
        format: str = "mp4",
        around: tuple[Path, Path] | None = None,
    ) -> Rendered:
        clips = (clips,) if isinstance(clips, Clip) else tuple(clips)
        if format != "mp4" and format not in IMAGE_MEDIA:
            raise UserError(f"there is no format {format!r}; choose one of {', '.join(IMAGE_MEDIA)}")
        fps, settings = self.system.config.fps, clips[0].settings
        timings = {name: sum(clip.timings[name] for clip in clips) for name in clips[0].timings}
        result = {
            "task": self.request["task"],
            "seed": self._seed,
            "fps": fps,
            "frames": frames,
            "seconds": frames / fps,
            "size": list(canvas.asked),
            "rendered": list(canvas.grid),
            "text": settings["text"],
            "settings": settings,
            "system": self.system.name,
            "digest": self.system.digest,
            "timings": timings,
        }
        if format == "mp4":
            result["spritesheet"] = sheet(frames, canvas.asked)
        if self.request.get("characters"):
            # Said rather than passed over: nothing of a character but its name in the words reaches the network.
            result["unused"] = ["characters"]
        return Rendered(clips, canvas, result, fresh or slice(0, frames), before, after, format, around)


def sheet(frames: int, size: Size) -> dict[str, Any]:
    """Geometry of the spritesheet of a film: cells in one row, each of `height` and `width` pixels, and the frames in them."""
    count = min(frames, SHEET_FRAMES)
    scale = SHEET_SIDE / max(size)
    height, width = (max(1, round(side * scale)) for side in size)
    return {"columns": count, "rows": 1, "height": height, "width": width, "frames": _spread(frames, count)}


class _Told:
    """Stands for an expander where the one who asked says what is to be read, mostly because it was shown to him."""

    def __init__(self, text: str) -> None:
        self._text = text

    def expand(self, prompt: str) -> Expansion:
        return Expansion(prompt, self._text, "request")


class _Remembered:
    """An expander whose expansions are kept in a file: a job that goes on reads what it read before."""

    def __init__(self, expander: Expander, path: Path | None) -> None:
        self._expander, self._path = expander, path
        self._kept: dict[str, list[str]] = {}
        if path is not None and path.exists():
            with contextlib.suppress(UserError):  # torn: expanded anew, and the answers to the old words are then not used
                self._kept = dict(read_json(path))

    def expand(self, prompt: str) -> Expansion:
        if prompt not in self._kept:
            try:
                made = self._expander.expand(prompt)
            except UserError as error:
                raise UserError("the words could not be expanded; try again, or ask without expansion") from error
            self._kept[prompt] = [made.text, made.source]
            if self._path is not None:
                with contextlib.suppress(UserError):  # a full disk; the expansion is kept for this attempt
                    write_json(self._path, self._kept)
        text, source = self._kept[prompt]
        return Expansion(prompt, text, source)


class _Wordless:
    """A text encoder that reads nothing into any words: what guidance steers away from is all that the network is told."""

    def __init__(self, text: TextEncoder) -> None:
        self.null = text.null

    def encode(self, prompts: Sequence[str]) -> Condition:
        return self.null(len(prompts))

    def truncated(self, prompt: str) -> bool:
        return False


class _Previews:
    """Shows some frames of the film that is becoming, seldom enough that it costs little."""

    def __init__(self, system: System, show: Callable[[bytes], None]) -> None:
        self._engine, self._show = system.engine, show
        self._due = time.monotonic() + PREVIEW_PAUSE

    def __call__(self, latents: Tensor) -> None:
        begin = time.monotonic()
        if begin < self._due:
            return
        T = latents.shape[2]
        chosen = latents[0, :, _spread(T, min(T, PREVIEW_FRAMES))]  # (C, t, h, w)
        with contextlib.suppress(UserError):  # values that are not finite: the solver's own check says so
            # Each as a film of its own: cheaper than all frames up to the last, and near enough for a look.
            pixels = self._engine.decode(chosen.transpose(0, 1)[:, :, None])  # (t, 3, 1, H, W)
            frames = Video(pixels, 1.0).to_uint8()[:, 0]
            out = io.BytesIO()
            _row(frames, (frames.shape[1], frames.shape[2])).save(out, "JPEG", quality=85)
            self._show(out.getvalue())
        end = time.monotonic()
        self._due = end + max(PREVIEW_PAUSE, (end - begin) / PREVIEW_SHARE)


_UNREADABLE = "a clip or picture of the request cannot be read any more; give it again"


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What a decoder says of a file names its place on this machine, which is nobody's business."""
    try:
        yield
    except UserError as error:
        raise UserError(_UNREADABLE) from error


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """A full disk as StorageFull."""
    try:
        yield
    except (OSError, UserError) as error:
        cause = error.__cause__ if isinstance(error, UserError) else error
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise StorageFull("there is no room for the film") from error
        raise


def _cut(video: Video, frames: slice) -> Video:
    return replace(video, pixels=video.pixels[:, :, frames])


def _spread(frames: int, count: int) -> list[int]:
    """`count` evenly chosen frames, first and last among them."""
    return np.linspace(0, frames - 1, count).round().astype(int).tolist()


def _resized(frame: np.ndarray, size: Size) -> np.ndarray:
    if frame.shape[:2] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.LANCZOS))  # (*size, 3)


def _within(frame: np.ndarray, side: int) -> Image.Image:
    """A frame whose longer side is at most `side`."""
    scale = min(1.0, side / max(frame.shape[:2]))
    height, width = (max(1, round(length * scale)) for length in frame.shape[:2])
    return Image.fromarray(_resized(frame, (height, width)))


def _row(frames: np.ndarray, size: Size) -> Image.Image:
    """Frames side by side, each brought to `size`."""
    return Image.fromarray(np.concatenate([_resized(frame, size) for frame in frames], axis=1))
