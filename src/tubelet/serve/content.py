"""Files as downloads: byte ranges, entity tags, and never anything that a browser would run."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi import Request
from fastapi.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from tubelet.serve.errors import ApiError, not_found
from tubelet.serve.records import Asset

_RANGE = re.compile(r"bytes=(\s*(\d{1,15}-\d{0,15}|-\d{1,15})\s*)(,\s*(\d{1,15}-\d{0,15}|-\d{1,15})\s*){0,7}")


def file_response(request: Request, path: Path, asset: Asset, name: str) -> Response:
    """An asset's file as an attachment called `name`. Its entity tag is the sha256 of its bytes.

    Raises ApiError 416 for a range behind its end, 404 when the file has gone since it was looked up; a range that cannot be
    read is ignored, as RFC 9110 has it.
    """
    try:
        facts = path.stat()
    except FileNotFoundError:
        raise not_found("file") from None
    tag = f'"{asset.id}"'
    headers = {"etag": tag, "cache-control": "private, no-cache"}
    if tag in re.findall(r'"[0-9a-f]{64}"', request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range")
    if wanted is not None and not _readable(wanted):
        request.scope["headers"] = [(key, value) for key, value in request.scope["headers"] if key != b"range"]
    elif wanted is not None and not _within(wanted, facts.st_size):
        raise ApiError(
            416,
            "The range lies behind the end of the file.",
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{facts.st_size}", "accept-ranges": "bytes"},
        )
    return _OpenedFirst(path, headers=headers, media_type=asset.media, filename=name, stat_result=facts)


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
