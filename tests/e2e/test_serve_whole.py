"""`tubelet serve` as people run it: films over HTTP, credentials in them, a killed worker, a stop and a start, keys."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_system import save_tiny

from tubelet.media.decode import probe
from tubelet.serve.jobs import Jobs

PATIENCE = 240.0


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
    return found


class Server:
    """A running `tubelet serve`, its answers, and its log line by line."""

    def __init__(self, system: Path, data: Path, *more: str, module: str = "tubelet") -> None:
        words = ["--system", str(system), "--data", str(data), "--port", "0", "--device", "cpu", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.data = data
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parents[2],
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert " at http://" in said, (said, self.lines)
        self.http = httpx.Client(base_url=said.split(" at ")[1].split(",")[0], timeout=PATIENCE)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def events(self, name: str) -> list[dict[str, Any]]:
        said = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [line for line in said if line["event"] == name]

    def ask(self, **more: Any) -> str:
        answer = self.http.post("/v1/videos", json={"prompt": "a red ball falls", "model": "tiny", "size": "64x48", **more})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    def video(self, id: str) -> dict[str, Any]:
        return self.http.get(f"/v1/videos/{id}").json()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.http.close()
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code


@pytest.fixture
def serve(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve(*options)`: a server on this test's folder."""
    servers: list[Server] = []

    def start(*more: str) -> Server:
        servers.append(Server(tiny, tmp_path / "data", *more))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path("/proc").is_dir() else True


def test_a_film_from_words_to_credentials(
    serve: Callable[..., Server], tubelet: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    server = serve()
    id = server.ask(seconds="1", seed=5)
    done = until(lambda: (v := server.video(id))["status"] in ("completed", "failed") and v)
    assert done["status"] == "completed", done
    assert (done["num_frames"], done["size"], done["seed"]) == (8, "64x48", 5)
    (asked,) = (line for line in server.events("request") if line["job"] == id)
    (ended,) = until(lambda: server.events("completed"))
    assert (ended["job"], ended["attempt"], ended["request_id"]) == (id, 1, asked["request_id"])
    told = ("attempts_total 1", "provenance_signed_total 3", 'render_seconds_count{stage="sign"} 1', "workers_up 1")
    figures = until(lambda: all(f"tubelet_{line}\n" in (page := server.http.get("/metrics").text) for line in told) and page)
    assert "tubelet_steps_total 0\n" not in figures
    path = tmp_path / "film.mp4"
    path.write_bytes(server.http.get(f"/v1/videos/{id}/content").content)
    film = probe(path)
    assert (film.height, film.width, film.frames) == (48, 64, 8)
    code, out, _ = tubelet("provenance", path, "--data", tmp_path / "data", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["credentials"]["validation_state"] == "trusted"
    assert said["credentials"]["generation"]["video"] == id
    assert "signed here" in tubelet("provenance", path, "--data", tmp_path / "data").out
    assert "signed by somebody else" in tubelet("provenance", path, "--data", tmp_path / "nowhere").out
    root = tmp_path / "root.pem"
    root.write_bytes(server.http.get("/v1/provenance/root.pem").content)
    nowhere = ("provenance", path, "--data", tmp_path / "nowhere", "--certificate")
    assert "signed here" in tubelet(*nowhere, root).out
    assert "no PEM certificate" in refused(*nowhere, path)
    assert "cannot read" in refused(*nowhere, tmp_path / "none.pem")
    for variant in ("thumbnail", "spritesheet"):
        assert server.http.get(f"/v1/videos/{id}/content", params={"variant": variant}).status_code == 200
    assert server.http.get("/readyz").status_code == 200
    assert server.end() == 0
    assert not [line for line in server.lines if "red ball" in line]


def test_each_system_has_its_workers(serve: Callable[..., Server], tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=1, name="other")
    server = serve("--alias", f"sora-2-pro={other}", "--alias", "mine=tiny")
    names = ["tiny", "mine", "sora-2", "sora-2-pro", "other"]
    until(lambda: server.http.get("/readyz").status_code == 200)
    assert {model["id"] for model in server.http.get("/v1/models").json()["data"]} == set(names)
    made = {name: server.ask(model=name, seconds="1", seed=5) for name in names}
    for id in made.values():
        until(lambda id=id: server.video(id)["status"] == "completed")
    jobs = Jobs.open(f"sqlite:///{tmp_path / 'data' / 'tubelet.db'}")
    with contextlib.closing(jobs):
        systems = {name: found.result["system"] for name, id in made.items() if (found := jobs.get(id, None))}
        workers = {worker["id"]: worker["system"] for worker in jobs.workers()}
    assert systems == {"tiny": "tiny", "mine": "tiny", "sora-2": "tiny", "sora-2-pro": "other", "other": "other"}
    begun = {line["job"]: workers[line["worker"]] for line in server.events("started")}
    assert begun == {made[name]: system for name, system in systems.items()}, "each by a worker that has it"
    assert server.end() == 0


def test_a_killed_worker_and_a_stopped_server_cost_nothing(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    id = server.ask(seconds="1", steps=400)
    journal = tmp_path / "data" / "journals" / id / "answers"
    until(lambda: journal.is_dir() and len(list(journal.iterdir())) > 20)
    os.kill(server.events("worker started")[0]["pid"], signal.SIGKILL)
    until(lambda: len(server.events("worker started")) == 2)
    assert server.events("worker ended")[0]["code"] == -signal.SIGKILL
    with contextlib.closing(
        Jobs.open(f"sqlite:///{tmp_path / 'data' / 'tubelet.db'}", clock=lambda: time.time() + 60)
    ) as later:
        later.sweep()  # as the server does when the lease of the dead one has run out
    until(lambda: len(server.events("started")) == 2)
    assert server.video(id)["status"] == "in_progress"
    assert server.end() == 0
    assert server.events("given back")
    assert not any(alive(line["pid"]) for line in server.events("worker started"))
    server = serve()
    assert until(lambda: (v := server.video(id))["status"] in ("completed", "failed") and v)["status"] == "completed"
    pid = server.events("worker started")[0]["pid"]
    server.process.kill()
    until(lambda: not alive(pid))


def test_only_those_with_a_key_are_let_in(serve: Callable[..., Server], tubelet: Callable[..., Any], tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "data"))
    made = tubelet("keys", "create", "laptop", *data)
    secret = made.out.strip()
    assert secret.startswith("vs-")
    assert "not shown again" in made.err
    server = serve("--keys")
    listed = json.loads(tubelet("keys", "list", "--json", *data).out)
    assert [(key["name"], key["scopes"]) for key in listed] == [("laptop", ["create", "read"])]
    assert secret not in json.dumps(listed)
    assert server.http.get("/v1/videos").status_code == 401
    headers = {"authorization": f"Bearer {secret}"}
    assert server.http.get("/v1/videos", headers=headers).status_code == 200
    assert tubelet("keys", "revoke", listed[0]["id"], *data).code == 0
    assert server.http.get("/v1/videos", headers=headers).status_code == 401
    assert server.end(signal.SIGINT) == 0


def test_a_server_that_cannot_begin_says_why(refused: Callable[..., str], tiny: Path, tmp_path: Path) -> None:
    here = ("--system", tiny, "--data", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is taken" in refused("serve", *here, "--port", port)
    (tmp_path / "file").touch()
    assert "cannot write in" in refused("serve", "--system", tiny, "--data", tmp_path / "file" / "below")
    assert "no system 'worlds-9'" in refused("serve", "--system", "worlds-9", "--data", tmp_path)
    assert "--keys" in refused("serve", *here, "--host", "0.0.0.0")
    assert "keys cannot 'lose'" in refused("keys", "lose", "--data", tmp_path)
    assert "a name for the key" in refused("keys", "create", "--data", tmp_path)
    assert "--rpm is of a new key" in refused("keys", "list", "--rpm", 5, "--data", tmp_path)
    assert "--scope is of a new key" in refused("keys", "revoke", "key_1", "--scope", "read", "--data", tmp_path)
    assert "no key 'key_1'" in refused("keys", "revoke", "key_1", "--data", tmp_path)
    assert "cannot read" in refused("provenance", tmp_path / "none.mp4", "--data", tmp_path)
    (tmp_path / "words.mp4").write_text("not a film")
    assert "neither a film nor a picture" in refused("provenance", tmp_path / "words.mp4", "--data", tmp_path)


def test_a_server_whose_worker_cannot_begin_ends(tiny: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = broken / "denoiser.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ["serve", "--system", str(broken), "--data", str(tmp_path), "--port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "tubelet", *words], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert "denoiser.safetensors" in done.stderr
    assert done.stderr.rstrip().endswith("tubelet: no worker could be started; what it said stands above")
