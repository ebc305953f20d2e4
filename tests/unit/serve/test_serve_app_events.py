"""Server-sent events: what happens is told in order, once, and goes on where a stream broke off."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_rig import Rig, serving, until

from tubelet.serve import auth, feed
from tubelet.serve.metrics import Metrics
from tubelet.serve.outbound import Outbound
from tubelet.serve.webhooks import Deliveries


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path) as rig:
        yield rig


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path, live=True) as rig:
        yield rig


def told(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The events of a stream, each with its id."""
    event: dict[str, str] = {}
    for line in lines:
        if line == "" and "data" in event:
            yield {**json.loads(event["data"]), "at": int(event["id"])}
            event = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value


def follow(rig: Rig, id: str, after: int | None = None) -> list[dict[str, Any]]:
    """All events of one film until it has ended."""
    headers = {} if after is None else {"last-event-id": str(after)}
    answer = rig.client.get(f"/v1/videos/{id}/events", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    return list(told(iter(answer.text.split("\n"))))


def test_one_film_from_queue_to_end(rig: Rig) -> None:
    id = rig.client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
    events = follow(rig, id)
    types = [event["type"] for event in events]
    assert types[0] == "video.queued"
    assert types[-1] == "video.completed"
    assert {"video.in_progress", "video.progress", "video.preview"} <= set(types)
    assert events[-1]["video"]["progress"] == 100
    assert {event["id"] for event in events} == {id}
    places = [event["at"] for event in events]
    assert places == sorted(set(places)) == [event["sequence"] for event in events]
    middle = places[len(places) // 2]
    assert [event["at"] for event in follow(rig, id, middle)] == [place for place in places if place > middle]
    over = rig.client.get(f"/v1/videos/{id}/events", headers={"last-event-id": str(places[-1])})
    assert over.status_code == 204, "nothing more will come"


def test_a_stream_that_comes_from_another_database_hears_what_is_new(live: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server began anew with an empty database, and a browser goes on where it was."""
    monkeypatch.setattr(feed, "SILENCE", 0.1)
    ahead = {"last-event-id": "1000000"}
    with live.client.stream("GET", "/v1/videos/events", headers=ahead) as answer:
        until(lambda: live.app.state.service.feed.listeners, lambda count: count == 1)
        film = live.client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
        silences = 0
        for line in answer.iter_lines():
            silences += line.startswith(":")
            assert silences < 100, "nothing was heard"
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                break
        assert (event["id"], event["type"]) == (film, "video.queued")
    live.until(film)
    assert follow(live, film, 10**6) == follow(live, film), "of one film, all"


def test_a_deleted_film_ends_its_stream(rig: Rig) -> None:
    rig.worker.held.set()
    id = rig.client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
    rig.until(id, "in_progress")
    events: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: events.extend(follow(rig, id)))
    thread.start()
    until(lambda: rig.app.state.service.feed.listeners, lambda count: count == 1)
    rig.client.delete(f"/v1/videos/{id}")
    thread.join(20)
    rig.worker.held.clear()
    assert events[-1]["type"] == "video.deleted"
    assert events[-1]["video"] is None


def test_all_films_over_a_socket(live: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SILENCE", 0.1)
    before = live.film()["id"]
    heard = live.app.state.service.feed
    with live.client.stream("GET", "/v1/videos/events") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "retry: 2000"
        until(lambda: heard.listeners, lambda count: count == 1)
        assert next(line for line in lines if line.startswith(":")) == ": still here"
        film = live.client.post("/v1/videos", json={"prompt": "a ball"}).json()["id"]
        seen = []
        for event in told(lines):
            seen.append(event)
            if event["type"] == "video.completed":
                break
    assert {event["id"] for event in seen} == {film}, "what happened before is not told again"
    assert before != film
    until(lambda: heard.listeners, lambda count: count == 0)
    with live.client.stream("GET", "/v1/videos/events", headers={"last-event-id": str(seen[0]["at"])}) as answer:
        again = told(answer.iter_lines())
        assert [next(again)["at"] for _ in seen[1:]] == [event["at"] for event in seen[1:]]


def test_a_stop_ends_the_streams(live: Rig) -> None:
    service = live.app.state.service
    with live.client.stream("GET", "/v1/videos/events") as answer:
        until(lambda: service.feed.listeners, lambda count: count == 1)
        service.drain()
        assert list(told(answer.iter_lines())) == []
    refused = live.client.get("/v1/videos/events")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")


def test_nobody_hears_of_others(tmp_path: Path) -> None:
    with serving(tmp_path, keys=True, working=False, live=True) as rig:
        _, one = auth.issue(rig.jobs, "one")
        _, two = auth.issue(rig.jobs, "two")
        mine, other = ({"authorization": f"Bearer {key}"} for key in (one, two))
        with rig.client.stream("GET", "/v1/videos/events", headers=mine) as answer:
            until(lambda: rig.app.state.service.feed.listeners, lambda count: count == 1)
            rig.client.post("/v1/videos", json={"prompt": "theirs"}, headers=other)
            film = rig.client.post("/v1/videos", json={"prompt": "mine"}, headers=mine).json()["id"]
            assert next(told(answer.iter_lines()))["id"] == film


def test_pictures_are_not_told_as_films(live: Rig) -> None:
    begin = live.jobs.last_event()
    live.client.post("/v1/images/generations", json={"prompt": "p"})
    film = live.film()["id"]
    with live.client.stream("GET", "/v1/videos/events", headers={"last-event-id": str(begin)}) as answer:
        assert next(told(answer.iter_lines()))["id"] == film


@pytest.mark.parametrize("loop", ["feed", "webhooks"])
def test_a_server_that_stops_as_something_happens_stops(tmp_path: Path, loop: str) -> None:
    async def seen(events: list[Any]) -> None: ...

    async def main(rig: Rig) -> bool:
        follow = feed.Feed(rig.jobs, 60.0, seen)
        deliver = Deliveries(rig.jobs, Outbound(), Metrics())
        asked, work = (follow._asked, follow.run()) if loop == "feed" else (deliver.woken, deliver.run())
        task = asyncio.create_task(work)
        while not asked._waiters:  # it has looked, and waits
            await asyncio.sleep(0.01)
        asked.set()
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        return bool(done)

    with serving(tmp_path, working=False) as rig:
        assert asyncio.run(main(rig))
