"""What a trial says, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One line of the table: `value` in `unit`; where there is a goal, whether it was held."""

    name: str
    value: float
    unit: str = ""
    goal: str = ""
    held: bool | None = None


@dataclass(frozen=True)
class Settings:
    """How large the trials are. `folder` is theirs to fill."""

    folder: Path
    minutes: float = 60.0
    """Of the watch for leaks."""
    rounds: int = 500
    """Of kills."""
    stopped: int = 50
    """Workers that are stopped for longer than their lease."""
    lost: int = 5
    """Workers that are killed while another looks on."""
    cancels: int = 100
    """Films that nobody wants any more."""
    updates: int = 20
    """Kills of a process that brings an older store up to date."""
    creates: int = 1000
    """Requests at once."""
    cap: int = 100
    """Of the queue that they want into."""
    queued: int = 10_000
    """Jobs that wait."""
    fills: int = 10
    """Rounds of filling the disk."""
    stalled: int = 200
    """Clients that stop in the middle of a request."""
    restarts: int = 50
    """Of a server with clients."""
    estimated: int = 20
    """Films whose told end is compared with their end."""
    faults: int = 3
    """Films of each kind that break what makes them."""
    cuts: int = 200
    """Answers of the denoiser at which the maker of a film is killed."""
    paged: int = 500
    """Films that come, and as many that go, while a list is read."""
    hooked: int = 20
    """Films whose end is told to a receiver that often fails."""
    killed: int = 5
    """Kills of the server that tells it."""
    resumes: int = 20
    """Steps at which each kind of training is stopped."""
    torn: int = 100
    """Kills of a process that writes checkpoints."""
    records: int = 10_000
    """Of a data set whose bytes are changed."""
    damages: int = 20
    """Times that half of its records are."""
    wild: int = 100
    """Steps whose loss or gradient is not finite."""
    fuzz: float = 30.0
    """Minutes of fuzzing, of all targets together."""


class Skipped(Exception):  # noqa: N818  not a defect
    """This trial needs what is not here, and what."""


def exactly(name: str, value: float, goal: float, unit: str = "") -> Figure:
    """A figure that has to be `goal`."""
    return Figure(name, value, unit, f"= {goal:g}", value == goal)


def at_most(name: str, value: float, goal: float, unit: str = "") -> Figure:
    """A figure that has to be `goal` or less."""
    return Figure(name, value, unit, f"<= {goal:g}", value <= goal)


def percentile(values: list[float], share: float) -> float:
    """The value that a `share` of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
