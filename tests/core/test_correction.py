"""Corrections against direct integration, and what they leave alone."""

from __future__ import annotations

import pytest
import torch

from speca.core import correction as module
from speca.core.correction import Corrector, Draft, quadrature
from speca.core.transition import Transition, advance


def test_quadrature_integrates_what_its_nodes_can_interpolate() -> None:
    """Degree 2 through 3 nodes, on an uneven grid and with a sampler that also shrinks and grows the sample."""
    drafts = [Draft(j, Transition((1.1 - 0.05 * j,), (0.1 * j - 1,))) for j in (3.0, 4.0, 5.5)]
    value = lambda t: 2 - 3 * t + 0.5 * t**2  # noqa: E731
    nodes = [7.0, 2.0, 0.5]
    expected = 0.0
    for position, ((keep,), (effect,), *_) in drafts:
        expected = keep * expected + effect * value(position)
    (omega,) = quadrature(nodes, drafts)
    assert sum(o * value(n) for o, n in zip(omega, nodes, strict=True)) == pytest.approx(expected)


def _drafted(jacobian: float = 0.0) -> tuple[Corrector, Transition, torch.Tensor, list[tuple[tuple[float, ...], ...]]]:
    """Two rows, the second with twice the numbers of the first, after two full steps and three drafts."""
    step = Transition((0.9,), (-0.5,), jacobian, size=2.0)
    kept, scale = Corrector(2, 2, memory=1), torch.tensor([[1.0], [2.0]])
    for value in (0.3, 0.5):
        kept.add_full([0, 1], scale * value)
    for j, value in enumerate((0.6, 0.7, 0.8)):
        kept.add_draft([0, 1], scale * value, 2.0 + j, step)
    omega = quadrature([5.0, 1.0, 0.0], kept.drafts[0])
    return kept, step, scale * 0.9, [omega, omega]


LINE = [[5.0, -4.0]] * 2
"""Weights of the line through the kept outputs: 1.3 and 2.6 are forecast, where 0.5 and 1.0 were kept last."""
APART = [[0], [1]]
WHOLE: list[float | None] = [1e12] * 2
"""Of a prior that expects any innovation, so that corrections are taken whole."""
NONE = torch.zeros(2)


def test_correction_is_what_the_interpolated_outputs_would_have_done() -> None:
    kept, step, out, omega = _drafted()
    (correction,), size = kept.correction([0, 1], out, omega, step, NONE, WHOLE)
    drift = 0.0
    for value in (0.6, 0.7, 0.8):
        drift = 0.9 * drift - 0.5 * value
    (o,) = omega[0]
    gap = o[0] * 0.9 + o[1] * 0.5 + o[2] * 0.3 - drift
    assert size.tolist() == pytest.approx([abs(gap) / 2, abs(gap)], rel=1e-5)
    assert correction.flatten().tolist() == pytest.approx([gap, 2 * gap], rel=1e-5)


def test_without_a_prior_large_corrections_are_shortened_and_those_that_the_innovation_speaks_against() -> None:
    kept, step, out, omega = _drafted()
    (whole,), size = kept.correction([0, 1], out, omega, step, NONE, WHOLE)
    for value, missed in ((0.9, 1.0), (1.3, 0.0), (0.58, (0.72 / 0.08) ** 2)):
        output = torch.tensor([[value], [2 * value]])
        surprise = _drafted()[0].observe([0, 1], output, LINE, [None, None], APART)
        torch.testing.assert_close(surprise, torch.tensor([missed, missed]), rtol=1e-4, atol=1e-10)
        (weighed,), same = kept.correction([0, 1], out, omega, step, surprise, [None, None])
        shares = 1 / (1 + surprise**2) / (1 + (size / module.TRUST) ** 2)
        torch.testing.assert_close(weighed, whole * shares.unsqueeze(1))
        assert torch.equal(same, size), "the estimated error is that of the whole correction"


def test_with_a_prior_a_correction_counts_as_far_as_the_innovation_is_what_was_expected() -> None:
    """0.4 and 0.8 are missed; a sample beside, of which nothing is known, changes nothing."""
    kept, step, out, omega = _drafted()
    (whole,), _ = kept.correction([0, 1], out, omega, step, NONE, WHOLE)
    for expected, wanted in ((0.16, 1.0), (0.016, 10.0), (0.0016, 100.0)):
        surprise = _drafted()[0].observe([0, 1], out, LINE, [expected, None], APART)
        assert surprise.tolist() == pytest.approx([wanted, 1.0], rel=1e-4)
        (found,), _ = kept.correction([0, 1], out, omega, step, surprise, [expected, None])
        torch.testing.assert_close(found[0], whole[0] / (1 + (wanted / module.SURPRISE) ** 2))


def test_forecasts_go_as_far_as_the_last_ones_should_have_gone() -> None:
    """0.9 lies half way from 0.5, the last output, to the line's 1.3, so the gain goes from 1 half way to 1/2; of two
    rows of one sample the lower one counts."""
    for out, together, gains in (
        ([0.9, 2.6], APART, [0.75, 1.0]), ([0.9, 2.6], [[0, 1], [0, 1]], [0.75, 0.75]), ([0.1, 9.0], APART, [0.5, 1.0]),
    ):  # fmt: skip
        kept, *_ = _drafted()
        assert torch.equal(kept.forecast([0, 1], LINE), torch.tensor([[1.3], [2.6]]))
        kept.observe([0, 1], torch.tensor(out).unsqueeze(1), LINE, [None, None], together)
        wanted = [[0.5 + 0.8 * gains[0]], [1.0 + 1.6 * gains[1]]]
        torch.testing.assert_close(kept.forecast([0, 1], LINE), torch.tensor(wanted))
        torch.testing.assert_close(kept.forecast([1], LINE[:1]), torch.tensor(wanted[1:]))


def test_correction_solves_the_implicit_equation() -> None:
    """The full step is worth `out + jacobian * d` at the place that the sample is corrected to."""
    kept, step, out, omega = _drafted(jacobian=0.8)
    (d,), _ = kept.correction([0, 1], out, omega, step, NONE, WHOLE)
    flat = Transition((0.9,), (-0.5,), 0.0, size=2.0)
    (explicit,), _ = _drafted()[0].correction([0, 1], out + 0.8 * d, omega, flat, NONE, WHOLE)
    torch.testing.assert_close(d, explicit, rtol=1e-4, atol=1e-6)


def test_rows_are_independent_and_memory_is_counted() -> None:
    kept, step, out, omega = _drafted()
    surprise = kept.observe([0, 1], out, LINE, [None, 0.1], APART)
    (both,), _ = kept.correction([0, 1], out, omega, step, surprise, [None, 0.1])
    other = _drafted()[0]
    assert torch.equal(other.observe([1], out[1:], LINE[:1], [0.1], [[0]]), surprise[1:])
    (alone,), _ = other.correction([1], out[1:], omega[:1], step, surprise[1:], [0.1])
    torch.testing.assert_close(alone, both[1:])
    assert kept.bytes() == 2 * (2 + 1 + 1) * 4  # rows x (kept outputs + drift + gain) x fp32
    kept.add_full([1], out[1:])
    assert [len(d) for d in kept.drafts] == [3, 0]


def test_memory_has_its_place_from_the_first_full_step_on() -> None:
    """So a run that drafts nothing tells what one that drafts will hold; without memory there is nothing to hold."""
    for memory, buffers in ((0, 0), (1, 1), (3, 3)):
        kept = Corrector(2, 2, memory=memory)
        assert kept.bytes() == 0
        kept.add_full([0, 1], torch.zeros(2, 5))
        assert kept.bytes() == ((2 + buffers) * 5 + (memory > 0)) * 2 * 4


def test_forecasts_are_made_of_outputs_as_they_are_at_the_corrected_sample() -> None:
    kept = Corrector(2, 1, memory=1)
    kept.add_full([0], torch.ones(1, 3), torch.full((1, 3), 0.5))
    kept.add_full([0], torch.ones(1, 3), torch.full((1, 3), 0.25))
    weights = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    torch.testing.assert_close(kept.forecast([0], weights), torch.full((1, 3), 3 * 1.25 - 2 * 1.5))


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


def test_pending_corrections_are_taken_at_once_and_the_rest_bit_by_bit() -> None:
    """After each step the sample lacks nothing, and what is added fades though nothing else is pending."""
    kept, rows = Corrector(2, 2, memory=2), [0, 1]
    kept.add_full(rows, torch.zeros(2, 3))
    kept.add_draft(rows, torch.zeros(2, 3), 0.0, TWO_STEP)
    assert kept.take(rows, TWO_STEP) is None, "nothing is pending"
    corrections = [torch.full((1, 3), 1.0), torch.full((1, 3), 0.7)]
    kept.add_pending([1], corrections)
    lacking, added = [c[0, 0].item() for c in corrections], []
    for _ in range(9):
        taken = kept.take(rows, TWO_STEP)
        assert taken is not None and not taken[0].any(), "nothing is pending for the other row"
        added.append(taken[1, 0].item())
        lacking = advance(lacking, TWO_STEP, -added[-1])
        assert lacking[0] == pytest.approx(0, abs=1e-6)
    assert abs(added[-1]) < 0.01 * abs(added[0]) and added[1] * added[0] != 0
    assert (
        kept.bytes() == ((2 + 2 + 2) * 3 + 1) * 2 * 4
    )  # (kept outputs + (drift + pending) x two samples) x rows x fp32


def test_an_inert_step_leaves_corrections_pending() -> None:
    kept, inert = Corrector(2, 1, memory=2), Transition((-0.3, 1.2), (1e-9, 0.4))
    kept.add_full([0], torch.zeros(1, 3))
    kept.add_draft([0], torch.zeros(1, 3), 0.0, TWO_STEP)
    kept.add_pending([0], [torch.ones(1, 3), torch.ones(1, 3)])
    taken = kept.take([0], inert)
    assert taken is not None and not taken.any() and inert.inert
    later = kept.take([0], TWO_STEP)
    expected = advance(advance([1.0, 1.0], inert), TWO_STEP)[0] / TWO_STEP.effect[0]
    assert later is not None and later[0, 0].item() == pytest.approx(expected)
