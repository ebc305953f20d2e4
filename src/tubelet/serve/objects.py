"""The object store, where a server is told to keep its files in one: a bucket, or a folder that several machines see.

What one machine puts there every other machine has, so workers need to share nothing else but the job store. Under the prefix
of its address lie `assets/`, files named by the sha256 of their bytes, and `journals/`, copies of what workers noted of films
that are being made. Every name is made here, from hashes and the ids of jobs. An object is whole under its name or absent.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from tubelet.core.errors import UserError
from tubelet.serve.logs import say
from tubelet.serve.records import Asset, StorageFull
from tubelet.serve.store import ID, RESERVE, Assets, Store, keep_file

SCHEMES = ("s3", "gs", "az", "file")
PIECE = 512 * 2**10
"""Bytes of a download that are fetched at once: what a client that reads nothing keeps in memory."""
CHUNK = 4 * 2**20
"""Bytes that are fetched at once otherwise."""
PROBED = 5.0
"""Seconds for which it is taken to be so that the object store answers, or does not."""
# Where a bucket is without TLS, its address says so: nothing goes to another one than the operator names.
CLIENT = {"connect_timeout": "5s", "timeout": "20s", "allow_http": True}
RETRIES = {"max_retries": 3, "retry_timeout": datetime.timedelta(seconds=10)}
"""An object store that does not answer is given up within half a minute. Whoever waits is told; what must be is tried again."""
_STAGED = re.compile(r".+#[0-9]+")


@dataclass(frozen=True)
class Entry:
    """An object in a list: its name, its size in bytes, and when it was written, in unix seconds."""

    name: str
    bytes: int
    at: float


class Objects:
    """Named bytes in one object store. Many processes and threads may use it at once. Make it with `open`.

    Every method but `check` raises `StorageFull`, with nothing half-written, when the store is full, does not answer or
    refuses.
    """

    def __init__(self, store: Any, place: str, root: Path | None = None) -> None:
        """`store`: one of obstore's; `place`: what people call it; `root`: its folder, where it is one."""
        self._store, self.place, self._root = store, place, root
        self._away = False
        self._looking, self._good, self._due = threading.Lock(), True, 0.0

    @classmethod
    def open(cls, url: str) -> Objects:
        """The object store at `s3://BUCKET/PREFIX` (gs, az) or `file:///FOLDER`, which is made when absent.

        Where a bucket is and how one gets in says the environment, as for other programs. Nothing is asked of it yet. Raises
        UserError when there can be no such store.
        """
        try:
            from obstore.exceptions import BaseError
            from obstore.store import LocalStore, from_url
        except ModuleNotFoundError as error:
            raise UserError("an object store needs obstore; run pip install 'tubelet[objects]'") from error
        address = urlsplit(url)
        folder = address.scheme == "file"
        there = address.path.startswith("/") and not address.netloc if folder else address.hostname is not None
        if address.scheme not in SCHEMES or not there or address.query or address.fragment or "@" in address.netloc:
            raise UserError(f"{url!r} is no object store; write s3://BUCKET/PREFIX, gs://, az:// or file:///FOLDER")
        try:
            if folder:
                root = Path(unquote(address.path))
                root.mkdir(mode=0o700, parents=True, exist_ok=True)
                return cls(LocalStore(root, automatic_cleanup=True), url, root)
            more: dict[str, Any] = {"client_options": CLIENT, "retry_config": RETRIES}
            return cls(from_url(url, **more), url)
        except (BaseError, OSError, ValueError) as error:
            raise UserError(f"cannot use the object store {url}: {_reason(error)}; correct its address") from error

    def check(self) -> None:
        """Raises UserError unless objects can be written, read, listed and removed."""
        name = f"check/{secrets.token_hex(16)}"
        try:
            self.put(name, b"tubelet")
            good = self.get(name) == b"tubelet" and [entry.name for entry in self.entries("check/") if entry.name == name] == [
                name
            ]
            self.remove(name)
        except StorageFull as error:
            raise UserError(
                f"cannot use the object store {self.place}: {_reason(error.__cause__ or error)}; check its address, the "
                "credentials in the environment, and that objects may be written, read, listed and deleted there"
            ) from error
        if not good:
            raise UserError(f"the object store {self.place} does not give back what it was given; use another one")

    def answers(self) -> bool:
        """Whether the store answers, or did so seconds ago: whoever asks often makes it answer no more often."""
        if time.monotonic() >= self._due and self._looking.acquire(blocking=False):  # others take the last word meanwhile
            try:
                self.folders("check/")  # where a bucket is missing, that an object is says nothing
                self._good = self._root is None or self._root.is_dir()
            except StorageFull:
                self._good = False
            finally:
                self._due = time.monotonic() + PROBED
                self._looking.release()
        return self._good

    def put(self, name: str, data: bytes | BinaryIO) -> None:
        """Keep bytes, or those of an open file, under a name. They replace what was there before."""
        with self._telling():
            self._store.put(name, data, max_concurrency=4)
            if self._root is not None:  # whoever keeps buckets sees to it; a folder's files would not outlive a power cut
                _sync(self._root / name)

    def get(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """The bytes from `start` up to `end`, which lies behind `start` and within the object; None when it is not there."""
        with self._telling(), contextlib.suppress(FileNotFoundError):
            if end is None:
                return bytes(self._store.get(name).bytes())
            return bytes(self._store.get_range(name, start=start, end=end))
        return None

    async def part(self, name: str, start: int, end: int) -> bytes | None:
        """As `get`, without a thread that waits."""
        with self._telling(), contextlib.suppress(FileNotFoundError):
            return bytes(await self._store.get_range_async(name, start=start, end=end))
        return None

    def size(self, name: str) -> int | None:
        """How many bytes it has; None when it is not there."""
        with self._telling(), contextlib.suppress(FileNotFoundError):
            return self._store.head(name)["size"]
        return None

    def remove(self, name: str) -> None:
        """Forget an object; nothing happens when it is not there."""
        with self._telling(), contextlib.suppress(FileNotFoundError):
            self._store.delete(name)

    def remove_all(self, folder: str) -> None:
        """Forget all objects whose names begin with a folder's, which ends in "/"."""
        for _ in range(3):  # who removes the same ones at the same time ends a turn
            names = [entry.name for entry in self.entries(folder)]
            if not names:
                break
            with self._telling(), contextlib.suppress(FileNotFoundError):
                self._store.delete(names)
        if self._root is not None:  # what a process left there that died while it wrote
            shutil.rmtree(self._root / folder, ignore_errors=True)

    def entries(self, folder: str) -> Iterator[Entry]:
        """All objects whose names begin with a folder's, which ends in "/"."""
        with self._telling():
            for some in self._store.list(folder):
                for found in some:
                    yield Entry(found["path"], found["size"], found["last_modified"].timestamp())

    def folders(self, folder: str) -> list[str]:
        """Names of the folders within a folder, without its own."""
        with self._telling():
            return [name.removeprefix(folder) for name in self._store.list_with_delimiter(folder)["common_prefixes"]]

    def free(self) -> int | None:
        """Bytes of its disk that may still be filled, where it is a folder; a bucket says nothing of that."""
        if self._root is None:
            return None
        try:
            facts = os.statvfs(self._root)
        except OSError:
            return 0
        return facts.f_bavail * facts.f_frsize

    def sweep_staged(self, older_than: float) -> int:
        """Remove what processes left that died while they wrote into a folder; how many there were.

        In a bucket nothing is ever seen of an upload that was not ended; its owner sets how long such parts are kept.
        """
        removed = 0
        for path in list(self._root.rglob("*#*")) if self._root is not None else ():
            with contextlib.suppress(FileNotFoundError):
                if _STAGED.fullmatch(path.name) and path.stat().st_mtime <= time.time() - older_than:
                    path.unlink()
                    removed += 1
        return removed

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn what a store says that cannot do its work into StorageFull, and say once why it cannot."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError) as error:
            if not self._away:
                self._away = True
                say("object store away", said=_reason(error))
            raise StorageFull(f"the object store cannot be used now: {_reason(error)}") from error
        if self._away:
            self._away = False
            say("object store away: over")


def _reason(error: BaseException) -> str:
    """What the store says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def _sync(path: Path) -> None:
    for place in (path, path.parent):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


class ObjectStore:
    """Assets in an object store, as `Store` keeps them in a folder. This machine's disk holds none of them.

    There is no lock between machines. Whoever puts an asset looks once more when a row names it, as with a folder, so an asset
    that another machine's sweeper took meanwhile is put again.
    """

    def __init__(self, objects: Objects, scratch: Path, reserve: int = RESERVE) -> None:
        """`scratch`: a folder of this machine, where work is done; `reserve`: bytes of its disk that are left free, and of the
        object store's where it is a folder."""
        self.objects, self._scratch, self.reserve = objects, Path(scratch), reserve
        self._sizes: dict[str, int] = {}

    def put(self, data: bytes | Path, role: str, media: str) -> Asset:
        """Keep bytes, or a copy of a file, on every machine when this returns. The same bytes are kept once.

        Raises StorageFull, OSError for a source that cannot be read. Nothing torn is ever seen, and the same call can be made
        again.
        """
        with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
            id = hashlib.file_digest(file, "sha256").hexdigest()
            size, free = file.seek(0, os.SEEK_END), self.objects.free()
            if free is not None and free - size < self.reserve:
                raise StorageFull("less than the reserve is free")
            file.seek(0)
            self.objects.put(_name(id), file)
        return Asset(id=id, role=role, media=media, bytes=size)

    def path(self, id: str) -> Path | None:
        """None: no asset is a file of this machine."""
        return None

    def size(self, id: str) -> int | None:
        """Bytes of an asset; None when it is not there, or when `id` is not a sha256 in lower-case hex. Raises StorageFull."""
        return self.objects.size(_name(id)) if _is_id(id) else None

    def read(self, id: str) -> bytes | None:
        """All bytes of an asset; None when it is not there. Raises StorageFull."""
        return self.objects.get(_name(id)) if _is_id(id) else None

    async def pieces(self, id: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes of an asset from `start` up to `end`, a piece at a time. Raises FileNotFoundError, StorageFull."""
        while start < end:
            until = min(start + PIECE, end)
            piece = await self.objects.part(_name(id), start, until)
            if not piece:
                raise FileNotFoundError(id)
            yield piece
            start += len(piece)

    def fetch(self, id: str, folder: Path) -> Path | None:
        """An asset as a file, brought into `folder` unless it is there, which is the caller's to remove; None when there is no
        such asset. Raises StorageFull."""
        size = self.size(id)
        if size is None:
            return None
        path = folder / id
        with contextlib.suppress(FileNotFoundError):
            if not path.is_file():
                keep_file(path, self._chunks(id, size))
            return path
        return None

    def remove(self, id: str) -> None:
        """Forget an asset; nothing happens when it is not there. The caller knows that no row names it any more.

        Raises StorageFull.
        """
        if _is_id(id):
            self.objects.remove(_name(id))

    def verify(self, asset: Asset) -> bool:
        """Whether the object is there with the size and the bytes that the asset says. Raises StorageFull."""
        digest = hashlib.sha256()
        with contextlib.suppress(FileNotFoundError):
            if self.size(asset.id) == asset.bytes:
                for chunk in self._chunks(asset.id, asset.bytes):
                    digest.update(chunk)
                return digest.hexdigest() == asset.id
        return False

    def weigh(self, ids: set[str]) -> int:
        """Bytes of these assets together, those left out that are not there. Raises StorageFull."""
        total = 0
        for id in ids:
            if id not in self._sizes:
                size = self.size(id)
                if size is None:
                    continue
                self._remember(id, size)
            total += self._sizes[id]
        return total

    def sweep(self, keep: set[str], older_than: float = 3600.0) -> int:
        """Remove assets not in `keep` that are older than `older_than` seconds; how many were removed. Raises StorageFull."""
        old = [entry for entry in self.objects.entries("assets/") if entry.at <= time.time() - older_than]
        gone = [id for entry in old if _is_id(id := entry.name.removeprefix("assets/")) and id not in keep]
        for id in gone:
            self.objects.remove(_name(id))
        return len(gone) + self.objects.sweep_staged(older_than)

    def used(self) -> int:
        """Bytes of the assets. Lists them all. Raises StorageFull."""
        total = 0
        for entry in self.objects.entries("assets/"):
            total += entry.bytes
            self._remember(entry.name.removeprefix("assets/"), entry.bytes)
        return total

    def free(self) -> int:
        """Bytes that may still be filled: of this machine's disk, or of the object store's where it is a folder with fewer."""
        facts = os.statvfs(self._scratch)
        own, shared = facts.f_bavail * facts.f_frsize, self.objects.free()
        return own if shared is None else min(own, shared)

    def answers(self) -> bool:
        """Whether the object store answers, or did so seconds ago."""
        return self.objects.answers()

    def roomy(self) -> bool:
        """Whether there is room, and the object store answers."""
        return self.free() >= self.reserve and self.answers()

    def _chunks(self, id: str, size: int) -> Iterator[bytes]:
        """All bytes. Raises FileNotFoundError when it goes meanwhile."""
        for start in range(0, size, CHUNK):
            chunk = self.objects.get(_name(id), start, min(start + CHUNK, size))
            if chunk is None:
                raise FileNotFoundError(id)
            yield chunk

    def _remember(self, id: str, size: int) -> None:
        """What has a hash for a name never changes its size."""
        if len(self._sizes) >= 100_000:  # some 15 MB
            self._sizes.clear()
        self._sizes[id] = size


def open_assets(data: Path, url: str | None, check: bool = True) -> Assets:
    """Where a server with this data folder keeps its assets: in the object store at `url`, or without one in the folder.

    `check`: try whether the store can be used now. Raises UserError when it cannot.
    """
    if url is None:
        return Store(data / "assets")
    objects = Objects.open(url)
    if check:
        objects.check()
    return ObjectStore(objects, data)


def _is_id(id: str) -> bool:
    return isinstance(id, str) and ID.fullmatch(id) is not None


def _name(id: str) -> str:
    return f"assets/{id}"
