"""Files: pictures and clips uploaded once, to be named in later requests. Kept is what was let in: upright, stripped."""

from __future__ import annotations

import time
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, Query, Request, Response

from tubelet.serve.answers import File, FileDeleted, FileList
from tubelet.serve.content import asset_response
from tubelet.serve.errors import invalid, not_found
from tubelet.serve.inputs import FILES, checked, find_file, new_id, outlived, take_upload
from tubelet.serve.openapi import operations, takes
from tubelet.serve.records import Asset
from tubelet.serve.rows import born
from tubelet.serve.schemas import FileCreate
from tubelet.serve.service import Body, Maker, Reader, Room
from tubelet.serve.submit import put_within, read_as

router = operations("files")
BEGAN = 1.76e9
"""Unix seconds before which there was no server."""
EntryT = TypeVar("EntryT", bound=dict[str, Any])


def _id(file_id: str) -> str:
    return checked("file", file_id)


FileId = Annotated[str, Depends(_id)]


def paged(entries: list[EntryT], after: str | None, limit: int, order: str) -> tuple[list[EntryT], bool]:
    """A page of entries, which come oldest first, and whether there are more.

    The entry `after` may be gone: who deletes what a page shows goes on where it was. Raises ApiError when it never was.
    """
    ordered = entries if order == "asc" else entries[::-1]
    if after is not None:
        place = next((number for number, entry in enumerate(ordered, 1) if entry["id"] == after), None)
        if place is None:
            at = born(after)
            if at is None or not BEGAN < at <= time.time():
                raise invalid("There is no such entry to go on after.", "after")
            beyond = (_moment(entry) > at if order == "asc" else _moment(entry) < at for entry in ordered)
            place = next((number for number, is_beyond in enumerate(beyond) if is_beyond), len(ordered))
        ordered = ordered[place:]
    return ordered[:limit], len(ordered) > limit


def _moment(entry: dict[str, Any]) -> float:
    """When an entry was made, to the microsecond where its id tells it, which older ones do not."""
    told, at = born(entry["id"]), float(entry["created_at"])
    return told if told is not None and 0 <= told - at < 2 else at


def _plain_name(name: str, media: str) -> str:
    """A file's name without folders and odd signs, with the ending of what it is now."""
    stem = PurePosixPath(name.replace("\\", "/")).stem
    kept = "".join(sign if sign.isalnum() or sign in " ._-" else "_" for sign in stem)[:100].strip(" .") or "file"
    return f"{kept}.{'png' if media == 'image/png' else 'mp4'}"


@router.post("/v1/files", response_model=File, openapi_extra=takes(FileCreate))
async def create_file(room: Room, caller: Maker, fields: Body) -> File:
    """Upload a picture or a clip."""
    asked = read_as(FileCreate, fields)
    taken = await take_upload(room, asked.file, "file", "any")
    now = int(time.time())
    file = File(
        id=new_id("file"),
        bytes=taken.kept[0][0].bytes,
        created_at=now,
        expires_at=None if asked.expires_after is None else now + asked.expires_after.seconds,
        filename=_plain_name(asked.file.filename, taken.media),
        purpose=asked.purpose,
        media_type=taken.media,
    )
    facts = {"asset": taken.asset, "media": taken.media, "size": list(taken.size), "frames": taken.frames}
    more = {"seconds": taken.seconds, "credentials": taken.credentials}
    await put_within(room, caller, FILES, {**file.model_dump(), **facts, **more}, taken)
    return file


@router.get("/v1/files", response_model=FileList)
async def list_files(
    room: Room,
    caller: Reader,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> FileList:
    """The caller's files, newest first, a page at a time."""
    kept = [document for document in await room.read(room.jobs.all, FILES, caller.owner) if not outlived(document)]
    entries, more = paged([d for d in kept if purpose in (None, d["purpose"])], after, limit, order)
    data = [File.model_validate(entry) for entry in entries]
    return FileList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more)


@router.get("/v1/files/{file_id}", response_model=File)
async def get_file(room: Room, id: FileId, caller: Reader) -> File:
    """What is known of a file."""
    document = await room.read(find_file, room, id, caller.owner)
    if document is None:
        raise not_found("file")
    return File.model_validate(document)


@router.head("/v1/files/{file_id}/content", include_in_schema=False)
@router.get(
    "/v1/files/{file_id}/content",
    response_class=Response,
    responses={200: {"content": {"video/mp4": {}, "image/png": {}}}},
)
async def download_file(room: Room, id: FileId, caller: Reader, request: Request) -> Response:
    """A file's bytes."""
    document = await room.read(find_file, room, id, caller.owner)
    size = None if document is None else await room.ask(room.store.size, document["asset"])
    if document is None or size is None:
        raise not_found("file")
    asset = Asset(document["asset"], "file", document["media"], size)
    return await asset_response(request, room.store, asset, document["filename"])


@router.delete("/v1/files/{file_id}", response_model=FileDeleted)
async def delete_file(room: Room, id: FileId, caller: Maker) -> FileDeleted:
    """Forget a file. Films that were made from it stay."""
    document = await room.read(find_file, room, id, caller.owner)
    await room.ask(room.refuse_if_away)
    if document is None or not await room.write(room.jobs.drop, FILES, id, caller.owner):
        raise not_found("file")
    await room.write(room.wipe, [name for name in (document["asset"], document["credentials"]) if name])
    return FileDeleted(id=id)
