"""What every simulated world gives: a captioned clip with exact state, from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tubelet.core.errors import UserError

Array = np.ndarray[Any, Any]
Event = tuple[float, str, tuple[int, ...]]

GREATEST_PIXELS = 2**27
"""T * H * W of one clip: 1.5 GiB as floats."""
CHROMA_FOREGROUND = 48
"""A pixel whose largest and smallest channel differ by more than this belongs to an object: backgrounds, panels, brushes and
mouths are gray."""


@dataclass(frozen=True)
class Episode:
    """One simulated, captioned clip."""

    video: Array
    """uint8 (T, H, W, 3), sRGB."""
    fps: float
    short: str
    dense: str
    human: str
    """A short, casual paraphrase of `short` with synonyms; it may leave attributes out."""
    state: dict[str, Array]
    """Exact state in short sides and seconds: (T, N) and (T,) and (N,) and () arrays; the world's module lists the names."""
    events: list[Event]
    """(seconds, kind, object ids) in order of time, those inside the clip only."""
    camera: Array
    """(T, 4): centre x, centre y, width, height of what is seen, in short sides. Fixed in two-dimensional worlds."""
    tags: dict[str, Any]
    """JSON values: world, kind, split, seed, scene (the caption's attributes), objects (colour, shape, size words), held_out
    flags."""


class World(Protocol):
    """A family of scenes."""

    name: str
    kinds: tuple[str, ...]
    splits: tuple[str, ...]

    def sample(
        self,
        seed: int,
        height: int = 64,
        width: int = 64,
        frames: int = 17,
        fps: float = 8.0,
        *,
        kind: str | None = None,
        split: str = "train",
        wish: Mapping[str, Any] | None = None,
    ) -> Episode:
        """The clip of a seed: the same bytes in every process.

        kind: one of `kinds`, by default drawn from the seed. split: which compositions may appear, one of `splits`. wish:
        attributes in the form of `grammar.parse` that the scene shall have where its kind allows; they overrule the draw and
        the split. Raises UserError for a wrong size, kind or split.
        """
        ...


def foreground(video: Array) -> Array:
    """uint8 (T, H, W): 1 where an object is, read from the colours of a (T, H, W, 3) clip."""
    return ((video.max(-1).astype(np.int16) - video.min(-1)) > CHROMA_FOREGROUND).astype(np.uint8)


def check_request(
    world: str,
    kinds: tuple[str, ...],
    splits: tuple[str, ...],
    seed: int,
    height: int,
    width: int,
    frames: int,
    fps: float,
    kind: str | None,
    split: str,
) -> None:
    """Raises UserError with the remedy if a world cannot be sampled so."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is outside 0..2^32-1; give a seed in that range.")
    if height < 16 or width < 16:
        raise UserError(f"a {height}x{width} clip is too small to show anything; give a height and a width of at least 16.")
    if frames < 1:
        raise UserError(f"a clip of {frames} frames is empty; give at least 1 frame.")
    if frames * height * width > GREATEST_PIXELS:
        raise UserError(f"{frames} frames of {height}x{width} are too large for one clip; give a smaller size or fewer frames.")
    if not 0 < fps <= 1000:
        raise UserError(f"{fps} frames per second cannot be sampled; give a rate above 0 and at most 1000.")
    if kind is not None and kind not in kinds:
        raise UserError(f"the world {world} has no kind {kind!r}; choose one of {', '.join(kinds)}.")
    if split not in splits:
        raise UserError(f"the world {world} has no split {split!r}; choose one of {', '.join(splits)}.")


def stream(seed: int, *salt: int) -> np.random.RandomState:
    """The random stream of a seed, told apart by small integers (world, kind). RandomState's stream is frozen by numpy's
    policy."""
    return np.random.RandomState([seed & 0xFFFFFFFF, *salt])
