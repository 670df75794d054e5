"""Distances between sets of images: what is alike is near, what differs is farther the more it differs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from speca import InputError
from speca.reports import distances


def bars(count: int, seed: int, width: int, horizontal: bool = False) -> Tensor:
    """Images of stripes `width` pixels wide at random phases, in random colours."""
    g = torch.Generator().manual_seed(seed)
    phase = torch.randint(0, 2 * width, (count, 1, 1, 1), generator=g)
    lines = ((torch.arange(64) + phase) // width % 2).float().expand(-1, -1, 64, -1)
    lines = lines.transpose(2, 3) if horizontal else lines
    return lines * torch.rand(count, 3, 1, 1, generator=g)


@pytest.fixture(scope="module")
def sets() -> dict[str, Tensor]:
    images = {"one": bars(40, 0, 8), "two": bars(40, 1, 8), "wider": bars(40, 2, 9), "other": bars(40, 3, 8, True)}
    return {name: distances.features(x) for name, x in images.items()}


def test_features_do_not_depend_on_the_batch(sets: dict[str, Tensor]) -> None:
    assert sets["one"].shape == (40, 1280)
    seen: list[tuple[int, int]] = []
    again = distances.features(bars(40, 0, 8)[:10], batch=4, progress=lambda done, total: seen.append((done, total)))
    assert torch.allclose(again, sets["one"][:10], atol=1e-4)
    assert seen == [(4, 10), (8, 10), (10, 10)]
    grey = distances.features(torch.rand(2, 1, 28, 28))
    assert grey.shape == (2, 1280)


def test_alike_is_near_and_unlike_is_far(sets: dict[str, Tensor]) -> None:
    near, spread = distances.kid(sets["one"], sets["two"], size=20)
    far, _ = distances.kid(sets["one"], sets["other"], size=20)
    assert abs(near) < 3 * spread
    assert far > 5 * abs(near)
    one, two, other = sets["one"], sets["two"], sets["other"]
    assert distances.frechet(one, one) == pytest.approx(0, abs=1e-3)
    assert 0 < distances.frechet(one, two) < distances.frechet(one, other) / 2


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    b = 2 * torch.randn(4000, 3, generator=g, dtype=torch.float64) + 1
    assert distances.frechet(a, b) == pytest.approx(3 * 1 + 3 * (1 - 2) ** 2, rel=0.05)


def test_kid_is_repeatable_and_leaves_the_generator_alone(sets: dict[str, Tensor]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = distances.kid(sets["one"], sets["other"], size=20)
    assert torch.equal(before, torch.get_rng_state())
    assert distances.kid(sets["one"], sets["other"], size=20) == first


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 4, 64, 64)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="floats"):
        distances.features(torch.zeros(shape))
    with pytest.raises(InputError, match="uint8"):
        distances.features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_too_few_samples_and_unequal_widths_are_refused() -> None:
    for a, b in ((torch.zeros(1, 4), torch.zeros(5, 4)), (torch.zeros(5, 4), torch.zeros(5, 3))):
        with pytest.raises(InputError, match="two sets of features"):
            distances.kid(a, b)


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "torchmetrics.image.kid"])
def test_a_missing_package_is_named_with_its_remedy(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'speca-diffusers\[bench\]'"):
        distances.kid(distances.features(torch.rand(2, 3, 8, 8)), torch.rand(2, 1280))
