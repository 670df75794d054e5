"""Scorers of the paper's tables, each based on an optional package.

All take a folder of samples, their captions in order, and a folder of real images or None, and return figures by name.
They raise InputError if the package or its weights are missing; the message says what to install.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ..errors import InputError

Scorer = Callable[[Path, Sequence[str], "Path | None"], dict[str, float]]
VBENCH = ("subject_consistency", "background_consistency", "motion_smoothness", "aesthetic_quality", "imaging_quality")
"""The dimensions that need no object detector; the total score is computed by VBench's own scripts."""


def fidelity(folder: Path, captions: Sequence[str], reference: Path | None) -> dict[str, float]:
    """Return FID to `reference` and Inception Score by torch-fidelity, which has no sFID (see the evaluator of ADM)."""
    try:
        from torch_fidelity import calculate_metrics
    except ImportError as error:
        raise InputError("FID and IS need torch-fidelity; pip install torch-fidelity.") from error
    import torch

    given = dict(input1=str(folder), isc=True, cuda=torch.cuda.is_available(), verbose=False)
    if reference is not None:
        given |= dict(input2=str(reference), fid=True)
    found = calculate_metrics(**given)
    names = {"frechet_inception_distance": "FID", "inception_score_mean": "IS"}
    return {names[key]: float(value) for key, value in found.items() if key in names}


def image_reward(folder: Path, captions: Sequence[str], reference: Path | None) -> dict[str, float]:
    """Return the mean ImageReward (arXiv:2304.05977) of the images for their prompts."""
    try:
        import ImageReward
    except ImportError as error:
        raise InputError("ImageReward needs its package; pip install image-reward.") from error
    model = ImageReward.load("ImageReward-v1.0")
    return {"ImageReward": statistics.fmean(model.score(c, [str(p)]) for c, p in _paired(folder, captions))}


CLIP: Literal["openai/clip-vit-large-patch14"] = "openai/clip-vit-large-patch14"


def clip_score(folder: Path, captions: Sequence[str], reference: Path | None) -> dict[str, float]:
    """Return the mean CLIP score, 100 times the cosine, by torchmetrics."""
    try:
        import numpy as np
        import torch
        from PIL import Image
        from torchmetrics.multimodal.clip_score import CLIPScore

        metric = CLIPScore(CLIP)
    except ImportError as error:
        raise InputError(
            f"the CLIP score needs {error.name or error}; pip install torchmetrics transformers."
        ) from error
    except Exception as error:  # two libraries raise errors of different types if weights are missing
        raise InputError(f"the CLIP score needs the weights of {CLIP}; run `hf download {CLIP}`.") from error
    for caption, path in _paired(folder, captions):
        with Image.open(path) as image:
            metric.update(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), caption)
    return {"CLIP": float(metric.compute())}


def vbench(folder: Path, captions: Sequence[str], reference: Path | None) -> dict[str, float]:
    """Return the VBench scores of the dimensions in VBENCH; the total needs all sixteen and VBench's scripts."""
    try:
        from vbench import VBench
    except ImportError as error:
        raise InputError(
            f"VBench needs its package; pip install vbench, then also: vbench evaluate --videos_path {folder}."
        ) from error
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = folder.parent / f"{folder.name}-vbench"
    judge = VBench(device, "VBench_full_info.json", str(out))
    judge.evaluate(videos_path=str(folder), name=folder.name, dimension_list=list(VBENCH))
    found = json.loads(next(out.glob("*eval_results.json")).read_text(encoding="utf-8"))
    return {f"VBench {name}": float(value[0]) for name, value in found.items()}


def _paired(folder: Path, captions: Sequence[str]) -> list[tuple[str, Path]]:
    return list(zip(captions, sorted(folder.glob("*.png")), strict=True))
