"""Figures of the running server as Prometheus text. Labels are routes, states and reasons: never an id, a key or a prompt."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tubelet.serve.records import Total

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_SERIES = 512
"""Series of one figure. More than that means that a label is no longer a small set: the rest is counted as "other"."""
REQUEST_SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
RENDER_SECONDS = (0.5, 2.0, 5.0, 15.0, 60.0, 300.0, 1800.0)
# What labels are known to say.
STAGES = ("text", "denoise", "decode", "encode", "look", "mark", "sign", "store", "all")
FAILURES = (
    "cancelled",
    "file_damaged",
    "invalid_request",
    "moderation_blocked",
    "moderation_unavailable",
    "out_of_memory",
    "render_failed",
    "worker_crashed",
)
REFUSALS = (
    "draining",
    "insufficient_quota",
    "internal_error",
    "queue_full",
    "rate_limit_exceeded",
    "request_timeout",
    "storage_full",
    "too_many_connections",
)

Labels = tuple[str, ...]


@dataclass
class Figure:
    """One named figure. `labels` are the label names; `buckets` make it a histogram, `kind` is counter or gauge otherwise.

    Series of `known` label values are there from the start, as 0; what rises from nothing to 1 is no increase to Prometheus.
    """

    name: str
    help: str
    kind: str = "counter"
    labels: Labels = ()
    buckets: tuple[float, ...] = ()
    known: Sequence[Labels] = ()
    values: dict[Labels, float] = field(default_factory=dict)
    seen: dict[Labels, list[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        for values in self.known:
            self.values[values] = 0.0
            self.seen[values] = [0] * (len(self.buckets) + 1)

    def _key(self, values: Labels) -> Labels:
        if values in self.values or len(self.values) < MAX_SERIES:
            return values
        return ("other",) * len(values)

    def add(self, *values: str, by: float = 1.0) -> None:
        """Count, under these label values."""
        with self.lock:
            key = self._key(values)
            self.values[key] = self.values.get(key, 0.0) + by

    def set(self, *values: str, to: float) -> None:
        """Set a gauge, or a counter that is kept elsewhere."""
        with self.lock:
            self.values[self._key(values)] = to

    def forget(self) -> None:
        """Say nothing: what was known is no longer so."""
        with self.lock:
            self.values.clear()

    def observe(self, *values: str, seconds: float) -> None:
        """One observation of a histogram."""
        with self.lock:
            key = self._key(values)
            self.values[key] = self.values.get(key, 0.0) + seconds
            counts = self.seen.setdefault(key, [0] * (len(self.buckets) + 1))
            for place, bound in enumerate((*self.buckets, float("inf"))):
                counts[place] += seconds <= bound

    def lines(self) -> Iterable[str]:
        """The figure in the exposition format."""
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {'histogram' if self.buckets else self.kind}"
        with self.lock:
            values, seen = dict(self.values), {key: list(counts) for key, counts in self.seen.items()}
        for key, value in sorted(values.items()):
            if not self.buckets:
                yield f"{self.name}{_written(self.labels, key)} {value:.10g}"
                continue
            for bound, count in zip((*(f"{b:g}" for b in self.buckets), "+Inf"), seen[key], strict=True):
                yield f"{self.name}_bucket{_written((*self.labels, 'le'), (*key, bound))} {count}"
            yield f"{self.name}_sum{_written(self.labels, key)} {value:.10g}"
            yield f"{self.name}_count{_written(self.labels, key)} {seen[key][-1]}"


def _written(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    plain = (value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for value in values)
    return "{" + ",".join(f'{name}="{value}"' for name, value in zip(names, plain, strict=True)) + "}"


@dataclass(frozen=True)
class Stock:
    """What the job store and the disk hold at one moment, the same for every process on them.

    `jobs`: how many by state; `oldest`: seconds that the oldest queued one has waited; `totals`: what was counted so far;
    `workers`: how many are alive, `memory`: the most bytes that one of these has held; `stored`: bytes of the assets.
    """

    jobs: Mapping[str, int]
    oldest: float
    totals: Mapping[Total, int]
    workers: int
    memory: int
    stored: int


class Metrics:
    """Every figure of the page, each by its name there without `tubelet_`. None of them names a job, a key or a worker."""

    def __init__(self) -> None:
        asked = ("method", "route", "status")
        ends = (("completed", ""), *(("failed", code) for code in FAILURES))
        self.requests = Figure("tubelet_http_requests_total", "Answers, by route and status.", labels=asked)
        self.latency = Figure("tubelet_http_request_seconds", "Time to answer.", labels=("route",), buckets=REQUEST_SECONDS)
        self.rejected = Figure(
            "tubelet_rejected_total", "Requests that were refused, by error code.", labels=("reason",), known=_each(REFUSALS)
        )
        self.deduped = Figure(
            "tubelet_retries_deduped_total", "Client retries that got the job they had already made.", known=[()]
        )
        self.finished = Figure(
            "tubelet_jobs_finished_total", "Jobs that ended, by status and code.", labels=("status", "code"), known=ends
        )
        self.waited = Figure(
            "tubelet_queue_wait_seconds", "Time from asking to the first start of work.", buckets=RENDER_SECONDS, known=[()]
        )
        self.rendered = Figure(
            "tubelet_render_seconds",
            "Time of work on what was completed, by stage.",
            labels=("stage",),
            buckets=RENDER_SECONDS,
            known=_each(STAGES),
        )
        self.attempts = Figure("tubelet_attempts_total", "Times that a worker took a job.")
        self.leases_lost = Figure("tubelet_leases_lost_total", "Times that a worker was taken for dead at a job.")
        self.steps = Figure("tubelet_steps_total", "Steps of the solver, those that a journal gave included.")
        self.out_of_memory = Figure("tubelet_out_of_memory_total", "Tries for which the memory did not suffice.")
        self.signed = Figure("tubelet_provenance_signed_total", "Files that got signed credentials.")
        self.deliveries = Figure(
            "tubelet_webhook_deliveries_total",
            "Tries to deliver a webhook.",
            labels=("result",),
            known=_each(("delivered", "failed", "given_up", "dropped")),
        )
        self.listeners = Figure("tubelet_event_streams", "Open event streams.", kind="gauge")
        self.database = Figure("tubelet_database_up", "1 where the job store can be read, else 0.", kind="gauge")
        self.jobs = Figure("tubelet_jobs", "Jobs, by state; the queued ones are the queue's depth.", "gauge", ("state",))
        self.oldest = Figure("tubelet_oldest_queued_seconds", "Age of the job that has waited longest.", kind="gauge")
        self.workers = Figure("tubelet_workers_up", "Workers heard of in the last 20 seconds.", kind="gauge")
        self.memory = Figure("tubelet_worker_memory_bytes", "The most that a worker of these has held at once.", kind="gauge")
        self.stored = Figure("tubelet_storage_bytes", "What the assets take, up to a minute ago.", kind="gauge")
        self.free = Figure("tubelet_storage_free_bytes", "Room on the disk of the assets.", kind="gauge")

    def figures(self) -> list[Figure]:
        """All of them, in the order of the page."""
        return [value for value in vars(self).values() if isinstance(value, Figure)]

    def told(self, facts: Mapping[str, Any]) -> None:
        """Count an event of the job store: a first start, or an end."""
        kind = facts["type"]
        if kind == "video.in_progress" and facts["attempt"] == 1:
            self.waited.observe(seconds=max(0.0, facts["at"] - facts["created_at"]))
        elif kind in ("video.completed", "video.failed"):
            self.finished.add(facts["state"], str((facts["error"] or {}).get("code", "")))

    def measure(self, stock: Stock | None, free: int, listeners: int) -> None:
        """Take over what is read when somebody asks. `stock` is None where the job store cannot be read: then the page says
        nothing of what stands in it."""
        self.free.set(to=free)
        self.listeners.set(to=listeners)
        self.database.set(to=float(stock is not None))
        counted: dict[Total, Figure] = {
            "attempts": self.attempts,
            "leases_lost": self.leases_lost,
            "steps": self.steps,
            "signed": self.signed,
            "out_of_memory": self.out_of_memory,
        }
        if stock is None:
            for figure in (*counted.values(), self.jobs, self.oldest, self.workers, self.memory, self.stored):
                figure.forget()
            return
        for name, figure in counted.items():
            figure.set(to=stock.totals[name])
        for state, count in stock.jobs.items():
            self.jobs.set(state, to=count)
        self.oldest.set(to=stock.oldest)
        self.workers.set(to=stock.workers)
        self.memory.set(to=stock.memory)
        self.stored.set(to=stock.stored)

    def page(self) -> str:
        """The whole page."""
        return "\n".join(line for figure in self.figures() for line in figure.lines()) + "\n"


def _each(values: Sequence[str]) -> list[Labels]:
    return [(value,) for value in values]
