"""A cache of priors learnt from ordinary runs, in memory and in a folder on disk.

Each run adds a file of its own, so processes can write at the same time without a lock. Files that are damaged or of
another version are skipped with a warning in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.prior import Prior

logger = logging.getLogger("speca")

FORMAT = 1
FOLDER = "SPECA_CACHE"
"""Environment variable: the folder to use instead of the user's cache; empty for none."""

MOST_RUNS = 16
"""Files kept for each kind of call; more runs than this hardly change a prior."""

MOST_FOUND = 64
"""Means that are remembered, of different kinds of call and steps."""

SAMPLES = 8
"""Elements of each parameter that its fingerprint looks at."""


def default_folder() -> Path | None:
    """Return the folder in which learnt priors are stored.

    It is the value of the environment variable SPECA_CACHE, by default a folder in the user's cache directory; None if
    the variable is set but empty.
    """
    from platformdirs import user_cache_path

    given = os.environ.get(FOLDER)
    if given is None:
        return user_cache_path("speca", appauthor=False) / "priors"
    return Path(given) if given else None


def fingerprint(model: nn.Module) -> str:
    """Return a short text that is equal for equal models: class, configuration, and some elements of each parameter.

    LoRA layers are parameters too; their scales and which of them are active count as well. Weights that are not in
    memory, as with sequential offloading, count by shape alone.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    config = getattr(model, "config", None)
    digest.update(repr(sorted(dict(config).items()) if isinstance(config, Mapping) else "").encode())
    found: dict[torch.device, list[Tensor]] = {}
    for name, value in model.named_parameters():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if value.device.type != "meta" and value.numel():
            found.setdefault(value.device, []).append(_some_of(value))
    for parts in found.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict):  # of peft
            state = module.scaling, getattr(module, "active_adapters", None), getattr(module, "disable_adapters", None)
            digest.update(f"{name}{state}".encode())
    return digest.hexdigest()[:20]


def _some_of(parameter: Tensor) -> Tensor:
    """A few elements of a parameter; none of a kind of tensor, quantized or sharded, that does not hand them out."""
    try:
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).long()
        return flat[places.to(parameter.device)].double()
    except Exception:  # whatever such a tensor raises; its shape and type count all the same
        return torch.zeros(0, dtype=torch.float64, device=parameter.device)


class PriorCache:
    """Priors by the model and the kind of call that they were learnt from."""

    def __init__(self, folder: Path | None) -> None:
        """Use `folder`, which is made when something is first added; with None all is forgotten with this object."""
        self.folder = folder
        self._memory: dict[str, list[Prior]] = {}  # what could not be written
        self._found: dict[tuple[str, tuple[float, ...]], tuple[object, Prior]] = {}

    def find(self, key: Sequence[object], noise: Sequence[float]) -> Prior | None:
        """Return the mean of the priors stored under `key`; None if there are none.

        Only priors measured at the steps `noise` are averaged. If there are none of these, the ones with the most steps
        are, and the result has their steps.

        Args:
            key: what the prior belongs to: the fingerprint of the model and the kind of call.
            noise: (T,) see `Prior.noise`.
        """
        files, memory = self._files(key), self._memory.get(_name(key), [])
        where, state = (_name(key), tuple(noise)), (tuple(files), len(memory))
        if where in self._found and self._found[where][0] == state:  # the same object, as placements are kept with it
            return self._found[where][1]
        runs = [*memory, *(found for file in files if (found := _read(file)) is not None)]
        same = [run for run in runs if len(run.noise) == len(noise) and np.allclose(run.noise, noise, atol=1e-4)]
        if not same:
            most = max((run for run in runs), key=lambda run: len(run.noise), default=None)
            same = [run for run in runs if most is not None and run.noise == most.noise]
        if not same:
            return None
        mean = np.mean([run.moments for run in same], axis=0)
        prior = Prior(same[0].noise, mean, noisy=same[0].noisy)
        if len(self._found) >= MOST_FOUND:
            self._found.pop(next(iter(self._found)))
        self._found[where] = state, prior
        return prior

    def add(self, key: Sequence[object], prior: Prior) -> None:
        """Store the prior of one run, in memory only if the folder cannot be written."""
        memory = self._memory.setdefault(_name(key), [])
        if len(self._files(key)) + len(memory) >= MOST_RUNS:
            return
        if self.folder is None:
            memory.append(prior)
            return
        folder = self.folder / _name(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(suffix=".part", dir=folder)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"format": FORMAT, "key": [str(part) for part in key], "prior": prior.to_dict()}, file)
            os.replace(path, path.removesuffix(".part") + ".json")  # whole or not at all, whoever reads meanwhile
        except OSError as error:
            logger.info("what was learnt is not kept after this process: %s cannot be written (%s)", folder, error)
            memory.append(prior)

    def _files(self, key: Sequence[object]) -> list[Path]:
        return sorted((self.folder / _name(key)).glob("*.json")) if self.folder is not None else []


def _name(key: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in key]).encode()).hexdigest()[:24]


def _read(file: Path) -> Prior | None:
    """Read the prior from a file; log a warning and return None if the file is damaged or of another version."""
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}")
        return Prior.from_dict(values["prior"])
    except Exception as error:  # whatever a damaged file leads to
        logger.warning("%s is not used: it holds no prior of this version (%s); delete it.", file, error)
        return None
