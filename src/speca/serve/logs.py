"""The server's log: one line a request, as text or as JSON, with the id of the request."""

from __future__ import annotations

import contextvars
import json
import logging
import logging.config
import time
from typing import Any, Literal

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
"""The id of the request that is answered in this context."""

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id"}


class _WithId(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


class Json(logging.Formatter):
    """One JSON object a line: time, level, logger, request id, message, and what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Text(logging.Formatter):
    """Time, level, request id and message, then what was given as `extra`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s [%(request_id)s] %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        extra = " ".join(f"{name}={value}" for name, value in vars(record).items() if name not in _PLAIN)
        return f"{super().format(record)} {extra}".rstrip()


def configure(form: Literal["text", "json"]) -> None:
    """Write the logs of the server, the engine and uvicorn to stderr in one form."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if form == "json" else Text())
    handler.addFilter(_WithId())
    for name in ("speca", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True  # the server logs each request itself
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers = [handler]
