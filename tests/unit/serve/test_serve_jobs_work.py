"""Jobs that are handed out, told of, finished, lost and given back, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from typing import Any

import pytest
from jobs_rig import FILM, PREVIEW, Clock, at_once, claimed, code, new, now, types

from tubelet.serve import auth, jobs
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Claim, Signal


def test_jobs_are_handed_out_in_order_once_and_by_kind(store: Jobs, clock: Clock) -> None:
    assert store.claim("one") is None
    first, picture, second = new(store), new(store, kind="image"), new(store)
    claim = claimed(store)
    assert claim.job == now(store, first)
    assert (claim.worker, claim.attempt, claim.lease_until) == ("one", 1, clock.now + 15)
    assert (claim.job.state, claim.job.started_at, claim.job.position) == ("in_progress", clock.now, None)
    assert store.claim("two", kinds=("image",)).job.id == picture.id  # type: ignore[union-attr]
    assert store.claim("three", kinds=("image",)) is None
    assert claimed(store, "three").job.id == second.id
    assert store.claim("four") is None


def test_a_worker_gets_the_jobs_of_the_systems_that_it_has(store: Jobs, clock: Clock) -> None:
    large, any_system, small = (store.create({"prompt": "p", "system": system})[0] for system in ("large", None, "small"))
    assert store.claim("none", systems=("medium",)).job.id == any_system.id  # type: ignore[union-attr]
    assert store.claim("none", systems=("medium",)) is None
    claim = store.claim("one", systems=("small",))
    assert claim is not None
    assert claim.job.id == small.id, "others before it wait for their own worker"
    assert store.release(claim)
    clock.now += 1000  # the lease of the one for any system runs out, which needs no system
    assert store.claim("two", systems=("small",)).job.id == any_system.id  # type: ignore[union-attr]
    assert store.claim("two", systems=("small", "large")).job.id == large.id  # type: ignore[union-attr]
    assert store.claim("three").job.id == small.id  # type: ignore[union-attr]


def test_many_workers_never_share_a_job(store: Jobs, url: str, clock: Clock) -> None:
    made = {new(store).id for _ in range(24)}
    other = Jobs.open(url, clock=clock)

    def work(number: int) -> list[str]:
        got = []
        while claim := (store, other)[number % 2].claim(f"worker {number}"):
            got.append(claim.job.id)
        return got

    got = [id for one in at_once(6, work) for id in one]
    other.close()
    assert sorted(got) == sorted(made)


def test_of_a_key_no_more_run_than_may_and_those_behind_go_first(store: Jobs, url: str, clock: Clock) -> None:
    id, _ = auth.issue(store, "modest", running=2)
    own = [new(store, owner=id) for _ in range(4)]
    others = [new(store, owner="another") for _ in range(3)]
    first, second = claimed(store), claimed(store)
    assert [first.job.id, second.job.id] == [own[0].id, own[1].id]
    assert [claimed(store).job.id for _ in range(3)] == [job.id for job in others]
    assert store.claim("one") is None
    assert [job.position for job in (now(store, own[2]), now(store, own[3]))] == [1, 2], "they keep their places"
    assert store.finish(first, [FILM], {})
    assert claimed(store).job.id == own[2].id
    assert store.claim("one") is None
    clock.now += 1000
    assert store.claim("one") is not None, "leases that ran out take no room"
    assert auth.revoke(store, id)
    assert store.counts(id)["queued"] == 0, "what a revoked key has waiting is stopped"
    assert all(job.state == "completed" or job.cancelled for job in (now(store, one) for one in own))
    assert claimed(store).job.owner == "another"


def test_workers_that_claim_at_once_keep_to_the_limit_of_a_key(store: Jobs, url: str, clock: Clock) -> None:
    id, _ = auth.issue(store, "modest", running=3)
    for _ in range(12):
        new(store, owner=id)
    stores = [Jobs.open(url, clock=clock) for _ in range(8)]
    claims = at_once(8, lambda n: stores[n].claim(f"worker {n}"))
    assert sum(claim is not None for claim in claims) == 3
    for one in stores:
        one.close()


def test_a_paused_queue_hands_out_nothing_but_lets_running_jobs_end(store: Jobs) -> None:
    new(store), new(store)
    claim = claimed(store)
    assert not store.paused()
    store.pause(True)
    assert store.paused()
    assert store.claim("two") is None
    assert store.finish(claim, [], {})
    store.pause(False)
    assert store.claim("two") is not None


def test_heartbeats_carry_progress_that_only_rises(store: Jobs, clock: Clock) -> None:
    job = new(store)
    claim = claimed(store)
    seen = []
    for progress in (5, 30, 20, None, 30, 100):
        assert store.heartbeat(claim, progress=progress) == Signal(lost=False, cancelled=False)
        seen.append(now(store, job).progress)
    assert seen == [5, 30, 30, 30, 30, 99]
    assert types(store, job) == ["queued", "in_progress", "progress", "progress", "progress"]
    store.heartbeat(claim, preview=PREVIEW)
    assert now(store, job).outputs == (PREVIEW,)
    assert types(store, job)[-1] == "preview"
    for _ in range(5):  # alive for five leases, since each heartbeat moves the lease on
        clock.now += 14
        assert store.sweep() == 0
        store.heartbeat(claim)
    assert store.finish(claim, [FILM], {"seed": 1})


def test_finishing_publishes_outputs_and_result(store: Jobs, clock: Clock) -> None:
    job = new(store)
    claim = claimed(store)
    store.heartbeat(claim, preview=PREVIEW)
    clock.now += 3
    assert store.finish(claim, [FILM, PREVIEW], {"seed": 7, "rendered": [64, 112]}, expires_at=clock.now + 60)
    done = now(store, job)
    assert (done.state, done.progress, done.completed_at, done.expires_at) == ("completed", 100, clock.now, clock.now + 60)
    assert (done.outputs, done.result, done.error) == ((FILM, PREVIEW), {"seed": 7, "rendered": [64, 112]}, None)
    assert not store.finish(claim, [], {})
    assert not store.fail(claim, "late", "Too late.")
    assert now(store, job) == done


def test_failing_says_why_and_drops_the_preview(store: Jobs, clock: Clock) -> None:
    job = new(store)
    claim = claimed(store)
    store.heartbeat(claim, progress=40, preview=PREVIEW)
    assert store.fail(claim, "out_of_memory", "The film is too large.")
    failed = now(store, job)
    assert (failed.state, failed.progress, failed.completed_at, failed.outputs) == ("failed", 40, clock.now, ())
    assert failed.error == {"code": "out_of_memory", "message": "The film is too large."}
    assert not store.finish(claim, [FILM], {})


def test_a_stale_worker_can_change_nothing_50_times(store: Jobs, clock: Clock) -> None:
    for _ in range(50):
        job = new(store)
        stale = claimed(store, "stale")
        clock.now += 16
        fresh = claimed(store, "fresh")
        assert (fresh.job.id, fresh.attempt) == (job.id, 2)
        before = now(store, job), store.last_event()
        assert store.heartbeat(stale, progress=90, preview=PREVIEW) == Signal(lost=True, cancelled=False)
        assert not store.finish(stale, [PREVIEW], {"stale": True})
        assert not store.fail(stale, "stale", "Stale.")
        assert not store.release(stale)
        assert (now(store, job), store.last_event()) == before
        assert store.finish(fresh, [FILM], {})
        assert now(store, job).outputs == (FILM,)


@pytest.mark.parametrize("wrong", [{"worker": "two"}, {"attempt": 2}, {"attempt": 0}])
def test_worker_and_attempt_both_fence(store: Jobs, wrong: dict[str, Any]) -> None:
    job = new(store)
    claim = claimed(store)
    forged = Claim(**({"job": claim.job, "worker": "one", "attempt": 1, "lease_until": claim.lease_until} | wrong))
    assert store.heartbeat(forged).lost
    assert not store.finish(forged, [], {})
    assert now(store, job).state == "in_progress"
    assert store.finish(claim, [], {})


def test_a_crashed_workers_job_goes_back_to_its_place(store: Jobs, clock: Clock) -> None:
    first, second = new(store), new(store)
    claimed(store)
    clock.now += 14.9
    assert store.sweep() == 0
    clock.now += 0.2
    assert store.sweep() == 1
    back = now(store, first)
    assert (back.state, back.position, back.started_at, back.attempt) == ("queued", 1, None, 1)
    assert now(store, second).position == 2
    assert types(store, first) == ["queued", "in_progress", "queued"]
    assert claimed(store, "two").job.id == first.id


def test_a_poison_job_fails_after_three_crashes_and_the_queue_goes_on(store: Jobs, clock: Clock) -> None:
    poison, healthy = new(store), new(store)
    for _ in range(3):
        assert claimed(store).job.id == poison.id
        clock.now += 16
    claim = claimed(store)
    assert claim.job.id == healthy.id
    assert code(store, poison) == "worker_crashed"
    assert now(store, poison).completed_at == clock.now
    assert store.finish(claim, [], {})


def test_a_release_keeps_the_place_and_is_no_crash(store: Jobs, clock: Clock) -> None:
    job, other = new(store), new(store)
    for attempt in range(1, 7):
        claim = claimed(store)
        assert (claim.job.id, claim.attempt) == (job.id, attempt)
        assert store.release(claim)
        assert (now(store, job).position, now(store, other).position) == (1, 2)
        assert store.heartbeat(claim).lost
    for _ in range(2):
        claimed(store)
        clock.now += 16
        store.sweep()
    assert now(store, job).state == "queued", "two crashes among releases are two crashes"


def test_a_suspended_machine_is_no_crash(store: Jobs, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    job = new(store)
    claim = claimed(store)
    slept = jobs.seconds_slept() + 3600
    monkeypatch.setattr(jobs, "seconds_slept", lambda: slept)
    clock.now += 3600
    assert store.sweep() == 0
    assert not store.heartbeat(claim).lost
    clock.now += 16
    assert store.sweep() == 1, "a worker that does not go on was lost after all"
    assert now(store, job).state == "queued"
