"""Pictures and clips that come with a request, in whichever way, as assets that a worker may read."""

from __future__ import annotations

import base64
import binascii
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote_to_bytes

from tubelet.serve import rows
from tubelet.serve.auth import Caller
from tubelet.serve.errors import ApiError, invalid, not_found
from tubelet.serve.outbound import Unreachable
from tubelet.serve.records import Asset, Job
from tubelet.serve.requests import Upload
from tubelet.serve.schemas import FileReference, VideoReference
from tubelet.serve.service import Service
from tubelet.serve.view import length_of, size_of

if TYPE_CHECKING:
    from tubelet.serve.intake import Want

LARGEST_FETCH = 20 * 2**20
FILES = "file"
_DATA_URL = re.compile(r"data:image/[a-z.+-]{1,20};base64,", re.IGNORECASE)
_IDS = {prefix: re.compile(f"{prefix}_[0-9a-z]{{26}}") for prefix in ("video", "image", "char", "file", "we")}

Prefix = Literal["video", "image", "char", "file", "we"]


def new_id(prefix: Prefix) -> str:
    """A fresh id of one kind of thing. It tells when it was made (`born`)."""
    return rows.new_id(prefix, time.time())


def checked(prefix: Prefix, id: str) -> str:
    """The id, if it has the form of one; anything else is a thing that is not there. Raises ApiError."""
    if not _IDS[prefix].fullmatch(id):
        raise not_found({"char": "character", "we": "webhook endpoint"}.get(prefix, prefix))
    return id


_WANTED = {
    "image": "It must be a PNG, JPEG or WebP picture.",
    "mask": "It must be a PNG, JPEG or WebP picture.",
    "video": "It must be an MP4, MOV or WebM clip.",
}
"""What a file of another kind should have been."""


@dataclass
class Taken:
    """What one file has become: `entry` for a job's request, and the facts that the film's own length and size come from."""

    asset: str
    media: str
    size: tuple[int, int]
    frames: int
    seconds: float
    credentials: str | None = None
    parent: Job | None = None
    kept: list[tuple[Asset, bytes]] = field(default_factory=list)

    def entry(self, role: str) -> dict[str, Any]:
        """As a job's request names it."""
        entry = {"role": role, "asset": self.asset, "media": self.media}
        return entry if self.credentials is None else {**entry, "credentials": self.credentials}


async def take_upload(room: Service, upload: Upload, param: str, want: Want) -> Taken:
    """Take in a file that came with the request. Raises ApiError when it is none that can be used."""
    if upload.bytes > room.config.media_limit:
        raise ApiError(413, f"'{param}' is larger than {room.config.media_limit} bytes.", code="file_too_large", param=param)
    return await take_bytes(room, await room.read(upload.read), param, want)


async def take_bytes(room: Service, data: bytes, param: str, want: Want) -> Taken:
    """Take in the bytes of a picture or a clip: decoded in a child process, stripped, kept. Raises ApiError."""
    return await room.decode(_admitted, room, data, param, want)


def _admitted(room: Service, data: bytes, param: str, want: Want) -> Taken:
    from tubelet.serve import intake

    try:
        admitted = intake.admit(data, want=want)
    except intake.Refused as refused:
        said = _WANTED.get(want, refused.message) if refused.code == "unsupported_media" else refused.message
        raise invalid(f"'{param}' cannot be used: {said}", param, refused.code) from None
    kept = [(room.store.put(admitted.data, "input", admitted.media), admitted.data)]
    credentials = None
    if admitted.credentials is not None:
        kept.append((room.store.put(admitted.credentials, "input", "application/c2pa"), admitted.credentials))
        credentials = kept[1][0].id
    seconds = admitted.frames / admitted.fps if admitted.kind == "video" and admitted.fps > 0 else 0.0
    return Taken(kept[0][0].id, admitted.media, admitted.size, admitted.frames, seconds, credentials, kept=kept)


def find_file(room: Service, id: str, owner: str) -> dict[str, Any] | None:
    """The document of a file; None when there is none, or its time is over."""
    document = room.jobs.find(FILES, id, owner)
    return None if document is None or outlived(document) else document


def outlived(document: dict[str, Any]) -> bool:
    """Whether a file's time is over."""
    until = document.get("expires_at")
    return until is not None and until <= time.time()


async def take_file(room: Service, caller: Caller, id: str, param: str, want: Literal["image", "video", "any"]) -> Taken:
    """A file uploaded before. Raises ApiError when there is none of that kind."""
    document = await room.read(find_file, room, checked("file", id), caller.owner)
    if document is None:
        raise not_found("file")
    if want != "any" and not document["media"].startswith(want):
        raise invalid(f"'{param}' must be {'a picture' if want == 'image' else 'a clip'}, this file is not.", param)
    height, width = document["size"]
    return Taken(
        document["asset"],
        document["media"],
        (height, width),
        document["frames"],
        document["seconds"],
        document.get("credentials"),
    )


async def take_picture(
    room: Service, caller: Caller, reference: Upload | FileReference, param: str, want: Literal["image", "any"] = "image"
) -> Taken:
    """A picture, or "any" for a clip as well, in any of the ways to give one. Raises ApiError."""
    if isinstance(reference, Upload):
        return await take_upload(room, reference, param, want)
    if reference.file_id is not None:
        return await take_file(room, caller, reference.file_id, param, want)
    return await take_bytes(room, await _addressed(room, reference.image_url or "", param), param, "image")


async def take_mask(room: Service, caller: Caller, reference: Upload | FileReference, param: str) -> Taken:
    """A mask: a picture that is transparent where another one is to be made anew. Raises ApiError."""
    if isinstance(reference, Upload):
        return await take_upload(room, reference, param, "mask")
    if reference.file_id is not None:
        raise invalid("Files are kept without transparency; send the mask itself, or a data URL.", param)
    return await take_bytes(room, await _addressed(room, reference.image_url or "", param), param, "mask")


async def _addressed(room: Service, url: str, param: str) -> bytes:
    where = f"{param}.image_url"
    if url[:5].lower() == "data:":
        return await room.decode(_data_url, url, where)
    if not room.config.fetch_images:
        raise invalid(
            "This server does not fetch pictures; send the file, a data URL or a file_id.", where, "remote_images_disabled"
        )
    try:
        return await room.ask(room.outbound.fetch, url, limit=LARGEST_FETCH)
    except Unreachable:
        # Why is not said: the answers would tell a client what lives in the server's network.
        raise invalid("The picture could not be fetched.", where, "image_url_unreachable") from None


def _data_url(url: str, where: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise invalid("A data URL must be data:image/...;base64,...", where, "invalid_data_url")
    try:
        return base64.b64decode(unquote_to_bytes(url[head.end() :]), validate=True)
    except (binascii.Error, ValueError):
        raise invalid("The data URL is not valid base64.", where, "invalid_data_url") from None


async def take_film(room: Service, caller: Caller, reference: Upload | VideoReference, param: str) -> Taken:
    """A film in any of the ways to give one. Raises ApiError."""
    if isinstance(reference, Upload):
        return await take_upload(room, reference, param, "video")
    if reference.file_id is not None:
        return await take_file(room, caller, reference.file_id, param, "video")
    return await take_job(room, caller, reference.id or "", param)


async def take_job(room: Service, caller: Caller, id: str, param: str) -> Taken:
    """A finished film made here. Raises ApiError 404 when there is none, 400 when it is not finished or gone."""
    job = await room.read(room.jobs.get, checked("video", id), caller.owner)
    if job is None:
        raise not_found("video")
    if job.state != "completed":
        raise invalid(f"That video is {job.state}; wait until it is completed, or choose another.", param, "video_not_ready")
    film = film_of(job)
    if film is None or expired(job) or await room.ask(room.store.size, film.id) is None:
        raise invalid("That video's file is no longer kept.", param, "video_expired")
    height, width = size_of(job) or (0, 0)
    frames = int(job.result.get("frames") or 0)
    seconds = float(job.result.get("seconds") or length_of(job))
    return Taken(film.id, film.media, (height, width), frames, seconds, parent=job)


def film_of(job: Job) -> Asset | None:
    """The film among a job's files."""
    return next((asset for asset in job.outputs if asset.role == "video"), None)


def expired(job: Job) -> bool:
    """Whether a film's time is over."""
    return job.expires_at is not None and job.expires_at <= time.time()
