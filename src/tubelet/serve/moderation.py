"""Words are shown to a moderation endpoint before they become a job, where the operator has named one, and frames, where he
wants it, before anybody sees them. What an endpoint does not know it does not find: this is a net, not a proof."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tubelet.serve.config import Moderation
from tubelet.serve.errors import ApiError
from tubelet.serve.logs import log_failure

if TYPE_CHECKING:
    from tubelet.serve.service import Service

LARGEST_ANSWER = 1 << 20
"""Bytes."""
BLOCKED = "moderation_blocked"
REJECTED = "Your request was rejected by this server's safety system; ask for something else."


class Unanswered(Exception):  # noqa: N818  an answer, not a defect
    """The endpoint did not answer, or not as one does. `final`: it would not if it were asked again."""

    def __init__(self, said: str, final: bool = False) -> None:
        super().__init__(said)
        self.final = final


async def refuse_flagged(room: Service, request: Mapping[str, Any]) -> None:
    """Raises ApiError when the endpoint flags the words of a job's request, or does not answer and must."""
    endpoint = room.config.moderation
    words = words_of(request)
    if endpoint is None or not words:
        return
    try:
        bad = await room.ask(flagged, endpoint, words)
    except Unanswered as error:
        log_failure("moderation", error)
        if endpoint.lenient:
            return
        said = "This server cannot check what is asked for at the moment; try again soon."
        raise ApiError(503, said, code="moderation_unavailable", retry_after=10) from None
    if bad:
        raise ApiError(400, REJECTED, code=BLOCKED, param="prompt")


def words_of(request: Mapping[str, Any]) -> list[str]:
    """What a person wrote into a job's request: its prompt, what is to be read for it, and the prompts of its shots."""
    written = [request.get("prompt"), request.get("text"), *(shot.get("prompt") for shot in request.get("shots") or ())]
    return [str(text) for text in written if text]


def seen(frame: bytes, media: str) -> dict[str, Any]:
    """A picture as `flagged` is asked about it."""
    return {"type": "image_url", "image_url": {"url": f"data:{media};base64,{base64.b64encode(frame).decode()}"}}


def flagged(endpoint: Moderation, shown: Sequence[str | dict[str, Any]]) -> bool:
    """Whether any of the texts, or the picture, is flagged, by OpenAI's protocol of moderations. Raises Unanswered.

    It takes one picture a call. Nothing is redirected.
    """
    parts = urlsplit(endpoint.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    body = {"input": list(shown), **({"model": endpoint.model} if endpoint.model else {})}
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})}
    connection = kind(parts.hostname or "", parts.port, timeout=endpoint.patience)
    try:
        connection.request("POST", f"{parts.path.rstrip('/')}/moderations", json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        text = answer.read(LARGEST_ANSWER)
        results = json.loads(text)["results"] if answer.status == 200 else None
        if not results or not all(isinstance(result["flagged"], bool) for result in results):
            raise Unanswered(f"status {answer.status}", 400 <= answer.status < 500 and answer.status not in (408, 429))
        return any(result["flagged"] for result in results)
    except (OSError, http.client.HTTPException, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Unanswered(type(error).__name__) from error
    finally:
        connection.close()
