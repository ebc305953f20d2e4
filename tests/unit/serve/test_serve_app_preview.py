"""What there is of a film while it is made: a picture, or an answer without a body, and no error while the film exists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_rig import Rig, serving, until

PREVIEW = {"variant": "preview"}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path) as rig:
        yield rig


@pytest.mark.parametrize("prompt", ["a ball", "fail render_failed"])
def test_a_preview_is_there_while_a_film_is_made_and_no_error_afterwards(rig: Rig, prompt: str) -> None:
    rig.worker.held.set()
    id = rig.client.post("/v1/videos", json={"prompt": prompt}).json()["id"]
    url = f"/v1/videos/{id}/content"
    shown = until(lambda: rig.client.get(url, params=PREVIEW), lambda answer: answer.status_code == 200)
    assert shown.content == b"preview of " + id.encode()
    assert shown.headers["content-type"] == "image/jpeg"
    assert shown.headers["content-disposition"] == f'attachment; filename="{id}-preview.jpg"'
    rig.worker.held.clear()
    until(lambda: rig.client.get(f"/v1/videos/{id}").json()["status"], lambda state: state in ("completed", "failed"))
    for method in ("GET", "HEAD"):
        gone = rig.client.request(method, url, params=PREVIEW)
        assert (gone.status_code, gone.content) == (204, b"")
        assert gone.headers["cache-control"] == "no-store"


def test_a_queued_film_has_none_yet(tmp_path: Path) -> None:
    with serving(tmp_path, working=False) as rig:
        id = rig.client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
        assert rig.client.get(f"/v1/videos/{id}/content", params=PREVIEW).status_code == 204


def test_a_preview_that_its_worker_removes_just_now_is_no_error(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.worker.held.set()
    id = rig.client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
    url = f"/v1/videos/{id}/content"
    until(lambda: rig.client.get(url, params=PREVIEW), lambda answer: answer.status_code == 200)
    monkeypatch.setattr(rig.store, "path", lambda id: tmp_path / "removed")
    assert rig.client.get(url, params=PREVIEW).status_code == 204
    rig.worker.held.clear()


def test_a_film_that_is_not_there_or_no_longer_kept_is_an_error(rig: Rig) -> None:
    none = rig.client.get(f"/v1/videos/video_{'0' * 26}/content", params=PREVIEW)
    assert (none.status_code, none.json()["error"]["code"]) == (404, "not_found")
    rig.worker.expires = 1.0
    over = rig.client.get(f"/v1/videos/{rig.film()['id']}/content", params=PREVIEW)
    assert (over.status_code, over.json()["error"]["code"]) == (404, "video_expired")
    film = rig.client.post("/v1/videos", json={"prompt": "a ball"}).json()
    assert rig.client.delete(f"/v1/videos/{film['id']}").status_code == 200
    assert rig.client.get(f"/v1/videos/{film['id']}/content", params=PREVIEW).status_code == 404
