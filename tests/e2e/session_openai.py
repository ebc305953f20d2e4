"""`python session_openai.py URL PICTURE sync|async`: a film's whole life by an official client, whichever version is imported.

It runs under a Python that has that client and nothing of ours. One session serves both kinds of client: what the async one
gives to be awaited is awaited, what the other gives is there. Writes its version and the films that it deleted as JSON.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
from openai.types import Video

CLIENT: Any = {"sync": openai.OpenAI, "async": openai.AsyncOpenAI}[sys.argv[3]]
HAS_EXTEND = int(openai.__version__.split(".")[0]) >= 3


async def got(answer: Any) -> Any:
    """What a call gives."""
    return await answer if inspect.isawaitable(answer) else answer


async def all_of(many: Any) -> list[Any]:
    """Everything of a list with pages or of a stream."""
    return [one async for one in many] if hasattr(many, "__aiter__") else list(many)


async def refused(call: Callable[[], Any], kind: type[openai.APIStatusError], code: str) -> None:
    """The call ends in this error, which the client has understood."""
    said: openai.APIStatusError | None = None
    try:
        await got(call())
    except kind as error:
        said = error
    assert said is not None, f"no {code}"
    assert said.code == code, said
    assert said.request_id, said


async def extended(client: Any, id: str) -> Any:
    """The film, 8 seconds longer."""
    assert hasattr(client.videos, "extend") == HAS_EXTEND, openai.__version__
    reference = {"video": {"id": id}}
    if HAS_EXTEND:  # It refuses an object as `video` before it sends anything.
        return await got(client.videos.extend(prompt="on", seconds="8", video=openai.omit, extra_body=reference))
    # These versions have none, and are asked as their README says of endpoints that a client does not know.
    return await got(client.post("/videos/extensions", body={"prompt": "on", "seconds": "8", **reference}, cast_to=Video))


async def read(client: Any, id: str, **variant: str) -> bytes:
    """A film's file."""
    return (await got(client.videos.download_content(id, **variant))).read()


async def whole_life(client: Any) -> list[str]:
    """create, poll, download, remix, extend, delete. Gives what was made and deleted."""
    wish = {"prompt": "a red ball bounces", "model": "sora-2", "seconds": "4", "size": "720x1280"}
    asked = await got(client.videos.create(**wish))
    assert (asked.object, asked.status, asked.seconds, asked.size) == ("video", "queued", "4", "720x1280"), asked
    film = await got(client.videos.poll(asked.id))
    assert (film.id, film.status, film.progress, film.error) == (asked.id, "completed", 100, None), film
    assert await read(client, film.id) == b"film of " + film.id.encode()
    for variant in ("thumbnail", "spritesheet"):
        assert (await read(client, film.id, variant=variant)).startswith(variant.encode())

    remix = await got(client.videos.remix(film.id, prompt="blue"))
    assert remix.remixed_from_video_id == film.id, remix
    longer = await extended(client, film.id)
    assert (longer.object, longer.seconds, longer.size) == ("video", "12", "720x1280"), longer
    for made in (remix, longer):
        assert (await got(client.videos.poll(made.id))).status == "completed"
        assert await read(client, made.id) == b"film of " + made.id.encode()

    page = await got(client.videos.list(limit=1))
    assert page.data[0].id == longer.id, page
    for made in (film, remix, longer):
        gone = await got(client.videos.delete(made.id))
        assert (gone.id, gone.deleted, gone.object) == (made.id, True, "video.deleted"), gone
        await refused(lambda made=made: client.videos.retrieve(made.id), openai.NotFoundError, "not_found")
        await refused(lambda made=made: client.videos.download_content(made.id), openai.NotFoundError, "not_found")
    return [film.id, remix.id, longer.id]


async def whatever_else(client: Any, picture: Path) -> None:
    """Pictures to begin with, failures, refusals, models and images."""
    with picture.open("rb") as file:
        made = await got(client.videos.create_and_poll(prompt="p", input_reference=file))
    assert made.status == "completed", made
    failed = await got(client.videos.create_and_poll(prompt="fail out_of_memory"))
    assert (failed.status, failed.error.code) == ("failed", "out_of_memory"), failed
    await refused(lambda: client.videos.download_content(failed.id), openai.NotFoundError, "video_failed")
    await refused(lambda: client.videos.create(prompt="p", seconds="forever"), openai.BadRequestError, "invalid_value")

    listed = [video.id for video in await all_of(client.videos.list(limit=2))]
    assert len(listed) == len(set(listed)), listed
    assert {made.id, failed.id} <= set(listed), listed
    assert "sora-2" in [model.id for model in await all_of(client.models.list())]
    assert (await got(client.images.generate(prompt="a ball", model="sora-2"))).data[0].b64_json
    with picture.open("rb") as file:
        assert (await got(client.images.edit(image=file, prompt="snow", model="sora-2"))).data[0].b64_json
    events = await all_of(await got(client.images.generate(prompt="p", model="sora-2", stream=True, partial_images=2)))
    assert events[-1].type == "image_generation.completed", events
    assert events[-1].b64_json


async def session() -> None:
    client = CLIENT(api_key="sk-x", base_url=sys.argv[1])
    deleted = await whole_life(client)
    await whatever_else(client, Path(sys.argv[2]))
    await got(client.close())
    sys.stdout.write(json.dumps({"version": openai.__version__, "deleted": deleted}))


asyncio.run(session())
