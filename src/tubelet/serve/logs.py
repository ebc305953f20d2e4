"""The log: a line of JSON for each thing that happens, with times in unix seconds and nothing that a person wrote."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from types import TracebackType

LOG = logging.getLogger("tubelet.serve")
PLACES = 12
"""Of a failure's stack, so many places are told: the innermost."""


def say(event: str, *, level: int = logging.INFO, **facts: object) -> None:
    """Log an event. `facts` must be what JSON can hold."""
    LOG.log(level, json.dumps({"at": round(time.time(), 3), "event": event, **facts}))


def places(trace: TracebackType | None) -> list[str]:
    """Where something broke, in words of the code alone."""
    stack = traceback.extract_tb(trace)[-PLACES:]
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack]


def log_failure(where: str, error: Exception, **facts: object) -> None:
    """A log line that says where something broke, without the error's own words: those may repeat what a client sent."""
    facts = {"where": where, "error": type(error).__name__, **facts}
    say("failure", level=logging.ERROR, **facts, places=places(error.__traceback__))


def write_to_stderr() -> None:
    """Let this process write its log to stderr: every event of the server, and of the libraries only what goes wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    LOG.setLevel(logging.INFO)


class Lines(logging.Formatter):
    """Writes what libraries log as lines of JSON, too, so that each line of a log is one.

    Of their messages only the first line of the pattern is told: what they put into it, and what an error says, may repeat what
    a client sent.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        if record.name == LOG.name:
            return record.getMessage()
        said = (str(record.msg).splitlines() or [""])[0]
        line = {"at": round(record.created, 3), "event": "library", "logger": record.name, "level": record.levelname}
        line |= {"said": said, "place": f"{record.pathname}:{record.lineno}"}
        kind, _, trace = record.exc_info or (None, None, None)
        return json.dumps(line if kind is None else {**line, "error": kind.__name__, "places": places(trace)})
