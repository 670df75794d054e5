"""Placement: the error it expects is the one that playing the schedule makes, and what it places is worth it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

import tiny
from speca.config import SpecaConfig
from speca.core.controller import Planner
from speca.core.correction import Corrector, quadrature
from speca.core.placement import LEAST, cheapest, even, expected, place, shortlist, with_placements
from speca.core.prior import DEPTH, Prior
from speca.core.starts import spread
from speca.core.transition import Transition, advance
from speca.denoiser.branch import Branch
from speca.denoiser.executor import Executor
from speca.denoiser.player import Call, Player
from speca.reports.costs import Costs

STEPS, SAMPLES, SIZE = 12, 6, 40


def flow() -> tuple[Transition, ...]:
    return tuple(Transition((1.0,), (-1 / STEPS,)) for _ in range(STEPS))


def noisy() -> tuple[Transition, ...]:
    """Steps of a sampler that is no flow: outputs follow the sample."""
    sizes = np.linspace(1.0, 1.4, STEPS + 1)
    steps = []
    for j in range(STEPS):
        keep, move = 1.2 - 0.01 * j, -0.2
        steps.append(Transition((keep,), (move,), (sizes[j + 1] / sizes[j] - keep) / move, float(sizes[j])))
    return tuple(steps)


def remembering() -> tuple[Transition, ...]:
    """Steps of a sampler that remembers the output before, and whose outputs follow the sample."""
    return tuple(
        Transition((-0.2 - 0.01 * j, 1.2 + 0.01 * j), (-0.15, -0.1 - 0.002 * j), 0.3, 1.0 + 0.03 * j)
        for j in range(STEPS)
    )


@pytest.fixture(scope="module")
def outputs() -> torch.Tensor:
    """Outputs (N, T, size) of full runs: smooth, and sharply bent early on."""
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, STEPS, dtype=torch.float64)
    basis = torch.stack([torch.ones_like(t), t, torch.exp(-8 * t), torch.sin(5 * t)])
    return torch.einsum("nkd,kt->ntd", torch.randn(SAMPLES, 4, SIZE, generator=generator, dtype=torch.float64), basis)


@pytest.fixture(scope="module")
def prior(outputs: torch.Tensor) -> Prior:
    moments = torch.einsum("nid,njd->ij", outputs, outputs) / SAMPLES / SIZE
    return Prior(tuple(1 - i / STEPS for i in range(STEPS)), ((moments + moments.T) / 2).numpy())


def play(outputs: torch.Tensor, prior: Prior, transitions: Sequence[Transition], full: set[int]) -> float:
    """The schedule with tensors, by the parts that the player uses; the error as `expected` adds it up."""
    rows = list(range(SAMPLES))
    corrector = Corrector(DEPTH, SAMPLES, len(transitions[0].keep))
    off = [torch.zeros(SAMPLES, SIZE, dtype=torch.float64)] * len(transitions[0].keep)
    anchors, met = list[int](), 0.0
    for step, t in enumerate(transitions):
        if step in full:
            told, moves = outputs[:, step] + t.jacobian * off[0], [torch.zeros(SAMPLES, SIZE)] * len(off)
            if corrector.drafts[0]:
                met += float((off[0] / t.size).square().mean())
                omega = quadrature([step, *anchors], corrector.drafts[0], prior.rule)
                moves, _ = corrector.correction(
                    rows, told, [omega] * SAMPLES, t, torch.zeros(SAMPLES), [None] * SAMPLES
                )
            off = [o + m for o, m in zip(off, moves, strict=True)]
            used = told + t.jacobian * moves[0]
            corrector.add_full(rows, told, t.jacobian * moves[0].float())
            anchors = [step, *anchors][:DEPTH]
        else:
            used = corrector.forecast(rows, prior.rule(anchors, [step]) * SAMPLES)
            corrector.add_draft(rows, used, step, t)
        off = advance(off, t, used - outputs[:, step])
    return math.sqrt(float(off[0].square().mean()) + met / len(full))


def play_whole(outputs: torch.Tensor, prior: Prior, transitions: Sequence[Transition], full: set[int]) -> float:
    """The schedule by the player itself: the sampler is stepped with what is handed over, corrections included."""
    player = Player(Planner(SpecaConfig(speedup=2.0, tolerance=0.0)), transitions, STEPS, Executor(), Costs(), DEPTH)
    player.prior = prior
    branch = Branch.begin(SAMPLES)
    for record in branch.records:
        record.placement = frozenset(full)
    off = [torch.zeros(SAMPLES, SIZE, dtype=torch.float64)] * len(transitions[0].keep)
    met = 0.0
    for step, t in enumerate(transitions):
        model = outputs[:, step] + t.jacobian * off[0]
        if step in full and branch.records[0].streak:
            met += float((off[0] / t.size).square().mean())
        used = player.play(Call(branch, step, lambda rows, model=model: model))
        off = advance(off, t, used - outputs[:, step])
    assert [step for step, d in enumerate(branch.records[0].decisions) if d == "F"] == sorted(full)
    return math.sqrt(float(off[0].square().mean()) + met / len(full))


@pytest.mark.parametrize("by", [play, play_whole])
@pytest.mark.parametrize("transitions", [flow(), noisy(), remembering()], ids=["flow", "noisy", "remembering"])
def test_the_expected_error_is_that_of_the_run(
    outputs: torch.Tensor, prior: Prior, transitions: tuple[Transition, ...], by: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whole corrections, that is: the expected error leaves out how a run weighs them."""
    tiny.take_corrections_whole(monkeypatch)
    chance = random.Random(0)
    for _ in range(12):
        full = {0, *chance.sample(range(1, STEPS), chance.randint(2, 7))}
        assert expected(prior, transitions, full) == pytest.approx(by(outputs, prior, transitions, full), rel=2e-3)


def test_few_schedules_are_better_than_the_placed_one(prior: Prior) -> None:
    found = place(prior, flow(), 6)
    assert found.steps[0] == 0 and len(found.steps) == 6
    every = sorted(expected(prior, flow(), {0, *rest}) for rest in combinations(range(1, STEPS), 5))
    assert found.error == pytest.approx(expected(prior, flow(), set(found.steps)))
    assert sum(error < found.error for error in every) <= len(every) // 50


def test_no_move_lowers_the_error_of_what_is_on_the_shortlist(prior: Prior) -> None:
    found = shortlist(prior, flow(), 6)
    assert found[0] == place(prior, flow(), 6) and len({p.steps for p in found}) == len(found) > 1
    assert [p.error for p in found] == sorted(p.error for p in found)
    for placement in found:
        full = set(placement.steps)
        kept = {0, 1} if placement.steps[1] == 1 else {0}
        moves = [(s, s + m) for s in full - kept for m in (-1, 1) if 0 < s + m < STEPS and s + m not in full]
        assert all(expected(prior, flow(), full - {s} | {o}) > 0.99 * placement.error for s, o in moves)


def test_the_shortlist_has_the_second_step_in_full_though_little_is_expected_of_it() -> None:
    t = np.linspace(0, 1, STEPS)
    basis = np.stack([np.ones(STEPS), 0.3 * np.cos(3 * t), 0.3 * np.sin(3 * t), 0.1 * np.sin(9 * t)])
    smooth = Prior(tuple(1 - i / STEPS for i in range(STEPS)), basis.T @ basis)
    seconds = [p.steps[1] for p in shortlist(smooth, flow(), 4)]
    assert seconds[0] > 1 and 1 in seconds


def test_all_steps_in_full_leave_no_error(prior: Prior) -> None:
    assert place(prior, flow(), STEPS).error == 0.0
    assert place(prior, flow(), STEPS + 3).steps == tuple(range(STEPS))


def test_the_cheapest_that_meets_a_tolerance(prior: Prior) -> None:
    for tolerance in (0.3, 0.03, 0.003, 0.0003):
        found = cheapest(prior, flow(), tolerance)
        assert found.error <= tolerance
        count = len(found.steps)
        assert count == LEAST or place(prior, flow(), count - 1).error > tolerance
    assert len(cheapest(prior, flow(), 1e9).steps) == LEAST
    assert cheapest(prior, flow(), 0.0).error == 0.0


def test_what_was_placed_beforehand_is_taken(prior: Prior) -> None:
    known = with_placements(prior, flow())
    assert sorted(known.placed) == list(range(LEAST, STEPS // 2 + 1))
    assert place(known, flow(), 5).steps == place(prior, flow(), 5).steps
    assert place(known, flow(), 5).error == pytest.approx(place(prior, flow(), 5).error)
    given = Prior(prior.noise, prior.moments, {5: (0, 1, 2, 3, 4)})
    assert place(given, flow(), 5).steps == (0, 1, 2, 3, 4)
    assert place(given, flow(), 5).error == pytest.approx(expected(prior, flow(), {0, 1, 2, 3, 4}))
    assert given.at(prior.noise[::2]).placed == {}, "of another number of steps"


def test_what_was_found_is_not_computed_again(prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample of each run asks: a calibrated DiT once spent 40 % of its time on placements that its file brings."""
    known = with_placements(prior, flow())
    found = [cheapest(known, flow(), 0.01), place(known, flow(), 5)]
    monkeypatch.setattr("speca.core.placement.Runs", None)
    assert [cheapest(known, flow(), 0.01), place(known, flow(), 5)] == found


@pytest.mark.parametrize("transitions", [flow(), noisy(), remembering()], ids=["flow", "noisy", "remembering"])
def test_no_plain_schedule_is_better(prior: Prior, transitions: tuple[Transition, ...]) -> None:
    for count in (2, 4, 6):
        plain = [spread(STEPS, count, density) for density in (0.9, 1.0, 1.2, 1.6)]
        least = min(expected(prior, transitions, set(p)) for p in plain)
        assert place(prior, transitions, count).error <= least * (1 + 1e-9)  # two ways to compute the same


def test_a_search_is_the_same_again_and_touches_no_random_numbers(prior: Prior) -> None:
    again = Prior(prior.noise, prior.moments)  # another object, so that nothing is found in a cache
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    found = shortlist(prior, remembering(), 5), shortlist(again, remembering(), 5)
    assert found[0] == found[1]
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_any_number_of_steps_can_be_placed() -> None:
    for total in (2, 3, 5, 9):
        t = np.linspace(0, 1, total)
        short = Prior(tuple(1 - t), np.exp(-8 * (t[:, None] - t) ** 2) + 1e-3 * np.eye(total))
        steps = tuple(Transition((1.0,), (-1 / total,)) for _ in range(total))
        for count in range(1, total):
            found = place(short, steps, count)
            assert found.steps[0] == 0 and len(set(found.steps)) == count and max(found.steps) < total
            assert found.error == pytest.approx(expected(short, steps, set(found.steps)))


def test_many_steps_are_placed_better_than_by_plain_schedules() -> None:
    total = 150
    t = np.linspace(0, 1, total)
    basis = np.stack([np.ones_like(t), t, np.exp(-8 * t), np.sin(5 * t), 0.1 * np.sin(11 * t)])
    long = Prior(tuple(1 - t), basis.T @ basis)
    steps = tuple(Transition((1.0,), (-1 / total,)) for _ in range(total))
    for count in (3, 8, 40):  # of which the first two are tried on some of the steps before all
        best, *others = shortlist(long, steps, count)
        plain = [expected(long, steps, set(spread(total, count, density))) for density in (0.9, 1.2, 1.6)]
        assert best.error == pytest.approx(expected(long, steps, set(best.steps))) and best.error < min(plain)
        assert any(p.steps[1] == 1 for p in (best, *others))


def test_even_steps_of_a_flow_are_somewhat_denser_at_the_beginning_and_end_with_the_last() -> None:
    for total, count in ((20, 6), (28, 9), (50, 10), (50, 16), (100, 14)):
        steps = even(total, count, flow=True)
        gaps = [b - a for a, b in pairwise(steps)]
        assert steps[0] == 0 and steps[-1] == total - 1 and len(steps) == count and min(gaps) > 0
        assert sum(gaps[: len(gaps) // 2]) / (len(gaps) // 2) < sum(gaps[-(len(gaps) // 2) :]) / (len(gaps) // 2)
        assert all(later <= 2 * gap for gap, later in pairwise(gaps)), "no line is drawn far beyond a short gap"
