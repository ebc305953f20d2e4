"""Object stores for tests: in memory, in a folder, and with faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from obstore.exceptions import GenericError
from obstore.store import LocalStore, MemoryStore

from tubelet.serve.objects import Objects


class Faulty:
    """An object store that answers each call, unless `fault` (the call's name and its arguments) raises or waits.

    `late` faults come when the work was done, as when an answer is lost on its way.
    """

    def __init__(self, store: Any) -> None:
        self.store = store
        self.fault: Callable[[str, tuple[Any, ...]], None] = lambda name, given: None
        self.late: Callable[[str, tuple[Any, ...]], None] = lambda name, given: None
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def away(self, *names: str) -> None:
        """From now on all calls fail, or those of these names."""

        def fault(name: str, given: tuple[Any, ...]) -> None:
            if not names or name in names:
                raise GenericError("Generic S3 error: connection refused\n\nDebug source:\nnothing that a log needs")

        self.fault = fault

    def back(self) -> None:
        """The store answers again."""
        self.fault = lambda name, given: None

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.store, name)

        def wrapped(*given: Any, **more: Any) -> Any:
            self.calls.append((name, given))
            self.fault(name, given)
            done = call(*given, **more)
            self.late(name, given)
            return done

        return wrapped


def in_memory() -> tuple[Objects, Faulty]:
    """An object store that lives as long as the test, and what makes it fail."""
    faulty = Faulty(MemoryStore())
    return Objects(faulty, "s3://films/here"), faulty


def in_folder(root: Path) -> tuple[Objects, Faulty]:
    """The same in a folder."""
    root.mkdir(parents=True)
    faulty = Faulty(LocalStore(root, automatic_cleanup=True))
    return Objects(faulty, root.as_uri(), root), faulty


def names(objects: Objects, folder: str = "") -> list[str]:
    """Names of all objects below a folder, which ends in "/", without its own."""
    return sorted(entry.name.removeprefix(folder) for entry in objects.entries(folder))
