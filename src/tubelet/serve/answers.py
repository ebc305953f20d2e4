"""The words of the wire: what is answered. What may be asked stands in `schemas`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tubelet.serve.schemas import ImageFormat


class Answer(BaseModel):
    """An answer."""

    model_config = ConfigDict(protected_namespaces=())


class VideoError(Answer):
    """Why a job failed."""

    code: str
    message: str


class Video(Answer):
    """A video job: what Sora's clients read, and behind `seed` what they pass through."""

    id: str
    object: Literal["video"] = "video"
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    model: str
    progress: int = Field(ge=0, le=100, description="100 only when the film can be downloaded.")
    prompt: str | None = None
    remixed_from_video_id: str | None = None
    seconds: str
    size: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    error: VideoError | None = None
    seed: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    rendered_size: str | None = Field(default=None, description="WIDTHxHEIGHT as the model made it.")
    queue_position: int | None = None
    eta_ms: int | None = None
    parent_id: str | None = None
    task: str
    text: str | None = Field(default=None, description="What the model read, or is to read where that was asked for.")
    preview: bool = False
    loop: bool = False
    steps: int | None = None
    guidance: float | None = None
    strength: float | None = None
    expand: bool = True
    shots: list[dict[str, Any]] | None = None
    spritesheet: dict[str, Any] | None = Field(
        default=None, description="Of the variant `spritesheet`: columns, rows, height and width of a cell, the frames in them."
    )
    unused: list[str] = Field(default=[], description="What was asked for and had no effect on this system.")


class PagedList(Answer):
    """A part of a list, and whether there is more behind it."""

    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoList(PagedList):
    """A page of videos."""

    data: list[Video]


class Gone(Answer):
    """What was deleted."""

    id: str
    deleted: Literal[True] = True


class VideoDeleted(Gone):
    """A video is gone."""

    object: Literal["video.deleted"] = "video.deleted"


class Character(Answer):
    """Somebody who can appear in films."""

    id: str
    object: Literal["video.character"] = "video.character"
    created_at: int
    name: str


class CharacterDeleted(Gone):
    """A character is gone."""

    object: Literal["video.character.deleted"] = "video.character.deleted"


class Queue(Answer):
    """The queue as a whole."""

    object: Literal["queue"] = "queue"
    paused: bool
    queued: int
    in_progress: int
    oldest_queued_age: int = Field(description="Seconds.")
    workers: int = Field(description="Heard of in the last 20 seconds.")


class Image(Answer):
    """One picture."""

    b64_json: str
    revised_prompt: str | None = None


class Images(Answer):
    """Pictures."""

    created: int
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str | None = None
    seed: int | None = None


class ImageTokensDetails(Answer):
    """Nothing here is counted in tokens."""

    image_tokens: Literal[0] = 0
    text_tokens: Literal[0] = 0


class ImageTokens(Answer):
    """Nothing here is counted in tokens; clients ask for the figures."""

    input_tokens: Literal[0] = 0
    input_tokens_details: ImageTokensDetails = ImageTokensDetails()
    output_tokens: Literal[0] = 0
    total_tokens: Literal[0] = 0


class _ImageSeen(Answer):
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    quality: Literal["auto"] = "auto"
    size: str


class PartialImage(_ImageSeen):
    """An event of a stream: what a picture looks like so far."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    output_format: Literal["jpeg"] = "jpeg"
    partial_image_index: int


class CompletedImage(_ImageSeen):
    """An event of a stream: the picture."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    output_format: ImageFormat
    usage: ImageTokens = ImageTokens()
    revised_prompt: str | None = None
    seed: int | None = None


class File(Answer):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    media_type: str


class FileList(PagedList):
    """A page of files."""

    data: list[File]


class FileDeleted(Gone):
    """A file is gone."""

    object: Literal["file"] = "file"


class Model(Answer):
    """Something to ask for by name, and what it makes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tubelet"] = "tubelet"
    system: str
    size: str = Field(description="Native WIDTHxHEIGHT.")
    fps: float
    frames: int
    steps: int
    guidance: float
    sizes: list[str]
    seconds: list[str]


class ModelList(Answer):
    """Everything to ask for by name."""

    object: Literal["list"] = "list"
    data: list[Model]


class Expansion(Answer):
    """A prompt, and the caption that was made of it. A film that is asked for with both is made from that caption."""

    prompt: str
    text: str
    source: str = Field(description="Who wrote it: `rules`, a chat model's name, or `none` where the prompt stays as it is.")


class ProvenanceResult(Answer):
    """What one kind of mark says of a file. `type` is `c2pa` for signed metadata, `watermark` for the invisible mark."""

    type: str
    outcome: Literal["detected", "not_detected"]
    validation_state: Literal["trusted", "valid", "invalid", "not_present"]
    issuer: str | None = None
    model: str | None = None
    generated_at: str | None = None
    reason: str | None = Field(default=None, description="Why nothing could be looked for, where that is so.")


class ProvenanceCheck(Answer):
    """What a file says of its origin."""

    object: Literal["content_provenance_check"] = "content_provenance_check"
    created_at: int
    results: list[ProvenanceResult]


class WebhookEndpoint(Answer):
    """Where films that end are told of."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str | None = None


class WebhookEndpointWithSecret(WebhookEndpoint):
    """A new endpoint, or one with a new secret, which is shown this once."""

    signing_secret: str


class WebhookEndpointList(PagedList):
    """A page of endpoints."""

    data: list[WebhookEndpoint]


class WebhookEndpointDeleted(Gone):
    """An endpoint is gone."""

    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"


class WebhookTestResult(Answer):
    """How an endpoint answered a sample."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class WebhookEventTypes(Answer):
    """What can be told of."""

    object: Literal["list"] = "list"
    data: list[str]


class KeyLimits(Answer):
    """What a key may; null where there is no limit."""

    rpm: int | None = Field(description="Requests that change something, per minute.")
    queued: int | None = Field(description="Jobs that may wait or run.")
    running: int | None = Field(description="Jobs that may run at once.")
    daily: float | None = Field(description="Seconds of film a day.")
    stored: float | None = Field(description="GB that films and files may take.")


class KeyUsage(Answer):
    """What a key has used of its limits."""

    queued: int = Field(description="Jobs that wait.")
    running: int = Field(description="Jobs that run.")
    daily: float = Field(description="Seconds of film asked for since midnight UTC.")
    stored: float = Field(description="GB that its films and files take.")


class Key(Answer):
    """A key, without what would let anybody use it."""

    id: str
    object: Literal["key"] = "key"
    name: str
    scopes: list[str]
    created_at: int | None = None
    limits: KeyLimits


class KeyState(Key):
    """A key and what it has used."""

    usage: KeyUsage


class KeyWithSecret(Key):
    """A new key, which is shown this once."""

    secret: str


class KeyList(Answer):
    """All keys."""

    object: Literal["list"] = "list"
    data: list[Key]


class KeyDeleted(Gone):
    """A key is worthless."""

    object: Literal["key.deleted"] = "key.deleted"


class Health(Answer):
    """Whether the server can do its work, and which part cannot."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, bool] = {}


class ErrorBody(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """Every answer that is not the one that was asked for."""

    error: ErrorBody
