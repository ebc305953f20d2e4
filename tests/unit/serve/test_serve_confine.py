"""The child that works on strangers' bytes: what it cannot do, and how the parent takes its answers and its deaths."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tubelet.serve import confine
from tubelet.serve.confine import ChildFailed

CHILD = """
import ctypes, os, resource, socket, sys, time
from tubelet.serve import confine
def work(request, file):
    {body}
confine.serve(work, prepare=lambda request: None{more})
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a child made of one body, on some bytes."""
    packages = confine._PACKAGES
    monkeypatch.setattr(confine, "_PACKAGES", f"{tmp_path}:{packages}")

    def run(body: str, data: bytes = b"", seconds: float = 20.0, more: str = "", request: dict | None = None):
        (tmp_path / "stranger.py").write_text(CHILD.format(body=body.replace("\n", "\n    "), more=more))
        return confine.run("stranger", request or {}, data, seconds)

    return run


def reason(run, body: str, **words) -> str:
    with pytest.raises(ChildFailed) as caught:
        run(body, **words)
    return caught.value.reason


def test_json_and_bytes_come_back(run) -> None:
    header, parts = run(
        "return {'asked': request, 'length': len(data := file.read())}, (data, b'', data[::-1])", b"abc", request={"a": [1]}
    )
    assert header == {"asked": {"a": [1]}, "length": 3}
    assert parts == [b"abc", b"", b"cba"]


def test_it_can_open_no_file_and_no_socket(run) -> None:
    body = """
told = []
for act in (lambda: open('/etc/hostname'), lambda: open('/tmp/x', 'w'), socket.socket, lambda: os.pipe()):
    try:
        act(); told.append('done')
    except OSError as error:
        told.append(error.errno)
return {'told': told}, ()"""
    assert run(body)[0]["told"] == [24] * 4  # EMFILE


def test_it_starts_without_our_environment(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUBELET_SECRET", "hidden")
    told, _ = run("return {'names': sorted(os.environ)}, ()")
    assert "TUBELET_SECRET" not in told["names"]
    assert "PATH" not in told["names"]


def test_it_has_no_network_where_the_system_lets_it_leave() -> None:
    """Needs the right to make user or network namespaces; the other limits hold without it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
import socket
from tubelet.serve import confine
socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5).close()
confine.leave_network()
try:
    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)
except OSError:
    print('alone')
"""
        allowed = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    if not allowed:
        pytest.skip("this system forbids new namespaces")
    assert said.strip() == "alone"


def test_memory_is_limited(run) -> None:
    assert reason(run, "x = bytearray(4 << 30); return {}, ()") == "memory"


def test_the_answer_is_limited(run) -> None:
    assert reason(run, "return {}, [bytes(1 << 20)] * 200") == "broken"


def test_time_is_limited(run) -> None:
    assert reason(run, "time.sleep(60)", seconds=0.6) == "timeout"
    assert reason(run, "while True: pass", seconds=0.6) == "timeout"


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError('a decoder says')",
        "sys.exit(0)",
        "os.kill(os.getpid(), 11)",
        "ctypes.string_at(0)",
        "print('not json'); sys.exit(0)",
        "print('[' * 100000); sys.exit(0)",
        "print('{}'); sys.exit(0)",
        "print('[]'); sys.exit(0)",
        "print('{\"_lengths\": [10]}'); sys.exit(0)",
        "print('{\"_lengths\": [-1]}'); sys.exit(0)",
        "print('{\"_lengths\": [1e30]}'); sys.exit(0)",
        "print('{\"_lengths\": [Infinity]}'); sys.exit(0)",
        "print('{\"_lengths\": [NaN]}'); sys.exit(0)",
        "print('{\"_lengths\": 3}'); sys.exit(0)",
        "print('{\"_lengths\": [9999999999999]}'); sys.exit(0)",
    ],
)
def test_a_child_that_dies_or_lies_gave_no_answer(run, body: str) -> None:
    assert reason(run, body) == "broken"


def test_threads_are_refused_to_ordinary_users_unless_allowed(run) -> None:
    """Root is above this limit of the system."""
    body = """
return {'limit': resource.getrlimit(resource.RLIMIT_NPROC)[0]}, ()"""
    assert run(body)[0]["limit"] == 0
    assert run(body, more=", threads=True")[0]["limit"] != 0


def test_what_a_child_prints_reaches_nobody(run, capfd: pytest.CaptureFixture[str]) -> None:
    run("print('heap at 0xdeadbeef', file=sys.stderr); return {}, ()")
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
