"""The bench: cheats are caught, numbers are true, an interrupted run goes on, what cannot run says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import speca
import tiny
from speca.bench import measure, pareto, report, suites
from speca.bench.methods import Method, Setup, chosen, methods, plain, random_schedule, uniform_schedule

PLAN = suites.Suite(samples=3, timed=2, rounds=1, tuning=2, tries=2, batch=2, steps=12)


def arguments(case: tiny.Case) -> Any:
    """Calls of a tiny pipeline: the conditions of its case, by seed."""

    def make(pipe: Any, seeds: Any, steps: int) -> dict[str, Any]:
        call = {**case.arguments, **case.conditions(list(seeds)), "num_inference_steps": steps}
        return {name: value for name, value in call.items() if name != "output_type"}

    return make


def field(*names: str) -> list[Method]:
    return chosen(list(names), PLAN.steps)


def bench(case: tiny.Case, out: Path, *more: Method, names: tuple[str, ...] = ("none",)) -> list[dict[str, Any]]:
    return suites.Bench(case.pipe, "tiny", PLAN, out, [*field(*names), *more], arguments(case)).run()


def quality(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(r for r in rows if r["kind"] == "quality" and r["method"] == name)


@contextmanager
def skips_everything(pipe: Any, call: dict[str, Any], value: Any) -> Iterator[Setup]:
    """A cheat: the transformer is called once, and its first output is given at every step."""
    model, kept = pipe.transformer, {}
    forward = model.forward

    def once(sample: Any, *args: Any, **kwargs: Any) -> Any:
        if len(sample) not in kept:  # one batch is smaller than the other
            kept[len(sample)] = forward(sample, *args, **kwargs)
        return kept[len(sample)]

    model.forward = once
    try:
        yield Setup(pipe, call)
    finally:
        del model.forward


def test_cheats_are_caught(tmp_path: Path) -> None:
    """Giving the reference costs all of it; skipping everything is fast and worse than any honest method."""
    pipe = speca.zoo.load("fashion-dit")  # trained: of random weights nothing says that more steps are better
    pipe.set_progress_bar_config(disable=True)
    names = ("none", "taylor-1", "speca")
    cheats = [Method("reference", "-", (0,), plain), Method("skip", "-", (0,), skips_everything)]
    rows = suites.Bench(pipe, "fashion-dit", PLAN, tmp_path, [*field(*names), *cheats]).run()
    same, skipped = quality(rows, "reference"), quality(rows, "skip")
    assert same["flops_speedup"] == 1.0 and same["full_steps"] == [PLAN.steps] * PLAN.samples
    assert same["psnr"] == [measure.IDENTICAL] * PLAN.samples
    honest = [r for r in rows if r["kind"] == "quality" and r["method"] in names and "reason" not in r]
    assert len(honest) > 10
    assert all(sum(skipped["psnr"]) <= sum(r["psnr"]) for r in honest)


def test_flops_count_what_runs(tmp_path: Path) -> None:
    """Half the steps cost half; a draft its head, a rejected draft all that it was."""
    rows = bench(tiny.flux(), tmp_path, names=("none", "fewer-steps", "speca-verified"))
    fewer = [r for r in rows if r["kind"] == "quality" and r["method"] == "fewer-steps"]
    assert fewer[0]["flops_speedup"] == pytest.approx(PLAN.steps / fewer[0]["value"])
    for row in (r for r in rows if r["kind"] == "quality" and r["method"] == "speca-verified"):
        steps = sum(row["full_steps"]) / len(row["full_steps"])
        assert PLAN.steps / row["flops_speedup"] > steps, "drafts are not free"


def test_unrelated_images_have_their_true_psnr() -> None:
    """28 dB is what arithmetic on wrapping bytes gives for any two images."""
    one, other = (torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    found = measure.quality(one, other)
    # The mean square of the difference of two uniform numbers is 1/6.
    assert found["psnr"] == pytest.approx([7.78] * 2, abs=0.5)
    assert measure.quality(one, one)["psnr"] == [measure.IDENTICAL] * 2
    assert measure.quality(one, one)["relative_l2"] == [0.0, 0.0]
    assert found["relative_l2"] == pytest.approx([((1 / 6) / (1 / 3)) ** 0.5] * 2, abs=0.05)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    case, made = tiny.dit(), []

    @contextmanager
    def counted(pipe: Any, call: dict[str, Any], value: Any) -> Iterator[Setup]:
        made.append(value)
        if len(made) == 3:
            raise KeyboardInterrupt
        yield Setup(pipe, call)

    method = Method("counted", "-", (1, 2, 3), counted)
    with pytest.raises(KeyboardInterrupt):
        bench(case, tmp_path, method)
    file = tmp_path / "results.jsonl"
    before = file.read_text()
    file.write_text(before + '{"kind": "quality", "meth')  # a line cut short by the end of the process
    rows = bench(case, tmp_path, method)
    assert made[:3] == [1, 2, 3] and made[3:] == [3, 1, 2, 3], "what was measured is not measured again"
    assert file.read_text().startswith(before)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    assert bench(case, tmp_path, method) == rows


def test_results_of_another_run_are_not_mixed_in(tmp_path: Path) -> None:
    case = tiny.dit()
    bench(case, tmp_path)
    with pytest.raises(speca.InputError, match="begun with another model"):
        suites.Bench(case.pipe, "other", PLAN, tmp_path, field("none"), arguments(case))


def test_what_cannot_run_says_why_and_the_rest_goes_on(tmp_path: Path) -> None:
    case = tiny.dit()
    rows = bench(case, tmp_path, names=("none", "adams-bashforth", "first-block-cache", "reuse"))
    reasons = {r["method"]: r["reason"] for r in rows if "reason" in r}
    assert "belongs to no flow" in reasons["adams-bashforth"]
    assert "no CacheMixin" in reasons["first-block-cache"]
    report.write(rows, tmp_path)
    words = (tmp_path / "report.md").read_text()
    assert "## What could not run" in words and "no CacheMixin" in words
    assert (tmp_path / "curves.svg").stat().st_size > 10_000 and (tmp_path / "curves.png").stat().st_size > 10_000
    page = (tmp_path / "index.html").read_text()
    assert 'src="data:image/svg+xml' in page and page.count("<table>") == page.count("</table>") > 1


@pytest.mark.parametrize("name", sorted(set(methods()) - {"none", "presets", "fewer-steps"}))
def test_every_method_leaves_the_pipeline_as_it_was(name: str, tmp_path: Path) -> None:
    case = tiny.flux()
    call = arguments(case)(case.pipe, [1], PLAN.steps)
    scheduler, before = case.pipe.scheduler, case([1])
    method = methods(PLAN.steps)[name]
    value = frozenset({0, 1, 5}) if method.searched else method.values[len(method.values) // 2]
    pytest.importorskip("cache_dit") if method.package == "cache-dit" else None
    measure.run(method, case.pipe, call, value, [1], 1)
    assert case.pipe.scheduler is scheduler
    assert torch.equal(case([1]), before)


def test_searching_finds_nothing_worse_than_an_even_schedule() -> None:
    case = tiny.dit()
    call = arguments(case)(case.pipe, [1, 2], PLAN.steps)
    method = methods(PLAN.steps)["searched-schedule"]
    found = measure.search(method, case.pipe, call, 5, [1, 2], 2, tries=4)
    even = uniform_schedule(PLAN.steps, 5)
    plainly = measure.run(methods()["none"], case.pipe, call, 0, [1, 2], 2).images
    loss = [
        sum(measure.quality(measure.run(method, case.pipe, call, s, [1, 2], 2).images, plainly)["relative_l2"])
        for s in (found, even)
    ]
    assert len(found) == len(even) == 5 and loss[0] <= loss[1]


def test_schedules_have_as_many_full_steps_as_asked() -> None:
    for full in (3, 8, 17, 26):
        assert len(uniform_schedule(50, full)) == full and max(uniform_schedule(50, full)) == 49
        assert len(random_schedule(50, full, seed=1)) == full and {0, 1} <= random_schedule(50, full, seed=1)


def test_a_speed_is_read_between_neighbours_and_never_beyond() -> None:
    points = [pareto.Point(2.0, (40.0, 30.0)), pareto.Point(8.0, (20.0, 20.0))]
    values = pareto.at_speed(points, 4.0)
    assert values is not None and values.tolist() == pytest.approx([30.0, 25.0])
    assert pareto.at_speed(points, 1.9) is None and pareto.at_speed(points, 8.1) is None


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits, trials = 0, 60
    for seed in range(trials):
        drawn = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3
        _, low, high = pareto.paired_difference(drawn, torch.zeros(40, dtype=torch.float64), seed)
        hits += low <= 3 <= high
    assert 0.85 * trials <= hits <= trials


def test_wrong_names_are_one_sentence() -> None:
    with pytest.raises(speca.InputError, match="did you mean 'taylor-1'"):
        chosen(["taylor1"], 50)
    with pytest.raises(speca.InputError, match="did you mean 'quick'"):
        suites.suite("quik")
