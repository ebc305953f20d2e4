"""What a worker noted reaches another machine, in whole files, and goes when its job is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from objects_rig import Faulty, in_folder, in_memory, names
from worker_rig import PATIENCE, Gate, Place, hurry, placed, running, until, with_network

from tubelet.generate.system import System
from tubelet.serve import render
from tubelet.serve import worker as room
from tubelet.serve.jobs import Jobs
from tubelet.serve.journals import Copies, copies_of, tidy
from tubelet.serve.objects import Objects, ObjectStore
from tubelet.serve.records import StorageFull
from tubelet.serve.store import Store


@pytest.fixture(params=["memory", "folder"])
def parts(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Objects, Faulty]:
    return in_memory() if request.param == "memory" else in_folder(tmp_path / "bucket")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place whose files are in an object store."""
    hurry(monkeypatch)
    objects, faulty = in_memory()
    with placed(tmp_path, ObjectStore(objects, tmp_path)) as place:
        place.faulty = faulty  # type: ignore[attr-defined]
        yield place


def note(folder: Path, *numbers: int) -> None:
    """Answers of a worker, and what only its machine needs."""
    for path in (folder / "answers", folder / "inputs", folder / "out-1"):
        path.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / "answers" / f"{number:06d}.safetensors").write_bytes(b"answer %d" % number)
    (folder / "answers" / "000099.17.part").write_bytes(b"half an answer")
    (folder / "words.json").write_text('{"a ball": ["A red ball.", "rules"]}')
    (folder / "inputs" / "abc").write_bytes(b"somebody's picture")
    (folder / "out-1" / "video.mp4").write_bytes(b"a film")


def kept(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_machine_gets_what_was_noted(parts: tuple[Objects, Faulty], tmp_path: Path) -> None:
    objects, _ = parts
    near, far = tmp_path / "near" / "video_1", tmp_path / "far" / "video_1"
    note(near, 0, 1, 2)
    copy = Copies(objects).of("video_1", near)
    assert [copy.send(), copy.send()] == [4, 0]
    there = [f"video_1/answers/{n:06d}.safetensors" for n in range(3)] + ["video_1/words.json"]
    assert names(objects, "journals/") == there, "neither what is half-written nor what a client sent"
    note(near, 1, 3)
    (near / "answers" / "000002.safetensors").unlink()  # dropped
    assert copy.send() == 3, "two answers, and the words, which were written anew"
    fetched = Copies(objects).of("video_1", far)
    assert [fetched.fetch(), fetched.fetch(), fetched.send()] == [5, 0, 0]
    expected = kept(near) | {"answers/000002.safetensors": b"answer 2"}
    assert kept(far) == {name: data for name, data in expected.items() if f"video_1/{name}" in names(objects, "journals/")}
    assert (far / "words.json").stat().st_mode & 0o077 == 0
    (far / "answers" / "000004.safetensors").write_bytes(b"answer 4")
    assert fetched.send() == 1
    if objects._root is not None:
        (objects._root / "journals" / "video_1" / "words.json#1").write_text("half of somebody's words")
    fetched.forget()
    assert names(objects) == objects.folders("journals/") == []
    assert Copies(objects).of("video_2", far).fetch() == 0


def test_what_fails_is_sent_the_next_time(parts: tuple[Objects, Faulty], tmp_path: Path) -> None:
    objects, faulty = parts
    note(tmp_path / "near", 0, 1)
    copy = Copies(objects).of("video_1", tmp_path / "near")
    faulty.away()
    with pytest.raises(StorageFull):
        copy.send()
    with pytest.raises(StorageFull):
        copy.fetch()
    faulty.back()
    assert copy.send() == 3


def test_names_that_no_worker_writes_are_not_brought_here(parts: tuple[Objects, Faulty], tmp_path: Path) -> None:
    objects, _ = parts
    for name in ("evil.sh", "answers/x.py", "inputs/abc", "answers/deep/000000.safetensors"):
        objects.put(f"journals/video_1/{name}", b"x")
    assert Copies(objects).of("video_1", tmp_path / "far").fetch() == 0
    assert not (tmp_path / "far").exists()


def test_copies_of_jobs_that_are_over_are_tidied(parts: tuple[Objects, Faulty], tmp_path: Path) -> None:
    objects, _ = parts
    jobs = Jobs.open(f"sqlite:///{tmp_path / 'tubelet.db'}")
    try:
        waiting, over = (jobs.create({"task": "create"})[0].id for _ in range(2))
        jobs.cancel(over, None)
        for id in (waiting, over, "video_gone"):
            objects.put(f"journals/{id}/answers/000000.safetensors", b"x")
            (tmp_path / "journals" / id).mkdir(parents=True)
        store = ObjectStore(objects, tmp_path)
        assert copies_of(store).tidy(jobs) == tidy(tmp_path / "journals", jobs) == 2
        assert objects.folders("journals/") == [path.name for path in (tmp_path / "journals").iterdir()] == [waiting]
    finally:
        jobs.close()


def test_without_an_object_store_there_are_no_copies(tmp_path: Path) -> None:
    copies = copies_of(Store(tmp_path / "assets"))
    copy = copies.of("video_1", tmp_path)
    note(tmp_path, 0)
    assert copy.send() == copy.fetch() == copies.tidy(None) == 0  # type: ignore[arg-type]
    copy.forget()


def test_a_film_is_made_and_only_its_files_stay(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "PREVIEW_PAUSE", 0.0)
    monkeypatch.setattr(render, "PREVIEW_SHARE", 100.0)
    job, gate = place.ask(steps=2), Gate(system.denoiser, before=1)
    with running(place.worker(with_network(system, gate)).turn):
        assert gate.reached.wait(PATIENCE)
        until(lambda: place.job(job).outputs)
        until(lambda: len(names(place.store.objects, f"journals/{job.id}/answers/")) == 1)
        assert place.store.read(place.job(job).outputs[0].id).startswith(b"\xff\xd8"), "a preview that others can see"
        gate.open.set()
    done = place.job(job)
    assert done.state == "completed"
    assert all(place.store.verify(asset) for asset in done.outputs)
    assert names(place.store.objects) == sorted(f"assets/{asset.id}" for asset in done.outputs)
    assert place.journals == []
    assert not (place.folder / "assets").exists()


def test_another_machine_goes_on_where_one_was(place: Place, system: System, tmp_path: Path) -> None:
    source = place.ask(steps=2)
    place.worker(system).turn()
    (clip, *_) = place.job(source).outputs
    inputs = [{"role": "video", "asset": clip.id, "media": clip.media}]
    gate = Gate(system.denoiser, before=3)
    job = place.jobs.create({**source.request, "task": "extend", "steps": 6, "frames": 4, "inputs": inputs})[0]
    first = place.worker(with_network(system, gate), tmp_path / "near")
    with running(first.turn):
        assert gate.reached.wait(PATIENCE)
        until(lambda: len(names(place.store.objects, f"journals/{job.id}/answers/")) == 3)
        later = place.later()
        assert later.sweep() == 1, "the first machine is taken for dead"
        second = Gate(system.denoiser, before=99)
        far = place.worker(with_network(system, second), tmp_path / "far")
        assert far.turn()
        later.close()
        gate.open.set()
    done = place.job(job)
    assert (done.state, done.attempt) == ("completed", 2)
    again = place.jobs.create({**job.request})[0]
    counted = Gate(system.denoiser, before=99)
    assert place.worker(with_network(system, counted), tmp_path / "third").turn()
    assert second.answers == counted.answers - 3, "the rest came from the first machine"
    assert [asset.id for asset in done.outputs] == [asset.id for asset in place.job(again).outputs], "the same bytes"
    assert names(place.store.objects, "journals/") == []
    for machine in ("near", "far", "third"):
        assert list((tmp_path / machine / "journals").iterdir()) == []


def test_a_stop_gives_all_answers_away_before_the_job(place: Place, system: System, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(room, "BEAT", 3600.0)  # neither heart nor courier is fast enough
    gate, job = Gate(system.denoiser, before=3), place.ask(steps=6)
    worker = place.worker(with_network(system, gate), tmp_path / "near")
    with running(worker.turn):
        assert gate.reached.wait(PATIENCE)
        assert names(place.store.objects, "journals/") == []
        worker.stopping.set()
        gate.open.set()
    assert place.job(job).state == "queued"
    assert len(names(place.store.objects, f"journals/{job.id}/answers/")) == 4


def test_a_store_that_hangs_holds_up_no_heartbeat(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, job, hanging, over = Gate(system.denoiser, before=3), place.ask(steps=6), threading.Event(), threading.Event()

    def fault(name: str, given: Any) -> None:
        if name == "put" and not over.is_set():
            hanging.set()
            assert over.wait(PATIENCE)

    place.faulty.fault = fault  # type: ignore[attr-defined]
    beats: list[int] = []
    heartbeat = place.jobs.heartbeat
    monkeypatch.setattr(place.jobs, "heartbeat", lambda *given, **more: (beats.append(1), heartbeat(*given, **more))[1])
    with running(place.worker(with_network(system, gate)).turn):
        assert hanging.wait(PATIENCE)
        before = len(beats)
        until(lambda: len(beats) > before + 5)
        over.set()
        gate.open.set()
    assert place.job(job).state == "completed"


def test_a_store_that_is_away_is_waited_for(place: Place, system: System) -> None:
    """From the middle of a film until its end is due; then all is as if nothing had been."""
    gate, job = Gate(system.denoiser, before=3), place.ask(steps=6)
    with running(place.worker(with_network(system, gate)).turn):
        assert gate.reached.wait(PATIENCE)
        place.faulty.away()  # type: ignore[attr-defined]
        gate.open.set()
        until(lambda: place.job(job).progress >= 92)
        assert place.job(job).state == "in_progress"
        place.faulty.back()  # type: ignore[attr-defined]
    done = place.job(job)
    assert done.state == "completed"
    assert all(place.store.verify(asset) for asset in done.outputs)


def test_a_store_that_does_not_answer_gets_no_work(place: Place, system: System) -> None:
    place.faulty.away()  # type: ignore[attr-defined]
    worker, job = place.worker(system), place.ask(steps=2)
    with running(worker.run):
        until(lambda: place.jobs.workers())
        time.sleep(0.2)
        assert place.job(job).attempt == 0
        place.faulty.back()  # type: ignore[attr-defined]
        place.store.objects._due = 0.0
        until(lambda: place.job(job).state == "completed")
        worker.stopping.set()
