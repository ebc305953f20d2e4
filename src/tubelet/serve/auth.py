"""Who asks: API keys, what they may do, and how often.

Without keys the server is for the person at this machine, whose objects belong to "local". With keys every object belongs to
the key that made it, and to all others it does not exist.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from tubelet.core.errors import UserError
from tubelet.serve.errors import ApiError
from tubelet.serve.guard import ANSWER_HEADERS
from tubelet.serve.records import KEYS

if TYPE_CHECKING:
    from tubelet.serve.jobs import Jobs

SCOPES = ("read", "create", "admin")
"""read: look at one's own things; create: make, change and delete them; admin: the queue as a whole, the
metrics, and everybody's keys."""
LOCAL = "local"
REQUESTS_PER_MINUTE = 60
QUEUED = 20
RUNNING = 2
LIMITS = ("rpm", "queued", "running", "daily", "stored")
"""Names of the limits of `issue`."""
_KEY = re.compile(r"vs-[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class Caller:
    """Who asks. `owner` is the id of the key or "local"; the others are the limits of `issue`, None for none."""

    owner: str
    scopes: frozenset[str]
    rpm: int | None = None
    queued: int | None = None
    daily: float | None = None
    stored: float | None = None


def issue(
    jobs: Jobs,
    name: str,
    scopes: Sequence[str] = ("read", "create"),
    *,
    rpm: int = REQUESTS_PER_MINUTE,
    queued: int = QUEUED,
    running: int = RUNNING,
    daily: float | None = None,
    stored: float | None = None,
) -> tuple[str, str]:
    """A new key: its id, and the key itself, which is stored nowhere and cannot be shown again.

    `rpm`: requests that change something, per minute; `queued`: jobs of this key that may wait or run; `running`: of these, how
    many may run; `daily`: seconds of film that it may ask for each day; `stored`: GB (10^9 bytes) that its films and files may
    take; None for any. Raises UserError on an unknown scope, a limit below 1, or `stored` not above 0.
    """
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise UserError(f"a key may {', '.join(SCOPES)}, not {unknown[0] if unknown else 'nothing'!r}; choose among them")
    limits = {"rpm": rpm, "queued": queued, "running": running, "daily": daily, "stored": stored}
    for limit, value in limits.items():
        if value is not None and not (value >= 1 if limit != "stored" else value > 0):
            least = "above 0" if limit == "stored" else "at least 1"
            raise UserError(f"{limit}, a limit of a key, must be {least}, got {value}; raise it")
    secret = f"vs-{secrets.token_urlsafe(32)}"
    digest = _digest(secret)
    id = _id(digest)
    facts = {"id": id, "name": name, "hash": digest, "scopes": sorted(set(scopes)), **limits}
    jobs.put(KEYS, id, id, {**facts, "created_at": time.time()})
    return id, secret


def revoke(jobs: Jobs, id: str) -> bool:
    """Make a key worthless from the next request on, and stop what it has waiting and running; what it made stays.

    False when there is no such key.
    """
    gone = jobs.drop(KEYS, id, None)
    if gone:
        jobs.stop(id)
    return gone


def listed(jobs: Jobs) -> list[dict[str, Any]]:
    """All keys, without what would let anybody use them."""
    return [{name: value for name, value in key.items() if name != "hash"} for key in jobs.all(KEYS, None)]


def caller_of(jobs: Jobs, secret: str) -> Caller | None:
    """Whose key this is; None when it is nobody's."""
    if not _KEY.fullmatch(secret):
        return None
    digest = _digest(secret)
    found = jobs.find(KEYS, _id(digest), None)
    if found is None or not hmac.compare_digest(str(found.get("hash", "")), digest):
        return None
    limits = {name: found.get(name) for name in ("rpm", "queued", "daily", "stored")}
    return Caller(str(found["id"]), frozenset(found["scopes"]), **limits)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _id(digest: str) -> str:
    return f"key_{digest[:24]}"


@dataclass
class Allowance:
    """Requests left of each owner: a bucket that holds a minute's worth and fills steadily."""

    clock: Callable[[], float] = time.monotonic
    levels: dict[str, tuple[float, float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self, owner: str, rpm: int) -> tuple[bool, int, float]:
        """Take one: whether there was one, how many are left, and seconds until the next one comes."""
        with self.lock:
            now = self.clock()
            level, then = self.levels.get(owner, (float(rpm), now))
            level = min(float(rpm), level + (now - then) * rpm / 60)
            granted = level >= 1
            level -= granted
            self.levels[owner] = (level, now)
            return granted, int(level), max(0.0, (1 - level) * 60 / rpm)


def _presented(request: Request) -> str:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else ""


class Access:
    """A dependency of a route: the caller, who must have `scope`. Runs before a byte of the body is read."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> Caller:
        """Raises ApiError 401 without a good key, 403 without the scope, 429 when the key asks too often."""
        service = request.app.state.service
        if not service.config.keys:
            caller = Caller(LOCAL, frozenset(SCOPES))
        else:
            found = await run_in_threadpool(caller_of, service.jobs, _presented(request))
            if found is None:
                raise ApiError(
                    401,
                    "This needs a valid API key, sent as 'Authorization: Bearer vs-...'.",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
            caller = found
        request.state.owner = caller.owner
        if self.scope not in caller.scopes:
            raise ApiError(403, f"This key may not {self.scope}.", code="insufficient_scope")
        if caller.rpm is not None and request.method not in ("GET", "HEAD"):
            self._count(request, service.allowance, caller.owner, caller.rpm)
        return caller

    @staticmethod
    def _count(request: Request, allowance: Allowance, owner: str, rpm: int) -> None:
        granted, left, wait = allowance.take(owner, rpm)
        request.scope[ANSWER_HEADERS].update(
            {
                "x-ratelimit-limit-requests": str(rpm),
                "x-ratelimit-remaining-requests": str(left),
                "x-ratelimit-reset-requests": f"{wait:.2f}s",
            }
        )
        if not granted:
            raise ApiError(
                429, f"This key may send {rpm} requests a minute.", code="rate_limit_exceeded", retry_after=math.ceil(wait)
            )
