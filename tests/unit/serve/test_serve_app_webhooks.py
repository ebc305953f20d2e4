"""Webhooks: endpoints, signatures that the official client accepts, and delivery until it is taken."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from api_rig import Rig, serving, until

from tubelet.serve import webhooks
from tubelet.serve.outbound import Outbound
from tubelet.serve.records import StorageFull
from tubelet.serve.webhooks import Deliveries, pause_after


class Receiver:
    """A place for webhooks on this machine. `statuses` are its next answers; 200 when there are none."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.send_header("location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(webhooks, "LOOK", 0.05)
    with serving(tmp_path, webhooks_to_loopback=True) as rig:
        yield rig


def endpoint(rig: Rig, receiver: Receiver, *types: str) -> dict[str, Any]:
    body = {"name": "mine", "url": receiver.url, "event_types": list(types or ("video.completed", "video.failed"))}
    made = rig.client.post("/v1/webhook_endpoints", json=body)
    assert made.status_code == 200, made.text
    return made.json()


def unwrapped(secret: str, got: tuple[dict[str, str], bytes]) -> Any:
    client = openai.OpenAI(api_key="x", base_url="http://127.0.0.1:1")
    return client.webhooks.unwrap(got[1], got[0], secret=secret)


def test_a_finished_film_is_told_and_the_official_client_believes_it(rig: Rig, receiver: Receiver) -> None:
    made = endpoint(rig, receiver)
    assert made["object"] == "webhook_endpoint"
    assert made["signing_secret"].startswith("whsec_")
    film = rig.film()
    failed = rig.client.post("/v1/videos", json={"prompt": "fail out_of_memory"}).json()
    until(lambda: len(receiver.got), lambda count: count == 2)
    events = [unwrapped(made["signing_secret"], got) for got in receiver.got]
    assert {(event.type, event.data.id) for event in events} == {
        ("video.completed", film["id"]),
        ("video.failed", failed["id"]),
    }
    for (headers, body), event in zip(receiver.got, events, strict=True):
        assert event.id == headers["webhook-id"]
        assert event.object == "event"
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
        assert set(json.loads(body)) == {"id", "object", "type", "created_at", "data"}
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrapped(made["signing_secret"], (receiver.got[0][0], receiver.got[0][1] + b" "))
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrapped(webhooks.new_secret(), receiver.got[0])
    until(lambda: rig.jobs.all("outbox", None), lambda rest: rest == [])
    assert 'tubelet_webhook_deliveries_total{result="delivered"} 2' in rig.client.get("/metrics").text


def test_a_message_that_is_taken_while_the_outbox_is_read_comes_once(
    rig: Rig, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading is as old as a slow disk makes it: here until the message has gone."""
    read, stale = rig.jobs.all, threading.Event()

    def slowly(collection: str, owner: str | None) -> list[dict[str, Any]]:
        found = read(collection, owner)
        if collection == "outbox" and found and receiver.got:
            stale.set()
            until(lambda: read(collection, owner), lambda rest: rest == [])
        return found

    post = Outbound.post

    def held(*wish: Any, **more: Any) -> int:
        status = post(*wish, **more)
        assert stale.wait(20), "the outbox is read while the message is on its way"
        return status

    monkeypatch.setattr(rig.jobs, "all", slowly)
    monkeypatch.setattr(Outbound, "post", held)
    endpoint(rig, receiver)
    rig.film()
    until(lambda: 'deliveries_total{result="delivered"} 1' in rig.client.get("/metrics").text, bool)
    time.sleep(0.5)  # ten looks
    assert len(receiver.got) == 1


def test_only_what_was_asked_for(rig: Rig, receiver: Receiver) -> None:
    endpoint(rig, receiver, "video.failed")
    rig.film()
    rig.until(rig.client.post("/v1/videos", json={"prompt": "fail render_failed"}).json()["id"], "failed")
    until(lambda: len(receiver.got), lambda count: count == 1)
    assert json.loads(receiver.got[0][1])["type"] == "video.failed"


@pytest.mark.parametrize("status", [500, 302, 307, 404, 410])
def test_it_is_told_again_under_the_same_id(rig: Rig, receiver: Receiver, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "FIRST", 0.05)
    receiver.statuses = [status, status]
    made = endpoint(rig, receiver)
    rig.film()
    until(lambda: len(receiver.got), lambda count: count == 3)
    until(lambda: rig.jobs.all("outbox", None), lambda rest: rest == [])
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert unwrapped(made["signing_secret"], receiver.got[2]).type == "video.completed"


def waiting(rig: Rig, made: dict[str, Any], created_at: float, **more: Any) -> dict[str, Any]:
    """A message in the outbox of a server that is asleep."""
    job = f"video_{'0' * 26}"
    document = {"id": "wh_1", "endpoint": made["id"], "owner": "local", "type": "video.completed", "job": job, "tries": 0}
    document |= {"created_at": created_at, "due": created_at, **more}
    rig.jobs.put("outbox", "wh_1", "local", document)
    return document


def test_pauses_grow_and_end(rig: Rig, receiver: Receiver) -> None:
    assert [pause_after(tries) for tries in (1, 2, 3)] == [5.0, 20.0, 80.0]
    assert pause_after(100) == 6 * 3600
    made = endpoint(rig, receiver)
    now = time.time() + 10**6
    deliveries = Deliveries(rig.jobs, rig.app.state.service.outbound, rig.app.state.service.metrics, clock=lambda: now)
    document, tries, born = waiting(rig, made, now, due=now + 10**7), 0, now
    while True:
        receiver.statuses = [503]
        deliveries.attempt(document)
        tries += 1
        found = rig.jobs.find("outbox", "wh_1", None)
        if found is None:
            break
        assert found["tries"] == tries
        assert found["due"] == pytest.approx(now + pause_after(tries))
        now = found["due"]
        document = found
    assert 10 < tries < 40
    assert 60 * 3600 < now - born <= 72 * 3600
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_a_message_outlives_the_process(tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "LOOK", 0.05)
    with serving(tmp_path, working=False, webhooks_to_loopback=True) as rig:
        made = endpoint(rig, receiver)
    with serving(tmp_path, working=False, webhooks_to_loopback=True) as rig:
        waiting(rig, made, time.time())
        until(lambda: len(receiver.got), lambda count: count == 1)


def test_nothing_is_told_to_an_endpoint_that_is_gone(rig: Rig, receiver: Receiver) -> None:
    made = endpoint(rig, receiver)
    deliveries = Deliveries(rig.jobs, rig.app.state.service.outbound, rig.app.state.service.metrics)
    document = waiting(rig, made, time.time(), due=time.time() + 1000)
    assert rig.client.delete(f"/v1/webhook_endpoints/{made['id']}").json() == {
        "id": made["id"],
        "object": "webhook_endpoint.deleted",
        "deleted": True,
    }
    deliveries.attempt(document)
    assert receiver.got == []
    assert rig.jobs.find("outbox", "wh_1", None) is None


def test_a_slow_endpoint_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "LOOK", 0.05)
    gate, lock = threading.Event(), threading.Lock()
    under_way, most, told = 0, 0, []

    def post(_self: Outbound, url: str, body: bytes, headers: Any, *, timeout: float) -> int:
        nonlocal under_way, most
        if url.endswith("slow"):
            with lock:
                under_way += 1
                most = max(most, under_way)
            gate.wait(20)
            with lock:
                under_way -= 1
        with lock:
            told.append(url)
        return 200

    monkeypatch.setattr(Outbound, "post", post)
    with serving(tmp_path, working=False) as rig:
        now = time.time()
        for name in ("slow", "quick"):
            facts = {"id": name, "url": f"https://example.org/{name}", "event_types": ["video.completed"]}
            rig.jobs.put("webhook_endpoint", name, "local", {**facts, "secret": webhooks.new_secret()})
        message = {"owner": "local", "type": "video.completed", "job": f"video_{'0' * 26}", "tries": 0}
        for number in range(100):  # all of those come first
            document = {**message, "id": f"wh_{number}", "endpoint": "slow", "created_at": now, "due": now}
            rig.jobs.put("outbox", document["id"], "local", document)
        for number in range(5):
            document = {**message, "id": f"wh_q{number}", "endpoint": "quick", "created_at": now, "due": now}
            rig.jobs.put("outbox", document["id"], "local", document)
        until(lambda: [url for url in told if url.endswith("quick")], lambda urls: len(urls) == 5, 10)
        assert most == webhooks.OF_ONE
        gate.set()
        until(lambda: rig.jobs.all("outbox", None), lambda rest: rest == [])
        assert len(told) == 105


def test_a_message_that_cannot_be_tried_keeps_no_place(rig: Rig, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    made = endpoint(rig, receiver)
    tried: list[str] = []
    attempt = Deliveries.attempt

    def broken(self: Deliveries, document: dict[str, Any]) -> None:
        if document["id"].startswith("wh_broken"):
            tried.append(document["id"])
            raise ZeroDivisionError
        attempt(self, document)

    monkeypatch.setattr(Deliveries, "attempt", broken)
    message = {"endpoint": made["id"], "owner": "local", "type": "video.completed", "job": f"video_{'0' * 26}", "tries": 0}
    for number in range(webhooks.BEHIND + 1):
        document = {**message, "id": f"wh_broken{number:02d}", "created_at": time.time(), "due": time.time()}
        rig.jobs.put("outbox", document["id"], "local", document)
    waiting(rig, made, time.time())
    until(lambda: len(receiver.got), lambda count: count == 1)
    time.sleep(0.3)  # six looks
    assert sorted(tried) == [f"wh_broken{number:02d}" for number in range(webhooks.BEHIND + 1)], "each once, then hours later"


def test_a_full_disk_loses_no_message(rig: Rig, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    made = endpoint(rig, receiver)
    full = threading.Event()
    drop = rig.jobs.drop

    def refusing(collection: str, id: str, owner: str | None) -> bool:
        if collection == "outbox" and not full.is_set():
            full.set()
            raise StorageFull
        return drop(collection, id, owner)

    monkeypatch.setattr(rig.jobs, "drop", refusing)
    waiting(rig, made, time.time())
    until(lambda: rig.jobs.all("outbox", None), lambda rest: rest == [])
    assert len(receiver.got) == 2, "told twice rather than never"


def test_endpoints_and_secrets(rig: Rig, receiver: Receiver) -> None:
    made = endpoint(rig, receiver, "video.completed")
    path = f"/v1/webhook_endpoints/{made['id']}"
    shown = rig.client.get(path).json()
    assert "signing_secret" not in shown
    assert shown["signing_secret_hint"].endswith(made["signing_secret"][-4:])
    changed = rig.client.post(path, json={"name": "other", "event_types": ["video.failed"]}).json()
    assert (changed["name"], changed["event_types"], changed["url"]) == ("other", ["video.failed"], receiver.url)
    listed = rig.client.get("/v1/webhook_endpoints").json()
    assert ([entry["id"] for entry in listed["data"]], listed["has_more"]) == ([made["id"]], False)
    assert rig.client.get("/v1/webhook_event_types").json()["data"] == ["video.completed", "video.failed"]

    tried = rig.client.post(f"{path}/test", json={"event_type": "video.completed"}).json()
    assert (tried["object"], tried["status_code"], tried["success"]) == ("webhook_endpoint.test", 200, True)
    assert unwrapped(made["signing_secret"], receiver.got[-1]).type == "video.completed"
    receiver.statuses = [302]
    assert rig.client.post(f"{path}/test", json={"event_type": "video.failed"}).json()["status_code"] == 302

    second = rig.client.post(f"{path}/rotate_secret", json={"keep_old_secret_active_for_24_hours": True}).json()
    assert second["signing_secret"] != made["signing_secret"]
    rig.client.post(f"{path}/test", json={"event_type": "video.completed"})
    for secret in (made["signing_secret"], second["signing_secret"]):
        assert unwrapped(secret, receiver.got[-1]).type == "video.completed"
    third = rig.client.post(f"{path}/rotate_secret").json()
    rig.client.post(f"{path}/test", json={"event_type": "video.completed"})
    assert unwrapped(third["signing_secret"], receiver.got[-1]).type == "video.completed"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        unwrapped(second["signing_secret"], receiver.got[-1])


def test_an_old_secret_ends_after_a_day() -> None:
    endpoint = {"secret": webhooks.new_secret(), "old_secret": webhooks.new_secret(), "old_until": 100.0}
    assert len(webhooks.secrets_of(endpoint, 99.0)) == 2
    assert webhooks.secrets_of(endpoint, 101.0) == [endpoint["secret"]]


def test_wrong_endpoints(rig: Rig, receiver: Receiver) -> None:
    body = {"name": "n", "url": receiver.url, "event_types": ["video.failed"]}
    for wrong, param in (
        ({"url": "http://10.0.0.1/"}, "url"),
        ({"url": "https://169.254.169.254/"}, "url"),
        ({"url": "ftp://127.0.0.1/"}, "url"),
        ({"url": ""}, "url"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["batch.completed"]}, "event_types"),
        ({"name": ""}, "name"),
    ):
        answer = rig.client.post("/v1/webhook_endpoints", json={**body, **wrong})
        assert answer.status_code == 400, wrong
        assert answer.json()["error"]["param"].split(".")[0] == param
    receiver.server.shutdown()
    receiver.server.server_close()
    made = rig.client.post("/v1/webhook_endpoints", json=body).json()
    dead = rig.client.post(f"/v1/webhook_endpoints/{made['id']}/test", json={"event_type": "video.failed"})
    assert (dead.status_code, dead.json()["error"]["code"]) == (400, "webhook_unreachable")


def test_loopback_needs_the_switch(tmp_path: Path, receiver: Receiver) -> None:
    with serving(tmp_path, working=False) as rig:
        body = {"name": "n", "url": receiver.url, "event_types": ["video.failed"]}
        answer = rig.client.post("/v1/webhook_endpoints", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_url")
