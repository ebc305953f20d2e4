"""The journals that workers keep while they make films: how another machine gets them, and what becomes of old ones.

A journal is a folder of this machine, since it is written at every answer of the denoiser and must hold up nothing. Where there
is an object store, a copy of it follows there, file by file in the order of the answers: a worker on another machine begins
with what had arrived when the first one died. No journal is worth a film, and an answer says itself to which question it was
given, so a copy may lag behind, lack something or be of two workers at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tubelet.serve.objects import Objects, ObjectStore
from tubelet.serve.store import keep_file

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs
    from tubelet.serve.store import Assets

JOURNALS = "journals/"
AT_ONCE = 8
"""Files that are fetched at the same time."""
_PATTERNS = ("words.json", "answers/*.safetensors")
"""What a worker notes down that another one can use."""


def tidy(folder: Path, jobs: Jobs) -> int:
    """Remove the journals of jobs that have ended or are gone; returns how many. Raises StorageFull when it cannot ask."""
    removed = 0
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _over(path.name, jobs):
            shutil.rmtree(path, ignore_errors=True)
            removed += 1
    return removed


def copies_of(store: Assets) -> Copies:
    """The copies of journals beside these assets: in the same object store, or none."""
    return Copies(store.objects if isinstance(store, ObjectStore) else None)


class Copies:
    """Copies of journals in an object store; without one there are none, and nothing is done."""

    def __init__(self, objects: Objects | None) -> None:
        self._objects = objects

    def of(self, id: str, folder: Path) -> Copy:
        """The copy of a job's journal, which lies in `folder`."""
        return Copy(self._objects, id, folder)

    def forget(self, id: str) -> None:
        """Remove the copy of a job's journal. Raises StorageFull."""
        if self._objects is not None:
            self._objects.remove_all(f"{JOURNALS}{id}/")

    def tidy(self, jobs: Jobs) -> int:
        """Remove the copies of jobs that have ended or are gone; returns how many. Raises StorageFull."""
        removed = 0
        for id in self._objects.folders(JOURNALS) if self._objects is not None else ():
            if _over(id, jobs):
                self.forget(id)
                removed += 1
        return removed


class Copy:
    """The copy of one journal. Threads of one worker may use it at once."""

    def __init__(self, objects: Objects | None, id: str, folder: Path) -> None:
        self._objects, self._id, self._folder = objects, id, folder
        self._sent: dict[str, int] = {}
        """When the files were written that are there, by name."""
        self._sending = threading.Lock()

    def send(self) -> int:
        """Let the copy have what was noted since the last time; how many files. Raises StorageFull."""
        sent = 0
        if self._objects is not None:
            with self._sending:
                for name, path in self._files():
                    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:  # dropped, or the job has ended
                        written = os.fstat(file.fileno()).st_mtime_ns
                        if self._sent.get(name) != written:
                            self._objects.put(f"{JOURNALS}{self._id}/{name}", file)
                            self._sent[name] = written
                            sent += 1
        return sent

    def fetch(self) -> int:
        """Bring here what the copy has and this machine lacks; how many files. Raises StorageFull."""
        if self._objects is None:
            return 0
        place = f"{JOURNALS}{self._id}/"
        wanted = [name for entry in self._objects.entries(place) if self._lacks(name := entry.name.removeprefix(place))]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return sum(pool.map(self._bring, wanted))

    def forget(self) -> None:
        """Remove the copy. Raises StorageFull."""
        Copies(self._objects).forget(self._id)

    def _files(self) -> Iterator[tuple[str, Path]]:
        for pattern in _PATTERNS:
            for path in sorted(self._folder.glob(pattern)):
                yield path.relative_to(self._folder).as_posix(), path

    def _lacks(self, name: str) -> bool:
        """Whether a file is one that workers note down, and is not here."""
        return any(Path(name).match(pattern) for pattern in _PATTERNS) and not (self._folder / name).exists()

    def _bring(self, name: str) -> bool:
        assert self._objects is not None
        data = self._objects.get(f"{JOURNALS}{self._id}/{name}")
        if data is not None:
            path = self._folder / name
            keep_file(path, [data])
            self._sent[name] = path.stat().st_mtime_ns
        return data is not None


def _over(id: str, jobs: Jobs) -> bool:
    job = jobs.get(id, None)
    return job is None or job.state in ("completed", "failed")
