"""A job as the wire shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tubelet.serve.answers import Video, VideoError
from tubelet.serve.records import Job

SOONEST, LATEST = 250, 5000
"""Milliseconds between two polls."""


def length_of(job: Job) -> float:
    """Seconds of the whole film, as asked for, or as it turned out where nobody asked."""
    source = (job.request.get("source") or {}).get("seconds") or 0.0
    asked = job.request.get("seconds")
    if task_of(job) in ("extend", "connect"):
        return source + (asked or 0.0)
    return asked or job.result.get("seconds") or source


def size_of(job: Job) -> tuple[int, int] | None:
    """(height, width) of the film, as asked for, or as it turned out where nobody asked."""
    for size in (job.request.get("size"), job.result.get("size"), (job.request.get("source") or {}).get("size")):
        if size:
            return int(size[0]), int(size[1])
    return None


def task_of(job: Job) -> str:
    """What is done: the job's task, or what becomes of its two films."""
    return str(job.request.get("mode") or job.request.get("task", "create"))


def written(size: Any) -> str | None:
    """WIDTHxHEIGHT of (height, width)."""
    return f"{size[1]}x{size[0]}" if size else None


def poll_after_ms(eta: int | None) -> int:
    """How long a client should wait before it asks again. It keeps the first answer: this aims at some ten questions a film."""
    return 1000 if eta is None else min(max(SOONEST, eta // 10), LATEST)


def video_of(job: Job, eta: int | None = None) -> Video:
    """The Video object of a job."""
    asked, made = job.request, job.result
    done = job.state == "completed"
    return Video(
        id=job.id,
        created_at=int(job.created_at),
        completed_at=_whole(job.completed_at) if job.state in ("completed", "failed") else None,
        expires_at=_whole(job.expires_at),
        model=str(asked.get("model", "")),
        progress=100 if done else min(job.progress, 99),
        prompt=asked.get("prompt"),
        remixed_from_video_id=job.parent if asked.get("task") == "remix" else None,
        seconds=f"{length_of(job):g}",
        size=written(size_of(job)) or "",
        status=job.state,
        error=_error(job.error) if job.state == "failed" else None,
        seed=asked.get("seed"),
        fps=made.get("fps"),
        num_frames=made.get("frames"),
        rendered_size=written(made.get("rendered")),
        queue_position=job.position,
        eta_ms=eta,
        parent_id=job.parent,
        task=task_of(job),
        text=made["text"] if isinstance(made.get("text"), str) else asked.get("text"),
        preview=any(asset.role == "preview" for asset in job.outputs),
        loop=bool(asked.get("loop")),
        steps=asked.get("steps"),
        guidance=asked.get("guidance"),
        strength=asked.get("strength"),
        expand=bool(asked.get("expand", True)),
        shots=asked.get("shots"),
        spritesheet=made.get("spritesheet"),
        unused=made.get("unused", []),
    )


def _error(error: Mapping[str, Any] | None) -> VideoError:
    error = error or {}
    return VideoError(code=str(error.get("code", "failed")), message=str(error.get("message", "The job failed.")))


def _whole(at: float | None) -> int | None:
    return None if at is None else int(at)
