"""`python session_litellm.py URL PICTURE sync|async`: a film's whole life by LiteLLM, in whose words our server is a provider.

It runs under a Python that has LiteLLM and nothing of ours. Writes the films that it deleted as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import litellm  # type: ignore[import-not-found]
from litellm.types.videos.utils import decode_video_id_with_provider  # type: ignore[import-not-found]
from openai import OpenAI

HERE = {"api_base": sys.argv[1], "api_key": "sk-x"}
VIDEOS = {**HERE, "custom_llm_provider": "openai"}
BEFORE = {"sync": "", "async": "a"}[sys.argv[3]]


async def call(name: str, **words: Any) -> Any:
    """A function of LiteLLM, or its async twin."""
    if BEFORE:
        return await getattr(litellm, BEFORE + name)(**words)
    # Some of these run a loop of their own, which the thread of ours would not have.
    return await asyncio.to_thread(getattr(litellm, name), **words)


async def ended(video: Any) -> Any:
    """The film when it is done."""
    while video.status in ("queued", "in_progress"):
        await asyncio.sleep(0.02)
        video = await call("video_status", video_id=video.id, **VIDEOS)
    return video


async def status_of(asked: Awaitable[Any]) -> int | None:
    """The status that a refusal had, as LiteLLM tells it. None: it was no refusal."""
    try:
        await asked
    except Exception as error:  # noqa: BLE001 - of which kind is LiteLLM's own affair
        return getattr(error, "status_code", 0)
    return None


def own_id(video: Any) -> str:
    """The server's name of a film: LiteLLM writes its provider into the one that it gives."""
    return str(decode_video_id_with_provider(video.id)["video_id"])


def delete(id: str) -> None:
    """LiteLLM has types for a deletion, but no function that asks for one: it is left to the official client below it."""
    assert not hasattr(litellm, "video_delete"), "LiteLLM can delete by now, so this session should"
    with OpenAI(base_url=sys.argv[1], api_key="sk-x") as client:
        assert client.videos.delete(id).deleted


async def session(picture: Path) -> None:
    wish = {"prompt": "a red ball bounces", "model": "sora-2", "seconds": "4", "size": "720x1280"}
    asked = await call("video_generation", **wish, **VIDEOS)
    assert (asked.object, asked.status, asked.seconds, asked.size) == ("video", "queued", "4", "720x1280"), asked
    film = await ended(asked)
    assert (own_id(film), film.status, film.progress) == (own_id(asked), "completed", 100), film
    assert await call("video_content", video_id=film.id, **VIDEOS) == b"film of " + own_id(film).encode()
    with picture.open("rb") as file:
        shown = await ended(await call("video_generation", **wish, input_reference=file, **VIDEOS))
    assert shown.status == "completed", shown

    remix = await call("video_remix", video_id=film.id, prompt="blue", **VIDEOS)
    edited = await call("video_edit", video_id=film.id, prompt="snow", **VIDEOS)
    longer = await call("video_extension", video_id=film.id, prompt="on", seconds="8", **VIDEOS)
    assert remix.remixed_from_video_id in (film.id, own_id(film)), remix
    assert (longer.seconds, longer.size) == ("12", "720x1280"), longer
    for made in (remix, edited, longer):
        assert (await ended(made)).status == "completed", made
        assert await call("video_content", video_id=made.id, **VIDEOS) == b"film of " + own_id(made).encode()
    listed = await call("video_list", limit=1, **VIDEOS)
    assert len(listed["data"] if isinstance(listed, dict) else listed) == 1, listed

    films = (film, remix, longer)
    for made in films:
        delete(own_id(made))
        assert await status_of(call("video_status", video_id=made.id, **VIDEOS)) == 404, "a deleted film"

    images = {"model": "openai/sora-2", **HERE}
    assert (await call("image_generation", prompt="a ball", **images)).data[0].b64_json
    with picture.open("rb") as file:
        assert (await call("image_edit", image=file, prompt="snow", **images)).data[0].b64_json
    wrong = call("video_generation", prompt="p", model="sora-2", seconds="forever", **VIDEOS)
    assert await status_of(wrong) == 400, "words for seconds"
    sys.stdout.write(json.dumps({"deleted": [own_id(made) for made in films]}))


asyncio.run(session(Path(sys.argv[2])))
