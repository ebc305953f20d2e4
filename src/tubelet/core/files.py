"""Files that are either whole or absent: write under a temporary name, sync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tubelet.core.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
LOCK = ".lock"


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on any failure it is removed.

    Raises UserError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last: writers such as PyAV and Pillow choose their format by it.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place or make room") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder, which is made; the system lets go when a process ends.

    Advisory: where the system or the disk has no such locks, nobody is kept out. Folders that were made here and are empty in
    the end go again. Raises UserError when another process is at work there or the folder cannot be written.
    """
    path = Path(folder) / LOCK
    try:
        made = [place for place in path.parents if not place.exists()]  # innermost first
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}; choose another place") from error
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                    raise UserError(f"another process is at work in {folder}; wait for it, or choose another folder") from error
        yield
    finally:
        os.close(handle)
        if made and os.listdir(path.parent) == [LOCK]:
            path.unlink()
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                for place in made:
                    place.rmdir()


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises UserError when the file is missing, broken or no file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the name") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; give a file that you may read") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it from its source") from error


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; give a file that you may read") from error
