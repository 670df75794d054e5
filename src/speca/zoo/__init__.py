"""The bundled models, and how to turn any model name (bundled, folder or hub id) into a pipeline."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, nearest

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from .classifier import Classifier

WEIGHTS = Path(__file__).parent / "weights"
"""One folder a model, in the layout of ``save_pretrained``, with README.md (model card), scores.json and call.json."""

DENOISERS = ("transformer", "unet")
"""Folders that hold the weights of a denoising model."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelCard:
    """What `speca models` prints about one bundled model."""

    name: str
    pipeline: str  # diffusers class
    makes: str  # one phrase, from the card
    licence: str
    bytes: int  # of the folder
    parameters: int  # of the transformer or U-Net
    scores: dict[str, Any]  # scores.json as the recipe wrote it

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def names() -> list[str]:
    """Names of the bundled models, sorted."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/model_index.json"))


def models() -> list[ModelCard]:
    """A card for each bundled model, read from its files without loading a tensor."""
    return [_card(WEIGHTS / name) for name in names()]


def load(name: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> DiffusionPipeline:
    """The bundled pipeline `name` on `device`; `dtype` None means float32.

    Raises InputError, with the nearest name, if there is no such model.
    """
    return _from_folder(_bundled(name), dtype).to(device)


def load_classifier(name: str) -> Classifier:
    """The classifier that scores images of bundled model `name`: float32, in eval mode, on the CPU."""
    from safetensors.torch import load_file

    from .classifier import Classifier

    path = _bundled(name) / "classifier.safetensors"
    if not path.is_file():
        raise InputError(f"{name} comes without a classifier, so its images cannot be scored.")
    return Classifier.like(load_file(path))


def load_reference(name: str) -> torch.Tensor:
    """Features (N, 1280) of held-out pictures of bundled model `name`, to which samples are compared by
    `speca.compare.distance`."""
    from safetensors.torch import load_file

    path = _bundled(name) / "reference.safetensors"
    if not path.is_file():
        raise InputError(
            f"{name} comes without reference features; take those of real pictures by speca.compare.distance."
        )
    return load_file(path)["features"].float()


def call_arguments(model: str) -> dict[str, Any]:
    """What a call of the pipeline `model` (a bundled name or a folder) is to be given, from its ``call.json``.

    Sizes above all, as most pipelines would else make pictures of a megapixel. Empty where there is no such file.
    Raises InputError if the file does not hold a JSON object.
    """
    folder = WEIGHTS / model if model in names() else Path(model).expanduser()
    path = folder / "call.json"
    if not path.is_file():
        return {}
    try:
        call = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); mend it or delete it.") from error
    if not isinstance(call, dict):
        raise InputError(f"{path} holds no JSON object of arguments; mend it or delete it.")
    return call


def resolve(model: str, dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The pipeline that `model` means, on the CPU: a bundled name, else a local diffusers folder, else a hub id.

    A bundled name wins over a folder of the same name; write ``./name`` for the folder. `dtype` None means float32.
    Raises InputError if it is none of the three, or cannot be loaded.
    """
    if model in names():
        return load(model, dtype=dtype)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, dtype)
    if path.exists():
        raise InputError(f"{model} is a file; give the pipeline's folder, the one with model_index.json in it.")
    if _HUB_ID.fullmatch(model):
        return _from_hub(model, dtype)
    raise InputError(f"{model!r} is no bundled model, no folder and no hub id (owner/name); {nearest(model, names())}")


def usable_device(name: str | None) -> str:
    """Return the device to use: `name`, or with None the accelerator, if any, else the CPU.

    Raises InputError if `name` cannot be used.
    """
    import torch

    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if found is None else found.type
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name} cannot be used here; use cpu, or cuda or mps on a machine with one."
        ) from error
    return name


# ------------------------------------------------------------------------------------------------ loading
def _bundled(name: str) -> Path:
    if name not in names():
        raise InputError(f"there is no bundled model {name!r}; {nearest(name, names())}")
    return WEIGHTS / name


def _from_folder(folder: Path, dtype: torch.dtype | None) -> DiffusionPipeline:
    index = _read_index(folder)
    labels = index.get("id2label")  # JSON has made strings of the class numbers
    extra = {"id2label": {int(number): label for number, label in labels.items()}} if labels else {}
    return _from_pretrained(str(folder), dtype, f"{folder} does not load as a diffusers pipeline", **extra)


def _from_hub(model: str, dtype: torch.dtype | None) -> DiffusionPipeline:
    try:
        return _from_pretrained(model, dtype, f"{model} does not load as a diffusers pipeline")
    except InputError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise InputError(
            f"there is no folder {model!r} here, and no pipeline of that name came from the hub; "
            "check the spelling, the network, HF_HUB_OFFLINE, and for a gated model `hf auth login`."
        ) from error


def _from_pretrained(source: str, dtype: torch.dtype | None, failure: str, **extra: Any) -> DiffusionPipeline:
    """Load `source`, or raise InputError saying `failure` and the first line of the cause."""
    import torch
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(source, dtype=dtype or torch.float32, **extra)
    except Exception as error:  # the loaders of five libraries raise whatever they like for a bad file
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{failure}: {cause.strip().rstrip('.')}.") from error


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise InputError(
            f"{folder} holds no model_index.json, so it is no diffusers pipeline; "
            "give the folder that save_pretrained of a pipeline wrote."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); save the pipeline again.") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise InputError(f"{path} does not name a pipeline class; save the pipeline again.")
    return index


# ------------------------------------------------------------------------------------------------ cards
def _card(folder: Path) -> ModelCard:
    from huggingface_hub import metadata_load

    readme, scores = folder / "README.md", folder / "scores.json"
    front: dict[str, Any] = (metadata_load(readme) if readme.is_file() else None) or {}
    return ModelCard(
        name=folder.name,
        pipeline=_read_index(folder)["_class_name"],
        makes=str(front.get("makes", "")),
        licence=str(front.get("license", "")),
        bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        parameters=sum(_count(path) for part in DENOISERS for path in (folder / part).glob("*.safetensors")),
        scores=json.loads(scores.read_text(encoding="utf-8")) if scores.is_file() else {},
    )


def _count(path: Path) -> int:
    """Number of values in a safetensors file: its header gives the shapes, so nothing else is read."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
