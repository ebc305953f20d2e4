"""What is made of a short prompt, for somebody to see before a film is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio.to_thread
from pydantic_core import PydanticCustomError

from tubelet.core.errors import UserError
from tubelet.serve.answers import Expansion
from tubelet.serve.config import SystemFacts
from tubelet.serve.errors import ApiError
from tubelet.serve.logs import log_failure
from tubelet.serve.moderation import refuse_flagged
from tubelet.serve.schemas import LONGEST_PROMPT, clean_text
from tubelet.serve.service import Service

if TYPE_CHECKING:
    from tubelet.text.expand import Expander

AWAY = "The words cannot be expanded now; try again soon, or ask without expansion."


async def expanded(room: Service, system: SystemFacts, prompt: str) -> Expansion:
    """The caption that a worker with this server's settings would make of a prompt for a system.

    Raises ApiError: 503 when the chat model does not answer, or not with words that a request may hold; 400 when the moderation
    endpoint flags the prompt, which is asked first.
    """
    chat = room.config.expander
    if chat is None:
        return await room.read(_by_rules, prompt) if system.expander is not None else _as_it_is(prompt)
    await refuse_flagged(room, {"prompt": prompt})
    try:
        return await anyio.to_thread.run_sync(_by_chat, chat, prompt, limiter=room.writers_of_captions)
    except (UserError, PydanticCustomError) as error:
        log_failure("expansion", error)
        raise ApiError(503, AWAY, code="expansion_unavailable", retry_after=5) from None


def _as_it_is(prompt: str) -> Expansion:
    return Expansion(prompt=prompt, text=prompt, source="none")


def _by_rules(prompt: str) -> Expansion:
    from tubelet.worlds.expand import compose_dense, parse_scene

    scene = parse_scene(prompt)
    return _as_it_is(prompt) if scene is None else Expansion(prompt=prompt, text=compose_dense(scene), source="rules")


def _by_chat(chat: Expander, prompt: str) -> Expansion:
    made = chat.expand(prompt)
    # As a request keeps its text: what is shown comes back as it is.
    return Expansion(prompt=prompt, text=clean_text(made.text, LONGEST_PROMPT), source=made.source)
