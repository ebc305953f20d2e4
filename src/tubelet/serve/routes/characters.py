"""Characters: somebody from a short clip, to appear in films by name."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import Depends

from tubelet.serve.answers import Character, CharacterDeleted
from tubelet.serve.errors import not_found
from tubelet.serve.inputs import checked, new_id, take_film
from tubelet.serve.openapi import operations, takes
from tubelet.serve.routes.videos import CHARACTERS
from tubelet.serve.schemas import CharacterCreate
from tubelet.serve.service import Body, Maker, Reader, Room
from tubelet.serve.submit import put_within, read_as

router = operations("characters")


def _id(character_id: str) -> str:
    return checked("char", character_id)


CharacterId = Annotated[str, Depends(_id)]


@router.post("/v1/videos/characters", response_model=Character, openapi_extra=takes(CharacterCreate))
async def create_character(room: Room, caller: Maker, fields: Body) -> Character:
    """Keep somebody from a clip."""
    asked = read_as(CharacterCreate, fields)
    taken = await take_film(room, caller, asked.video, "video")
    character = Character(id=new_id("char"), created_at=int(time.time()), name=asked.name)
    document = {**character.model_dump(), "asset": taken.asset, "media": taken.media, "credentials": taken.credentials}
    await put_within(room, caller, CHARACTERS, document, taken)
    return character


@router.get("/v1/videos/characters/{character_id}", response_model=Character)
async def get_character(room: Room, id: CharacterId, caller: Reader) -> Character:
    """One character."""
    document = await room.read(room.jobs.find, CHARACTERS, id, caller.owner)
    if document is None:
        raise not_found("character")
    return Character.model_validate(document)


@router.delete("/v1/videos/characters/{character_id}", response_model=CharacterDeleted)
async def delete_character(room: Room, id: CharacterId, caller: Maker) -> CharacterDeleted:
    """Forget a character and its clip."""
    document = await room.read(room.jobs.find, CHARACTERS, id, caller.owner)
    await room.ask(room.refuse_if_away)
    if document is None or not await room.write(room.jobs.drop, CHARACTERS, id, caller.owner):
        raise not_found("character")
    await room.write(room.wipe, [name for name in (document["asset"], document["credentials"]) if name])
    return CharacterDeleted(id=id)
