"""What long work tells the person at the terminal: notes, warnings, a progress bar; on stderr, so that stdout stays data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[[int, int], None]
"""`(done, total)`: sets a progress bar."""


@functools.cache
def console() -> Console:
    """The one console. It follows the terminal's width, and writes plain text where stderr is no terminal."""
    from rich.console import Console  # imported late: quiet commands need no terminal library

    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One line of information."""
    console().print(text, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """One line that the reader should act on."""
    console().print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(description: str, unit: str = "steps") -> Iterator[Advance]:
    """A bar with the time left, gone when the work is done; silent where stderr is no terminal.

    Yields `advance(done, total)`, the form of every progress callback here.
    """
    if not console().is_terminal:
        yield lambda done, total: None
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(escape(unit)),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task(escape(description), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
