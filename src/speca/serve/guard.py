"""What stands before every route: the request's id, its API key, the size of its body, its line in the log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import Fault, closing, of_error
from .logs import request_id
from .metrics import Metrics

log = logging.getLogger("speca.serve")

OPEN = ("/health", "/ready", "/version", "/", "/playground")
"""Paths that need no API key, and those below them."""

BODY_S, BODY_RATE = 30.0, 16_384.0
"""Seconds that a request's body may take to come, and one more for each so many bytes of it."""

READ_S = 60.0
"""Seconds that a client may take to read the next part of an answer."""

ID = re.compile(r"[\w.-]{1,64}")

SAFE = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware. `scope["state"]` gets `request_id` and `caller`: a name of the API key, or the address."""

    def __init__(self, app: ASGIApp, *, keys: Iterable[str], body: int, metrics: Metrics) -> None:
        """
        Args:
            app: what comes after it.
            keys: API keys; if there are none, none is asked for.
            body: most bytes of a request.
            metrics: where answers are counted.
        """
        self.app, self.body, self.metrics = app, body, metrics
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        token, status = request_id.set(name), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = name
                for header, value in SAFE.items():
                    out.setdefault(header, value)
            try:
                await asyncio.wait_for(send(message), READ_S)
            except asyncio.TimeoutError:  # it has stopped to read, and would hold what it asked for
                raise ClientDisconnect from None

        try:
            state = scope.setdefault("state", {})
            state["request_id"], state["caller"] = name, self._caller(scope, headers)
            await self.app(scope, self._limited(headers, receive), answer)
        except ClientDisconnect:  # nobody is there to be answered
            pass
        except asyncio.CancelledError:  # the server ends, and the request would not by itself
            if status:
                raise
            await closing().response()(scope, receive, answer)
        except Exception as error:  # answered here, as what stands before would name no request id
            if status:
                raise
            await of_error(error).response()(scope, receive, answer)
        finally:
            self._note(scope, status, time.perf_counter() - began)
            request_id.reset(token)

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """Whose request it is. Raises `Fault` 401 without a valid key where one is needed."""
        client = scope.get("client")
        address = client[0] if client else "local"
        path = scope["path"]
        if not self.keys or path in OPEN or path.startswith("/playground/") or scope["method"] == "OPTIONS":
            return f"address:{address}"
        scheme, _, given = headers.get("authorization", "").partition(" ")
        offered = given.strip().encode() if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(offered, key) for key in self.keys]  # all of them, so that time tells nothing
        if not any(matches):
            self.metrics.refused.labels("key").inc()
            raise Fault(
                401, "give a valid API key: Authorization: Bearer KEY.", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return f"key:{matches.index(True)}"

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """`receive`, which raises `Fault` 413 for a body that is too large and 408 for one that does not come."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.body:
            raise self._too_large()
        loop = asyncio.get_running_loop()
        began, seen, complete = loop.time(), 0, False

        async def limited() -> Message:
            nonlocal seen, complete
            if complete:
                return await receive()  # tells when the client has left
            try:
                message = await asyncio.wait_for(receive(), began + BODY_S + seen / BODY_RATE - loop.time())
            except asyncio.TimeoutError:
                text = f"the body came too slowly: {seen} bytes in {loop.time() - began:.0f} s."
                raise Fault(408, text, code="timeout") from None
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if seen > self.body:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> Fault:
        self.metrics.refused.labels("body").inc()
        return Fault(413, f"the request is larger than {self.body} bytes.", code="request_too_large")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route: Any = scope.get("route")
        path = getattr(route, "path", "other")  # never the path itself, which may be anything
        self.metrics.answers.labels(path, str(status or 499)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        level = logging.DEBUG if path in ("/health", "/ready", "/metrics") else logging.INFO
        extra = {
            "method": scope["method"],
            "path": scope["path"],
            "status": status or 499,
            "seconds": round(seconds, 4),
        }
        log.log(level, "answered" if status else "the client left", extra=extra)
