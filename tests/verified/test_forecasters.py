"""Forecasters as weights: exactness on polynomials, the published formulas, rows with few anchors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speca
from speca.core.correction import polynomial
from speca.verified.forecasters import FORECASTERS, forecaster, hermite, newton, reuse, taylor

EVEN = [12.0, 9.0, 6.0, 3.0, 0.0]


def weights(method: str, anchors: list[float], target: float, order: int) -> list[float]:
    positions = torch.tensor([anchors], dtype=torch.float64)
    count = torch.tensor([len(anchors)])
    return forecaster(method)(positions, count, torch.tensor([target], dtype=torch.float64), order)[0].tolist()


def forecast(method: str, anchors: list[float], target: float, order: int, power: int) -> float:
    return sum(w * a**power for w, a in zip(weights(method, anchors, target, order), anchors, strict=True))


@settings(max_examples=200, deadline=None)
@given(
    order=st.integers(0, 4),
    gaps=st.lists(st.floats(0.2, 9), min_size=5, max_size=5),
    ahead=st.floats(0.1, 9),
)
def test_newton_is_exact_on_polynomials_on_any_grid(order: int, gaps: list[float], ahead: float) -> None:
    anchors = [-sum(gaps[: i + 1]) / 5 for i in range(order + 1)]
    for power in range(order + 1):
        want = ahead**power
        got = forecast("newton", anchors, ahead, order, power)
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5 * sum(map(abs, weights("newton", anchors, ahead, order))))


@pytest.mark.parametrize("anchors", [[4.0], [7.0, 3.0], [9.0, 4.0, 3.5], EVEN])
def test_newton_gives_the_weights_of_polynomials_on_plain_numbers(anchors: list[float]) -> None:
    for target in (16.0, 5.0, anchors[0]):
        assert polynomial(anchors, [target])[0] == pytest.approx(weights("newton", anchors, target, len(anchors) - 1))


@pytest.mark.parametrize("method", ["taylor", "newton"])
def test_order_one_is_exact_on_lines_on_uneven_anchors(method: str) -> None:
    for power in (0, 1):
        assert forecast(method, [7.0, 3.0], 11.0, 1, power) == pytest.approx(11.0**power)


def test_taylor_keeps_the_published_error_of_order_two() -> None:
    """On t^2 with even gaps h the published differences miss h * s / 2 * F'': 3 * 4 / 2 * 2 = 12 here."""
    for order in (2, 3, 4):
        assert 16.0**2 - forecast("taylor", EVEN, 16.0, order, 2) == pytest.approx(12.0)
    assert 16.0**2 - forecast("newton", EVEN, 16.0, 2, 2) == pytest.approx(0.0, abs=1e-9)


def test_taylor_is_the_tower_of_the_published_recursion() -> None:
    """d_{i+1} = (d_i - old d_i) / gap at every full step, forecast sum d_i s^i / i!, on an uneven grid."""
    full, values, tower = [0.0, 2.0, 7.0, 12.0, 21.0], [1.0, -3.0, 2.5, 8.0, -1.0], []
    for i, value in enumerate(values):
        new = [value]
        for old in tower:
            new.append((new[-1] - old) / (full[i] - full[i - 1]))
        tower = new[:5]
    s = 4.0
    want = sum(d * s**i / math.factorial(i) for i, d in enumerate(tower))
    got = sum(w * v for w, v in zip(weights("taylor", full[::-1], 25.0, 4), values[::-1], strict=True))
    assert got == pytest.approx(want)


def test_hermite_is_hicaches_formula() -> None:
    anchors, sigma, s = [6.0, 3.0, 0.0], 0.5, 2.0
    f0, f1, f2 = 5.0, 1.0, 4.0
    d1, d2 = (f0 - f1) / 3, ((f0 - f1) / 3 - (f1 - f2) / 3) / 3
    x = sigma * s
    want = f0 + d1 * sigma * (2 * x) + d2 / 2 * sigma**2 * (4 * x * x - 2)
    got = sum(w * v for w, v in zip(weights("hermite", anchors, 8.0, 2), (f0, f1, f2), strict=True))
    assert got == pytest.approx(want)


def test_reuse_repeats_the_newest() -> None:
    assert weights("reuse", [5.0, 1.0], 9.0, 3) == [1.0, 0.0]


@pytest.mark.parametrize("method", [taylor, newton, hermite, reuse])
def test_rows_are_independent_and_use_the_anchors_they_have(method) -> None:  # type: ignore[no-untyped-def]
    positions = torch.tensor([[9.0, 5.0, 2.0], [9.0, 5.0, 1e6], [4.0, 1e6, 2e6]], dtype=torch.float64)
    target = torch.tensor([11.0, 11.0, 7.0], dtype=torch.float64)
    together = method(positions, torch.tensor([3, 2, 1]), target, 2)
    for row, count in enumerate((3, 2, 1)):
        alone = method(positions[row : row + 1, :count], torch.tensor([count]), target[row : row + 1], 2)
        torch.testing.assert_close(together[row, :count], alone[0])
        assert not together[row, count:].any()
    torch.testing.assert_close(together.sum(1), torch.ones(3, dtype=torch.float64))


def test_unknown_forecaster_names_the_nearest() -> None:
    assert set(FORECASTERS) == {"taylor", "newton", "hermite", "reuse"}
    with pytest.raises(speca.ConfigError, match="did you mean 'newton'"):
        forecaster("newtn")
