"""The job store, on SQLite and on a real PostgreSQL: the same promises, the same tests."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from jobs_rig import CANARY, FILM, Clock, at_once, claimed, code, new, now, types

from tubelet.serve.jobs import Jobs
from tubelet.serve.records import Job, KeyConflict, QueueFull, Signal

# Creating.


def test_a_job_comes_back_as_it_went_in(store: Jobs, url: str, clock: Clock) -> None:
    request = {"prompt": "Würfel \u0000 🌊 \udc80", "size": [720, 1280], "seed": 2**63, "loop": False, "steps": None}
    came = {"request_id": "req_1", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    job, is_new = store.create(request, owner="anna", parent="video_x", **came)
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
        **came,
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


def test_what_waits_for_a_system_of_others_is_counted(store: Jobs) -> None:
    for system in ("mine", "", "theirs", "theirs", "gone"):
        store.create({"prompt": "a ball", "system": system})
    store.claim("one", systems=("gone",))  # that which has no system of its own comes first
    store.claim("one", systems=("gone",))
    assert store.queued_for_others(("mine",)) == {"theirs": 2}


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


def test_totals_count_what_happens_and_outlive_who_counts(store: Jobs, url: str, clock: Clock) -> None:
    assert store.totals() == {"attempts": 0, "leases_lost": 0, "steps": 0, "signed": 0, "out_of_memory": 0}
    first, second = new(store), new(store)
    claim = claimed(store)
    store.heartbeat(claim, counted={"steps": 5, "out_of_memory": 1})
    store.release(claim)
    assert store.totals()["leases_lost"] == 0, "what is given back is not lost"
    stale, other = claimed(store), claimed(store, "two")
    assert (stale.job.id, other.job.id) == (first.id, second.id)
    clock.now += 60
    assert store.sweep() == 2
    assert store.heartbeat(stale, counted={"steps": 2}) == Signal(lost=True, cancelled=False), "it did these steps"
    store.count({"signed": 3, "steps": 1})
    again = Jobs.open(url, clock=clock)
    assert again.totals() == {"attempts": 3, "leases_lost": 2, "steps": 8, "signed": 3, "out_of_memory": 1}
    again.close()


def test_many_count_at_once(store: Jobs, url: str, clock: Clock) -> None:
    for _ in range(4):
        new(store)
    claims = [claimed(store, f"worker {number}") for number in range(4)]

    def busy(number: int) -> None:
        for _ in range(10):
            store.heartbeat(claims[number], counted={"steps": 1})
            store.count({"steps": 1, "signed": 1})

    at_once(4, busy)
    assert (store.totals()["steps"], store.totals()["signed"]) == (80, 40)
