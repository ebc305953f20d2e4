"""Films as animated pictures: made when they are asked for, small, signed as the film is, and gone with it."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from api_rig import Rig, clip, serving, until
from PIL import Image

from tubelet.media.decode import decode_uint8, probe
from tubelet.media.encode import read_metadata, save
from tubelet.serve import animated, app
from tubelet.serve.records import Asset, Claim


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path) as rig:
        rig.worker.files = lambda claim: [rig.store.put(clip(), "video", "video/mp4")]  # type: ignore[method-assign]
        yield rig


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No child: each call writes what it was asked for; the wishes so far."""
    wishes: list[dict[str, Any]] = []

    async def run(_command: Any, *, input: bytes, **_: Any) -> Any:
        wish = animated.json.loads(input)
        wishes.append(wish)
        Path(wish["out"]).write_bytes(b"picture %d" % len(wishes))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(anyio, "run_process", run)
    return wishes


def moving(folder: Path, frames: int, size: tuple[int, int], fps: float) -> Path:
    """A film of a square that moves."""
    film = np.full((frames, *size, 3), 40, np.uint8)
    for number in range(frames):
        left = number * (size[1] - 16) // frames
        film[number, 8:24, left : left + 16] = (230, 60, 30)
    return save(film, folder / "film.mp4", fps, {"prompt": "a square"})


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_film_becomes_a_picture_that_moves(tmp_path: Path, kind: str) -> None:
    film, out = moving(tmp_path, 10, (64, 112), 8.0), tmp_path / f"out.{kind}"
    animated.make(film, out)
    about = probe(out)
    assert (about.height, about.width, about.frames) == (64, 112, 10)
    assert about.seconds == pytest.approx(10 / 8, abs=0.02)
    assert read_metadata(out) == {"prompt": "a square"}
    there, here = decode_uint8(film)[0].astype(int), decode_uint8(out, fps=8.0)[0].astype(int)
    assert np.abs(there - here).mean() < 6


@pytest.mark.parametrize(("frames", "fps", "kept"), [(48, 24.0, 24), (400, 10.0, animated.FRAMES), (5, 1.0, 5)])
def test_it_is_no_larger_than_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, fps: float, kept: int
) -> None:
    monkeypatch.setattr(animated, "SIDE", 48)
    out = tmp_path / "out.gif"
    animated.make(moving(tmp_path, frames, (96, 54), fps), out)
    about = probe(out)
    assert (about.height, about.width) == (48, 27)
    assert about.frames <= kept
    assert about.seconds == pytest.approx(frames / fps, rel=0.05)


@pytest.mark.parametrize(("kind", "media"), [("gif", "image/gif"), ("webp", "image/webp")])
def test_it_is_downloaded_and_signed_as_the_film_is(rig: Rig, kind: str, media: str) -> None:
    signer = rig.app.state.service.signer

    def files(claim: Claim) -> list[Asset]:
        path = rig.config.data / "film.mp4"
        path.write_bytes(clip())
        if claim.job.request["seed"] == 1:
            signer.sign(path, "video/mp4", {"video": claim.job.id, "task": "create"})
        return [rig.store.put(path, "video", "video/mp4")]

    rig.worker.files = files  # type: ignore[method-assign]
    for seed, state in ((1, "trusted"), (0, "not_present")):
        film = rig.film(seed=seed)["id"]
        answer = rig.client.get(f"/v1/videos/{film}/content", params={"variant": kind})
        assert (answer.status_code, answer.headers["content-type"]) == (200, media), answer.text
        assert answer.headers["content-disposition"] == f'attachment; filename="{film}.{kind}"'
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert (picture.size, getattr(picture, "n_frames", 1), picture.format) == ((64, 48), 8, kind.upper())
        (path,) = (rig.config.data / "variants").glob(f"{film}.{kind}")
        said = signer.check(path, media)
        assert said["validation_state"] == state
        assert said["generation"].get("video") == (film if state == "trusted" else None)
        assert said["manifests"] == (2 if state == "trusted" else 0), "the film's own credentials stand in it"


def test_it_is_made_once_and_goes_with_the_film(rig: Rig, quick: list[dict[str, Any]]) -> None:
    film, folder = rig.film()["id"], rig.config.data / "variants"
    url = f"/v1/videos/{film}/content"
    first = rig.client.get(url, params={"variant": "gif"})
    assert first.content == b"picture 1"
    tag = first.headers["etag"]
    assert rig.client.get(url, params={"variant": "gif"}, headers={"if-none-match": tag}).status_code == 304
    assert rig.client.get(url, params={"variant": "gif"}, headers={"range": "bytes=0-3"}).content == b"pict"
    assert rig.client.head(url, params={"variant": "gif"}).headers["content-length"] == "9"
    assert rig.client.get(url, params={"variant": "webp"}).content == b"picture 2"
    assert len(quick) == 2
    assert quick[0]["facts"]["prompt"] == "a red ball bounces"
    assert (folder.stat().st_mode & 0o777, len(list(folder.iterdir()))) == (0o700, 2)
    rig.client.delete(f"/v1/videos/{film}")
    assert list(folder.iterdir()) == []
    assert rig.client.get(url, params={"variant": "gif"}).status_code == 404


def test_it_is_kept_for_an_hour(rig: Rig, quick: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = f"/v1/videos/{rig.film()['id']}/content", rig.config.data / "variants"
    app._tidy(rig.app.state.service)
    rig.client.get(url, params={"variant": "gif"})
    app._tidy(rig.app.state.service)
    assert len(list(folder.iterdir())) == 1
    (folder / ".torn.gif").touch()
    monkeypatch.setattr(animated, "KEPT", -1.0)
    app._tidy(rig.app.state.service)
    assert list(folder.iterdir()) == []
    assert rig.client.get(url, params={"variant": "gif"}).content == b"picture 2"


def test_one_is_made_at_a_time_and_few_wait(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, lock = threading.Event(), threading.Lock()
    at_once, most = 0, 0

    async def run(_command: Any, *, input: bytes, **_: Any) -> Any:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        while not gate.is_set():
            await anyio.sleep(0.01)
        with lock:
            at_once -= 1
        Path(animated.json.loads(input)["out"]).write_bytes(b"picture")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(anyio, "run_process", run)
    monkeypatch.setattr(animated, "WAITING", 2)
    films = [rig.film()["id"] for _ in range(3)]
    statuses: list[int] = []

    def ask(id: str) -> None:
        statuses.append(rig.client.get(f"/v1/videos/{id}/content", params={"variant": "gif"}).status_code)

    threads = [threading.Thread(target=ask, args=(id,)) for id in (*films[:2], films[0])]
    for thread in threads:
        thread.start()
    until(lambda: rig.app.state.service.animators.statistics().tasks_waiting, lambda waiting: waiting == 2)
    busy = rig.client.get(f"/v1/videos/{films[2]}/content", params={"variant": "gif"})
    assert (busy.status_code, busy.json()["error"]["code"]) == (503, "busy")
    assert 1 <= int(busy.headers["retry-after"]) <= 60
    assert rig.client.get(f"/v1/videos/{films[2]}/content").status_code == 200, "the film itself waits for nobody"
    gate.set()
    for thread in threads:
        thread.join(20)
    assert (statuses, most) == ([200, 200, 200], 1)


def test_a_film_that_is_deleted_while_it_is_made_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    film = rig.film()["id"]

    async def run(_command: Any, *, input: bytes, **_: Any) -> Any:
        rig.app.state.service.delete(film, None)
        Path(animated.json.loads(input)["out"]).write_bytes(b"picture")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(anyio, "run_process", run)
    assert rig.client.get(f"/v1/videos/{film}/content", params={"variant": "gif"}).status_code == 404
    assert list((rig.config.data / "variants").iterdir()) == []


def test_what_cannot_be_made_is_said(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.worker.files = lambda claim: [rig.store.put(b"no film", "video", "video/mp4")]  # type: ignore[method-assign]
    film, folder = rig.film()["id"], rig.config.data / "variants"
    url = f"/v1/videos/{film}/content?variant=gif"
    broken = rig.client.get(url)
    assert (broken.status_code, broken.json()["error"]["code"]) == (503, "variant_failed")
    assert broken.headers["x-should-retry"] == "false"
    assert list(folder.iterdir()) == []

    async def never(*_: Any, **__: Any) -> None:
        await anyio.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(anyio, "run_process", never)
        patched.setattr(animated, "PATIENCE", 0.05)
        begin = time.monotonic()
        assert rig.client.get(url).json()["error"]["code"] == "variant_failed"
        assert time.monotonic() - begin < 10
    with monkeypatch.context() as patched:
        patched.setattr(rig.store, "free", lambda: -1)
        assert rig.client.get(url).json()["error"]["code"] == "storage_full"

    async def full(*_: Any, **__: Any) -> Any:
        return type("Done", (), {"returncode": animated.FULL})

    monkeypatch.setattr(anyio, "run_process", full)
    assert rig.client.get(url).json()["error"]["code"] == "storage_full"


def test_there_is_none_of_a_film_that_is_not_there(tmp_path: Path) -> None:
    with serving(tmp_path, working=False) as rig:
        film = rig.client.post("/v1/videos", json={"prompt": "p"}).json()["id"]
        early = rig.client.get(f"/v1/videos/{film}/content", params={"variant": "gif"})
        assert (early.status_code, early.json()["error"]["code"]) == (404, "video_not_ready")
