"""A finished film as an animated picture, for places that show no films: made from the stored film when it is asked for.

It is smaller and slower than the film where that is large, so that making it takes seconds and little memory. A child process
makes it, one at a time, since the server itself loads no decoder. What was made stays for an hour, and goes with the film.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio

from tubelet.serve.errors import ApiError, not_found
from tubelet.serve.logs import log_failure
from tubelet.serve.records import Asset, Job, StorageFull

if TYPE_CHECKING:
    from tubelet.serve.service import Service

Animated = Literal["gif", "webp"]
MEDIA: dict[str, str] = {"gif": "image/gif", "webp": "image/webp"}
SIDE, FRAMES, RATE = 480, 120, 12.0
"""Pixels of the long side, frames, and frames a second, at most."""
PATIENCE = 120.0
"""Seconds that it may take."""
WAITING = 8
"""Requests that wait for others' pictures, at most."""
KEPT = 3600.0
"""Seconds that it is kept."""
FULL = 28
"""Exit code of a child that found no room."""
_PACKAGES = str(Path(__file__).resolve().parents[2])


async def animated(room: Service, job: Job, film: Asset, kind: Animated) -> Path:
    """The file of a job's film as an animated picture, made now unless it is there.

    Raises ApiError 503 when too many wait or it cannot be made, StorageFull when there is no room.
    """
    path = room.config.data / "variants" / f"{job.id}.{kind}"
    if not path.is_file():
        if room.animators.statistics().tasks_waiting >= WAITING:
            said = "The server makes other animated pictures; try again soon, or take the film itself."
            raise ApiError(503, said, code="busy", retry_after=10)
        async with room.animators:
            if not path.is_file():
                await _made(room, job, film, path)
    return path


async def _made(room: Service, job: Job, film: Asset, path: Path) -> None:
    if not await room.ask(room.store.roomy):
        raise StorageFull
    path.parent.mkdir(mode=0o700, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    brought = part.with_suffix("")  # a folder of this picture's own
    # By standard input: a prompt is nothing for the list of processes.
    wish = {"out": str(part), "facts": _facts(job), "secrets": str(room.config.data / "provenance")}
    wish |= {name: str(file) for name in ("certificate", "certificate_key") if (file := getattr(room.config, name))}
    # The environment may hold secrets, and the child needs none of it.
    environment = {"PYTHONPATH": _PACKAGES, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"}
    command, nothing = [sys.executable, "-P", "-m", __name__], subprocess.DEVNULL
    try:
        source = await room.ask(room.store.fetch, film.id, brought)
        if source is None:
            raise not_found("file")
        wish["film"] = str(source)
        code = -1
        with anyio.move_on_after(PATIENCE):
            done = await anyio.run_process(
                command, input=json.dumps(wish).encode(), check=False, stdout=nothing, stderr=nothing, env=environment
            )
            code = done.returncode
        if code == FULL:
            raise StorageFull
        if code != 0:
            log_failure("animated", ChildProcessError(code), code=str(code))
            said = "The film could not be made into such a picture; take the film itself."
            raise ApiError(503, said, code="variant_failed", headers={"x-should-retry": "false"})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        shutil.rmtree(brought, ignore_errors=True)
    if await room.read(room.jobs.get, job.id, None) is None:  # deleted meanwhile, with what there was of it then
        forget(room.config.data, job.id)


def forget(data: Path, id: str) -> None:
    """Remove the animated pictures of a job's film."""
    for kind in MEDIA:
        with contextlib.suppress(OSError):
            (data / "variants" / f"{id}.{kind}").unlink()


def tidy(data: Path) -> None:
    """Remove the animated pictures whose hour is over, and what was left of unfinished ones."""
    for entry in list(os.scandir(data / "variants")) if (data / "variants").is_dir() else ():
        with contextlib.suppress(OSError):
            if entry.stat().st_mtime < time.time() - KEPT:
                shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def _facts(job: Job) -> dict[str, Any]:
    """What its credentials say of it: the same as the film's."""
    request, result = job.request, job.result
    facts = {name: result.get(name) for name in ("system", "digest", "seed")}
    facts |= {"video": job.id, "task": request.get("task"), "prompt": str(request.get("prompt") or "")}
    return facts | {"steps": (result.get("settings") or {}).get("steps"), "created_at": job.completed_at}


# The child.


def make(film: Path, out: Path) -> None:
    """Write a film as an animated picture; the suffix of `out` says of which kind. Raises UserError."""
    import numpy as np

    from tubelet.media.decode import probe, stream
    from tubelet.media.encode import read_metadata, save

    about = probe(film)
    scale = min(1.0, SIDE / max(about.height, about.width))
    size = None if scale == 1 else (max(1, round(about.height * scale)), max(1, round(about.width * scale)))
    rate = min(about.fps, RATE, FRAMES / about.seconds)
    frames = stream(film, fps=None if rate == about.fps else rate, size=size, fit="stretch")
    with contextlib.closing(frames):
        save(np.stack(list(itertools.islice(frames, FRAMES))), out, rate, read_metadata(film))


def _main() -> int:
    from tubelet.serve.provenance import Ingredient, Signer

    wish = json.load(sys.stdin)
    film, out = Path(wish["film"]), Path(wish["out"])
    make(film, out)
    if b"jumdc2pa" in film.read_bytes():  # the film is signed, so this is, too
        chain, key = (Path(wish[name]) if name in wish else None for name in ("certificate", "certificate_key"))
        try:
            Signer.open(Path(wish["secrets"]), chain, key).sign(out, MEDIA[out.suffix[1:]], wish["facts"], [Ingredient(film)])
        except StorageFull:
            return FULL
    return 0


if __name__ == "__main__":
    sys.exit(_main())
