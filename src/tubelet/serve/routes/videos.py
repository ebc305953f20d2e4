"""Films: made, changed, listed, watched over, downloaded and deleted."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request, Response
from fastapi.responses import StreamingResponse

from tubelet.serve.animated import MEDIA, Animated, animated
from tubelet.serve.answers import Video, VideoDeleted, VideoList
from tubelet.serve.auth import Caller
from tubelet.serve.config import SystemFacts
from tubelet.serve.content import asset_response, file_response
from tubelet.serve.errors import ApiError, invalid, not_found
from tubelet.serve.feed import Event
from tubelet.serve.inputs import Taken, checked, expired, take_film, take_job, take_picture
from tubelet.serve.openapi import operations, takes
from tubelet.serve.records import Asset, Job
from tubelet.serve.schemas import MoveJob, VideoCreate, VideoEdit, VideoExtend, VideoRemix
from tubelet.serve.service import Body, Maker, Reader, Room, Service
from tubelet.serve.submit import Prepared, blank, read_as, refuse_too_long, source_of, submit, system_of, words_of
from tubelet.serve.view import poll_after_ms, video_of

router = operations("videos")
SORA_SIZE, SORA_SECONDS = (1280, 720), 4.0
"""(height, width) and seconds of a film that is asked for by an alias and no more."""
CHARACTERS = "character"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_SEQUENCE = re.compile(r"\d{1,18}")
_NAMES = {"video": ".mp4", "thumbnail": "-thumbnail.webp", "spritesheet": "-spritesheet.jpg", "preview": "-preview.jpg"}
_NAMES |= {"gif": ".gif", "webp": ".webp"}


def _id(video_id: str) -> str:
    return checked("video", video_id)


VideoId = Annotated[str, Depends(_id)]
Variant = Literal["video", "thumbnail", "spritesheet", "preview", "gif", "webp"]


async def shown(room: Service, job: Job, response: Response | None = None) -> Video:
    """A job as the wire shows it, with the time left, and the header that says when to ask again."""
    left = await room.left(job)
    eta = None if left is None else int(1000 * left)
    if response is not None and job.state in ("queued", "in_progress"):
        response.headers["openai-poll-after-ms"] = str(poll_after_ms(eta))
    return video_of(job, eta)


async def found(room: Service, id: str, caller: Caller) -> Job:
    """One of the caller's jobs. Raises ApiError 404."""
    job = await room.read(room.jobs.get, id, caller.owner)
    if job is None:
        raise not_found("video")
    return job


@router.post("/v1/videos", response_model=Video, openapi_extra=takes(VideoCreate))
async def create_video(room: Room, caller: Maker, fields: Body, request: Request, response: Response) -> Video:
    """Make a film from words, and from pictures or two films if some are given."""
    asked = read_as(VideoCreate, fields)
    model, system = system_of(room, asked.model)

    async def prepare() -> Prepared:
        if asked.mode is not None:
            return await _from_two(room, caller, asked)
        return await _from_words(room, caller, asked, model, system)

    return await shown(room, await submit(room, request, caller, "create", fields, prepare), response)


async def _from_words(room: Service, caller: Caller, asked: VideoCreate, model: str, system: SystemFacts) -> Prepared:
    for name in ("video", "second_video", "strength"):
        if getattr(asked, name) is not None:
            raise invalid(f"'{name}' needs a 'mode'; to work on one film use /v1/videos/edits or /extensions.", name)
    pictures = {"reference": ("input_reference", asked.input_reference), "last": ("last_reference", asked.last_reference)}
    given = [name for name, reference in pictures.values() if reference is not None]
    if asked.text is not None and asked.shots:
        raise invalid("'text' stands for one prompt, and each shot has its own; leave it out.", "text")
    if asked.loop and (given or asked.shots):
        raise invalid("A loop has no beginning and no end; leave out the pictures and shots, or the loop.", "loop")
    taken = {
        role: await take_picture(room, caller, reference, name, "any" if role == "reference" else "image")
        for role, (name, reference) in pictures.items()
        if reference is not None
    }
    first = taken.get("reference")
    begun = first if first is not None and first.media.startswith("video/") else None
    if begun is not None and asked.shots:
        raise invalid("A storyboard makes a film from its shots; leave out the clip, or the shots.", "input_reference")
    request: dict[str, Any] = blank("create", model, system) | words_of(asked) | {"loop": asked.loop}
    request |= _extent(asked, model in room.config.named, system, begun)
    request["inputs"] = [file.entry(role) for role, file in taken.items()]
    if asked.shots:
        request["shots"] = [{"prompt": shot.prompt, "seconds": shot.seconds, "cut": shot.cut} for shot in asked.shots]
    for reference in asked.characters:
        document = await room.read(room.jobs.find, CHARACTERS, checked("char", reference.id), caller.owner)
        if document is None:
            raise not_found("character")
        request["characters"].append({name: document[name] for name in ("id", "name", "asset")})
    return Prepared(request, kept=_kept(*taken.values()))


def _extent(asked: VideoCreate, alias: bool, system: SystemFacts, begun: Taken | None) -> dict[str, Any]:
    """Size and length: as asked for, else Sora's for an alias, else the system's; those of a clip that it begins with count."""
    height, width = asked.size or (begun.size if begun is not None else SORA_SIZE if alias else system.size)
    frames, seconds = asked.frames, asked.seconds
    if asked.shots:
        whole = sum(shot.seconds for shot in asked.shots)
        if frames is not None:
            raise invalid("The shots say how long the film is; leave out 'frames'.", "frames")
        if seconds is not None and not math.isclose(seconds, whole):
            raise invalid(f"The shots last {whole:g} seconds in all; leave out 'seconds', or ask for these.", "seconds")
        seconds = whole
    elif frames is None and seconds is None:
        if begun is not None:
            seconds = begun.seconds + (SORA_SECONDS if alias else system.seconds)
        else:
            frames, seconds = (None, SORA_SECONDS) if alias else (system.frames, None)
    if frames is not None:
        seconds = frames / system.fps
    if begun is not None and seconds is not None and seconds < begun.seconds + 1 / system.fps:
        raise invalid(f"The clip that it begins with already lasts {begun.seconds:g} seconds; ask for more.", "seconds")
    refuse_too_long(seconds or 0.0, "shots" if asked.shots else "seconds")
    return {"size": [height, width], "seconds": seconds, "frames": frames}


async def _from_two(room: Service, caller: Caller, asked: VideoCreate) -> Prepared:
    if asked.video is None or asked.second_video is None:
        raise invalid(f"To {asked.mode} needs two films, 'video' and 'second_video'.", "mode")
    for name in ("input_reference", "last_reference", "shots", "frames"):
        if getattr(asked, name) is not None:
            raise invalid(f"'{name}' does not go with 'mode'.", name)
    if asked.loop or asked.characters:
        raise invalid("A film made of two has no loop and no characters.", "mode")
    if asked.mode == "connect" and asked.strength is not None:
        raise invalid("What lies between two films is made anew as a whole; leave out 'strength'.", "strength")
    first = await take_film(room, caller, asked.video, "video")
    second = await take_film(room, caller, asked.second_video, "second_video")
    model, system = system_of(room, asked.model, first.parent)
    request = blank("create", model, system) | words_of(asked)
    request |= {"mode": asked.mode, "strength": asked.strength, "size": list(asked.size) if asked.size else None}
    request["inputs"] = [first.entry("video"), second.entry("second")]
    if asked.mode == "connect":
        request["seconds"] = asked.seconds or system.seconds
        request["source"] = source_of(first.seconds + second.seconds, first)
        refuse_too_long(first.seconds + second.seconds + request["seconds"], "seconds")
    else:
        shorter = min(first.seconds, second.seconds)
        request["seconds"] = None if asked.seconds is None else min(asked.seconds, shorter)
        request["source"] = source_of(shorter, first)
    return Prepared(request, parent=first.parent.id if first.parent else None, kept=_kept(first, second))


def _kept(*taken: Taken) -> list[Any]:
    return [entry for file in taken for entry in file.kept]


@router.get("/v1/videos", response_model=VideoList)
async def list_videos(
    room: Room,
    caller: Reader,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """The caller's films, newest first, a page at a time."""
    if after is not None:
        checked("video", after)
    try:
        page = await room.read(room.jobs.page, caller.owner, after=after, limit=limit, order=order)
    except LookupError:
        raise invalid("There is no such video to go on after.", "after") from None
    data = [await shown(room, job) for job in page.jobs]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/v1/videos/events", response_class=StreamingResponse, responses=STREAMED)
async def watch_videos(room: Room, caller: Reader, request: Request) -> Response:
    """What happens to the caller's films, as server-sent events; `Last-Event-ID` goes on where a stream broke off."""
    return await _events(room, caller, request, None)


@router.post("/v1/videos/edits", response_model=Video, openapi_extra=takes(VideoEdit))
async def edit_video(room: Room, caller: Maker, fields: Body, request: Request, response: Response) -> Video:
    """Change a film by words."""
    asked = read_as(VideoEdit, fields)
    if asked.model is not None:
        system_of(room, asked.model)

    async def prepare() -> Prepared:
        taken = await take_film(room, caller, asked.video, "video")
        return _changed(room, "edit", asked, taken)

    return await shown(room, await submit(room, request, caller, "edit", fields, prepare), response)


def _changed(room: Service, task: Literal["edit", "remix"], asked: VideoEdit | VideoRemix, taken: Taken) -> Prepared:
    model, system = system_of(room, asked.model, taken.parent)
    request = blank(task, model, system) | words_of(asked) | {"strength": asked.strength}
    request |= {"inputs": [taken.entry("video")], "source": source_of(taken.seconds, taken)}
    return Prepared(request, parent=taken.parent.id if taken.parent else None, kept=taken.kept)


@router.post("/v1/videos/extensions", response_model=Video, openapi_extra=takes(VideoExtend))
async def extend_video(room: Room, caller: Maker, fields: Body, request: Request, response: Response) -> Video:
    """Let a film go on. `seconds` of the answer is the length of the whole."""
    asked = read_as(VideoExtend, fields)
    if asked.model is not None:
        system_of(room, asked.model)

    async def prepare() -> Prepared:
        taken = await take_film(room, caller, asked.video, "video")
        model, system = system_of(room, asked.model, taken.parent)
        seconds = asked.seconds or system.seconds
        refuse_too_long(taken.seconds + seconds, "seconds")
        request = blank("extend", model, system) | words_of(asked) | {"seconds": seconds, "loop": asked.loop}
        request |= {"inputs": [taken.entry("video")], "source": source_of(taken.seconds, taken)}
        return Prepared(request, parent=taken.parent.id if taken.parent else None, kept=taken.kept)

    return await shown(room, await submit(room, request, caller, "extend", fields, prepare), response)


@router.get("/v1/videos/{video_id}", response_model=Video)
async def get_video(room: Room, id: VideoId, caller: Reader, response: Response) -> Video:
    """One film. A failed one is an answer like any other: HTTP 200."""
    return await shown(room, await found(room, id, caller), response)


@router.delete("/v1/videos/{video_id}", response_model=VideoDeleted)
async def delete_video(room: Room, id: VideoId, caller: Maker) -> VideoDeleted:
    """Wipe a film with all that belongs to it. One that is being made is stopped first."""
    if await room.write(room.delete, id, caller.owner) is None:
        raise not_found("video")
    return VideoDeleted(id=id)


@router.post("/v1/videos/{video_id}/remix", response_model=Video, openapi_extra=takes(VideoRemix))
async def remix_video(room: Room, id: VideoId, caller: Maker, fields: Body, request: Request, response: Response) -> Video:
    """Make a finished film again by other words."""
    asked = read_as(VideoRemix, fields)
    if asked.model is not None:
        system_of(room, asked.model)

    async def prepare() -> Prepared:
        return _changed(room, "remix", asked, await take_job(room, caller, id, "video_id"))

    return await shown(room, await submit(room, request, caller, f"remix {id}", fields, prepare), response)


@router.post("/v1/videos/{video_id}/cancel", response_model=Video)
async def cancel_video(room: Room, id: VideoId, caller: Maker, response: Response) -> Video:
    """Stop making a film: it has then failed with code "cancelled". A finished one stays as it is."""
    job = await room.write(room.jobs.cancel, id, caller.owner)
    if job is None:
        raise not_found("video")
    return await shown(room, job, response)


@router.post("/v1/videos/{video_id}/move", response_model=Video, openapi_extra=takes(MoveJob))
async def move_video(room: Room, id: VideoId, caller: Maker, fields: Body, response: Response) -> Video:
    """Give a queued film another place in the queue; 1 is next."""
    asked = read_as(MoveJob, fields)
    job = await room.write(room.jobs.move, id, caller.owner, asked.place)
    if job is None:
        raise not_found("video")
    return await shown(room, job, response)


@router.get("/v1/videos/{video_id}/events", response_class=StreamingResponse, responses=STREAMED)
async def watch_video(room: Room, id: VideoId, caller: Reader, request: Request) -> Response:
    """What happens to one film, as server-sent events, until it ends."""
    await found(room, id, caller)
    return await _events(room, caller, request, id)


async def _events(room: Service, caller: Caller, request: Request, id: str | None) -> Response:
    room.refuse_if_draining()
    last = request.headers.get("last-event-id", "")
    newest = await room.read(room.jobs.last_event)
    if _SEQUENCE.fullmatch(last) and int(last) <= newest:  # one ahead of all there is comes from another database
        after = int(last)
    else:
        after = 0 if id is not None else newest

    async def read(behind: int) -> list[Event]:
        return await room.read(room.jobs.events, behind, caller.owner, id)

    if id is not None and (await found(room, id, caller)).state in ("completed", "failed") and not await read(after):
        return Response(status_code=204)  # tells a browser's EventSource not to come back

    async def said(job_id: str, facts: dict[str, Any]) -> dict[str, Any] | None:
        if not job_id.startswith("video_"):
            return None  # pictures are no films
        job = None if facts["type"] == "video.deleted" else await room.read(room.jobs.get, job_id, caller.owner)
        video = None if job is None else (await shown(room, job)).model_dump()
        return {"type": facts["type"], "id": job_id, "video": video}

    stream = room.feed.stream(read, said, after, until_end=id is not None)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


@router.head("/v1/videos/{video_id}/content", include_in_schema=False)
@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    responses={
        200: {"content": {f"{kind}": {} for kind in ("video/mp4", "image/webp", "image/jpeg", "image/gif")}},
        204: {"description": "No preview: there is none yet, or, since the film has ended, none any more"},
    },
)
async def download_video(room: Room, id: VideoId, caller: Reader, request: Request, variant: Variant = "video") -> Response:
    """The film itself; as an animated picture, gif or webp; one frame of it; a sheet of its frames; or, while it is made, what
    there is so far."""
    job = await found(room, id, caller)
    if variant == "preview" and not expired(job):
        return await room.ask(_preview, room, job)
    _refuse_unfinished(job)
    output, name = await room.ask(_output, room, job, "video" if variant in MEDIA else variant), _file_name(id, variant)
    if output is not None and (variant == "gif" or variant == "webp"):
        path = await animated(room, job, output, variant)
        output = await room.read(_animation, path, variant)
        if output is not None:
            return file_response(request, path, output, name)
    if output is None:
        raise ApiError(404, f"This video has no {variant}.", code=f"{variant}_not_available")
    return await asset_response(request, room.store, output, name)


def _output(room: Service, job: Job, role: str) -> Asset | None:
    """One of a job's files, with the size that it has; None when it is not there."""
    asset = next((asset for asset in job.outputs if asset.role == role), None)
    size = None if asset is None else room.store.size(asset.id)
    return None if asset is None or size is None else dataclasses.replace(asset, bytes=size)


def _animation(path: Path, variant: Animated) -> Asset | None:
    """An animated picture as one of the film's files; None when it has gone. Made anew it has other bytes, and another tag."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    tag = hashlib.sha256(f"{path.name} {facts.st_mtime_ns}".encode()).hexdigest()
    return Asset(tag, variant, MEDIA[variant], facts.st_size)


def _preview(room: Service, job: Job) -> Response:
    """What there is of a film so far. That there is nothing is an ordinary state: an answer without a body."""
    asset = next((asset for asset in job.outputs if asset.role == "preview"), None)
    data = None if asset is None else room.store.read(asset.id)  # its worker removes it as soon as there is a newer one
    if asset is None or data is None:
        return Response(status_code=204)
    headers = {"content-disposition": f'attachment; filename="{_file_name(job.id, "preview")}"'}
    return Response(data, media_type=asset.media, headers=headers)


def _file_name(id: str, variant: Variant) -> str:
    return f"{id}{_NAMES[variant]}"


def _refuse_unfinished(job: Job) -> None:
    if job.state == "failed":
        raise ApiError(404, "This video failed, so there is nothing to download.", code="video_failed")
    if job.state != "completed":
        raise ApiError(404, f"This video is {job.state}; its content comes when it is completed.", code="video_not_ready")
    if expired(job):
        raise ApiError(404, "This video's time is over; its files are no longer kept.", code="video_expired")
