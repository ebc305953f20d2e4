"""Films over the wire: asked for in every way, watched, downloaded, changed, listed and wiped."""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_rig import TINY, Rig, serving, until
from starlette.responses import FileResponse

from tubelet.serve import app, intake
from tubelet.serve.records import StorageFull


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(intake, "admit", admit)
    with serving(tmp_path) as rig:
        yield rig


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A server whose jobs stay queued."""
    monkeypatch.setattr(intake, "admit", admit)
    with serving(tmp_path, working=False) as rig:
        yield rig


def admit(data: bytes, *, want: str = "any") -> intake.Admitted:
    """Stands in for the decoder: bytes that begin with "clip" are a clip of 2 s, with "bad" nothing, the rest pictures."""
    kind = "video" if data.startswith(b"clip") else "image"
    if data.startswith(b"bad") or want not in ("any", kind):
        raise intake.Refused("unsupported_media")
    if kind == "video":
        return intake.Admitted(b"clean " + data, "video/mp4", "video", (48, 64), 16, 8.0, b"credentials of " + data)
    return intake.Admitted(b"clean " + data, "image/png", "image", (16, 24), 1, 0.0, None)


def asked(rig: Rig, video: dict[str, Any]) -> dict[str, Any]:
    """The stored request of a job."""
    job = rig.jobs.get(video["id"], None)
    assert job is not None
    return job.request


def test_a_film_from_words_to_download(rig: Rig) -> None:
    made = rig.client.post("/v1/videos", json={"prompt": "a red ball bounces", "model": "sora-2", "seconds": "8"})
    assert made.status_code == 200
    video = made.json()
    assert re.fullmatch(r"video_[0-9a-z]{26}", video["id"])
    assert video["object"] == "video"
    assert video["status"] in ("queued", "in_progress")
    assert (video["model"], video["seconds"], video["size"]) == ("sora-2", "8", "720x1280")
    assert isinstance(video["created_at"], int)
    assert video["error"] is None
    assert int(made.headers["openai-poll-after-ms"]) > 0
    done = rig.until(video["id"])
    assert done["progress"] == 100
    assert done["completed_at"] >= done["created_at"]
    assert (done["fps"], done["num_frames"], done["rendered_size"]) == (8.0, 64, "64x32")
    assert done["text"] == "A dense caption of: a red ball bounces"
    assert done["queue_position"] is None
    assert done["preview"] is False
    content = rig.client.get(f"/v1/videos/{video['id']}/content", headers={"accept": "application/binary"})
    assert content.content == b"film of " + video["id"].encode()
    assert content.headers["content-type"] == "video/mp4"
    assert content.headers["content-disposition"] == f'attachment; filename="{video["id"]}.mp4"'
    assert content.headers["x-content-type-options"] == "nosniff"


def test_a_name_of_our_own_gets_the_systems_defaults(idle: Rig) -> None:
    video = idle.client.post("/v1/videos", json={"prompt": "a ball"}).json()
    assert (video["model"], video["size"], video["seconds"]) == ("tiny", "64x32", "1.125")
    request = asked(idle, video)
    assert (request["size"], request["frames"], request["system"]) == ([32, 64], 9, "tiny")
    assert 0 <= request["seed"] < 2**31
    assert request["seed"] != asked(idle, idle.client.post("/v1/videos", json={"prompt": "a ball"}).json())["seed"]


def test_each_setting_reaches_the_worker(idle: Rig) -> None:
    fields = {"seed": 7, "steps": 3, "guidance": 1.5, "expand": False, "loop": True, "frames": 17, "size": "128x96"}
    video = idle.client.post("/v1/videos", json={"prompt": "  a ball\u0065\u0301 ", **fields}).json()
    request = asked(idle, video)
    assert request["prompt"] == "a ball\u00e9"
    for name in ("seed", "steps", "guidance", "expand", "loop", "frames"):
        assert request[name] == fields[name]
        assert name == "frames" or video[name] == fields[name]
    assert (request["size"], video["seconds"]) == ([96, 128], "2.125")


@pytest.mark.parametrize("way", ["json", "form", "multipart"])
def test_json_forms_and_multipart_say_the_same(idle: Rig, way: str) -> None:
    fields = {"prompt": "a ball", "model": "sora-2-pro", "seconds": "4", "size": "1280x720", "seed": "5", "loop": "false"}
    if way == "json":
        answer = idle.client.post("/v1/videos", json=fields | {"seconds": 4, "seed": 5, "loop": False})
    elif way == "form":
        answer = idle.client.post("/v1/videos", data=fields)
    else:
        answer = idle.client.post("/v1/videos", files={name: (None, value) for name, value in fields.items()})
    assert answer.status_code == 200, answer.text
    request = asked(idle, answer.json())
    assert (request["seconds"], request["seed"], request["loop"], request["size"]) == (4.0, 5, False, [720, 1280])


DATA = "data:image/png;base64,cGljdHVyZQ=="


@pytest.mark.parametrize(
    ("body", "stored"),
    [
        ({"files": {"prompt": (None, "p"), "input_reference": ("a.png", b"picture")}}, b"clean picture"),
        ({"files": {"prompt": (None, "p"), "input_reference[image_url]": (None, DATA)}}, b"clean picture"),
        ({"json": {"prompt": "p", "input_reference": {"image_url": DATA}}}, b"clean picture"),
        ({"files": {"prompt": (None, "p"), "input_reference": (None, json.dumps({"image_url": DATA}))}}, b"clean picture"),
    ],
)
def test_a_picture_in_every_way(idle: Rig, body: dict[str, Any], stored: bytes) -> None:
    answer = idle.client.post("/v1/videos", **body)
    assert answer.status_code == 200, answer.text
    (entry,) = asked(idle, answer.json())["inputs"]
    path = idle.store.path(entry["asset"])
    assert path is not None
    assert path.read_bytes() == stored
    assert (entry["role"], entry["media"]) == ("reference", "image/png")


def test_a_clip_that_a_film_begins_with(idle: Rig) -> None:
    def create(**fields: Any) -> Any:
        return idle.client.post("/v1/videos", files={"input_reference": ("a.mp4", b"clip")}, data={"prompt": "p", **fields})

    request = asked(idle, create().json())
    (entry,) = request["inputs"]
    assert (entry["role"], entry["media"]) == ("reference", "video/mp4")
    assert (request["size"], request["seconds"]) == ([48, 64], 2.0 + TINY.seconds), "as large as the clip, and longer"
    request = asked(idle, create(model="sora-2", size="1280x720").json())
    assert (request["size"], request["seconds"]) == ([720, 1280], 6.0)
    assert asked(idle, create(seconds="4").json())["seconds"] == 4.0
    for fields, param in (({"seconds": "2"}, "seconds"), ({"loop": "true"}, "loop")):
        answer = create(**fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    storyboard = create(shots=json.dumps([{"prompt": "p", "seconds": 1}]))
    assert (storyboard.status_code, storyboard.json()["error"]["param"]) == (400, "input_reference")
    refused = idle.client.post("/v1/videos", files={"last_reference": ("a.mp4", b"clip")}, data={"prompt": "p"})
    assert refused.json()["error"]["message"] == "'last_reference' cannot be used: It must be a PNG, JPEG or WebP picture."


def test_a_file_id_and_a_last_picture(idle: Rig) -> None:
    file = idle.client.post("/v1/files", files={"purpose": (None, "vision"), "file": ("a/b.jpg", b"first")}).json()
    body = {"prompt": (None, "p"), "input_reference[file_id]": (None, file["id"]), "last_reference": ("b.png", b"last")}
    video = idle.client.post("/v1/videos", files=body).json()
    assert [entry["role"] for entry in asked(idle, video)["inputs"]] == ["reference", "last"]
    clip = idle.client.post("/v1/files", files={"file": ("c.mp4", b"clip")}).json()
    wrong = idle.client.post("/v1/videos", json={"prompt": "p", "last_reference": {"file_id": clip["id"]}})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "last_reference")


def test_a_storyboard_and_characters(idle: Rig) -> None:
    made = idle.client.post("/v1/videos/characters", files={"name": (None, "Mia"), "video": ("m.mp4", b"clip of mia")})
    mia = made.json()
    assert made.status_code == 200
    assert idle.client.get(f"/v1/videos/characters/{mia['id']}").json() == mia
    shots = [{"prompt": "Mia runs", "seconds": 2}, {"prompt": "Mia sleeps", "seconds": "3", "cut": True}]
    body = {"prompt": (None, "Mia"), "shots": (None, json.dumps(shots)), "characters[][id]": (None, mia["id"])}
    video = idle.client.post("/v1/videos", files=body).json()
    request = asked(idle, video)
    assert video["seconds"] == "5"
    assert request["shots"] == [
        {"prompt": "Mia runs", "seconds": 2.0, "cut": False},
        {"prompt": "Mia sleeps", "seconds": 3.0, "cut": True},
    ]
    assert request["characters"][0]["name"] == "Mia"
    assert idle.store.path(request["characters"][0]["asset"]) is not None
    assert idle.client.delete(f"/v1/videos/characters/{mia['id']}").json()["deleted"] is True
    assert idle.client.get(f"/v1/videos/characters/{mia['id']}").status_code == 404
    assert idle.store.path(request["characters"][0]["asset"]) is not None, "the film still needs it"


def test_remix_edit_and_extend_a_film(rig: Rig) -> None:
    film = rig.film(model="sora-2", seconds=4)
    remix = rig.client.post(f"/v1/videos/{film['id']}/remix", json={"prompt": "a blue ball", "strength": 0.5}).json()
    assert (remix["remixed_from_video_id"], remix["parent_id"], remix["task"]) == (film["id"], film["id"], "remix")
    assert (remix["model"], remix["size"], remix["strength"]) == ("sora-2", "720x1280", 0.5)
    edit = rig.client.post("/v1/videos/edits", files={"prompt": (None, "greener"), "video[id]": (None, film["id"])}).json()
    assert (edit["task"], edit["parent_id"], edit["remixed_from_video_id"]) == ("edit", film["id"], None)
    for seconds in (8, "8"):
        body = {"prompt": "and on", "seconds": seconds, "video": {"id": film["id"]}}
        extended = rig.client.post("/v1/videos/extensions", json=body).json()
        assert (extended["task"], extended["seconds"]) == ("extend", "12"), "the length of the whole"
        assert asked(rig, extended)["seconds"] == 8
    (entry,) = asked(rig, extended)["inputs"]
    path = rig.store.path(entry["asset"])
    assert path is not None
    assert path.read_bytes() == b"film of " + film["id"].encode()
    assert rig.until(extended["id"])["seconds"] == "12"


def test_edit_and_extend_an_upload(idle: Rig) -> None:
    body = {"prompt": (None, "snow"), "video": ("c.mp4", b"clip one"), "model": (None, "sora-2")}
    edit = idle.client.post("/v1/videos/edits", files=body).json()
    assert (edit["seconds"], edit["size"], edit["parent_id"]) == ("2", "64x48", None)
    (entry,) = asked(idle, edit)["inputs"]
    path = idle.store.path(entry["credentials"])
    assert path is not None
    assert path.read_bytes() == b"credentials of clip one", "the marks of an upload are handed on"
    longer = idle.client.post("/v1/videos/extensions", files={**body, "seconds": (None, "4")}).json()
    assert longer["seconds"] == "6"


def test_two_films_become_one(rig: Rig) -> None:
    first, second = rig.film(seconds=4), rig.film(seconds=8)
    body = {"prompt": "p", "mode": "connect", "seconds": 2, "video": {"id": first["id"]}, "second_video": {"id": second["id"]}}
    video = rig.client.post("/v1/videos", json=body).json()
    request = asked(rig, video)
    assert (video["task"], video["seconds"]) == ("connect", "14")
    assert [entry["role"] for entry in request["inputs"]] == ["video", "second"]
    assert request["mode"] == "connect"
    blend = rig.client.post("/v1/videos", json={**body, "mode": "blend", "seconds": None, "strength": 0.4}).json()
    assert (blend["task"], asked(rig, blend)["strength"]) == ("blend", 0.4)
    asked_long = rig.client.post("/v1/videos", json={**body, "mode": "blend", "seconds": 60}).json()
    assert asked_long["seconds"] == "4", "a blend lasts as long as the shorter one"
    needless = rig.client.post("/v1/videos", json={**body, "strength": 0.4})
    assert (needless.status_code, needless.json()["error"]["param"]) == (400, "strength")


def test_two_films_become_one_by_the_model_of_the_first(tmp_path: Path) -> None:
    with serving(tmp_path, systems={"tiny": TINY, "other": replace(TINY, name="other")}) as rig:
        first, second = rig.film(model="other", seconds=1), rig.film(seconds=1)
        body = {"prompt": "p", "mode": "blend", "video": {"id": first["id"]}, "second_video": {"id": second["id"]}}
        for more, model in (({}, "other"), ({"model": "tiny"}, "tiny")):
            assert asked(rig, rig.client.post("/v1/videos", json=body | more).json())["system"] == model


def test_a_film_is_not_there_before_it_is_there(rig: Rig) -> None:
    rig.worker.held.set()
    video = rig.client.post("/v1/videos", json={"prompt": "a ball"}).json()
    url = f"/v1/videos/{video['id']}/content"
    seen = until(lambda: rig.client.get(f"/v1/videos/{video['id']}").json(), lambda v: v["progress"] == 40)
    assert seen["status"] == "in_progress"
    assert seen["preview"] is True
    for variant in ("video", "thumbnail", "spritesheet"):
        early = rig.client.get(url, params={"variant": variant})
        assert (early.status_code, early.json()["error"]["code"]) == (404, "video_not_ready")
        assert early.headers["x-should-retry"] == "false"
    assert rig.client.get(url, params={"variant": "preview"}).content == b"preview of " + video["id"].encode()
    remix = rig.client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "p"})
    assert (remix.status_code, remix.json()["error"]["code"]) == (400, "video_not_ready")
    rig.worker.held.clear()
    rig.until(video["id"])
    for variant, media in (("video", "video/mp4"), ("thumbnail", "image/webp"), ("spritesheet", "image/jpeg")):
        got = rig.client.get(url, params={"variant": variant})
        assert (got.status_code, got.headers["content-type"]) == (200, media)
    assert rig.client.get(url, params={"variant": "preview"}).status_code == 204
    assert rig.client.get(url, params={"variant": "poster"}).json()["error"]["param"] == "variant"


def test_progress_is_100_only_with_a_download(rig: Rig) -> None:
    seen: list[int] = []
    for _ in range(4):
        video = rig.client.post("/v1/videos", json={"prompt": "a ball"}).json()
        while True:
            now = rig.client.get(f"/v1/videos/{video['id']}").json()
            seen.append(now["progress"])
            content = rig.client.get(f"/v1/videos/{video['id']}/content").status_code
            assert now["progress"] < 100 or content == 200
            if now["status"] == "completed":
                break
    assert seen.count(100) == 4


def test_ranges_tags_and_head(rig: Rig) -> None:
    film = rig.film()
    url, whole = f"/v1/videos/{film['id']}/content", b"film of " + film["id"].encode()
    full = rig.client.get(url)
    tag = full.headers["etag"]
    head = rig.client.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(whole)))
    assert head.headers["accept-ranges"] == "bytes"
    part = rig.client.get(url, headers={"range": "bytes=2-5"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, whole[2:6], f"bytes 2-5/{len(whole)}")
    assert rig.client.get(url, headers={"range": "bytes=-4"}).content == whole[-4:]
    assert rig.client.get(url, headers={"range": "bytes=0-1,4-5"}).status_code == 206
    for behind in (f"bytes={len(whole)}-", "bytes=-0", f"bytes=0-1,{len(whole)}-"):
        refused = rig.client.get(url, headers={"range": behind})
        assert (refused.status_code, refused.json()["error"]["code"]) == (416, "range_not_satisfiable")
        assert refused.headers["content-range"] == f"bytes */{len(whole)}"
    for unreadable in ("bytes=5-2", "bytes=", "lines=1-2", "bytes=a-b", "bytes=" + "0-1," * 200 + "0-1"):
        assert rig.client.get(url, headers={"range": unreadable}).content == whole
    assert rig.client.get(url, headers={"if-none-match": f'"x", {tag}'}).status_code == 304
    assert rig.client.get(url, headers={"range": "bytes=2-5", "if-range": '"other"'}).status_code == 200
    assert rig.client.get(url, headers={"range": "bytes=2-5", "if-range": tag}).status_code == 206


def test_a_failed_job_is_an_answer(rig: Rig) -> None:
    video = rig.client.post("/v1/videos", json={"prompt": "fail out_of_memory now"}).json()
    failed = rig.until(video["id"], "failed")
    assert failed["error"] == {"code": "out_of_memory", "message": "This film could not be made."}
    content = rig.client.get(f"/v1/videos/{video['id']}/content")
    assert (content.status_code, content.json()["error"]["code"]) == (404, "video_failed")


def test_cancel_queued_and_running(rig: Rig) -> None:
    rig.worker.held.set()
    running = rig.client.post("/v1/videos", json={"prompt": "one"}).json()
    rig.until(running["id"], "in_progress")
    queued = rig.client.post("/v1/videos", json={"prompt": "two"}).json()
    gone = rig.client.post(f"/v1/videos/{queued['id']}/cancel").json()
    assert (gone["status"], gone["error"]["code"]) == ("failed", "cancelled")
    assert rig.client.post(f"/v1/videos/{running['id']}/cancel").status_code == 200
    assert rig.until(running["id"], "failed")["error"]["code"] == "cancelled"
    rig.worker.held.clear()
    film = rig.film()
    assert rig.client.post(f"/v1/videos/{film['id']}/cancel").json()["status"] == "completed"


def test_the_queue_moves_and_pauses(idle: Rig) -> None:
    ids = [idle.client.post("/v1/videos", json={"prompt": f"film {n}"}).json()["id"] for n in range(3)]
    assert idle.client.get(f"/v1/videos/{ids[2]}").json()["queue_position"] == 3
    assert idle.client.post(f"/v1/videos/{ids[2]}/move", json={"place": 1}).json()["queue_position"] == 1
    assert idle.client.get(f"/v1/videos/{ids[0]}").json()["queue_position"] == 2
    queue = idle.client.get("/v1/queue").json()
    assert (queue["queued"], queue["paused"], queue["workers"]) == (3, False, 0)
    assert idle.client.post("/v1/queue", json={"paused": True}).json()["paused"] is True
    assert idle.jobs.claim("w") is None
    assert idle.client.post("/v1/queue", data={"paused": "false"}).json()["paused"] is False
    assert idle.jobs.claim("w") is not None


def test_lists_by_page(idle: Rig) -> None:
    ids = [idle.client.post("/v1/videos", json={"prompt": f"film {n}"}).json()["id"] for n in range(5)]
    page = idle.client.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in page["data"]] == [ids[4], ids[3]]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[4], ids[3], True)
    idle.client.delete(f"/v1/videos/{ids[3]}")
    rest = idle.client.get("/v1/videos", params={"limit": 5, "after": page["last_id"]}).json()
    assert ([video["id"] for video in rest["data"]], rest["has_more"]) == ([ids[2], ids[1], ids[0]], False)
    assert idle.client.get("/v1/videos", params={"order": "asc", "limit": 1}).json()["data"][0]["id"] == ids[0]
    empty = idle.client.get("/v1/videos", params={"after": ids[0]}).json()
    assert (empty["data"], empty["last_id"], empty["has_more"]) == ([], None, False)
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": f"video_{'0' * 26}"}):
        answer = idle.client.get("/v1/videos", params=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(wrong)))


def test_delete_leaves_nothing(rig: Rig) -> None:
    secret = "a canary that nobody may keep"
    body = {"prompt": (None, secret), "input_reference": ("a.png", b"only here")}
    film = rig.until(rig.client.post("/v1/videos", files=body).json()["id"])
    journal = rig.config.data / "journals" / film["id"]
    journal.mkdir(parents=True)
    (journal / "answers").write_text("noise")
    kept = rig.film()
    assert rig.client.delete(f"/v1/videos/{film['id']}").json() == {
        "id": film["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    assert not journal.exists()
    # A preview that a later one replaced is an orphan; the sweeper takes those.
    rig.store.sweep(rig.jobs.referenced(), older_than=-1)
    left = [path.read_bytes() for path in (rig.config.data / "assets").iterdir()]
    assert sorted(left) == sorted(b"%s of %s" % (kind, kept["id"].encode()) for kind in (b"film", b"thumbnail", b"spritesheet"))
    assert rig.client.get(f"/v1/videos/{film['id']}").status_code == 404
    assert rig.client.get(f"/v1/videos/{film['id']}/content").status_code == 404
    assert rig.client.delete(f"/v1/videos/{film['id']}").status_code == 404
    for path in rig.config.data.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_what_others_still_need_stays(rig: Rig) -> None:
    film = rig.film()
    remix = rig.client.post(f"/v1/videos/{film['id']}/remix", json={"prompt": "p"}).json()
    rig.client.delete(f"/v1/videos/{film['id']}")
    (entry,) = asked(rig, remix)["inputs"]
    assert rig.store.path(entry["asset"]) is not None
    rig.until(remix["id"])
    rig.client.delete(f"/v1/videos/{remix['id']}")
    assert rig.store.path(entry["asset"]) is None


def test_deleting_a_running_film_stops_it(rig: Rig) -> None:
    rig.worker.held.set()
    video = rig.client.post("/v1/videos", json={"prompt": "one"}).json()
    rig.until(video["id"], "in_progress")
    assert rig.client.delete(f"/v1/videos/{video['id']}").status_code == 200
    rig.worker.held.clear()
    rig.film()  # the worker goes on with another
    assert rig.client.get(f"/v1/videos/{video['id']}").status_code == 404


PNG = ("a.png", b"picture")
WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("/v1/videos", {}, "prompt", "missing_required_parameter"),
    ("/v1/videos", {"prompt": ""}, "prompt", "empty_string"),
    ("/v1/videos", {"prompt": "  \n "}, "prompt", "empty_string"),
    ("/v1/videos", {"prompt": "x" * 32_001}, "prompt", "string_above_max_length"),
    ("/v1/videos", {"prompt": "a\x00b"}, "prompt", "invalid_text"),
    ("/v1/videos", {"prompt": "a\x1b[31m"}, "prompt", "invalid_text"),
    ("/v1/videos", {"prompt": 7}, "prompt", "invalid_type"),
    ("/v1/videos", {"prompt": "p", "sedonds": 4}, "sedonds", "unknown_parameter"),
    ("/v1/videos", {"prompt": "p", "model": "sora-9"}, "model", "model_not_found"),
    ("/v1/videos", {"prompt": "p", "seconds": "four"}, "seconds", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "seconds": "nan"}, "seconds", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "seconds": 0}, "seconds", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "seconds": 121}, "seconds", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "seconds": True}, "seconds", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "frames": 4000}, "seconds", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "size": "big"}, "size", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "size": "721x1280"}, "size", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "size": "64x640"}, "size", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "size": "3840x3840"}, "size", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "size": 720}, "size", "invalid_type"),
    ("/v1/videos", {"prompt": "p", "seed": -1}, "seed", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "seed": True}, "seed", "invalid_type"),
    ("/v1/videos", {"prompt": "p", "seed": 2**63}, "seed", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "steps": 0}, "steps", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "guidance": 31}, "guidance", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "strength": 0.5}, "strength", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "video": {"id": f"video_{'0' * 26}"}}, "video", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "mode": "connect"}, "mode", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "mode": "melt"}, "mode", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "input_reference": "a.png"}, "input_reference", "invalid_type"),
    ("/v1/videos", {"prompt": "p", "input_reference": {}}, "input_reference", "invalid_type"),
    ("/v1/videos", {"prompt": "p", "input_reference": {"path": "/etc/passwd"}}, "input_reference", "invalid_type"),
    ("/v1/videos", {"prompt": "p", "input_reference": {"image_url": "data:text/html;base64,AA=="}}, None, "invalid_data_url"),
    ("/v1/videos", {"prompt": "p", "input_reference": {"image_url": "data:image/png;base64,%%"}}, None, "invalid_data_url"),
    ("/v1/videos", {"prompt": "p", "input_reference": {"image_url": "data:image/png;base64,YmFk"}}, None, "unsupported_media"),
    ("/v1/videos", {"prompt": "p", "input_reference": {"image_url": "https://x.org/a.png"}}, None, "remote_images_disabled"),
    ("/v1/videos", {"prompt": "p", "input_reference": {"image_url": DATA}, "loop": True}, "loop", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "characters": [{"id": "a"}] * 3}, "characters", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "shots": []}, "shots", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "shots": "[{"}, "shots", "invalid_json"),
    ("/v1/videos", {"prompt": "p", "shots": [{"prompt": "a", "seconds": 100}] * 2}, "shots", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "shots": [{"prompt": "a", "seconds": 1}], "seconds": 4}, "seconds", "invalid_value"),
    ("/v1/videos", {"prompt": "p", "shots": [{"prompt": "a", "seconds": 1}], "frames": 8}, "frames", "invalid_value"),
    ("/v1/videos/edits", {"prompt": "p"}, "video", "missing_required_parameter"),
    ("/v1/videos/extensions", {"prompt": "p", "video": "video_1"}, "video", "invalid_type"),
    ("/v1/videos/characters", {"name": "Mia"}, "video", "missing_required_parameter"),
    ("/v1/images/generations", {"prompt": "p", "n": 11}, "n", "invalid_value"),
    ("/v1/images/generations", {"prompt": "p", "stream": True, "n": 2}, "n", "invalid_value"),
    ("/v1/images/generations", {"prompt": "p", "partial_images": 2}, "partial_images", "invalid_value"),
    ("/v1/images/edits", {"prompt": "p"}, "image", "missing_required_parameter"),
    ("/v1/images/edits", {"prompt": "p", "image": "picture"}, "image", "invalid_type"),
    ("/v1/images/edits", {"prompt": "p", "image": [{"image_url": DATA}] * 2}, "image", "invalid_value"),
    ("/v1/images/variations", {"image": {"image_url": DATA}, "prompt": "p"}, "prompt", "unknown_parameter"),
    ("/v1/images/generations", {"prompt": "p", "output_format": "gif"}, "output_format", "invalid_value"),
    ("/v1/files", {"file": "text"}, "file", "invalid_type"),
    ("/v1/queue", {"paused": "maybe"}, "paused", "invalid_type"),
    ("/v1/expansions", {}, "prompt", "missing_required_parameter"),
]


def test_every_wrong_wish_is_a_400_that_names_it(idle: Rig) -> None:
    for path, body, param, code in WRONG:
        answer = idle.client.post(path, json=body)
        said = answer.json()["error"]
        assert answer.status_code == 400, (path, body, answer.text)
        assert said["code"] == code, (path, body, said)
        assert param is None or said["param"].split(".")[0] == param, (path, body, said)
        assert set(said) == {"message", "type", "param", "code"}
        assert said["type"] == "invalid_request_error"
        assert said["message"]
    assert idle.jobs.counts()["queued"] == 0


def test_a_lone_half_of_a_character_is_refused(idle: Rig) -> None:
    answer = idle.client.post("/v1/videos", content=b'{"prompt": "\\ud800"}', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_text")


def test_ids_that_are_none_are_not_looked_for(idle: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: Any, **__: Any) -> None:
        raise AssertionError("an id of the wrong form reached the store")

    monkeypatch.setattr(idle.jobs, "get", touched)
    monkeypatch.setattr(idle.store, "path", touched)
    for id in ("..%2f..%2fetc%2fpasswd", "video_1", f"video_{'A' * 26}", f"video_{'0' * 27}", f"video_{'0' * 25}%0a", "%00"):
        for path in ("", "/content", "/events"):
            answer = idle.client.get(f"/v1/videos/{id}{path}")
            assert answer.status_code == 404, (id, path)
            assert answer.json()["error"]["code"] == "not_found"
        assert idle.client.delete(f"/v1/videos/{id}").status_code == 404


def test_what_is_over_is_tidied_away(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = rig.film()
    rig.worker.expires = 1.0
    film = rig.film()
    assert film["expires_at"] == 1
    answer = rig.client.get(f"/v1/videos/{film['id']}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_expired")
    assert rig.client.post(f"/v1/videos/{film['id']}/remix", json={"prompt": "p"}).json()["error"]["code"] == "video_expired"
    rig.worker.expires = None
    rig.client.post("/v1/images/generations", json={"prompt": "a ball"})
    monkeypatch.setattr(app, "IMAGES_KEPT", -1.0)
    app._tidy(rig.app.state.service)
    assert [video["id"] for video in rig.client.get("/v1/videos").json()["data"]] == [kept["id"]]
    assert rig.jobs.page(None, kind="image").jobs == ()
    left = [path.read_bytes() for path in (rig.config.data / "assets").iterdir()]
    assert not any(
        film["id"].encode() in data or data.startswith(b"picture") for data in left if not data.startswith(b"preview")
    )


def test_tidying_asks_once_what_is_still_named(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer takes a look at every job there is."""
    asked = 0
    named = rig.jobs.referenced

    def counted(*args: Any, **more: Any) -> set[str]:
        nonlocal asked
        # The server tidies of itself, too, now and then.
        if threading.current_thread() is threading.main_thread() or "_tidy" not in {one.function for one in inspect.stack()}:
            asked += 1
        return named(*args, **more)

    monkeypatch.setattr(rig.jobs, "referenced", counted)
    rig.app.state.service.wipe([])
    rig.app.state.service.wipe(iter(()))
    with monkeypatch.context() as patched:
        patched.setattr(rig.store, "free", lambda: -1)
        assert rig.client.post("/v1/videos", json={"prompt": "p"}).status_code == 503
    assert asked == 0, "there was nothing to wipe"
    rig.worker.expires = 1.0
    for _ in range(4):
        rig.film()
    app._tidy(rig.app.state.service)
    assert rig.client.get("/v1/videos").json()["data"] == []
    assert asked == 2, "before the files of all that expired go, and before those that nothing names"


def test_what_is_deleted_before_a_failure_is_wiped(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    films, delete = [rig.film()["id"] for _ in range(2)], rig.jobs.delete

    def failing(id: str, owner: str | None) -> Any:
        if id == films[1]:
            raise StorageFull
        return delete(id, owner)

    monkeypatch.setattr(rig.jobs, "delete", failing)
    with pytest.raises(StorageFull):
        rig.app.state.service.delete_all(films, None)
    left = [path.read_bytes() for path in (rig.config.data / "assets").iterdir()]
    assert [any(b"film of " + film.encode() == data for data in left) for film in films] == [False, True]


@pytest.mark.parametrize("headers", [{}, {"range": "bytes=0-3"}, {"range": "bytes=0-1,4-5"}])
@pytest.mark.parametrize("moment", ["looked up", "begun"])
def test_a_film_that_is_deleted_during_its_download_is_not_there(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], moment: str
) -> None:
    film = rig.film()["id"]
    path, opened = rig.store.path, FileResponse.__call__

    def late(id: str) -> Path | None:
        found = path(id)
        if found is not None:
            found.unlink()
        return found

    async def later(self: FileResponse, *channel: Any) -> None:
        Path(self.path).unlink()
        await opened(self, *channel)

    if moment == "looked up":
        monkeypatch.setattr(rig.store, "path", late)
    else:
        monkeypatch.setattr(FileResponse, "__call__", later)
    answer = rig.client.get(f"/v1/videos/{film}/content", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_pictures(rig: Rig) -> None:
    import base64

    answer = rig.client.post(
        "/v1/images/generations", json={"prompt": "a ball", "n": 2, "size": "64x32", "output_format": "webp"}
    )
    assert answer.status_code == 200, answer.text
    said = answer.json()
    assert [base64.b64decode(image["b64_json"])[:9] for image in said["data"]] == [b"picture 0", b"picture 1"]
    assert (said["output_format"], said["size"]) == ("webp", "64x32")
    assert isinstance(said["created"], int)
    styled = {"prompt": "a ball", "style": "vivid", "quality": "hd"}
    assert rig.client.post("/v1/images/generations", json=styled).status_code == 200
    failed = rig.client.post("/v1/images/generations", json={"prompt": "fail out_of_memory"})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "out_of_memory")
    assert failed.headers["x-should-retry"] == "false"
    assert rig.client.get("/v1/videos").json()["data"] == []


def test_files(rig: Rig) -> None:
    made = rig.client.post("/v1/files", files={"purpose": (None, "vision"), "file": ("../../a b;$.jpg", b"picture")})
    assert made.status_code == 200, made.text
    file = made.json()
    assert (file["object"], file["filename"], file["bytes"], file["status"]) == ("file", "a b__.png", 13, "processed")
    assert rig.client.get(f"/v1/files/{file['id']}").json() == file
    content = rig.client.get(f"/v1/files/{file['id']}/content")
    assert (content.content, content.headers["content-type"]) == (b"clean picture", "image/png")
    other = rig.client.post("/v1/files", files={"file": ("c.webm", b"clip")}).json()
    listed = rig.client.get("/v1/files", params={"limit": 1}).json()
    assert ([f["id"] for f in listed["data"]], listed["has_more"]) == ([other["id"]], True)
    assert [f["id"] for f in rig.client.get("/v1/files", params={"purpose": "vision"}).json()["data"]] == [file["id"]]
    assert rig.client.delete(f"/v1/files/{file['id']}").json() == {"id": file["id"], "object": "file", "deleted": True}
    assert rig.client.get(f"/v1/files/{file['id']}").status_code == 404
    assert not any(path.read_bytes() == b"clean picture" for path in (rig.config.data / "assets").iterdir())
    wrong = rig.client.post("/v1/files", files={"file": ("c.exe", b"bad")})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "unsupported_media")


def test_a_mark_that_could_not_be_looked_for_is_not_told_to_be_absent(rig: Rig) -> None:
    torn = b"\x00\x00\x00\x18ftypmp42" + bytes(64)
    _, mark = rig.client.post("/v1/content_provenance_checks", files={"file": ("a.mp4", torn)}).json()["results"]
    assert (mark["type"], mark["outcome"]) == ("watermark", "not_detected")
    assert mark["reason"] == "It could not be looked for. The file is damaged or cannot be read; export it again."


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_who_deletes_the_files_of_a_page_goes_on_where_it_was(rig: Rig, order: str) -> None:
    made = [rig.client.post("/v1/files", files={"file": (f"{n}.jpg", b"picture")}).json()["id"] for n in range(7)]
    seen, more = [], {"limit": 2, "order": order}
    while True:
        page = rig.client.get("/v1/files", params=more).json()
        for file in page["data"]:
            seen.append(file["id"])
            assert rig.client.delete(f"/v1/files/{file['id']}").json()["deleted"]
        if not page["has_more"]:
            break
        more["after"] = page["last_id"]
    assert seen == (made if order == "asc" else made[::-1])
    for strange in ("file_" + "z" * 26, "file_" + "0" * 26, "nothing", "file_ß"):
        assert rig.client.get("/v1/files", params={"after": strange}).status_code == 400


@pytest.mark.parametrize("way", ["brackets", "json"])
def test_a_file_is_forgotten_when_it_was_said(rig: Rig, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    said = {"expires_after[anchor]": (None, "created_at"), "expires_after[seconds]": (None, "3600")}
    if way == "json":
        said = {"expires_after": (None, '{"anchor": "created_at", "seconds": 3600}')}
    file = rig.client.post("/v1/files", files={"file": ("a.png", b"picture"), "purpose": (None, "vision"), **said}).json()
    kept = rig.client.post("/v1/files", files={"file": ("b.png", b"another")}).json()
    assert (file["expires_at"], kept["expires_at"]) == (file["created_at"] + 3600, None)
    film = {"prompt": "p", "input_reference": {"file_id": file["id"]}}
    made = rig.client.post("/v1/videos", json=film)
    assert made.status_code == 200
    rig.until(made.json()["id"])  # an hour from now the sweeper takes what is half written
    app._tidy(rig.app.state.service)
    assert rig.client.get(f"/v1/files/{file['id']}").status_code == 200
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3601)
    for path in ("", "/content"):
        assert rig.client.get(f"/v1/files/{file['id']}{path}").status_code == 404
    assert rig.client.post("/v1/videos", json={**film, "seed": 1}).status_code == 404
    assert [entry["id"] for entry in rig.client.get("/v1/files").json()["data"]] == [kept["id"]]
    app._tidy(rig.app.state.service)
    assert [document["id"] for document in rig.jobs.all("file", None)] == [kept["id"]]
    left = [path.read_bytes() for path in (rig.config.data / "assets").iterdir()]
    assert b"clean picture" in left, "the film still names it"
    for wrong in ("0", "2592001", "x"):
        said = {"expires_after[anchor]": (None, "created_at"), "expires_after[seconds]": (None, wrong)}
        answer = rig.client.post("/v1/files", files={"file": ("a.png", b"picture"), **said})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "expires_after.seconds")


def test_models(idle: Rig) -> None:
    models = idle.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "sora-2", "sora-2-pro"]
    assert models[0]["system"] == models[1]["system"] == "tiny"
    assert (models[0]["sizes"][0], models[0]["seconds"][0]) == ("64x32", "1.125")
    assert (models[1]["sizes"][0], models[1]["seconds"][0]) == ("720x1280", "4")
    assert idle.client.get("/v1/models/sora-2").json() == models[1]
    gone = idle.client.get("/v1/models/gpt-4")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
