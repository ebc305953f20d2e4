"""Keys over the wire: everybody sees his own limits and what he used; who rules the server makes and revokes keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_rig import Rig, png, serving

from tubelet.serve import auth

LIMITS = {"rpm": 1000, "queued": 7, "running": 3, "daily": 100.0, "stored": 0.5}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with serving(tmp_path, keys=True, working=False) as rig:
        yield rig


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_a_key_sees_what_it_may_and_has_used(rig: Rig) -> None:
    id, secret = auth.issue(rig.jobs, "laptop", **LIMITS)
    mine = bearer(secret)
    said = rig.client.get("/v1/key", headers=mine).json()
    assert (said["id"], said["object"], said["name"], said["scopes"]) == (id, "key", "laptop", ["create", "read"])
    assert said["limits"] == LIMITS
    assert said["usage"] == {"queued": 0, "running": 0, "daily": 0, "stored": 0}
    for _ in range(2):
        assert rig.client.post("/v1/videos", json={"prompt": "a ball", "seconds": 4}, headers=mine).status_code == 200
    file = rig.client.post("/v1/files", files={"file": ("a.png", png())}, data={"purpose": "user_data"}, headers=mine).json()
    assert rig.jobs.claim("one") is not None
    used = rig.client.get("/v1/key", headers=mine).json()["usage"]
    assert used == {"queued": 1, "running": 1, "daily": 8, "stored": file["bytes"] / 1e9}
    _, other = auth.issue(rig.jobs, "other")
    assert rig.client.get("/v1/key", headers=bearer(other)).json()["usage"]["queued"] == 0


def test_who_needs_no_key_has_no_limits(tmp_path: Path) -> None:
    with serving(tmp_path, working=False) as rig:
        said = rig.client.get("/v1/key").json()
        assert (said["id"], said["scopes"]) == ("local", ["admin", "create", "read"])
        assert set(said["limits"].values()) == {None}
        made = rig.client.post("/v1/keys", json={"name": "later"})
        assert (made.status_code, made.json()["error"]["code"]) == (403, "keys_not_in_use")
        assert auth.listed(rig.jobs) == []


def test_keys_are_made_listed_and_revoked(rig: Rig) -> None:
    _, secret = auth.issue(rig.jobs, "admin", ("read", "create", "admin"), rpm=1000)
    admin = bearer(secret)
    made = rig.client.post("/v1/keys", json={"name": "guest", "scopes": ["read"], "running": 1}, headers=admin)
    assert made.status_code == 200, made.text
    key = made.json()
    assert key["limits"] == {"rpm": 60, "queued": 20, "running": 1, "daily": None, "stored": None}
    guest = bearer(key["secret"])
    assert rig.client.get("/v1/key", headers=guest).json()["name"] == "guest"
    assert rig.client.post("/v1/videos", json={"prompt": "p"}, headers=guest).status_code == 403
    listed = rig.client.get("/v1/keys", headers=admin)
    assert [one["name"] for one in listed.json()["data"]] == ["admin", "guest"]
    assert key["secret"] not in listed.text
    assert "hash" not in listed.text
    assert rig.client.delete(f"/v1/keys/{key['id']}", headers=admin).json() == {
        "id": key["id"], "deleted": True, "object": "key.deleted"
    }  # fmt: skip
    assert rig.client.get("/v1/key", headers=guest).status_code == 401
    assert rig.client.delete(f"/v1/keys/{key['id']}", headers=admin).status_code == 404
    form = {"name": "form", "scopes": json.dumps(["read", "create"]), "daily": "60"}
    assert rig.client.post("/v1/keys", data=form, headers=admin).json()["limits"]["daily"] == 60


def test_a_key_makes_none_that_may_more(rig: Rig) -> None:
    _, secret = auth.issue(rig.jobs, "metrics", ("admin",), rpm=1000)
    beyond = rig.client.post("/v1/keys", json={"name": "x"}, headers=bearer(secret))
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (403, "insufficient_scope")
    assert len(auth.listed(rig.jobs)) == 1


def test_what_is_asked_for_counts_without_a_limit_too(rig: Rig) -> None:
    _, secret = auth.issue(rig.jobs, "free", rpm=1000)
    assert rig.client.post("/v1/videos", json={"prompt": "p", "seconds": 4}, headers=bearer(secret)).status_code == 200
    assert rig.client.get("/v1/key", headers=bearer(secret)).json()["usage"]["daily"] == 4


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes"),
        ({"name": "x", "rpm": 0}, "rpm"),
        ({"name": "x", "stored": 0}, "stored"),
        ({"name": "x", "daily": "inf"}, "daily"),
        ({"name": "x", "colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_a_key(rig: Rig, wrong: dict[str, object], param: str) -> None:
    _, secret = auth.issue(rig.jobs, "admin", ("read", "create", "admin"), rpm=1000)
    answer = rig.client.post("/v1/keys", json=wrong, headers=bearer(secret))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)
    assert len(auth.listed(rig.jobs)) == 1
