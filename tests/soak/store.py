"""The job store and what kills its processes, on SQLite and, where a server can be had, on PostgreSQL."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import full_disk
import postgres_server
from job_deaths import check, driven, notes, old_store, open_jobs, url_of
from tests.soak.figures import Figure, Settings, Skipped, at_most, exactly

from tubelet.serve.jobs import Jobs


def kills(settings: Settings) -> Iterator[Figure]:
    """A submitter and two workers, each round killed at random points (R1, R2)."""
    for kind, folder in _stores(settings, "kills"):
        begin = time.monotonic()
        driven("rounds", folder, settings.rounds, patience=60 + 30 * settings.rounds)
        took = time.monotonic() - begin
        jobs = open_jobs(folder)
        every = {job.id: job for job in check(folder, jobs)}
        jobs.close()
        acknowledged = [line.split()[1] for line in notes(folder, "acknowledged")]
        finished = notes(folder, "finished")
        numbers = sorted(job.request["number"] for job in every.values())
        named = {asset.id for job in every.values() for asset in job.outputs}
        yield Figure(f"{kind}/rounds", settings.rounds, f"of 3 kills, {took:.0f} s")
        yield Figure(f"{kind}/acknowledged", len(acknowledged), "jobs")
        yield exactly(f"{kind}/lost", sum(id not in every for id in acknowledged), 0, "acknowledged jobs")
        yield exactly(f"{kind}/twice", len(finished) - len(set(finished)), 0, "jobs completed twice")
        yield exactly(f"{kind}/doubled", len(numbers) - len(set(numbers)), 0, "wishes with two jobs")
        yield exactly(f"{kind}/unfinished", sum(job.state != "completed" for job in every.values()), 0, "jobs at the end")
        yield Figure(f"{kind}/again", sum(job.attempt > 1 for job in every.values()), "jobs rendered again")
        yield Figure(f"{kind}/orphans", len(list((folder / "assets").iterdir())) - len(named), "files for the sweeper")


def stops(settings: Settings) -> Iterator[Figure]:
    """Workers stopped for longer than their lease, which then go on (R2)."""
    for kind, folder in _stores(settings, "stops"):
        driven("stops", folder, settings.stopped)
        published = sum(line != "1 0 0" for line in notes(folder, "stale"))
        jobs = open_jobs(folder)
        check(folder, jobs)
        jobs.close()
        yield Figure(f"{kind}/stopped", settings.stopped, "workers")
        yield exactly(f"{kind}/published", published, 0, "of them published")


def lost(settings: Settings) -> Iterator[Figure]:
    """How soon a killed worker's job is another one's (R4)."""
    for kind, folder in _stores(settings, "lost"):
        driven("lost", folder, settings.lost)
        seconds = [float(line) for line in notes(folder, "noticed")]
        yield at_most(f"{kind}/noticed", max(seconds), 20, f"s at most of {len(seconds)}, {min(seconds):.1f} s at least")


def steps(settings: Settings) -> Iterator[Figure]:
    """An end of the process at each step of its storage (R1)."""
    driven("steps", settings.folder, patience=3600)
    opened, lived = (int(line) for line in notes(settings.folder, "steps"))
    yield Figure("opening", opened, "ends, each left a store that opens")
    yield Figure("life", lived, "ends, each left a consistent store")


def updates(settings: Settings) -> Iterator[Figure]:
    """A store of an older version with a long queue, whose update is ended at each step and killed at random moments (R14)."""
    for kind, folder in _stores(settings, "updates"):
        driven("upgrades", folder, settings.updates, settings.queued, patience=3600)
        stepped, killed = (line.split() for line in notes(folder, "upgrades"))
        for name, left in (("steps", stepped), ("kills", killed)):
            old = sum(version == min(stepped) for version in left)
            yield Figure(f"{kind}/{name}", len(left), f"ends: {old} left the old store whole, {len(left) - old} the new one")
        place = old_store(folder, "long", settings.queued)
        begin = time.monotonic()
        Jobs.open(url_of(place)).close()
        yield at_most(f"{kind}/seconds", time.monotonic() - begin, 5.0, f"s for {settings.queued} jobs")


def disk(settings: Settings) -> Iterator[Figure]:
    """A disk that is filled again and again, with a little more room each time (R7)."""
    try:
        refused = full_disk.on_a_small_disk(settings.folder, settings.fills)
    except full_disk.NoSmallDisk as none:
        raise Skipped(str(none)) from none
    yield Figure("fills", settings.fills * full_disk.PAGES, "times full, nothing lost, torn or half-written")
    for step in ("create", "claim", "heartbeat", "put", "finish"):
        yield Figure(f"refused/{step}", refused.get(step, 0), "times", "> 0", refused.get(step, 0) > 0)


def _stores(settings: Settings, name: str) -> Iterator[tuple[str, Path]]:
    """A folder for a driver, for each kind of store that there can be here."""
    with contextlib.ExitStack() as opened:
        kinds = ["sqlite"]
        with contextlib.suppress(postgres_server.Absent):
            server = opened.enter_context(postgres_server.running())
            kinds.append("postgresql")
        for kind in kinds:
            folder = settings.folder / f"{name} {kind}"
            folder.mkdir()
            if kind == "postgresql":
                (folder / "server").write_text(server)
                (folder / "url").write_text(postgres_server.new_schema(server))
            yield kind, folder
