"""From a request to a job that is on the disk, once, however often the client asks."""

from __future__ import annotations

import contextlib
import functools
import math
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import ValidationError

from tubelet.serve.auth import Caller
from tubelet.serve.config import SystemFacts
from tubelet.serve.errors import ApiError, invalid, of, of_validation
from tubelet.serve.guard import ANSWER_HEADERS
from tubelet.serve.inputs import Taken
from tubelet.serve.moderation import refuse_flagged
from tubelet.serve.quota import GB, charge, exhausted, headers, kept, seconds_of, spent, too_full
from tubelet.serve.records import Asset, Job, KeyConflict, QueueFull, StorageFull
from tubelet.serve.requests import Fields, fingerprint
from tubelet.serve.schemas import DRAWN_SEEDS, LONGEST_FILM, Asked, Making
from tubelet.serve.service import EXPLICIT_WINDOW, RETRY_WINDOW, Service, idempotency_key, retry_count

AskedT = TypeVar("AskedT", bound=Asked)


@dataclass
class Prepared:
    """A job's request, ready to be stored; the files that came with it, and the job it is made from."""

    request: dict[str, Any]
    parent: str | None = None
    kept: list[tuple[Asset, bytes]] = field(default_factory=list)


def read_as(model: type[AskedT], fields: Fields) -> AskedT:
    """The fields as a body. Raises ApiError that names the first field that is wrong. A null is a field that is not there."""
    try:
        return model.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise of_validation(error) from None


def system_of(room: Service, model: str | None, parent: Job | None = None) -> tuple[str, SystemFacts]:
    """The model's name as asked for, or as the parent was asked for, and the system behind it. Raises ApiError."""
    name = model or (str(parent.request.get("model")) if parent is not None else room.config.default)
    system = room.config.system(name)
    if system is None and model is None:
        name = room.config.default
        system = room.config.system(name)
    if system is None:
        offered = ", ".join([*room.config.systems, *room.config.named])
        raise invalid(f"There is no such model; this server has {offered}.", "model", "model_not_found")
    return name, system


def words_of(asked: Making) -> dict[str, Any]:
    """What every film's request holds."""
    return {
        "prompt": asked.prompt,
        "seed": drawn(asked.seed),
        "steps": asked.steps,
        "guidance": asked.guidance,
        "expand": asked.expand,
        "text": asked.text,
    }


def drawn(seed: int | None) -> int:
    """A seed as asked for, or a new one."""
    return secrets.randbelow(DRAWN_SEEDS) if seed is None else seed


def blank(task: str, model: str, system: SystemFacts) -> dict[str, Any]:
    """A job's request with nothing asked for."""
    return {
        "task": task,
        "prompt": "",
        "model": model,
        "system": system.name,
        "size": None,
        "seconds": None,
        "seed": 0,
        "steps": None,
        "guidance": None,
        "expand": True,
        "text": None,
        "loop": False,
        "strength": None,
        "frames": None,
        "inputs": [],
        "shots": None,
        "characters": [],
        "n": 1,
        "format": "mp4",
        "mode": None,
    }


def source_of(seconds: float, taken: Taken) -> dict[str, Any]:
    """What the wire says of a film that is made from others: their seconds, and the first one's (height, width)."""
    return {"seconds": seconds, "size": list(taken.size)}


def refuse_too_long(seconds: float, param: str) -> None:
    """Raises ApiError when a film would be longer than any may be."""
    if seconds > LONGEST_FILM:
        raise invalid(f"The whole film would be longer than {LONGEST_FILM:g} seconds; ask for less.", param)


async def submit(
    room: Service,
    request: Request,
    caller: Caller,
    operation: str,
    fields: Fields,
    prepare: Callable[[], Awaitable[Prepared]],
    kind: Literal["video", "image"] = "video",
) -> Job:
    """Make the job that `prepare` describes, or give the one that this very request made before.

    The same Idempotency-Key within a day, or a retry that the client marks as one within two minutes, gives the first job; but
    the retry of a request that was refused gives a job of its own. Raises ApiError, KeyConflict, QueueFull, StorageFull.
    """
    room.refuse_if_draining()
    key, mark, tried = idempotency_key(request), await room.read(fingerprint, operation, fields), retry_count(request)
    name = f"{caller.owner} {key or mark}"
    async with room.alone(name):
        begun = time.monotonic()
        retry = key is None and tried > 0 and not room.refused.take(name, tried)
        if key is not None or retry:
            # With a key before anything is looked at: what the job was made from may be gone by now.
            window = RETRY_WINDOW if key is None else EXPLICIT_WINDOW
            known = await room.read(room.jobs.recent, caller.owner, mark, window, key)
            anew = retry and kind == "image" and known is not None and known.state == "failed"
            if known is not None and not anew:
                room.metrics.deduped.add()
                request.state.job = known.id
                if caller.daily is not None:
                    _tell_left(request, caller.daily, caller.daily - await room.read(spent, room.jobs, caller.owner))
                return known
            retry = retry and not anew
        prepared = Prepared({})
        try:
            prepared = await prepare()
            await refuse_flagged(room, prepared.request)
            if retry:
                prepared.request["retry"] = True
            if room.config.moderation is not None and room.config.moderation.frames > 0:
                prepared.request["watched"] = True  # a worker that cannot show it to anybody must not make it
            if not await room.ask(room.store.roomy):
                raise StorageFull
            job, new = await _created(
                room,
                request,
                caller,
                prepared,
                kind=kind,
                cap=room.config.cap,
                own_cap=caller.queued,
                key=key,
                fingerprint=mark,
                window=EXPLICIT_WINDOW,
                # Another process on the same store may have answered another try of this request meanwhile.
                dedupe=RETRY_WINDOW if retry else 0.0,
                underway=time.monotonic() - begun,
                request_id=request.state.request_id,
                traceparent=request.state.traceparent,
            )
            request.state.job = job.id
        except (ApiError, KeyConflict, QueueFull, StorageFull) as error:
            if key is None and of(error).comes_again:
                room.refused.note(name, tried)
            with contextlib.suppress(StorageFull):
                await room.write(room.wipe, [asset.id for asset, _ in prepared.kept])
            raise
        if not new:
            room.metrics.deduped.add()
        elif prepared.kept:
            # The job is acknowledged: nothing that goes wrong from here on may say otherwise.
            with contextlib.suppress(StorageFull, OSError):
                await room.write(room.keep, prepared.kept)
        return job


async def _created(room: Service, request: Request, caller: Caller, prepared: Prepared, **more: Any) -> tuple[Job, bool]:
    """The job, and whether it is new, within what the key may keep and ask for today. `more` goes to the job store.

    Raises ApiError.
    """
    create = functools.partial(room.jobs.create, prepared.request, owner=caller.owner, parent=prepared.parent)
    async with room.alone(f"quota {caller.owner}"):
        refusal = await _overfull(room, caller, prepared.kept, least=0)
        seconds = seconds_of(prepared.request)
        left = math.inf if caller.daily is None else caller.daily - await room.read(spent, room.jobs, caller.owner)
        if caller.daily is not None and seconds > left:
            refusal = exhausted(caller.daily, left)
        if refusal is not None:
            more["own_cap"] = 0  # the job of an earlier try is still given, no other
        new = False
        try:
            job, new = await room.write(create, **more)
        except QueueFull:
            if refusal is not None:
                raise refusal from None
            raise
        finally:
            if caller.daily is not None:
                _tell_left(request, caller.daily, left - seconds * new)
        if new and seconds > 0:
            # The job is acknowledged: nothing that goes wrong from here on may say otherwise.
            with contextlib.suppress(StorageFull):
                await room.write(charge, room.jobs, caller.owner, seconds)
        return job, new


def _tell_left(request: Request, daily: float, left: float) -> None:
    """Let the answer say how many of a key's `daily` seconds are left."""
    request.scope[ANSWER_HEADERS].update(headers(daily, left))


async def put_within(room: Service, caller: Caller, collection: str, document: dict[str, Any], taken: Taken) -> None:
    """Store the document of something that was taken in, with its files, where the key may keep so much.

    Raises ApiError, and forgets what was taken in, otherwise.
    """
    async with room.alone(f"quota {caller.owner}"):
        refusal = await _overfull(room, caller, taken.kept, least=1)
        if refusal is not None:
            await room.write(room.wipe, [asset.id for asset, _ in taken.kept])
            raise refusal
        await room.write(room.jobs.put, collection, document["id"], caller.owner, document)
    await room.write(room.keep, taken.kept)


async def _overfull(room: Service, caller: Caller, new: list[tuple[Asset, bytes]], least: int) -> ApiError | None:
    """What is to be said where a key's things and `new` files take more room than they may; None where these are less than
    `least` bytes that it does not keep already."""
    if caller.stored is None:
        return None
    bytes, more = await room.read(kept, room.jobs, room.store, caller.owner, [asset for asset, _ in new])
    return too_full(caller.stored, bytes + more) if more >= least and bytes + more > caller.stored * GB else None
