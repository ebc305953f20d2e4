"""The words of the serving room: what a job is and what the job store answers. Plain values; a dict holds JSON only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

State = Literal["queued", "in_progress", "completed", "failed"]
"""The four states of the wire. A cancelled job is `failed` with the error code "cancelled"."""

KEYS = "key"
"""The collection of the documents of API keys, whose ids are the owners of what they make."""

Total = Literal["attempts", "leases_lost", "steps", "signed", "out_of_memory"]
"""What is counted for as long as a job store lives: claims; leases that ran out; steps of the solver; files that got
credentials; tries for which the memory did not suffice."""
TOTALS: tuple[Total, ...] = get_args(Total)


@dataclass(frozen=True)
class Asset:
    """A content file. `id` is the sha256 of its bytes in hex, `media` its MIME type, `bytes` its size.

    `role` says what it is for: video, thumbnail, spritesheet, preview, input, file, image or journal.
    """

    id: str
    role: str
    media: str
    bytes: int


@dataclass(frozen=True)
class Job:
    """One film to make, or made. Times are unix seconds.

    `id` is "video_" or "image_" and 26 of [0-9a-z]; `owner` is the id of a key, "local" without keys. `progress` is 0 to
    100, never falls while the job is made, and is 100 only when completed. `attempt` counts the claims so far and is the
    fencing token. `error` is {"code", "message"}. `result` is what the worker says of the film. `parent` is the job it was
    made from. `cancelled` says that someone asked to stop it. `position` is the place in the queue, 1 is next; None unless
    queued. `request_id` and `traceparent` are those of the HTTP request that made it, where there were any.
    """

    id: str
    owner: str
    state: State
    progress: int
    request: dict[str, Any]
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    attempt: int
    error: dict[str, Any] | None
    outputs: tuple[Asset, ...]
    result: dict[str, Any]
    parent: str | None
    cancelled: bool
    position: int | None
    request_id: str | None
    traceparent: str | None


@dataclass(frozen=True)
class Claim:
    """A worker's right to one job until `lease_until` (unix seconds); each heartbeat moves that on."""

    job: Job
    worker: str
    attempt: int
    lease_until: float


@dataclass(frozen=True)
class Signal:
    """The answer to a heartbeat. `lost`: the job is no longer this worker's; `cancelled`: nobody wants it. Both mean stop."""

    lost: bool
    cancelled: bool


@dataclass(frozen=True)
class Page:
    """A page of jobs, and whether there are more behind it."""

    jobs: tuple[Job, ...]
    has_more: bool


class QueueFull(Exception):  # noqa: N818  an answer, not a defect: HTTP 429
    """The queue holds as many jobs as it may; try again in `retry_after` seconds, 1 to 60."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full, try again in {retry_after} s")
        self.retry_after = retry_after


class StorageFull(Exception):  # noqa: N818  an answer, not a defect: HTTP 503
    """The disk is full or cannot be written. Nothing was half-written; the same call works once there is room."""


class KeyConflict(Exception):  # noqa: N818  an answer, not a defect: HTTP 409
    """The idempotency key was used before with another request."""
