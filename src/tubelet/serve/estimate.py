"""When a film will be there: by what films of its system took of late, and by what is made before it (promise R11).

A film takes a time of its own, a time for each frame and step that is made, and a time for each pixel that is written: two
seconds of 64 x 64 are all denoising, eight of 1280 x 720 are mostly writing.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tubelet.serve.config import SystemFacts
from tubelet.serve.records import Job
from tubelet.serve.view import length_of, size_of, task_of

REMEMBERED = 24
"""Films of a system by which the next ones are estimated."""
FADE, NEAR, HELD, SHORTEST = 0.9, 4.0, 0.01, 1e-3
"""What a film counts for of the one after it; how much more one counts that is like the one in question; how firmly a line is
held at the origin; seconds below which all are alike."""
MAKING = ("denoise", "words", "decode")
"""Stages that go by frames and steps."""
WRITING = ("encode", "mark", "look", "sign", "store")
"""Stages of a worker that go by pixels."""
LONGEST_TURN = 2.0
"""Seconds between two films of a queue, at most; where it took longer, there was no worker."""
WRITTEN = 92
"""The progress at which a worker has made the last frame and begins to write."""
OVERLAP = 1.4
"""Frames that are made for each frame of a film that is longer than a window: the windows look back."""
LINE = 500
"""Jobs at the head of the queue that are estimated one by one; those behind them are taken to be like these on average."""


class Work(NamedTuple):
    """What a film asks for: frames times steps times native areas to make, and megapixels to write."""

    making: float
    writing: float


def work_of(job: Job, system: SystemFacts) -> Work:
    """By a job's request, and its result where the request left something open."""
    asked, seconds = job.request, length_of(job)
    frames = max(1, round(seconds * system.fps)) if seconds else asked.get("frames") or system.frames
    made = frames
    if task_of(job) in ("extend", "connect") and asked.get("seconds"):
        made = max(1, round(asked["seconds"] * system.fps))
    if asked.get("task") == "image":
        frames = made = asked.get("n") or 1
    height, width = size_of(job) or system.size
    short = min(system.size)
    area = short * short * max(height, width) / min(height, width) / (system.size[0] * system.size[1])
    windows = OVERLAP if made > system.frames else 1.0
    return Work(made * windows * area * (asked.get("steps") or system.steps), frames * height * width / 1e6)


@dataclass
class Pace:
    """What films of one system took of late: seconds of their own, of making by its units, of writing by megapixels."""

    _seen: deque[tuple[float, tuple[float, float], tuple[float, float]]] = field(
        default_factory=lambda: deque(maxlen=REMEMBERED)
    )
    """The newest last: seconds of its own, (units, seconds) of making and of writing."""
    _ended: float = -math.inf
    """When the last one ended."""
    _told: dict[Work, tuple[float, float]] = field(default_factory=dict)
    """What was worked out since: in a long queue most films are alike."""

    def learn(self, job: Job, work: Work) -> None:
        """Take in a finished film. One that a second worker went on with says nothing: part of it was there."""
        if job.started_at is None or job.completed_at is None or job.attempt != 1:
            return
        spent = max(0.0, job.completed_at - job.started_at)
        timings = {name: float(seconds) for name, seconds in job.result.get("timings", {}).items()}
        writing = min(spent, sum(timings.get(stage, 0.0) for stage in WRITING))
        making = min(spent - writing, sum(timings.get(stage, 0.0) for stage in MAKING))
        # Between two films of a queue; a worker that waits for films looks less often, which says nothing of a queue.
        turn = min(max(0.0, job.started_at - self._ended), LONGEST_TURN) if job.created_at < self._ended else 0.0
        self._ended = job.completed_at
        self._told.clear()
        self._seen.append((turn + spent - writing - making, (work.making, making), (work.writing, writing)))

    def takes(self, work: Work) -> tuple[float, float] | None:
        """Seconds until the last frame is made, and those of writing after it; None when no film is known."""
        if self._seen and work not in self._told:
            own, making, writing = zip(*self._seen, strict=True)
            self._told[work] = statistics.median_low(own) + _at(work.making, making), _at(work.writing, writing)
        return self._told.get(work)

    def left(self, job: Job, work: Work, now: float) -> float | None:
        """Seconds until a film that is being made is there: by its own progress, as soon as that says something."""
        known, spent = self.takes(work), max(0.0, now - (job.started_at or now))
        if job.progress < 5:
            return None if known is None else max(0.0, sum(known) - spent)
        if job.progress >= WRITTEN:
            return None if known is None else max(0.0, min(known[1], sum(known) - spent))
        return spent * (WRITTEN - job.progress) / job.progress + (0.0 if known is None else known[1])


class Timetable:
    """When the jobs of a queue will be done, as it stood at one moment. Times are unix seconds.

    `queued` are the first ones, at most `LINE`, in their order. Each system has as many `hands` (workers), but at least one.
    """

    def __init__(
        self,
        paces: Mapping[str, Pace],
        systems: Mapping[str, SystemFacts],
        running: Sequence[Job],
        queued: Sequence[Job],
        hands: Mapping[str, int],
        paused: bool,
        now: float,
    ) -> None:
        self.paces, self.systems, self.paused, self.made_at = paces, systems, paused, now
        self._known = len(queued)
        self._ends: dict[str, float] = {}
        self._free: dict[str, list[float]] = {name: [] for name in systems}
        """When each worker of a system has done all that is here, the earliest first."""
        for job in running:
            if (name := _system(job)) in systems:
                left = paces[name].left(job, work_of(job, systems[name]), now) if name in paces else None
                self._free[name].append(now + (left or 0.0))
        for name, free in self._free.items():
            free += [now] * (max(1, hands.get(name, 0)) - len(free))
            heapq.heapify(free)
        for job in queued:
            self._add(job)
        numbers = Counter(map(_system, queued))
        self._each = {name: (max(free) - now) / max(1, numbers[name]) for name, free in self._free.items()}
        """Mean seconds from one end to the next, for what stands behind these."""

    def left(self, job: Job, now: float) -> float | None:
        """Seconds until a queued job is done; None while the queue is paused, and when nothing is known of its system."""
        if self.paused:
            return None
        if job.id not in self._ends:
            beyond = (job.position or 0) - self._known
            if self._known >= LINE and beyond > 0:
                free = self._free.get(_system(job))
                return None if not free else max(free) - now + beyond * self._each[_system(job)]
            self._add(job)  # it came since, behind all others
        end = self._ends.get(job.id)
        return None if end is None else max(0.0, end - now)

    def _add(self, job: Job) -> None:
        name = _system(job)
        if name not in self.paces or name not in self.systems:
            return
        took = self.paces[name].takes(work_of(job, self.systems[name]))
        if took is not None:
            self._ends[job.id] = end = self._free[name][0] + sum(took)
            heapq.heapreplace(self._free[name], end)


def _at(units: float, points: Sequence[tuple[float, float]]) -> float:
    """What a line through points (units, seconds), the newest last, says of these units.

    By least squares of relative errors; newer points, and those of about as many units, count more. Neither end may be
    negative. What stands at zero units is held near zero: where all points are of one kind, as they are on most servers, the
    line goes through the origin.
    """
    sums = [0.0] * 5
    for age, (x, y) in enumerate(reversed(points)):
        alike = 1 / (1 + NEAR * math.log(x / units) ** 2)
        weight = alike * FADE**age / max(y, SHORTEST) ** 2
        for place, term in enumerate((1.0, x, y, x * x, x * y)):
            sums[place] += weight * term
    one, x, y, xx, xy = sums
    held = one * (1 + HELD)
    base = (y * xx - x * xy) / (held * xx - x * x)
    slope = (held * xy - x * y) / (held * xx - x * x)
    if base < 0:
        return units * xy / xx
    return base + units * slope if slope > 0 else y / one


def _system(job: Job) -> str:
    return str(job.request.get("system"))
