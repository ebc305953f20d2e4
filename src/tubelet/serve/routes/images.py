"""Pictures: films of one frame, answered when they are there."""

from __future__ import annotations

import asyncio
import base64
import time

from fastapi import Request

from tubelet.serve.auth import Caller
from tubelet.serve.errors import ApiError, invalid, not_found
from tubelet.serve.openapi import operations, takes
from tubelet.serve.records import Job
from tubelet.serve.schemas import Image, ImageCreate, Images
from tubelet.serve.service import Body, Maker, Room, Service
from tubelet.serve.submit import Prepared, blank, drawn, read_as, submit, system_of
from tubelet.serve.view import size_of, written

router = operations("images")
LONGEST_WAIT = 540.0
"""Seconds; clients give up after 600."""
GLANCE = 1.0
"""Seconds between two looks whether the client still waits."""


@router.post("/v1/images/generations", response_model=Images, openapi_extra=takes(ImageCreate))
async def create_images(room: Room, caller: Maker, fields: Body, request: Request) -> Images:
    """Make pictures from words, and answer when they are there. They are not kept."""
    if fields.get("stream") in (True, "true"):
        raise invalid("This server sends pictures whole; leave 'stream' out.", "stream", "unsupported_value")
    asked = read_as(ImageCreate, fields)
    model, system = system_of(room, asked.model)

    async def prepare() -> Prepared:
        height, width = asked.size or system.size
        wish = {"prompt": asked.prompt, "seed": drawn(asked.seed), "steps": asked.steps, "guidance": asked.guidance}
        more = {"expand": asked.expand, "size": [height, width], "frames": 1, "n": asked.n, "format": asked.output_format}
        return Prepared(blank("image", model, system) | wish | more)

    job = await submit(room, request, caller, "image", fields, prepare, kind="image")
    job = await _ended(room, caller, request, job)
    if job.state == "failed":
        error = job.error or {}
        said, code = str(error.get("message", "The picture failed.")), str(error.get("code", "failed"))
        raise ApiError(500, said, code=code, headers={"x-should-retry": "false"})
    text = job.result.get("text")
    data = [Image(b64_json=await room.read(_encoded, room, asset.id), revised_prompt=text) for asset in job.outputs]
    return Images(
        created=int(job.created_at),
        data=data,
        output_format=asked.output_format,
        size=written(size_of(job)),
        seed=job.request.get("seed"),
    )


async def _ended(room: Service, caller: Caller, request: Request, job: Job) -> Job:
    """The job when it has ended. A client that goes takes its job along: nobody else could fetch the pictures."""
    until = time.monotonic() + LONGEST_WAIT
    with room.feed.listening():
        while job.state in ("queued", "in_progress"):
            mark = room.feed.latest
            latest = await room.read(room.jobs.get, job.id, caller.owner)
            if latest is None:
                raise not_found("image")
            job = latest
            if job.state in ("queued", "in_progress"):
                if await request.is_disconnected():
                    await room.write(room.jobs.cancel, job.id, caller.owner)
                    raise ApiError(499, "The client is gone.", code="client_gone")
                if time.monotonic() > until or room.draining:
                    raise ApiError(503, "The pictures take too long; try again.", code="too_slow", retry_after=30)
                if not await room.feed.later(mark, GLANCE):
                    await asyncio.sleep(0)
    return job


def _encoded(room: Service, id: str) -> str:
    path = room.store.path(id)
    if path is None:
        raise not_found("image")
    return base64.b64encode(path.read_bytes()).decode()
