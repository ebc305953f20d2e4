"""A film whose file the disk has damaged says so, and nothing else does."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_rig import Rig, serving, until

from tubelet.serve import scrub as room
from tubelet.serve.records import Asset
from tubelet.serve.scrub import Scrub
from tubelet.serve.store import Store


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path) as rig:
        yield rig


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scrub(rig: Rig, clock: Clock) -> Scrub:
    """One whose pause at the start is over."""
    made = Scrub(rig.jobs, rig.store, clock)
    clock.now += room.PAUSE
    return made


def asset_of(rig: Rig, id: str, role: str = "video") -> Asset:
    job = rig.jobs.get(id, None)
    assert job is not None
    return next(asset for asset in job.outputs if asset.role == role)


def path_of(rig: Rig, id: str, role: str = "video") -> Path:
    path = rig.store.path(asset_of(rig, id, role).id)
    assert path is not None
    return path


def flip(path: Path) -> None:
    """One bit of the last byte, as disks do it."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_film_has_failed_and_says_why(rig: Rig, scrub: Scrub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tubelet.serve")
    good, bad = rig.film()["id"], rig.film()["id"]
    hook = {"id": "we_1", "url": "https://hooks.invalid/", "enabled": True, "event_types": ["video.failed"]}
    hook["secret"] = f"whsec_{base64.b64encode(bytes(24)).decode()}"
    rig.jobs.put("webhook_endpoint", "we_1", "local", hook)
    path, newest = path_of(rig, bad), rig.jobs.last_event()
    flip(path)
    scrub.scrub()
    video = rig.client.get(f"/v1/videos/{bad}").json()
    assert (video["status"], video["error"]["code"], video["progress"]) == ("failed", "file_damaged", 99)
    assert rig.client.get(f"/v1/videos/{bad}/content").status_code == 404
    told = [facts for _, _, facts in rig.jobs.events(newest)]
    assert [(facts["type"], facts["progress"]) for facts in told] == [("video.failed", 99)]
    assert [document["job"] for document in rig.jobs.all("outbox", None)] == [bad]
    finished = rig.app.state.service.metrics.finished
    until(lambda: finished.values.get(("failed", "file_damaged")), lambda number: number == 1)
    (line,) = [said for record in caplog.records if (said := json.loads(record.message))["event"] == "file damaged"]
    assert (line["job"], line["roles"]) == (bad, ["video"])
    rig.store.sweep(rig.jobs.referenced(), older_than=-1)
    assert path.exists(), "what is left may still be of use to somebody"
    assert rig.client.get(f"/v1/videos/{good}").json()["status"] == "completed"
    assert rig.client.get(f"/v1/videos/{good}/content").status_code == 200
    assert rig.client.delete(f"/v1/videos/{bad}").json()["deleted"]
    assert not path.exists()


def test_a_damaged_small_picture_is_gone_and_the_film_is_not(rig: Rig, scrub: Scrub) -> None:
    id = rig.film()["id"]
    flip(path_of(rig, id, "thumbnail"))
    newest = rig.jobs.last_event()
    scrub.scrub()
    assert rig.client.get(f"/v1/videos/{id}").json()["status"] == "completed"
    content = f"/v1/videos/{id}/content"
    assert rig.client.get(content).status_code == 200
    assert rig.client.get(content, params={"variant": "spritesheet"}).status_code == 200
    gone = rig.client.get(content, params={"variant": "thumbnail"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "thumbnail_not_available")
    assert rig.jobs.last_event() == newest, "nobody is told that a film is completed twice"


def test_a_file_that_is_absent_or_cannot_be_read_is_not_called_damaged(
    rig: Rig, scrub: Scrub, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that is not mounted, a file that is deleted at that moment, a line to a file server that is down."""
    absent, unread, late = (rig.film()["id"] for _ in range(3))
    path_of(rig, absent).unlink()
    lost, deleted, verify = asset_of(rig, unread).id, path_of(rig, late), Store.verify

    def failing(store: Store, asset: Asset) -> bool:
        if asset.id == lost:
            raise OSError("the line is down")
        if asset.id == deleted.name:
            deleted.unlink(missing_ok=True)
        return verify(store, asset)

    monkeypatch.setattr(Store, "verify", failing)
    scrub.scrub()
    states = {rig.client.get(f"/v1/videos/{id}").json()["status"] for id in (absent, unread, late)}
    assert states == {"completed"}
    failures = [json.loads(record.message) for record in caplog.records if record.levelno == logging.ERROR]
    assert [line["where"] for line in failures] == ["scrub"]


def test_rounds_are_short_and_go_on_where_the_last_one_ended(rig: Rig, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "ROUND", 100)
    monkeypatch.setattr(room, "PAGE", 3)
    rig.worker.stop()
    films = [rig.client.post("/v1/videos", json={"prompt": "p"}).json()["id"] for _ in range(5)]
    waiting = films.pop()
    for _ in films:
        claim = rig.jobs.claim("w")
        assert claim is not None
        rig.jobs.finish(claim, [rig.store.put(claim.job.id.encode() * 2, "video", "video/mp4")], rig.worker.result(claim))
    looked: list[str] = []
    monkeypatch.setattr(Store, "verify", lambda store, asset: looked.append(asset.id) or True)
    names = [asset_of(rig, id).id for id in films]
    scrub = Scrub(rig.jobs, rig.store, clock)
    scrub.scrub()
    assert looked == [], "not while the server starts"
    clock.now += room.PAUSE
    scrub.scrub()
    assert looked == names[:2], "62 bytes each: the second one passes a hundred"
    rig.client.delete(f"/v1/videos/{films[1]}")
    scrub.scrub()
    assert looked == names
    for _ in range(3):
        scrub.scrub()
    assert looked == names, "not again today"
    assert rig.client.get(f"/v1/videos/{waiting}").json()["status"] == "queued"
    clock.now += room.REST
    scrub.scrub()
    assert looked == [*names, names[0], names[2]]


def test_a_server_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PAUSE", 0.05)
    monkeypatch.setattr(room, "REST", 0.0)
    with serving(tmp_path) as rig:
        id = rig.film()["id"]
        flip(path_of(rig, id))
        assert rig.until(id, "failed")["error"]["code"] == "file_damaged"
