"""A file of requests on the devices of a Ray cluster: Ray Data hands shards of it to engines, one for each device."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config
from ..engine import Engine
from ..engine.offline import Folder, Line
from ..errors import ConfigError, InputError, SpecaError
from .shards import Collector, Shard, claimed, cut, work

LOCAL = "local"
POLL = 0.5
"""Seconds after which the driver looks for lines that workers have finished."""
STALLED = 60.0
"""Seconds without any result after the loss of a machine, until the rest is handed out anew."""
CPU_SHARE = 0.75
"""Of a processor that a worker without a GPU reserves for each of its threads; the rest is for Ray and its driver."""
PASSED_ON = ("SPECA_CACHE", "HF_HUB_OFFLINE")
"""Variables of the environment that workers get from the driver."""


@dataclass(frozen=True)
class Job:
    """What workers need to make their engines: the model's name, and arguments of `Engine`.

    `device` None: a GPU, where the cluster has any; else the CPU. `threads`: of each worker on a CPU.
    """

    model: str
    config: Config
    dtype: str = "float32"
    device: str | None = None
    threads: int = 1
    engine: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Engine:
        """Return the engine. Raises what `zoo.resolve` and `Engine` raise."""
        import torch

        from .. import zoo

        place = zoo.usable_device(self.device)
        if place == "cpu":
            torch.set_num_threads(self.threads)
        return Engine(zoo.resolve(self.model, getattr(torch, self.dtype)).to(place), self.config, **self.engine)


class Worker:
    """An actor of Ray Data, which does a shard at a call. It raises nothing: its answers say what went wrong."""

    def __init__(self, job: Job, place: Path, run_name: str) -> None:
        self._job, self._place, self._run_name = job, place, run_name
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the shards of a batch; return their names, how many lines were done, what failed, and who did it."""
        rows = [self._do(Shard.from_json(str(text))) for text in batch["shard"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _do(self, shard: Shard) -> dict[str, Any]:
        row = dict(name=shard.name, made=0, refused="", worker=f"{os.uname().nodename}:{os.getpid()}")
        try:
            if self._engine is None:
                self._engine = self._job.open()
            row["made"] = work(self._engine, self._place, self._run_name, shard)
        except SpecaError as error:
            row["refused"] = str(error)
        except Exception as error:  # Ray would hand the shard to others without end
            row["refused"] = f"a worker failed in {self._job.model} ({type(error).__name__}: {error})."
        return row


# ------------------------------------------------------------------------------------------------ the driver
@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield the module `ray`, connected to the cluster at `address`; "local" starts one here, and ends it afterwards.

    Raises:
        ConfigError: Ray is not installed.
        InputError: there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread of Ray Data would connect again after a shutdown
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("speca batch --ray needs Ray: pip install 'speca-diffusers[cluster]'.") from error
    _connect(ray, address)
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    where: dict[str, Any] = dict(include_dashboard=False) if address == LOCAL else dict(address=address)
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if address == LOCAL:  # the same package, wherever it was imported from
        paths = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", ""))
        passed["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        _demand_reachable(address)
        ray.init(
            **where, log_to_driver=False, logging_level=logging.ERROR, namespace="speca",
            runtime_env={"env_vars": passed},
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--ray {address} cannot be reached ({error}); start a cluster with `ray start --head`, or give local."
        ) from error


def _demand_reachable(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT, which Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def workers_of(ray: Any, job: Job, asked: int | None) -> tuple[int, dict[str, float]]:
    """Return how many workers there are to be, and what each reserves of its machine.

    Raises:
        InputError: a device that the cluster lacks.
    """
    found = ray.cluster_resources()
    gpus, processors = int(found.get("GPU", 0)), found.get("CPU", 1.0)
    if job.device in (None, "cuda") and gpus:
        count = asked or gpus
        return count, {"num_gpus": 1.0 if count <= gpus else gpus / count, "num_cpus": 0.1}
    if job.device not in (None, "cpu"):
        raise InputError(f"--device {job.device}: the cluster offers Ray no such device; see `ray status`.")
    count = asked or max(1, int(processors // job.threads))
    return count, {"num_cpus": round(min(CPU_SHARE * job.threads, CPU_SHARE * processors / count), 3)}


Told = Callable[[Sequence[dict[str, Any]], bool], None]
NAMES = ("full", "accepted", "rejected")


def counts(entries: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many lines of a manifest are `done` and `failed`, and their steps by kind: `full`, `accepted`, `rejected`."""
    found = Counter("failed" if "error" in entry else "done" for entry in entries)
    for entry in entries:
        for sample in entry.get("report", {}).get("samples", ()):
            found.update({name: sample[name] for name in NAMES})
    return found


def run(
    job: Job,
    lines: Sequence[Line],
    place: Path,
    address: str,
    workers: int | None = None,
    tell: Told = lambda new, earlier: None,
) -> dict[str, Any]:
    """Run the lines whose pictures are not in the folder `place`, which all machines have to see.

    Args:
        address: of a Ray cluster, or "local".
        workers: how many engines; default one for each GPU, or without any for each processor.
        tell: called with entries of the manifest and whether these are of an earlier run: first those, then new ones.

    Returns:
        How many lines each worker finished, by its machine and process, what each reserved, and the cluster's
        resources.

    Raises:
        InputError: a line asks for what cannot be, no cluster, or another run has the folder.
        ConfigError: Ray is not installed.
        SpecaError: workers end without having done anything.
    """
    place = place.resolve()
    done: Counter[str] = Counter()
    with connected(address) as ray, claimed(place) as name:
        folder, tried = Folder.open(place), set[int]()
        tell([folder.entries[line.number] for line in lines if folder.has(line)], True)
        while todo := [line for line in lines if line.number not in tried and not folder.has(line)]:
            count, reserved = workers_of(ray, job, workers)
            collector = Collector(folder, {s.name: s for s in cut(todo, count, job.engine.get("max_batch", 16))})
            stream = _Stream(ray, job, place, name, list(collector.shards.values()), count, reserved)
            fresh = _follow(stream, collector, tell, done)
            tried |= {entry["line"] for entry in fresh}
            if not fresh:
                raise SpecaError(
                    f"the workers of Ray ended without a result ({stream.trouble or 'lost'}); a machine may lack "
                    "memory or packages. Run the command again to go on: what is finished is kept."
                )
            if stream.lost:  # end what still waits for the lost machine
                ray.shutdown()
                _connect(ray, address)
        return {"workers": dict(done), "reserved": reserved if done else {}, "resources": ray.cluster_resources()}


def _follow(stream: _Stream, collector: Collector, tell: Told, done: Counter[str]) -> list[dict[str, Any]]:
    """Collect what workers finish until the stream ends, and return it. Raises `InputError` for what they refuse."""
    fresh: list[dict[str, Any]] = []

    def take(new: list[dict[str, Any]]) -> None:
        fresh.extend(new)
        if new:
            stream.progress(len(new))
            tell(new, False)

    for row in stream:
        if row is None:
            take(collector.collect())
            continue
        done[row["worker"]] += row["made"]
        if row["refused"]:
            take(collector.collect())
            raise InputError(row["refused"])
        take(collector.finish(row["name"]))
    take(collector.collect())
    numbers = {entry["line"] for entry in fresh}
    for shard in list(collector.shards.values()):  # whose answer was lost with a machine
        if all(line.number in numbers for line in shard.lines):
            collector.finish(shard.name)
    return fresh


class _Stream:
    """The answers of workers in the order they come; None when there was none for half a second.

    It ends with the last answer, or when a machine was lost and there has been no progress for a minute since.
    """

    def __init__(
        self, ray: Any, job: Job, place: Path, name: str, shards: list[Shard], count: int, reserved: dict[str, float]
    ) -> None:
        self.trouble, self.lost, self.left = "", False, sum(len(shard.lines) for shard in shards)
        self._ray, self._answers, self._last = ray, queue.SimpleQueue[Any](), time.monotonic()
        self._machines = self._alive()
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        for logger in ("ray.data", "ray"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        rows = [{"shard": shard.to_json()} for shard in shards]
        pool = ray.data.ActorPoolStrategy(size=min(count, len(rows)), max_tasks_in_flight_per_actor=1)
        self._set = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker, fn_constructor_args=(job, place, name), batch_size=1, compute=pool, **reserved
        )
        threading.Thread(target=self._feed, daemon=True, name="speca-ray-data").start()

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        while not self.lost:
            try:
                row = self._answers.get(timeout=POLL)
            except queue.Empty:
                yield None
                stalled = time.monotonic() - self._last > (STALLED if self.left else STALLED / 10)
                self.lost = stalled and not self._machines <= self._alive()  # which takes Ray some seconds to see
                continue
            if row is self:
                return
            yield row

    def progress(self, lines: int) -> None:
        """Note that so many lines were finished."""
        self._last, self.left = time.monotonic(), self.left - lines

    def _alive(self) -> set[str]:
        return {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}

    def _feed(self) -> None:
        try:
            for row in self._set.iter_rows():
                self._answers.put(row)
        except Exception as error:  # of Ray, as a worker raises nothing
            self.trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            self._answers.put(self)
