"""From a short prompt to the dense caption that a model was trained on (Betker et al. 2023, section 3.5).

An expansion always carries the original, so that a caller can show both. Nothing is expanded unless an expander is given.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from tubelet.core.errors import UserError

SceneT = TypeVar("SceneT")
_ANSWER_LIMIT = 1 << 20

INSTRUCTIONS = (
    "You write captions for a text-to-video model. Rewrite the user's prompt as one dense caption of at most 100 words "
    "in plain present tense: the subjects with colour, shape and size, what each does and in which direction, the "
    "background, the camera. Keep everything that the prompt names and contradict none of it. Answer with the caption only."
)


@dataclass(frozen=True)
class Expansion:
    """What the user wrote, what the model reads, and who made it ("rules" or a chat model's name)."""

    original: str
    text: str
    source: str

    @property
    def changed(self) -> bool:
        """Whether there is anything to show beside the original."""
        return self.text != self.original


class Expander(Protocol):
    """Anything that expands a prompt. Raises UserError when it cannot."""

    def expand(self, prompt: str) -> Expansion: ...


@dataclass(frozen=True)
class RuleExpander(Generic[SceneT]):
    """Rules of a world: `parse` reads the scene that a prompt names, `compose` writes its dense caption.

    A prompt that names no scene (`parse` gives None) stays as it is.
    """

    parse: Callable[[str], SceneT | None]
    compose: Callable[[SceneT], str]

    def expand(self, prompt: str) -> Expansion:
        scene = self.parse(prompt)
        return Expansion(prompt, prompt if scene is None else self.compose(scene), "rules")


@dataclass(frozen=True)
class ChatModel:
    """A chat model behind any endpoint that speaks `POST {base_url}/chat/completions`, local or hosted.

    `base_url`: e.g. `http://127.0.0.1:8080/v1`; `timeout` in seconds for connecting and for each read. Redirects are not
    followed, so that the key goes nowhere else.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 30.0

    def __post_init__(self) -> None:
        try:
            address = urlsplit(self.base_url)
            good = address.scheme in ("http", "https") and bool(address.hostname) and address.port != 0
        except ValueError:  # brackets without an address in them, a port that is none
            good = False
        if not good:
            raise UserError(f"the chat endpoint must be an http or https address, got {self.base_url!r}; correct it")
        if not self.model:
            raise UserError("the chat endpoint needs the name of a model; set TUBELET_CHAT_MODEL, or unset TUBELET_CHAT_URL")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UserError("the chat endpoint's key must be plain printable characters; copy it again")
        if not self.timeout > 0:
            raise UserError(f"the chat endpoint's timeout must be more than 0 seconds, got {self.timeout}; raise it")

    def answer(self, instructions: str, content: str | Sequence[Mapping[str, Any]]) -> str:
        """What the model says to one message, as one line. `content` is text, or parts such as `{"type": "image_url", ...}`.

        Raises UserError when the endpoint cannot be reached, is too slow, refuses or answers nonsense.
        """
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": content}]
        return _content(self._ask({"model": self.model, "messages": messages}), self.base_url)

    def _ask(self, question: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = self.base_url.rstrip("/") + "/chat/completions"
        try:
            # The scheme was checked when the address was told.
            request = urllib.request.Request(address, json.dumps(question).encode(), headers, method="POST")  # noqa: S310
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as answer:
                return answer.read(_ANSWER_LIMIT)
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(300).decode(errors="replace").split())
            remedy = "check the key" if error.code in (401, 403) else "check the address and the model's name"
            raise UserError(f"the chat endpoint {address} answered {error.code} ({said or error.reason}); {remedy}") from error
        except TimeoutError as error:
            raise UserError(f"the chat endpoint {address} took longer than {self.timeout:g} s; raise the timeout") from error
        except (OSError, HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise UserError(
                    f"the chat endpoint {address} took longer than {self.timeout:g} s; raise the timeout"
                ) from error
            raise UserError(
                f"cannot reach the chat endpoint {address} ({reason}); start it, or unset TUBELET_CHAT_URL"
            ) from error


@dataclass(frozen=True)
class ChatExpander(ChatModel):
    """A chat model that is told to expand prompts."""

    instructions: str = INSTRUCTIONS

    def expand(self, prompt: str) -> Expansion:
        """Raises UserError as `answer` does."""
        prompt = prompt.encode(errors="replace").decode()
        return Expansion(prompt, self.answer(self.instructions, prompt), self.model)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _content(answer: bytes, where: str) -> str:
    """The caption in a chat completion: one line, without a reasoning model's thoughts or quotes around it."""
    try:
        said = json.loads(answer)["choices"][0]["message"]["content"]
        text = " ".join(said.rpartition("</think>")[2].split())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the chat endpoint {where} did not answer with a chat completion; check its address") from error
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    if not text:
        raise UserError(f"the chat endpoint {where} answered with an empty caption; try another model")
    return text
