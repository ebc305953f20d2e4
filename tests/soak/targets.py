"""What is fuzzed: for each target the execution of any bytes, and the seeds from which bytes are drawn."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

Execute = Callable[[bytes], str]
"""One execution: what came of it, in a word. Raises what nobody foresaw."""
Target = Callable[[Path], contextlib.AbstractContextManager[tuple[Execute, list[bytes]]]]
"""Opened in a folder of its own, gives the execution and the seeds."""
PATIENCE = 25.0
"""Seconds after which a decoder that did not end itself counts as hung."""


# What is sent to the server.


@contextlib.contextmanager
def bodies(folder: Path) -> Iterator[tuple[Execute, list[bytes]]]:
    """Multipart, JSON and form bodies, in pieces, to the fields, to each kind of request. Byte 0: type; 1: kind; 2: pieces."""
    from api_rig import config_of
    from fastapi import Request

    from tubelet.serve import schemas
    from tubelet.serve.errors import of
    from tubelet.serve.requests import fingerprint, read_fields
    from tubelet.serve.submit import read_as

    types = ["multipart/form-data; boundary=b", "application/json", "application/x-www-form-urlencoded", "text/plain", ""]
    kinds = [kind for kind in vars(schemas).values() if isinstance(kind, type) and issubclass(kind, schemas.Asked)]

    async def at_once(work: Callable[..., Any], *given: Any) -> Any:
        return work(*given)

    room = SimpleNamespace(config=config_of(folder), read=at_once, decode=at_once)
    app = SimpleNamespace(state=SimpleNamespace(service=room))
    loop = asyncio.new_event_loop()

    async def answered(kind: bytes, model: Any, pieces: list[bytes]) -> str:
        async def receive() -> dict[str, Any]:
            body = pieces.pop(0) if pieces else b""
            return {"type": "http.request", "body": body, "more_body": bool(pieces)}

        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind)], "app": app}
        reading = read_fields(Request(scope, receive))
        try:
            async for fields in reading:
                assert len(fingerprint("create", fields)) == 64
                read_as(model, fields)
        except Exception as error:
            said = of(error)
            if said.status >= 500:
                raise
            assert len(said.message) < 1000, "what was sent is not repeated"
            return str(said.code)
        return "taken"

    def execute(data: bytes) -> str:
        kind, model, size, body = data[0] if data else 0, data[1:2], data[2:3], data[3:]
        length = max(1, size[0] if size else 255)
        pieces = [body[at : at + length] for at in range(0, len(body), length)]
        return loop.run_until_complete(
            answered(types[kind % len(types)].encode(), kinds[(model[0] if model else 0) % len(kinds)], pieces)
        )

    part = b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    file = b'--b\r\ncontent-disposition: form-data; name="%s"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n%s\r\n'
    end = b"--b--\r\n"
    words = part % (b"prompt", b"a ball") + part % (b"seconds", b"4") + part % (b"size", b"1280x720")
    forms = [
        words + end,
        words + file % (b"input_reference", b"\x89PNG\r\n\x1a\n") + end,
        part % (b"prompt", b"p") + part % (b"characters[][id]", b"char_" + b"0" * 26) + end,
        part % (b"video[id]", b"video_" + b"0" * 26) + part % (b"shots[0][prompt]", b"p") + end,
    ]  # fmt: skip
    objects = [
        {"prompt": "p", "seconds": 4, "size": "64x48", "seed": 7, "loop": True},
        {"prompt": "p", "input_reference": {"image_url": "data:image/png;base64,AAAA"}, "characters": [{"id": "char_1"}]},
        {"prompt": "p", "shots": [{"prompt": "a", "seconds": 1.5}, {"prompt": "b", "seconds": "2"}], "expand": False},
        {"url": "https://example.org/", "name": "n", "event_types": ["video.completed"], "scopes": ["read"], "place": 1},
    ]
    seeds = [bytes([0, number, 40]) + form for form in forms for number in (0, 5, 12)]
    seeds += [bytes([1, number, 255]) + json.dumps(value).encode() for value in objects for number in range(len(kinds))]
    seeds += [b"\x02\x05\xffprompt=a+ball&seconds=4&size=64x48&video%5Bid%5D=video_0"]
    try:
        yield execute, seeds
    finally:
        loop.close()


@contextlib.contextmanager
def addresses(folder: Path) -> Iterator[tuple[Execute, list[bytes]]]:
    """Ids, queries and headers through the whole application: byte 0 is the route; then lines: the id, the query, headers."""
    from api_rig import serving

    with serving(folder, cap=10**6) as rig:
        film = rig.film()["id"]
        rig.worker.stop()
        routes = [(method, route.path) for route in rig.app.routes for method in sorted(route.methods)]
        routes = [pair for pair in routes if pair != ("DELETE", "/v1/videos/{video_id}")] + [("GET", None)]
        loop = asyncio.new_event_loop()

        def execute(data: bytes) -> str:
            method, path = routes[(data[0] if data else 0) % len(routes)]
            id, query, *lines = [*data[1:].replace(b"FILM", film.encode()).replace(b"\r", b"").split(b"\n"), b"", b""]
            raw = quote(id, safe="/%") if path is None else path
            for name in ("video_id", "character_id", "file_id", "webhook_endpoint_id", "key_id", "model"):
                raw = raw.replace(f"{{{name}}}", quote(id, safe="%"))
            headers = [(b"host", b"127.0.0.1:8000")]
            headers += [(name.lower(), value) for name, _, value in (line.partition(b": ") for line in lines[:8]) if value]
            scope = {
                "type": "http", "method": method, "path": unquote(raw), "raw_path": raw.encode(), "query_string": query,
                "headers": headers, "http_version": "1.1", "scheme": "http", "asgi": {"version": "3.0", "spec_version": "2.3"},
                "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1), "root_path": "",
            }  # fmt: skip
            status, answer = loop.run_until_complete(_answer(rig.app, scope))
            if path == "/readyz" and status == 503:  # the worker has gone home
                return "503"
            assert status < 500, (status, answer[:300])
            if status >= 300 and status != 304 and method != "HEAD":
                assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
                assert len(answer) < 1000, "what was sent is not repeated"
            return str(status)

        hostile = [b"FILM", b"video_" + b"0" * 26, b"../../../../etc/passwd", b"%2e%2e%2f", b"\0", b"%00", b"\xff\xfe", b"tiny"]
        queries = [b"limit=5&order=asc&after=FILM", b"variant=thumbnail", b"purpose=vision&limit=-1", b"%ff=%00&limit=1e9"]
        heads = [
            b"range: bytes=0-3",
            b"if-none-match: *",
            b"idempotency-key: k\nx-stainless-retry-count: 1",
            b"last-event-id: 1",
        ]
        seeds = [
            bytes([number]) + b"\n".join((hostile[number % 8], queries[number % 4], heads[number % 4]))
            for number in range(len(routes))
        ]
        try:
            yield execute, [*seeds, *(bytes([len(routes) - 1]) + b"/v1/videos/" + id for id in hostile)]
        finally:
            loop.close()


async def _answer(app: Any, scope: dict[str, Any]) -> tuple[int, bytes]:
    """What an application answers to a request without a body, whose client then leaves."""
    status, body, asked = 0, bytearray(), False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.sleep(0.05)  # what streams for ever is left alone then
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        body.extend(message.get("body", b""))

    await app(scope, receive, send)
    return status, bytes(body)


@contextlib.contextmanager
def ranges(folder: Path) -> Iterator[tuple[Execute, list[bytes]]]:
    """A Range header, and behind line feeds If-Range and If-None-Match: what comes are the parts that were asked for."""
    import re

    from fastapi import Request

    from tubelet.serve.content import file_response
    from tubelet.serve.errors import ApiError
    from tubelet.serve.records import Asset

    whole = bytes(range(97))
    path = folder / "film"
    path.write_bytes(whole)
    film = Asset("a" * 64, "video", "video/mp4", len(whole))
    loop = asyncio.new_event_loop()
    names = (b"range", b"if-range", b"if-none-match")

    def execute(data: bytes) -> str:
        headers = [(name, value) for name, value in zip(names, data.split(b"\n"), strict=False) if value]
        head: dict[str, str] = {}

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def noting(message: Any) -> None:
                if message["type"] == "http.response.start":
                    head.update({name.decode(): value.decode() for name, value in message["headers"]})
                await send(message)

            await file_response(Request(scope), path, film, "film.mp4")(scope, receive, noting)

        scope = {"type": "http", "method": "GET", "headers": headers, "asgi": {"version": "3.0", "spec_version": "2.4"}}
        try:
            status, body = loop.run_until_complete(_answer(app, scope))
        except ApiError as error:
            if error.status not in (404, 416):
                raise
            return str(error.status)
        assert int(head.get("content-length", len(body))) == len(body)
        if status == 206 and "content-range" in head:
            first, last, size = map(int, re.findall(r"\d+", head["content-range"]))
            assert (body, size) == (whole[first : last + 1], len(whole))
        elif status == 206:
            mark = head["content-type"].partition("boundary=")[2].encode()
            parts = body.split(b"--" + mark)[1:-1]
            assert 1 < len(parts) <= 8
            for part in parts:
                said, _, piece = part.partition(b"\r\n\r\n")
                first, last, size = map(int, re.findall(rb"\d+", said.lower().partition(b"content-range")[2]))
                assert (piece.removesuffix(b"\r\n"), size) == (whole[first : last + 1], len(whole))
            return "206 in parts"
        else:
            assert (status, body) in ((200, whole), (304, b"")), (status, body)
        return str(status)

    tag = b'"' + b"a" * 64 + b'"'
    asked = [
        b"bytes=0-3",
        b"bytes=5-",
        b"bytes=-7",
        b"bytes=0-1,5-9, 20-",
        b"bytes=96-200",
        b"bytes=97-",
        b"lines=1-2",
        b"bytes=9-2",
    ]
    try:
        yield (
            execute,
            [*asked, *(value + b"\n" + tag for value in asked[:4]), b"bytes=0-3\n\n" + tag, b"bytes=1-2\nWed, 21 Oct 2015"],
        )
    finally:
        loop.close()


# What is read from data sets, systems and journals.


@contextlib.contextmanager
def tensors(folder: Path) -> Iterator[tuple[Execute, list[bytes]]]:
    """Safetensors to all that read them. Even byte 0: the header up to a zero byte, behind a fitting length; odd: as it is."""
    import torch
    from safetensors.torch import save
    from torch import nn

    from tubelet.core.errors import UserError
    from tubelet.core.weights import load_module, load_tensors
    from tubelet.data.schema import Record
    from tubelet.data.shards import ShardDataset, ShardWriter
    from tubelet.generate.journal import Recorded
    from tubelet.generate.layouts import read_dit_file

    class Network(nn.Module):
        config = None

    with ShardWriter(folder / "data") as writer:
        writer.add(Record("a", {"latent": torch.zeros(1, 1, 1, 1)}, {}))
    data = ShardDataset(folder / "data", verify="never")
    entry = data.entries[0]
    journal = Recorded(Network(), folder / "journal", "digest")
    layer = nn.Linear(2, 2)
    path = journal._path(0)

    def execute(drawn: bytes) -> str:
        raw = drawn[1:]
        if drawn[:1] and drawn[0] % 2 == 0:
            head, _, body = raw.partition(b"\0")
            raw = len(head).to_bytes(8, "little") + head + body
        path.write_bytes(raw)
        data.entries[0] = replace(entry, offset=0, size=len(raw), meta_offset=len(raw), meta_size=2)
        data._maps = {entry.shard: raw + b"{}"}  # type: ignore[dict-item]
        word = []
        for read in (
            lambda: load_tensors(path),
            lambda: load_module(path, layer),
            lambda: data.read(0),
            lambda: read_dit_file(path),
            lambda: journal._read(0, "key"),
        ):
            try:
                word.append("-" if read() is None else "read")
            except UserError:
                word.append("no")
        return " ".join(word)

    some = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    seeds = []
    for value in (
        some,
        {"a": torch.zeros(0, 3)},
        {"a": torch.ones(1, dtype=torch.bfloat16), "b": torch.ones(3, dtype=torch.bool)},
    ):
        for said in (None, {"question": "key", "answer": "x"}):
            raw = save(value, said)
            size = int.from_bytes(raw[:8], "little")
            seeds += [b"\1" + raw, b"\0" + raw[8 : 8 + size].strip() + b"\0" + raw[8 + size :]]
    heads = [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"U64","shape":[-1],"data_offsets":[4,0]},"__metadata__":{"a":1}}',
    ]  # fmt: skip
    yield execute, seeds + [b"\0" + head + b"\0" + bytes(8) for head in heads]


@contextlib.contextmanager
def indices(folder: Path) -> Iterator[tuple[Execute, list[bytes]]]:
    """A data set's seal and index. Byte 0 by 3: the seal as it is; the index as it is, sealed; rows as JSON, sealed.

    No file beside the folder may be opened, changed or removed, by reading or by going on writing there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from tubelet.core.files import sha256
    from tubelet.data.schema import Record
    from tubelet.data.shards import SEAL, ShardWriter, read_index

    pattern = folder / "pattern"
    with ShardWriter(pattern) as writer:
        for key in ("a", "b"):
            writer.add(Record(key, {"latent": torch.zeros(1, 1, 1, 1)}, {"fps": 8.0}))
    rows = [dict(vars(entry)) for entry in read_index(pattern)[0]]
    kept = {path.name: path.read_bytes() for path in pattern.iterdir()}
    place, index = folder / "set", "index-00000002.parquet"
    place.mkdir()
    for name in ("victim.entries.json", "victim", "shard-00000.tar.entries.json"):
        (folder / name).write_text("{}")
    outside: list[str] = []
    watched = [False]

    def heard(event: str, facts: tuple[Any, ...]) -> None:
        touches = event in ("open", "os.remove", "os.rename", "os.mkdir", "os.truncate")
        if watched[0] and touches and isinstance(facts[0], (str, bytes, os.PathLike)):
            path = Path(os.path.abspath(os.fsdecode(facts[0])))
            if not path.is_relative_to(place) and path.suffix not in (".py", ".pyc"):
                outside.append(f"{event} {path}")

    sys.addaudithook(heard)

    def execute(data: bytes) -> str:
        for old in place.iterdir():
            old.unlink()
        for name, content in kept.items():
            (place / name).write_bytes(content)
        kind, rest = (data[0] if data else 0) % 3, data[1:]
        if kind == 0:
            (place / SEAL).write_bytes(rest)
        elif kind == 1:
            (place / index).write_bytes(rest)
        else:
            try:
                said = json.loads(rest)
                table = pa.Table.from_pylist([row for row in said["rows"] if isinstance(row, dict)])
                pq.write_table(table, place / index)
                shards = said["shards"]
            except Exception:  # noqa: BLE001  what is no table at all
                return "no rows"
            facts = {"records": table.num_rows, "index": index, "index_sha256": sha256(place / index), "shards": shards}
            more = said.get("seal")
            (place / SEAL).write_text(json.dumps({**facts, **(more if isinstance(more, dict) else {})}))
        if kind == 1:
            seal = json.loads(kept[SEAL])
            (place / SEAL).write_text(json.dumps({**seal, "index_sha256": sha256(place / index)}))
        outside.clear()
        watched[0] = True
        try:
            return _used(place)
        finally:
            watched[0] = False
            assert outside == [], outside

    seal = json.loads(kept[SEAL])
    structured = [
        {"rows": rows, "shards": seal["shards"]},
        {"rows": [{**rows[0], "shard": "../victim"}], "shards": {"../victim": 2}},
        {"rows": [{**rows[0], "shard": f"{folder}/victim"}], "shards": {f"{folder}/victim": 2}},
        {"rows": [{**rows[0], "offset": -5, "size": 10**18}], "shards": seal["shards"]},
        {"rows": [{**rows[0], "key": "../x", "tensors": "[]", "meta": "{"}], "shards": seal["shards"]},
        {"rows": [{**rows[0], "offset": "1", "key": 3, "tensors": '{"latent":1}'}], "shards": seal["shards"]},
        {"rows": [{**rows[0], "sha256": None, "more": 1}], "shards": {"shard-00000.tar": 1e400}},
        {"rows": [], "shards": {}, "seal": {"index": "../pattern/index-00000002.parquet"}},
    ]
    seeds = [b"\0" + kept[SEAL], b"\1" + kept[index], *(b"\2" + json.dumps(value).encode() for value in structured)]
    yield execute, [*seeds, b"\0[]", b'\0{"index":1}', b'\0{"index":"' + index.encode() + b'","shards":[]}']


def _used(place: Path) -> str:
    """All that is done with a data set: read, looked over, gone on with."""
    from tubelet.core.errors import UserError
    from tubelet.data.shards import ShardDataset, ShardWriter

    try:
        data = ShardDataset(place, policy="skip")
    except UserError:
        word = "refused"
    else:
        few = range(min(4, len(data)))
        word = f"{sum(data.read(number) is not None for number in few)} of {len(few)}"
        for call in (lambda: data.shapes("latent"), lambda: [data.facts(number) for number in few], data.check):
            with contextlib.suppress(UserError):
                call()
    with contextlib.suppress(UserError):
        ShardWriter(place).close()
    return word


# What is decoded.


@contextlib.contextmanager
def boxes(folder: Path) -> Iterator[tuple[Execute, list[bytes]]]:
    """Our own readers of boxes, segments and chunks, and that of the child's answer, which a first byte of 255 is."""
    from tubelet.serve import confine, intake

    def execute(data: bytes) -> str:
        if data[:1] == b"\xff":
            rest = io.BytesIO(data[1:])
            try:
                header, parts = confine._parsed(rest.readline(confine.HEADER), rest)
                assert sum(map(len, parts)) <= len(data)
                return intake._told(header, parts).media
            except confine.ChildFailed as error:
                return error.reason
            except intake.Refused as refused:
                return f"answer {refused.code}"
        media = intake.sniff(data[:64])
        if media is None:
            return "unknown"
        try:
            if media.startswith("video/") and not intake._whole(data, media):
                return "torn"
            found = intake.credentials_in(data, media)
        except intake.Refused:
            return "refused"
        return f"{media} {'with' if found else 'without'}"

    answers = [
        b'{"_lengths":[2,1]}\nabc',
        b'{"kind":"video","size":[48,64],"frames":8,"fps":8.0,"_lengths":[3,0]}\nabc',
        b'{"kind":"image","size":[48,64],"frames":1,"fps":0.0,"_lengths":[1,2]}\nabc',
        b'{"_lengths":[],"_memory":true}\n',
        b'{"_lengths":[-1,99]}\n',
        b"[]\n",
        b'{"_lengths":["1e9"]}',
    ]
    yield execute, [*_clips(), *(b"\xff" + answer for answer in answers)]


@contextlib.contextmanager
def clips(folder: Path) -> Iterator[tuple[Execute, list[bytes]]]:
    """Pictures and clips to the decoder, in a fork of a child that is ready, and now and then through the whole of it.

    The fork has the limits of the real child. Whatever becomes of it, this process lives; what breaks a fork, and one file in
    two hundred besides, goes through `intake.admit`, which must take or refuse it.
    """
    from dataclasses import asdict

    from tubelet.serve import confine, intake

    limits = asdict(intake.Limits())
    for media in ("video/mp4", "image/png"):
        intake._prepare({"task": "admit", "media": media, "limits": limits})
    count = [0]

    def execute(data: bytes) -> str:
        media = intake.sniff(data[:64])
        if media is None:
            return "unknown"
        count[0] += 1
        word = _forked(confine, intake, {"task": "admit", "media": media, "limits": limits}, data)
        if not word.startswith(("admitted", "refused", "memory")) or count[0] % 200 == 0:
            try:
                intake.admit(data)
            except intake.Refused as refused:
                word += f", then {refused.code}"
            else:
                word += ", then admitted"
        return word

    yield execute, _clips()


def _forked(confine: Any, intake: Any, request: dict[str, Any], data: bytes) -> str:
    """What the work on a file ends in, done in a fork of this process."""
    mine, theirs = os.pipe()
    number = os.fork()
    if number == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        word = "ended"
        try:
            confine.restrict(confine.SECONDS, threads=False)
            header, _ = intake._work(request, io.BytesIO(data))
            word = f"refused {header['refused']}" if "refused" in header else f"admitted {header['kind']}"
        except MemoryError:
            word = "memory"
        except BaseException as error:  # noqa: BLE001  this is what is asked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            word = f"escaped {type(error).__name__} in {place.name}"
        finally:
            os.write(theirs, word.encode())
            os._exit(0)
    os.close(theirs)
    try:
        if not select.select([mine], [], [], PATIENCE)[0]:
            os.kill(number, signal.SIGKILL)
        word = os.read(mine, 1000).decode()
        code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    finally:
        os.close(mine)
    return word or f"died of {-code}"


def _clips() -> list[bytes]:
    """One second of film in several containers, and pictures, some with credentials."""
    from test_serve_intake import film, numbered, picture

    store = bytes.fromhex("00000020") + b"jumb" + bytes(24)
    frames = numbered(4, 32, 32)
    mp4 = film(frames)
    signed = b"\0\0\0\x4duuid" + bytes.fromhex("d8fec3d61b0e483c92975828877ec481") + bytes(4) + b"manifest\0" + bytes(8) + store
    kinds = [
        film(frames, kind="mov"),
        film(frames, kind="webm", codec="libvpx-vp9"),
        film(frames, movflags="frag_keyframe+empty_moov"),
    ]
    uneven = film(frames, times=[0, 10, 500, 520])
    stills = [picture("PNG", size=(16, 12)), picture("JPEG", size=(16, 12)), picture("WEBP", size=(16, 12), lossless=True)]
    return [mp4, mp4 + signed, uneven, *kinds, *stills, picture("PNG", "P", (8, 8)), picture("JPEG", "CMYK", (8, 8))]


TARGETS: dict[str, tuple[Target, float]] = {
    "bodies": (bodies, 7),
    "addresses": (addresses, 5),
    "ranges": (ranges, 2),
    "tensors": (tensors, 4),
    "indices": (indices, 4),
    "boxes": (boxes, 2),
    "clips": (clips, 6),
}
"""What is fuzzed, and its share of the time."""
