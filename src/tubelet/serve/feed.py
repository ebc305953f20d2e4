"""The event log, read once for all who listen in this process, and given out as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from tubelet.serve.logs import log_failure
from tubelet.serve.records import StorageFull

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs

Event = tuple[int, str, dict[str, Any]]
Seen = Callable[[list[Event]], Awaitable[None]]

IDLE = 1.0
"""Seconds between two looks while nobody listens."""
BATCH = 500
SILENCE = 15.0
"""Seconds after which a stream says that it is still there."""
ENDS = ("video.completed", "video.failed", "video.deleted")


class Feed:
    """Looks for new events every `poll` seconds and wakes those who wait; `seen` gets each batch once."""

    def __init__(self, jobs: Jobs, poll: float, seen: Seen) -> None:
        self.jobs, self.poll, self.seen = jobs, poll, seen
        self.latest = 0
        self.listeners = 0
        self.stopped = False
        self._changed = asyncio.Event()
        self._asked = asyncio.Event()

    async def run(self) -> None:
        """Read the log until cancelled. What fails is tried again: without this loop nobody would hear of anything."""
        begun = False
        while True:
            events: list[Event] = []
            try:
                if not begun:
                    self.latest = await anyio.to_thread.run_sync(self.jobs.last_event)
                    begun = True
                events = await anyio.to_thread.run_sync(self.jobs.events, self.latest, None, None, BATCH)
                if events:
                    self.latest = events[-1][0]
                    self._wake()
                    await self.seen(events)
            except StorageFull:
                pass
            except Exception as error:  # noqa: BLE001  see above
                log_failure("feed", error)
            if len(events) < BATCH:
                self._asked.clear()
                # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.poll if self.listeners else IDLE):
                        await self._asked.wait()

    def nudge(self) -> None:
        """Look now."""
        self._asked.set()

    def stop(self) -> None:
        """Let all streams end."""
        self.stopped = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def later(self, mark: int, patience: float) -> bool:
        """Wait for an event behind `mark`; False when none came within `patience` seconds or the feed was stopped."""
        if self.latest > mark:
            return True
        if self.stopped:
            return False
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await changed.wait()
        return self.latest > mark

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While somebody listens, the log is looked at more often."""
        self.listeners += 1
        self.nudge()
        try:
            yield
        finally:
            self.listeners -= 1

    async def stream(
        self,
        read: Callable[[int], Awaitable[list[Event]]],
        said: Callable[[str, dict[str, Any]], Awaitable[dict[str, Any] | None]],
        after: int,
        *,
        until_end: bool,
    ) -> AsyncIterator[str]:
        """Server-sent events behind sequence `after`.

        `read` gives those that the caller may see, `said` the data of one, or None to pass it over. `until_end`: the stream is
        over with the event that ends the job.
        """
        with self.listening():
            yield "retry: 2000\n\n"
            while not self.stopped:
                mark = self.latest
                events = await read(after)
                for sequence, job, facts in events:
                    after = sequence
                    data = await said(job, facts)
                    if data is not None:
                        text = json.dumps({**data, "sequence": sequence}, separators=(",", ":"))
                        yield f"id: {sequence}\ndata: {text}\n\n"
                    if until_end and facts.get("type") in ENDS:
                        return
                if len(events) < BATCH and not await self.later(mark, SILENCE):
                    yield ": still here\n\n"
