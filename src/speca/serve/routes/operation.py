"""Models, health, readiness, metrics and the playground."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from ... import __version__
from ..faults import Fault
from .common import server_of

router = APIRouter(tags=["operation"])
PLAYGROUND = Path(__file__).parent.parent / "playground"


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """List the models, and what each takes."""
    backends = server_of(request).backends
    data = [
        {"id": name, "object": "model", "created": 0, "owned_by": "speca", "speca": backend.about()}
        for name, backend in backends.items()
    ]
    return JSONResponse({"object": "list", "data": data})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Say what one model takes."""
    backend = server_of(request).backends.get(name)
    if backend is None:
        raise Fault(404, f"there is no model {name!r}.", code="model_not_found")
    return JSONResponse({"id": name, "object": "model", "created": 0, "owned_by": "speca", "speca": backend.about()})


@router.get("/health")
async def health(request: Request) -> Response:
    """Say whether the process lives: 503 if an engine's thread has ended."""
    server = server_of(request)
    dead = [name for name, backend in server.backends.items() if backend.ready and not backend.alive]
    return JSONResponse({"status": "dead" if dead else "ok", "dead": dead}, 503 if dead else 200)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Say whether requests are taken: all models are warm, and the server does not end."""
    server = server_of(request)
    state = {name: "ready" if b.ready else b.error or "loading" for name, b in server.backends.items()}
    body = {"ready": server.ready, "draining": server.running.draining, "models": state}
    return JSONResponse(body, 200 if server.ready else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the counts in Prometheus' text format."""
    return Response(server_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/version")
async def version() -> Response:
    """Say what runs."""
    return JSONResponse({"speca": __version__, "torch": installed("torch"), "diffusers": installed("diffusers")})


def playground() -> APIRouter:
    """Return the routes of the playground: one page and its files."""
    found = APIRouter(include_in_schema=False)

    @found.get("/")
    async def page() -> Response:
        return FileResponse(PLAYGROUND / "index.html")

    @found.get("/playground/{name}")
    async def file(name: str) -> Response:
        known = {path.name: path for path in PLAYGROUND.iterdir()}
        if name not in known:
            raise Fault(404, f"there is no file {name!r}.", code="not_found")
        return FileResponse(known[name])

    return found
