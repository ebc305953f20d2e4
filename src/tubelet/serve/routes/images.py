"""Pictures: films of one frame, answered when they are there, or in a stream that shows them become."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from anyio import CancelScope
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from tubelet.serve.answers import CompletedImage, Image, Images, PartialImage
from tubelet.serve.auth import Caller
from tubelet.serve.config import SystemFacts
from tubelet.serve.errors import ApiError, invalid, not_found, of
from tubelet.serve.feed import SILENCE
from tubelet.serve.inputs import Taken, take_mask, take_picture
from tubelet.serve.openapi import operations, takes
from tubelet.serve.records import Asset, Job, StorageFull
from tubelet.serve.schemas import GREATEST_PIXELS, GREATEST_SIDE, Depicting, Described, ImageCreate, ImageEdit, ImageVariation
from tubelet.serve.service import Body, Maker, Room, Service
from tubelet.serve.submit import Prepared, blank, drawn, read_as, submit, system_of
from tubelet.serve.view import size_of, written

router = operations("images")
LONGEST_WAIT = 540.0
"""Seconds; clients give up after 600."""
GLANCE = 1.0
"""Seconds between two looks whether the client still waits."""
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
Event = Literal["image_generation", "image_edit"]


@router.post("/v1/images/generations", response_model=Images, responses=STREAMED, openapi_extra=takes(ImageCreate))
async def create_images(room: Room, caller: Maker, fields: Body, request: Request) -> Images | Response:
    """Make pictures from words, and answer when they are there. They are not kept."""
    asked = read_as(ImageCreate, fields)
    _refuse_many(asked)
    model, system = system_of(room, asked.model)

    async def prepare() -> Prepared:
        return Prepared(_wish(asked, model, system, asked.size or system.size) | _words(asked))

    job = await submit(room, request, caller, "image", fields, prepare, kind="image")
    return await _answered(room, caller, request, job, asked, "image_generation")


@router.post("/v1/images/edits", response_model=Images, responses=STREAMED, openapi_extra=takes(ImageEdit))
async def edit_image(room: Room, caller: Maker, fields: Body, request: Request) -> Images | Response:
    """Change a picture by words: where the mask is transparent, or all over. What the mask keeps stays pixel by pixel."""
    asked = read_as(ImageEdit, fields)
    _refuse_many(asked)
    model, system = system_of(room, asked.model)
    if asked.mask is not None and asked.strength is not None:
        raise invalid("What a mask covers is made anew as a whole; leave out 'strength', or the mask.", "strength")

    async def prepare() -> Prepared:
        picture = await take_picture(room, caller, asked.image, "image")
        inputs, kept = [picture.entry("reference")], picture.kept
        if asked.mask is not None:
            mask = await take_mask(room, caller, asked.mask, "mask")
            _refuse_other_size(mask, picture)
            inputs, kept = [*inputs, mask.entry("mask")], kept + mask.kept
        wish = _wish(asked, model, system, _size(asked, picture)) | _words(asked)
        return Prepared(wish | {"inputs": inputs, "strength": asked.strength}, kept=kept)

    job = await submit(room, request, caller, "image edit", fields, prepare, kind="image")
    return await _answered(room, caller, request, job, asked, "image_edit")


@router.post("/v1/images/variations", response_model=Images, openapi_extra=takes(ImageVariation))
async def vary_image(room: Room, caller: Maker, fields: Body, request: Request) -> Images:
    """Make pictures like a picture, without words."""
    asked = read_as(ImageVariation, fields)
    model, system = system_of(room, asked.model)

    async def prepare() -> Prepared:
        picture = await take_picture(room, caller, asked.image, "image")
        wish = _wish(asked, model, system, _size(asked, picture))
        more = {"inputs": [picture.entry("reference")], "strength": asked.strength, "expand": False, "guidance": None}
        return Prepared(wish | more, kept=picture.kept)

    job = await submit(room, request, caller, "image variation", fields, prepare, kind="image")
    return await _whole(room, caller, request, job, asked)


def _wish(asked: Depicting, model: str, system: SystemFacts, size: tuple[int, int]) -> dict[str, Any]:
    wish = {"seed": drawn(asked.seed), "steps": asked.steps, "guidance": asked.guidance}
    return blank("image", model, system) | wish | {"size": list(size), "frames": 1, "n": asked.n, "format": asked.output_format}


def _size(asked: Depicting, picture: Taken) -> tuple[int, int]:
    """As asked for, else as large as the picture."""
    height, width = asked.size or picture.size
    if max(height, width) > GREATEST_SIDE or height * width > GREATEST_PIXELS:
        raise invalid("The picture is larger than any that is made here; say a 'size'.", "size")
    return height, width


def _words(asked: Described) -> dict[str, Any]:
    return {"prompt": asked.prompt, "expand": asked.expand}


def _refuse_other_size(mask: Taken, picture: Taken) -> None:
    if mask.size != picture.size:
        raise invalid(f"The mask is {written(mask.size)}, the picture {written(picture.size)}; make them the same.", "mask")


def _refuse_many(asked: Described) -> None:
    if asked.stream and asked.n != 1:
        raise invalid("A stream shows one picture; leave out 'n', or 'stream'.", "n")
    if asked.partial_images and not asked.stream:
        raise invalid("'partial_images' needs 'stream'.", "partial_images")


async def _answered(
    room: Service, caller: Caller, request: Request, job: Job, asked: Described, event: Event
) -> Images | Response:
    if not asked.stream:
        return await _whole(room, caller, request, job, asked)
    told = _told(room, caller, job, asked, event)
    return StreamingResponse(told, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


async def _whole(room: Service, caller: Caller, request: Request, job: Job, asked: Depicting) -> Images:
    """The pictures of a job when it has ended. A client that goes takes its job along: nobody else could fetch them."""
    async for latest in _followed(room, caller, job):
        job = latest
        if job.state in ("queued", "in_progress") and await request.is_disconnected():
            await room.write(room.jobs.cancel, job.id, caller.owner)
            raise ApiError(499, "The client is gone.", code="client_gone")
    _refuse_failed(job)
    data = [Image(b64_json=await room.ask(_encoded, room, a), revised_prompt=job.result.get("text")) for a in job.outputs]
    return Images(
        created=int(job.created_at),
        data=data,
        output_format=asked.output_format,
        size=written(size_of(job)),
        seed=job.request.get("seed"),
    )


async def _told(room: Service, caller: Caller, job: Job, asked: Described, event: Event) -> AsyncIterator[str]:
    """A job as server-sent events: looks at the picture as its worker shows them, then the picture, or an error."""
    shown: list[str] = []
    said = time.monotonic()
    try:
        async for latest in _followed(room, caller, job):
            job = latest
            look = next((asset for asset in job.outputs if asset.role == "preview"), None)
            if look is not None and look.id not in shown and len(shown) < (asked.partial_images or 0):
                picture = None
                with contextlib.suppress(ApiError, StorageFull):  # its worker removes it as soon as there is a newer one
                    picture = await room.ask(_encoded, room, look)
                if picture is not None:
                    kind = {"type": f"{event}.partial_image", "partial_image_index": len(shown)}
                    shown.append(look.id)
                    yield _line(PartialImage.model_validate(kind | _seen(job, picture)))
            if time.monotonic() - said > SILENCE:
                said = time.monotonic()
                yield ": still here\n\n"
        _refuse_failed(job)
        picture = await room.ask(_encoded, room, job.outputs[0])
        kind = {"type": f"{event}.completed", "output_format": asked.output_format}
        more = {"revised_prompt": job.result.get("text"), "seed": job.request.get("seed")}
        yield _line(CompletedImage.model_validate(kind | _seen(job, picture) | more))
    except (ApiError, StorageFull) as error:  # the answer has begun; this is how clients look for what went wrong later
        yield f"event: error\ndata: {json.dumps(of(error).body)}\n\n"
    except (asyncio.CancelledError, GeneratorExit):  # the client is gone; a job that has ended stays as it is
        with CancelScope(shield=True):
            await room.write(room.jobs.cancel, job.id, caller.owner)
        raise


def _seen(job: Job, picture: str) -> dict[str, Any]:
    return {"b64_json": picture, "created_at": int(time.time()), "size": written(size_of(job)) or ""}


def _line(event: PartialImage | CompletedImage) -> str:
    return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"


async def _followed(room: Service, caller: Caller, job: Job) -> AsyncIterator[Job]:
    """The job as it is, each time that it may have changed or a moment has passed; its end comes last.

    Raises ApiError when it is gone, or takes too long.
    """
    until = time.monotonic() + LONGEST_WAIT
    with room.feed.listening():
        while True:
            mark = room.feed.latest
            latest = await room.read(room.jobs.get, job.id, caller.owner)
            if latest is None:
                raise not_found("image")
            yield latest
            if latest.state in ("completed", "failed"):
                return
            if time.monotonic() > until or room.draining:
                if not room.draining:  # nobody would ever see it
                    await room.write(room.jobs.cancel, job.id, caller.owner)
                raise ApiError(503, "The pictures take too long; try again.", code="too_slow", retry_after=30)
            if not await room.feed.later(mark, GLANCE):
                await asyncio.sleep(0)


def _refuse_failed(job: Job) -> None:
    if job.state == "failed":
        error = job.error or {}
        said, code = str(error.get("message", "The picture failed.")), str(error.get("code", "failed"))
        if code == "moderation_unavailable":
            raise ApiError(503, said, code=code, retry_after=30)
        status = 400 if code in ("invalid_request", "moderation_blocked") else 500
        raise ApiError(status, said, code=code, headers={"x-should-retry": "false"})


def _encoded(room: Service, asset: Asset) -> str:
    data = room.store.read(asset.id)
    if data is None:
        raise not_found("image")
    return base64.b64encode(data).decode()
