"""Keys: what one's own may do and has used, and, for who rules the server, all of them."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends

from tubelet.core.errors import UserError
from tubelet.serve import auth, quota
from tubelet.serve.answers import Key, KeyDeleted, KeyLimits, KeyList, KeyState, KeyUsage, KeyWithSecret
from tubelet.serve.auth import LIMITS, LOCAL, Caller
from tubelet.serve.errors import ApiError, invalid, not_found
from tubelet.serve.openapi import operations, takes
from tubelet.serve.records import KEYS
from tubelet.serve.schemas import KeyCreate
from tubelet.serve.service import Admin, Body, Reader, Room, Service
from tubelet.serve.submit import read_as

router = operations("keys")
_ID = re.compile(r"key_[0-9a-f]{24}")


def _id(key_id: str) -> str:
    if not _ID.fullmatch(key_id):
        raise not_found("key")
    return key_id


KeyId = Annotated[str, Depends(_id)]


@router.get("/v1/key", response_model=KeyState)
async def get_own_key(room: Room, caller: Reader) -> KeyState:
    """The key of this request: what it may, and what it has used. Without keys, the person at this machine."""
    async with room.alone(f"state {caller.owner}"):  # it looks at every file that the key keeps
        return await room.read(_state, room, caller)


def _state(room: Service, caller: Caller) -> KeyState:
    document = room.jobs.find(KEYS, caller.owner, None) or {"id": LOCAL, "name": LOCAL, "scopes": sorted(caller.scopes)}
    counts = room.jobs.counts(caller.owner)
    usage = KeyUsage(
        queued=counts["queued"],
        running=counts["in_progress"],
        daily=quota.spent(room.jobs, caller.owner),
        stored=quota.kept(room.jobs, room.store, caller.owner)[0] / quota.GB,
    )
    return KeyState(**_shown(document).model_dump(), usage=usage)


@router.get("/v1/keys", response_model=KeyList)
async def list_keys(room: Room, _: Admin) -> KeyList:
    """All keys, oldest first, without what would let anybody use them."""
    return KeyList(data=[_shown(document) for document in await room.read(auth.listed, room.jobs)])


@router.post("/v1/keys", response_model=KeyWithSecret, openapi_extra=takes(KeyCreate))
async def create_key(room: Room, caller: Admin, fields: Body) -> KeyWithSecret:
    """Make a key, which may no more than one's own. It is shown this once."""
    _refuse_without_keys(room)
    asked = read_as(KeyCreate, fields)
    beyond = [scope for scope in asked.scopes if scope not in caller.scopes]
    if beyond:
        raise ApiError(403, f"This key may not {beyond[0]}, and so make none that may.", code="insufficient_scope")
    limits = {name: getattr(asked, name) for name in LIMITS if getattr(asked, name) is not None}
    try:
        id, secret = await room.write(auth.issue, room.jobs, asked.name, asked.scopes, **limits)
    except UserError as error:
        raise invalid(f"{error}.", None) from None
    document = await room.read(room.jobs.find, KEYS, id, None)
    if document is None:  # revoked in this very moment
        raise not_found("key")
    return KeyWithSecret(**_shown(document).model_dump(), secret=secret)


@router.delete("/v1/keys/{key_id}", response_model=KeyDeleted)
async def delete_key(room: Room, id: KeyId, _: Admin) -> KeyDeleted:
    """Make a key worthless from the next request on, and stop its jobs. What it made stays."""
    _refuse_without_keys(room)
    if not await room.write(auth.revoke, room.jobs, id):
        raise not_found("key")
    return KeyDeleted(id=id)


def _refuse_without_keys(room: Service) -> None:
    """Where nobody needs a key, any program on this machine could make one that is good later on. Raises ApiError."""
    if not room.config.keys:
        raise ApiError(403, "This server asks for no keys; tubelet keys makes them.", code="keys_not_in_use")


def _shown(document: dict[str, object]) -> Key:
    limits = KeyLimits.model_validate({name: document.get(name) for name in LIMITS})
    created = document.get("created_at")
    return Key.model_validate(
        {
            "id": document["id"],
            "name": document["name"],
            "scopes": document["scopes"],
            "created_at": None if created is None else int(float(str(created))),
            "limits": limits,
        }
    )
