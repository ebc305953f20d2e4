"""The words of the wire: what may be asked. What is answered stands in `answers`; `docs/openapi.json` is written from both."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Annotated, Any, Literal, LiteralString

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from tubelet.serve.requests import Upload, parsed

LONGEST_PROMPT = 32_000
LONGEST_NAME = 200
MOST_MARKS = 30
"""Marks in a row on one letter, as Unicode's stream-safe text has them (UAX 15); languages do with fewer."""
LONGEST_URL = 20_971_520
GREATEST_SIDE, GREATEST_PIXELS, LEAST_SIDE, GREATEST_ASPECT = 3840, 3840 * 2160, 16, 4
LONGEST_FILM = 120.0
"""Seconds, with what it was made from."""
MOST_FRAMES = 4096
GREATEST_SEED = 2**63 - 1
DRAWN_SEEDS = 2**31
"""Seeds that the server draws are below this, so that every language can hold them."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_ODD_RUN = re.compile(rf"[^\w\s\x00-\x7f]{{{MOST_MARKS + 1},}}")
"""Where marks could be: no mark is a letter, a digit or a blank."""


def _wrong(code: LiteralString, message: str) -> PydanticCustomError:
    return PydanticCustomError(f"api:{code}", "{said}", {"said": message})


def clean_text(text: str, longest: int) -> str:
    """Text as it is kept: NFC, without blanks around it. Refuses more than `longest` characters, control signs, halves of
    characters, and heaps of marks on one letter."""
    text = text.strip()
    if len(text) <= longest:  # before anything that looks at every character
        if _CONTROL.search(text):
            raise _wrong("invalid_text", "It holds control characters or broken ones; remove them.")
        if _heaped(text):
            raise _wrong("invalid_text", f"It piles more than {MOST_MARKS} marks on one letter; remove some.")
        text = unicodedata.normalize("NFC", text).strip()
    if len(text) > longest:
        raise _wrong("string_above_max_length", f"It is longer than {longest} characters; shorten it.")
    return text


def _heaped(text: str) -> bool:
    """Whether marks pile up. To put them into order takes time that grows with the square of their number."""
    for run in _ODD_RUN.finditer(text):
        marks = 0
        for sign in run[0]:
            marks = marks + 1 if unicodedata.category(sign)[0] == "M" else 0
            if marks > MOST_MARKS:
                return True
    return False


def _name(text: str) -> str:
    return clean_text(text, LONGEST_NAME)


def _prompt(text: str) -> str:
    text = clean_text(text, LONGEST_PROMPT)
    if not text:
        raise _wrong("empty_string", "It is empty; say what to show.")
    return text


def _seconds(value: Any) -> float:
    try:
        seconds = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_FILM:
        raise _wrong("invalid_value", f"It must be a number of seconds above 0 and up to {LONGEST_FILM:g}.")
    return seconds


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT". Raises PydanticCustomError when no film can have that size."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    width, height = (int(side) for side in found.groups()) if found else (0, 0)
    if not all(LEAST_SIDE <= side <= GREATEST_SIDE and side % 2 == 0 for side in (width, height)):
        raise _wrong(
            "invalid_value",
            f"It must be WIDTHxHEIGHT in pixels, such as 1280x720: even numbers from {LEAST_SIDE} to {GREATEST_SIDE}.",
        )
    if max(width, height) > GREATEST_ASPECT * min(width, height):
        raise _wrong("invalid_value", f"Its long side may be {GREATEST_ASPECT} times the short one.")
    if width * height > GREATEST_PIXELS:
        raise _wrong("invalid_value", "It has more pixels than 3840x2160; choose a smaller one.")
    return height, width


def _size(value: Any) -> tuple[int, int]:
    if not isinstance(value, str):
        raise _wrong("invalid_type", "It must be a string such as 1280x720.")
    return parse_size(value)


def _image_size(value: Any) -> tuple[int, int] | None:
    return None if value == "auto" else _size(value)


def _from_text(value: Any) -> Any:
    """An object or list that a form carries as JSON text."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return parsed(value.encode(errors="surrogatepass"))
        except ValueError as error:
            raise _wrong("invalid_json", f"It is not valid: {error}") from error
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, (bool, float)):
        raise _wrong("invalid_type", "It must be a whole number.")
    return value


Prompt = Annotated[
    str, AfterValidator(_prompt), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": LONGEST_PROMPT})
]
Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]{1,3}(\.[0-9]{1,6})?$"},
                {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_FILM},
            ],
            "description": f"Above 0 to {LONGEST_FILM:g}.",
            "examples": ["4"],
        }
    ),
]
_SIZE = {
    "type": "string",
    "pattern": r"^[1-9][0-9]{1,3}x[1-9][0-9]{1,3}$",
    "description": "WIDTHxHEIGHT in pixels.",
    "examples": ["1280x720"],
}
Size = Annotated[tuple[int, int], BeforeValidator(_size), WithJsonSchema(_SIZE)]
_IMAGE_SIZE = _SIZE | {"pattern": r"^([1-9][0-9]{1,3}x[1-9][0-9]{1,3}|auto)$"}
ImageSize = Annotated[tuple[int, int] | None, BeforeValidator(_image_size), WithJsonSchema(_IMAGE_SIZE)]
Seed = Annotated[int, Field(ge=0, le=GREATEST_SEED), BeforeValidator(_whole)]
Steps = Annotated[int, Field(ge=1, le=1000), BeforeValidator(_whole)]
Frames = Annotated[int, Field(ge=1, le=MOST_FRAMES), BeforeValidator(_whole)]
Place = Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(_whole)]
Pictures = Annotated[int, Field(ge=1, le=10), BeforeValidator(_whole)]
Partials = Annotated[int, Field(ge=0, le=3), BeforeValidator(_whole)]
Lifetime = Annotated[int, Field(ge=1, le=2_592_000), BeforeValidator(_whole)]
Percent = Annotated[int, Field(ge=0, le=100), BeforeValidator(_whole)]
ImageFormat = Literal["png", "webp", "jpeg"]
Guidance = Annotated[float, Field(ge=0, le=30)]
Strength = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, AfterValidator(_name), Field(min_length=1, max_length=LONGEST_NAME)]


class Asked(BaseModel):
    """A body. A field that it does not have is an error, so that a slip of the pen does not go unnoticed."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class FileReference(Asked):
    """A picture by reference: an uploaded file, or an address (`data:` always, `https:` where the server allows it)."""

    file_id: str | None = Field(default=None, max_length=64)
    image_url: str | None = Field(default=None, max_length=LONGEST_URL)


class VideoReference(Asked):
    """A finished video by its id, or an uploaded clip by its file's."""

    id: str | None = Field(default=None, max_length=64)
    file_id: str | None = Field(default=None, max_length=64)


def _reference(kind: type[Asked], said: str) -> BeforeValidator:
    """A file as it is, an object as a reference; in one sentence what else was wrong."""

    def read(value: Any) -> Any:
        value = _from_text(value)
        if isinstance(value, dict):
            try:
                made = kind.model_validate(value)
            except ValidationError:
                made = None
            if made is not None and len(made.model_dump(exclude_none=True)) == 1:
                return made
        elif isinstance(value, (Upload, kind)):
            return value
        raise _wrong("invalid_type", said)

    return BeforeValidator(read)


def _only(value: Any) -> Any:
    """Of a list its one entry: clients may send several pictures."""
    value = _from_text(value)
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise _wrong("invalid_value", "One picture is worked on at a time; send one.")
    return value[0]


Picture = Annotated[
    Upload | FileReference, _reference(FileReference, "It must be a file, or an object with either file_id or image_url.")
]
OnePicture = Annotated[Picture, BeforeValidator(_only)]
Film = Annotated[
    Upload | VideoReference, _reference(VideoReference, "It must be a file, or an object with either id or file_id.")
]


class CharacterReference(Asked):
    """A character by its id; its name stands in the prompt."""

    id: str = Field(max_length=64)


class Shot(Asked):
    """One shot of a storyboard."""

    prompt: Prompt
    seconds: Seconds
    cut: bool = Field(default=False, description="Begin anew, instead of going on from the shot before.")


class Making(Asked):
    """What every film can be asked for."""

    prompt: Prompt
    model: str | None = Field(default=None, max_length=100)
    seed: Seed | None = Field(default=None, description="The same seed and settings give the same film. Drawn when absent.")
    steps: Steps | None = Field(default=None, description="Solver steps; absent: the system's.")
    guidance: Guidance | None = Field(default=None, description="Strength of the prompt; 1 is plain, absent: the system's.")
    expand: bool = Field(default=True, description="Rewrite the prompt into the kind of caption that the model was trained on.")
    text: Prompt | None = Field(
        default=None, description="What the model is to read for the prompt, such as what /v1/expansions made of it."
    )
    user: str | None = Field(default=None, max_length=512, description="Accepted and not used.")


class VideoCreate(Making):
    """A film from words, and from pictures or two films if some are given."""

    seconds: Seconds | None = None
    size: Size | None = None
    frames: Frames | None = Field(default=None, description="Exact frames at the system's rate; wins over seconds.")
    loop: bool = Field(default=False, description="A film whose last frame leads to its first.")
    input_reference: Picture | None = Field(default=None, description="A picture or a clip that the film begins with.")
    last_reference: Picture | None = Field(default=None, description="A picture that the film ends with.")
    video: Film | None = Field(default=None, description="With `mode`: the first film.")
    second_video: Film | None = Field(default=None, description="With `mode`: the second film.")
    mode: Literal["connect", "blend"] | None = Field(default=None, description="What becomes of two films.")
    strength: Strength | None = Field(default=None, description="With `mode`: how much is made anew.")
    characters: Annotated[list[CharacterReference], BeforeValidator(_from_text)] = Field(default=[], max_length=2)
    shots: Annotated[list[Shot] | None, BeforeValidator(_from_text)] = Field(default=None, min_length=1, max_length=16)


class VideoRemix(Making):
    """A finished film made again by other words."""

    strength: Strength | None = Field(default=None, description="How much is made anew; 1: all of it.")


class VideoEdit(Making):
    """A film changed by words."""

    video: Film
    strength: Strength | None = Field(default=None, description="How much is made anew; 1: all of it.")


class VideoExtend(Making):
    """A film that goes on."""

    video: Film
    seconds: Seconds | None = Field(default=None, description="Of the new piece; absent: as long as the system's own films.")
    loop: bool = Field(default=False, description="Lead back to the film's first frame.")


class CharacterCreate(Asked):
    """Somebody to appear in films, from a short clip."""

    name: Name
    video: Film


class MoveJob(Asked):
    """Where in the queue; 1 is next."""

    place: Place


class PauseQueue(Asked):
    """Whether workers take new jobs."""

    paused: bool


_UNUSED = "Accepted and not used."


class Depicting(Asked):
    """What every picture can be asked for."""

    model: str | None = Field(default=None, max_length=100)
    n: Pictures = 1
    size: ImageSize = Field(default=None)
    output_format: ImageFormat = "png"
    response_format: Literal["b64_json"] = "b64_json"
    background: Literal["auto", "opaque"] = "auto"
    seed: Seed | None = None
    steps: Steps | None = None
    guidance: Guidance | None = None
    output_compression: Percent | None = Field(default=None, description=_UNUSED)
    quality: str | None = Field(default=None, max_length=32, description=_UNUSED)
    safety_identifier: str | None = Field(default=None, max_length=512, description=_UNUSED)
    user: str | None = Field(default=None, max_length=512, description=_UNUSED)


class Described(Depicting):
    """What every picture from words can be asked for."""

    prompt: Prompt
    expand: bool = True
    stream: bool = Field(default=False, description="Answer with server-sent events; one picture at a time.")
    partial_images: Partials | None = Field(
        default=None, description="With `stream`: at most so many looks at the picture before it is done."
    )


class ImageCreate(Described):
    """Pictures from words: films of one frame."""

    moderation: str | None = Field(default=None, max_length=32, description=_UNUSED)
    style: str | None = Field(default=None, max_length=32, description=_UNUSED)


class ImageEdit(Described):
    """A picture changed by words: where the mask is transparent, or all over."""

    image: OnePicture
    mask: Picture | None = Field(default=None, description="As large as the picture; transparent where that is made anew.")
    strength: Strength | None = Field(default=None, description="Without a mask: how much is made anew; 1: all of it.")
    input_fidelity: str | None = Field(default=None, max_length=32, description=_UNUSED)


class ImageVariation(Depicting):
    """Pictures like a picture."""

    image: OnePicture
    strength: Strength | None = Field(default=None, description="How much is made anew; 1: all of it.")
    guidance: Guidance | None = Field(default=None, description=_UNUSED)


class FileExpiry(Asked):
    """When a file is forgotten by itself."""

    anchor: Literal["created_at"] = "created_at"
    seconds: Lifetime


class FileCreate(Asked):
    """A picture or a clip to refer to later."""

    file: Upload
    purpose: Literal["vision", "user_data"] = "user_data"
    expires_after: Annotated[FileExpiry | None, BeforeValidator(_from_text)] = Field(
        default=None, description="Forget the file so many seconds after it came; absent: it stays until it is deleted."
    )


class ProvenanceCheckCreate(Asked):
    """A picture or a film whose origin is to be read."""

    file: Upload


class Expand(Asked):
    """A short prompt, and the model that is to read it."""

    prompt: Prompt
    model: str | None = Field(default=None, max_length=100)


EventType = Literal["video.completed", "video.failed"]


class WebhookCreate(Asked):
    """Where to tell of films that end."""

    name: Name
    url: str = Field(min_length=1, max_length=2048)
    event_types: Annotated[list[EventType], BeforeValidator(_from_text)] = Field(min_length=1, max_length=8)


class WebhookUpdate(Asked):
    """What to change."""

    name: Name | None = None
    url: str | None = Field(default=None, min_length=1, max_length=2048)
    event_types: Annotated[list[EventType] | None, BeforeValidator(_from_text)] = Field(
        default=None, min_length=1, max_length=8
    )


class WebhookRotate(Asked):
    """A new secret."""

    keep_old_secret_active_for_24_hours: bool = False


class WebhookTest(Asked):
    """Which event to send as a sample."""

    event_type: EventType


Scope = Literal["read", "create", "admin"]


class KeyCreate(Asked):
    """A new key. A limit that is not named is the usual one, or none."""

    name: Name
    scopes: Annotated[list[Scope], BeforeValidator(_from_text)] = Field(default=["read", "create"], min_length=1, max_length=3)
    rpm: int | None = Field(default=None, ge=1, description="Requests that change something, per minute.")
    queued: int | None = Field(default=None, ge=1, description="Jobs that may wait or run.")
    running: int | None = Field(default=None, ge=1, description="Jobs that may run at once.")
    daily: float | None = Field(default=None, ge=1, description="Seconds of film a day.", allow_inf_nan=False)
    stored: float | None = Field(default=None, gt=0, description="GB that films and files may take.", allow_inf_nan=False)
