"""What tests of the job store share: a clock that is moved by hand, and short words for long calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tubelet.core.errors import UserError
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Asset, Claim, Job, KeyConflict, QueueFull, StorageFull

FILM = Asset("a" * 64, "video", "video/mp4", 1000)
PREVIEW = Asset("b" * 64, "preview", "image/webp", 10)
CANARY = "a very secret heron wades through the shallows"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.25

    def __call__(self) -> float:
        return self.now


def new(store: Jobs, prompt: str = "a red ball", **more: Any) -> Job:
    job, is_new = store.create({"prompt": prompt}, **more)
    assert is_new
    return job


def claimed(store: Jobs, worker: str = "one") -> Claim:
    claim = store.claim(worker)
    assert claim is not None
    return claim


def now(store: Jobs, job: Job) -> Job:
    found = store.get(job.id, None)
    assert found is not None
    return found


def code(store: Jobs, job: Job) -> str | None:
    error = now(store, job).error
    return None if error is None else error["code"]


def types(store: Jobs, job: Job) -> list[str]:
    return [facts["type"].removeprefix("video.") for _, _, facts in store.events(job=job.id)]


def at_once(number: int, call: Callable[[int], Any]) -> list[Any]:
    """`call(0)` to `call(number - 1)`, all at the same time; what each gave or raised."""
    barrier = threading.Barrier(number)

    def one(index: int) -> Any:
        barrier.wait()
        try:
            return call(index)
        except (QueueFull, KeyConflict, StorageFull, UserError) as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))
