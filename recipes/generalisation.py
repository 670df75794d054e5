"""What holds on models that nobody tuned on: writes docs/generalisation.md and its raw figures.

    python recipes/generalisation.py                      # 50 models in closed form (about half an hour)
    python recipes/generalisation.py --flow-b flow-b.pt   # and a trained pixel flow that took no part in any tuning
    python recipes/generalisation.py --models 6 --out x   # a quick look

Each model is run with one of the samplers that its kind has, in turn, or with all (`--every`), at 20, 28, 50 and 100
steps. At equal numbers of full steps stand: the same sampler with so many steps, the best of higher-order solvers with
so many steps, first-order forecasts of the output without corrections at even steps and at steps searched on other
seeds (Taylor-1), `speca` knowing nothing, after a run of another seed of which every third step was computed (online),
and after one full run of that seed. Signal to error in dB to the sampler's own full run.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from rich.progress import track
from torch import Tensor

import speca
from speca.bench.analytic import CLASSES, AnalyticModel, analytic
from speca.core.placement import even
from speca.denoiser.player import STRAIGHT

STEPS, RATIOS = (20, 28, 50, 100), (2, 3, 4, 5, 7)
REPORTED, SEARCHED, LEARNT_FROM = list(range(16)), list(range(500_000, 500_004)), 700_123
TRIES = 12
FEWEST = 4


@dataclass(frozen=True)
class Subject:
    """A model and one of its samplers.

    Attributes:
        name, sampler: of them.
        function: the model, from x (n, ...), time and classes (n,) to its output.
        noise: from seeds to the noise (n, ...).
        classes: number of classes, which take turns.
        solvers: names of the other samplers of its kind, which may be better with few steps.
    """

    name: str
    sampler: str
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    noise: Callable[[list[int]], Tensor]
    classes: int
    solvers: tuple[str, ...]

    def denoiser(self, steps: int, settings: dict[str, Any]) -> speca.Denoiser:
        """The model with `speca` around it, for the subject's sampler."""
        if self.sampler in FUNCTIONS:
            function, sigmas = edm(self.sampler, steps)
            return speca.Denoiser(self.function, sampler=function, sigmas=sigmas, options=OPTIONS, **settings)
        scheduler = SCHEDULERS[self.sampler]()
        scheduler.set_timesteps(steps)
        return speca.Denoiser(self.function, scheduler=scheduler, **settings)

    def draw(self, seeds: list[int], steps: int, denoise: Any = None, sampler: str = "") -> Tensor:
        """The samples (n, ...) that a sampler draws with the model, or with what stands for it."""
        name, denoise = sampler or self.sampler, denoise or self.function
        labels, x = torch.tensor(seeds) % self.classes, self.noise(seeds)
        if name in FUNCTIONS:
            function, sigmas = edm(name, steps)
            return function(denoise, x * sigmas[0], sigmas, labels=labels)
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(denoise(x, t, labels=labels), t, x).prev_sample
        return x


FLOW: dict[str, Callable[[], Any]] = {
    "flow Euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "DPM-Solver++ (flow)": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    ),
    "UniPC (flow)": lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}
VP: dict[str, Callable[[], Any]] = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"),
    "DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(timestep_spacing="trailing"),
}
SCHEDULERS = {**FLOW, **VP}
ALPHAS = VP["DDIM"]().alphas_cumprod.double()


OPTIONS = {"labels": torch.zeros(1, dtype=torch.int64)}


def edm_euler(denoise: Callable[..., Tensor], x: Tensor, sigmas: Tensor, labels: Tensor) -> Tensor:
    """Euler's method for `dx / d sigma = (x - D) / sigma` (EDM, arXiv:2206.00364)."""
    for here, there in pairwise(sigmas):
        x = x + (there - here) * (x - denoise(x, here, labels=labels)) / here
    return x


def edm_heun(denoise: Callable[..., Tensor], x: Tensor, sigmas: Tensor, labels: Tensor) -> Tensor:
    """Heun's method of second order; its last step is Euler's."""
    for here, there in pairwise(sigmas):
        slope = (x - denoise(x, here, labels=labels)) / here
        ahead = x + (there - here) * slope
        if there > 0:
            slope = (slope + (ahead - denoise(ahead, there, labels=labels)) / there) / 2
        x = x + (there - here) * slope
    return x


FUNCTIONS = {"EDM Euler": edm_euler, "EDM Heun": edm_heun}


def edm(name: str, steps: int) -> tuple[Callable[..., Tensor], Tensor]:
    """A sampler function and its sigmas, for about so many calls: Heun's method makes two a step."""
    count = steps if name == "EDM Euler" else max(2, (steps + 1) // 2)
    ramp = torch.linspace(80.0 ** (1 / 7), 0.002 ** (1 / 7), count) ** 7
    return FUNCTIONS[name], torch.cat([ramp, torch.zeros(1)])


def of_analytic(model: AnalyticModel) -> list[Subject]:
    """The samplers of a model in closed form."""
    names = {"flow": tuple(FLOW), "vp": tuple(VP), "edm": tuple(FUNCTIONS)}[model.path]

    def function(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        if model.path == "flow":
            time = t / 1000
        elif model.path == "vp":
            alpha = ALPHAS[t.long()]
            time = ((1 - alpha) / alpha).sqrt()
        else:
            time = t
        return model(x, time.reshape(-1).expand(len(x)), labels.expand(len(x)))

    better = names[1:]
    return [
        Subject(model.name, name, function, model.noise, CLASSES, tuple(n for n in better if n != name))
        for name in names
    ]


def of_flow_b(file: Path) -> list[Subject]:
    """The trained pixel flow of a file with the configuration and weights of a DiTTransformer2DModel."""
    kept = torch.load(file)
    net = diffusers.DiTTransformer2DModel(**kept["cfg"]).eval().requires_grad_(False)
    net.load_state_dict({name: value.float() for name, value in kept["sd"].items()})

    def noise(seeds: list[int]) -> Tensor:
        return torch.stack([torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def function(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = net(x, timestep=t.expand(len(x)), class_labels=labels, return_dict=False)[0]
        return found

    return [Subject("flow B", n, function, noise, 10, tuple(o for o in list(FLOW)[1:] if o != n)) for n in FLOW]


def decibels(found: Tensor, whole: Tensor) -> Any:
    """Signal to error (n,) in dB."""
    error = (found - whole).double().flatten(1).square().mean(1)
    signal = whole.double().flatten(1).square().mean(1)
    return (10 * (signal / error.clamp(min=1e-30)).log10()).numpy()


def taylor(schedule: tuple[int, ...]) -> dict[str, Any]:
    """Settings of first-order forecasts of the output at fixed full steps, without corrections."""
    return dict(schedule=schedule, tolerance=0.0, order=1, corrector=False, prior="none")


def searched(subject: Subject, steps: int, calls: int, full: int, flow: bool) -> tuple[int, ...]:
    """The best fixed full steps found for Taylor-1 on other seeds: even ones of both kinds, then single steps moved."""
    whole, chance = subject.draw(SEARCHED, steps), random.Random(0)

    def score(schedule: tuple[int, ...]) -> float:
        made = subject.draw(SEARCHED, steps, subject.denoiser(steps, taylor(schedule)))
        return float(np.median(decibels(made, whole)))

    known = {tuple(sorted({*even(calls, full, f), 1})): 0.0 for f in (True, False)}
    best = max((score(schedule), schedule) for schedule in known)
    for _ in range(TRIES):
        moved = set(best[1])
        step = chance.choice(sorted(moved - {0, 1}) or [1])
        to = min(calls - 1, max(2, step + chance.choice((-3, -2, -1, 1, 2, 3))))
        if to in moved:
            continue
        candidate = tuple(sorted(moved - {step} | {to}))
        best = max(best, (score(candidate), candidate))
    return best[1]


def cells(subject: Subject, steps: int) -> list[dict[str, Any]]:
    """One row for each budget; none where the sampler is not linear."""
    whole, plain = subject.draw(REPORTED, steps), subject.denoiser(steps, {})
    transitions = plain.response.transitions
    if not transitions:
        return []
    calls, flow = len(transitions), all(abs(t.jacobian) < STRAIGHT for t in transitions)
    with speca.calibrating(plain) as pending:
        subject.draw([LEARNT_FROM], steps, plain)
    online = subject.denoiser(steps, {"calibration": "online"})
    subject.draw([LEARNT_FROM], steps, online)
    rows = []
    for full in dict.fromkeys(calls // ratio for ratio in RATIOS):
        if full < FEWEST:
            continue

        def accelerated(settings: dict[str, Any]) -> Any:
            return decibels(subject.draw(REPORTED, steps, subject.denoiser(steps, settings)), whole)

        budget: dict[str, Any] = dict(speedup=calls / full)
        found = {
            "fewer steps": decibels(subject.draw(REPORTED, full), whole),
            "Taylor-1, even": accelerated(taylor(tuple(sorted({*even(calls, full, flow), 1})))),
            "Taylor-1, searched": accelerated(taylor(searched(subject, steps, calls, full, flow))),
            "nothing known": accelerated(budget),
            "one run": accelerated({**budget, "calibration": pending}),
            "online": accelerated({**budget, "calibration": shown_to(online)}),
        }
        solvers = [decibels(subject.draw(REPORTED, full, None, name), whole) for name in subject.solvers]
        found["best solver"] = max([found["fewer steps"], *solvers], key=lambda values: float(np.median(values)))
        rows.append(
            {"model": subject.name, "sampler": subject.sampler, "steps": steps, "full": full, "calls": calls}
            | {name: [round(float(np.quantile(v, q)), 2) for q in (0.5, 0.05)] for name, v in found.items()}
        )
    return rows


def shown_to(denoise: speca.Denoiser) -> Any:
    """What a denoiser has learnt by itself, as a calibration of another one; False if nothing."""
    run = denoise.last
    noise, transitions = run.response.noise, run.response.transitions
    found = run.knowledge.find(run.kind, noise, transitions) if run.kind is not None else None
    return False if found is None else found


RIVALS = ("fewer steps", "best solver", "Taylor-1, even", "Taylor-1, searched")


def page(rows: list[dict[str, Any]], command: str) -> str:
    """docs/generalisation.md."""
    models = len({row["model"] for row in rows})
    lines = [
        "# Models that nobody tuned on",
        "",
        f"{models} models, {len(rows)} cells: a model, one of its samplers, a number of steps and of full steps. "
        "Signal to error in dB to the sampler's own full run, 16 samples; gains are those of the median sample (and of "
        "the 5th percentile). A win or loss is a difference of more than 0.5 dB. Analytic models are denoisers in "
        "closed form (`speca.bench.analytic`, reporting seeds): results on them are none on large trained models.",
        "",
        f"`{command}`",
        "",
        *summary("All cells", rows),
    ]
    for name in ("sampler", "steps"):
        for value in dict.fromkeys(row[name] for row in rows):
            lines += summary(f"{value}{' steps' if name == 'steps' else ''}", [r for r in rows if r[name] == value])
    for low, high in ((2, 2), (3, 3), (4, 4), (5, 5), (6, 7)):
        some = [row for row in rows if low <= row["calls"] // row["full"] <= high]
        if some:
            lines += summary(f"{low} to {high} times fewer full steps" if low < high else f"{low} times", some)
    worst = sorted(rows, key=lambda row: row["one run"][0] - row["fewer steps"][0])[:12]
    lines += [
        "## Worst cells of one run against fewer steps",
        "",
        "| model | sampler | steps | full | fewer | one run |",
    ]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['model']} | {r['sampler']} | {r['steps']} | {r['full']} | {r['fewer steps'][0]:.1f} / "
        f"{r['fewer steps'][1]:.1f} | {r['one run'][0]:.1f} / {r['one run'][1]:.1f} |"
        for r in worst
    ]
    return "\n".join(lines) + "\n"


def summary(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """One table: how each way of `speca` does against each rival."""
    lines = [f"## {title}", "", f"{len(rows)} cells.", ""]
    lines += ["| | against | mean gain | wins | losses | worst | P5: mean | losses > 1 dB | worst |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for ours in ("nothing known", "online", "one run"):
        for rival in RIVALS:
            gains = np.array([np.subtract(row[ours], row[rival]) for row in rows])
            (m, p), (worst, low) = gains.mean(0), gains.min(0)
            wins, losses = (gains[:, 0] > 0.5).mean(), (gains[:, 0] < -0.5).mean()
            lines.append(
                f"| {ours} | {rival} | {m:.1f} | {wins:.0%} | {losses:.0%} | {worst:.1f} | {p:.1f} | "
                f"{(gains[:, 1] < -1).mean():.0%} | {low:.1f} |"
            )
    return [*lines, ""]


def main(
    models: Annotated[int, typer.Option(help="Models in closed form.", min=1)] = 50,
    flow_b: Annotated[Path | None, typer.Option(help="The file of flow B, if it is at hand.")] = None,
    every: Annotated[bool, typer.Option(help="Each model with all its samplers, not with one in turn.")] = False,
    tuning: Annotated[bool, typer.Option(help="The models for tuning instead of those for reporting.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of generalisation.md and results/generalisation.json.")] = Path(
        "docs"
    ),
) -> None:
    """Run all cells and write the page."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    subjects = [] if flow_b is None else of_flow_b(flow_b)
    for n in range(models):
        some = of_analytic(analytic(2 * n + (not tuning)))
        subjects += some if every else [some[(n // 3) % len(some)]]
    work = [(subject, steps) for subject in subjects for steps in STEPS]
    rows = [row for subject, steps in track(work, "cells") for row in cells(subject, steps)]
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "results" / "generalisation.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
    options = f" --models {models}" * (models != 50) + " --flow-b flow-b.pt" * (flow_b is not None) + " --every" * every
    (out / "generalisation.md").write_text(page(rows, f"python recipes/generalisation.py{options}"), encoding="utf-8")
    print(f"{len(rows)} cells in {(time.perf_counter() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    typer.run(main)
