"""The stage of the studio's tests: a real server, a thread that plays the worker, and a browser that notes what goes wrong.

The thread makes the same film of every job. Run as a program, this file is a server in a process of its own, which can be
killed.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from tubelet.media import encode
from tubelet.serve.app import create_app
from tubelet.serve.config import ServeConfig, read_systems
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Asset, Claim, Job
from tubelet.serve.store import Store

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page, Request

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine: apt-get install chromium")
PATIENCE = 60_000
"""Milliseconds that the page is given to show what it should."""
STEPS, FRAMES, SIDE, FPS = 8, 17, 64, 8.0
WORDS = "A large red ball drops and bounces twice."
FACTS = {"fps": FPS, "frames": FRAMES, "rendered": [SIDE, SIDE], "size": [SIDE, SIDE], "seconds": FRAMES / FPS}
"""What is said of a finished film."""


@dataclass(frozen=True)
class Media:
    """Files of one short film: a red disc that falls."""

    video: bytes
    thumbnail: bytes
    sheet: bytes
    preview: bytes
    picture: bytes

    def put(self, store: Store) -> list[Asset]:
        """What a finished film leaves."""
        return [
            store.put(self.video, "video", "video/mp4"),
            store.put(self.thumbnail, "thumbnail", "image/webp"),
            store.put(self.sheet, "spritesheet", "image/jpeg"),
        ]


def film_in(folder: Path) -> Media:
    """The files of the film; the mp4 is written in a folder."""
    y, x = np.mgrid[:SIDE, :SIDE]
    film = np.full((FRAMES, SIDE, SIDE, 3), 225, np.uint8)
    for number, frame in enumerate(film):
        frame[(x - 32) ** 2 + (y - 10 - 2.6 * number) ** 2 < 64] = (210, 40, 40)
    path = folder / "film.mp4"
    settings = {"prompt": WORDS, "seed": 7, "steps": 12, "guidance": 2.0, "frames": FRAMES, "fps": FPS}
    encode.save(film, path, FPS, {"prompt": WORDS, "settings": json.dumps(settings)})

    def stored(pixels: np.ndarray, kind: str) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, kind)
        return out.getvalue()

    row = np.concatenate(list(film[:16]), 1)  # (H, 16 W, 3)
    return Media(path.read_bytes(), stored(film[8], "WEBP"), stored(row, "JPEG"), stored(row, "JPEG"), stored(film[0], "PNG"))


class Worker(threading.Thread):
    """Claims jobs and makes the same film of each, a step at a time. While `goes` is clear it stands still after a step."""

    def __init__(self, jobs: Jobs, store: Store, media: Media) -> None:
        super().__init__(daemon=True)
        self.jobs, self.store, self.media = jobs, store, media
        self.goes, self.ended = threading.Event(), threading.Event()
        self.goes.set()

    def run(self) -> None:
        self.jobs.hello("stage", {"device": "cpu"})
        while not self.ended.is_set():
            claim = self.jobs.claim("stage", kinds=("video",))
            if claim is None:
                self.ended.wait(0.05)
            else:
                self._make(claim)

    def _make(self, claim: Claim) -> None:
        for step in range(1, STEPS + 1):
            preview = self.store.put(self.media.preview + bytes([step]), "preview", "image/jpeg") if step % 3 == 0 else None
            while True:
                signal = self.jobs.heartbeat(claim, progress=99 * step // STEPS, preview=preview)
                if signal.lost or signal.cancelled:
                    self.jobs.fail(claim, "cancelled", "The job was cancelled.")
                    return
                if self.ended.is_set():
                    return
                if step < 4 or self.goes.wait(0.1):
                    break
            self.ended.wait(0.02)
        self.jobs.finish(claim, self.media.put(self.store), {**FACTS, "text": "A red disc falls on a pale floor.", "seed": 1})


def config_of(folder: Path, systems: Sequence[str | Path] = ("worlds-64",), **settings: Any) -> ServeConfig:
    return ServeConfig(folder, read_systems(systems), poll=0.05, **settings)


def server_of(jobs: Jobs, store: Store, config: ServeConfig) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(create_app(jobs, store, config), log_config=None, timeout_graceful_shutdown=1))


@dataclass
class Stage:
    """A server that can be stopped and started again on its port, and the worker beside it."""

    config: ServeConfig
    jobs: Jobs
    store: Store
    worker: Worker
    media: Media
    port: int = 0
    server: uvicorn.Server | None = None
    thread: threading.Thread | None = None
    process: subprocess.Popen[bytes] | None = None
    """The server, where it runs apart."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def listen(self) -> socket.socket:
        """A socket on which a page that comes before the server waits for it."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        self.port = listener.getsockname()[1]
        return listener

    def start(self) -> None:
        listener = self.listen()
        self.server = server_of(self.jobs, self.store, self.config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()

    def start_apart(self) -> None:
        with self.listen() as listener:
            handle = listener.fileno()
            self.process = subprocess.Popen([sys.executable, __file__, str(self.config.data), str(handle)], pass_fds=[handle])

    def answers(self) -> None:
        """Wait until the server does."""
        httpx.get(f"{self.url}healthz", timeout=PATIENCE / 1000).raise_for_status()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        if self.server is None:
            return
        assert self.thread is not None
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.server = None

    def films(self) -> list[Job]:
        return list(self.jobs.page(None, limit=100, order="asc").jobs)

    def make(self, request: dict[str, Any], parent: str | None = None) -> str:
        """The id of a new film, made here unless the worker is quicker; `request`: what it has of its own."""
        asked = {"task": "create", "prompt": WORDS, "system": "worlds-64", "size": [SIDE, SIDE], "seed": 3}
        job, _ = self.jobs.create({**asked, **request}, parent=parent)
        claim = self.jobs.claim("before")
        if claim is not None:
            assert self.jobs.finish(claim, self.media.put(self.store), FACTS)
        for _ in range(PATIENCE // 50):
            if next(film for film in self.films() if film.id == job.id).state == "completed":
                return job.id
            time.sleep(0.05)
        raise AssertionError("the film was never made")


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A real browser; the test is skipped where nothing can drive it."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as player:
        opened = player.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@dataclass
class Visit:
    """Pages of one browser context, and everything that went wrong in them."""

    context: BrowserContext
    address: str
    problems: list[str] = field(default_factory=list)
    waiting: set[Request] = field(default_factory=set)
    """What was asked for and not answered yet; the stream of events never is, and what a player reads is up to the player."""
    outage: bool = False
    """The server is away on purpose: failed requests are no problem."""
    hasty: bool = False
    """A film may be done before its preview is asked for, which is gone then."""

    @classmethod
    def of(cls, browser: Browser, address: str, **settings: Any) -> Visit:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **settings})
        context.add_init_script(
            "document.addEventListener('securitypolicyviolation', (e) => console.error(e.violatedDirective, e.blockedURI))"
        )
        return cls(context, address)

    def open(self, place: str = "") -> Page:
        page = self.context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", self._request)
        page.on("requestfinished", lambda request: self.waiting.discard(request))
        page.on("requestfailed", lambda request: self.waiting.discard(request))
        page.goto(self.address + place)
        return page

    def _console(self, message: Any) -> None:
        where = message.location.get("url", "")
        expected = self.outage or (self.hasty and where.endswith("?variant=preview"))
        failed = "Failed to load resource" in message.text and expected
        if message.type in ("error", "warning") and not failed:
            self.problems.append(f"console: {message.text} {where}")

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.address, "blob:", "data:")):
            self.problems.append(f"outside request: {request.url}")
        if request.resource_type != "media" and not request.url.endswith("/events"):
            self.waiting.add(request)

    def close(self) -> None:
        """Wait for the answers that are still to come, so that the problems are the same each time, and leave."""
        for _ in range(PATIENCE // 50):
            if not self.waiting:
                break
            self.context.pages[0].wait_for_timeout(50)
        self.problems.extend(f"no answer: {request.url}" for request in self.waiting)
        self.context.close()


def see(page: Page, script: str) -> None:
    """Wait until an expression of the page is true. Asked from outside: the policy forbids the page to evaluate text."""
    for _ in range(PATIENCE // 50):
        if page.evaluate(script):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {script}")


def holds(field: Locator, value: str) -> None:
    """Wait until a field holds a value."""
    from playwright.sync_api import expect

    expect(field).to_have_value(value, timeout=PATIENCE)


def sent(page: Page) -> None:
    """Wait until the server's answer has put the composer back: the film itself may be in the gallery before."""
    page.get_by_role("button", name="Make film").wait_for()


PICTURED = "[...document.querySelectorAll('.tile img')].some((e) => e.naturalWidth)"
"""A tile shows its picture."""
PLAYABLE = "document.querySelector('dialog video')?.readyState === 4"


def bring(page: Page, how: Literal["drop", "paste"], name: str, kind: str, data: bytes) -> None:
    """Bring a file onto the page, as from the desktop."""
    page.evaluate(
        """([how, name, kind, text]) => {
            const carried = new DataTransfer();
            carried.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name, { type: kind }));
            const said = { dataTransfer: carried, clipboardData: carried, bubbles: true, cancelable: true };
            const main = document.querySelector("main");
            if (how === "paste") main.dispatchEvent(new ClipboardEvent("paste", said));
            else for (const type of ["dragenter", "dragover", "drop"]) main.dispatchEvent(new DragEvent(type, said));
        }""",
        [how, name, kind, base64.b64encode(data).decode()],
    )


def tab_to(page: Page, script: str, most: int = 60) -> None:
    """Press Tab until the focused element `e` is the one."""
    for _ in range(most):
        if page.evaluate(f"(() => {{ const e = document.activeElement; return Boolean({script}); }})()"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"the Tab key does not lead to {script}")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    shared = Jobs.open(f"sqlite:///{place / 'tubelet.db'}")
    server_of(shared, Store(place / "assets", reserve=0), config_of(place)).run([socket.socket(fileno=int(sys.argv[2]))])
