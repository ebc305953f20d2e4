"""What happens to a job inside one transaction: a change is written with its event, an end with its webhooks' documents."""

from __future__ import annotations

import json
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, insert, select, update

from tubelet.serve.records import Claim, Job
from tubelet.serve.rows import add, find_job, kind_of, new_id, next_sequence, text_of
from tubelet.serve.tables import DOCUMENTS, EVENTS, JOBS

CANCELLED = {"code": "cancelled", "message": "The job was cancelled."}
DAMAGED = {
    "code": "file_damaged",
    "message": "The film was made, and the server's disk has damaged its file since; ask for it again, with the same seed.",
}


def held_row(db: Connection, claim: Claim) -> Any:
    """id, progress and cancelled of a claimed job, locked; None when the claim is no longer good."""
    query = select(JOBS.c.id, JOBS.c.progress, JOBS.c.cancelled).where(JOBS.c.id == claim.job.id)
    fence = (JOBS.c.state == "in_progress", JOBS.c.worker == claim.worker, JOBS.c.attempt == claim.attempt)
    return db.execute(query.where(*fence).with_for_update()).first()


def ran_out(now: float) -> ColumnElement[bool]:
    """The condition that a job's lease has run out."""
    return (JOBS.c.state == "in_progress") & (JOBS.c.lease_until < now)


def take_back(db: Connection, now: float, attempts: int) -> int:
    """Take back every job whose lease ran out; one that crashed `attempts` times has failed. Returns how many."""
    lost = select(JOBS.c.id, JOBS.c.crashes, JOBS.c.cancelled).where(ran_out(now)).order_by(JOBS.c.id)
    rows = db.execute(lost.with_for_update(skip_locked=True)).all()
    for row in rows:
        crashes = row.crashes + 1
        if crashes >= attempts and not row.cancelled:
            message = f"The worker stopped while it made this, {crashes} times; try a smaller or shorter film."
            end_job(db, row.id, "failed", now, error=text_of({"code": "worker_crashed", "message": message}), crashes=crashes)
        else:
            requeue(db, row.id, row.cancelled, now, crashes=crashes)
    if rows:
        add(db, {"leases_lost": len(rows)})
    return len(rows)


def requeue(db: Connection, id: str, cancelled: bool, now: float, **values: Any) -> None:
    """Give a running job its old place in the queue, or end it when nobody wants it any more."""
    if cancelled:
        end_job(db, id, "failed", now, error=text_of(CANCELLED))
    else:
        change_job(db, id, "queued", now, state="queued", worker=None, lease_until=None, started_at=None, **values)


def end_job(db: Connection, id: str, state: Literal["completed", "failed"], now: float, **values: Any) -> Job:
    """End a job, and leave a document in the outbox for each webhook of its owner that wants to know."""
    ended = {"state": state, "completed_at": now, "worker": None, "lease_until": None, "outputs": "[]"}
    job = change_job(db, id, state, now, **(ended | values))
    if kind_of(id) == "video":  # only films have webhooks
        endpoints = select(DOCUMENTS.c.document).where(DOCUMENTS.c.collection == "webhook_endpoint")
        for document in db.scalars(endpoints.where(DOCUMENTS.c.owner == job.owner)).all():
            _announce(db, job, json.loads(document), now)
    return job


def change_job(db: Connection, id: str, word: str, now: float, **values: Any) -> Job:
    """Change columns of a job and append the event video.`word`. Returns the job as it is now."""
    db.execute(update(JOBS).where(JOBS.c.id == id).values(values))
    return tell(db, id, word, now)


def tell(db: Connection, id: str, word: str, now: float) -> Job:
    """Append the event video.`word` with the job as it is now; returns that."""
    job = find_job(db, id, None)
    assert job is not None
    record(db, next_sequence(db), job, word, now)
    return job


def record(db: Connection, sequence: int, job: Job, word: str, now: float) -> None:
    """Write an event. Its facts hold nothing that a person wrote."""
    facts = {
        "type": f"video.{word}",
        "id": job.id,
        "kind": kind_of(job.id),
        "state": job.state,
        "progress": job.progress,
        "attempt": job.attempt,
        "cancelled": job.cancelled,
        "error": job.error,
        "created_at": job.created_at,
        "at": now,
    }
    row = {"sequence": sequence, "job": job.id, "owner": job.owner, "type": facts["type"], "at": now}
    db.execute(insert(EVENTS).values(facts=text_of(facts), **row))


def _announce(db: Connection, job: Job, endpoint: dict[str, Any], now: float) -> None:
    kind = f"video.{job.state}"
    if not endpoint.get("enabled", True) or kind not in endpoint.get("event_types", [kind]):
        return
    document = {
        "id": new_id("wh", now),
        "endpoint": endpoint["id"],
        "owner": job.owner,
        "type": kind,
        "job": job.id,
        "created_at": now,
        "tries": 0,
        "due": now,
    }
    row = {"collection": "outbox", "id": document["id"], "owner": job.owner, "put_at": now}
    db.execute(insert(DOCUMENTS).values(document=text_of(document), **row))
