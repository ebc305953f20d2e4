"""Files from an object store are downloads like any other and are wiped there; a store that is away is told politely."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_rig import Rig, clip, listening, png, serving, until
from objects_rig import Faulty, in_memory, names
from PIL import Image

from tubelet.serve import objects as room
from tubelet.serve import scrub
from tubelet.serve.app import _tidy
from tubelet.serve.objects import ObjectStore
from tubelet.serve.records import Asset
from tubelet.serve.scrub import Scrub
from tubelet.serve.store import Store

FILM = bytes(range(256)) * 40


@pytest.fixture
def faulty() -> Faulty:
    return in_memory()[1]


@pytest.fixture(params=["folder", "objects"])
def rig(request: pytest.FixtureRequest, faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A server whose films are all the same, in a folder and in an object store, which gives them in small pieces."""
    monkeypatch.setattr(room, "PIECE", 1000)
    objects = room.Objects(faulty, "s3://films/here")
    store = ObjectStore(objects, tmp_path, reserve=0) if request.param == "objects" else None
    with serving(tmp_path, store=store) as rig:
        rig.worker.files = lambda claim: [rig.store.put(FILM, "video", "video/mp4")]  # type: ignore[method-assign]
        yield rig


@pytest.fixture
def away(rig: Rig, faulty: Faulty) -> Faulty:
    """What lets the object store fail, for a server that has one."""
    if isinstance(rig.store, Store):
        pytest.skip("its files are in a folder")
    return faulty


def forget_probe(rig: Rig) -> None:
    rig.store.objects._due = 0.0


@pytest.mark.parametrize(
    ("wanted", "status", "start", "end"),
    [
        (None, 200, 0, 10240),
        ("bytes=0-", 206, 0, 10240),
        ("bytes=0-0", 206, 0, 1),
        ("bytes=999-2001", 206, 999, 2002),
        ("bytes=10000-99999", 206, 10000, 10240),
        ("bytes=-100", 206, 10140, 10240),
        ("bytes=-99999", 206, 0, 10240),
        ("bytes=7-3", 200, 0, 10240),
        ("pages=1-2", 200, 0, 10240),
    ],
)
def test_a_film_and_its_parts(rig: Rig, wanted: str | None, status: int, start: int, end: int) -> None:
    """Byte for byte and header for header the same from both."""
    film = rig.film()["id"]
    headers = {} if wanted is None else {"range": wanted}
    for ask in (rig.client.get, rig.client.head):
        answer = ask(f"/v1/videos/{film}/content", headers=headers)
        assert answer.status_code == status
        assert answer.content == (FILM[start:end] if ask == rig.client.get else b"")
        assert answer.headers["content-length"] == str(end - start)
        assert answer.headers.get("content-range") == (f"bytes {start}-{end - 1}/10240" if status == 206 else None)
        assert answer.headers["content-type"] == "video/mp4"
        assert answer.headers["content-disposition"] == f'attachment; filename="{film}.mp4"'
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["cache-control"] == "private, no-cache"


def test_what_a_client_has_and_what_there_is_not(rig: Rig) -> None:
    film = f"/v1/videos/{rig.film()['id']}/content"
    tag = rig.client.get(film).headers["etag"]
    assert rig.client.get(film, headers={"if-none-match": tag}).status_code == 304
    same, other = (rig.client.get(film, headers={"range": "bytes=1-4", "if-range": mark}) for mark in (tag, f'"{"0" * 64}"'))
    assert (same.status_code, same.content) == (206, FILM[1:5])
    assert (other.status_code, other.content) == (200, FILM)
    behind = rig.client.get(film, headers={"range": "bytes=10240-"})
    assert (behind.status_code, behind.headers["content-range"]) == (416, "bytes */10240")
    several = rig.client.get(film, headers={"range": "bytes=0-1,4-5"})
    assert several.status_code in (200, 206)
    assert several.status_code == 206 or several.content == FILM
    rig.store.remove(rig.jobs.page(None).jobs[0].outputs[0].id)
    assert rig.client.get(film).status_code == 404


def test_the_name_of_a_file_and_a_long_film_over_a_socket(tmp_path: Path) -> None:
    objects, _ = in_memory()
    with serving(tmp_path, store=ObjectStore(objects, tmp_path, reserve=0), working=False) as rig:
        file = rig.client.post("/v1/files", files={"file": ("Übung 1.png", png())}, data={"purpose": "vision"}).json()
        answer = rig.client.get(f"/v1/files/{file['id']}/content")
        assert answer.headers["content-disposition"] == "attachment; filename*=utf-8''%C3%9Cbung%201.png"
        assert Image.open(io.BytesIO(answer.content)).size == (24, 16)
        assert names(objects, "assets/") == [rig.jobs.find("file", file["id"], None)["asset"]]
        long = b"film " * 1_000_000
        asset = rig.store.put(long, "video", "video/mp4")
        rig.jobs.put("file", file["id"], "local", {**rig.jobs.find("file", file["id"], None), "asset": asset.id})
        with listening(rig.app) as url:
            assert httpx.get(f"{url}/v1/files/{file['id']}/content", timeout=60).content == long


def test_what_is_uploaded_goes_with_what_names_it(rig: Rig, away: Faulty) -> None:
    rig.worker.stop()
    body = {"files": {"prompt": (None, "p"), "input_reference": ("a.png", png())}}
    film = rig.client.post("/v1/videos", **body).json()["id"]
    rig.store.objects.put(f"journals/{film}/words.json", b"{}")
    (entry,) = rig.jobs.get(film, None).request["inputs"]  # type: ignore[union-attr]
    assert names(rig.store.objects) == [f"assets/{entry['asset']}", f"journals/{film}/words.json"]
    assert rig.client.delete(f"/v1/videos/{film}").status_code == 200
    assert names(rig.store.objects) == []


def test_nothing_is_promised_while_the_store_is_away(rig: Rig, away: Faulty) -> None:
    film, before = rig.film()["id"], names(rig.store.objects)
    away.away()
    forget_probe(rig)
    upload = {"files": {"prompt": (None, "p"), "input_reference": ("a.png", png())}}
    answers = {
        "a film": rig.client.post("/v1/videos", json={"prompt": "p"}),
        "one from a picture": rig.client.post("/v1/videos", **upload),
        "a file": rig.client.post("/v1/files", files={"file": ("a.png", png())}, data={"purpose": "vision"}),
        "a download": rig.client.get(f"/v1/videos/{film}/content"),
        "a deletion": rig.client.delete(f"/v1/videos/{film}"),
        "a remix": rig.client.post(f"/v1/videos/{film}/remix", json={"prompt": "p"}),
    }
    for name, answer in answers.items():
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_full"), name
        assert answer.headers["retry-after"] == "30", name
        assert "s3" not in answer.text
        assert "refused" not in answer.text, "what the store said is for the log"
    assert rig.client.get("/readyz").json()["checks"]["disk"] is False
    assert rig.client.get("/healthz").status_code == rig.client.get(f"/v1/videos/{film}").status_code == 200
    assert "tubelet_storage_bytes" in rig.client.get("/metrics").text
    away.back()
    forget_probe(rig)
    assert [job.id for job in rig.jobs.page(None).jobs] == [film], "nothing was half-made"
    assert names(rig.store.objects) == before
    assert rig.client.get(f"/v1/videos/{film}/content").content == FILM
    assert rig.client.post("/v1/videos", **upload).status_code == 200
    assert rig.client.delete(f"/v1/videos/{film}").json()["deleted"] is True


def test_what_could_not_be_wiped_is_swept(rig: Rig, away: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store goes away between the end of the row and that of the bytes."""
    film = rig.film()["id"]
    rig.store.objects.put(f"journals/{film}/words.json", b"{}")
    before = names(rig.store.objects)
    away.away("delete")
    assert rig.client.delete(f"/v1/videos/{film}").status_code == 200
    assert names(rig.store.objects) == before
    away.back()
    sweep = rig.store.sweep
    monkeypatch.setattr(rig.store, "sweep", lambda keep: sweep(keep, older_than=-1))
    _tidy(rig.app.state.service)
    assert names(rig.store.objects) == []


def test_a_film_that_goes_before_its_first_piece_is_not_there(rig: Rig, away: Faulty) -> None:
    film = rig.film()["id"]

    def fault(name: str, given: Any) -> None:
        if name == "get_range_async":
            away.store.delete(given[0])

    away.fault = fault
    answer = rig.client.get(f"/v1/videos/{film}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_damaged_object_says_so_and_one_that_is_away_does_not(rig: Rig, away: Faulty) -> None:
    film, now = rig.film()["id"], [1000.0]
    made = Scrub(rig.jobs, rig.store, lambda: now[0])
    asset = rig.jobs.get(film, None).outputs[0]  # type: ignore[union-attr]
    rig.store.objects.put(f"assets/{asset.id}", FILM[:-1] + b"!")
    away.away()
    now[0] += scrub.PAUSE
    made.scrub()
    assert rig.jobs.get(film, None).state == "completed"  # type: ignore[union-attr]
    away.back()
    now[0] += scrub.REST
    made.scrub()
    assert rig.client.get(f"/v1/videos/{film}").json()["error"]["code"] == "file_damaged"


def test_an_animated_picture_of_a_film_in_an_object_store(rig: Rig, away: Faulty) -> None:
    rig.worker.files = lambda claim: [rig.store.put(clip(), "video", "video/mp4")]  # type: ignore[method-assign]
    film = rig.film()["id"]
    answer = rig.client.get(f"/v1/videos/{film}/content", params={"variant": "webp"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
    assert answer.content[:4] == b"RIFF"
    assert [path.name for path in (rig.config.data / "variants").iterdir()] == [f"{film}.webp"], "the film did not stay here"


def test_previews_and_pictures(rig: Rig, away: Faulty) -> None:
    del away
    rig.worker.files = type(rig.worker).files.__get__(rig.worker)  # type: ignore[method-assign]
    rig.worker.held.set()
    film = rig.client.post("/v1/videos", json={"prompt": "p"}).json()["id"]
    preview = until(
        lambda: rig.client.get(f"/v1/videos/{film}/content", params={"variant": "preview"}), lambda a: a.status_code == 200
    )
    assert preview.content == b"preview of " + film.encode()
    rig.worker.held.clear()
    rig.until(film)
    pictures = rig.client.post("/v1/images/generations", json={"prompt": "p", "n": 2}).json()["data"]
    assert len({picture["b64_json"] for picture in pictures}) == 2


def test_bytes_that_a_key_keeps(rig: Rig, away: Faulty) -> None:
    from tubelet.serve.quota import kept

    rig.film()
    new = [Asset("a" * 64, "input", "image/png", 7)]
    assert kept(rig.jobs, rig.store, "local", new) == (len(FILM), 7)
    asked = len(away.calls)
    assert kept(rig.jobs, rig.store, "local", new) == (len(FILM), 7)
    assert len(away.calls) == asked, "what has a hash for a name keeps its size"
