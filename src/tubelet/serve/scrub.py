"""A second look at the films that are kept: a disk may lose bits, and then a file is not the one that was made."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tubelet.serve.logs import log_failure, say
from tubelet.serve.records import Asset, Job, StorageFull

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs
    from tubelet.serve.store import Assets

PAUSE = 60.0
"""Seconds between two rounds."""
ROUND = 256 * 2**20
"""Bytes that are read in a round, and one film more: some 390 GB a day, for less than a second's work a minute."""
REST = 86400.0
"""Seconds from the beginning of one look at all films to that of the next."""
PAGE = 100


class Scrub:
    """Goes through all finished films, oldest first, a round at a time, and has each damaged one say so.

    A file that is not there is none of its business: a folder that is not mounted would look like that.
    """

    def __init__(self, jobs: Jobs, store: Assets, clock: Callable[[], float] = time.monotonic) -> None:
        """The first round begins a pause from now: a server that starts has better things to do."""
        self._jobs, self._store, self._clock = jobs, store, clock
        self._after: str | None = None
        self._due = clock() + PAUSE

    def scrub(self) -> None:
        """One round. Raises StorageFull when the job store cannot be used; the next round goes on where this one ended."""
        if self._after is None:
            if self._clock() < self._due:
                return
            self._due = self._clock() + REST
        left = ROUND
        while left > 0:
            try:
                page = self._jobs.page(None, after=self._after, limit=PAGE, order="asc")
            except LookupError:  # the last one was deleted, long ago
                self._after = None
                return
            for job in page.jobs:
                left -= self._look(job)
                self._after = job.id
                if left <= 0:
                    return
            if not page.has_more:
                self._after = None
                return

    def _look(self, job: Job) -> int:
        """Bytes that there were to read."""
        if job.state != "completed":
            return 0
        damaged = {asset.id: asset.role for asset in job.outputs if self._damaged(asset)}
        if damaged and self._jobs.damage(job.id, damaged) is not None:
            say("file damaged", job=job.id, roles=sorted(damaged.values()))
        return sum(asset.bytes for asset in job.outputs)

    def _damaged(self, asset: Asset) -> bool:
        try:
            # Twice: a film that is deleted in between is none that was damaged.
            return not self._store.verify(asset) and self._store.size(asset.id) is not None and not self._store.verify(asset)
        except (OSError, StorageFull) as error:  # says nothing of the bytes
            log_failure("scrub", error)
            return False
