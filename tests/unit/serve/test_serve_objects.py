"""Assets in an object store: whole or absent whatever fails, the same on every machine; and faults are told politely."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from objects_rig import Faulty, in_folder, in_memory, names

from tubelet.core.errors import UserError
from tubelet.serve import objects as room
from tubelet.serve.objects import Objects, ObjectStore, open_assets
from tubelet.serve.records import Asset, StorageFull
from tubelet.serve.store import Store

DATA = b"frames " * 1000
ID = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(params=["memory", "folder"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Objects, Faulty]:
    return in_memory() if request.param == "memory" else in_folder(tmp_path / "bucket")


@pytest.fixture
def store(parts: tuple[Objects, Faulty], tmp_path: Path) -> ObjectStore:
    return ObjectStore(parts[0], tmp_path, reserve=0)


@pytest.fixture
def faulty(parts: tuple[Objects, Faulty]) -> Faulty:
    return parts[1]


def age(store: ObjectStore, *names: str) -> None:
    """Make objects in a folder older than an hour."""
    root = store.objects._root
    assert root is not None
    for name in names:
        os.utime(root / name, (time.time() - 7200,) * 2)


def test_put_keeps_bytes_under_their_hash(store: ObjectStore) -> None:
    asset = store.put(DATA, "video", "video/mp4")
    assert asset == Asset(id=ID, role="video", media="video/mp4", bytes=len(DATA))
    assert names(store.objects) == [f"assets/{ID}"]
    assert (store.size(ID), store.read(ID), store.path(ID)) == (len(DATA), DATA, None)
    assert store.verify(asset)
    assert store.put(DATA, "input", "video/mp4").id == ID
    assert len(names(store.objects)) == 1


def test_a_film_of_many_parts_and_nothing_at_all(store: ObjectStore, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(os.urandom(1000) * 13_000)  # more than one part of an upload, more than one piece of a download
    asset = store.put(film, "video", "video/mp4")
    assert asset.id == hashlib.sha256(film.read_bytes()).hexdigest()
    assert asset.bytes == store.size(asset.id) == 13_000_000
    assert store.verify(asset)
    fetched = store.fetch(asset.id, tmp_path / "in")
    assert fetched == tmp_path / "in" / asset.id
    assert fetched.read_bytes() == film.read_bytes()
    assert fetched.stat().st_mode & 0o077 == 0
    empty = store.put(b"", "input", "image/png")
    assert (empty.bytes, store.read(empty.id), store.verify(empty)) == (0, b"", True)
    nothing = store.fetch(empty.id, tmp_path / "in")
    assert nothing is not None
    assert nothing.read_bytes() == b""
    assert store.used() == store.weigh({asset.id, empty.id, "0" * 64}) == 13_000_000


@pytest.mark.parametrize(("start", "end"), [(0, 7000), (0, 1), (6999, 7000), (123, 4567), (10, 10)])
def test_a_download_comes_in_pieces(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, start: int, end: int) -> None:
    monkeypatch.setattr(room, "PIECE", 1000)
    store.put(DATA, "video", "video/mp4")

    async def pieces() -> list[bytes]:
        return [piece async for piece in store.pieces(ID, start, end)]

    got = asyncio.run(pieces())
    assert b"".join(got) == DATA[start:end]
    assert all(len(piece) <= 1000 for piece in got)
    assert len(got) == -(-(end - start) // 1000)


def test_who_downloads_what_goes_meanwhile_is_told(
    store: ObjectStore, faulty: Faulty, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(room, "PIECE", 1000)
    monkeypatch.setattr(room, "CHUNK", 1000)
    asset = store.put(DATA, "video", "video/mp4")

    async def pieces() -> None:
        async for _ in store.pieces(ID, 0, len(DATA)):
            store.remove(ID)

    with pytest.raises(FileNotFoundError):
        asyncio.run(pieces())
    for call in (lambda: store.fetch(ID, tmp_path / "in"), lambda: store.verify(asset)):
        store.put(DATA, "video", "video/mp4")
        asked: list[int] = []

        def fault(name: str, given: Any, asked: list[int] = asked) -> None:
            asked.append(1)
            if len(asked) == 4:
                faulty.store.delete(f"assets/{ID}")

        faulty.fault = fault
        assert not call()
        faulty.back()
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize("id", ["", "a" * 63, "A" * 64, "../" + "a" * 61, "a" * 64 + "\n", "/etc/passwd", "..", "٠" * 64, 5])
def test_only_a_hash_is_an_id(store: ObjectStore, faulty: Faulty, tmp_path: Path, id: Any) -> None:
    assert store.size(id) is store.read(id) is store.fetch(id, tmp_path) is None
    store.remove(id)
    assert not store.verify(Asset(id=id, role="video", media="video/mp4", bytes=0))
    assert faulty.calls == [], "the store is never asked for such a name"


@pytest.mark.parametrize("late", [False, True])
def test_whatever_fails_is_said_and_leaves_nothing_torn(store: ObjectStore, faulty: Faulty, late: bool, tmp_path: Path) -> None:
    """Each kind of call fails, before it did anything or when all was done; then all works again."""
    film = tmp_path / "film.mp4"
    film.write_bytes(DATA)
    asset = store.put(b"another", "video", "video/mp4")
    calls = {
        "put": lambda: store.put(film, "video", "video/mp4"),
        "head": lambda: store.size(asset.id),
        "get": lambda: store.read(asset.id),
        "get_range": lambda: store.verify(asset),
        "delete": lambda: store.remove(asset.id),
        "list": store.used,
    }
    for name, call in calls.items():
        faulty.away(name)
        if late:
            faulty.fault, faulty.late = faulty.late, faulty.fault
        with pytest.raises(StorageFull, match="connection refused"):
            call()
        faulty.back()
        faulty.late = faulty.fault
        left = {entry.name: entry.bytes for entry in store.objects.entries("assets/")}
        assert left.get(f"assets/{ID}", len(DATA)) == len(DATA), "whole or absent"
        call()
    assert store.verify(store.put(DATA, "video", "video/mp4"))
    assert names(store.objects, "assets/") == [ID]


def test_a_source_that_breaks_off_leaves_nothing(store: ObjectStore) -> None:
    """The disk that a long film is read from fails after some of its parts were taken."""

    class Failing(io.BytesIO):
        def read(self, *given: Any) -> bytes:
            if self.tell() > 6 * 2**20:
                raise OSError(5, "Input/output error")
            return super().read(*given)

    with pytest.raises((StorageFull, OSError)):
        store.objects.put("assets/torn", Failing(bytes(16 * 2**20)))
    assert names(store.objects) == []
    with pytest.raises(FileNotFoundError):
        store.put(Path("/nowhere/film.mp4"), "video", "video/mp4")


def test_a_folder_holds_what_was_put_before_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, _ = in_folder(tmp_path / "bucket")
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)))
    ObjectStore(objects, tmp_path).put(DATA, "video", "video/mp4")
    assert synced == [str(tmp_path / "bucket" / "assets" / ID), str(tmp_path / "bucket" / "assets")]


def test_sweep_keeps_what_is_named_and_what_is_young(tmp_path: Path) -> None:
    objects, _ = in_folder(tmp_path / "bucket")
    store = ObjectStore(objects, tmp_path)
    named, young, orphan = (store.put(text, "video", "video/mp4").id for text in (b"named", b"young", b"orphan"))
    objects.put("assets/notes.txt", b"foreign")
    objects.put("journals/video_1/answers/000000.safetensors", b"an answer")
    torn, writing = (tmp_path / "bucket" / "assets" / f"{'a' * 64}#{number}" for number in (1, 2))
    torn.write_bytes(b"half")
    writing.write_bytes(b"half")
    age(store, f"assets/{named}", f"assets/{orphan}", "assets/notes.txt", f"assets/{torn.name}")
    age(store, "journals/video_1/answers/000000.safetensors")
    assert store.sweep({named}) == 2
    assert names(objects, "assets/") == sorted([named, young, "notes.txt"])
    assert len(names(objects, "journals/")) == 1
    assert writing.exists()
    assert not torn.exists()


def test_verify_sees_every_change(store: ObjectStore) -> None:
    asset = store.put(DATA, "video", "video/mp4")
    assert not store.verify(Asset(asset.id, asset.role, asset.media, asset.bytes - 1))
    for changed in (DATA[:-1] + b"!", DATA[:-1]):
        store.objects.put(f"assets/{ID}", changed)
        assert not store.verify(asset)
    store.remove(ID)
    assert not store.verify(asset)


def test_the_reserve_of_a_shared_folder_is_left_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, _ = in_folder(tmp_path / "bucket")
    store = ObjectStore(objects, tmp_path, reserve=1000)
    monkeypatch.setattr(objects, "free", lambda: 1000 + len(DATA) - 1)
    with pytest.raises(StorageFull):
        store.put(DATA, "video", "video/mp4")
    assert names(objects) == []
    assert store.free() == 1000 + len(DATA) - 1
    monkeypatch.setattr(objects, "free", lambda: 999)
    assert not store.roomy()


def test_a_store_that_is_away_is_said_once_and_looked_for_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tubelet.serve")
    objects, faulty = in_memory()
    store = ObjectStore(objects, tmp_path, reserve=0)
    for _ in range(9):
        assert store.answers()
        assert store.roomy()
    assert len(faulty.calls) == 1
    faulty.away()
    for _ in range(3):
        with pytest.raises(StorageFull):
            store.put(DATA, "video", "video/mp4")
    monkeypatch.setattr(room, "PROBED", 0.0)
    objects._due = 0.0
    assert not store.answers()
    assert not store.roomy()
    faulty.back()
    assert store.roomy()
    said = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(line["event"], line.get("said")) for line in said] == [
        ("object store away", "Generic S3 error: connection refused"),
        ("object store away: over", None),
    ]


def test_a_folder_that_is_gone_is_no_store_that_answers(tmp_path: Path) -> None:
    objects, _ = in_folder(tmp_path / "bucket")
    (tmp_path / "bucket").rmdir()
    assert not objects.answers()
    assert objects.free() == 0


@pytest.mark.parametrize(
    "url",
    [
        "films",
        "/films",
        "ftp://films/x",
        "s3:",
        "s3:///x",
        "s3://key:secret@films/x",
        "s3://films/x?region=y",
        "file://films/x",
        "file:x",
        "memory:///",
        "https://films.example/x",
    ],
)
def test_what_is_no_object_store_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"s3://BUCKET/PREFIX"):
        Objects.open(url)


def test_an_address_becomes_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_assets(tmp_path, None), Store)
    folder = tmp_path / "shared films" / "deep"
    store = open_assets(tmp_path, folder.as_uri())
    assert isinstance(store, ObjectStore)
    assert folder.stat().st_mode & 0o077 == 0
    assert list(folder.iterdir()) == [], "the trial leaves nothing"
    assert store.put(DATA, "video", "video/mp4").bytes == (folder / "assets" / ID).stat().st_size
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="correct its address"):
        open_assets(tmp_path, (tmp_path / "file" / "below").as_uri())
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UserError, match=r"tubelet\[objects\]"):
        open_assets(tmp_path, folder.as_uri())


@pytest.mark.parametrize("name", ["put", "get", "list", "delete"])
def test_a_store_that_refuses_something_is_refused_at_the_start(name: str) -> None:
    objects, faulty = in_memory()
    objects.check()
    assert names(objects) == []
    faulty.away(name)
    with pytest.raises(UserError, match=r"s3://films/here: Generic S3 error: connection refused; check its address"):
        objects.check()


def test_a_bucket_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real client, and nobody who listens."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    begin = time.monotonic()
    with pytest.raises(UserError, match="cannot use the object store s3://films/here"):
        Objects.open("s3://films/here").check()
    assert time.monotonic() - begin < 60
