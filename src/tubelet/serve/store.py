"""The asset folder: content files named by the sha256 of their bytes, shared by the server and its workers.

Where these are on several machines, the assets may lie in an object store instead (`serve.objects`); `Assets` is what both
have in common.

A file is either whole under its name or absent: it is written under a temporary name, synced, renamed, and the folder is
synced. A row that names an asset is committed after `put` returns, so young files that no row names yet are left to live.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from tubelet.serve.records import Asset, StorageFull

CHUNK = 1 << 20  # bytes
RESERVE = 64 * 2**20
"""Bytes of a disk that are left free, for the database and the logs."""
ID = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".part-"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


def raise_if_full(error: OSError) -> None:
    """Raises StorageFull when it was a full disk, or one that cannot be written, that made a write fail."""
    if error.errno in _FULL:
        raise StorageFull(os.strerror(error.errno)) from error


def keep_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file that is whole under its name or absent. A power cut may take it. Raises StorageFull, OSError, and what
    `pieces` raises."""
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(16)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.writelines(pieces)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise_if_full(error)
        raise


class Assets(Protocol):
    """Content files named by the sha256 of their bytes: in a folder (`Store`) or an object store (`ObjectStore`).

    A name that is no sha256 in lower-case hex is one that is not there. Where StorageFull is raised, the same call works once
    there is room, or the object store answers.
    """

    reserve: int

    def put(self, data: bytes | Path, role: str, media: str) -> Asset:
        """Keep bytes, or a copy of a file, for good when this returns. Raises StorageFull, OSError."""
        ...

    def path(self, id: str) -> Path | None:
        """Where an asset lies on this machine; None when it does not."""
        ...

    def size(self, id: str) -> int | None:
        """Bytes of an asset; None when it is not there. Raises StorageFull."""
        ...

    def read(self, id: str) -> bytes | None:
        """All bytes of an asset; None when it is not there. Raises StorageFull."""
        ...

    def fetch(self, id: str, folder: Path) -> Path | None:
        """An asset as a file: its own, or a copy in `folder`, which is the caller's to remove; None when it is not there.

        Raises StorageFull.
        """
        ...

    def remove(self, id: str) -> None:
        """Forget an asset that no row names any more; nothing happens when it is not there. Raises StorageFull, OSError."""
        ...

    def verify(self, asset: Asset) -> bool:
        """Whether it is there with the size and the bytes that the asset says. Raises StorageFull, OSError."""
        ...

    def weigh(self, ids: set[str]) -> int:
        """Bytes of these assets together, those left out that are not there. Raises StorageFull."""
        ...

    def sweep(self, keep: set[str], older_than: float = 3600.0) -> int:
        """Remove assets not in `keep` that are older than so many seconds; how many were removed. Raises StorageFull."""
        ...

    def used(self) -> int:
        """Bytes of all assets. Raises StorageFull."""
        ...

    def free(self) -> int:
        """Bytes that this process may still fill."""
        ...

    def answers(self) -> bool:
        """Whether the place of the assets can be reached."""
        ...

    def roomy(self) -> bool:
        """Whether there is room for more."""
        ...


class Store:
    """Content-addressed files under one folder. Many processes and threads may use it at once."""

    def __init__(self, folder: Path, reserve: int = RESERVE) -> None:
        """`reserve`: bytes of the disk that `put` leaves free, for the database and the logs."""
        self.folder = Path(folder)
        self.reserve = reserve
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, data: bytes | Path, role: str, media: str) -> Asset:
        """Keep bytes, or a copy of a file, safe from a power cut when this returns. The same bytes are kept once.

        Raises StorageFull when less than the reserve would stay free or the disk refuses, OSError for a source that cannot
        be read or a disk that fails. No torn file is left by either, and the same call can be made again.
        """
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if self.free() - size < self.reserve:
            raise StorageFull("less than the reserve is free")
        try:
            id, size = self._write(_pieces(data))
        except OSError as error:
            raise_if_full(error)
            raise
        return Asset(id=id, role=role, media=media, bytes=size)

    def _write(self, pieces: Iterator[bytes]) -> tuple[str, int]:
        temporary = self.folder / f"{_TEMPORARY}{secrets.token_hex(16)}"
        digest, size = hashlib.sha256(), 0
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                for piece in pieces:
                    digest.update(piece)
                    size += len(piece)
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[os.write(handle, rest) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            # An older file of this name is replaced: its age would let the sweeper take it before a row names it.
            with self._lock(fcntl.LOCK_SH):
                os.replace(temporary, self.folder / digest.hexdigest())
                self._sync()
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return digest.hexdigest(), size

    def path(self, id: str) -> Path | None:
        """Where an asset is; None when it is not there, or when `id` is not a sha256 in lower-case hex."""
        return None if self._status(id) is None else self.folder / id

    def size(self, id: str) -> int | None:
        """Bytes of an asset; None when it is not there."""
        status = self._status(id)
        return None if status is None else status.st_size

    def read(self, id: str) -> bytes | None:
        """All bytes of an asset; None when it is not there. Raises OSError when it cannot be read."""
        path = self.path(id)
        with contextlib.suppress(FileNotFoundError):
            return None if path is None else path.read_bytes()
        return None

    def fetch(self, id: str, folder: Path) -> Path | None:
        """Where an asset is, as `path`: nothing is copied."""
        return self.path(id)

    def _status(self, id: str) -> os.stat_result | None:
        if isinstance(id, str) and ID.fullmatch(id) is not None:
            with contextlib.suppress(OSError):
                status = (self.folder / id).lstat()
                return status if stat.S_ISREG(status.st_mode) else None
        return None

    def remove(self, id: str) -> None:
        """Forget an asset; nothing happens when it is not there. The caller knows that no row names it any more."""
        path = self.path(id)
        if path is not None:
            with self._lock(fcntl.LOCK_EX):
                path.unlink(missing_ok=True)
                self._sync()

    def verify(self, asset: Asset) -> bool:
        """Whether the file is there with the size and the bytes that the asset says. Raises OSError when it cannot be read."""
        path = self.path(asset.id)
        if path is None:
            return False
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size != asset.bytes:
                    return False
                return hashlib.file_digest(file, "sha256").hexdigest() == asset.id
        except FileNotFoundError:  # removed meanwhile
            return False

    def weigh(self, ids: set[str]) -> int:
        """Bytes of these assets together, those left out that are not there."""
        return sum(self.size(id) or 0 for id in ids)

    def sweep(self, keep: set[str], older_than: float = 3600.0) -> int:
        """Remove files not in `keep`, and temporary ones, that are older than `older_than` seconds; how many were removed.

        Only files of the store's own making are touched. `keep` may be some minutes old: what was put since is young.
        """
        removed = 0
        for entry in list(os.scandir(self.folder)):
            asset = ID.fullmatch(entry.name) is not None
            if not (asset or entry.name.startswith(_TEMPORARY)) or (asset and entry.name in keep):
                continue
            # Under the lock no `put` can renew the file between the look at its age and its end.
            with self._lock(fcntl.LOCK_EX), contextlib.suppress(FileNotFoundError):
                status = os.stat(entry.path, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_mtime <= time.time() - older_than:
                    os.unlink(entry.path)
                    removed += 1
        if removed:
            self._sync()
        return removed

    def used(self) -> int:
        """Bytes of the assets. Looks at every file: a tenth of a second for some ten thousand."""
        total = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    total += entry.stat(follow_symlinks=False).st_size
        return total

    def free(self) -> int:
        """Bytes of the disk that this process may still fill."""
        facts = os.statvfs(self.folder)
        return facts.f_bavail * facts.f_frsize

    def answers(self) -> bool:
        """Whether the folder can be reached: it is this machine's."""
        return True

    def roomy(self) -> bool:
        """Whether more than the reserve is free."""
        return self.free() >= self.reserve

    @contextlib.contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        """Between processes: shared for those that add, exclusive for those that remove. On the folder itself, so no file is
        needed, and a lock whose holder dies is free."""
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, kind)
            yield
        finally:
            os.close(handle)

    def _sync(self) -> None:
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _pieces(data: bytes | Path) -> Iterator[bytes]:
    if isinstance(data, bytes):
        yield data
        return
    with open(data, "rb") as file:
        while piece := file.read(CHUNK):
            yield piece
