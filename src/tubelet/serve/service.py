"""What the routes share: the job store, the assets, and how a request becomes a job."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import Depends, Request

from tubelet.serve import animated
from tubelet.serve.auth import Access, Allowance, Caller
from tubelet.serve.config import ServeConfig
from tubelet.serve.errors import ApiError
from tubelet.serve.estimate import LINE, REMEMBERED, Pace, Timetable, work_of
from tubelet.serve.feed import Feed
from tubelet.serve.journals import copies_of
from tubelet.serve.logs import log_failure
from tubelet.serve.metrics import Metrics, Stock
from tubelet.serve.outbound import Outbound
from tubelet.serve.records import Asset, Job, StorageFull
from tubelet.serve.requests import Fields, read_fields
from tubelet.serve.retries import Refusals

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs
    from tubelet.serve.provenance import Signer
    from tubelet.serve.store import Assets

T = TypeVar("T")

EXPLICIT_WINDOW = 86400.0
"""Seconds that an Idempotency-Key is remembered."""
RETRY_WINDOW = 120.0
"""Seconds within which a client's own retry gets the job of its first try."""
ALIVE = 20.0
"""Seconds after which a silent worker counts as gone."""
PROBED, WEIGHED = 1.0, 60.0
"""Seconds for which it is taken to be so that the database takes what is written and the queue stands so, and that the assets
are so large."""
_KEY = re.compile(r"(?! )[\x20-\x7e]{1,255}(?<! )")
_COUNT = re.compile(r"[0-9]{1,4}")


@dataclass
class Turn:
    """Requests that are the same and wait for each other."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


@dataclass
class Service:
    """One running API process."""

    jobs: Jobs
    store: Assets
    config: ServeConfig
    metrics: Metrics
    outbound: Outbound
    feed: Feed
    allowance: Allowance = field(default_factory=Allowance)
    draining: bool = False
    """No new jobs are taken: the process is about to end."""
    readers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(32), repr=False)
    writers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(8), repr=False)
    decoders: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(4), repr=False)
    """Threads for uploads, apart from the others, so that decoding never holds up a poll."""
    askers: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(32), repr=False)
    """Threads that wait for another server."""
    writers_of_captions: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(8), repr=False)
    """Threads that wait for a chat model, which may take half a minute: they must not hold up the others."""
    animators: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1), repr=False)
    """Animated pictures that are made from films at once."""
    wipes: threading.Lock = field(default_factory=threading.Lock, repr=False)
    underway: dict[str, Turn] = field(default_factory=dict, repr=False)
    refused: Refusals = field(default_factory=lambda: Refusals(RETRY_WINDOW), repr=False)
    outbox_changed: Callable[[], None] = field(default=lambda: None, repr=False)
    """Called when a job ended: there may be webhooks to deliver."""
    began: float = field(default_factory=time.time)
    """Unix seconds. A worker that nobody has heard of since may have died with the process before this one."""
    paces: dict[str, Pace] = field(default_factory=dict)
    """What films took of late, by system."""
    _timetable: Timetable | None = field(default=None, repr=False)
    _probed: tuple[float, bool] = field(default=(-math.inf, False), repr=False)
    _weighed: tuple[float, int] = field(default=(-math.inf, 0), repr=False)

    def drain(self) -> None:
        """Take no new jobs and end the event streams; call it when the process is asked to stop."""
        self.draining = True
        self.feed.stop()

    async def read(self, work: Callable[..., T], *args: Any, **more: Any) -> T:
        """Run a call that waits for the disk in a thread."""
        return await anyio.to_thread.run_sync(functools.partial(work, *args, **more), limiter=self.readers)

    async def write(self, work: Callable[..., T], *args: Any, **more: Any) -> T:
        """Run a call that writes in a thread; what it did is seen by listeners at once."""
        done = await anyio.to_thread.run_sync(functools.partial(work, *args, **more), limiter=self.writers)
        self.feed.nudge()
        return done

    async def decode(self, work: Callable[..., T], *args: Any, **more: Any) -> T:
        """Run a call that takes an upload apart in a thread."""
        return await anyio.to_thread.run_sync(functools.partial(work, *args, **more), limiter=self.decoders)

    async def ask(self, work: Callable[..., T], *args: Any, **more: Any) -> T:
        """Run a call that waits for another server in a thread."""
        return await anyio.to_thread.run_sync(functools.partial(work, *args, **more), limiter=self.askers)

    @functools.cached_property
    def signer(self) -> Signer:
        """Reads and makes credentials. Opened at its first use, since that may write a certificate."""
        from tubelet.serve.provenance import Signer

        return Signer.open(self.config.data / "provenance", self.config.certificate, self.config.certificate_key)

    def refuse_if_draining(self) -> None:
        """Raises ApiError 503 when no new jobs are taken."""
        if self.draining:
            raise ApiError(503, "The server is about to stop; try again soon.", code="draining", retry_after=10)

    def workers(self) -> list[dict[str, Any]]:
        """What the workers that were heard of lately, since this process began, said of themselves. Before its system is loaded
        a worker says nothing."""
        since = max(self.began, time.time() - ALIVE)
        return [worker for worker in self.jobs.workers() if worker["seen"] > since]

    def learn(self, job: Job) -> None:
        """How long films of a system take, by one that is there."""
        system = self.config.systems.get(str(job.request.get("system")))
        if system is not None:
            self.paces.setdefault(system.name, Pace()).learn(job, work_of(job, system))

    def recall(self) -> None:
        """Learn of the last films of the process before this one."""
        for job in reversed(self.jobs.page(None, limit=REMEMBERED).jobs):
            if job.state == "completed":
                self.learn(job)

    async def left(self, job: Job) -> float | None:
        """Seconds until a film is there, as far as its progress, earlier films and those before it in the queue tell."""
        if job.state == "in_progress":
            name = str(job.request.get("system"))
            system, pace = self.config.systems.get(name), self.paces.get(name, Pace())
            return None if system is None else pace.left(job, work_of(job, system), time.time())
        if job.state != "queued":
            return None
        async with self.alone("timetable"):
            if self._timetable is None or time.time() - self._timetable.made_at > PROBED:
                self._timetable = await self.read(self._deal)
        return self._timetable.left(job, time.time())

    def _deal(self) -> Timetable:
        running, queued, paused = self.jobs.line(LINE)
        hands = Counter(str(worker.get("system")) for worker in self.workers())
        return Timetable(self.paces, self.config.systems, running, queued, hands, paused, time.time())

    def workers_alive(self) -> int:
        """Workers that were heard of lately."""
        return len(self.workers())

    async def writable(self) -> bool:
        """Whether the job store takes what is written, or did a second ago: whoever asks often makes it write no more often."""
        async with self.alone("probe"):
            if time.monotonic() - self._probed[0] > PROBED:
                good = True
                try:
                    await self.read(self.jobs.probe)
                except StorageFull:
                    good = False
                self._probed = time.monotonic(), good
            return self._probed[1]

    def stock(self) -> Stock | None:
        """What the job store and the disk hold now; None where the job store cannot be read."""
        try:
            counts, workers, totals = self.jobs.counts(), self.workers(), self.jobs.totals()
        except StorageFull:
            return None
        if time.monotonic() - self._weighed[0] > WEIGHED:
            used = self._weighed[1]
            with contextlib.suppress(StorageFull):  # an object store that does not answer: as much as before
                used = self.store.used()
            self._weighed = time.monotonic(), used
        oldest = counts.pop("oldest_queued_age")
        memory = max((worker.get("memory", 0) for worker in workers), default=0)
        return Stock(counts, oldest, totals, len(workers), memory, self._weighed[1])

    @contextlib.asynccontextmanager
    async def alone(self, name: str) -> AsyncIterator[None]:
        """One request of this name at a time: a retry waits for the try that it repeats."""
        turn = self.underway.setdefault(name, Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if turn.users == 0:
                self.underway.pop(name, None)

    def keep(self, assets: Iterable[tuple[Asset, bytes]]) -> None:
        """See that the files of a job that now exists are there: a film deleted meanwhile may have taken one that it shared."""
        for asset, data in assets:
            if self.store.size(asset.id) is None:
                self.store.put(data, asset.role, asset.media)

    def wipe(self, names: Iterable[str]) -> None:
        """Remove the files that nothing names any more. What cannot be removed now the sweeper takes."""
        names = list(names)
        if not names:  # to know what is named means to read every job
            return
        with self.wipes:
            named = self.jobs.referenced()
            for name in names:
                if name not in named:
                    try:
                        self.store.remove(name)
                    except (OSError, StorageFull) as error:
                        log_failure("wipe", error)

    def refuse_if_away(self) -> None:
        """Raises StorageFull when files cannot be removed now: who deletes hears of it while there is something to delete."""
        if not self.store.answers():
            raise StorageFull("the object store does not answer")

    def delete(self, id: str, owner: str | None) -> Job | None:
        """Wipe a job: its row, its request, its files and what its worker noted down. None when there is none."""
        gone = self.delete_all([id], owner)
        return gone[0] if gone else None

    def delete_all(self, ids: Iterable[str], owner: str | None) -> list[Job]:
        """Wipe jobs as `delete` does, with one look at what is still named; returns those that there were.

        Raises StorageFull.
        """
        gone: list[Job] = []
        self.refuse_if_away()
        try:
            for id in ids:
                job = self.jobs.delete(id, owner)
                gone += [] if job is None else [job]
        finally:
            self.wipe({name for job in gone for name in (*(asset.id for asset in job.outputs), *inputs_of(job))})
            for job in gone:
                shutil.rmtree(self.config.data / "journals" / job.id, ignore_errors=True)
                with contextlib.suppress(StorageFull):  # tidied later
                    copies_of(self.store).forget(job.id)
                animated.forget(self.config.data, job.id)
        return gone


def inputs_of(job: Job) -> Iterator[str]:
    """Ids of the files that a job's request names."""
    for entry in (*job.request.get("inputs", ()), *job.request.get("characters", ())):
        for name in ("asset", "credentials"):
            if isinstance(entry.get(name), str):
                yield entry[name]


def service_of(request: Request) -> Service:
    """The service behind a request."""
    return request.app.state.service


def idempotency_key(request: Request) -> str | None:
    """The client's key for this request, if it sent one. Raises ApiError when it is not 1 to 255 plain characters."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise ApiError(400, "An Idempotency-Key is 1 to 255 printable characters.", code="invalid_idempotency_key")
    return key


def retry_count(request: Request) -> int:
    """How often the client says that it has sent this request before."""
    count = request.headers.get("x-stainless-retry-count", "0")
    return int(count) if _COUNT.fullmatch(count) else 0


Room = Annotated[Service, Depends(service_of)]
Body = Annotated[Fields, Depends(read_fields)]
Reader = Annotated[Caller, Depends(Access("read"))]
Maker = Annotated[Caller, Depends(Access("create"))]
Admin = Annotated[Caller, Depends(Access("admin"))]
