"""Figures of the running server as Prometheus text. Labels are routes, states and reasons: never an id, a key or a prompt."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_SERIES = 512
"""Series of one figure. More than that means that a label is no longer a small set: the rest is counted as "other"."""
REQUEST_SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)
RENDER_SECONDS = (0.5, 2.0, 5.0, 15.0, 60.0, 300.0, 1800.0)

Labels = tuple[str, ...]


@dataclass
class Figure:
    """One named figure. `labels` are the label names; `buckets` make it a histogram, `kind` is counter or gauge otherwise."""

    name: str
    help: str
    kind: str = "counter"
    labels: Labels = ()
    buckets: tuple[float, ...] = ()
    values: dict[Labels, float] = field(default_factory=dict)
    seen: dict[Labels, list[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

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
        """Set a gauge."""
        with self.lock:
            self.values[self._key(values)] = to

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


class Metrics:
    """Every figure that the API process keeps, each by its name on the page without `tubelet_`."""

    def __init__(self) -> None:
        asked = ("method", "route", "status")
        self.requests = Figure("tubelet_http_requests_total", "Answers, by route and status.", labels=asked)
        self.latency = Figure("tubelet_http_request_seconds", "Time to answer.", labels=("route",), buckets=REQUEST_SECONDS)
        self.rejected = Figure("tubelet_rejected_total", "Requests that were refused, by error code.", labels=("reason",))
        self.deduped = Figure("tubelet_retries_deduped_total", "Client retries that got the job they had already made.")
        self.finished = Figure("tubelet_jobs_finished_total", "Jobs that ended, by status and code.", labels=("status", "code"))
        self.waited = Figure("tubelet_queue_wait_seconds", "Time from asking to the start of work.", buckets=RENDER_SECONDS)
        self.rendered = Figure("tubelet_render_seconds", "Time of work, by stage.", labels=("stage",), buckets=RENDER_SECONDS)
        self.deliveries = Figure("tubelet_webhook_deliveries_total", "Tries to deliver a webhook.", labels=("result",))
        self.listeners = Figure("tubelet_event_streams", "Open event streams.", kind="gauge")
        self.jobs = Figure("tubelet_jobs", "Jobs, by state.", kind="gauge", labels=("state",))
        self.oldest = Figure("tubelet_oldest_queued_seconds", "Age of the job that has waited longest.", kind="gauge")
        self.workers = Figure("tubelet_workers_up", "Workers heard of in the last 20 seconds.", kind="gauge")
        self.free = Figure("tubelet_storage_free_bytes", "Room on the disk of the assets.", kind="gauge")

    def figures(self) -> list[Figure]:
        """All of them, in the order of the page."""
        return [value for value in vars(self).values() if isinstance(value, Figure)]

    def measure(self, counts: Mapping[str, int], workers: int, free: int, listeners: int) -> None:
        """Take over the gauges that are read when somebody asks."""
        for state, count in counts.items():
            if state == "oldest_queued_age":
                self.oldest.set(to=count)
            else:
                self.jobs.set(state, to=count)
        self.workers.set(to=workers)
        self.free.set(to=free)
        self.listeners.set(to=listeners)

    def page(self) -> str:
        """The whole page."""
        return "\n".join(line for figure in self.figures() for line in figure.lines()) + "\n"
