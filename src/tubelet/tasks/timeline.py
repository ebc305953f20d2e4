"""Tasks in time: a picture that moves, a film between two pictures, extension, connection, a storyboard, a film of any length.

All are one thing: latent frames on one line, of which some are known, and windows along it in which the network makes the
rest, each seeing what the ones before it made (rolling windows; VDT, Lu et al. 2023, section 3.3; W.A.L.T, section 3.4).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.core.errors import UserError
from tubelet.tasks.given import Given


@dataclass(frozen=True)
class Timeline:
    """Latents `clean (B, C, T, H, W)` of a film and which of its frames are `known`, T flags."""

    clean: Tensor
    known: tuple[bool, ...]

    def given(self, frames: Sequence[int], haze: float = 0.0, times: tuple[int, ...] | None = None) -> Given:
        """What the network is told when it sees `frames` of it together; `haze` and `times` as in `Given`."""
        mask = self.clean.new_ones(len(self.clean), len(frames), *self.clean.shape[3:])
        mask[:, [place for place, frame in enumerate(frames) if self.known[frame]]] = 0
        return Given(self.clean[:, :, list(frames)], mask, haze, times=times)


def place(parts: Sequence[tuple[int, Tensor]], frames: int) -> Timeline:
    """A film of `frames` latent frames in which each part `(B, C, t, H, W)` stands from its frame on; the rest is to be made.

    Raises UserError when parts differ in size, overlap or do not fit, or when nothing is left to make.
    """
    assert parts, "a film of which nothing is known needs no timeline"
    one = parts[0][1]
    clean = one.new_zeros(*one.shape[:2], frames, *one.shape[3:])
    known = torch.zeros(frames, dtype=torch.bool)
    for begin, part in parts:
        if part.ndim != 5 or part.shape[:2] != one.shape[:2] or part.shape[3:] != one.shape[3:]:
            raise UserError(
                f"known clips must be latents (B, C, T, H, W) of one size, got {tuple(part.shape)}, {tuple(one.shape)}; fit"
            )
        end = begin + part.shape[2]
        if begin < 0 or end > frames or bool(known[begin:end].any()):
            raise UserError(f"a known clip of {part.shape[2]} frames has no room at frame {begin} of {frames}; move it")
        clean[:, :, begin:end] = part
        known[begin:end] = True
    if bool(known.all()):
        raise UserError(f"all {frames} latent frames are known, nothing is left to make; ask for more frames")
    return Timeline(clean, tuple(known.tolist()))


@dataclass(frozen=True)
class Span:
    """Latent frames `begin` to `end` (excluded) of one prompt. A `cut` begins it: what was before is not looked at."""

    begin: int
    end: int
    cut: bool = False


@dataclass(frozen=True)
class Window:
    """Frames that the network sees together, the number of the span whose prompt it reads, and when the frames are."""

    frames: tuple[int, ...]
    span: int
    times: tuple[int, ...] | None = None


def plan(known: Sequence[bool], spans: Sequence[Span], window: int, overlap: int, sink: int = 0) -> list[Window]:
    """Windows in the order in which they are made: at most `window` frames, looking back on at least `overlap` known ones.

    A window reaches over known frames ahead too, behind its span as well, so that what is made arrives there: the last one
    before them makes up to a half of the way and sees as many of them as it looks back on. Unused room looks back further.
    Cuts part a film: no window looks across one, each part is made as a film of its own. Where only the end of a part is
    known, it runs backward. `sink` above 0 keeps the first frame of a part in sight of windows that have left it, as a frame
    `sink` frames before theirs (StreamingLLM's attention sink, Xiao et al. 2023, as a film's first frame). Raises UserError
    when a window would add nothing.
    """
    if len(known) > window and not 0 < overlap < window - sink:
        raise _too_narrow(window, overlap)
    firsts = [0, *(number for number, span in enumerate(spans) if span.cut and number > 0)]
    out = []
    for first, after in itertools.pairwise((*firsts, len(spans))):
        begin = spans[first].begin if spans[first].cut else 0
        end = spans[after].begin if after < len(spans) else len(known)
        part = [Span(span.begin - begin, span.end - begin) for span in spans[first:after]]
        out += [
            Window(tuple(begin + frame for frame in w.frames), first + w.span, w.times)
            for w in _plan_part(known[begin:end], part, window, overlap, sink)
        ]
    return out


def _plan_part(known: Sequence[bool], spans: Sequence[Span], window: int, overlap: int, sink: int) -> list[Window]:
    """`plan` of a film without cuts."""
    T = len(known)
    if not any(known[: spans[0].end]) and known[-1] and window < T:
        turned = [Span(T - span.end, T - span.begin) for span in reversed(spans)]
        # Mirrored, the first frame is the last one, which no window should see from far away.
        mirrored = _plan_part(tuple(reversed(known)), turned, window, overlap, 0)
        return [Window(tuple(T - 1 - frame for frame in reversed(w.frames)), len(spans) - 1 - w.span) for w in mirrored]
    made, out = list(known), []
    for number, span in enumerate(spans):
        ceiling = span.end
        while ceiling < T and known[ceiling]:
            ceiling += 1
        while not all(made[span.begin : span.end]):
            first = made.index(False, span.begin)
            low = max(0, first - overlap)
            sunk = sink > 0 and low > 0
            room = window - sink if sunk else window
            if any(known[first:ceiling]):  # a place for what it arrives at, even if one less looks back
                low = max(low, first - max(1, room - 2))
            high = _reach(known, first, low, room, overlap, ceiling)
            if high <= first:
                raise _too_narrow(window, overlap)
            low = max(0, min(low, high - room))
            frames = tuple(range(low, high))
            made[low:high] = [True] * (high - low)
            if sunk and low > 0:
                out.append(Window((0, *frames), number, (0, *range(sink, sink + len(frames)))))
            else:
                out.append(Window(frames, number))
    return out


def _reach(known: Sequence[bool], first: int, low: int, room: int, overlap: int, ceiling: int) -> int:
    """Where a window of `room` frames from `low` on ends, which makes frames from `first` on and sees none beyond `ceiling`.

    Known frames that lie ahead are what the film has to arrive at. A window that made the last frame before them, or nearly so,
    without seeing some of them leaves half of the way to the next one.
    """
    high, at = min(low + room, ceiling), first
    while at < high and any(known[at:ceiling]):
        begin = known.index(True, at)
        end = next((frame for frame in range(begin, ceiling) if not known[frame]), ceiling)
        seen = min(end - begin, overlap, max(1, room - (first - low) - 1))
        if high < begin + seen:
            half = -(-(begin - at) // 2)
            high = min(high, begin - max(0, min(half, room - (first - low) - seen)))
        at = end
    return high


def _too_narrow(window: int, overlap: int) -> UserError:
    if overlap < 1:
        return UserError(f"a window must look back on at least 1 latent frame, got {overlap}; raise it")
    fewer = ", or look back on fewer" if overlap > 1 else ""
    return UserError(f"a window of {window} latent frames cannot look back on {overlap} and add another; widen it{fewer}")
