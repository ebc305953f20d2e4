"""Work on bytes that strangers sent, in a child process that can do little harm.

The parent starts `python -m MODULE REQUEST` with the bytes as standard input; the child gives up what it does not need, works,
and answers with a line of JSON and raw bytes on standard output. Its memory, time and output are limited, it can open no file
and no socket, it has no network where the system lets it give that up, and what it prints besides is thrown away. Nothing
is unpickled on either side.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tubelet.serve.records import StorageFull

SECONDS = 20.0
"""Wall time that a child may take."""
MEMORY = 2 << 30  # bytes of address space: a picture of 50 megapixels, or a clip of 2160 lines with its encoder
ANSWER = 160 << 20  # bytes
HEADER = 1 << 20  # bytes of the JSON line

_PACKAGES = str(Path(__file__).resolve().parents[2])
_SLOTS = threading.BoundedSemaphore(min(4, max(2, os.cpu_count() or 1)))  # a burst of uploads is no burst of decoders
_NEW_USER, _NEW_NET, _NO_NEW_PRIVILEGES = 0x10000000, 0x40000000, 38  # linux/sched.h, linux/prctl.h

Work = Callable[[dict[str, Any], BinaryIO], tuple[dict[str, Any], Sequence[bytes]]]


class ChildFailed(Exception):  # noqa: N818  an answer, not a defect
    """The child gave no answer: it took too long, wanted too much memory, or broke."""

    def __init__(self, reason: Literal["timeout", "memory", "broken"]) -> None:
        super().__init__(reason)
        self.reason: Literal["timeout", "memory", "broken"] = reason


def run(
    module: str, request: dict[str, Any], data: bytes | Path, seconds: float = SECONDS
) -> tuple[dict[str, Any], list[bytes]]:
    """Let a child of `module` work on `data`; its JSON answer and the byte strings that came with it.

    Raises ChildFailed when there is none, StorageFull when there is no room for the temporary files, OSError when the file
    `data` names cannot be read.
    """
    with _SLOTS, contextlib.ExitStack() as opened:
        try:
            answer = opened.enter_context(tempfile.TemporaryFile())
            if isinstance(data, Path):
                source = opened.enter_context(open(data, "rb"))
            else:
                source = opened.enter_context(tempfile.TemporaryFile())
                source.write(data)
                source.seek(0)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise StorageFull("no room for temporary files") from error
            raise
        # The environment may hold secrets, and the child needs none of it.
        environment = {"PYTHONPATH": _PACKAGES, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
        command = [sys.executable, "-P", "-B", "-m", module, json.dumps({**request, "_seconds": seconds})]
        child = subprocess.Popen(  # noqa: S603  a module of ours, by a list of words
            command,
            stdin=source,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        try:
            status = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ChildFailed("timeout") from None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if status == -signal.SIGXCPU:
            raise ChildFailed("timeout")
        answer.seek(0)
        return _parsed(answer.readline(HEADER), answer)


def _parsed(line: bytes, rest: BinaryIO) -> tuple[dict[str, Any], list[bytes]]:
    try:
        header = json.loads(line)
        lengths = [int(length) for length in header.pop("_lengths")]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, OverflowError):
        raise ChildFailed("broken") from None
    if header.pop("_memory", False):
        raise ChildFailed("memory")
    parts = [rest.read(length) for length in lengths if 0 <= length <= ANSWER]
    if [len(part) for part in parts] != lengths:
        raise ChildFailed("broken")
    return header, parts


def serve(work: Work, *, prepare: Callable[[dict[str, Any]], None], threads: bool = False) -> None:
    """The child's side: answer the one request of this process.

    prepare: imports what the work needs, while files can still be opened. threads: whether the work may start threads.
    """
    request = json.loads(sys.argv[1])
    seconds = float(request.pop("_seconds"))
    leave_network()
    prepare(request)
    restrict(seconds, threads=threads)
    try:
        header, parts = work(request, sys.stdin.buffer)
    except MemoryError:
        header, parts = {"_memory": True}, ()
    line = json.dumps({**header, "_lengths": [len(part) for part in parts]}).encode() + b"\n"
    for part in (line, *parts):
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()


def leave_network() -> None:
    """Move this process to an empty network of its own, where the system allows that; call it before any thread starts."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    # A user namespace lets an ordinary user do it; where these are forbidden, root still can.
    if libc.unshare(_NEW_USER | _NEW_NET) != 0:
        libc.unshare(_NEW_NET)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def restrict(seconds: float, *, threads: bool) -> None:
    """Limit this process for good: memory, processor time, output, core dumps, and no new file, socket, process or thread."""
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: ANSWER + HEADER,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 3,  # standard input, output and error, which are open already
    }
    if not threads:
        limits[resource.RLIMIT_NPROC] = 0
    for limit, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(limit, (value, value))
    whole = max(1, int(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole + 1))
