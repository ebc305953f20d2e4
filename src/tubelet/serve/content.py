"""Files as downloads: byte ranges, entity tags, and never anything that a browser would run."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from tubelet.serve.errors import ApiError, not_found
from tubelet.serve.objects import ObjectStore
from tubelet.serve.records import Asset

if TYPE_CHECKING:
    from tubelet.serve.store import Assets

_RANGE = re.compile(r"bytes=(\s*(\d{1,15}-\d{0,15}|-\d{1,15})\s*)(,\s*(\d{1,15}-\d{0,15}|-\d{1,15})\s*){0,7}")


async def asset_response(request: Request, store: Assets, asset: Asset, name: str) -> Response:
    """An asset as an attachment called `name`, from wherever it is kept; `asset.bytes` is its size now.

    Raises ApiError as `file_response` does, StorageFull when its object store does not answer.
    """
    if isinstance(store, ObjectStore):
        return await _object_response(request, store, asset, name)
    path = store.path(asset.id)
    if path is None:
        raise not_found("file")
    return file_response(request, path, asset, name)


def file_response(request: Request, path: Path, asset: Asset, name: str) -> Response:
    """An asset's file as an attachment called `name`. Its entity tag is the sha256 of its bytes.

    Raises ApiError 416 for a range behind its end, 404 when the file has gone since it was looked up; a range that cannot be
    read is ignored, as RFC 9110 has it.
    """
    try:
        facts = path.stat()
    except FileNotFoundError:
        raise not_found("file") from None
    headers = _headers(asset)
    if _known(request, headers):
        return Response(status_code=304, headers=headers)
    if _wanted(request, facts.st_size) is None:
        request.scope["headers"] = [(key, value) for key, value in request.scope["headers"] if key != b"range"]
    return _OpenedFirst(path, headers=headers, media_type=asset.media, filename=name, stat_result=facts)


async def _object_response(request: Request, store: ObjectStore, asset: Asset, name: str) -> Response:
    """From an object store, a piece at a time. Several ranges at once get the whole, as RFC 9110 allows."""
    headers = _headers(asset)
    if _known(request, headers):
        return Response(status_code=304, headers=headers)
    status, start, end = 200, 0, asset.bytes
    wanted = _wanted(request, end)
    if wanted is not None and len(wanted) == 1 and request.headers.get("if-range", headers["etag"]) == headers["etag"]:
        status, (start, end) = 206, wanted[0]
        headers["content-range"] = f"bytes {start}-{end - 1}/{asset.bytes}"
    plain = quote(name)
    named = f'filename="{name}"' if plain == name else f"filename*=utf-8''{plain}"
    headers |= {"content-length": str(end - start), "content-disposition": f"attachment; {named}", "accept-ranges": "bytes"}
    if request.method == "HEAD" or start == end:
        return Response(status_code=status, headers=headers, media_type=asset.media)
    pieces = store.pieces(asset.id, start, end)
    try:
        first = await anext(pieces)  # the answer begins when there is one
    except FileNotFoundError:
        raise not_found("file") from None

    async def all_pieces() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return StreamingResponse(all_pieces(), status, headers, asset.media)


def _headers(asset: Asset) -> dict[str, str]:
    return {"etag": f'"{asset.id}"', "cache-control": "private, no-cache"}


def _known(request: Request, headers: Mapping[str, str]) -> bool:
    """Whether the client has these bytes already."""
    return headers["etag"] in re.findall(r'"[0-9a-f]{64}"', request.headers.get("if-none-match", ""))


def _wanted(request: Request, size: int) -> list[tuple[int, int]] | None:
    """The ranges that the client asks for, from the first byte to that behind the last; None when it asks for no part, or in a
    way that cannot be read. Raises ApiError 416."""
    wanted = request.headers.get("range")
    if wanted is None or not _readable(wanted):
        return None
    if not _within(wanted, size):
        raise ApiError(
            416,
            "The range lies behind the end of the file.",
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{size}", "accept-ranges": "bytes"},
        )
    return [
        (int(first), min(int(last) + 1, size) if last else size) if first else (max(0, size - int(last)), size)
        for first, last in _parts(wanted)
    ]


class _OpenedFirst(FileResponse):
    """A file whose answer begins when the file is open, since it may be deleted until then."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def later(message: Message) -> None:
            if message["type"] == "http.response.start":
                held.append(message)
                return
            while held:
                await send(held.pop())
            await send(message)

        try:
            await super().__call__(scope, receive, later)
        except FileNotFoundError:
            raise not_found("file") from None


def _parts(wanted: str) -> list[tuple[str, str]]:
    pieces = (part.strip().partition("-") for part in wanted.removeprefix("bytes=").split(","))
    return [(first, last) for first, _, last in pieces]


def _readable(wanted: str) -> bool:
    """Whether every range of the header is one, its first byte not behind its last."""
    if not _RANGE.fullmatch(wanted):
        return False
    return all(not first or not last or int(first) <= int(last) for first, last in _parts(wanted))


def _within(wanted: str, size: int) -> bool:
    return all((int(first) < size if first else int(last) > 0) and size > 0 for first, last in _parts(wanted))
