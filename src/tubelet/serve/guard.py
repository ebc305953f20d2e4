"""The outermost door: which names, pages and methods may speak to this server, and the headers that every answer carries.

A web page on any site can post a form to a server on the visitor's own machine without asking first (multipart is a "simple"
request). So every request says where it comes from, and what comes from another site's page is refused.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tubelet.serve.config import ServeConfig
from tubelet.serve.errors import ApiError, of
from tubelet.serve.logs import log_failure, say
from tubelet.serve.metrics import Metrics
from tubelet.serve.traces import id_of, parent_of

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
ANSWER_HEADERS = "tubelet.headers"
"""Key of the request's scope under which others leave headers for the answer."""
LATE = "tubelet.late"
"""Key of the request's scope under which the connection leaves its answer to a body that came too slowly."""
API_POLICY = "default-src 'none'; sandbox; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
STUDIO_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "font-src 'self'; connect-src 'self'; manifest-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
GONE = 499
"""Status in the log when the client left before it could be answered."""
EXPOSED = "x-request-id, openai-poll-after-ms, retry-after, content-range, etag"
_ALLOWED = ("authorization", "content-type", "idempotency-key", "last-event-id", "range")
_REMARK = re.compile(r"x-stainless-[a-z0-9-]{1,48}|openai-(organization|project|beta)|user-agent")
_EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def is_api(path: str) -> bool:
    """Whether a path is the API's: everything but the studio's page and its files."""
    return path.startswith(("/v1/", "/metrics", "/healthz", "/readyz", "/openapi.json")) or path == "/v1"


def safe_headers(path: str) -> dict[str, str]:
    """Headers that keep a browser from doing more with an answer than was meant."""
    if is_api(path):
        return {**_EVERYWHERE, "content-security-policy": API_POLICY, "cache-control": "no-store"}
    return {**_EVERYWHERE, "content-security-policy": STUDIO_POLICY, "cache-control": "no-cache"}


def host_of(header: str) -> str:
    """The name in a `Host` header: lower case, without port and brackets; empty when it is none."""
    try:
        parts = urlsplit(f"//{header}")
        parts.port  # noqa: B018  a port that is no number raises
    except ValueError:
        return ""
    plain = parts.netloc == header and "@" not in header and not parts.path
    return (parts.hostname or "") if plain else ""


def check(method: str, path: str, headers: Mapping[str, str], config: ServeConfig) -> None:
    """Raises ApiError unless the request has a known name, an allowed method, and does not come from another site's page."""
    if method not in METHODS:
        raise ApiError(
            405, "This server does not answer this method.", code="method_not_allowed", headers={"allow": ", ".join(METHODS)}
        )
    host = headers.get("host", "")
    if config.allowed_hosts is not None and host_of(host) not in config.allowed_hosts:
        raise ApiError(403, "This server does not answer under this host name.", code="host_not_allowed")
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if origin in config.origins:
        return
    if origin is not None and not _same(origin, host):
        raise ApiError(403, "Pages of this origin may not use this server.", code="origin_not_allowed")
    if is_api(path) and site not in (None, "same-origin", "none"):
        raise ApiError(403, "Pages of other sites may not use this server.", code="origin_not_allowed")
    if method == "OPTIONS":
        raise ApiError(405, "This server does not answer this method.", code="method_not_allowed", headers={"allow": "GET"})


def _same(origin: str, host: str) -> bool:
    scheme, _, rest = origin.partition("://")
    return scheme in ("http", "https") and rest.lower() == host.lower() and rest != ""


def preflight(origin: str, asked: str) -> Response:
    """The answer to a browser that asks whether a page of an allowed origin may send a request with the headers `asked`.

    Among those, the official client's remarks on itself are allowed, of which each version has others.
    """
    remarks = sorted({name for name in asked.lower().replace(" ", "").split(",")[:64] if _REMARK.fullmatch(name)})
    return Response(
        status_code=204,
        headers={
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, POST, DELETE",
            "access-control-allow-headers": ", ".join((*_ALLOWED, *remarks)),
            "access-control-max-age": "600",
        },
    )


class Guard:
    """The middleware around everything: checks, headers, the request's id, one log line, and the last resort for errors."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"this server speaks http, not {scope['type']}")
        started = time.perf_counter()
        headers, path, method = Headers(scope=scope), scope["path"], scope["method"]
        number = f"req_{secrets.token_hex(16)}"
        left: dict[str, str] = {}
        scope[ANSWER_HEADERS] = left
        scope.setdefault("state", {}).update(request_id=number, traceparent=parent_of(headers.getlist("traceparent")))
        origin = headers.get("origin")
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                for name, value in (safe_headers(path) | left).items():
                    answer.setdefault(name, value)
                answer["x-request-id"] = number
                if origin in self.config.origins:
                    answer["access-control-allow-origin"] = origin
                    answer["access-control-expose-headers"] = EXPOSED
                    answer["cross-origin-resource-policy"] = "cross-origin"
                    answer["vary"] = "origin"
            await send(message)

        try:
            check(method, path, headers, self.config)
            if method == "OPTIONS":
                asked = headers.get("access-control-request-headers", "")
                await preflight(headers["origin"], asked)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except ClientDisconnect:
            late = scope.get(LATE)
            if late is not None:
                self.metrics.rejected.add(late.code)
            status = status or (GONE if late is None else late.status)
        except Exception as error:  # noqa: BLE001  the last resort: a client always gets the error object
            said = of(error)
            self.metrics.rejected.add(said.code)
            if said is not error:
                log_failure("request", error, request_id=number)
            if status == 0:
                await said.response()(scope, receive, sending)
        finally:
            self._log(number, method, scope, status, time.perf_counter() - started)

    def _log(self, number: str, method: str, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        known = method if method in METHODS else "other"
        state = scope["state"]
        say(
            "request",
            request_id=number,
            trace_id=id_of(state["traceparent"]),
            method=known,
            route=route,
            status=status,
            ms=round(seconds * 1000, 1),
            owner=state.get("owner"),
            job=state.get("job"),
        )
        self.metrics.requests.add(known, route, str(status))
        self.metrics.latency.observe(route, seconds=seconds)
