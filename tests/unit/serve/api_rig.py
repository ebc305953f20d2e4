"""An API process on a folder of its own, and a worker that makes no films but does everything else that a worker does."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.testclient import TestClient

from tubelet.serve.app import create_app
from tubelet.serve.config import ServeConfig, SystemFacts
from tubelet.serve.connections import protocol
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Asset, Claim
from tubelet.serve.store import Assets, Store

TINY = SystemFacts("tiny", Path("tiny"), (32, 64), 9, 8.0, 2, 2.0, 1_700_000_000, "worlds")
LOCAL = "http://127.0.0.1:8000"


@dataclass
class FakeWorker:
    """Claims jobs in a thread and finishes them with tiny files. While `held` it has a job and does not finish it.

    A prompt that begins with "fail" fails, with the code that follows.
    """

    jobs: Jobs
    store: Assets
    held: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    expires: float | None = None
    thread: threading.Thread | None = None

    def start(self) -> FakeWorker:
        self.jobs.hello("fake", {"device": "cpu", "system": "tiny"})
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        self.stopped.set()
        if self.thread is not None:
            self.thread.join(10)

    def _run(self) -> None:
        while not self.stopped.is_set():
            claim = self.jobs.claim("fake")
            if claim is None:
                self.stopped.wait(0.01)
            else:
                self.work(claim)

    def work(self, claim: Claim) -> None:
        """One job from claim to end."""
        preview = self.store.put(b"preview of " + claim.job.id.encode(), "preview", "image/jpeg")
        self.jobs.heartbeat(claim, progress=40, preview=preview)
        while self.held.is_set() and not self.stopped.is_set():
            signal = self.jobs.heartbeat(claim)
            if signal.lost:
                return
            if signal.cancelled:
                break
            time.sleep(0.01)
        if self.jobs.heartbeat(claim, progress=80).cancelled:
            self.jobs.fail(claim, "cancelled", "The job was cancelled.")
            return
        words = str(claim.job.request["prompt"]).split()
        if words[:1] == ["fail"]:
            self.jobs.fail(claim, words[1], "This film could not be made.")
            return
        self.jobs.finish(claim, self.files(claim), self.result(claim), self.expires)

    def files(self, claim: Claim) -> list[Asset]:
        """Stand-ins for what a job makes."""
        name = claim.job.id.encode()
        if claim.job.request["task"] == "image":
            media = f"image/{claim.job.request['format']}"
            return [self.store.put(b"picture %d of " % n + name, "image", media) for n in range(claim.job.request["n"])]
        return [
            self.store.put(b"film of " + name, "video", "video/mp4"),
            self.store.put(b"thumbnail of " + name, "thumbnail", "image/webp"),
            self.store.put(b"spritesheet of " + name, "spritesheet", "image/jpeg"),
        ]

    def result(self, claim: Claim) -> dict[str, Any]:
        """What a worker says of a film."""
        request = claim.job.request
        source = (request.get("source") or {}).get("seconds") or 0
        seconds = request["seconds"] or source
        if request["task"] == "extend":  # what is asked for comes after what there is
            seconds += source
        return {
            "seed": request["seed"],
            "fps": 8.0,
            "frames": int(seconds * 8),
            "rendered": [32, 64],
            "size": request["size"] or [32, 64],
            "seconds": seconds,
            "timings": {"denoise": 0.5},
            "text": f"A dense caption of: {request['prompt']}",
            "system": request["system"],
        }


@dataclass
class Rig:
    """Everything of one server."""

    jobs: Jobs
    store: Any
    config: ServeConfig
    app: FastAPI
    client: Any
    worker: FakeWorker

    def until(self, id: str, state: str = "completed", seconds: float = 60.0) -> dict[str, Any]:
        """The video when it has come to `state`."""
        return until(lambda: self.client.get(f"/v1/videos/{id}").json(), lambda video: video.get("status") == state, seconds)

    def film(self, **fields: Any) -> dict[str, Any]:
        """A finished film."""
        made = self.client.post("/v1/videos", json={"prompt": "a red ball bounces", **fields})
        assert made.status_code == 200, made.text
        return self.until(made.json()["id"])


def until(look: Callable[[], Any], good: Callable[[Any], Any], seconds: float = 60.0) -> Any:
    """What `look` gives once it is good."""
    end = time.monotonic() + seconds
    while not good(seen := look()):
        assert time.monotonic() < end, f"still {seen}"
        time.sleep(0.01)
    return seen


def config_of(folder: Path, **settings: Any) -> ServeConfig:
    """Settings of a server in a folder, with the tiny system."""
    return ServeConfig(**{"data": folder, "systems": {"tiny": TINY}, "poll": 0.02, **settings})


@contextlib.contextmanager
def serving(
    folder: Path,
    *,
    working: bool = True,
    live: bool = False,
    headers: dict[str, str] | None = None,
    store: Any = None,
    **settings: Any,
) -> Iterator[Rig]:
    """A server with a worker, unless told otherwise. `live`: behind a real socket; else called within this process.

    Its files are in a folder, or in a `store`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs, store = Jobs.open(f"sqlite:///{folder}/tubelet.db"), store or Store(folder / "assets", reserve=0)
    config = config_of(folder, **settings)
    app = create_app(jobs, store, config)
    worker = FakeWorker(jobs, store)
    with contextlib.ExitStack() as opened:
        opened.callback(jobs.close)
        if live:
            url = opened.enter_context(listening(app))
            client = opened.enter_context(httpx.Client(base_url=url, headers=headers, timeout=60))
        else:
            client = opened.enter_context(TestClient(app, base_url=LOCAL, headers=headers))
        opened.callback(worker.stop)
        yield Rig(jobs, store, config, app, client, worker.start() if working else worker)


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application behind a real socket on a free port, as its address. Its background work runs there, too."""
    import uvicorn

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    room = app.state.service
    http = protocol(room.config, room.metrics)
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_config=None, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started, bool, 60)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        app.state.service.drain()
        server.should_exit = True
        thread.join(20)
        listener.close()


def png(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (24, 16)) -> bytes:
    """A small picture."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def clip() -> bytes:
    """One second of a square that moves, 64 x 48 pixels."""
    import av
    import numpy as np

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            frame = np.zeros((48, 64, 3), np.uint8)
            frame[8:16, 4 * number : 4 * number + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()
