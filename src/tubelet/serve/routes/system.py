"""The server itself: what it offers, its queue, its health, its figures, and where its films come from."""

from __future__ import annotations

import datetime
import time
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from tubelet.serve.answers import Expansion, Health, Model, ModelList, ProvenanceCheck, ProvenanceResult, Queue
from tubelet.serve.config import OFFERED_SECONDS, OFFERED_SIZES, SystemFacts
from tubelet.serve.errors import ApiError, invalid
from tubelet.serve.expansions import expanded
from tubelet.serve.metrics import CONTENT_TYPE
from tubelet.serve.openapi import operations, takes
from tubelet.serve.records import StorageFull
from tubelet.serve.requests import Upload
from tubelet.serve.schemas import Expand, PauseQueue, ProvenanceCheckCreate
from tubelet.serve.service import Admin, Body, Maker, Reader, Room, Service
from tubelet.serve.submit import read_as, system_of
from tubelet.serve.view import written

router = operations("server")


def _model(id: str, system: SystemFacts, alias: bool) -> Model:
    native, seconds = written(system.size) or "", f"{system.seconds:g}"
    sizes, lengths = [native, *OFFERED_SIZES], [seconds, *(f"{length:g}" for length in OFFERED_SECONDS)]
    if alias:  # what is asked for by this name and no more comes first
        sizes, lengths = ["720x1280", *(s for s in sizes if s != "720x1280")], ["4", *(s for s in lengths if s != "4")]
    return Model(
        id=id,
        created=system.created,
        system=system.name,
        size=native,
        fps=system.fps,
        frames=system.frames,
        steps=system.steps,
        guidance=system.guidance,
        sizes=list(dict.fromkeys(sizes)),
        seconds=list(dict.fromkeys(lengths)),
    )


def _models(room: Service) -> list[Model]:
    named = [_model(alias, room.config.systems[name], True) for alias, name in room.config.named.items()]
    return [_model(name, system, False) for name, system in room.config.systems.items()] + named


@router.get("/v1/models", response_model=ModelList)
async def list_models(room: Room, _: Reader) -> ModelList:
    """Every system that is served, the default one first, then their other names."""
    models = _models(room)
    return ModelList(data=sorted(models, key=lambda model: model.id != room.config.default))


@router.get("/v1/models/{model}", response_model=Model)
async def get_model(room: Room, model: str, _: Reader) -> Model:
    """One system by any of its names."""
    for known in _models(room):
        if known.id == model:
            return known
    raise ApiError(404, "There is no such model.", code="model_not_found", param="model")


@router.get("/v1/queue", response_model=Queue)
async def get_queue(room: Room, _: Reader) -> Queue:
    """The queue as a whole, of all keys."""
    return await room.read(_queue, room)


@router.post("/v1/queue", response_model=Queue, openapi_extra=takes(PauseQueue))
async def pause_queue(room: Room, _: Admin, fields: Body) -> Queue:
    """Let workers take no new jobs, or again."""
    await room.write(room.jobs.pause, read_as(PauseQueue, fields).paused)
    return await room.read(_queue, room)


def _queue(room: Service) -> Queue:
    counts = room.jobs.counts()
    return Queue(
        paused=room.jobs.paused(),
        queued=counts["queued"],
        in_progress=counts["in_progress"],
        oldest_queued_age=counts["oldest_queued_age"],
        workers=room.workers_alive(),
    )


@router.post("/v1/expansions", response_model=Expansion, openapi_extra=takes(Expand))
async def expand_prompt(room: Room, _: Maker, fields: Body) -> Expansion:
    """What is made of a prompt for a model to read, by a chat model where this server has one, else by the model's own rules.

    A film gets this very caption when it is asked for with it, as `text` beside the prompt. Without, its worker expands the
    prompt itself, and a chat model may say something else then.
    """
    asked = read_as(Expand, fields)
    return await expanded(room, system_of(room, asked.model)[1], asked.prompt)


@router.get("/v1/provenance/root.pem", response_class=Response, responses={200: {"content": {"application/x-pem-file": {}}}})
async def get_root(room: Room) -> Response:
    """The certificate that this installation's films are signed under. It is public: whoever has a film may check it."""
    pem = await room.read(lambda: room.signer.root_pem())
    named = {"content-disposition": 'attachment; filename="tubelet-root.pem"'}
    return Response(pem, media_type="application/x-pem-file", headers=named)


@router.post("/v1/content_provenance_checks", response_model=ProvenanceCheck, openapi_extra=takes(ProvenanceCheckCreate))
async def check_provenance(room: Room, _: Maker, fields: Body) -> ProvenanceCheck:
    """What a picture or a film says of its origin: its signed metadata, and the mark in its pixels."""
    asked = read_as(ProvenanceCheckCreate, fields)
    if asked.file.bytes > room.config.media_limit:
        raise ApiError(413, f"'file' is larger than {room.config.media_limit} bytes.", code="file_too_large", param="file")
    results = await room.decode(_checked, room, asked.file)
    return ProvenanceCheck(created_at=int(time.time()), results=results)


def _checked(room: Service, upload: Upload) -> list[ProvenanceResult]:
    from tubelet.serve import intake

    data = upload.read()
    media = intake.sniff(data[:64])
    if media is None:
        raise invalid("'file' must be a picture or a film.", "file", "unsupported_media")
    return [_credentials(room.signer.check(data, media)), _mark(room, data)]


def _credentials(said: dict[str, Any]) -> ProvenanceResult:
    at, when = said.get("generated_at"), None
    if at is not None:
        when = datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat().replace("+00:00", "Z")
    return ProvenanceResult(
        type="c2pa",
        outcome="detected" if said["outcome"] == "found" else "not_detected",
        validation_state=said["validation_state"],
        issuer=said.get("issuer"),
        model=said.get("model"),
        generated_at=when,
    )


def _mark(room: Service, data: bytes) -> ProvenanceResult:
    from tubelet.serve import intake, mark

    try:
        found = mark.detect_luma(intake.mean_luma(data), room.signer.mark_key)
    except intake.Refused as refused:
        why = f"It could not be looked for. {refused.message}"
        return ProvenanceResult(type="watermark", outcome="not_detected", validation_state="not_present", reason=why)
    if found is None:
        return ProvenanceResult(type="watermark", outcome="not_detected", validation_state="not_present")
    return ProvenanceResult(type="watermark", outcome="detected", validation_state="valid", model="tubelet")


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", response_model=Health, responses={503: {"model": Health}})
async def readyz(room: Room) -> Response:
    """The server can take a job and make a film: its database can be written, its disk has room, each of its systems is loaded
    by a worker."""
    writable = await room.writable()
    checks = {"database": writable, **await room.ask(_ready, room), "taking_jobs": not room.draining}
    fine = all(checks.values())
    health = Health(status="ok" if fine else "unavailable", checks=checks)
    return JSONResponse(health.model_dump(), 200 if fine else 503, {} if fine else {"retry-after": "5"})


def _ready(room: Service) -> dict[str, bool]:
    try:
        worker = set(room.config.systems) <= {said.get("system") for said in room.workers()}
    except StorageFull:
        worker = False
    return {"disk": room.store.roomy(), "worker": worker}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def get_metrics(room: Room, _: Admin) -> Response:
    """Figures for Prometheus."""

    def page() -> str:
        room.metrics.measure(room.stock(), room.store.free(), room.feed.listeners)
        return room.metrics.page()

    return Response(await room.read(page), media_type=CONTENT_TYPE)


@router.get("/openapi.json", include_in_schema=False)
async def get_description(request: Request) -> JSONResponse:
    """The description of this API."""
    return JSONResponse(request.app.openapi())
