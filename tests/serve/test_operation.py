"""What operators rely on: keys, limits, back-pressure, cancelling, draining, jobs that outlive the process, metrics."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from serve.conftest import STEPS
from serve.served import Served, serving
from speca import zoo
from speca.serve.settings import Limits, ModelConfig, ServerConfig


def until(check: Callable[[], Any], seconds: float = 30) -> Any:
    """What `check` returns once it is true."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


def live(served: Served) -> int:
    """Requests that the engines have under way or queued."""
    return sum(e.statistics["live"] + e.statistics["queued"] for _, e in served.server.engines())


def config(folder: Path, *models: str, **more: Any) -> ServerConfig:
    return ServerConfig(models=tuple(ModelConfig(model=m) for m in models), steps=STEPS, jobs=folder, **more)


# ------------------------------------------------------------------------------------------------ keys
def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# of the shop\nsecret-one\n")
    monkeypatch.setenv("SPECA_API_KEYS", "secret-two")
    with serving(config(tmp_path / "jobs", "fashion-dit", api_keys=tmp_path / "keys")) as served:
        with httpx.Client(base_url=served.url) as http:
            assert http.get("/health").status_code == http.get("/ready").status_code == 200
            refused = http.get("/v1/models")
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert http.get("/metrics").status_code == 401
        clients = [openai.OpenAI(base_url=f"{served.url}/v1", api_key=f"secret-{n}") for n in ("one", "two")]
        first = clients[0].images.generate(prompt="bag", response_format="url")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret").models.list()
        assert first.data is not None
        addresses = [httpx.get(str(first.data[0].url), headers=c.auth_headers).status_code for c in clients]
        assert addresses == [200, 404]  # what one key has made, no other sees


def test_a_server_for_others_needs_keys(tmp_path: Path) -> None:
    from speca import ConfigError
    from speca.serve.settings import read

    with pytest.raises(ConfigError, match="no API keys are set"):
        read(None, {"host": "0.0.0.0"})
    assert read(None, {"host": "0.0.0.0", "open": True}).host == "0.0.0.0"
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(ConfigError, match="has no key"):
        read(None, {"host": "0.0.0.0", "api_keys": tmp_path / "keys"})


# ------------------------------------------------------------------------------------------------ limits
def test_bodies_are_bounded(served: Served) -> None:
    most = served.server.config.limits.body
    with httpx.Client(base_url=served.url, timeout=30) as http:
        assert http.post("/v1/images/generations", content=b" " * (most + 1)).status_code == 413

        def endless() -> Any:
            for _ in range(most // 2**20 + 2):
                yield b" " * 2**20

        assert http.post("/v1/images/generations", content=endless()).status_code == 413
        assert http.post("/v1/images/generations", content=b"{").json()["error"]["code"] == "invalid_json"
        wrong = [
            (b"[1]", "no JSON object"),
            (b"[" * 100_000, "no valid JSON"),
            (b'{"model": "fashion-dit", "prompt": "\\ud800"}', "valid string"),
            (b'{"prompt": "bag", "guidance_scale": 1e400}', "guidance_scale"),
            (b'{"prompt": "bag", "guidance_scale": NaN}', "guidance_scale"),
        ]
        for content, words in wrong:
            told = http.post("/v1/images/generations", content=content)
            assert told.status_code == 400 and words in told.json()["error"]["message"], told.text
        assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert http.get("/v1/images/generations").status_code == 405


def test_large_pictures_are_refused_before_they_are_decoded(served: Served) -> None:
    file = io.BytesIO()
    Image.new("1", (8000, 8000)).save(file, "PNG")  # a few kilobytes
    answer = httpx.post(
        f"{served.url}/v1/images/edits", data={"model": "emoji-flux", "prompt": "x"}, files={"image": file.getvalue()}
    )
    assert answer.status_code == 400 and "8000x8000" in answer.json()["error"]["message"]


def test_sizes_that_a_pipeline_refuses_are_the_clients_fault(tmp_path: Path) -> None:
    with serving(config(tmp_path, "emoji-unet")) as served:
        fields = {"prompt": "red apple", "size": "65x64"}
        answer = httpx.post(f"{served.url}/v1/images/generations", json=fields, timeout=60)
        assert answer.status_code == 400 and "divisible by 8" in answer.json()["error"]["message"]


def test_jobs_let_others_go_first(served: Served) -> None:
    """Long jobs under way do not make the server refuse an image, nor are they finished before it."""
    fields = {"model": "emoji-flux", "prompt": "moon", "num_inference_steps": 60, "preset": "full", "n": 10}
    job = httpx.post(f"{served.url}/v1/jobs", json=fields).json()
    until(lambda: live(served) >= 10)
    answer = httpx.post(
        f"{served.url}/v1/images/generations", json={"model": "emoji-flux", "prompt": "moon"}, timeout=60
    )
    assert answer.status_code == 200
    assert httpx.get(f"{served.url}/v1/jobs/{job['id']}").json()["status"] == "in_progress"
    assert httpx.delete(f"{served.url}/v1/jobs/{job['id']}").json()["deleted"]
    until(lambda: live(served) == 0, 5)


def test_a_job_has_its_seed_from_the_beginning(served: Served) -> None:
    """So that a job that is run again, by another server, draws the same."""
    job = httpx.post(f"{served.url}/v1/jobs", json={"model": "fashion-dit", "prompt": "bag", "seed": None}).json()
    kept = served.server.jobs.get(job["id"])
    assert kept is not None
    found = until(lambda: _completed(served.url, job["id"]))
    assert found["data"][0]["speca"]["seed"] == kept.request["fields"]["seed"]


def test_images_have_a_deadline_and_jobs_have_none(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from speca.engine import Engine

    asked: list[dict[str, Any]] = []
    post = Engine.post
    monkeypatch.setattr(Engine, "post", lambda self, **one: (asked.append(one), post(self, **one))[1])
    fields = {"model": "fashion-dit", "prompt": "bag"}
    job = httpx.post(f"{served.url}/v1/jobs", json=fields).json()
    until(lambda: httpx.get(f"{served.url}/v1/jobs/{job['id']}").json()["status"] == "completed")
    httpx.post(f"{served.url}/v1/images/generations", json=fields, timeout=60)
    assert [one["deadline"] for one in asked] == [None, served.server.config.limits.deadline_s]
    assert asked[0]["priority"] < -served.server.config.limits.priority <= asked[1]["priority"]


def test_callers_have_so_many_images_under_way(tmp_path: Path) -> None:
    with serving(config(tmp_path, "emoji-flux", limits=Limits(per_key=2))) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.images.generate(prompt="x", n=3)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert client.images.generate(prompt="x", n=2).data is not None


def test_a_queue_that_is_too_long_is_refused_with_an_honest_time(tmp_path: Path) -> None:
    """Of a burst some wait, the others are told when to come again; who does is served."""
    limits = Limits(per_key=1000)
    with serving(config(tmp_path, "emoji-flux", max_batch=2, limits=limits)) as served:
        codes: list[int] = []
        waits: list[int] = []

        def ask(seed: int) -> None:
            fields = {"prompt": "red apple", "seed": seed, "num_inference_steps": 40, "preset": "full"}
            answer = httpx.post(f"{served.url}/v1/images/generations", json=fields, timeout=120)
            codes.append(answer.status_code)
            if answer.status_code == 429:
                waits.append(int(answer.headers["retry-after"]))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(40)]
        for thread in threads:
            thread.start()
            time.sleep(0.01)
        for thread in threads:
            thread.join()
        assert set(codes) == {200, 429} and all(1 <= wait <= 60 for wait in waits)
        ask(0)
        assert codes[-1] == 200
        assert served.server.metrics.refused.labels("wait")._value.get() == len(waits)


def test_a_client_that_stops_to_read_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer ends when its next part was not read for a while."""
    from speca.serve import guard
    from speca.serve.metrics import Metrics

    monkeypatch.setattr(guard, "READ_S", 0.05)
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            ended.append("let go")

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    stand = guard.Guard(app, keys=(), body=100, metrics=Metrics(lambda: ()))
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("1.2.3.4", 5)}
    asyncio.run(asyncio.wait_for(stand(scope, receive, send), 10))
    assert ended == ["let go"]


# ------------------------------------------------------------------------------------------------ cancelling
SLOW = {"model": "emoji-flux", "prompt": "red apple", "num_inference_steps": 60, "preset": "full", "n": 8}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_its_images(served: Served, stream: bool) -> None:
    """Whether it waits for an answer or reads a stream, nothing of its request is left, and others are served."""
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({**SLOW, "stream": stream}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        until(lambda: live(served) >= 8)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    until(lambda: live(served) == 0, 5)
    assert not served.server.running.counts and not served.server.running.cancels


@pytest.mark.parametrize("stream", [False, True])
def test_delete_cancels_a_request(served: Served, stream: bool) -> None:
    found: list[Any] = []

    def ask() -> None:
        headers = {"x-request-id": f"mine-{stream}"}
        fields = {**SLOW, "stream": stream}
        found.append(httpx.post(f"{served.url}/v1/images/generations", json=fields, headers=headers, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: live(served) >= 8)
    address = f"{served.url}/v1/requests/mine-{stream}"
    assert httpx.delete(address).json()["deleted"]
    thread.join()
    until(lambda: live(served) == 0, 5)
    if stream:
        assert found[0].status_code == 200 and '"code": "cancelled"' in found[0].text
    else:
        assert found[0].status_code == 499 and found[0].json()["error"]["code"] == "cancelled"
    assert httpx.delete(address).status_code == 404


def test_a_repeat_with_the_same_key_gets_the_first_answer(served: Served) -> None:
    fields = {"model": "emoji-flux", "prompt": "moon"}

    def ask(**more: Any) -> httpx.Response:
        headers = {"idempotency-key": "once"}
        return httpx.post(f"{served.url}/v1/images/generations", json={**fields, **more}, headers=headers, timeout=60)

    first, second = ask(), ask()
    assert first.json()["data"][0]["speca"]["seed"] == second.json()["data"][0]["speca"]["seed"]
    assert first.content == second.content
    assert ask(prompt="sun").status_code == 400


# ------------------------------------------------------------------------------------------------ operation
def test_metrics_are_counted(served: Served) -> None:
    before = _metrics(served)
    httpx.post(
        f"{served.url}/v1/images/generations", json={"model": "fashion-dit", "prompt": "bag", "speedup": 3}, timeout=60
    )
    after = _metrics(served)

    def gained(name: str, **labels: str) -> float:
        return after.get((name, *sorted(labels.values())), 0.0) - before.get((name, *sorted(labels.values())), 0.0)

    full = gained("speca_steps_total", model="fashion-dit", decision="full")
    assert (
        0 < full <= STEPS // 3 and full + gained("speca_steps_total", model="fashion-dit", decision="accepted") == STEPS
    )
    assert gained("speca_total_seconds_count", model="fashion-dit") == 1
    assert gained("speca_http_answers_total", path="/v1/images/generations", status="200") == 1
    assert gained("speca_engine_done_total", model="fashion-dit") == 1
    assert gained("speca_first_step_seconds_count", model="fashion-dit") == 1
    assert gained("speca_lane_seconds_count", model="fashion-dit", lane="full") == full
    assert after["speca_engine_alive", "fashion-dit"] == 1


def test_the_dashboard_asks_for_metrics_that_exist(served: Served) -> None:
    names = {name for name, *_ in _metrics(served)} | {"speca_refused_total", "speca_cancelled_total"}
    board = (Path(__file__).parents[2] / "examples" / "serve" / "grafana.json").read_text(encoding="utf-8")
    asked = {name.replace("_bucket", "_count") for name in re.findall(r"speca_\w+", board)}
    assert len(asked) > 8 and asked <= names, asked - names


def test_the_api_describes_itself(served: Served) -> None:
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    body = paths["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    assert body["example"]["prompt"] and "num_inference_steps" in body["schema"]["properties"]
    assert {"/v1/images/edits", "/v1/videos/{name}/content", "/v1/requests/{request_id}", "/metrics"} <= set(paths)


def test_a_load_is_measured(served: Served) -> None:
    """`speca load` against the server: figures of all that was answered, and the images it compares."""
    from typer.testing import CliRunner

    from speca.cli.main import app

    arguments = ["load", served.url, "--model", "fashion-dit", "--rate", "8", "--seconds", "2", "--prompt", "bag",
                 "--prompt", "coat", "--compared", "2", "--speedup", "3", "--json"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["images"] > 3 and found["failed"] == 0 and 0 < found["full_share"] <= 1 / 3
    assert found["seconds"]["p50"] <= found["seconds"]["p99"] and 15 < found["psnr"]["median"] < 100
    wrong = CliRunner().invoke(app, ["load", "http://127.0.0.1:9", "--prompt", "x"])
    assert wrong.exit_code == 2 and "there is no server at" in wrong.stderr


def _metrics(served: Served) -> dict[tuple[str, ...], float]:
    text = httpx.get(f"{served.url}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *sorted(s.labels.values())): s.value for s in samples if "le" not in s.labels}


def test_an_engine_that_died_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(config(tmp_path, "fashion-dit")) as served:
        backend = served.server.backends["fashion-dit"]
        monkeypatch.setattr(type(backend), "alive", False)
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert httpx.get(f"{served.url}/ready").status_code == 503
        monkeypatch.undo()


def test_a_model_that_does_not_load_leaves_the_others(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    from speca.serve.app import create_app

    with TestClient(create_app(config(tmp_path, "no-such-model", "fashion-dit"))) as http:
        until(lambda: http.get("/ready").json()["models"]["fashion-dit"] == "ready", 60)
        answer = http.post("/v1/images/generations", json={"model": "no-such-model", "prompt": "x"})
        assert answer.status_code == 503 and "no bundled model" in answer.json()["error"]["message"]
        assert http.get("/ready").status_code == 503
        assert http.post("/v1/images/generations", json={"model": "fashion-dit", "prompt": "bag"}).status_code == 200


def test_nothing_is_told_of_the_inside(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from speca.engine import Engine

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(Engine, "post", broken)
    answer = httpx.post(f"{served.url}/v1/images/generations", json={"model": "fashion-dit", "prompt": "bag"})
    assert answer.status_code == 500 and "secret" not in answer.text and answer.headers["x-should-retry"] == "false"


# ------------------------------------------------------------------------------------------------ processes
def start(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, once it is ready, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import speca.cli; speca.cli.main()"
    command = [sys.executable, "-c", code, "serve", "emoji-flux", "--port", str(port), "--jobs", str(folder),
               "--threads", "1", "--steps", str(STEPS), "--log", "json", *flags]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "SPECA_CACHE": ""})
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    until(ready, 120)
    return process, url


def test_a_killed_server_loses_no_job(tmp_path: Path) -> None:
    process, url = start(tmp_path)
    done = httpx.post(f"{url}/v1/jobs", json={"prompt": "moon", "seed": 1, "num_inference_steps": 8}).json()
    until(lambda: httpx.get(f"{url}/v1/jobs/{done['id']}").json()["status"] == "completed")
    fields = {"prompt": "red apple", "seed": 2, "num_inference_steps": 60, "preset": "full", "n": 2}
    pending = [httpx.post(f"{url}/v1/jobs", json=fields).json()["id"] for _ in range(3)]
    until(lambda: httpx.get(f"{url}/v1/jobs/{pending[0]}").json()["status"] == "in_progress")
    process.kill()
    process.wait()
    process, url = start(tmp_path)
    try:
        assert httpx.get(f"{url}/v1/jobs/{done['id']}").json()["status"] == "completed"
        content = httpx.get(f"{url}/v1/images/{done['id']}/content")
        assert Image.open(io.BytesIO(content.content)).size == (64, 64)
        for name in pending:
            found = until(lambda n=name: _completed(url, n), 60)
            assert [image["speca"]["seed"] for image in found["data"]] == [2, 3]
        assert [job["id"] for job in httpx.get(f"{url}/v1/jobs?order=asc").json()["data"]] == [done["id"], *pending]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def _completed(url: str, name: str) -> Any:
    found = httpx.get(f"{url}/v1/jobs/{name}").json()
    assert found["status"] != "failed", found
    return found if found["status"] == "completed" else None


def test_sigterm_finishes_what_is_under_way(tmp_path: Path) -> None:
    """New requests are refused with 503, the one under way is answered, and the process ends with 0."""
    process, url = start(tmp_path, "--grace-s", "60")
    found: list[httpx.Response] = []
    fields = {"prompt": "red apple", "seed": 2, "num_inference_steps": 100, "preset": "full", "n": 4}
    thread = threading.Thread(
        target=lambda: found.append(httpx.post(f"{url}/v1/images/generations", json=fields, timeout=90))
    )
    thread.start()
    until(lambda: 'speca_engine_live{model="emoji-flux"} 4' in httpx.get(f"{url}/metrics").text)
    process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/ready").status_code == 503)
    refused = httpx.post(f"{url}/v1/images/generations", json={"prompt": "x"})
    assert refused.status_code == 503 and refused.headers["x-should-retry"] == "false"
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        openai.OpenAI(base_url=f"{url}/v1", api_key="none").images.generate(prompt="x")
    thread.join()
    assert found[0].status_code == 200 and len(found[0].json()["data"]) == 4
    assert process.wait(30) == 0
    assert process.stderr is not None
    lines = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
    answered = [line for line in lines if line["message"] == "answered" and line["path"] == "/v1/images/generations"]
    assert [line["status"] for line in answered] == [503, 503, 200] and answered[2]["request_id"].startswith("req_")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process, url = start(tmp_path, "--grace-s", "600")
    fields = {"prompt": "x", "num_inference_steps": 250, "preset": "full", "n": 10}
    assert httpx.post(f"{url}/v1/jobs", json=fields).status_code == 200
    process.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/ready").status_code == 503)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert time.monotonic() - began < 15


def test_the_store_of_jobs_expires_and_lists(tmp_path: Path) -> None:
    from speca.serve.jobs import JobStore

    store = JobStore(tmp_path, keep_s=100)
    jobs = [store.add("image", "one", "m", {"form": "image", "fields": {"k": k}}, [b"a", b"b"]) for k in range(5)]
    assert store.uploads(jobs[0]) == [b"a", b"b"] and store.get(jobs[0].id, "two") is None
    found = store.of_caller("one", "image", after=jobs[1].id, limit=2, newest=False)
    assert [job.id for job in found] == [jobs[2].id, jobs[3].id]
    assert [j.id for j in store.of_caller("one", "image", after=jobs[1].id, limit=9, newest=True)] == [jobs[0].id]
    assert store.keep(jobs[0].id, {"x.png": b"x"}, [{"seed": 1}])
    store.change(jobs[0].id, ended=time.time() - 101)
    store.delete(jobs[1].id)
    assert not store.keep(jobs[1].id, {"x.png": b"x"}, [])
    assert store.expire() == 1 and not store.place(jobs[0].id).exists()
    assert [job.id for job in store.unfinished()] == [job.id for job in jobs[2:]]
    store.close()


def test_base64_of_a_picture_is_what_the_pipeline_draws(served: Served) -> None:
    """The server changes nothing: its picture is that of a plain call with the same settings."""
    import speca

    pipe = zoo.load("fashion-dit")
    pipe.set_progress_bar_config(disable=True)
    speca.enable(pipe, "balanced", speedup=3)
    import torch

    number = pipe.labels["bag"]
    call = dict(class_labels=[number], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(11))
    expected = pipe(**call).images[0]
    fields = {"model": "fashion-dit", "prompt": "bag", "seed": 11, "speedup": 3}
    answer = httpx.post(f"{served.url}/v1/images/generations", json=fields, timeout=60).json()
    found = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert found.tobytes() == expected.tobytes()
