"""The one error object of the wire, `{"error": {message, type, param, code}}`, and everything that ends in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from tubelet.core.errors import UserError
from tubelet.serve.records import KeyConflict, QueueFull, StorageFull

LONGEST_WAIT = 60
"""Seconds. Clients give up, rather than wait, when they are told to wait longer than two minutes."""
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 416: "range_not_satisfiable"}


class ApiError(Exception):
    """An answer that is not the one that was asked for.

    `status`: HTTP status. `message`: one sentence for a person. `code`: a stable word for a program. `param`: the field that is
    to blame. `retry_after`: seconds after which the same request may work; it also tells the client to try again. Without it a
    status below 500 tells the client not to.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(min(max(1, retry_after), LONGEST_WAIT))
            self.headers["x-should-retry"] = "true"
        elif status < 500:
            self.headers["x-should-retry"] = "false"

    @property
    def comes_again(self) -> bool:
        """Whether a client sends the same request again after this."""
        return self.headers.get("x-should-retry") != "false"

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A wrong value: HTTP 400."""
    return ApiError(400, message, code=code, param=param)


def not_found(what: str) -> ApiError:
    """HTTP 404 for a thing that is not there, or is somebody else's: the two look the same."""
    return ApiError(404, f"There is no such {what}.", code="not_found")


def of_validation(error: ValidationError | RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body or a query. The value itself is never repeated."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("query", "path", "header", "body")]
    param = ".".join(place)[:64] or None
    kind, said = first["type"], str(first["msg"])
    if kind == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        return invalid(f"Unknown parameter: '{param}'.", param, "unknown_parameter")
    if kind == "is_instance_of":
        return invalid(f"'{param}' must be a file, sent as a part of a multipart form.", param, "invalid_type")
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    if kind.startswith("api:"):
        code = kind.removeprefix("api:")
    return invalid(f"Invalid value for '{param}': {said[:1].lower()}{said[1:]}", param, code)


def of(error: Exception) -> ApiError:
    """Any exception as an answer. One that nobody foresaw says nothing of what it was."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(
                429, "The queue is full; try again soon.", code="queue_full", retry_after=min(error.retry_after, LONGEST_WAIT)
            )
        case StorageFull():
            return ApiError(
                503,
                "The disk or the object store is full, or does not answer; make room or try again later.",
                code="storage_full",
                retry_after=30,
            )
        case KeyConflict():
            return ApiError(409, "This idempotency key was used with another request; take a new one.", code="key_conflict")
        case UserError():
            return invalid(str(error))
        case ValidationError() | RequestValidationError():
            return of_validation(error)
        case HTTPException():
            code = _CODES.get(error.status_code, "invalid_request")
            said = {404: "There is nothing at this address.", 405: "This address does not answer this method."}
            return ApiError(error.status_code, said.get(error.status_code, str(error.detail)), code=code)
        case _:
            return ApiError(500, "Something went wrong on the server; its log says what.", code="internal_error")


def install(app: FastAPI) -> None:
    """Make every foreseen exception of `app` end in the error object."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        said = of(error)
        if said.status == 405:  # the exception knows the methods of the first route with this path alone
            several = (route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE)
            methods = {method for route in several for method in getattr(route, "methods", None) or ()}
            said.headers["allow"] = ", ".join(sorted(methods))
        request.app.state.service.metrics.rejected.add(said.code)
        return said.response()

    wrong = (ApiError, HTTPException, RequestValidationError, ValidationError, UserError)
    for kind in (*wrong, QueueFull, StorageFull, KeyConflict):
        app.add_exception_handler(kind, answer)
