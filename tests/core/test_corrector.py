"""The corrector against direct integration, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from speca.core import corrector as module
from speca.core.corrector import Corrector, Draft, Transition, advance, quadrature


def test_quadrature_integrates_what_its_nodes_can_interpolate() -> None:
    """Degree 2 through 3 nodes, on an uneven grid and with a sampler that also shrinks and grows the sample."""
    drafts = [Draft(j, Transition((1.1 - 0.05 * j,), (0.1 * j - 1,))) for j in (3.0, 4.0, 5.5)]
    value = lambda t: 2 - 3 * t + 0.5 * t**2  # noqa: E731
    nodes = [7.0, 2.0, 0.5]
    expected = 0.0
    for position, ((keep,), (move,), *_) in drafts:
        expected = keep * expected + move * value(position)
    (omega,) = quadrature(nodes, drafts)
    assert sum(o * value(n) for o, n in zip(omega, nodes, strict=True)) == pytest.approx(expected)


def _drafted(pull: float = 0.0) -> tuple[Corrector, Transition, torch.Tensor, list[tuple[tuple[float, ...], ...]]]:
    """Two rows, the second with twice the numbers of the first, after two full steps and three drafts."""
    step = Transition((0.9,), (-0.5,), pull, size=2.0)
    kept, scale = Corrector(2, 2), torch.tensor([[1.0], [2.0]])
    for value in (0.3, 0.5):
        kept.anchor([0, 1], scale * value, torch.zeros(2, 1))
    for j, value in enumerate((0.6, 0.7, 0.8)):
        kept.draft([0, 1], scale * value, 2.0 + j, step)
    omega = quadrature([5.0, 1.0, 0.0], kept.drafts[0])
    return kept, step, scale * 0.9, [omega, omega]


def test_move_is_what_the_interpolated_outputs_would_have_done() -> None:
    kept, step, out, omega = _drafted()
    (move,), size = kept.move([0, 1], out, omega, step)
    drift = 0.0
    for value in (0.6, 0.7, 0.8):
        drift = 0.9 * drift - 0.5 * value
    (o,) = omega[0]
    gap = o[0] * 0.9 + o[1] * 0.5 + o[2] * 0.3 - drift
    assert size.tolist() == pytest.approx([abs(gap) / 2, abs(gap)], rel=1e-5)
    trust = [1 / (1 + (s / module.TRUST) ** 2) for s in size.tolist()]
    assert move.flatten().tolist() == pytest.approx([gap * trust[0], 2 * gap * trust[1]], rel=1e-5)


def test_move_solves_the_implicit_equation() -> None:
    """The full step is worth `out + pull * d` at the place the sample is moved to."""
    kept, step, out, omega = _drafted(pull=0.8)
    (move,), size = kept.move([0, 1], out, omega, step)
    d = move * (1 + (size / module.TRUST) ** 2).unsqueeze(1)  # undo the shortening
    (explicit,), _ = _drafted()[0].move([0, 1], out + 0.8 * d, omega, Transition((0.9,), (-0.5,), 0.0, size=2.0))
    by_hand = explicit * (1 + (d / 2 / module.TRUST) ** 2)
    torch.testing.assert_close(d, by_hand, rtol=1e-4, atol=1e-6)


def test_rows_are_independent_and_memory_is_counted() -> None:
    kept, step, out, omega = _drafted()
    (both,), _ = kept.move([0, 1], out, omega, step)
    (alone,), _ = kept.move([1], out[1:], omega[:1], step)
    torch.testing.assert_close(alone, both[1:])
    assert kept.bytes() == 2 * (2 * 2 + 1) * 4  # rows x (anchors x two streams + drift) x fp32
    kept.anchor([1], out[1:], torch.zeros(1, 1))
    assert [len(d) for d in kept.drafts] == [3, 0]


def test_drafts_get_what_their_anchors_lack() -> None:
    kept = Corrector(2, 1)
    kept.anchor([0], torch.ones(1, 3), torch.full((1, 3), 0.5))
    kept.anchor([0], torch.ones(1, 3), torch.full((1, 3), 0.25))
    weights = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(kept.pulled([0], weights), torch.full((1, 3), 3 * 0.25 - 2 * 0.5))


TWO_STEP = Transition((-0.3, 1.2), (0.5, 0.4))
"""Of a sampler that remembers one output: the next sample but one follows from this one and the next."""


def test_a_change_runs_on_as_the_sampler_does() -> None:
    """Two-step Adams-Bashforth: `x' = x + 1.5 h v - 0.5 h v_before`, so an output counts 1.5 h, then h for ever."""
    h = 0.1
    step = Transition((0.0, 1.0), (1.5 * h, h))
    change = advance(advance([0.0, 0.0], step, 2.0), step, 1.0)
    assert change == pytest.approx([2 * h + 1.5 * h, 2 * h + h])
    assert advance(advance(change, step), step) == pytest.approx([3 * h, 3 * h])
    assert advance([2.0], Transition((0.5,), (3.0,)), 1.0) == [4.0]


def test_what_is_owed_is_paid_at_once_and_taken_back_bit_by_bit() -> None:
    """After each payment the sample lacks nothing, and payments fade though nothing else is owed."""
    kept, rows = Corrector(2, 2), [0, 1]
    kept.draft(rows, torch.zeros(2, 3), 0.0, TWO_STEP)
    assert kept.pay(rows, TWO_STEP) is None, "nothing is owed"
    owed = [torch.full((1, 3), 1.0), torch.full((1, 3), 0.7)]
    kept.owe([1], owed)
    lacking, payments = [o[0, 0].item() for o in owed], []
    for _ in range(9):
        paid = kept.pay(rows, TWO_STEP)
        assert paid is not None and not paid[0].any(), "the other row owes nothing"
        payments.append(paid[1, 0].item())
        lacking = advance(lacking, TWO_STEP, -payments[-1])
        assert lacking[0] == pytest.approx(0, abs=1e-6)
    assert abs(payments[-1]) < 0.01 * abs(payments[0]) and payments[1] * payments[0] != 0
    assert kept.bytes() == (2 + 2) * 2 * 3 * 4  # (drift + debt) x two samples x rows x fp32


def test_a_step_that_is_still_lets_debts_stand() -> None:
    kept, still = Corrector(2, 1), Transition((-0.3, 1.2), (1e-9, 0.4))
    kept.draft([0], torch.zeros(1, 3), 0.0, TWO_STEP)
    kept.owe([0], [torch.ones(1, 3), torch.ones(1, 3)])
    paid = kept.pay([0], still)
    assert paid is not None and not paid.any() and still.still
    later = kept.pay([0], TWO_STEP)
    expected = advance(advance([1.0, 1.0], still), TWO_STEP)[0] / TWO_STEP.move[0]
    assert later is not None and later[0, 0].item() == pytest.approx(expected)
