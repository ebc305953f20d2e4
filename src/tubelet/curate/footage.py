"""Films of a folder become clips to train on: cut where scenes change, looked through, each with the words beside its file.

A clip lies within one scene, has one size, rate and length, and is kept when it is not blank, not still and not seen before.
What a film shows stands beside it: `film.txt`, one caption a line, or `film.json`, `{"captions": [{"text", "kind"}, ...]}`; a
clip of a film without either has none, and `recaption` may write some.

The same call goes on after an interruption, and leaves what an uninterrupted one leaves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tubelet.core.errors import UserError
from tubelet.core.files import read_json, write_json
from tubelet.core.log import note, progress
from tubelet.data.schema import Record
from tubelet.data.shards import ShardWriter
from tubelet.media.decode import stream
from tubelet.media.resize import Fit

FILMS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv", ".gif")
"""Endings of files that are taken for films."""
CLAIM = "footage.json"
"""What a folder of clips was made with, written first."""
REASONS = ("short", "blank", "still", "seen before")
"""Why a stretch of film becomes no clip, in the order in which they are asked."""
SIGNS, DEAD = 16, 16
"""Cells of a side by which a picture is known, and by how much of 255 two neighbours must differ to count."""


@dataclass(frozen=True)
class Look:
    """What is asked of clips. Levels are of 255. Raises UserError when they cannot be."""

    size: tuple[int, int] = (64, 64)
    """Height and width, to which films are brought."""
    frames: int = 17
    fps: float = 8.0
    fit: Fit = "crop"
    cut: float = 30.0
    """A scene ends where this mean difference from frame to frame is passed, and thrice what is usual around it."""
    blank: float = 3.0
    """Least standard deviation of a clip's brightness."""
    still: float = 0.4
    """Least mean difference from frame to frame."""
    alike: float = 0.15
    """Share of the signs of two clips that may differ where they count as the same; encoding anew changes up to .15."""

    def __post_init__(self) -> None:
        if min(self.size) < 1 or self.frames < 1 or not (math.isfinite(self.fps) and self.fps > 0):
            raise UserError(
                f"clips need a size, frames and fps above 0, got {self.size}, {self.frames} and {self.fps}; correct them"
            )
        if self.fit not in ("crop", "pad", "stretch"):
            raise UserError(f"fit must be crop, pad or stretch, got {self.fit!r}; choose one of them")


@dataclass(frozen=True)
class Found:
    """What became of films: clips that were kept, why others were not, and which films could not be read, and why."""

    clips: int
    films: int
    dropped: dict[str, int]
    unread: dict[str, str]


def films_of(sources: Sequence[str | Path]) -> list[tuple[Path, str]]:
    """All films that the sources name, files or folders with what lies in them, with the name that each is known by, in order.

    Raises UserError on a source that is not there, and when there is no film.
    """
    found: list[tuple[Path, str]] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.suffix.lower() in FILMS and path.is_file())
            found += [(path, path.relative_to(source).as_posix()) for path in inside]
        elif source.is_file():
            found.append((source, source.name))
        else:
            raise UserError(f"there is no file or folder {source}; check the name")
    if not found:
        raise UserError(f"there is no film in {', '.join(map(str, sources))}; files end in {', '.join(FILMS)}")
    names = Counter(name for _, name in found)
    return [(path, name if names[name] == 1 else path.as_posix()) for path, name in found]


def footage(sources: Sequence[str | Path], folder: str | Path, look: Look | None = None) -> Found:
    """Write the clips of all films as a data set. A film that cannot be read is named and left out.

    Raises UserError when the folder was begun with other films or another look, captions are malformed, or nothing is kept.
    """
    folder, look = Path(folder), look or Look()
    films = films_of(sources)
    captions = [captions_beside(path) for path, _ in films]
    begun = asdict(look) | {
        "films": [name for _, name in films],
        # A film or its captions may change under the same name: what is written already would not follow.
        "contents of films": [path.stat().st_size if path.exists() else 0 for path, _ in films],
        "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest(),
    }
    dropped, unread, seen = Counter[str](), dict[str, str](), Seen(look.alike)
    with (
        _claimed(folder, begun),
        ShardWriter(folder) as writer,
        progress("reading films", "films") as advance,
    ):
        for done, ((path, name), said) in enumerate(zip(films, captions, strict=True), start=1):
            known = hashlib.sha256(name.encode()).hexdigest()[:16]
            try:
                for begin, clip in stretches(path, look):
                    reason = refused(clip, look) or ("seen before" if seen(clip) else None)
                    if reason is not None:
                        dropped[reason] += 1
                        continue
                    key = f"{known}-{round(begin * look.fps):06d}"
                    if key not in writer:
                        meta = {"fps": look.fps, "film": name, "begin": begin} | ({"captions": said} if said else {})
                        writer.add(Record(key, {"video": torch.from_numpy(clip)}, meta))
            except Unreadable as error:
                unread[name] = str(error)
                note(f"{name}: left out from there on, {error}")
            advance(done, len(films))
        if not len(seen):
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "; ".join(unread.values())
            raise UserError(f"of {len(films)} films no clip was kept ({why}); give others, or ask for shorter clips")
    return Found(len(seen), len(films), {reason: dropped[reason] for reason in REASONS}, unread)


class Unreadable(Exception):  # noqa: N818  an answer, not a defect
    """A film cannot be read; what it says is for a person."""


def stretches(path: Path, look: Look) -> Iterator[tuple[float, np.ndarray]]:
    """A film as one clip after the other, each within one scene: where it begins, in seconds, and uint8 `(T, H, W, 3)`.

    What is left of a scene is shorter than the others. Raises Unreadable when the file ends or breaks before it should.
    """
    held: list[np.ndarray] = []
    usual: deque[float] = deque(maxlen=8)
    place = 0
    try:
        for frame in stream(path, fps=look.fps, size=look.size, fit=look.fit):
            if held:
                change = float(np.abs(frame.astype(np.int16) - held[-1]).mean())
                if usual and change > look.cut and change > 3 * float(np.median(usual)):
                    yield place / look.fps, np.stack(held)
                    place, held = place + len(held), []
                    usual.clear()
                else:
                    usual.append(change)
            held.append(frame)
            if len(held) == look.frames:
                yield place / look.fps, np.stack(held)
                place, held = place + len(held), []
    except UserError as error:
        raise Unreadable(str(error)) from error
    if held:
        yield place / look.fps, np.stack(held)


def refused(clip: np.ndarray, look: Look) -> str | None:
    """Why a clip, uint8 `(T, H, W, 3)`, is not one to train on, of `REASONS`; None when it is."""
    if len(clip) < look.frames:
        return "short"
    bright = clip.astype(np.float32).mean(-1)  # (T, H, W)
    if float(bright.std()) < look.blank:
        return "blank"
    if len(clip) > 1 and float(np.abs(np.diff(bright, axis=0)).mean()) < look.still:
        return "still"
    return None


class Seen:
    """Clips that were met: `seen(clip)` says whether one like it was there before, and remembers it where not."""

    def __init__(self, alike: float) -> None:
        self._alike = alike
        self._marks = np.empty((256, 0), bool)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __call__(self, clip: np.ndarray) -> bool:
        mark = signs_of(clip)
        if not self._count:
            self._marks = np.empty((256, len(mark)), bool)
        known = self._marks[: self._count]
        if self._count and bool(((known ^ mark).sum(1) <= self._alike * (known | mark).sum(1)).any()):
            return True
        if self._count == len(self._marks):
            self._marks = np.concatenate([self._marks, np.empty_like(self._marks)])
        self._marks[self._count] = mark
        self._count += 1
        return False


def signs_of(clip: np.ndarray) -> np.ndarray:
    """What a clip is known by: where a colour of its first, middle and last frame, 16 cells wide and high, rises or falls.

    Flat places have neither sign, so that noise makes no difference (difference hashing, with a dead zone).
    """
    marks = []
    for frame in (clip[0], clip[len(clip) // 2], clip[-1]):
        small = Image.fromarray(frame).resize((SIGNS + 1, SIGNS), Image.Resampling.BOX)
        steps = np.diff(np.asarray(small, np.int16), axis=1)  # (16, 16, 3)
        marks += [steps > DEAD, steps < -DEAD]
    return np.stack(marks).ravel()


def captions_beside(path: Path) -> list[dict[str, str]]:
    """The captions in `film.json` or else `film.txt` beside `film.mp4`. Raises UserError when the file is none of these."""
    beside, lines = path.with_suffix(".json"), path.with_suffix(".txt")
    if beside.is_file():
        said = read_json(beside)
        several = said.get("captions") if isinstance(said, dict) else None
        if not isinstance(several, list) or not all(
            isinstance(one, dict) and isinstance(one.get("text"), str) and one["text"].strip() for one in several
        ):
            raise UserError(f'{beside} must be {{"captions": [{{"text": "...", "kind": "..."}}]}}; correct it')
        return [_caption(one["text"], str(one.get("kind", "human"))) for one in several]
    if lines.is_file():
        try:
            text = lines.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {lines} as UTF-8 text ({type(error).__name__}); correct it") from error
        return [_caption(line, "human") for line in text.splitlines() if line.strip()]
    return []


def _caption(text: str, kind: str) -> dict[str, str]:
    return {"text": " ".join(text.split()), "kind": kind, "source": "beside"}


@contextlib.contextmanager
def _claimed(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Keep a folder for clips made with these settings; one in which none was kept in the end is nobody's again."""
    made = not folder.exists()
    _claim(folder, json.loads(json.dumps(settings)))
    try:
        yield
    except BaseException:
        if all(inside.name == CLAIM or inside.name.startswith(".") for inside in folder.iterdir()):
            (folder / CLAIM).unlink()
            if made and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / CLAIM
    if not path.exists():
        if folder.exists() and not (folder.is_dir() and all(inside.name.startswith(".") for inside in folder.iterdir())):
            raise UserError(f"{folder} holds something else already; choose a folder that is new or empty")
        write_json(path, settings)
    begun = read_json(path)
    if not isinstance(begun, dict) or "films" not in begun:
        raise UserError(f"{path} does not say what {folder} was begun with; use another folder")
    # What is missing, an earlier version did not ask.
    changed = [name for name in settings if begun.get(name, settings[name]) != settings[name]]
    if changed:
        raise UserError(f"{folder} was begun with other {changed[0]}; use another folder, or what it was begun with")
