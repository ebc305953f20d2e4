"""Webhooks: who is told of films that end, the signature of each message, and its delivery until it is taken.

Messages follow Standard Webhooks. The job store writes one into the outbox in the transaction that ends a job, so none is lost;
it stays there until a receiver has answered 2xx, so one may come twice, under the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from anyio import CapacityLimiter

from tubelet.serve.logs import log_failure, say
from tubelet.serve.metrics import Metrics
from tubelet.serve.outbound import Outbound, Unreachable
from tubelet.serve.records import StorageFull

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs

ENDPOINTS, OUTBOX = "webhook_endpoint", "outbox"
FIRST, FACTOR, LONGEST = 5.0, 4.0, 6 * 3600.0
"""Seconds from a failed try to the next: at first, by how much longer each time, at most."""
GIVE_UP = 72 * 3600.0
"""Seconds after the event when no further try is made."""
OVERLAP = 24 * 3600.0
"""Seconds that an old secret may go on beside its successor."""
TIMEOUT = 5.0
LOOK = 1.0
"""Seconds between two looks into the outbox."""
ABREAST, OF_ONE, BEHIND = 16, 2, 32
"""Deliveries at once, of all endpoints and of one, so that a slow one does not hold up the others; and how many of one wait for
their turn."""


def new_secret() -> str:
    """A signing secret, as receivers are given it."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """The signature of a message under one secret: `v1,` and the base64 of an HMAC-SHA256."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.new(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def message(id: str, kind: str, job: str, created_at: float) -> bytes:
    """The body of a message: what happened, to which film, when."""
    event = {"id": id, "object": "event", "type": kind, "created_at": int(created_at), "data": {"id": job}}
    return json.dumps(event, separators=(",", ":")).encode()


def secrets_of(endpoint: Mapping[str, Any], now: float) -> list[str]:
    """The secrets that sign for an endpoint: its own, and for a day its last one if it was asked to go on."""
    old = endpoint.get("old_secret")
    return [endpoint["secret"], *([old] if old and endpoint.get("old_until", 0) > now else [])]


def headers_of(endpoint: Mapping[str, Any], id: str, body: bytes, now: float) -> dict[str, str]:
    """The headers of a message."""
    signatures = [sign(secret, id, int(now), body) for secret in secrets_of(endpoint, now)]
    return {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(int(now)),
        "webhook-signature": " ".join(signatures),
    }


def pause_after(tries: int) -> float:
    """Seconds to wait after so many failed tries: 5 s, 20 s, 80 s, ... up to 6 h."""
    return min(FIRST * FACTOR ** min(tries - 1, 32), LONGEST)


@dataclass
class Deliveries:
    """The loop that empties the outbox. One per database: a second one would deliver messages twice."""

    jobs: Jobs
    outbound: Outbound
    metrics: Metrics
    clock: Callable[[], float] = time.time
    limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(ABREAST), repr=False)
    woken: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    async def run(self) -> None:
        """Deliver until cancelled. A slow receiver holds up nobody else's messages."""
        busy: dict[str, str] = {}
        """The endpoint of each message that is on its way."""
        failed: dict[str, float] = {}
        """When messages that could not even be tried may be tried again."""
        turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(OF_ONE))
        tasks: set[asyncio.Task[None]] = set()

        async def deliver(document: dict[str, Any]) -> None:
            try:
                async with turns[document["endpoint"]]:
                    await anyio.to_thread.run_sync(self.attempt, document, limiter=self.limiter)
            except StorageFull:
                pass  # the message is still in the outbox as it was
            except Exception as error:  # noqa: BLE001  one message must not hold up the others
                log_failure("webhook", error)
                failed[document["id"]] = self.clock() + LONGEST
            finally:
                busy.pop(document["id"])

        try:
            while True:
                self.woken.clear()
                # What is delivered while the outbox is read may still stand in what was read: such a message is not new.
                underway = set(busy)
                with contextlib.suppress(StorageFull):
                    waiting = await anyio.to_thread.run_sync(self.jobs.all, OUTBOX, None)
                    now, number = self.clock(), Counter(busy.values())
                    for id in [id for id, until in failed.items() if until <= now]:
                        del failed[id]
                    for document in waiting:
                        id, endpoint = document["id"], document["endpoint"]
                        later = document["due"] > now or id in underway or id in failed
                        if later or number[endpoint] >= BEHIND:
                            continue
                        number[endpoint] += 1
                        busy[id] = endpoint
                        task = asyncio.create_task(deliver(document))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                # Not asyncio.wait_for: before Python 3.12 it loses a cancellation that comes with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK):
                        await self.woken.wait()
        finally:
            for task in tasks:
                task.cancel()

    def attempt(self, document: dict[str, Any]) -> None:
        """One try to deliver a message; what comes of it stands in the outbox when this returns."""
        id, owner = document["id"], document.get("owner")
        endpoint = self.jobs.find(ENDPOINTS, document["endpoint"], owner)
        if endpoint is None or document["type"] not in endpoint["event_types"]:
            self._done(id, "dropped")
            return
        now = self.clock()
        body = message(id, document["type"], document["job"], document["created_at"])
        try:
            status = self.outbound.post(endpoint["url"], body, headers_of(endpoint, id, body, now), timeout=TIMEOUT)
        except Unreachable:
            status = 0
        if 200 <= status < 300:
            self._done(id, "delivered")
            return
        tries = document["tries"] + 1
        due = self.clock() + pause_after(tries)
        if due > document["created_at"] + GIVE_UP:
            self._done(id, "given_up")
            return
        self.metrics.deliveries.add("failed")
        # The endpoint, and with it its messages, may have been deleted meanwhile.
        if self.jobs.find(OUTBOX, id, None) is not None:
            self.jobs.put(OUTBOX, id, owner or "local", {**document, "tries": tries, "due": due, "last_status": status})

    def _done(self, id: str, result: str) -> None:
        self.jobs.drop(OUTBOX, id, None)
        self.metrics.deliveries.add(result)
        if result == "given_up":
            say("webhook_given_up", level=logging.WARNING, webhook_id=id)
