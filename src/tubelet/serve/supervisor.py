"""`tubelet serve`: the API in this process, a worker in one of its own for each device, and a watch over these.

A worker that dies is started again, and its job goes back to the queue when its lease has run out. One that cannot even begin
is given up after a few tries, loudly. Nothing of what was promised lives here: this process may be killed at any time, too.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from tubelet.core.errors import UserError
from tubelet.serve.config import ServeConfig
from tubelet.serve.jobs import Jobs
from tubelet.serve.journals import tidy
from tubelet.serve.logs import say
from tubelet.serve.objects import open_assets
from tubelet.serve.records import StorageFull

if TYPE_CHECKING:
    from fastapi import FastAPI

    from tubelet.serve.service import Service

Command = Callable[[str], Sequence[str]]
"""The command line of a worker that the job store is to know by a name."""

LOOK = 0.25
"""Seconds between two looks at the workers."""
TIDY = 5.0
"""Seconds between two looks for journals that nobody needs any more."""
TRIES = 5
"""Starts of a worker that never gets ready, before it is given up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a dead worker is started again; twice as many each time that it was not even ready."""
SILENT = 120.0
"""Seconds after which a worker that says nothing is taken to be stuck, and killed."""
GRACE = 30.0
"""Seconds that workers have to give their jobs back when all is to end."""
LINGER = 5.0
"""Seconds that clients have to finish their downloads then."""


@dataclass
class Seat:
    """Where one worker runs, and the next one after it."""

    command: Command
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    ready: bool = False
    heard: float = 0.0
    """When the job store last heard of it, by its clock."""
    changed: float = 0.0
    """When that changed, by this process's own clock, which stands still while the machine sleeps."""
    failures: int = 0
    """Starts in a row that did not get ready."""
    due: float = 0.0
    given_up: bool = False


@dataclass
class Supervisor:
    """Keeps one worker running for each of `commands`, and the journals of ended jobs away.

    They get `environment`. `gave_up` is called when no worker can be started.
    """

    commands: Sequence[Command]
    jobs: Jobs
    data: Path
    environment: Mapping[str, str] | None = None
    """None: this process's own."""
    gave_up: Callable[[], None] = lambda: None
    seats: list[Seat] = field(init=False)
    failed: bool = False

    def __post_init__(self) -> None:
        self.seats = [Seat(command) for command in self.commands]
        self._stopping = threading.Event()
        # Held while a worker is looked at: what ends because all is to end is no death to be told of, and none is started then.
        # A signal's handler may drain while the same thread drains.
        self._looking = threading.RLock()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the workers and the watch over them."""
        self._thread.start()

    def drain(self) -> None:
        """Ask all workers to stop, and start no more. Returns at once."""
        with self._looking:
            self._stopping.set()
            for seat in self.seats:
                if seat.process is not None and seat.process.poll() is None:
                    seat.process.terminate()

    def stop(self, grace: float = GRACE) -> None:
        """Drain, and return when all workers have ended; those that have not after `grace` seconds are killed."""
        self.drain()
        if self._thread.ident is not None:
            self._thread.join()
        until = time.monotonic() + grace
        for seat in self.seats:
            if seat.process is None:
                continue
            try:
                seat.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                say("worker killed", worker=seat.name)
                seat.process.kill()
                seat.process.wait()

    def _watch(self) -> None:
        tidied = -TIDY
        while not self._stopping.is_set():
            heard: dict[str, float] | None = None
            with contextlib.suppress(StorageFull):  # looked at again soon
                heard = {worker["id"]: worker["seen"] for worker in self.jobs.workers()}
                if time.monotonic() - tidied > TIDY:
                    tidy(self.data / "journals", self.jobs)
                    tidied = time.monotonic()
            for seat in self.seats:
                with self._looking:
                    if self._stopping.is_set():
                        return
                    self._look(seat, heard)
            if all(seat.given_up for seat in self.seats):
                self.failed = True
                self.gave_up()
                return
            self._stopping.wait(LOOK)

    def _look(self, seat: Seat, heard: dict[str, float] | None) -> None:
        now = time.monotonic()
        if seat.given_up:
            return
        if seat.process is None:
            if now >= seat.due:
                self._begin(seat, now)
            return
        if heard is not None and seat.name in heard:
            seat.ready = True
            if heard[seat.name] != seat.heard:
                seat.heard, seat.changed = heard[seat.name], now
            elif now - seat.changed > SILENT:
                say("worker silent", worker=seat.name)
                seat.process.kill()
        elif heard is None:
            seat.changed = now  # it cannot be heard, so its silence says nothing
        code = seat.process.poll()
        if code is not None:
            self._ended(seat, code, now)

    def _begin(self, seat: Seat, now: float) -> None:
        seat.name = f"{socket.gethostname()}-{secrets.token_hex(6)}"
        seat.ready, seat.heard, seat.changed = False, 0.0, now
        command, nothing = list(seat.command(seat.name)), subprocess.DEVNULL
        # Our own program, by a list of words.
        seat.process = subprocess.Popen(command, stdin=nothing, stdout=nothing, env=self.environment)  # noqa: S603
        say("worker started", worker=seat.name, pid=seat.process.pid)

    def _ended(self, seat: Seat, code: int, now: float) -> None:
        seat.process = None
        seat.failures = 0 if seat.ready else seat.failures + 1
        # A worker ends with 2 when what it was told is wrong; it has said so, and would say it again.
        seat.given_up = not seat.ready and (code == 2 or seat.failures >= TRIES)
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**seat.failures)
        seat.due = now + pause
        say("worker given up" if seat.given_up else "worker ended", worker=seat.name, code=code, again_in=pause)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises UserError when it cannot."""
    if not 0 <= port <= 65535:
        raise UserError(f"a port is a number from 0 to 65535, got {port}; correct --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is taken; stop what listens there, or choose another with --port"
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is not for everybody; choose one above 1023 with --port") from error
        raise UserError(f"cannot listen on {host}, port {port}; correct --host or --port") from error
    return listener


def serve(
    config: ServeConfig,
    url: str,
    commands: Sequence[Command],
    *,
    environment: Mapping[str, str] | None = None,
    announce: Callable[[str], None] = lambda address: None,
) -> int:
    """Answer until asked to stop by SIGTERM or SIGINT. Returns the exit code: 0, or 1 when no worker could be started.

    `url` is the job store; `commands` start the workers, in this `environment`; `announce` is told the address when the API
    answers there. Raises UserError when the port is taken or a store cannot be used.
    """
    from tubelet.serve.app import create_app

    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(listen(config.host, config.port))
        jobs = Jobs.open(url)
        opened.callback(jobs.close)
        store = open_assets(config.data, config.objects)
        jobs.sweep()
        for system, number in jobs.queued_for_others(config.systems).items():
            remedy = "serve it, too, with --alias NAME=FOLDER, or start a worker that has it"
            say("jobs wait for a system that is not served here", system=system, jobs=number, remedy=remedy)
        # uvicorn takes both signals over while it runs, and raises them again at its end.
        stopped = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            opened.callback(signal.signal, number, signal.signal(number, lambda *_: stopped.set()))
        supervisor = Supervisor(commands, jobs, config.data, environment)
        server = _Server(create_app(jobs, store, config), supervisor, lambda: announce(_address(listener)))
        supervisor.gave_up = server.end
        opened.callback(supervisor.stop)
        supervisor.start()
        if not stopped.is_set():
            server.run([listener])
    return int(supervisor.failed)


class _Server(uvicorn.Server):
    def __init__(self, app: FastAPI, supervisor: Supervisor, started: Callable[[], None]) -> None:
        from tubelet.serve.connections import protocol

        service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(service.config, service.metrics),
                log_config=None,
                access_log=False,
                lifespan="on",
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(LINGER),
            )
        )
        self._service, self._supervisor, self._started = service, supervisor, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Workers give their jobs back while the last answers go out.
        self._supervisor.drain()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.drain()  # before the wait: event streams would hold it up
        await super().shutdown(sockets)

    def end(self) -> None:
        """Stop as if a signal had come."""
        self.should_exit = True


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
