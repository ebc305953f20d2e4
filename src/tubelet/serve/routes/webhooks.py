"""Webhook endpoints: made, changed, tried out and deleted."""

from __future__ import annotations

import time
from typing import Annotated, Any, get_args

from fastapi import Depends, Query

from tubelet.serve.answers import (
    WebhookEndpoint,
    WebhookEndpointDeleted,
    WebhookEndpointList,
    WebhookEndpointWithSecret,
    WebhookEventTypes,
    WebhookTestResult,
)
from tubelet.serve.auth import Caller
from tubelet.serve.errors import ApiError, invalid, not_found
from tubelet.serve.inputs import checked, new_id
from tubelet.serve.openapi import operations, takes
from tubelet.serve.outbound import Unreachable, target
from tubelet.serve.routes.files import paged
from tubelet.serve.schemas import EventType, WebhookCreate, WebhookRotate, WebhookTest, WebhookUpdate
from tubelet.serve.service import Body, Maker, Reader, Room, Service
from tubelet.serve.submit import read_as
from tubelet.serve.webhooks import ENDPOINTS, OVERLAP, TIMEOUT, headers_of, message, new_secret

router = operations("webhooks")
MOST_ENDPOINTS = 32


def _id(webhook_endpoint_id: str) -> str:
    return checked("we", webhook_endpoint_id)


EndpointId = Annotated[str, Depends(_id)]


async def _found(room: Service, id: str, caller: Caller) -> dict[str, Any]:
    document = await room.read(room.jobs.find, ENDPOINTS, id, caller.owner)
    if document is None:
        raise not_found("webhook endpoint")
    return document


async def _check_url(room: Service, url: str) -> None:
    try:
        await room.ask(target, url, loopback=room.outbound.loopback, resolver=room.outbound.resolver)
    except Unreachable:
        raise invalid("A webhook goes to a public https address.", "url", "invalid_url") from None


def _shown(document: dict[str, Any]) -> WebhookEndpoint:
    return WebhookEndpoint.model_validate({**document, "signing_secret_hint": f"whsec_...{document['secret'][-4:]}"})


def _shown_once(document: dict[str, Any]) -> WebhookEndpointWithSecret:
    return WebhookEndpointWithSecret(**_shown(document).model_dump(), signing_secret=document["secret"])


@router.post("/v1/webhook_endpoints", response_model=WebhookEndpointWithSecret, openapi_extra=takes(WebhookCreate))
async def create_webhook_endpoint(room: Room, caller: Maker, fields: Body) -> WebhookEndpointWithSecret:
    """Be told when films end. The secret of the signatures is shown this once."""
    asked = read_as(WebhookCreate, fields)
    if len(await room.read(room.jobs.all, ENDPOINTS, caller.owner)) >= MOST_ENDPOINTS:
        raise invalid(f"There are already {MOST_ENDPOINTS} endpoints; delete one first.", None, "too_many_endpoints")
    await _check_url(room, asked.url)
    now = int(time.time())
    document = {"id": new_id("we"), "created_at": now, "updated_at": now, "secret": new_secret(), "enabled": True}
    document |= {"name": asked.name, "url": asked.url, "event_types": list(dict.fromkeys(asked.event_types))}
    await room.write(room.jobs.put, ENDPOINTS, document["id"], caller.owner, document)
    return _shown_once(document)


@router.get("/v1/webhook_endpoints", response_model=WebhookEndpointList)
async def list_webhook_endpoints(
    room: Room,
    caller: Reader,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> WebhookEndpointList:
    """The caller's endpoints, newest first, a page at a time."""
    entries, more = paged(await room.read(room.jobs.all, ENDPOINTS, caller.owner), after, limit, "desc")
    data = [_shown(entry) for entry in entries]
    return WebhookEndpointList(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=more
    )


@router.get("/v1/webhook_endpoints/{webhook_endpoint_id}", response_model=WebhookEndpoint)
async def get_webhook_endpoint(room: Room, id: EndpointId, caller: Reader) -> WebhookEndpoint:
    """One endpoint."""
    return _shown(await _found(room, id, caller))


@router.post("/v1/webhook_endpoints/{webhook_endpoint_id}", response_model=WebhookEndpoint, openapi_extra=takes(WebhookUpdate))
async def update_webhook_endpoint(room: Room, id: EndpointId, caller: Maker, fields: Body) -> WebhookEndpoint:
    """Change an endpoint's name, address or events."""
    asked = read_as(WebhookUpdate, fields)
    document = await _found(room, id, caller)
    if asked.url is not None:
        await _check_url(room, asked.url)
    changed = {**document, **asked.model_dump(exclude_none=True)}
    if changed != document:
        changed["updated_at"] = int(time.time())
        await room.write(room.jobs.put, ENDPOINTS, id, caller.owner, changed)
    return _shown(changed)


@router.delete("/v1/webhook_endpoints/{webhook_endpoint_id}", response_model=WebhookEndpointDeleted)
async def delete_webhook_endpoint(room: Room, id: EndpointId, caller: Maker) -> WebhookEndpointDeleted:
    """Forget an endpoint; what has not been delivered to it is dropped."""
    if not await room.write(room.jobs.drop, ENDPOINTS, id, caller.owner):
        raise not_found("webhook endpoint")
    return WebhookEndpointDeleted(id=id)


@router.post(
    "/v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
    response_model=WebhookEndpointWithSecret,
    openapi_extra=takes(WebhookRotate),
)
async def rotate_webhook_secret(room: Room, id: EndpointId, caller: Maker, fields: Body) -> WebhookEndpointWithSecret:
    """Give an endpoint a new secret, which is shown this once."""
    asked = read_as(WebhookRotate, fields)
    document = await _found(room, id, caller)
    now = time.time()
    kept = asked.keep_old_secret_active_for_24_hours
    document |= {"old_secret": document["secret"] if kept else None, "old_until": now + OVERLAP if kept else 0}
    document |= {"secret": new_secret(), "updated_at": int(now)}
    await room.write(room.jobs.put, ENDPOINTS, id, caller.owner, document)
    return _shown_once(document)


@router.post(
    "/v1/webhook_endpoints/{webhook_endpoint_id}/test", response_model=WebhookTestResult, openapi_extra=takes(WebhookTest)
)
async def test_webhook_endpoint(room: Room, id: EndpointId, caller: Maker, fields: Body) -> WebhookTestResult:
    """Send a sample to an endpoint, now, and say how it answered."""
    asked = read_as(WebhookTest, fields)
    document = await _found(room, id, caller)
    number, now = f"wh_test_{new_id('we')[3:]}", time.time()
    body = message(number, asked.event_type, new_id("video"), now)
    try:
        status = await room.ask(
            room.outbound.post, document["url"], body, headers_of(document, number, body, now), timeout=TIMEOUT
        )
    except Unreachable:
        raise ApiError(400, "The endpoint could not be reached.", code="webhook_unreachable") from None
    return WebhookTestResult(webhook_endpoint_id=id, event_type=asked.event_type, status_code=status)


@router.get("/v1/webhook_event_types", response_model=WebhookEventTypes)
async def list_webhook_event_types(_: Reader) -> WebhookEventTypes:
    """What can be told of."""
    return WebhookEventTypes(data=list(get_args(EventType)))
