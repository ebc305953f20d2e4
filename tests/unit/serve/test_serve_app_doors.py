"""The doors of the server: keys and scopes, names and origins, limits, and the one form of every error."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api_rig import LOCAL, TINY, Rig, config_of, png, serving
from fastapi.routing import APIRoute
from starlette.routing import Route
from starlette.testclient import TestClient
from unpickling import assert_quiet, watched

from tubelet.core.errors import UserError
from tubelet.serve import auth, intake, service
from tubelet.serve.app import PUBLIC, create_app
from tubelet.serve.auth import Access, Allowance
from tubelet.serve.config import ServeConfig, SystemFacts, check_binding, read_systems
from tubelet.serve.guard import host_of
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import KeyConflict, QueueFull, StorageFull

IDS = {
    "video_id": f"video_{'0' * 26}",
    "character_id": f"char_{'0' * 26}",
    "file_id": f"file_{'0' * 26}",
    "webhook_endpoint_id": f"we_{'0' * 26}",
    "key_id": f"key_{'0' * 24}",
    "model": "tiny",
}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path) as rig:
        yield rig


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Rig]:
    """A server that asks for keys."""
    with serving(tmp_path, keys=True) as rig:
        yield rig


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def doors(rig: Rig) -> list[tuple[str, str, Route | APIRoute]]:
    """(method, path, route) of every route there is."""
    found = []
    for route in rig.app.routes:
        assert isinstance(route, (Route, APIRoute)), f"{route} is no plain route: this test could not see into it"
        for method in sorted(route.methods or ()):
            found.append((method, re.sub(r"{(\w+)}", lambda name: IDS[name[1]], route.path), route))
    return found


def scope_of(route: Route | APIRoute) -> str | None:
    """The scope that a route asks for."""
    if not isinstance(route, APIRoute):
        return None
    scopes = [found.call.scope for found in route.dependant.dependencies if isinstance(found.call, Access)]
    return scopes[0] if scopes else None


def test_every_route_asks_for_a_key(locked: Rig) -> None:
    """Made from the route table: a route that somebody adds without a lock turns this red."""
    _, reader = auth.issue(locked.jobs, "reader", ["read"])
    _, maker = auth.issue(locked.jobs, "maker", ["read", "create"], rpm=1000)
    _, admin = auth.issue(locked.jobs, "admin", ["read", "create", "admin"], rpm=1000)
    keys = {"read": reader, "create": maker, "admin": admin}
    order = ["read", "create", "admin"]
    locks = 0
    for method, path, route in doors(locked):
        free = not isinstance(route, APIRoute) or path in PUBLIC
        bare = locked.client.request(method, path, headers={"accept": "*/*"})
        if free:
            assert bare.status_code != 401, (method, path)
            continue
        locks += 1
        scope = scope_of(route)
        assert scope in order, f"{method} {path} has no lock"
        assert method in ("GET", "HEAD") or scope != "read", f"{method} {path} changes things with the right to read"
        for headers in ({}, bearer("vs-" + "A" * 43), bearer("sk-other"), {"authorization": f"Basic {maker}"}, bearer("")):
            answer = locked.client.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"
        for weaker in order[: order.index(scope)]:
            answer = locked.client.request(method, path, headers=bearer(keys[weaker]))
            assert answer.status_code == 403, (method, path, weaker)
        if not path.endswith("/events"):  # an open stream of an own film never ends
            allowed = locked.client.request(method, path, headers=bearer(keys[scope]))
            assert allowed.status_code not in (401, 403), (method, path, allowed.text)
    assert locks >= 30
    assert {path for method, path, route in doors(locked) if isinstance(route, APIRoute) and scope_of(route) is None} == {
        *PUBLIC
    }


def test_the_certificate_that_films_are_signed_under_is_public(locked: Rig) -> None:
    answer = locked.client.get("/v1/provenance/root.pem")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-pem-file"
    assert answer.text.startswith("-----BEGIN CERTIFICATE-----")
    assert "PRIVATE" not in answer.text


def test_a_body_is_not_read_without_a_key(locked: Rig) -> None:
    def unread() -> Iterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    for kind in ("application/json", "multipart/form-data; boundary=b", "text/odd"):
        answer = locked.client.post("/v1/videos", content=unread(), headers={"content-type": kind})
        assert answer.status_code == 401


def test_objects_of_others_do_not_exist(locked: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = intake.Admitted(b"clean", "image/png", "image", (16, 24), 1, 0.0, None)
    monkeypatch.setattr(intake, "admit", lambda data, want="any": picture)
    monkeypatch.setattr("tubelet.serve.routes.webhooks._check_url", _accept)
    _, one = auth.issue(locked.jobs, "one", rpm=1000)
    _, two = auth.issue(locked.jobs, "two", rpm=1000)
    mine, other = bearer(one), bearer(two)
    film = locked.client.post("/v1/videos", json={"prompt": "p"}, headers=mine).json()["id"]
    file = locked.client.post("/v1/files", files={"file": ("a.png", b"x")}, headers=mine).json()["id"]
    hook = {"name": "n", "url": "https://example.org/", "event_types": ["video.failed"]}
    endpoint = locked.client.post("/v1/webhook_endpoints", json=hook, headers=mine).json()["id"]
    foreign = {"video_id": film, "file_id": file, "webhook_endpoint_id": endpoint}
    tried = 0
    for route in locked.app.routes:
        names = re.findall(r"{(\w+)}", getattr(route, "path", ""))
        if not names or names[0] not in foreign:
            continue
        path = route.path.replace(f"{{{names[0]}}}", foreign[names[0]])
        for method in route.methods:
            fields = {"move": {"place": 1}, "remix": {"prompt": "p"}, "test": {"event_type": "video.failed"}}
            sent = fields.get(path.rpartition("/")[2], {})
            answer = locked.client.request(method, path, headers=other, json=sent if method == "POST" else None)
            assert answer.status_code == 404, (method, path, answer.text)
            tried += 1
    assert tried >= 14
    reference = {"prompt": "p", "input_reference": {"file_id": file}}
    assert locked.client.post("/v1/videos", json=reference, headers=other).status_code == 404
    edit = {"prompt": "p", "video": {"id": film}}
    assert locked.client.post("/v1/videos/edits", json=edit, headers=other).status_code == 404
    for path in ("/v1/videos", "/v1/files", "/v1/webhook_endpoints"):
        assert locked.client.get(path, headers=other).json()["data"] == []
        assert len(locked.client.get(path, headers=mine).json()["data"]) == 1
    assert locked.client.get(f"/v1/videos/{film}", headers=mine).status_code == 200


async def _accept(*_: Any) -> None:
    return None


def test_keys_are_kept_as_hashes_and_die_at_once(locked: Rig) -> None:
    id, secret = auth.issue(locked.jobs, "laptop")
    assert re.fullmatch(r"vs-[A-Za-z0-9_-]{43}", secret)
    assert locked.client.get("/v1/videos", headers=bearer(secret)).status_code == 200
    (kept,) = locked.jobs.all("key", None)
    assert secret not in json.dumps(kept)
    assert [key["name"] for key in auth.listed(locked.jobs)] == ["laptop"]
    assert "hash" not in auth.listed(locked.jobs)[0]
    assert auth.revoke(locked.jobs, id)
    assert locked.client.get("/v1/videos", headers=bearer(secret)).status_code == 401
    assert not auth.revoke(locked.jobs, id)
    for scopes, limits in (([], {}), (["root"], {}), (["read"], {"rpm": 0}), (["read"], {"queued": 0})):
        with pytest.raises(UserError):
            auth.issue(locked.jobs, "n", scopes, **limits)


def test_a_hash_in_the_id_alone_opens_nothing(locked: Rig) -> None:
    id, secret = auth.issue(locked.jobs, "laptop")
    document = locked.jobs.find("key", id, None)
    assert document is not None
    locked.jobs.put("key", id, id, document | {"hash": "0" * 64})
    assert locked.client.get("/v1/videos", headers=bearer(secret)).status_code == 401


def test_limits_of_a_key(locked: Rig) -> None:
    _, secret = auth.issue(locked.jobs, "k", rpm=3, queued=1)
    _, other = auth.issue(locked.jobs, "o")
    locked.worker.held.set()
    first = locked.client.post("/v1/videos", json={"prompt": "p"}, headers=bearer(secret))
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "3"
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    assert "x-ratelimit-reset-requests" in first.headers
    full = locked.client.post("/v1/videos", json={"prompt": "p"}, headers=bearer(secret))
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert 1 <= int(full.headers["retry-after"]) <= 60
    locked.client.post("/v1/expansions", json={"prompt": "p"}, headers=bearer(secret))
    fast = locked.client.post("/v1/videos", json={"prompt": "p"}, headers=bearer(secret))
    assert (fast.status_code, fast.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(fast.headers["retry-after"]) <= 60
    assert fast.headers["x-ratelimit-remaining-requests"] == "0"
    assert locked.client.get("/v1/videos", headers=bearer(secret)).status_code == 200, "asking is free"
    assert locked.client.post("/v1/videos", json={"prompt": "p"}, headers=bearer(other)).status_code == 200
    locked.worker.held.clear()


def test_an_allowance_fills_again() -> None:
    now = 0.0
    allowance = Allowance(clock=lambda: now)
    assert [allowance.take("a", 2)[0] for _ in range(3)] == [True, True, False]
    assert allowance.take("b", 2)[0]
    now = 29.0
    assert not allowance.take("a", 2)[0]
    now = 31.0
    assert allowance.take("a", 2)[0]
    now = 10_000.0
    assert [allowance.take("a", 2)[0] for _ in range(3)] == [True, True, False]


def test_without_keys_only_this_machine(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        check_binding(host, keys=False)
        config_of(tmp_path, host=host)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", ""):
        with pytest.raises(UserError):
            check_binding(host, keys=False)
        with pytest.raises(UserError):
            config_of(tmp_path, host=host)
        check_binding(host, keys=True)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    for wrong in (
        {"systems": {}},
        {"default": "other"},
        {"aliases": {"sora-2": "other"}},
        {"aliases": {"tiny": "tiny"}},
        {"cap": 0},
        {"ttl": 0},
        {"origins": ("example.org",)},
        {"origins": ("https://example.org/",)},
    ):
        with pytest.raises(UserError):
            config_of(tmp_path, **wrong)
    config = config_of(tmp_path, aliases={"mine": "tiny"})
    assert config.system("mine") is config.system("tiny") is TINY
    assert config.system("sora-2") is None


def test_systems_are_read_without_networks(tmp_path: Path) -> None:
    facts = read_systems(["worlds-64"])["worlds-64"]
    assert (facts.size, facts.fps) == ((64, 64), 8.0)
    assert facts.seconds == facts.frames / 8
    (tmp_path / "system.json").write_text('{"name": "x"}')
    for names in ([tmp_path], ["no-such"], ["worlds-64", "worlds-64"]):
        with pytest.raises(UserError):
            read_systems(names)
    with pytest.raises(UserError):
        SystemFacts.read(tmp_path)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost:1@evil", "", "10.0.0.1", "[::1", "a b"])
def test_other_host_names_are_refused(rig: Rig, host: str) -> None:
    for path in ("/v1/videos", "/"):
        answer = rig.client.get(path, headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed")


def test_own_host_names_are_answered(rig: Rig) -> None:
    for host in ("127.0.0.1:8000", "LOCALHOST", "[::1]:9"):
        assert rig.client.get("/v1/videos", headers={"host": host}).status_code == 200
    assert host_of("[::1]:80") == "::1"
    assert host_of("a:b") == ""


PAGE = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:9999"},
    {"origin": "http://localhost:8000"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "https://evil.example", "sec-fetch-site": "same-origin"},
]


@pytest.mark.parametrize("headers", PAGE)
def test_pages_of_others_can_do_nothing(rig: Rig, headers: dict[str, str]) -> None:
    film = rig.film()["id"]
    form = {"prompt": (None, "p")}
    for answer in (
        rig.client.post("/v1/videos", files=form, headers=headers),
        rig.client.post("/v1/videos", content=b'{"prompt":"p"}', headers={**headers, "content-type": "text/plain"}),
        rig.client.delete(f"/v1/videos/{film}", headers=headers),
        rig.client.get("/v1/videos", headers=headers),
        rig.client.get("/v1/videos/events", headers=headers),
        rig.client.get(f"/v1/videos/{film}/content", headers=headers),
        rig.client.options("/v1/videos", headers={**headers, "access-control-request-method": "POST"}),
    ):
        assert answer.status_code == 403, answer.request.url
        assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers
    assert len(rig.client.get("/v1/videos").json()["data"]) == 1


def test_own_pages_and_allowed_ones_can(tmp_path: Path) -> None:
    friend = "https://studio.example"
    with serving(tmp_path, origins=(friend,)) as rig:
        own = {"origin": LOCAL, "sec-fetch-site": "same-origin", "host": "127.0.0.1:8000"}
        assert rig.client.post("/v1/videos", files={"prompt": (None, "p")}, headers=own).status_code == 200
        assert rig.client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code != 403, "a link from elsewhere"
        asked = {"origin": friend, "access-control-request-method": "POST", "sec-fetch-site": "cross-site"}
        may = rig.client.options("/v1/videos", headers=asked)
        assert (may.status_code, may.headers["access-control-allow-origin"]) == (204, friend)
        named = "authorization,content-type,x-stainless-arch, X-Stainless-Retry-Count,x-stainless-timeout,user-agent"
        said = rig.client.options("/v1/videos", headers={**asked, "access-control-request-headers": named})
        allowed = said.headers["access-control-allow-headers"].split(", ")
        assert set(named.lower().replace(" ", "").split(",")) <= set(allowed), "what the official client sends in a browser"
        odd = f"cookie, x-stainless-, x-stainless-a:b, x-other, *, x-stainless-{'a' * 99}"
        said = rig.client.options("/v1/videos", headers={**asked, "access-control-request-headers": odd})
        assert said.headers["access-control-allow-headers"] == may.headers["access-control-allow-headers"]
        did = rig.client.post("/v1/videos", json={"prompt": "p"}, headers={"origin": friend, "sec-fetch-site": "cross-site"})
        assert (did.status_code, did.headers["access-control-allow-origin"]) == (200, friend)


def test_headers_on_everything(rig: Rig) -> None:
    for answer in (
        rig.client.get("/v1/videos"),
        rig.client.get("/nothing"),
        rig.client.get("/v1/videos", headers={"host": "evil"}),
        rig.client.post("/v1/videos", json={}),
        rig.client.get("/"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers.get("access-control-allow-origin") is None


def test_the_studio_is_served_as_files(tmp_path: Path) -> None:
    studio = tmp_path / "studio"
    (studio / "assets").mkdir(parents=True)
    (studio / "index.html").write_text("<!doctype html><p>studio")
    (studio / "assets" / "index-1.js").write_text("1")
    (tmp_path / "secret.json").write_text("{}")
    (studio / "assets" / "link.json").symlink_to(tmp_path / "secret.json")
    with serving(tmp_path / "data", studio=studio) as rig:
        page = rig.client.get("/")
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert "script-src 'self'" in page.headers["content-security-policy"]
        script = rig.client.get("/assets/index-1.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert "immutable" in script.headers["cache-control"]
        for path in ("/assets/link.json", "/assets/..%2f..%2fsecret.json", "/secret.json"):
            assert rig.client.get(path).status_code == 404


@pytest.mark.parametrize("wanted", ["bytes=0-!3", "bytes=", "lines=1-2", "bytes=9-2", "bytes=10000000-", "bytes=0-1"])
def test_the_studios_files_come_whole_whatever_part_is_asked_for(tmp_path: Path, wanted: str) -> None:
    (tmp_path / "studio").mkdir()
    (tmp_path / "studio" / "index.html").write_text("<!doctype html>")
    with serving(tmp_path / "server", studio=tmp_path / "studio") as rig:
        answer = rig.client.get("/", headers={"range": wanted})
    assert (answer.status_code, answer.text) == (200, "<!doctype html>")
    assert answer.headers["accept-ranges"] == "none"


def test_every_error_is_the_error_object(rig: Rig) -> None:
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/videos/", 404, "not_found"),
        ("PUT", "/v1/videos", 405, "method_not_allowed"),
        ("PATCH", "/v1/videos/x", 405, "method_not_allowed"),
        ("TRACE", "/", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/videos", 405, "method_not_allowed"),
    ):
        answer = rig.client.request(method, path)
        said = answer.json()["error"]
        assert (answer.status_code, said["code"]) == (status, code), (method, path)
        assert set(said) == {"message", "type", "param", "code"}
        assert said["message"]
        assert answer.headers["x-should-retry"] == "false"
        assert status != 405 or "allow" in answer.headers
    for content, kind in ((b"{", "application/json"), (b"[1]", "application/json"), (b"[" * 5000, "application/json")):
        answer = rig.client.post("/v1/videos", content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    xml = rig.client.post("/v1/videos", content=b"<a/>", headers={"content-type": "text/xml"})
    assert (xml.status_code, xml.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_failures_say_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("canary: a prompt in an error's text")

    monkeypatch.setattr(rig.jobs, "create", broken)
    with caplog.at_level(logging.INFO):
        answer = rig.client.post("/v1/videos", json={"prompt": "p"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "canary" not in answer.text
    assert "canary" not in caplog.text
    assert any('"error": "RuntimeError"' in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (QueueFull(300), 429, "queue_full", "true"),
        (StorageFull(), 503, "storage_full", "true"),
        (KeyConflict(), 409, "key_conflict", "false"),
    ],
)
def test_refusals_of_the_store(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str, retry: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(rig.jobs, "create", refuse)
    answer = rig.client.post("/v1/videos", json={"prompt": "p"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["x-should-retry"] == retry
    assert int(answer.headers.get("retry-after", "1")) <= 60


def test_back_pressure_and_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, working=False, cap=2) as rig:
        statuses = [rig.client.post("/v1/videos", json={"prompt": "p"}).status_code for _ in range(4)]
        assert statuses == [200, 200, 429, 429]
        monkeypatch.setattr(rig.store, "free", lambda: -1)
        full = rig.client.post("/v1/videos", json={"prompt": "p"})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "storage_full")
        assert rig.client.get("/readyz").json()["checks"]["disk"] is False


def test_draining(rig: Rig) -> None:
    film = rig.film()["id"]
    rig.app.state.service.drain()
    for path, body in (("/v1/videos", {"prompt": "p"}), (f"/v1/videos/{film}/remix", {"prompt": "p"})):
        answer = rig.client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.headers["x-should-retry"] == "true"
    assert rig.client.get(f"/v1/videos/{film}/content").status_code == 200
    assert rig.client.get("/healthz").status_code == 200
    ready = rig.client.get("/readyz")
    assert (ready.status_code, ready.json()["checks"]["taking_jobs"]) == (503, False)


def test_ready_needs_a_database_that_takes_what_is_written(tmp_path: Path) -> None:
    with serving(tmp_path) as rig:
        film = rig.film()
        readable = Jobs.open(f"sqlite:///file:{tmp_path / 'tubelet.db'}?mode=ro&uri=true")
        with TestClient(create_app(readable, rig.store, rig.config), base_url=LOCAL) as client:
            rig.jobs.hello("fake", {"system": "tiny"})
            assert client.get(f"/v1/videos/{film['id']}").status_code == 200, "it can be read"
            answer = client.get("/readyz")
            assert (answer.status_code, answer.json()["checks"]["database"]) == (503, False)
            assert answer.json()["checks"]["worker"] is True
        readable.close()


def test_who_asks_often_whether_it_is_ready_makes_it_write_no_more_often(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[bool] = []
    monkeypatch.setattr(rig.jobs, "probe", lambda: probes.append(True))
    assert {rig.client.get("/readyz").status_code for _ in range(20)} == {200}
    assert len(probes) == 1
    monkeypatch.setattr(service, "PROBED", 0.0)
    rig.client.get("/readyz")
    assert len(probes) == 2


def test_ready_needs_a_worker_of_each_system(tmp_path: Path) -> None:
    with serving(tmp_path, working=False, systems={"tiny": TINY, "other": replace(TINY, name="other")}) as rig:
        assert rig.client.get("/readyz").status_code == 503
        rig.jobs.hello("w", {"system": "tiny"})
        assert rig.client.get("/readyz").json()["checks"]["worker"] is False
        rig.jobs.hello("v", {"system": "other"})
        assert rig.client.get("/readyz").json() == {
            "status": "ok",
            "checks": {"database": True, "disk": True, "worker": True, "taking_jobs": True},
        }


def test_a_worker_of_the_process_before_does_not_make_it_ready(tmp_path: Path) -> None:
    with serving(tmp_path) as rig:
        assert rig.client.get("/readyz").status_code == 200
        with TestClient(create_app(rig.jobs, rig.store, rig.config), base_url=LOCAL) as client:
            assert client.get("/readyz").json()["checks"]["worker"] is False, "it may have died with that"
            rig.jobs.hello("fake", {"system": "tiny"})
            assert client.get("/readyz").status_code == 200


def test_a_path_names_all_its_methods_and_health_answers_to_head(rig: Rig) -> None:
    wrong = rig.client.delete("/v1/videos")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")
    for path in ("/healthz", "/readyz"):
        answer = rig.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_large_bodies_end_early(tmp_path: Path) -> None:
    with serving(tmp_path, upload_limit=200_000, media_limit=100_000) as rig:
        sent = 0

        def pieces() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(100):
                sent += 10_000
                yield b"x" * 10_000

        for headers in ({"content-type": "application/json"}, {"content-type": "multipart/form-data; boundary=b"}):
            told = rig.client.post("/v1/videos", content=b"x" * 200_001, headers=headers)
            assert (told.status_code, told.json()["error"]["code"]) == (413, "request_too_large")
        untold = rig.client.post("/v1/videos", content=pieces(), headers={"content-type": "application/json"})
        assert (untold.status_code, untold.json()["error"]["code"]) == (413, "request_too_large")
        file = rig.client.post("/v1/files", files={"file": ("a.png", b"x" * 100_001)})
        assert (file.status_code, file.json()["error"]["code"]) == (413, "file_too_large")
        assert rig.client.post("/v1/videos", json={"prompt": "p"}).status_code == 200


def test_the_server_is_light_to_import() -> None:
    code = (
        "import sys, time; begin = time.process_time(); import tubelet.serve.app, tubelet.serve.auth, tubelet.serve.jobs, "
        "tubelet.serve.store, tubelet.serve.intake; spent = time.process_time() - begin; "
        "heavy = [m for m in ('torch', 'numpy', 'av', 'PIL', 'c2pa', 'cryptography') if m in sys.modules]; "
        "print(spent); sys.exit(f'{heavy} were imported' if heavy else f'{spent} s' if spent > 1 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    code = """
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from api_rig import png, serving
with serving(Path(sys.argv[2])) as rig:
    film = rig.film()
    picture = {"prompt": (None, "p"), "input_reference": ("a.png", png())}
    made = rig.client.post("/v1/videos", files=picture)
    assert made.status_code == 200, made.text
    rig.until(made.json()["id"])
    assert rig.client.post(f"/v1/videos/{film['id']}/remix", json={"prompt": "p"}).status_code == 200
    assert rig.client.get(f"/v1/videos/{film['id']}/content").status_code == 200
    assert rig.client.delete(f"/v1/videos/{film['id']}").status_code == 200
"""
    assert_quiet(watched(code, Path(__file__).parent, tmp_path))


def test_a_picture_goes_through_the_real_decoder(rig: Rig) -> None:
    made = rig.client.post("/v1/videos", files={"prompt": (None, "p"), "input_reference": ("a.png", png())})
    assert made.status_code == 200, made.text
    wrong = rig.client.post(
        "/v1/videos", files={"prompt": (None, "p"), "input_reference": ("a.png", b"\x89PNG\r\n\x1a\n junk")}
    )
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "unreadable_media")
    assert wrong.json()["error"]["param"] == "input_reference"


def test_polls_are_answered_while_uploads_decode(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, inside = threading.Event(), threading.Semaphore(0)

    def slow(data: bytes, want: str = "any") -> intake.Admitted:
        inside.release()
        gate.wait(20)
        return intake.Admitted(b"clean", "image/png", "image", (16, 24), 1, 0.0, None)

    monkeypatch.setattr(intake, "admit", slow)
    film = rig.film()["id"]
    done: list[int] = []

    def upload(number: int) -> None:
        body = {"prompt": (None, f"p{number}"), "input_reference": ("a.png", b"x")}
        done.append(rig.client.post("/v1/videos", files=body).status_code)

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    inside.acquire(timeout=10)
    assert rig.client.get(f"/v1/videos/{film}").status_code == 200
    assert rig.client.post("/v1/videos", json={"prompt": "words only"}).status_code == 200
    assert done == []
    gate.set()
    for thread in threads:
        thread.join(20)
    assert done == [200] * 12


def test_two_apps_share_nothing_but_the_store(tmp_path: Path) -> None:
    with serving(tmp_path) as rig:
        config: ServeConfig = config_of(tmp_path)
        other = create_app(rig.jobs, rig.store, config)
        assert other.state.service is not rig.app.state.service
        assert io.StringIO(json.dumps(other.openapi())).getvalue() == json.dumps(rig.app.openapi())
