"""The API process: routes, doors and background work, put together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.routing import Route

from tubelet.serve import animated, scrub
from tubelet.serve.config import ServeConfig
from tubelet.serve.errors import ApiError, install
from tubelet.serve.feed import Event, Feed
from tubelet.serve.guard import Guard
from tubelet.serve.inputs import FILES, expired, outlived
from tubelet.serve.journals import copies_of
from tubelet.serve.logs import log_failure
from tubelet.serve.metrics import Metrics
from tubelet.serve.openapi import describe
from tubelet.serve.outbound import Outbound
from tubelet.serve.records import Job, StorageFull
from tubelet.serve.routes import characters, files, images, keys, system, videos, webhooks
from tubelet.serve.scrub import Scrub
from tubelet.serve.service import Service
from tubelet.serve.webhooks import Deliveries

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs
    from tubelet.serve.store import Assets

PUBLIC = ("/healthz", "/readyz", "/openapi.json", "/v1/provenance/root.pem")
"""Routes that need no key, beside the studio's files."""
SWEEP, TIDY = 5.0, 600.0
"""Seconds between two looks for lost workers, and between two rounds of tidying."""
IMAGES_KEPT = 3600.0
"""Seconds that pictures are kept for a client's retry."""
_KINDS = {
    ".css": "text/css",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}


def create_app(jobs: Jobs, store: Assets, config: ServeConfig) -> FastAPI:
    """The application. `app.state.service` is what its routes share; call its `drain` when the process is asked to stop."""
    app = FastAPI(title="tubelet", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan, redirect_slashes=False)
    metrics = Metrics()

    async def seen(events: list[Event]) -> None:
        await _observe(app.state.service, events)

    app.state.service = Service(
        jobs=jobs,
        store=store,
        config=config,
        metrics=metrics,
        outbound=Outbound(loopback=config.webhooks_to_loopback),
        feed=Feed(jobs, config.poll, seen),
    )
    for module in (characters, videos, images, files, webhooks, keys, system):
        app.router.routes.extend(module.router.routes)
    app.router.routes.extend(_studio(config.studio))
    install(app)
    app.add_middleware(Guard, config=config, metrics=metrics)
    app.openapi = functools.cache(functools.partial(describe, app))
    return app


def _studio(folder: Path) -> list[Route]:
    """The studio's page and its files, each a route of its own: no path from a client is ever joined to a folder."""

    def page(path: Path) -> Any:
        async def answer(request: Any) -> Response:
            # Small files, of which nobody needs a part: the library would answer a broken range in words of its own.
            request.scope["headers"] = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
            named = path.name == "index.html"
            headers = {} if named else {"cache-control": "public, max-age=31536000, immutable"} if path.parent != folder else {}
            headers["accept-ranges"] = "none"
            return FileResponse(path, media_type=_KINDS.get(path.suffix, "application/octet-stream"), headers=headers)

        return answer

    async def missing(_request: Any) -> Response:
        raise ApiError(404, "The studio is not part of this installation; the API is under /v1.", code="not_found")

    index = folder / "index.html"
    routes = [Route("/", page(index) if index.is_file() else missing, methods=["GET"], include_in_schema=False)]
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file() and not path.is_symlink() and path.suffix in _KINDS:
            place = f"/{path.relative_to(folder).as_posix()}"
            routes.append(Route(place, page(path), methods=["GET"], include_in_schema=False))
    return routes


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    room: Service = app.state.service
    deliveries = Deliveries(room.jobs, room.outbound, room.metrics)
    room.outbox_changed = deliveries.woken.set
    with contextlib.suppress(StorageFull):
        await room.read(room.recall)
    work = [room.feed.run(), deliveries.run(), _every(SWEEP, room, _sweep), _every(TIDY, room, _tidy)]
    work.append(_every(scrub.PAUSE, Scrub(room.jobs, room.store), Scrub.scrub))
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        yield
    finally:
        room.drain()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _every(seconds: float, about: Any, work: Any) -> None:
    """Do something now and again for as long as the process runs. What fails is tried again next time."""
    while True:
        try:
            await anyio.to_thread.run_sync(work, about)
        except Exception as error:  # noqa: BLE001  one failed round must not end all further ones
            log_failure(work.__name__.strip("_"), error)
        await asyncio.sleep(seconds)


def _sweep(room: Service) -> None:
    """Notice workers that are gone even when no other worker asks."""
    room.jobs.sweep()


def _tidy(room: Service) -> None:
    """Delete films and files that have expired, pictures that were handed out, and what nothing names."""
    over = []
    for kind in ("video", "image"):
        for job in _all(room, kind):
            ended = job.completed_at if job.state in ("completed", "failed") else None
            if expired(job) or (kind == "image" and ended is not None and ended < time.time() - IMAGES_KEPT):
                over.append(job.id)
    room.delete_all(over, None)
    files = [document for document in room.jobs.all(FILES, None) if outlived(document)]
    for document in files:
        room.jobs.drop(FILES, document["id"], None)
    room.wipe(name for document in files for name in (document["asset"], document["credentials"]) if name)
    room.store.sweep(room.jobs.referenced())
    animated.tidy(room.config.data)
    copies_of(room.store).tidy(room.jobs)


def _all(room: Service, kind: str) -> Any:
    after = None
    while True:
        try:
            page = room.jobs.page(None, after=after, limit=100, order="asc", kind=kind)
        except LookupError:
            return
        yield from page.jobs
        if not page.has_more:
            return
        after = page.jobs[-1].id


async def _observe(room: Service, events: list[Event]) -> None:
    """Count what ended, and learn how long films take."""
    for _, id, facts in events:
        room.metrics.told(facts)
        if facts["type"] in ("video.completed", "video.failed"):
            room.outbox_changed()
        if facts["type"] == "video.completed":
            job = await room.read(room.jobs.get, id, None)
            if job is not None:
                _time(room, job)


def _time(room: Service, job: Job) -> None:
    if job.started_at is None or job.completed_at is None:
        return
    spent = max(0.0, job.completed_at - job.started_at)
    for stage, seconds in {**job.result.get("timings", {}), "all": spent}.items():
        if isinstance(seconds, (int, float)):
            room.metrics.rendered.observe(str(stage), seconds=seconds)
    room.learn(job)
