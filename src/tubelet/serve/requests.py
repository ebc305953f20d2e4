"""What a client sent, whichever way it sent it: JSON, a form, or a multipart form with files, as one nested dict.

`video[id]`, `characters[][id]` and `characters[0][id]` are how clients write objects and lists in a form. Nothing large is
buffered in memory: files and long bodies go to temporary files, and a body above the limit ends the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO, Any
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from tubelet.serve.errors import ApiError, invalid

JSON_LIMIT = 48 * 2**20
"""Bytes: two pictures as data URLs of the greatest length that clients may send."""
TEXT_LIMIT = 24 * 2**20
"""Bytes of one field of a form that is not a file, where it holds a picture as a data URL."""
PLAIN_LIMIT = 2**20
"""Bytes of a JSON body, or of one such field, beside the data URLs in it: a short text can become very many objects."""
LONG_URL = 4096
"""Bytes from which on a data URL is one; shorter ones count as plain, since there could be very many of them."""
MOST_FILES, MOST_FIELDS, DEEPEST = 8, 32, 8
_SPOOL = 1 << 20
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,63})((?:\[[A-Za-z0-9_]{0,64}\]){0,3})")

Fields = dict[str, Any]


@dataclass(frozen=True)
class Upload:
    """A file that came with a request. It is gone when the request ends."""

    filename: str
    file: IO[bytes]
    bytes: int
    sha256: str

    def read(self) -> bytes:
        """All of it. Raises nothing that the disk does not."""
        self.file.seek(0)
        return self.file.read()

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.is_instance_schema(cls, cls_repr="a file")

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "format": "binary", "description": "A file, as a part of a multipart form."}


async def read_fields(request: Request) -> AsyncIterator[Fields]:
    """A dependency: the fields of the body, and its files until the request has been answered.

    Raises ApiError: 413 as soon as the body is known to be too large, 408 when it stops coming, 415 for a type that is none of
    JSON, form and multipart form, 400 when it is not what it says.
    """
    limit = request.app.state.service.config.upload_limit
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    with contextlib.ExitStack() as opened:
        match kind.lower():
            case b"multipart/form-data":
                # Some clients state the type without a boundary when there is nothing to send.
                yield await _multipart(request, limit, opened) if b"boundary" in options else {}
            case b"application/json" | b"":
                body = await _whole(request, min(limit, JSON_LIMIT), opened)
                room = request.app.state.service
                yield await (room.decode if body.tell() > _SPOOL else room.read)(_json, body)
            case b"application/x-www-form-urlencoded":
                body = await _whole(request, min(limit, _SPOOL), opened)
                yield await request.app.state.service.read(_urlencoded, body)
            case _:
                raise ApiError(415, "Send the body as JSON or as a multipart form.", code="unsupported_media_type")


async def _chunks(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body piece by piece, as long as it is short enough and keeps coming."""
    patience = request.app.state.service.config.body_patience
    too_large = ApiError(413, f"The request is larger than {limit} bytes.", code="request_too_large")
    said = request.headers.get("content-length", "0")
    if not said.isdigit() or int(said) > limit:
        raise too_large
    stream, total = request.stream(), 0
    while True:
        try:
            chunk = await asyncio.wait_for(anext(stream), patience)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            close = {"connection": "close"}
            raise ApiError(408, "The request stopped coming.", code="request_timeout", headers=close) from error
        total += len(chunk)
        if total > limit:
            raise too_large
        yield chunk


async def _whole(request: Request, limit: int, opened: contextlib.ExitStack) -> IO[bytes]:
    """The whole body; its position says how long it is."""
    body = SpooledTemporaryFile(max_size=_SPOOL)  # noqa: SIM115  open until the request has been answered
    opened.callback(body.close)
    async for chunk in _chunks(request, limit):
        body.write(chunk)
    return body


def _json(body: IO[bytes]) -> Fields:
    body.seek(0)
    text = body.read()
    if not text.strip():
        return {}
    _refuse_long(text)
    try:
        fields = parsed(text)
    except ValueError as error:
        raise invalid(f"The body is not valid: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise invalid("The body must be a JSON object.", code="invalid_json")
    return fields


def parsed(text: bytes) -> Any:
    """The value of JSON text. Raises ValueError, whose words are for a person, when it is none, too long or nested too deep."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    if _plain(text) > PLAIN_LIMIT:
        raise ValueError(f"beside its data URLs it is longer than {PLAIN_LIMIT} bytes.")
    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON.") from error
    if _depth(value) > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep.")
    return value


def _refuse_long(text: bytes) -> None:
    if _plain(text) > PLAIN_LIMIT:
        said = f"The request is too large: beside files and data URLs there may be {PLAIN_LIMIT} bytes of text."
        raise ApiError(413, said, code="request_too_large")


def _plain(text: bytes) -> int:
    """How many bytes of a text are not in long data URLs; that it is more than may be is known early.

    Within JSON `"data:` begins a string, or stands in one, after a backslash. Either way what follows is in that string, up to
    the next quote.
    """
    if text.startswith(b"data:"):
        return 0
    plain = at = 0
    while plain <= PLAIN_LIMIT and (begin := text.find(b'"data:', at)) >= 0:
        end = text.find(b'"', begin + 1)
        end = len(text) if end < 0 else end
        plain += end - at if end - begin < LONG_URL else begin - at
        at = end
    return plain if plain > PLAIN_LIMIT else plain + len(text) - at


def _depth(value: Any) -> int:
    deep, level = 0, [value]
    while level and deep <= DEEPEST:
        deep += 1
        inner: list[Any] = []
        for item in level:
            inner += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        level = [item for item in inner if isinstance(item, (dict, list))]
    return deep


def _urlencoded(body: IO[bytes]) -> Fields:
    body.seek(0)
    text = body.read()
    try:
        return nest(parse_qsl(text.decode(), keep_blank_values=True, strict_parsing=bool(text), max_num_fields=MOST_FIELDS))
    except ValueError as error:
        raise invalid("The form cannot be read.", code="invalid_form") from error


async def _multipart(request: Request, limit: int, opened: contextlib.ExitStack) -> Fields:
    parser = MultiPartParser(
        Headers(scope=request.scope),
        _chunks(request, limit),
        max_files=MOST_FILES,
        max_fields=MOST_FIELDS,
        max_part_size=TEXT_LIMIT,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise invalid("The multipart form cannot be read, or has too many parts.", code="invalid_form") from error
    pairs: list[tuple[str, Any]] = []
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            opened.callback(part.file.close)
            pairs.append((name, await run_in_threadpool(_upload, part)))
        else:
            if len(part) > PLAIN_LIMIT // 4:  # no character takes more than four bytes
                await run_in_threadpool(_refuse_long, part.encode(errors="surrogatepass"))
            pairs.append((name, part))
    return nest(pairs)


def _upload(part: UploadFile) -> Upload:
    part.file.seek(0)
    digest, total = hashlib.sha256(), 0
    while chunk := part.file.read(_SPOOL):
        digest.update(chunk)
        total += len(chunk)
    return Upload(part.filename or "", part.file, total, digest.hexdigest())


def nest(pairs: Iterable[tuple[str, Any]]) -> Fields:
    """Flat names with brackets as nested dicts and lists; a number in brackets is a place in a list.

    Raises ApiError on a name that cannot be read or is said twice.
    """
    fields: Fields = {}
    for name, value in pairs:
        found = _NAME.fullmatch(name)
        if found is None:
            raise invalid("A field has a name that cannot be read.", code="invalid_form")
        steps = re.findall(r"\[([^\]]*)\]", found[2])
        _put(fields, found[1], steps, value)
    return {name: _lists(value) for name, value in fields.items()}


def _put(at: Fields, first: str, steps: list[str], value: Any) -> None:
    """Lists are dicts with places as keys until all is there."""
    path = [first, *steps]
    for place, key in enumerate(path):
        last = place == len(path) - 1
        if key == "":
            # `a[][b]` speaks of the list's last object until that has a `b`.
            following = path[place + 1] if not last else None
            newest = str(len(at) - 1)
            inside = at.get(newest)
            fits = following not in (None, "") and isinstance(inside, dict) and following not in inside
            key = newest if fits else str(len(at))
        if last:
            if key in at:
                raise invalid(f"The field '{first}' is given twice.", first, "invalid_form")
            at[key] = value
            return
        inner = at.setdefault(key, {})
        if not isinstance(inner, dict):
            raise invalid(f"The field '{first}' is given twice.", first, "invalid_form")
        at = inner


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and set(value) == {str(place) for place in range(len(value))}:
        return [_lists(value[str(place)]) for place in range(len(value))]
    return {name: _lists(inner) for name, inner in value.items()}


def fingerprint(operation: str, fields: Mapping[str, Any]) -> str:
    """What tells two requests apart: the operation and its fields, files and long texts by their sha256. The way they were
    written, such as the boundary of a form, which differs at each try, does not count."""

    def plain(value: Any) -> Any:
        if isinstance(value, Upload):
            return {"sha256": value.sha256}
        if isinstance(value, str) and len(value) > _SPOOL:  # other threads run while so much is hashed, not while it is escaped
            return {"text": hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()}
        if isinstance(value, Mapping):
            return {str(name): plain(inner) for name, inner in sorted(value.items())}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return value

    text = json.dumps([operation, plain(fields)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
