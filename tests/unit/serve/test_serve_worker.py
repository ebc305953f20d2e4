"""A worker takes jobs to their end: films, cancels, stops, lost leases, wrong wishes, full disks, hangs; in this process."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from render_rig import WORDS, ask
from torch import nn
from worker_rig import PATIENCE, Gate, Place, running, until, with_network

from tubelet.core.errors import UserError
from tubelet.generate.system import System
from tubelet.media.decode import decode_uint8, probe
from tubelet.serve import worker as room
from tubelet.serve.provenance import Signer
from tubelet.serve.records import StorageFull
from tubelet.serve.render import OutOfMemory, Rendered


def test_a_job_becomes_a_film(place: Place, system: System) -> None:
    job = place.ask(size=[48, 96], seconds=1)
    assert place.worker(system, ttl=100.0).turn()
    done = place.job(job)
    assert (done.state, done.progress, done.error) == ("completed", 100, None)
    assert done.expires_at is not None
    assert 90 < done.expires_at - time.time() <= 100
    assert [asset.role for asset in done.outputs] == ["video", "thumbnail", "spritesheet"]
    assert all(place.store.verify(asset) for asset in done.outputs)
    path = place.store.path(done.outputs[0].id)
    assert path is not None
    assert decode_uint8(path)[0].shape == (8, 48, 96, 3)
    assert {"text", "denoise", "decode", "encode", "store"} == set(done.result["timings"])
    assert all(seconds >= 0 for seconds in done.result["timings"].values())
    assert (done.result["system"], done.result["digest"], done.result["frames"]) == ("tiny", system.digest, 8)
    assert place.journals == []
    assert sorted(p.name for p in place.store.folder.iterdir()) == sorted(asset.id for asset in done.outputs)
    assert not place.worker(system).turn(), "the queue is empty"


def test_pictures_are_jobs_too(place: Place, system: System) -> None:
    job = place.jobs.create({**ask("image", n=2, format="webp"), "system": "tiny"}, kind="image")[0]
    place.worker(system).turn()
    done = place.job(job)
    assert [(asset.role, asset.media) for asset in done.outputs] == [("image", "image/webp")] * 2


def test_a_film_is_made_from_another(place: Place, system: System) -> None:
    first = place.ask(seconds=0.5)
    worker = place.worker(system)
    worker.turn()
    film = place.job(first).outputs[0]
    request = ask("extend", seconds=0.5) | {
        "inputs": [{"role": "video", "asset": film.id, "media": film.media}],
        "system": "tiny",
    }
    job = place.jobs.create(request, parent=first.id)[0]
    worker.turn()
    done = place.job(job)
    assert done.state == "completed"
    path = place.store.path(done.outputs[0].id)
    assert path is not None
    assert probe(path).frames == 8


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"inputs": {"reference": "missing.png"}}, "cannot be read any more"),
        ({"size": [16, 900]}, "too long a shape"),
    ],
)
def test_a_wrong_wish_fails_with_its_sentence(place: Place, system: System, more: dict[str, Any], says: str) -> None:
    job = place.ask(**more)
    place.worker(system).turn()
    failed = place.job(job)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["code"] == "invalid_request"
    assert says in failed.error["message"]
    assert place.journals == []


def test_an_unforeseen_error_says_nothing_to_the_client_and_no_words_to_the_log(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(nn.Module):
        config = system.denoiser.config

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, *question: Any) -> torch.Tensor:
            raise LookupError(f"no token for {WORDS}")

    caplog.set_level(logging.INFO, "tubelet.serve")
    job, after = place.ask(), place.ask(seed=5)
    place.worker(with_network(system, Broken())).turn()
    failed = place.job(job)
    assert failed.error == {"code": "render_failed", "message": room.FAILED}
    lines = [json.loads(record.message) for record in caplog.records]
    error = next(line for line in lines if line["event"] == "error")
    assert (error["kind"], error["said"], error["job"]) == ("LookupError", "", job.id)
    assert any("in forward" in line for line in error["stack"])
    assert WORDS not in caplog.text
    place.worker(system).turn()
    assert place.job(after).state == "completed", "the queue goes on"


def test_a_cancelled_job_stops_within_a_step(place: Place, system: System) -> None:
    gate = Gate(system.denoiser, before=3)
    job = place.ask(steps=50)
    worker = place.worker(with_network(system, gate))
    with running(worker.turn):
        assert gate.reached.wait(PATIENCE)
        place.jobs.cancel(job.id, None)
        until(lambda: place.jobs.events(job=job.id)[-1][2]["cancelled"])
        seen = heard(place, worker.name)
        until(lambda: heard(place, worker.name) > seen + 0.05)  # a heartbeat after the cancel
        gate.open.set()
    failed = place.job(job)
    assert failed.error == {"code": "cancelled", "message": "The job was cancelled."}
    assert gate.answers == 4, "the step that ran was the last"
    assert place.journals == []


def test_a_stop_gives_the_job_back_with_its_journal_and_another_goes_on(place: Place, system: System) -> None:
    whole = place.ask(steps=6)
    place.worker(system).turn()
    gate = Gate(system.denoiser, before=3)
    job = place.ask(steps=6)
    worker = place.worker(with_network(system, gate))
    with running(worker.run):
        assert gate.reached.wait(PATIENCE)
        worker.stopping.set()
        gate.open.set()
    back = place.job(job)
    assert (back.state, back.error) == ("queued", None)
    assert place.journals == [job.id]
    assert len(list((place.folder / "journals" / job.id / "answers").iterdir())) == 4
    second = Gate(system.denoiser, before=99)
    place.worker(with_network(system, second)).turn()
    assert second.answers == 2, "the rest came from the journal"
    done = place.job(job)
    assert (done.state, done.attempt) == ("completed", 2)
    assert [asset.id for asset in done.outputs] == [asset.id for asset in place.job(whole).outputs], "the same bytes"
    assert place.journals == []


def test_a_worker_without_its_parent_stops(place: Place, system: System) -> None:
    gate = Gate(system.denoiser, before=1)
    job = place.ask(steps=6)
    worker = place.worker(with_network(system, gate), parent=os.getppid())
    assert not worker.orphaned()
    with running(worker.run):
        assert gate.reached.wait(PATIENCE)
        worker.config = replace(worker.config, parent=1 if os.getppid() != 1 else 2)
        until(worker.stopping.is_set)
        gate.open.set()
    assert place.job(job).state == "queued"
    idle = place.worker(system, parent=1 if os.getppid() != 1 else 2)
    assert idle.run() == 0


def test_a_worker_leaves_the_jobs_of_other_systems_to_others(place: Place, system: System) -> None:
    other = place.jobs.create({**place.ask().request, "system": "other"})[0]
    worker = place.worker(system)
    assert worker.turn()
    assert not worker.turn()
    assert place.job(other).state == "queued"
    assert place.worker(replace(system, config=replace(system.config, name="other"))).turn()
    assert place.job(other).state == "completed"


def test_a_worker_that_lost_its_job_leaves_it_alone(place: Place, system: System) -> None:
    gate = Gate(system.denoiser, before=2)
    job = place.ask(steps=6)
    with running(place.worker(with_network(system, gate), name="slow").turn):
        assert gate.reached.wait(PATIENCE)
        assert place.later().sweep() == 1
        other = place.jobs.claim("other")
        assert other is not None
        seen = heard(place, "slow")
        until(lambda: heard(place, "slow") > seen + 0.05)  # a heartbeat after the loss
        gate.open.set()
    assert gate.answers == 3, "the step that ran was the last"
    now = place.job(job)
    assert (now.state, now.attempt) == ("in_progress", 2)
    assert place.journals == [job.id], "the other worker's journal"
    assert place.jobs.finish(other, [], {})


def heard(place: Place, worker: str) -> float:
    """When a worker was heard of last."""
    return next(facts["seen"] for facts in place.jobs.workers() if facts["id"] == worker)


def test_a_deleted_job_leaves_nothing(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BEAT", 60.0)  # what a row names, its deleter removes
    gate = Gate(system.denoiser, before=2)
    job = place.ask(steps=6)
    with running(place.worker(with_network(system, gate)).turn):
        assert gate.reached.wait(PATIENCE)
        place.jobs.delete(job.id, None)
        gate.open.set()
    assert place.jobs.get(job.id, None) is None
    assert place.journals == []
    assert list(place.store.folder.iterdir()) == []


def test_what_was_made_of_a_job_deleted_at_the_last_moment_is_removed(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "BEAT", 60.0)
    job, twin = place.ask(seed=1), place.ask(seed=2)
    finish = place.jobs.finish

    def deleted(*wish: Any) -> bool:
        place.jobs.delete(job.id, None)
        return finish(*wish)

    monkeypatch.setattr(place.jobs, "finish", deleted)
    worker = place.worker(system)
    worker.turn()
    assert list(place.store.folder.iterdir()) == []
    assert place.journals == []
    worker.turn()
    assert place.job(twin).state == "completed"


def test_files_that_vanish_before_the_job_names_them_are_put_again(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin, job = place.ask(seed=1), place.ask(seed=1)
    worker = place.worker(system)
    worker.turn()
    outputs = place.job(twin).outputs
    put, finish, tries = place.store.put, place.jobs.finish, []

    def finished(*wish: Any) -> bool:
        for asset in outputs[:2]:  # as when the twin is deleted just now
            place.store.remove(asset.id)
        monkeypatch.setattr(place.store, "put", poor)
        return finish(*wish)

    def poor(*wish: Any) -> Any:
        tries.append(wish)
        if len(tries) == 1:
            raise StorageFull
        return put(*wish)

    monkeypatch.setattr(place.jobs, "finish", finished)
    worker.turn()
    done = place.job(job)
    assert (done.state, done.outputs) == ("completed", outputs)
    assert all(place.store.verify(asset) for asset in outputs)
    assert len(tries) == 3, "one without room, and none for the file that was still there"
    assert place.journals == []


def test_a_file_that_cannot_be_put_again_does_not_unfinish_the_job(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tubelet.serve")
    job, finish = place.ask(), place.jobs.finish

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def finished(claim: Any, outputs: list[Any], *wish: Any) -> bool:
        place.store.remove(outputs[0].id)
        monkeypatch.setattr(place.store, "put", broken)
        return finish(claim, outputs, *wish)

    monkeypatch.setattr(place.jobs, "finish", finished)
    place.worker(system).turn()
    assert place.job(job).state == "completed"
    assert place.journals == []
    said = [json.loads(record.message) for record in caplog.records]
    assert [line["event"] for line in said][-2:] == ["error", "completed"]


def test_progress_is_told_and_never_complete_before_the_end(place: Place, system: System) -> None:
    gate = Gate(system.denoiser, before=5)
    job = place.ask(steps=10)
    with running(place.worker(with_network(system, gate)).turn):
        assert gate.reached.wait(PATIENCE)
        until(lambda: place.job(job).progress == 45)
        gate.open.set()
    told = [facts["progress"] for _, _, facts in place.jobs.events(job=job.id)]
    assert told == sorted(told)
    assert told[-1] == 100
    assert all(progress < 95 for progress in told[:-1])


def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preview at each step."""
    from tubelet.serve import render

    monkeypatch.setattr(render, "PREVIEW_PAUSE", 0.0)
    monkeypatch.setattr(render, "PREVIEW_SHARE", float("inf"))


def test_previews_are_shown_while_it_runs_and_gone_afterwards(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    often(monkeypatch)
    gates = [Gate(system.denoiser, before=n) for n in (2, 4)]
    gates[1].network = gates[0]
    job = place.ask(steps=6)
    shown = []
    with running(place.worker(with_network(system, gates[1])).turn):
        for gate in gates:
            assert gate.reached.wait(PATIENCE)
            before = shown[-1:]
            until(lambda before=before: place.job(job).outputs and list(place.job(job).outputs) != before)
            (preview,) = place.job(job).outputs
            assert (preview.role, preview.media) == ("preview", "image/jpeg")
            assert place.store.verify(preview)
            shown.append(preview)
            gate.open.set()
    assert shown[0].id != shown[1].id
    done = place.job(job)
    assert sorted(p.name for p in place.store.folder.iterdir()) == sorted(asset.id for asset in done.outputs)


def test_a_preview_that_is_put_while_its_job_is_deleted_goes_with_it(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job goes when the preview lies in the store already, and before the heartbeat names it."""
    often(monkeypatch)
    job, put = place.ask(steps=6), place.store.put
    put_late: list[str] = []

    def slowly(data: Any, role: str, media: str) -> Any:
        asset = put(data, role, media)
        if role == "preview" and not put_late:
            put_late.append(asset.id)
            assert place.jobs.delete(job.id, None) is not None
        return asset

    monkeypatch.setattr(place.store, "put", slowly)
    gate = Gate(system.denoiser, before=3)
    with running(place.worker(with_network(system, gate)).turn):
        assert gate.reached.wait(PATIENCE)
        until(lambda: put_late and place.store.path(put_late[0]) is None)
        gate.open.set()
    assert list(place.store.folder.iterdir()) == []


def test_a_preview_that_another_names_stays(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job was given to another worker, who shows the very same."""
    often(monkeypatch)
    job, put = place.ask(steps=6), place.store.put
    shown: list[str] = []

    def slowly(data: Any, role: str, media: str) -> Any:
        asset = put(data, role, media)
        if role == "preview" and not shown:
            later = place.later()
            claim = later.claim("another")
            assert claim is not None
            later.heartbeat(claim, preview=asset)
            later.close()
            shown.append(asset.id)
        return asset

    monkeypatch.setattr(place.store, "put", slowly)
    gate = Gate(system.denoiser, before=3)
    worker = place.worker(with_network(system, gate))
    with running(worker.turn):
        assert gate.reached.wait(PATIENCE)
        until(lambda: shown)
        gate.open.set()
    assert place.job(job).state == "in_progress"
    assert place.store.path(shown[0]) is not None


def test_journals_that_nobody_needs_are_tidied_without_a_server(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that has workers only: what a process left that died there, and what ended elsewhere meanwhile."""
    monkeypatch.setattr(room, "TIDY", 0.05)
    place.jobs.pause(True)
    waiting = place.ask()
    for name in ("video_of_nobody", waiting.id):
        (place.folder / "journals" / name).mkdir(parents=True)
    worker = place.worker(system)
    with running(worker.run):
        until(lambda: place.journals == [waiting.id])
        place.jobs.cancel(waiting.id, None)
        until(lambda: place.journals == [])
        worker.stopping.set()


def test_a_full_disk_heals(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tubelet.serve")
    job, full = place.ask(), threading.Event()
    full.set()
    write, put, finish, tries = Rendered.write, place.store.put, place.jobs.finish, []

    def refusing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*wish: Any, **more: Any) -> Any:
            tries.append(name)
            if tries.count(name) <= 2:
                raise StorageFull
            return call(*wish, **more)

        return refuse

    monkeypatch.setattr(Rendered, "write", refusing("write", write))
    monkeypatch.setattr(place.store, "put", refusing("put", put))
    monkeypatch.setattr(place.jobs, "finish", refusing("finish", finish))
    gate = Gate(system.denoiser, before=99)
    place.worker(with_network(system, gate)).turn()
    done = place.job(job)
    assert (done.state, done.attempt) == ("completed", 1)
    assert gate.answers == 2, "the film was made once"
    assert all(place.store.verify(asset) for asset in done.outputs)
    assert [tries.count(name) for name in ("write", "put", "finish")] == [5, 2 + 3, 3]
    assert [json.loads(r.message)["event"] for r in caplog.records].count("no room") == 2, "said once for each"


def test_a_stop_while_the_disk_is_full_gives_the_job_back(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = place.ask()
    waits = threading.Event()

    def full(*_: Any) -> None:
        waits.set()
        raise StorageFull

    monkeypatch.setattr(Rendered, "write", full)
    worker = place.worker(system)
    with running(worker.run):
        assert waits.wait(PATIENCE)
        worker.stopping.set()
    assert place.job(job).state == "queued"
    assert place.journals == [job.id]


def test_without_room_no_job_is_begun(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    job = place.ask()
    free, looked = [0], [0]

    def room_left() -> int:
        looked[0] += 1
        return free[0]

    monkeypatch.setattr(place.store, "free", room_left)
    worker = place.worker(system)
    with running(worker.run):
        until(lambda: looked[0] > 3)
        assert place.job(job).state == "queued"
        free[0] = 1 << 40
        until(lambda: place.job(job).state == "completed")
        worker.stopping.set()


def test_too_little_memory_is_tried_once_more_and_then_said(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = place.ask(seed=1), place.ask(seed=2), place.ask(seed=3)
    ways: list[bool] = []
    render = room.render

    def poor(*wish: Any, lean: bool, **more: Any) -> Rendered:
        ways.append(lean)
        if len(ways) in (1, 3, 4):
            raise OutOfMemory
        return render(*wish, lean=lean, **more)

    monkeypatch.setattr(room, "render", poor)
    worker = place.worker(system)
    for _ in range(3):
        worker.turn()
    assert ways == [False, True, False, True, False]
    assert place.jobs.totals()["out_of_memory"] == 3
    assert place.job(first).state == "completed"
    assert place.job(second).error == {"code": "out_of_memory", "message": room.TOO_MUCH}
    assert place.job(third).state == "completed"


def test_too_little_memory_for_the_files_is_said_too(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Rendered, "write", poor)
    job = place.ask()
    place.worker(system).turn()
    assert (place.job(job).error or {})["code"] == "out_of_memory"
    assert place.jobs.totals()["out_of_memory"] == 1


def test_a_device_that_computes_no_more_ends_the_process_and_leaves_the_job_to_the_next(place: Place, system: System) -> None:
    class Gone(Gate):
        def forward(self, *question: Any, **more: Any) -> torch.Tensor:
            raise RuntimeError("CUDA error: device-side assert triggered")

    job = place.ask()
    assert place.worker(with_network(system, Gone(system.denoiser, 0))).run() == room.BROKEN
    assert place.job(job).state == "in_progress"
    assert place.later().sweep() == 1
    place.worker(system).turn()
    assert place.job(job).state == "completed"


def test_a_step_that_hangs_ends_the_process(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    gate = Gate(system.denoiser, before=1)

    def ended(code: int) -> None:
        codes.append(code)
        gate.open.set()

    monkeypatch.setattr(room.os, "_exit", ended)
    job = place.ask()
    place.worker(with_network(system, gate), patience=0.3).turn()
    assert codes[:1] == [room.HUNG]
    assert "in forward" in capfd.readouterr().err, "where it hung"
    assert place.job(job).state == "completed", "here only because the process lived on"


def test_a_failed_signature_is_not_the_clients_fault(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise UserError(f"{place.folder} could not be signed; renew the certificate")

    monkeypatch.setattr(room._Attempt, "_sign", refuse)
    job = place.ask()
    place.worker(system).turn()
    assert place.job(job).error == {"code": "render_failed", "message": room.FAILED}


def test_a_heartbeat_that_is_not_heard_does_not_end_the_heart(
    place: Place, system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat, broken = place.jobs.heartbeat, [StorageFull, LookupError]

    def deaf(*wish: Any, **more: Any) -> Any:
        if broken and more["counted"]:  # what is to be told stays to be told
            raise broken.pop()
        return heartbeat(*wish, **more)

    monkeypatch.setattr(place.jobs, "heartbeat", deaf)
    gate = Gate(system.denoiser, before=1)
    job = place.ask()
    with running(place.worker(with_network(system, gate)).turn):
        until(lambda: place.jobs.totals()["steps"] == 1)
        assert not broken
        gate.open.set()
    assert place.job(job).state == "completed"
    assert place.jobs.totals() == {"attempts": 1, "leases_lost": 0, "steps": 2, "signed": 0, "out_of_memory": 0}


def test_workers_say_what_they_are(place: Place, system: System) -> None:
    worker = place.worker(system, name="left")
    with running(worker.run):
        until(place.jobs.workers)
        worker.stopping.set()
    (said,) = place.jobs.workers()
    assert {name: said[name] for name in ("id", "system", "device", "pid")} == {
        "id": "left", "system": "tiny", "device": "cpu", "pid": os.getpid()
    }  # fmt: skip
    assert 10**8 < said["memory"] < 10**11, "bytes, of a process that has torch loaded"


def test_what_is_done_with_a_film_is_timed_and_what_is_signed_is_counted(place: Place, system: System) -> None:
    signer = Signer.open(place.folder / "secrets")
    job = place.ask()
    worker = place.worker(system)
    worker.signer = signer
    begin = time.perf_counter()
    worker.turn()
    timings = place.job(job).result["timings"]
    assert list(timings) == ["text", "denoise", "decode", "mark", "encode", "sign", "store"]
    assert all(seconds > 0 for seconds in timings.values())
    assert sum(timings.values()) < time.perf_counter() - begin, "no second is in two of them"
    assert place.jobs.totals()["signed"] == len(place.job(job).outputs) == 3


def test_counts_for_which_there_is_no_room_end_no_worker(place: Place, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise StorageFull

    monkeypatch.setattr(room, "BEAT", 60.0)
    monkeypatch.setattr(place.jobs, "count", full)
    job = place.ask()
    place.worker(system).turn()
    assert place.job(job).state == "completed"


def test_two_workers_share_the_work(place: Place, system: System) -> None:
    wanted = [place.ask(seed=seed) for seed in range(6)]
    gates = [Gate(system.denoiser, before=0) for _ in range(2)]
    workers = [place.worker(with_network(system, gate)) for gate in gates]
    with running(workers[0].run), running(workers[1].run):
        assert all(gate.reached.wait(PATIENCE) for gate in gates), "both have a job at once"
        for gate in gates:
            gate.open.set()
        until(lambda: all(place.job(job).state == "completed" for job in wanted))
        for worker in workers:
            worker.stopping.set()
    assert all(place.job(job).attempt == 1 for job in wanted)
    assert sum(gate.answers for gate in gates) == 6 * 2
    assert min(gate.answers for gate in gates) >= 2
