"""The log: lines of JSON that can be joined from a request to its film, and hold nothing private."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from api_rig import Rig, serving
from render_rig import save_tiny

from tubelet.generate.system import load
from tubelet.serve import auth
from tubelet.serve.worker import Worker, WorkerConfig

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CANARY = "canary-0f3a"


def said(caplog: pytest.LogCaptureFixture, event: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(record.message) for record in caplog.records if record.name == "tubelet.serve"]
    return [line for line in lines if event in (None, line["event"])]


def test_logs_are_json_and_hold_nothing_private(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), serving(tmp_path, keys=True) as rig:
        _, secret = auth.issue(rig.jobs, "k", ["read", "create", "admin"], rpm=1000)
        rig.client.headers["authorization"] = f"Bearer {secret}"
        film = rig.film(prompt=CANARY)
        rig.client.post("/v1/videos", json={"prompt": f"fail render_failed {CANARY}"})
        rig.client.post("/v1/videos", json={"prompt": CANARY, CANARY: 1})
        rig.client.post("/v1/videos", files={"prompt": (None, CANARY), "input_reference": (f"{CANARY}.png", CANARY.encode())})
        rig.client.post("/v1/expansions", json={"prompt": CANARY})
        rig.client.post("/v1/images/generations", json={"prompt": CANARY})
        rig.client.get(f"/v1/{CANARY}?prompt={CANARY}")
        rig.client.get("/v1/videos", headers={"authorization": f"Bearer {CANARY}"})
        odd = {"idempotency-key": CANARY, "user-agent": CANARY, "traceparent": CANARY}
        rig.client.post("/v1/videos", json={"prompt": "p"}, headers=odd)
    ours = [record for record in caplog.records if not record.name.startswith("httpx")]  # the test's own client
    lines = said(caplog, "request")
    fields = {"at", "event", "request_id", "trace_id", "method", "route", "status", "ms", "owner", "job"}
    assert {frozenset(line) for line in lines} == {frozenset(fields)}
    assert {line["route"] for line in lines} >= {"/v1/videos", "/v1/videos/{video_id}", "none"}
    assert [line["job"] for line in lines].count(film["id"]) == 1, "in the line of the request that made it"
    for text in (record.getMessage() for record in ours):
        assert CANARY not in text
        assert secret not in text


def test_a_film_can_be_followed_from_its_request_to_its_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tubelet.serve")
    system = load(save_tiny(tmp_path / "tiny"), device="cpu", dtype="float32")
    with serving(tmp_path, working=False) as rig:
        wish = {"prompt": "a ball", "model": "tiny", "frames": 5, "size": "32x32"}
        made = rig.client.post("/v1/videos", json=wish, headers={"traceparent": f"00-{TRACE}-{'b' * 16}-01"})
        asked, id = made.headers["x-request-id"], made.json()["id"]
        again = rig.client.post("/v1/videos", json=wish, headers={"x-stainless-retry-count": "1"})
        assert again.json()["id"] == id
        plain = rig.client.post("/v1/videos", json={**wish, "seed": 1})
        work(rig, system)
        work(rig, system)
    requests = {line["request_id"]: line for line in said(caplog, "request")}
    assert (requests[asked]["job"], requests[asked]["trace_id"]) == (id, TRACE)
    other = requests[again.headers["x-request-id"]]
    assert (other["job"], other["trace_id"]) == (id, None), "a retry names the job of its first try"
    for line in said(caplog, "started") + said(caplog, "completed"):
        first = line["job"] == id
        assert line["attempt"] == 1
        assert line["request_id"] == (asked if first else plain.headers["x-request-id"])
        assert line["trace_id"] == (TRACE if first else None)
    assert len(said(caplog, "completed")) == 2


def work(rig: Rig, system: Any) -> None:
    """A worker takes a job."""
    config = WorkerConfig(rig.config.data, "", "tiny")
    assert Worker(rig.jobs, rig.store, system, config).turn()


def test_every_line_of_a_process_is_json() -> None:
    """In a process of its own: a test's own handlers stand in the way."""
    code = """
import logging, sys
from tubelet.serve import logs
canary = sys.argv[1]
logs.write_to_stderr()
logs.say("ready", device="cpu")
library = logging.getLogger("some.library")
library.info("not worth a line")
library.warning("cannot take %s\\nbecause of\\n%s", canary, canary)
def breaks():
    raise ValueError(canary)
try:
    breaks()
except ValueError as error:
    logs.log_failure("request", error, request_id="req_1")
    library.exception("%s went wrong", canary)
"""
    done = subprocess.run([sys.executable, "-c", code, CANARY], capture_output=True, text=True, check=True)
    ready, warned, failure, broken = (json.loads(line) for line in done.stderr.splitlines())
    assert (ready["event"], ready["device"]) == ("ready", "cpu")
    assert {name: warned[name] for name in ("event", "logger", "level", "said")} == {
        "event": "library", "logger": "some.library", "level": "WARNING", "said": "cannot take %s"
    }  # fmt: skip
    told = {name: failure[name] for name in ("event", "where", "error", "request_id")}
    assert told == {"event": "failure", "where": "request", "error": "ValueError", "request_id": "req_1"}
    assert (broken["error"], broken["said"]) == ("ValueError", "%s went wrong")
    assert "breaks" in failure["places"][-1]
    assert "breaks" in broken["places"][-1]
    assert CANARY not in done.stdout + done.stderr
