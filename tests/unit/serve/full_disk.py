"""A job store and the files of its films on a small disk that is filled again and again, with a little more room each time.

Run as a program it does so in the folder that is named, and prints what was refused. `on_a_small_disk` gives it such a disk.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tubelet.serve.jobs import Jobs
from tubelet.serve.records import StorageFull
from tubelet.serve.store import Store

PAGES = 41
"""Room that is left, at most, in pages of 4 KiB: each kind of write is once the one to fail."""


class NoSmallDisk(Exception):  # noqa: N818  a reason to skip, not a defect
    """This machine gives none, and why."""


def on_a_small_disk(folder: Path, turns: int = 1) -> dict[str, int]:
    """How often each step was refused, in `turns` rounds on 4 MiB in memory.

    Raises NoSmallDisk, or AssertionError when something was lost, torn or written in spite of a refusal, or did not recover.
    """
    if shutil.which("unshare") is None:
        raise NoSmallDisk("a small disk needs unshare")
    disk = folder / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size=4m tubelet '{disk}' || exit 77; exec '{sys.executable}' '{__file__}' '{disk}' {turns}"
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, text=True, check=False)
    if ran.returncode == 77 or "unshare" in ran.stderr:
        raise NoSmallDisk(f"this machine gives no small disk: {ran.stderr.strip()[-100:]}")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def one_turn(folder: Path, jobs: Jobs, store: Store, refused: Counter[str]) -> None:
    """Fill the disk but for 1 to `PAGES` pages, work until it refuses, look at what there is, make room and go on."""
    ballast = folder / "ballast"
    for pages in range(1, PAGES + 1):
        made: set[str] = set()
        done: set[str] = set()
        _fill(ballast, pages)
        step, claim = "", None
        try:
            for number in range(40):
                step = "create"
                made.add(jobs.create({"prompt": "x" * 3000})[0].id)
                step = "claim"
                claim = jobs.claim("one")
                assert claim is not None
                step = "heartbeat"
                jobs.heartbeat(claim, progress=50)
                step = "put"
                frames = 4000 if pages % 2 else 500  # large films do not fit, small ones leave too little for their rows
                film = store.put(f"{pages:4} {number:3}".encode() * frames, "video", "video/mp4")
                step = "finish"
                assert jobs.finish(claim, [film], {"text": "y" * 3000})
                done.add(claim.job.id)
        except StorageFull:
            refused[step] += 1
        found = jobs.page(None, limit=1000).jobs
        assert {job.id for job in found} == made, "acknowledged and nothing else"
        assert {job.id for job in found if job.state == "completed"} == done
        assert {document["job"] for document in jobs.all("outbox", None)} == done
        assert all(store.verify(film) for job in found for film in job.outputs)
        assert not list(store.folder.glob(".*")), "something torn was left"
        ballast.unlink()
        if claim is not None:
            jobs.release(claim)  # as its worker would
        made.add(jobs.create({})[0].id)
        while claim := jobs.claim("two"):
            film = store.put(claim.job.id.encode(), "video", "video/mp4")
            assert jobs.finish(claim, [film], {})
        assert {job.state for job in jobs.page(None, limit=1000).jobs} == {"completed"}
        for job in jobs.page(None, limit=1000).jobs:
            jobs.delete(job.id, None)
            store.remove(job.outputs[0].id)
        for document in jobs.all("outbox", None):
            jobs.drop("outbox", document["id"], None)


def _fill(path: Path, pages: int) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - 4096 * pages))


def main(folder: Path, turns: int) -> None:
    """All of it, and the counts as JSON."""
    jobs, store = Jobs.open(f"sqlite:///{folder}/tubelet.db"), Store(folder / "assets", reserve=0)
    jobs.put("webhook_endpoint", "e", "local", {"id": "e"})
    refused: Counter[str] = Counter()
    for _ in range(turns):
        one_turn(folder, jobs, store, refused)
    jobs.close()
    whole = sqlite3.connect(folder / "tubelet.db").execute("PRAGMA integrity_check").fetchone()
    assert whole == ("ok",)
    sys.stdout.write(json.dumps(refused))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
