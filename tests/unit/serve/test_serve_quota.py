"""A key may ask for so many seconds of film a day, counted once for each film, whatever becomes of it."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_rig import Rig, png, serving, until

from tubelet.core.errors import UserError
from tubelet.serve import auth, quota


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path, keys=True) as rig:
        _, secret = auth.issue(rig.jobs, "limited", rpm=1000, daily=10)
        rig.client.headers["authorization"] = f"Bearer {secret}"
        yield rig


def ask(rig: Rig, seconds: float, **headers: str) -> httpx.Response:
    return rig.client.post("/v1/videos", json={"prompt": "a ball", "seconds": seconds}, headers=headers)


def left(answer: httpx.Response) -> float:
    return float(answer.headers["x-ratelimit-remaining-seconds"])


def test_more_than_a_day_allows_is_refused_until_the_next(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask(rig, 8)
    assert (first.status_code, first.headers["x-ratelimit-limit-seconds"], left(first)) == (200, "10", 2)
    over = ask(rig, 4)
    assert (over.status_code, over.json()["error"]["code"]) == (429, "insufficient_quota")
    assert over.json()["error"]["type"] == "rate_limit_error"
    assert over.headers["x-should-retry"] == "false", "it would be in vain"
    assert left(over) == 2
    assert left(ask(rig, 2)) == 0
    assert rig.client.delete(f"/v1/videos/{first.json()['id']}").status_code == 200
    assert ask(rig, 1).status_code == 429, "what is deleted was made"
    assert rig.client.post("/v1/images/generations", json={"prompt": "a ball"}).status_code == 200, "a picture has no seconds"
    monkeypatch.setattr(quota, "today", lambda: 10**6)
    assert left(ask(rig, 4)) == 6


def test_retries_count_once_and_get_their_film_when_nothing_is_left(rig: Rig) -> None:
    first = ask(rig, 10, **{"idempotency-key": "one"})
    again = ask(rig, 10, **{"idempotency-key": "one"})
    assert (again.status_code, again.json()["id"], left(again)) == (200, first.json()["id"], 0)
    retried = ask(rig, 10, **{"x-stainless-retry-count": "1"})
    assert (retried.status_code, retried.json()["id"]) == (200, first.json()["id"])
    assert ask(rig, 10, **{"idempotency-key": "two"}).status_code == 429


def test_a_crowd_gets_no_more_than_there_is(rig: Rig) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as crowd:
        answers = list(crowd.map(lambda _: ask(rig, 3).status_code, range(8)))
    assert sorted(answers) == [200] * 3 + [429] * 5


@pytest.mark.parametrize(
    ("request_", "seconds"),
    [
        ({"task": "create", "seconds": 4}, 4.0),
        ({"task": "edit", "seconds": None, "source": {"seconds": 3.5}}, 3.5),
        ({"task": "extend", "seconds": 8, "source": {"seconds": 4}}, 8.0),
        ({"task": "image", "seconds": None}, 0.0),
    ],
)
def test_what_a_wish_costs(request_: dict[str, Any], seconds: float) -> None:
    assert quota.seconds_of(request_) == seconds


@pytest.mark.parametrize("limit", ["rpm", "queued", "running", "daily", "stored"])
def test_a_limit_lets_something_through(rig: Rig, limit: str) -> None:
    for wrong in (0, -1, float("nan")):
        with pytest.raises(UserError, match=f"{limit}, a limit of a key, must be"):
            auth.issue(rig.jobs, "x", **{limit: wrong})


def test_a_key_made_before_there_were_quotas_has_none(rig: Rig) -> None:
    id, secret = auth.issue(rig.jobs, "old")
    document = rig.jobs.find(auth.KEYS, id, None)
    assert document is not None
    del document["daily"]
    rig.jobs.put(auth.KEYS, id, id, document)
    answer = ask(rig, 100, authorization=f"Bearer {secret}")
    assert answer.status_code == 200
    assert "x-ratelimit-limit-seconds" not in answer.headers


def key(rig: Rig, **limits: Any) -> dict[str, str]:
    _, secret = auth.issue(rig.jobs, "another", rpm=1000, **limits)
    return {"authorization": f"Bearer {secret}"}


def test_what_a_key_keeps_has_a_limit_and_deleting_makes_room(rig: Rig) -> None:
    picture = png()
    mine = key(rig, stored=1.5 * len(picture) / quota.GB)

    def upload(headers: dict[str, str]) -> httpx.Response:
        files = {"file": ("a.png", picture, "image/png")}
        return rig.client.post("/v1/files", files=files, data={"purpose": "user_data"}, headers=headers)

    first = upload(mine)
    assert first.status_code == 200, first.text
    there = set((rig.config.data / "assets").iterdir())
    assert quota.kept(rig.jobs, rig.store, auth.listed(rig.jobs)[-1]["id"]) == (first.json()["bytes"], 0)
    assert upload(mine).status_code == 200, "the same file takes no more room"
    other = {"file": ("b.png", png(size=(48, 40)), "image/png")}
    over = rig.client.post("/v1/files", files=other, data={"purpose": "user_data"}, headers=mine)
    assert (over.status_code, over.json()["error"]["code"]) == (429, "insufficient_quota")
    assert over.headers["x-should-retry"] == "false"
    assert set((rig.config.data / "assets").iterdir()) == there, "nothing of it stays"
    assert upload(key(rig)).status_code == 200, "the limit is that key's alone"
    film = rig.client.post("/v1/videos", json={"prompt": "a ball"}, headers=mine)
    assert film.status_code == 200, "there is room, however little"
    until(lambda: rig.jobs.get(film.json()["id"], None), lambda job: job is not None and job.state == "completed")
    there = set((rig.config.data / "assets").iterdir())
    sent = {"input_reference": ("c.png", png((9, 9, 9), (64, 32)), "image/png")}
    for more in ({"json": {"prompt": "a ball"}}, {"data": {"prompt": "a ball"}, "files": sent}):
        full = rig.client.post("/v1/videos", headers=mine, **more)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "insufficient_quota")
    assert set((rig.config.data / "assets").iterdir()) == there, "nothing of what was refused stays"
    assert rig.client.delete(f"/v1/videos/{film.json()['id']}", headers=mine).status_code == 200
    assert rig.client.post("/v1/videos", json={"prompt": "a ball"}, headers=mine).status_code == 200
