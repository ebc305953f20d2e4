"""Which retries are those of requests that were refused: they ask for what was never made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

MOST = 10_000
"""Different requests of which this is remembered."""


@dataclass
class Refusals:
    """Requests that this process refused and told to come again, for `window` seconds each.

    Clients do not say whose retry theirs is, only which try it is. So the next try of a refused request is known by what it
    asks for and by its number, one more than that of the try that was refused.
    """

    window: float
    clock: Callable[[], float] = time.monotonic
    noted: dict[tuple[str, int], list[float]] = field(default_factory=dict, repr=False)

    def note(self, name: str, count: int) -> None:
        """Try number `count` of a request, 0 is the first, was refused. `name` says who asked for what."""
        self.noted[name, count + 1] = [*self._fresh(name, count + 1), self.clock()]  # the longest unchanged come first
        while len(self.noted) > MOST or self._over(next(iter(self.noted.values()))[-1]):
            del self.noted[next(iter(self.noted))]

    def take(self, name: str, count: int) -> bool:
        """Whether try number `count` is that of a request that was refused before, which is then forgotten."""
        times = self._fresh(name, count)
        if times[1:]:
            self.noted[name, count] = times[1:]
        return bool(times)

    def _fresh(self, name: str, count: int) -> list[float]:
        """When such tries were refused, those too long ago left out; they are noted no more."""
        return [time for time in self.noted.pop((name, count), []) if not self._over(time)]

    def _over(self, time: float) -> bool:
        return time <= self.clock() - self.window
