"""Per-row errors: definitions, row independence, fp32 accumulation, no element-wise division."""

from __future__ import annotations

import pytest
import torch

import speca
from speca.verified.errors import ERRORS, error_function

A = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
B = torch.tensor([[[3.0, 0.0], [0.0, 2.0]], [[-1.0, -1.0], [-1.0, -1.0]]])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("relative_l2", [2 / 13**0.5, 2.0]),
        ("relative_l1", [2 / 5, 2.0]),
        ("linf", [2 / 3, 2.0]),
        ("cosine", [1 - (9 + 8) / (5 * 13**0.5), 2.0]),
        ("elementwise_l1", [0.25, 2.0]),
    ],
)
def test_definitions(name: str, want: list[float]) -> None:
    torch.testing.assert_close(ERRORS[name](A, B), torch.tensor(want))


@pytest.mark.parametrize("name", list(ERRORS))
def test_rows_are_independent_and_zero_means_equal(name: str) -> None:
    x, y = torch.randn(5, 7, 3), torch.randn(5, 7, 3)
    both = error_function(name)(x, y)
    assert both.shape == (5,) and both.dtype == torch.float32
    for i in range(5):
        torch.testing.assert_close(both[i : i + 1], error_function(name)(x[i : i + 1], y[i : i + 1]))
    torch.testing.assert_close(error_function(name)(x, x), torch.zeros(5), atol=1e-6, rtol=0)


def test_norm_ratios_do_not_blow_up_where_an_element_is_zero() -> None:
    real = torch.ones(1, 1000)
    real[0, 0] = 0.0
    forecast = real + 0.01
    assert error_function("relative_l2")(forecast, real).item() == pytest.approx(0.01, rel=0.01)
    assert error_function("elementwise_l1")(forecast, real).item() > 1e4


def test_sums_are_accumulated_in_fp32() -> None:
    real = torch.full((1, 100_000), 4.0, dtype=torch.float16)
    assert error_function("relative_l1")(real * 1.25, real).item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("name", list(ERRORS))
def test_parts_of_shards_make_the_error_of_the_whole(name: str) -> None:
    told, real = torch.randn(3, 8, 5), torch.randn(3, 8, 5)
    error, parts = error_function(name), []
    for a, b in zip(told.split([6, 2], 1), real.split([6, 2], 1), strict=True):
        error(a, b, lambda p, how: parts.append((p, how)) or p)
    (one, how), (other, _) = parts
    joined = one + other if how == "sum" else torch.maximum(one, other)
    torch.testing.assert_close(error(told, real, lambda p, _: joined), error(told, real))


def test_unknown_error_names_the_nearest() -> None:
    with pytest.raises(speca.ConfigError, match="did you mean 'relative_l2'"):
        error_function("relativ_l2")
