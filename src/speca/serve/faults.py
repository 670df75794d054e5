"""Errors as clients see them: OpenAI's form, a status, and never a traceback."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..errors import CancelledError, ConfigError, InputError, QueueFullError

log = logging.getLogger("speca.serve")

CANCELLED = 499
"""Status of a request that was cancelled by `DELETE`; OpenAI's clients do not repeat it."""

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Fault(Exception):
    """An error with its status, for the client."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """What the client is sent."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer of the server."""
        return JSONResponse(self.body, self.status, self.headers)


def wrong(message: str, param: str | None = None, code: str = "invalid_value") -> Fault:
    """Return the fault of a request that asks for what cannot be."""
    return Fault(400, message, param=param, code=code)


def busy(seconds: float, message: str) -> Fault:
    """Return the fault of a request that may be repeated after so many seconds."""
    wait = max(1, round(seconds + 0.5))
    return Fault(429, f"{message} Try again in {wait} s.", code="busy", headers={"retry-after": str(wait)})


def closing() -> Fault:
    """Return the fault of a request that comes while the server ends."""
    headers = {"x-should-retry": "false", "retry-after": "30"}
    return Fault(503, "the server is shutting down and takes no more requests.", code="draining", headers=headers)


def of_error(error: BaseException) -> Fault:
    """Return what a client is told of an error that a request failed with."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, QueueFullError):
        return busy(getattr(error, "retry_after", None) or 1.0, "too many requests are waiting.")
    if isinstance(error, CancelledError):
        if "deadline" in str(error):
            return Fault(504, str(error), code="deadline_exceeded", headers={"x-should-retry": "false"})
        return Fault(CANCELLED, "the request was cancelled.", code="cancelled")
    if isinstance(error, (InputError, ConfigError)) or _refused_by_pipeline(error):
        return wrong(str(error))
    log.error("a request failed", exc_info=error)
    return Fault(
        500, "the request failed inside the server; its log says why, under the request id of this answer.",
        code="internal_error", headers={"x-should-retry": "false"},
    )  # fmt: skip


def _refused_by_pipeline(error: BaseException) -> bool:
    """Whether a pipeline's own check of its arguments has raised an error, such as for a size it cannot draw."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, (ValueError, TypeError)) and any(frame.name == "check_inputs" for frame in frames)


def install(app: FastAPI) -> None:
    """Answer all errors in this form."""

    async def on_fault(_: Request, error: Exception) -> JSONResponse:
        return of_error(error).response()

    async def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return Fault(error.status_code, str(error.detail), code=code).response()

    async def on_query(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        fault = error.errors()[0]
        name = str(fault["loc"][-1])
        return wrong(f"{name}={fault['input']!r} is not valid: {fault['msg']}.", name).response()

    app.add_exception_handler(Fault, on_fault)
    app.add_exception_handler(RequestValidationError, on_query)
    app.add_exception_handler(StarletteHTTPException, on_http)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_fault)
