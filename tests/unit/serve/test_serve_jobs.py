"""The job store, on SQLite and on a real PostgreSQL: the same promises, the same tests."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import full_disk
import older
import postgres_server
import pytest
import sqlalchemy as sa
from postgres_server import Absent, address, as_operator, new_schema

from tubelet.core.errors import UserError
from tubelet.serve import database, jobs
from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Asset, Claim, Job, KeyConflict, QueueFull, Signal, StorageFull

FILM = Asset("a" * 64, "video", "video/mp4", 1000)
PREVIEW = Asset("b" * 64, "preview", "image/webp", 10)
CANARY = "a very secret heron wades through the shallows"


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.25

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The folder of the socket of a PostgreSQL server that lives as long as this file's tests."""
    with contextlib.ExitStack() as opened:
        try:
            folder = opened.enter_context(postgres_server.running())
        except Absent as absent:
            pytest.skip(str(absent))
        yield folder


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'tubelet.db'}"


@pytest.fixture
def postgres_url(postgres: str) -> str:
    return new_schema(postgres)


@pytest.fixture
def postgres_database(postgres: str) -> str:
    """The name of a database of its own."""
    name = f"t{time.monotonic_ns()}"
    as_operator(postgres, f"CREATE DATABASE {name}")
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")


@pytest.fixture
def other_url(url: str, request: pytest.FixtureRequest) -> str:
    """A second empty database of the same kind."""
    return f"{url}.other" if url.startswith("sqlite") else new_schema(request.getfixturevalue("postgres"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Jobs]:
    opened = Jobs.open(url, clock=clock)
    yield opened
    opened.close()


def new(store: Jobs, prompt: str = "a red ball", **more: Any) -> Job:
    job, is_new = store.create({"prompt": prompt}, **more)
    assert is_new
    return job


def claimed(store: Jobs, worker: str = "one") -> Claim:
    claim = store.claim(worker)
    assert claim is not None
    return claim


def now(store: Jobs, job: Job) -> Job:
    found = store.get(job.id, None)
    assert found is not None
    return found


def code(store: Jobs, job: Job) -> str | None:
    error = now(store, job).error
    return None if error is None else error["code"]


def types(store: Jobs, job: Job) -> list[str]:
    return [facts["type"].removeprefix("video.") for _, _, facts in store.events(job=job.id)]


def at_once(number: int, call: Callable[[int], Any]) -> list[Any]:
    """`call(0)` to `call(number - 1)`, all at the same time; what each gave or raised."""
    barrier = threading.Barrier(number)

    def one(index: int) -> Any:
        barrier.wait()
        try:
            return call(index)
        except (QueueFull, KeyConflict, StorageFull, UserError) as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


# Creating.


def test_a_job_comes_back_as_it_went_in(store: Jobs, url: str, clock: Clock) -> None:
    request = {"prompt": "Würfel \u0000 🌊 \udc80", "size": [720, 1280], "seed": 2**63, "loop": False, "steps": None}
    job, is_new = store.create(request, owner="anna", parent="video_x")
    assert is_new
    assert re.fullmatch(r"video_[0-9a-z]{26}", job.id)
    assert job == Job(
        id=job.id,
        owner="anna",
        state="queued",
        progress=0,
        request=request,
        created_at=clock.now,
        started_at=None,
        completed_at=None,
        expires_at=None,
        attempt=0,
        error=None,
        outputs=(),
        result={},
        parent="video_x",
        cancelled=False,
        position=1,
    )
    again = Jobs.open(url, clock=clock)
    assert again.get(job.id, None) == again.get(job.id, "anna") == job
    assert again.get(job.id, "berta") is None
    again.close()


def test_ids_sort_by_creation_and_name_their_kind(store: Jobs, clock: Clock) -> None:
    ids = []
    for _ in range(20):
        clock.now += 0.001
        ids.append(new(store).id)
    assert ids == sorted(ids)
    assert re.fullmatch(r"image_[0-9a-z]{26}", new(store, kind="image").id)


@pytest.mark.parametrize("value", [float("nan"), b"bytes", object()])
def test_what_json_cannot_hold_is_refused(store: Jobs, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        store.create({"prompt": value})
    assert store.counts()["queued"] == 0


def test_a_key_gives_the_same_job_within_its_window(store: Jobs, clock: Clock) -> None:
    job = new(store, key="k", fingerprint="f", window=100)
    clock.now += 99
    assert store.create({"prompt": "another"}, key="k", fingerprint="f", window=100) == (now(store, job), False)
    with pytest.raises(KeyConflict):
        store.create({"prompt": "another"}, key="k", fingerprint="g", window=100)
    assert new(store, key="k", fingerprint="f", owner="berta").id != job.id
    clock.now += 2
    later = new(store, key="k", fingerprint="g", window=100)
    assert store.create({}, key="k", fingerprint="g", window=100)[0].id == later.id


def test_a_key_is_answered_even_when_the_queue_is_full_and_forgotten_with_its_job(store: Jobs) -> None:
    job = new(store, key="k", fingerprint="f", cap=1)
    assert store.create({}, key="k", fingerprint="f", cap=1) == (job, False)
    store.delete(job.id, None)
    assert new(store, key="k", fingerprint="other").id != job.id


def test_a_retry_without_a_key_is_known_by_its_fingerprint(store: Jobs, clock: Clock) -> None:
    assert store.recent("local", "f", 120) is None
    job = new(store, fingerprint="f")
    clock.now += 119
    assert store.recent("local", "f", 120) == job
    assert store.recent("berta", "f", 120) is None
    assert store.recent("local", "g", 120) is None
    assert store.create({}, fingerprint="f", dedupe=120) == (job, False)
    assert new(store, fingerprint="g", dedupe=120).id != job.id
    assert new(store, fingerprint="f", key="k", dedupe=120).id != job.id, "a key of its own is a wish of its own"
    clock.now += 121
    assert store.recent("local", "f", 120) is None
    assert new(store, fingerprint="f", dedupe=120).id != job.id


@pytest.mark.parametrize("caps", [{"cap": 7}, {"own_cap": 7}])
def test_32_creators_at_once_get_exactly_the_cap(store: Jobs, url: str, clock: Clock, caps: dict[str, int]) -> None:
    other = Jobs.open(url, clock=clock)  # as another process would: what holds must hold in the database
    answers = at_once(32, lambda n: (store, other)[n % 2].create({"prompt": str(n)}, **caps))
    other.close()
    refused = [answer for answer in answers if isinstance(answer, QueueFull)]
    assert len(refused) == 25
    assert all(1 <= answer.retry_after <= 60 for answer in refused)
    assert store.counts()["queued"] == 7
    store.finish(claimed(store), [], {})
    new(store, **caps)
    with pytest.raises(QueueFull):
        new(store, **caps)
    if "own_cap" in caps:
        new(store, owner="berta", **caps)


def test_the_same_key_from_16_threads_makes_one_job(store: Jobs, url: str, clock: Clock) -> None:
    other = Jobs.open(url, clock=clock)
    answers = at_once(16, lambda n: (store, other)[n % 2].create({}, key="k", fingerprint="f"))
    other.close()
    assert len({job.id for job, _ in answers}) == 1
    assert sum(is_new for _, is_new in answers) == 1


@pytest.mark.parametrize(("seconds", "says"), [(7.5, 8), (0.1, 1), (500.0, 60)])
def test_a_full_queue_says_when_to_come_again(store: Jobs, clock: Clock, seconds: float, says: int) -> None:
    new(store)
    claim = claimed(store)
    clock.now += seconds
    store.finish(claim, [], {})
    new(store)
    with pytest.raises(QueueFull) as full:
        new(store, cap=1)
    assert full.value.retry_after == says


# Reading.


def test_pages_follow_each_other_in_both_directions(store: Jobs, clock: Clock) -> None:
    made = []
    for _ in range(5):
        clock.now += 1
        made.append(new(store).id)
    foreign, picture = new(store, owner="berta"), new(store, kind="image")
    first = store.page("local", limit=2)
    assert ([job.id for job in first.jobs], first.has_more) == (made[:2:-1], True)
    second = store.page("local", limit=3, after=first.jobs[-1].id)
    assert ([job.id for job in second.jobs], second.has_more) == (made[2::-1], False)
    upward = store.page("local", limit=4, order="asc", after=made[0])
    assert ([job.id for job in upward.jobs], upward.has_more) == (made[1:], False)
    assert [job.id for job in store.page("local", kind="image").jobs] == [picture.id]
    assert len(store.page(None).jobs) == 6
    for unknown in ("video_" + "z" * 26, foreign.id):
        with pytest.raises(LookupError):
            store.page("local", after=unknown)


def test_positions_in_a_page_are_those_of_the_queue(store: Jobs, clock: Clock) -> None:
    for _ in range(4):
        clock.now += 1
        new(store)
    claimed(store)
    assert [job.position for job in store.page(None, order="asc").jobs] == [None, 1, 2, 3]
    foreign, picture = new(store, owner="anna"), new(store, kind="image")
    store.move(foreign.id, None, 1)
    store.move(picture.id, None, 3)
    for owner in (None, "local", "anna"):
        page = store.page(owner, order="asc").jobs
        assert [job.position for job in page] == [now(store, job).position for job in page]
    assert [job.position for job in store.page("anna").jobs] == [1]
    assert [job.position for job in store.page(None, kind="image").jobs] == [3]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_who_stays_is_seen_once_while_others_come_and_go(store: Jobs, clock: Clock, order: Any) -> None:
    made = []
    for number in range(60):
        clock.now += number % 3  # some share their time
        made.append(new(store))
    stays, goes = [job.id for job in made[::2]], [job.id for job in made[1::2]]
    seen: list[str] = []
    after = None
    while True:
        page = store.page(None, limit=7, after=after, order=order)
        seen += [job.id for job in page.jobs]
        if not page.has_more:
            break
        after = page.jobs[-1].id
        for _ in range(4):
            new(store)
            if goes:
                store.delete(goes.pop(len(goes) // 2), None)
        if after not in stays:
            store.delete(after, None)  # even the job a page ended with may go
    assert sorted(id for id in seen if id in set(stays)) == sorted(stays)
    assert len(seen) == len(set(seen))


def test_counts_and_the_age_of_the_queue(store: Jobs, clock: Clock) -> None:
    empty = {"queued": 0, "in_progress": 0, "completed": 0, "failed": 0, "oldest_queued_age": 0}
    assert store.counts() == empty
    for _ in range(5):
        new(store)
        clock.now += 10
    store.finish(claimed(store), [], {})
    store.fail(claimed(store), "bad", "It went wrong.")
    claimed(store)
    assert store.counts() == {"queued": 2, "in_progress": 1, "completed": 1, "failed": 1, "oldest_queued_age": 20}


# Working.


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


# Cancelling, deleting, moving.


def test_cancelling_what_waits_ends_it(store: Jobs, clock: Clock) -> None:
    job, other = new(store, owner="anna"), new(store)
    assert store.cancel(job.id, "berta") is None
    clock.now += 1
    gone = store.cancel(job.id, "anna")
    assert gone == now(store, job)
    assert (gone.state, gone.cancelled, gone.completed_at, gone.position) == ("failed", True, clock.now, None)
    assert code(store, job) == "cancelled"
    assert store.cancel(job.id, "anna") == gone
    assert types(store, job) == ["queued", "failed"]
    assert claimed(store).job.id == other.id
    assert store.cancel("video_" + "0" * 26, None) is None


def test_cancelling_what_runs_is_told_with_the_next_heartbeat(store: Jobs) -> None:
    job = new(store)
    claim = claimed(store)
    flagged = store.cancel(job.id, None)
    assert flagged is not None
    assert (flagged.state, flagged.cancelled) == ("in_progress", True)
    assert store.heartbeat(claim) == Signal(lost=False, cancelled=True)
    assert store.fail(claim, "cancelled", "The job was cancelled.")
    assert code(store, job) == "cancelled"


@pytest.mark.parametrize("end", ["finish", "release", "crash"])
def test_a_cancelled_job_never_comes_back(store: Jobs, clock: Clock, end: str) -> None:
    job = new(store)
    claim = claimed(store)
    store.cancel(job.id, None)
    if end == "finish":
        assert not store.finish(claim, [FILM], {})
    elif end == "release":
        assert store.release(claim)
    else:
        clock.now += 16
        assert store.sweep() == 1
    assert code(store, job) == "cancelled"
    assert now(store, job).outputs == ()
    assert store.claim("two") is None


def test_what_is_finished_cannot_be_cancelled(store: Jobs) -> None:
    job = new(store)
    store.finish(claimed(store), [FILM], {})
    done = now(store, job)
    assert store.cancel(job.id, None) == done == now(store, job)


def test_deleting_what_runs_refuses_the_late_finish(store: Jobs) -> None:
    job = new(store)
    claim = claimed(store)
    store.heartbeat(claim, progress=10)
    assert store.delete(job.id, "berta") is None
    running = now(store, job)
    assert store.delete(job.id, "local") == running
    assert store.get(job.id, None) is None
    assert store.heartbeat(claim) == Signal(lost=True, cancelled=False)
    assert not store.finish(claim, [FILM], {})
    assert not store.release(claim)
    assert store.page(None).jobs == ()
    assert types(store, job) == ["deleted"]
    assert store.delete(job.id, None) is None


def test_deleted_words_are_gone_from_the_files(sqlite_url: str, tmp_path: Path) -> None:
    store = Jobs.open(sqlite_url)
    for _ in range(30):
        new(store)
    job = new(store, CANARY)
    store.finish(claimed(store), [], {})
    store.put("character", "c", "local", {"name": "Ottokar the heron"})

    def found(words: str) -> bool:
        return any(words.encode() in path.read_bytes() for path in tmp_path.iterdir())

    assert found(CANARY)
    store.delete(job.id, None)
    assert not found(CANARY)
    assert found("Ottokar the heron")
    store.drop("character", "c", None)
    assert not found("Ottokar the heron")
    store.close()


def test_moving_within_the_queue(store: Jobs) -> None:
    a, b, c, d = (new(store) for _ in range(4))
    for job, place, order in ((d, 1, [d, a, b, c]), (d, 3, [a, b, d, c]), (a, 99, [b, d, c, a]), (a, -5, [a, b, d, c])):
        moved = store.move(job.id, "local", place)
        assert moved is not None
        assert moved.position == order.index(job) + 1
        assert [now(store, other).position for other in order] == [1, 2, 3, 4]
    assert claimed(store).job.id == a.id
    assert store.move(a.id, None, 1) == now(store, a), "what runs has no place to move to"
    assert store.move("video_" + "0" * 26, None, 1) is None


def test_many_may_move_at_once(store: Jobs, url: str, clock: Clock) -> None:
    made = [new(store) for _ in range(8)]
    other = Jobs.open(url, clock=clock)
    moved = at_once(8, lambda n: [(store, other)[n % 2].move(made[n].id, None, place) for place in (1, 8, 3)])
    other.close()
    assert all(isinstance(job, Job) for one in moved for job in one)
    assert sorted(now(store, job).position for job in made) == list(range(1, 9))  # type: ignore[type-var]


def test_moving_takes_no_place_from_others(store: Jobs) -> None:
    x, a, y, b, c = (new(store, owner=owner) for owner in ("x", "anna", "x", "anna", "anna"))
    assert store.move(c.id, "x", 1) is None
    assert store.move(c.id, "anna", 1).position == 2  # type: ignore[union-attr]
    assert [now(store, job).position for job in (x, c, y, a, b)] == [1, 2, 3, 4, 5]
    assert store.move(c.id, None, 1).position == 1  # type: ignore[union-attr]


# Events, outbox, documents.


def test_events_tell_a_life_in_order(store: Jobs, clock: Clock) -> None:
    job, other = new(store, CANARY), new(store, owner="berta")
    claim = claimed(store)
    store.heartbeat(claim, progress=50)
    clock.now += 1
    store.finish(claim, [FILM], {})
    events = store.events()
    sequences = [sequence for sequence, _, _ in events]
    assert sequences == sorted(set(sequences))
    assert types(store, job) == ["queued", "in_progress", "progress", "completed"]
    last = store.events(job=job.id)[-1]
    assert last[1] == job.id
    assert last[2] == {
        "type": "video.completed",
        "id": job.id,
        "kind": "video",
        "state": "completed",
        "progress": 100,
        "attempt": 1,
        "cancelled": False,
        "error": None,
        "created_at": job.created_at,
        "at": clock.now,
    }
    assert CANARY not in str(events)
    assert [id for _, id, _ in store.events(owner="berta")] == [other.id]
    assert store.events(after=sequences[2]) == events[3:]
    assert store.events(limit=2) == events[:2]
    assert store.last_event() == sequences[-1]
    assert store.events(after=store.last_event()) == []


def test_who_follows_the_events_misses_none(store: Jobs, url: str, clock: Clock) -> None:
    reader = Jobs.open(url, clock=clock)
    followed: list[int] = []
    done = threading.Event()

    def follow() -> None:
        while True:
            last = done.is_set()
            events = reader.events(after=followed[-1] if followed else 0, limit=10)
            followed.extend(sequence for sequence, _, _ in events)
            if last and not events:
                return

    follower = threading.Thread(target=follow)
    follower.start()
    at_once(8, lambda n: [store.cancel(new(store).id, None) for _ in range(8)])
    done.set()
    follower.join()
    reader.close()
    assert len(followed) == 128
    assert followed == [sequence for sequence, _, _ in store.events()]


def test_finer_events_and_silent_workers_are_forgotten_after_a_day(store: Jobs, clock: Clock) -> None:
    job, deleted = new(store), new(store)
    claim = claimed(store)
    store.heartbeat(claim, progress=50)
    store.finish(claim, [], {})
    store.delete(deleted.id, None)
    clock.now += 86401
    store.hello("two", {})
    store.sweep()
    assert types(store, job) == ["queued", "in_progress", "completed"]
    assert types(store, deleted) == []
    assert [worker["id"] for worker in store.workers()] == ["two"]
    with pytest.raises(LookupError):
        store.page(None, after=deleted.id)


def test_ends_leave_a_document_for_each_webhook_that_wants_it(store: Jobs, clock: Clock) -> None:
    store.put("webhook_endpoint", "e1", "local", {"id": "e1"})
    store.put("webhook_endpoint", "e2", "local", {"id": "e2", "enabled": True, "event_types": ["video.failed"]})
    store.put("webhook_endpoint", "e3", "local", {"id": "e3", "enabled": False})
    store.put("webhook_endpoint", "e4", "berta", {"id": "e4"})
    done, failed, cancelled = new(store), new(store), new(store)
    store.finish(claimed(store), [], {})
    store.fail(claimed(store), "bad", "It went wrong.")
    store.cancel(cancelled.id, None)
    new(store, kind="image")
    store.finish(claimed(store), [], {})
    sent = {(document["endpoint"], document["type"], document["job"]) for document in store.all("outbox", None)}
    assert sent == {
        ("e1", "video.completed", done.id),
        ("e1", "video.failed", failed.id),
        ("e2", "video.failed", failed.id),
        ("e1", "video.failed", cancelled.id),
        ("e2", "video.failed", cancelled.id),
    }
    document = store.all("outbox", "local")[0]
    assert re.fullmatch(r"wh_[0-9a-z]{26}", document["id"])
    assert document["owner"] == "local"
    assert (document["created_at"], document["tries"], document["due"]) == (clock.now, 0, clock.now)
    assert len(store.all("outbox", None)) == 5


@pytest.mark.parametrize("breaks", ["INSERT INTO events", "INSERT INTO documents", "INSERT INTO workers", "UPDATE jobs"])
def test_an_end_is_written_whole_or_not_at_all(store: Jobs, breaks: str) -> None:
    store.put("webhook_endpoint", "e1", "local", {"id": "e1"})
    job = new(store)
    claim = claimed(store)
    before = now(store, job), store.events(), store.workers()

    def fault(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(breaks):
            raise RuntimeError(breaks)

    sa.event.listen(sa.Engine, "before_cursor_execute", fault)
    try:
        with pytest.raises(RuntimeError, match=breaks):
            store.finish(claim, [FILM], {})
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", fault)
    assert (now(store, job), store.events(), store.workers()) == before
    assert store.all("outbox", None) == []
    assert store.finish(claim, [FILM], {})
    assert len(store.all("outbox", None)) == 1


def test_documents_belong_to_their_owners(store: Jobs, clock: Clock) -> None:
    store.put("file", "f2", "anna", {"id": "f2", "name": "ü"})
    clock.now += 1
    store.put("file", "f1", "anna", {"id": "f1"})
    store.put("file", "f3", "berta", {"id": "f3"})
    store.put("key", "f1", "anna", {"other": 1})
    clock.now += 1
    store.put("file", "f2", "anna", {"id": "f2", "name": "new"})
    assert store.find("file", "f2", "anna") == store.find("file", "f2", None) == {"id": "f2", "name": "new"}
    assert store.find("file", "f2", "berta") is None
    assert store.find("character", "f2", None) is None
    assert [document["id"] for document in store.all("file", "anna")] == ["f2", "f1"]
    assert len(store.all("file", None)) == 3
    assert not store.drop("file", "f2", "berta")
    assert store.drop("file", "f2", "anna")
    assert not store.drop("file", "f2", "anna")
    assert store.find("key", "f1", "anna") == {"other": 1}


def test_every_asset_that_a_row_names_is_referenced(store: Jobs) -> None:
    names = [character * 64 for character in "123456"]
    store.create({"inputs": [{"role": "video", "asset": names[0]}], "characters": [{"asset": names[1]}]})
    store.heartbeat(claimed(store), preview=Asset(names[2], "preview", "image/webp", 1))
    done = new(store)
    store.finish(claimed(store, "two"), [Asset(names[3], "video", "video/mp4", 1)], {"journal": names[4]})
    store.put("file", "f", "local", {"asset": names[5]})
    assert store.referenced() == set(names)
    store.delete(done.id, None)
    store.drop("file", "f", None)
    assert store.referenced() == set(names[:3])


def test_workers_say_who_they_are_and_are_seen_at_work(store: Jobs, clock: Clock) -> None:
    store.hello("one", {"device": "cpu", "system": "worlds-64"})
    assert store.workers() == [{"id": "one", "device": "cpu", "system": "worlds-64", "seen": clock.now, "job": None}]
    job = new(store)
    claim = claimed(store)
    assert store.workers()[0]["job"] == job.id
    clock.now += 3
    store.heartbeat(claim)
    assert store.workers() == [{"id": "one", "device": "cpu", "system": "worlds-64", "seen": clock.now, "job": job.id}]
    store.hello("one", {"device": "cuda"})
    assert store.workers() == [{"id": "one", "device": "cuda", "seen": clock.now, "job": job.id}]
    store.finish(claim, [], {})
    assert store.workers()[0]["job"] is None


# The database itself.


def test_many_may_open_a_new_database_at_once(url: str) -> None:
    opened = at_once(6, lambda n: Jobs.open(url))
    assert [type(one) for one in opened] == [Jobs] * 6
    new(opened[0])
    assert [one.counts()["queued"] for one in opened] == [1] * 6
    for one in opened:
        one.close()


def test_a_newer_database_is_left_alone(url: str) -> None:
    Jobs.open(url).close()
    with older.engine(url).begin() as connection:
        connection.exec_driver_sql("UPDATE numbers SET value = 99 WHERE name = 'schema'")
    before = older.shape(url), older.rows(url)
    with pytest.raises(UserError, match=r"^[^\n]* written by a newer tubelet \(schema 99, .*\); update tubelet or [^\n]*$"):
        Jobs.open(url)
    assert (older.shape(url), older.rows(url)) == before


def test_an_older_database_becomes_what_a_new_one_is_and_keeps_every_row(url: str, other_url: str) -> None:
    older.write_schema_1(url)
    before = older.rows(url)
    store = Jobs.open(url)
    Jobs.open(other_url).close()
    assert older.shape(url) == older.shape(other_url)
    assert older.rows(url) == before
    done, failed, running, _, _ = store.page(None, limit=100, order="asc").jobs
    assert (done.state, done.outputs[0].id, done.result["seed"]) == ("completed", "a" * 64, 7)
    assert (failed.owner, failed.error) == ("anna", {"code": "invalid_request", "message": "It cannot be made."})
    assert store.create({}, key="wish 1", fingerprint="f1", window=1e12) == (done, False), "keys are still known"
    assert store.sweep() == 1, "the worker of then is gone"
    claim = store.claim("two", kinds=("video",))
    assert claim is not None
    assert (claim.job.id, claim.attempt) == (running.id, 2)
    assert store.finish(claim, [FILM], {})
    store.close()


def test_many_may_update_an_older_database_at_once(url: str) -> None:
    older.write_schema_1(url, more=100)
    opened = at_once(6, lambda n: Jobs.open(url))
    assert [one.counts()["queued"] for one in opened] == [102] * 6
    for one in opened:
        one.close()


@pytest.mark.parametrize(
    "wrong", ["nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "postgresql://nobody@/x?host=/none"]
)
def test_a_wrong_address_is_told_in_a_sentence(wrong: str) -> None:
    with pytest.raises(UserError, match="; "):
        Jobs.open(wrong)


def test_what_is_no_database_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match="not a database"):
        Jobs.open(f"sqlite:///{tmp_path / 'film.mp4'}")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make"):
        Jobs.open(f"sqlite:///{tmp_path / 'file' / 'tubelet.db'}")


def test_only_its_owner_may_read_the_file(sqlite_url: str, tmp_path: Path) -> None:
    store = Jobs.open(sqlite_url)
    new(store)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) == 3
    store.close()


def test_sqlite_syncs_every_commit(sqlite_url: str) -> None:
    store = Jobs.open(sqlite_url)
    with store._database.read() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
    store.close()


def test_a_read_only_sqlite_reads_and_refuses_to_write(sqlite_url: str, tmp_path: Path) -> None:
    writable = Jobs.open(sqlite_url)
    job = new(writable)
    store = Jobs.open(f"sqlite:///file:{tmp_path / 'tubelet.db'}?mode=ro&uri=true")
    assert store.get(job.id, None) == job
    for call in (lambda: store.create({}), lambda: store.claim("one"), lambda: store.delete(job.id, None)):
        with pytest.raises(StorageFull, match="readonly"):
            call()
    assert now(writable, job) == job
    store.close()
    writable.close()


def test_a_read_only_postgres_refuses_until_it_is_writable(postgres: str, postgres_database: str) -> None:
    name, url = postgres_database, address(postgres, postgres_database)
    Jobs.open(url).close()
    as_operator(postgres, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    store = Jobs.open(url)
    with pytest.raises(StorageFull, match="read-only"):
        new(store)
    as_operator(postgres, f"ALTER DATABASE {name} RESET default_transaction_read_only")
    as_operator(postgres, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    new(store)  # on a new connection: the lost ones are noticed
    assert store.counts()["queued"] == 1
    store.close()


def test_a_postgres_that_takes_no_connections_is_no_defect_of_ours(postgres: str, postgres_database: str) -> None:
    store = Jobs.open(address(postgres, postgres_database))
    job, name = new(store), postgres_database
    as_operator(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    as_operator(postgres, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    with pytest.raises(StorageFull):
        store.get(job.id, None)
    as_operator(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert store.get(job.id, None) == job
    store.close()


def test_a_lock_that_is_never_given_back_ends_as_an_answer(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE", 0.1)
    store = Jobs.open(sqlite_url)
    hog = sqlite3.connect(tmp_path / "tubelet.db", isolation_level=None)
    hog.execute("BEGIN IMMEDIATE")
    refused = at_once(6, lambda n: store.create({}))
    assert {type(answer) for answer in refused} == {StorageFull}
    assert any("locked" in str(answer) for answer in refused)
    assert any("keep up" in str(answer) for answer in refused), "those behind it do not wait longer than their patience"
    assert store.counts()["queued"] == 0, "readers do not wait for a writer"
    hog.execute("ROLLBACK")
    new(store)
    hog.close()
    store.close()


def test_a_full_disk_refuses_whole_writes_and_recovers_by_itself(tmp_path: Path) -> None:
    try:
        refused = full_disk.on_a_small_disk(tmp_path)
    except full_disk.NoSmallDisk as none:
        pytest.skip(str(none))
    assert set(refused) == {"create", "claim", "heartbeat", "put", "finish"}, "each step was once the one to fail"
