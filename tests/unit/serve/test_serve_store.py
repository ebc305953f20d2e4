"""The asset folder: whole files or none, on a full disk too; ids that are no paths; a sweeper that spares what is needed."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tubelet.serve.records import Asset, StorageFull
from tubelet.serve.store import Store

DATA = b"frames " * 1000
ID = hashlib.sha256(DATA).hexdigest()
CALLS = ("open", "write", "fsync", "close", "replace")
"""What `put` asks the system for, all of it by these names of `os`."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "assets", reserve=0)


def names(store: Store) -> list[str]:
    return sorted(os.listdir(store.folder))


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_put_keeps_bytes_under_their_hash(store: Store) -> None:
    asset = store.put(DATA, "video", "video/mp4")
    assert asset == Asset(id=ID, role="video", media="video/mp4", bytes=len(DATA))
    path = store.path(ID)
    assert path is not None
    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o077 == 0
    assert names(store) == [ID]


def test_put_copies_a_file_larger_than_one_piece(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "film.mp4"
    source.write_bytes(os.urandom(1000) * 2500)
    asset = store.put(source, "video", "video/mp4")
    assert asset.id == hashlib.sha256(source.read_bytes()).hexdigest()
    assert asset.bytes == 2_500_000
    assert store.verify(asset)
    assert source.exists()


def test_put_of_nothing_and_put_twice(store: Store) -> None:
    empty = store.put(b"", "journal", "application/octet-stream")
    assert empty.bytes == 0
    assert store.verify(empty)
    assert store.put(DATA, "input", "video/mp4").id == store.put(DATA, "video", "video/mp4").id
    assert len(names(store)) == 2


def test_a_short_write_is_continued(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data[:100])))
    assert store.verify(store.put(DATA, "video", "video/mp4"))


class Fault:
    """Lets `count` system calls pass, and fails the next with an error number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, number: int, log: list[str]) -> None:
        self.left, self.number, self.fired = count, number, ""
        for name in CALLS:
            monkeypatch.setattr(os, name, self.failing(name, getattr(os, name), log))

    def failing(self, name: str, call: Callable[..., object], log: list[str]) -> Callable[..., object]:
        def wrapped(*args: object, **words: object) -> object:
            log.append(name)
            self.left -= 1
            if self.left == -1:
                self.fired = name
                if name == "close":  # the descriptor is gone all the same
                    call(*args, **words)
                raise OSError(self.number, os.strerror(self.number))
            return call(*args, **words)

        return wrapped


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_at_every_step_is_said_and_leaves_nothing_torn(store: Store, number: int) -> None:
    """Fails the first call, then the second, until a run passes unharmed; after each the store must be sound and work."""
    fired = []
    for step in range(100):
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, step, number, [])
            try:
                store.put(DATA, "video", "video/mp4")
                failed = False
            except StorageFull:
                failed = True
        assert failed == bool(fault.fired), f"step {step} ({fault.fired})"
        assert not [name for name in names(store) if name != ID], f"a leftover after step {step} ({fault.fired})"
        path = store.path(ID)
        assert path is None or path.read_bytes() == DATA, f"a torn asset after step {step} ({fault.fired})"
        if not failed:
            break
        fired.append(fault.fired)
        assert store.verify(store.put(DATA, "video", "video/mp4")), "works again once there is room"
        store.remove(ID)
    assert set(fired) == set(CALLS)


def test_an_error_that_is_not_fullness_is_not_called_so(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Fault(patch, 1, errno.EIO, [])
        with pytest.raises(OSError, match="Input/output") as caught:
            store.put(DATA, "video", "video/mp4")
    assert caught.value.__cause__ is None, "who follows the causes of an error comes to an end"
    assert names(store) == []


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(store: Store) -> None:
    with pytest.MonkeyPatch.context() as patch:
        log: list[str] = []
        Fault(patch, 10**6, 0, log)
        store.put(DATA, "video", "video/mp4")
    assert "write" in log[: log.index("fsync")]
    assert log.index("fsync") < log.index("replace")
    assert "fsync" in log[log.index("replace") :]


def test_the_reserve_is_left_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "assets", reserve=1000)
    monkeypatch.setattr(store, "free", lambda: 1000 + len(DATA) - 1)
    with pytest.raises(StorageFull):
        store.put(DATA, "video", "video/mp4")
    assert names(store) == []
    monkeypatch.setattr(store, "free", lambda: 1000 + len(DATA))
    assert store.verify(store.put(DATA, "video", "video/mp4"))


def test_a_missing_source_is_not_a_full_disk(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put(tmp_path / "no.mp4", "video", "video/mp4")
    assert names(store) == []


@pytest.mark.parametrize(
    "id",
    [
        "",
        "a" * 63,
        "a" * 65,
        "A" * 64,
        "g" * 64,
        "../" + "a" * 61,
        "a" * 64 + "\n",
        "/etc/passwd",
        ".",
        "..",
        "\0" * 64,
        "٠" * 64,
        5,
    ],
)
def test_only_a_hash_is_an_id(store: Store, id: str) -> None:
    assert store.path(id) is None
    store.remove(id)
    assert not store.verify(Asset(id=id, role="video", media="video/mp4", bytes=0))


def test_a_link_under_the_name_of_an_asset_is_not_followed(store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(DATA)
    (store.folder / ID).symlink_to(secret)
    (store.folder / ("b" * 64)).mkdir()
    assert store.path(ID) is None
    assert store.path("b" * 64) is None
    assert store.sweep(set(), older_than=-1) == 0
    store.put(DATA, "video", "video/mp4")
    assert not (store.folder / ID).is_symlink()
    assert secret.read_bytes() == DATA


def test_verify_sees_every_change(store: Store) -> None:
    asset = store.put(DATA, "video", "video/mp4")
    path = store.folder / asset.id
    assert store.verify(asset)
    assert not store.verify(Asset(asset.id, asset.role, asset.media, asset.bytes - 1))
    path.write_bytes(DATA[:-1] + b"!")
    assert not store.verify(asset)
    path.write_bytes(DATA[:-1])
    assert not store.verify(asset)
    store.remove(asset.id)
    assert not store.verify(asset)
    assert store.path(asset.id) is None


def test_a_disk_that_cannot_be_read_says_nothing_of_the_bytes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = store.put(DATA, "video", "video/mp4")

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", failing)
    with pytest.raises(OSError, match="Input/output"):
        store.verify(asset)


def test_sweep_keeps_what_is_named_and_what_is_young(store: Store) -> None:
    named, young, orphan = (store.put(text, "video", "video/mp4").id for text in (b"named", b"young", b"orphan"))
    torn = store.folder / ".part-0123"
    torn.write_bytes(b"half")
    writing = store.folder / ".part-4567"
    writing.write_bytes(b"half")
    foreign = store.folder / "notes.txt"
    foreign.write_bytes(b"mine")
    for path in (store.folder / named, store.folder / orphan, torn, foreign):
        age(path, 3700)
    assert store.sweep({named}) == 2
    assert set(names(store)) == {named, young, ".part-4567", "notes.txt"}
    assert orphan not in names(store)


def test_an_orphan_that_is_put_again_is_young_again(store: Store) -> None:
    asset = store.put(DATA, "video", "video/mp4")
    age(store.folder / asset.id, 7200)
    store.put(DATA, "video", "video/mp4")
    assert store.sweep(set()) == 0
    assert store.verify(asset)


def test_many_threads_put_and_sweep_at_once(store: Store) -> None:
    """Two write the same bytes while the sweeper looks for old files: all end whole, no call fails."""
    done = threading.Event()
    errors: list[BaseException] = []

    def put(number: int) -> None:
        try:
            for turn in range(20):
                store.put(f"{number % 2} {turn}".encode() * 500, "video", "video/mp4")
        except BaseException as error:  # noqa: BLE001  shown by the assertion below
            errors.append(error)

    def sweep() -> None:
        while not done.is_set():
            store.sweep(set(), older_than=60)

    sweeper = threading.Thread(target=sweep)
    writers = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    sweeper.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    sweeper.join()
    assert errors == []
    assert len(names(store)) == 40
    for name in names(store):
        assert hashlib.sha256((store.folder / name).read_bytes()).hexdigest() == name


def test_free_is_what_the_system_says(store: Store) -> None:
    facts = os.statvfs(store.folder)
    assert abs(store.free() - facts.f_bavail * facts.f_frsize) < 1 << 30
