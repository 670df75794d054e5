"""Videos, which are always jobs, and images as jobs."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from ..faults import Fault, busy, wrong
from ..jobs import Job
from ..schema import Asked, ImageRequest, VideoRequest, parse
from .common import caller_of, form_of, json_of, server_of

router = APIRouter(tags=["jobs"])
POLL_MS = "500"
MOST_LISTED = 100


@router.post("/v1/videos", openapi_extra={
    "requestBody": {"required": True, "content": {"multipart/form-data": {
        "schema": VideoRequest.model_json_schema(),
        "example": {"model": "emoji-video", "prompt": "a turning planet", "seconds": "1.4", "seed": 7},
    }}},
})  # fmt: skip
async def create_video(request: Request) -> Response:
    """Begin a video; ask for it with GET until it is completed or failed."""
    if request.headers.get("content-type", "").startswith("application/json"):
        asked = parse(VideoRequest, json_of(await request.body()))
    else:
        fields, files = await form_of(request, ("input_reference",))
        if files["input_reference"]:
            raise wrong("videos that begin with a picture are not made here.", "input_reference")
        asked = parse(VideoRequest, fields, text=True)
    return await _begin(request, asked, "video")


@router.post("/v1/jobs", openapi_extra={
    "requestBody": {"required": True, "content": {"application/json": {"schema": ImageRequest.model_json_schema()}}},
})  # fmt: skip
async def create_job(request: Request) -> Response:
    """Begin images whose results are kept; they go on when the client leaves."""
    asked = parse(ImageRequest, json_of(await request.body()))
    for name in ("stream", "partial_images", "stream_progress", "response_format"):
        if getattr(asked, name):
            raise wrong(f"a job takes no {name}; ask for its progress with GET /v1/jobs/ID.", name)
    return await _begin(request, asked, "image")


@router.get("/v1/videos")
async def list_videos(
    request: Request, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
) -> Response:
    """List the caller's videos."""
    return await _list(request, "video", after, limit, order)


@router.get("/v1/jobs")
async def list_jobs(
    request: Request, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
) -> Response:
    """List the caller's image jobs."""
    return await _list(request, "image", after, limit, order)


@router.get("/v1/videos/{name}")
async def get_video(request: Request, name: str) -> Response:
    """Say how far a video is."""
    return JSONResponse(_told(await _job(request, name, "video")), headers={"openai-poll-after-ms": POLL_MS})


@router.get("/v1/jobs/{name}")
async def get_job(request: Request, name: str) -> Response:
    """Say how far an image job is."""
    return JSONResponse(_told(await _job(request, name, "image")), headers={"openai-poll-after-ms": POLL_MS})


@router.get("/v1/videos/{name}/content")
async def video_content(request: Request, name: str, variant: str = "video") -> Response:
    """Return the clip of a completed video."""
    job = await _job(request, name, "video")
    if variant != "video":
        raise wrong(f"variant={variant!r} is not made; only 'video' is.", "variant")
    if job.status != "completed":
        raise Fault(404, f"the video is {job.status}; ask for it when it is completed.", code="not_ready")
    return FileResponse(server_of(request).jobs.place(name) / job.files[0], media_type="video/mp4")


@router.delete("/v1/videos/{name}")
async def delete_video(request: Request, name: str) -> Response:
    """Cancel a video if it has not ended, and delete it."""
    return await _delete(request, name, "video")


@router.delete("/v1/jobs/{name}")
async def delete_job(request: Request, name: str) -> Response:
    """Cancel an image job if it has not ended, and delete it."""
    return await _delete(request, name, "image")


# ------------------------------------------------------------------------------------------------ inside
async def _begin(request: Request, asked: Asked, kind: Literal["video", "image"]) -> Response:
    server, caller = server_of(request), caller_of(request)
    server.demand_open()
    backend = server.backend(asked.model)
    if backend.task != kind:
        raise wrong(f"{backend.name} makes {backend.task}s; name another model.", "model")
    backend.check(asked, "generate")
    backend.asked(asked, "generate", 0)  # an unknown class is told now, not by a failed job
    if await asyncio.to_thread(server.workers.count, caller) >= server.config.limits.per_key:
        server.metrics.refused.labels("jobs").inc()
        raise busy(5.0, f"{server.config.limits.per_key} jobs of this key have not ended yet, as many as may.")
    fields = {
        "seed": secrets.randbelow(2**31),
        **asked.model_dump(exclude_unset=True, exclude_none=True),
    }  # if run again
    job = await asyncio.to_thread(server.jobs.add, kind, caller, backend.name, {"form": kind, "fields": fields})
    server.workers.begin(job)
    return JSONResponse(_told(job), headers={"openai-poll-after-ms": POLL_MS})


async def _list(request: Request, kind: str, after: str | None, limit: int, order: str) -> Response:
    if not 1 <= limit <= MOST_LISTED:
        raise wrong(f"limit={limit} is out of range; use 1 to {MOST_LISTED}.", "limit")
    jobs = server_of(request).jobs
    found = await asyncio.to_thread(
        jobs.of_caller, caller_of(request), kind, after=after, limit=limit + 1, newest=order == "desc"
    )
    data = [_told(job) for job in found[:limit]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": len(found) > limit})


async def _job(request: Request, name: str, kind: str) -> Job:
    job = await asyncio.to_thread(server_of(request).jobs.get, name, caller_of(request))
    if job is None or job.kind != kind:
        raise Fault(404, f"there is no {kind} {name!r}, or it has expired.", code="not_found")
    return job


async def _delete(request: Request, name: str, kind: str) -> Response:
    job = await _job(request, name, kind)
    await server_of(request).workers.delete(job)
    return JSONResponse({"id": name, "object": f"{kind}.deleted", "deleted": True})


def _told(job: Job) -> dict[str, Any]:
    """What a client is told of a job."""
    fields = job.request.get("fields", {})
    found: dict[str, Any] = {
        "id": job.id, "object": job.kind if job.kind == "video" else "job", "model": job.model, "status": job.status,
        "progress": round(100 * job.progress), "created_at": int(job.created),
        "completed_at": None if job.ended is None else int(job.ended), "expires_at": None,
        "prompt": fields.get("prompt"), "size": fields.get("size") or "auto", "error": job.error,
    }  # fmt: skip
    if job.kind == "video":
        return found | {"seconds": f"{fields.get('seconds', '')}", "speca": job.found[0] if job.found else None}
    return found | {
        "data": [{"url": f"/v1/images/{job.id}/content?index={k}", "speca": told}
                 for k, told in enumerate(job.found or [])],
    }  # fmt: skip
