"""From rows to tables: fronts, intervals, signals, the document, the page, and the GPU suite in toy sizes."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import speca
import tiny
from bench.toy import PLAN, arguments
from speca.bench import benchmarks, gpu, page, pareto, plots, results, signals, tables

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 6


def quality_row(method: str, speed: float, psnr: float, family: str = "rival", **more: Any) -> dict[str, Any]:
    values = [psnr + 0.1 * k for k in range(SEEDS)]
    return dict(
        kind="quality", method=method, knob="k", value=speed, family=family, flops=100.0 / speed, flops_full=100.0,
        flops_speedup=speed, full_steps=[50 / speed] * SEEDS, psnr=values, ssim=[0.9] * SEEDS,
        relative_l2=[0.1] * SEEDS, bytes_per_sample=2**20, **more,
    )  # fmt: skip


def rows_of(settings: list[tuple[str, str, list[tuple[float, float]]]]) -> list[dict[str, Any]]:
    """Rows as a suite writes them, of invented methods."""
    about = dict(
        kind="about", model="toy", seeds=list(range(SEEDS)), tuning_seeds=[500_000], suite={"steps": 50}, blocks=4,
        hardware={"name": "a CPU"}, versions={"torch": "2"}, pipeline="P", transformer="T", scheduler="S",
        parameters=1e6,
    )  # fmt: skip
    rows = [about, quality_row("none", 1.0, 150.0, "steps") | {"value": 0}]
    for name, family, points in settings:
        rows += [quality_row(name, speed, psnr, family) for speed, psnr in points]
    times = [
        dict(kind="time", method=r["method"], value=r["value"], round=n, batch=8, seconds_full=8.0, seconds_total=9.0,
             seconds=8.0 / (0.9 * r["flops_speedup"]) + 0.01 * n)
        for r in rows[1:] for n in (0, 1)
    ]  # fmt: skip
    return [*rows, *times]


FIELD = [
    ("speca", "speca", [(2.0, 48.0), (4.0, 42.0), (8.0, 34.0)]),
    ("taylor-1", "forecast", [(2.0, 44.0), (4.0, 39.0), (8.0, 30.0)]),
    ("oracle-error", "oracle", [(2.0, 50.0), (8.0, 40.0)]),
    ("slow", "rival", [(1.2, 60.0), (1.4, 55.0)]),
]


# ------------------------------------------------------------------------------------------------ fronts
def test_a_speed_is_read_between_neighbours_and_never_beyond() -> None:
    points = [pareto.Point(2.0, (40.0, 30.0)), pareto.Point(8.0, (20.0, 20.0))]
    values = pareto.at_speed(points, 4.0)
    assert values is not None and values.tolist() == pytest.approx([30.0, 25.0])
    assert pareto.at_speed(points, 1.9) is None and pareto.at_speed(points, 8.1) is None


def test_a_method_is_seen_at_its_best_settings() -> None:
    """A setting that another beats in both ways does not lower the curve; the fastest one always counts."""
    good, bad, fast = (pareto.Point(s, (v, v)) for s, v in ((2.0, 40.0), (3.0, 10.0), (4.0, 36.0)))
    assert pareto.front([bad, fast, good]) == [good, fast]
    values = pareto.at_speed([bad, fast, good], 3.0)
    assert values is not None and values.min() > 36


def test_the_largest_speed_at_which_a_quality_is_reached() -> None:
    points = [pareto.Point(2.0, (44.0, 40.0)), pareto.Point(8.0, (30.0, 20.0))]
    assert pareto.needed(points, 30.0, q=0.0) == pytest.approx(4.0)
    assert pareto.needed(points, 20.0, q=0.0) == pytest.approx(8.0)
    assert pareto.needed(points, 41.0, q=0.0) is None


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    hits, trials = 0, 60
    for seed in range(trials):
        drawn = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3
        other = pareto.Reading(torch.zeros(40, dtype=torch.float64))
        _, low, high = pareto.paired_difference(pareto.Reading(drawn), other, seed)
        hits += low <= 3 <= high
    assert 0.85 * trials <= hits <= trials


def timed(seed: int, rounds: int) -> dict[tuple[str, Any], list[float]]:
    """Speeds of 12 methods of 6 settings, truly 2 to 7; a round of a method is off by 6 %, each time by 3 % more."""
    generator = torch.Generator().manual_seed(seed)
    whole = 0.06 * torch.randn(12, 1, rounds, generator=generator)
    off = (whole + 0.03 * torch.randn(12, 6, rounds, generator=generator)).exp()
    return {(str(m), s): (float(s) * off[m, s - 2]).tolist() for m in range(12) for s in range(2, 8)}


@pytest.mark.parametrize("rounds", [2, 4])
def test_other_rounds_scatter_as_times_do(rounds: int) -> None:
    """A setting's redrawn speeds hold its true speed in nineteen of twenty, though two rounds alone say little."""
    hits, share, trials = 0, [], 40
    for seed in range(trials):
        found = pareto.redrawn(timed(seed, rounds), seed)
        for (method, speed), drawn in found.items():
            low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
            hits += method == "0" and low <= speed <= high
        one, other = found["0", 3].log(), found["0", 4].log()
        share.append(torch.corrcoef(torch.stack([one, other]))[0, 1].item())
    assert 0.88 * 6 * trials <= hits <= 0.99 * 6 * trials
    assert sum(share) / trials > 0.5, "a round that was slow was slow for all settings of its method"


def test_a_setting_timed_once_scatters_like_the_others() -> None:
    drawn = [pareto.redrawn({**timed(seed, 2), ("once", 3): [3.0]})["once", 3] for seed in range(20)]
    assert torch.cat(drawn).log().std().item() == pytest.approx(math.hypot(0.06, 0.03), rel=0.12)
    assert pareto.redrawn({("once", 3): [3.0]}) == {}


def test_fronts_of_all_draws_are_the_fronts_of_each() -> None:
    """Whichever settings a draw makes the best, the quality read off is that of the plain front."""
    generator = torch.Generator().manual_seed(0)
    speeds = 2 + 6 * torch.rand(pareto.DRAWS, 5, generator=generator, dtype=torch.float64)
    values = [tuple((40 - 4 * k + torch.randn(3, generator=generator)).tolist()) for k in range(5)]
    points = [pareto.Point(3.0 + k, values[k], speeds[:, k]) for k in range(5)]
    found = pareto.reading(points, 4.5)
    assert found is not None and found.redrawn is not None
    outside = 0
    for draw in range(0, pareto.DRAWS, 20):
        alone = [pareto.Point(float(speeds[draw, k]), values[k]) for k in range(5)]
        best = pareto.front(alone)
        low = [p for p in best if p.speed <= 4.5]
        high = [p for p in best if p.speed >= 4.5]
        if not low or not high:
            outside += 1
            assert found.redrawn[draw].isnan().all()
            continue
        share = math.log(4.5 / low[-1].speed) / math.log(high[0].speed / low[-1].speed)
        expected = [a + share * (b - a) for a, b in zip(low[-1].values, high[0].values, strict=True)]
        assert found.redrawn[draw].tolist() == pytest.approx(expected)
    assert 0 < outside < pareto.DRAWS / 20


def test_intervals_at_a_speed_in_time_are_wider_than_those_over_samples() -> None:
    """Two methods of the same quality, one timed 20 % apart: only its interval knows."""
    points = [pareto.Point(s, (q, q + 0.1)) for s, q in ((2.0, 40.0), (8.0, 20.0))]
    drawn = torch.linspace(0.8, 1.25, pareto.DRAWS, dtype=torch.float64)
    shaky = [pareto.Point(p.speed, p.values, p.speed * drawn) for p in points]
    sure, unsure = pareto.reading(points, 4.0), pareto.reading(shaky, 4.0)
    assert sure is not None and unsure is not None and sure.values.tolist() == unsure.values.tolist()
    (_, low, high), (_, least, most) = pareto.median_interval(sure), pareto.median_interval(unsure)
    assert high - low < 0.2 and most - least > 4
    _, low, high = pareto.paired_difference(unsure, sure)
    assert low < -2 and high > 2


# ------------------------------------------------------------------------------------------------ tables
def test_tables_say_who_is_better_and_by_how_much() -> None:
    rows = rows_of(FIELD)
    lines = tables.table(rows, 4.0, "flops")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["_oracle-error_", "**speca**", "taylor-1"]
    assert "-3.00 [-3.00, -3.00] *" in lines[-1], "taylor-1 is 3 dB below, on every seed"
    assert tables.table(rows, 20.0, "flops") == ["No method's sweep spans 20x on this axis."]
    (speed,) = {r["wall_speedup"] for r in results.measured(rows) if r["method"] == "speca" and r["value"] == 4.0}
    assert 3.5 < speed < 3.6


def test_the_spread_of_full_steps_is_a_histogram() -> None:
    assert tables.spread([10.0, 10.0]) == "10"
    assert tables.spread([10.0, 12.0, 12.0]) == "11.3 (10: 1, 12: 2)"
    assert tables.spread([float(k) for k in range(20)]) == "9.5 (0 to 19)"


def test_the_document_answers_at_each_speed(tmp_path: Path) -> None:
    rows = rows_of(FIELD)
    text = benchmarks.model_page("toy", rows)
    assert "- **3x.** `speca`: " in text and "`taylor-1`" in text and "SpeCa is better by the mean (+" in text
    assert "**7x.**" in text and "does not reach" not in text.split("## In seconds")[0]
    assert "Calls of 8 samples, 2 rounds." in text and "- **3x.** `speca`: " in text.split("## In seconds")[1]
    fast = rows_of([("speca", "speca", [(5.0, 30.0), (6.0, 20.0)])])
    assert "does not reach 3x" in benchmarks.model_page("toy", fast)
    worse = [(n, f, [(s, q + 8 * (n == "taylor-1")) for s, q in p]) for n, f, p in FIELD]
    assert "SpeCa is worse by the mean (-" in benchmarks.model_page("toy", rows_of(worse))
    plots.plot(rows, tmp_path, "bench-toy")
    assert (tmp_path / "bench-toy.svg").stat().st_size > 10_000 and (tmp_path / "bench-toy.png").is_file()


def test_the_first_page_begins_with_one_table_and_has_a_plot_for_each_model() -> None:
    """The best of each kind beside SpeCa at each speed; what does not reach a speed is left open."""
    text = benchmarks.overview({"toy": rows_of(FIELD), "other": rows_of(FIELD[:1])}, gpu=True)
    lines = text.splitlines()
    head = next(k for k, line in enumerate(lines) if line.startswith("|"))
    assert head < 10 and sum(line.startswith("| --- ") for line in lines) == 1, "one table, and it comes first"
    body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[head + 2 : head + 8]]
    assert [row[:2] for row in body] == [[m, f"{s}x"] for m in ("toy", "other") for s in (3, 5, 7)]
    assert body[0][2:6] == ["2.69x", "**44.7 / 44.5**", "-", "-"] and body[0][6] == "41.3 / 41.1 `taylor-1`"
    assert body[3][6] == "-" and "`slow`" not in text and "oracle" not in text
    for model in ("toy", "other"):
        assert f"](img/bench-{model}.svg)" in text and f"[{model}](benchmarks/{model}.md)" in text
    assert "[gpu](benchmarks/gpu.md)" in text and "No results are committed yet." in benchmarks.overview({})


def test_make_bench_writes_from_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(FIELD)))
    paths = ["--results", str(results), "--out", str(tmp_path / "b.md"), "--pictures", str(tmp_path / "img")]
    monkeypatch.setattr(sys, "argv", ["benchmarks.py", *paths])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "recipes/benchmarks.py"), run_name="__main__")
    assert done.value.code == 0 and "## toy" in (tmp_path / "b.md").read_text()
    assert (tmp_path / "img/bench-toy.svg").is_file()
    assert (tmp_path / "b" / "toy.md").read_text().startswith("# Benchmarks of toy")
    for page_of in (tmp_path / "b.md", tmp_path / "b" / "toy.md"):
        links = re.findall(r"\]\(([^)]+)\)", page_of.read_text())
        assert links and [link for link in links if not (page_of.parent / link).is_file()] == []


def test_the_page_keeps_what_the_report_says_and_nothing_runs_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg/>")
    table = "| a | b |\n| --- | ---: |\n| **speca** | 1 |\n| _o_ | 2 |\n"
    words = f"# T\n\nOf `x` <script>.\n\n![P](a.svg)\n\n## One\n\n{table}"
    shown = page.page(words, {"a.svg": tmp_path / "a.svg"})
    assert "<code>x</code> &lt;script&gt;" in shown and '<a href="#one">' in shown and '<h2 id="one">' in shown
    assert '<tr class="ours">' in shown and '<tr class="oracle">' in shown and '<td class="n">2</td>' in shown


# ------------------------------------------------------------------------------------------------ signals
def test_ranks_and_areas() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert signals.spearman(x, x.exp()) == pytest.approx(1.0) and signals.spearman(x, -x) == pytest.approx(-1.0)
    assert signals.ranks(torch.tensor([5.0, 5.0, 1.0])).tolist() == [2.5, 2.5, 1.0]
    bad = torch.tensor([False, False, False, True, True])
    assert signals.auc(x, bad) == 1.0 and signals.auc(-x, bad) == 0.0 and signals.auc(torch.ones(5), bad) == 0.5


def test_signals_of_a_run_and_a_planted_perfect_one() -> None:
    case = tiny.flux()
    seeds, steps = [1, 2, 3], 20
    call = {**arguments(case)(case.pipe, seeds, steps)}
    before = case([1])
    rows = signals.signal_rows(case.pipe, call, seeds)
    assert torch.equal(case([1]), before)
    assert len(rows) == len({r["place"] for r in rows}) * len(seeds) >= 24
    assert all(r["effect"] > 0 and r["true error"] > 0 and r["last block"] > 0 for r in rows)
    planted = [{**r, "perfect": r["effect"], "blind": 1.0} for r in rows]
    found = {v["signal"]: v for v in signals.verdicts(planted)}
    assert found["perfect"]["spearman effect"] == pytest.approx(1.0) and found["perfect"]["auc effect"] == 1.0
    assert found["perfect"]["within effect"] == pytest.approx(1.0) and found["blind"]["auc effect"] == 0.5
    assert found["true error"]["spearman true error"] == pytest.approx(1.0)
    assert {"last block", "first block", "input", "disagreement", "corrector, weighted"} <= found.keys()
    assert "| perfect | " in "\n".join(tables.signal_table([*planted])) and PLAN.steps


def test_signals_need_a_sampler_that_is_linear() -> None:
    from diffusers import DPMSolverMultistepScheduler

    case = tiny.dit()
    case.pipe.scheduler = DPMSolverMultistepScheduler.from_config(case.pipe.scheduler.config, thresholding=True)
    with pytest.raises(speca.InputError, match="linear sampler"):
        signals.signal_rows(case.pipe, arguments(case)(case.pipe, [1], 24), [1])


# ------------------------------------------------------------------------------------------------ the GPU suite
@pytest.mark.slow
def test_the_gpu_suite_runs_in_toy_sizes_and_keeps_to_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_gpu

    monkeypatch.setattr(bench_gpu, "trained", lambda *_: [])
    out = tmp_path / "gpu.json"
    bench_gpu.main(out, minutes=3.0, tiny=True, device="cpu", repeats=1)
    found = json.loads(out.read_text())
    assert found["tiny"] and found["hardware"] and {m["model"] for m in found["models"]} == {
        "DiT-XL/2", "FLUX.1-dev", "HunyuanVideo",
    }  # fmt: skip
    for model in (m for m in found["models"] if not m["compiled"]):
        reasons = [r["reason"] for r in model["rows"] if "reason" in r]
        assert not [r for r in reasons if "cache-dit is not installed" not in r], reasons
        by = {r["method"]: r for r in model["rows"] if "seconds" in r}
        for name in ("speca", "features, unchecked"):
            assert by[name]["decisions"] == "FFAAAFAAAF"
            assert by["module caches (the authors' layout)"]["cache_bytes"] > 2 * by[name]["cache_bytes"]
        assert set(by["features, every draft rejected"]["decisions"]) == {"F", "R"}
        assert 0 < model["draft_step"] and model["full_step"] > 0 and model["rejected_step"] > 0
    assert "| DiT-XL/2 | 1 | eager |" in gpu.gpu_page(json.loads(out.read_text()))
    bench_gpu.main(out, minutes=0.1, tiny=True, device="cpu", repeats=1)
    assert len(json.loads(out.read_text())["left_out"]) >= 3, "there was no time, and it says what was left out"


def test_no_decibels_are_read_between_a_setting_that_changed_nothing_and_a_fast_one() -> None:
    """Between a run that skips nothing, 150 dB by convention, and a fast one there is nothing to be read off."""
    rows = rows_of([("speca", "speca", [(1.0, 150.0), (4.0, 40.0), (8.0, 30.0)])])
    points = results.curves(rows)["speca"]
    assert [p.speed for p in points] == [4.0, 8.0]
    assert pareto.at_speed(points, 3.0) is None


def test_the_report_says_whether_adapting_to_each_sample_is_worth_it() -> None:
    """At 30 dB the planned run is 2.0 and the searched one 4.0 times as fast as a full run: twice the cost."""
    fixed = ("annealed-corrected", "schedule", [(2.0, 40.0), (4.0, 30.0)])
    slow = rows_of([("speca-unprepared", "speca", [(1.5, 40.0), (2.0, 30.0)]), fixed])
    (words,) = tables.adapting(slow, [30.0, 39.0])
    assert "+100% at 30 dB" in words and "not the 15 % less" in words and "at 39 dB" in words
    fast = rows_of([("speca-unprepared", "speca", [(4.0, 40.0), (8.0, 30.0)]), fixed])
    assert (
        "-50% at 30 dB" in tables.adapting(fast, [30.0])[0] and "That is worth it" in tables.adapting(fast, [30.0])[0]
    )
    assert tables.adapting(rows_of([fixed])) == []


def test_the_same_rows_give_the_same_plots(tmp_path: Path) -> None:
    """So that a diff of docs/img shows what changed; a name of what could not run must not become the picture's."""
    rows = rows_of([("speca", "speca", [(2.0, 40.0), (4.0, 30.0)]), ("taylor-1", "forecast", [(2.0, 30.0)])])
    rows.append({"kind": "quality", "method": "wish", "value": 1, "family": "rival", "reason": "no such thing"})
    for place in (tmp_path / "one", tmp_path / "two"):
        place.mkdir()
        plots.plot(rows, place, "curves")
        plots.summary(rows, place, "summary")
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert first == second and set(first) == {f"{n}.{kind}" for n in ("curves", "summary") for kind in ("svg", "png")}
