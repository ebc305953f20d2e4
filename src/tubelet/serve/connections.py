"""The connections of the API process: how many there may be, and how long a client may take over what it sends.

A request has to arrive. Its head has some seconds; its body some more, and then as many as a slow line needs for what did come.
Once it is there, nothing here ends it: a film is downloaded, and events are listened to, for as long as the client reads.
This is not left to the routes, since a client can be slow before any route is known, or with a body that no route reads.
"""

from __future__ import annotations

import asyncio
import functools
import http
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tubelet.serve.config import ServeConfig
from tubelet.serve.errors import ApiError
from tubelet.serve.guard import LATE, safe_headers
from tubelet.serve.metrics import Metrics

SPARE_FILES = 256
"""Open files that are no connections: the database, films that are read, uploads on the disk."""
LINGER = 2.0
"""Seconds in which what a dismissed client still sends is thrown away: a reset would overtake the answer that it gets."""
MOST_LINGERING = 64
"""Clients turned away that are treated so at once; with more of them there is no time for manners."""
TRY_AGAIN = 5
"""Seconds after which a client that was turned away may come again."""


@dataclass
class Doors:
    """What all connections of a server share."""

    config: ServeConfig
    most: int
    """Open connections."""
    refused: Callable[[str], None]
    """Is told the code of each refusal."""
    lingering: set[Connection] = field(default_factory=set)


def protocol(config: ServeConfig, metrics: Metrics) -> type[asyncio.Protocol]:
    """What uvicorn is to make a connection with (its setting `http`), for one server.

    `config.connections` may be held, or as many as this process may have open files for.
    """
    doors = Doors(config, room_for(config.connections), metrics.rejected.add)
    return cast("type[asyncio.Protocol]", functools.partial(Connection, doors))


def room_for(wanted: int) -> int:
    """How many of `wanted` connections this process may hold. Lifts its limit of open files where the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))


class Connection(H11Protocol):
    """One client's connection, with an end to its patience."""

    def __init__(self, doors: Doors, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._doors = doors
        self._silent, self._dismissed = True, False
        self._awaited: Any = None
        """What the client owes: h11.IDLE, the head of a request, h11.SEND_BODY, its body, or None."""
        self._owed_since = 0.0
        self._received = 0
        """Bytes of what it owes."""
        self._of: Any = None
        """The request whose body that is."""
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  as in the class above
        """A client is there: let it in, or tell it that there are too many."""
        if len(self.connections) >= self._doors.most:
            self.transport = transport
            said = "The server has as many connections as it can hold; try again soon."
            self._turn_away(ApiError(503, said, code="too_many_connections", retry_after=TRY_AGAIN))
            return
        super().connection_made(transport)
        self._await(h11.IDLE)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._dismissed:
            return
        self._silent = False
        self._received += len(data)
        super().data_received(data)
        self._look()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._doors.config.unread_patience, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read some."""
        super().resume_writing()
        self._heard()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._await(None)
        self._heard()
        self._doors.lingering.discard(self)
        if self.flow is not None:  # it was let in
            super().connection_lost(exc)

    def _heard(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # The deadline of a request.

    def _look(self) -> None:
        """Set the deadline by what the client owes, now that bytes have come. Where it owes nothing, uvicorn waits for more."""
        state = self.conn.their_state
        owed = state if state in (h11.IDLE, h11.SEND_BODY) else None
        if owed is not self._awaited or (owed is h11.SEND_BODY and self._of is not self.cycle):
            self._await(owed)

    def _await(self, owed: Any) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._awaited, self._received, self._of = owed, 0, self.cycle
        if owed is not None and not self._dismissed:
            self._owed_since = self.loop.time()
            self._deadline = self.loop.call_at(self._due(), self._look_at_the_clock)

    def _due(self) -> float:
        config = self._doors.config
        if self._awaited is h11.IDLE:
            return self._owed_since + config.head_patience
        return self._owed_since + config.request_patience + self._received / config.slowest

    def _look_at_the_clock(self) -> None:
        due = self._due()
        if self.loop.time() < due:  # more has come since, so more time was won
            self._deadline = self.loop.call_at(due, self._look_at_the_clock)
            return
        self._await(None)
        if self._silent:  # browsers keep a connection in hand; there is nothing to answer
            self.transport.close()
            return
        cycle = self.cycle
        asked = cycle is not None and self.conn.their_state is h11.SEND_BODY
        if asked and cycle.response_started:  # the answer is on its way or there, and who asked still sends
            self.transport.abort()
            return
        said = ApiError(408, "The request comes too slowly.", code="request_timeout")
        if asked:  # whoever waits for the rest need not any more
            said.headers["x-request-id"] = self.scope.get("state", {}).get("request_id", "")
            self.scope[LATE] = said  # type: ignore[typeddict-unknown-key]
            cycle.disconnected = True
            cycle.message_event.set()
        else:
            self._doors.refused(said.code)
        self._dismiss(said)

    # The end.

    def _turn_away(self, said: ApiError) -> None:
        self._doors.refused(said.code)
        if len(self._doors.lingering) >= MOST_LINGERING:
            self._dismissed = True
            self.transport.write(self._written(said))
            self.transport.close()
            return
        self._doors.lingering.add(self)
        self._dismiss(said)

    def _dismiss(self, said: ApiError) -> None:
        """Answer, and part in a moment."""
        self._dismissed = True
        if self.flow is not None:
            self.flow.resume_reading()
        self.transport.write(self._written(said))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER, self.transport.abort)

    def _written(self, said: ApiError) -> bytes:
        """An answer that no route gives."""
        answer = said.response()
        more = {**safe_headers("/v1/"), "connection": "close"}
        headers = [*answer.raw_headers, *((name.encode(), value.encode()) for name, value in more.items())]
        lines = [f"HTTP/1.1 {said.status} {http.HTTPStatus(said.status).phrase}".encode()]
        lines += [name + b": " + value for name, value in (*self.server_state.default_headers, *headers)]
        return b"\r\n".join([*lines, b"", bytes(answer.body)])
