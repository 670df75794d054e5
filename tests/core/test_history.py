"""Per-row rings: push, forecast, bytes, dtype."""

from __future__ import annotations

import random
from unittest.mock import Mock

import pytest
import torch

from speca.core.history import History, on_device


def feature(row: int, step: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(100 * row + step))


def test_rows_with_their_own_steps_equal_a_plain_list() -> None:
    """Random pushes of random subsets of rows against lists of tensors."""
    chooser, rows, depth = random.Random(0), 5, 3
    history, oracle = History(depth, rows), {r: [] for r in range(rows)}
    for step in range(30):
        subset = list(range(rows)) if step == 0 else sorted(chooser.sample(range(rows), chooser.randint(1, rows)))
        history.push(subset, [torch.stack([feature(r, step) for r in subset])] * 2)
        for r in subset:
            oracle[r] = [feature(r, step), *oracle[r]][:depth]
        asked = chooser.sample(range(rows), chooser.randint(1, rows))
        weights = torch.randn(len(asked), depth, dtype=torch.float64)
        for i, r in enumerate(asked):
            weights[i, history.count(r) :] = 0
        for stream in history.forecast(asked, weights):
            for i, r in enumerate(asked):
                want = sum(float(w) * f for w, f in zip(weights[i], oracle[r], strict=False))
                torch.testing.assert_close(stream[i], want, rtol=1e-5, atol=1e-5)


def test_rows_of_equal_weights_give_what_each_gives_alone() -> None:
    """Also where their rings stand differently; weights may be plain numbers, and fewer than are kept."""
    history = History(3, 3)
    for step, rows in enumerate(([0, 1, 2], [0, 2], [0, 1, 2], [1])):
        history.push(rows, [torch.stack([feature(r, step) for r in rows])])
    for weights in ([0.5, 0.25], [2.0, -1.5, 0.5], [1.0]):
        together = history.forecast([0, 1, 2], [weights] * 3)[0]
        tensor = torch.tensor([weights] * 3, dtype=torch.float64)
        assert torch.equal(history.forecast([0, 1, 2], tensor)[0], together)
        for row in range(3):
            torch.testing.assert_close(history.forecast([row], [weights])[0][0], together[row])
    newest = history.forecast([0, 1, 2], [[1.0]] * 3)[0]
    torch.testing.assert_close(newest, torch.stack([feature(0, 2), feature(1, 3), feature(2, 2)]))


def test_bytes_and_dtype() -> None:
    history = History(2, 3)
    assert history.bytes() == 0
    history.push([0, 1, 2], [torch.zeros(3, 10), torch.zeros(3, 5)])
    assert history.bytes() == 2 * 3 * 15 * 4
    half = History(2, 3, torch.bfloat16)
    half.push([0, 1, 2], [torch.ones(3, 10)])
    assert half.bytes() == 2 * 3 * 10 * 2
    assert half.forecast([1], torch.tensor([[0.5]], dtype=torch.float64))[0].dtype == torch.float32


def test_sums_are_accumulated_in_fp32() -> None:
    history = History(2, 1)
    history.push([0], [torch.full((1, 4), 1000.0, dtype=torch.bfloat16)])
    history.push([0], [torch.full((1, 4), 1008.0, dtype=torch.bfloat16)])
    out = history.forecast([0], torch.tensor([[101.0, -100.0]], dtype=torch.float64))[0]
    assert out.dtype == torch.bfloat16
    assert out[0, 0].item() == torch.tensor(1808.0).bfloat16().item()


def test_a_row_without_a_full_step_cannot_be_forecast() -> None:
    history = History(2, 2)
    history.push([1], [torch.ones(1, 3)])
    with pytest.raises(IndexError, match="first step must be full"):
        history.forecast([0], [[1.0, 0.0]])


def test_a_pushed_feature_may_be_overwritten_afterwards() -> None:
    history, x = History(1, 2), torch.ones(2, 3)
    history.push([0, 1], [x])
    x.zero_()
    assert history.forecast([0], torch.ones(1, 1, dtype=torch.float64))[0].sum() == 3


def test_no_weight_at_all_gives_nothing() -> None:
    history = History(3, 2)
    history.push([0, 1], [torch.ones(2, 4)])
    assert history.forecast([1], torch.zeros(1, 3, dtype=torch.float64))[0].tolist() == [[0.0] * 4]


@pytest.mark.parametrize(("kind", "ahead"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_numbers_go_to_a_device_without_waiting_where_that_is_safe(
    kind: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pinned memory, which is kept until the copy is done; elsewhere as plainly as ever."""
    asked, place = Mock(), torch.device(kind)
    monkeypatch.setattr(torch, "as_tensor", lambda values, dtype: asked)
    on_device([1, 2], place)
    assert asked.pin_memory.called == ahead
    sent = asked.pin_memory.return_value if ahead else asked
    sent.to.assert_called_once_with(place, non_blocking=ahead)


def test_numbers_on_a_device_are_those_that_were_given() -> None:
    found = on_device([[1, 2], [3, 4]], torch.device("cpu"), torch.float32)
    assert found.dtype == torch.float32 and found.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert (
        on_device(torch.tensor([0.5], dtype=torch.float64), torch.device("cpu"), torch.float32).dtype == torch.float32
    )
