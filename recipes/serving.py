"""Measure the server: images a second against other ways of drawing the same ones, and latency under load.

    python recipes/serving.py                 # about a quarter of an hour on two cores

*Throughput*: the same requests by a loop over the pipeline with and without acceleration, by cache-dit at about as many
full steps, one request at a time and 16 in a call, by the engine in lock-step and as it is, and through the server by
as many clients; rounds of all ways are interleaved, and medians reported. Seconds are those of the processor, with one
thread, so that other work on the machine counts little; those of the server include its clients. PSNR is to the full
run.

*Load*: a server in a process of its own. Its capacity is what 16 clients get that ask again at once. Then requests come
at shares of that (`speca load`), in rounds in turn.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import numpy as np
import torch
import typer
import uvicorn
from PIL import Image

import speca
from speca import zoo
from speca.bench import rivals
from speca.engine import Engine
from speca.reports.comparison import psnr, quantile
from speca.reports.measure import example_call, hardware
from speca.serve import load
from speca.serve.app import create_app
from speca.serve.settings import Limits, ModelConfig, ServerConfig

STEPS, FULL, CACHE_DIT = 30, 8, "F1B0 W3 MC4 R0.8"
SHARES = (0.5, 0.8, 1.2)
BEGIN, END = "<!-- serving:begin -->", "<!-- serving:end -->"
Images = list[np.ndarray[Any, Any]]


def requests_of(pipe: Any, model: str, count: int) -> list[dict[str, Any]]:
    """Requests that differ in seed and condition, one image each."""
    base = {**zoo.call_arguments(model), "num_inference_steps": STEPS}
    return [{**base, **example_call(pipe, [n]), "generator_seed": n} for n in range(count)]


def loop(pipe: Any, requests: Sequence[dict[str, Any]], size: int = 1) -> Images:
    """The pictures of plain calls of the pipeline, `size` requests in each."""
    found: Images = []
    for k in range(0, len(requests), size):
        some = requests[k : k + size]
        call = {n: v for n, v in some[0].items() if n != "generator_seed"}
        for name in ("prompt", "class_labels"):
            if name in call:
                call[name] = [value for r in some for value in r[name]]
        generators = [torch.Generator().manual_seed(r["generator_seed"]) for r in some]
        found += [np.asarray(image) for image in pipe(**call, generator=generators).images]
    return found


def by_engine(pipe: Any, requests: Sequence[dict[str, Any]], mode: Any) -> Images:
    """The same from an engine."""
    with Engine(pipe, speca.SpecaConfig(speedup=STEPS / FULL, tolerance=0.0), mode=mode) as engine:
        found = {result.index: np.asarray(result.images[0]) for result in engine.generate(requests)}
    return [found[k] for k in range(len(requests))]


@contextmanager
def served(model: str, pipe: Any, folder: Path) -> Iterator[str]:
    """A server of a model in a thread of this process; its address."""
    limits = Limits(wait_s=3600, slowdown=1e6, per_key=10_000)
    config = ServerConfig(models=(ModelConfig(model=model, edits=False),), jobs=folder, steps=STEPS, limits=limits)
    app = create_app(config, {model: pipe})
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=runner.run)
    thread.start()
    while not (runner.started and app.state.server.ready):
        time.sleep(0.05)
    yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    runner.should_exit = True
    thread.join()


def by_server(url: str, pipe: Any, requests: Sequence[dict[str, Any]]) -> Images:
    """The same through the server, by one client for each."""
    names = {number: name for name, number in (getattr(pipe, "labels", None) or {}).items()}

    def ask(request: dict[str, Any]) -> np.ndarray[Any, Any]:
        prompt = request["prompt"][0] if "prompt" in request else names[request["class_labels"][0]]
        fields = {"prompt": prompt, "seed": request["generator_seed"], "speedup": STEPS / FULL, "tolerance": 0}
        answer = http.post(f"{url}/v1/images/generations", json=fields).json()
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))

    with httpx.Client(timeout=600, verify=False) as http, ThreadPoolExecutor(len(requests)) as clients:
        return list(clients.map(ask, requests))


def throughput(model: str, count: int, rounds: int) -> dict[str, Any]:
    """Images a processor second and PSNR of each way."""
    pipe = zoo.resolve(model)
    pipe.set_progress_bar_config(disable=True)
    requests = requests_of(pipe, model, count)
    config = speca.SpecaConfig(speedup=STEPS / FULL, tolerance=0.0)
    cached = rivals.cache_dit(0)

    def accelerated() -> Images:
        with speca.enabled(pipe, config):
            return loop(pipe, requests)

    def rival(size: int) -> Images:
        with cached(pipe, {}, CACHE_DIT) as setup:
            return loop(setup.pipe, requests, size)

    def through() -> Images:
        with tempfile.TemporaryDirectory() as folder, served(model, pipe, Path(folder)) as url:
            by_server(url, pipe, requests[:1])
            began[0] = time.process_time(), time.perf_counter()  # starting it does not count
            return by_server(url, pipe, requests)

    began = [(0.0, 0.0)]
    ways: dict[str, Callable[[], Images]] = {
        "loop, every step full": lambda: loop(pipe, requests),
        "loop, cache-dit": lambda: rival(1),
        "16 in a call, cache-dit": lambda: rival(16),
        "loop, speca": accelerated,
        "engine, lock-step": lambda: by_engine(pipe, requests, "lock-step"),
        "engine": lambda: by_engine(pipe, requests, "continuous"),
        "server": through,
    }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    images: dict[str, Images] = {}
    for _ in range(rounds):
        for way, run in ways.items():
            began[0] = time.process_time(), time.perf_counter()
            images[way] = run()
            seconds[way].append((time.process_time() - began[0][0], time.perf_counter() - began[0][1]))
    whole = images["loop, every step full"]
    return {
        "model": model,
        "ways": {
            way: {
                "rate": count / median(s for s, _ in spent), "rate_by_the_clock": count / median(s for _, s in spent),
                "psnr": quality(images[way], whole),
            }
            for way, spent in seconds.items()
        },
    }  # fmt: skip


def quality(found: Images, whole: Images) -> list[float]:
    """Median and 5th percentile of the PSNR of pictures to those of full runs, in dB."""
    pairs = (torch.from_numpy(np.stack(images) / 255.0) for images in (found, whole))
    values = psnr(*pairs).tolist()
    return [quantile(values, 0.5), quantile(values, 0.05)]


# ------------------------------------------------------------------------------------------------ load
@contextmanager
def process(model: str, folder: Path) -> Iterator[str]:
    """A server in a process of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import speca.cli; speca.cli.main()"
    flags = ["--threads", "1", "--steps", str(STEPS), "--limit-per-key", "10000", "--jobs", str(folder)]
    command = [sys.executable, "-c", code, "serve", model, "--port", str(port), *flags]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    try:
        yield url
    finally:
        running.terminate()
        running.wait()


def capacity(url: str, prompts: Sequence[str], clients: int, seconds: float) -> float:
    """Images a second that so many clients get, who ask again as soon as they are answered, or told to wait."""
    until, drawn = time.perf_counter() + seconds, []

    def ask(number: int) -> None:
        with httpx.Client(timeout=600) as http:
            while time.perf_counter() < until:
                fields = {"prompt": prompts[number % len(prompts)]}
                if http.post(f"{url}/v1/images/generations", json=fields).status_code == 200:
                    drawn.append(time.perf_counter())
                else:
                    time.sleep(0.1)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    return len(drawn) / seconds


def under_load(model: str, prompts: Sequence[str], seconds: float, rounds: int) -> dict[str, Any]:
    """Latency at shares of the capacity."""
    with tempfile.TemporaryDirectory() as folder, process(model, Path(folder)) as url:
        most = capacity(url, prompts, 16, seconds)
        found: dict[float, list[dict[str, Any]]] = {share: [] for share in SHARES}
        for number in range(rounds):
            for share in SHARES:
                asked = load.Load(url, share * most, seconds, None, prompts, {}, compared=8, seed=1000 * number)
                found[share].append(asyncio.run(load.run(asked)).to_dict())
    return {"model": model, "capacity": most, "loads": [{"share": s, "rounds": rows} for s, rows in found.items()]}


# ------------------------------------------------------------------------------------------------ page
def tables(throughputs: Sequence[dict[str, Any]], loads: Sequence[dict[str, Any]]) -> str:
    """Both as Markdown."""
    lines = ["| model | way | images a second | against the loop | PSNR, median / P5 |", "| --- " * 5 + "|"]
    for found in throughputs:
        first = found["ways"]["loop, every step full"]["rate"]
        for way, of in found["ways"].items():
            shown = "" if way == "loop, every step full" else "{:.1f} / {:.1f}".format(*of["psnr"])
            lines.append(f"| {found['model']} | {way} | {of['rate']:.2f} | {of['rate'] / first:.2f}x | {shown} |")
    lines += ["", "| model | load | drawn a second | refused | seconds, P50 / P95 / P99 | told to wait, P50 | PSNR |"]
    lines.append("| --- " * 7 + "|")
    for found in loads:
        for at in found["loads"]:
            for row in at["rounds"]:
                times = " / ".join(f"{v:.2f}" for v in row["seconds"].values())
                wait = f"{row['retry_after']['p50']:.0f} s" if row["retry_after"] else ""
                cells = [found["model"], f"{at['share']:.0%} of {found['capacity']:.1f}"]
                cells += [f"{row['images_a_second']:.2f}", f"{row['refused_share']:.0%}", times, wait]
                lines.append(f"| {' | '.join(cells)} | {row['psnr']['median']:.1f} |")
    return "\n".join(lines)


def main(
    models: Annotated[str, typer.Option(help="Bundled names, for throughput.")] = "fashion-dit,emoji-flux",
    count: Annotated[int, typer.Option(help="Requests.", min=2)] = 32,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 2,
    loaded: Annotated[str, typer.Option(help="The model under load.")] = "emoji-flux",
    seconds: Annotated[float, typer.Option(help="Of each load.", min=1)] = 25.0,
    out: Annotated[Path, typer.Option(help="Raw results.")] = Path("docs/results/serving.json"),
    guide: Annotated[Path, typer.Option(help="File whose tables are replaced.")] = Path("docs/serving.md"),
) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    loads = [under_load(loaded, ["red apple", "moon"], seconds, rounds)]
    throughputs = [throughput(model, count, rounds) for model in models.split(",")]
    results = {"hardware": hardware(zoo.resolve(loaded)), "throughput": throughputs, "load": loads}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = guide.read_text(encoding="utf-8")
    page = re.sub(f"{BEGIN}.*{END}", f"{BEGIN}\n{tables(throughputs, loads)}\n{END}", text, flags=re.DOTALL)
    guide.write_text(page, encoding="utf-8")
    print(tables(throughputs, loads))


if __name__ == "__main__":
    typer.run(main)
