"""calibrate: the prior of a model, and the fewest full steps that meet a quality with it, tried on fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config import SpecaConfig
from ..core.placement import LEAST, place, shortlist, with_placements
from ..core.prior import Prior
from ..denoiser.denoiser import Denoiser
from ..errors import InputError
from ..reports.comparison import psnr, quantile
from ..reports.measure import example_call, split
from .file import Calibration, Trial
from .recording import Recording
from .subject import Generate, LoopSubject, PipelineSubject, Subject

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Progress = Callable[[str], None]
"""Called with what comes next, in words."""

TUNING_SEED, FRESH_SEED = 600_000, 700_000
OPTIONS = 4  # placements of a number of full steps that are tried
MARGIN = 1.001  # the tolerance is a little above the error expected, so that rounding does not ask for one step more


def calibrate(
    target: DiffusionPipeline | Denoiser,
    call_kwargs: dict[str, Any] | None = None,
    *,
    loop: Generate | None = None,
    target_psnr: float = 35.0,
    samples: int = 32,
    confidence: float = 0.9,
    speedups: Sequence[float] = (),
    batch: int = 16,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the prior of a model, and find the fewest full steps with which samples stay near their own full run.

        calibration = speca.calibrate(pipe, target_psnr=35)
        calibration.save("flux-35.json")
        speca.enable(pipe, calibration="flux-35.json")

        speca.calibrate(denoise, loop=lambda seeds: sample_euler(denoise, noise(seeds), sigmas))   # one's own loop

    The outputs of full runs of tuning seeds give the prior, see `core/prior.py`. Numbers of full steps are then tried
    by bisection, each in the placements that the prior thinks best, of which the one with the best mean PSNR is kept.
    A number passes if the k-th smallest PSNR of its n samples meets the target,
    `k = floor((n + 1) (1 - confidence))`: the bound of split conformal prediction. As the best of several is taken, and
    the prior is of the same samples, it is then tried on as many fresh seeds, and what those gave is reported.

    Args:
        target: a pipeline, or a `Denoiser`, whose sampler is linear; others cannot be corrected.
        call_kwargs: arguments of the pipeline; lists with one entry a sample hold `2 * samples` of them, the second
            half for the fresh seeds. By default its classes, or a few plain prompts, in turn, and its own steps.
        loop: of a `Denoiser`, one's own loop: from a list of seeds to the samples (n, ...) that it draws by calling the
            denoiser.
        target_psnr: in dB, above 0; of a loop relative to the range of its samples.
        samples: number of tuning seeds, and of fresh ones; `1 / (1 - confidence) - 1` or more.
        confidence: share of fresh samples that are to meet the target, in (0, 1).
        speedups: budgets for which placements are tried too, as `enable(pipe, speedup=...)` takes them; above 1.
        batch: samples in one call.
        progress: called with what comes next, in words.

    Raises:
        InputError: a value out of range, the sampler is not linear, or half the steps in full miss the target.
    """
    _demand_enough(target_psnr, samples, confidence, speedups)
    say, batch = progress or (lambda words: None), min(batch, samples)
    one, other = _halves(target, call_kwargs, loop, samples, batch)
    say("full run on tuning seeds")
    recording = one.record()
    say("placing full steps")
    recording = replace(recording, prior=with_placements(recording.prior, recording.transitions))
    tuning, steps = _Half(one, recording.images, confidence), len(recording.transitions)
    tried = _Tried(tuning, recording, say)
    trials = _search(tried.attempt, max(LEAST, steps // 10), steps // 2, target_psnr)
    counts = {max(LEAST, math.floor(steps / speedup + 1e-9)) for speedup in speedups}
    trials += [tried.attempt(count) for count in sorted(counts - {t.full_steps for t in trials}, reverse=True)]
    best = _fewest(trials, target_psnr)
    say("fresh seeds")
    fresh = _Half(other, other.full(), confidence)
    trial, met = fresh.attempt(best.tolerance, tried.prior), sum(value >= target_psnr for value in fresh.values)
    low, high = wilson(met, samples)
    return Calibration(
        model=one.model, scheduler=one.scheduler,
        steps=steps, target_psnr=target_psnr, confidence=confidence, tolerance=best.tolerance,
        speedup=trial.speedup, fresh_median=trial.median, fresh_p5=trial.p5, fresh_met=met / samples, fresh_low=low,
        fresh_high=high, tuning_seeds=(TUNING_SEED, samples), fresh_seeds=(FRESH_SEED, samples), trials=tuple(trials),
        prior=tried.prior,
    )  # fmt: skip


def _halves(
    target: Any, call_kwargs: dict[str, Any] | None, loop: Generate | None, samples: int, batch: int
) -> tuple[Subject, Subject]:
    """What is calibrated, with the tuning seeds and with the fresh ones."""
    tuning = list(range(TUNING_SEED, TUNING_SEED + samples))
    fresh = list(range(FRESH_SEED, FRESH_SEED + samples))
    if isinstance(target, Denoiser):
        if loop is None:
            raise InputError("calibrate needs the loop of a Denoiser: pass loop=, from seeds to samples (n, ...).")
        return LoopSubject(target, loop, tuning, batch), LoopSubject(target, loop, fresh, batch)
    if not isinstance(getattr(target, "components", None), dict):
        raise InputError(
            f"calibrate takes a diffusers pipeline, not {type(target).__name__}; of a model in your own loop, make a "
            "speca.Denoiser and pass it with loop=."
        )
    seeds = [*tuning, *fresh]
    call = example_call(target, seeds) if call_kwargs is None else call_kwargs
    one, other = (PipelineSubject(target, *part, batch) for part in split(call, seeds, samples))
    return one, other


def _demand_enough(target_psnr: float, samples: int, confidence: float, speedups: Sequence[float]) -> None:
    if any(speedup <= 1 for speedup in speedups):
        raise InputError(f"a speed-up of 1 or less leaves nothing to place; got {list(speedups)}.")
    least = math.ceil(1 / (1 - confidence) - 1 - 1e-9) if 0 < confidence < 1 else 0
    if not least or target_psnr <= 0 or samples < least:
        raise InputError(
            f"calibrate needs a target above 0 dB, a confidence between 0 and 1 and, at {confidence}, at least {least} "
            f"samples; got {target_psnr} dB and {samples} samples."
        )


@dataclass
class _Half:
    """The tuning seeds or the fresh ones, and the PSNR of each sample in the last attempt."""

    subject: Subject
    full: Tensor
    confidence: float
    values: list[float] = field(default_factory=list)

    def attempt(self, tolerance: float, prior: Prior) -> Trial:
        """Return what `tolerance` gives with a prior."""
        images, report = self.subject.attempt(SpecaConfig(tolerance=tolerance), prior)
        self.values = psnr(images, self.full).tolist()
        k = math.floor((len(self.values) + 1) * (1 - self.confidence) + 1e-9)
        median, p5 = quantile(self.values, 0.5), quantile(self.values, 0.05)
        full = max(sample.full + sample.rejected for sample in report.samples)
        return Trial(full, tolerance, report.flops_speedup, median, p5, sorted(self.values)[k - 1])


@dataclass
class _Tried:
    """Placements tried on tuning seeds; those that are kept are the prior's from then on."""

    tuning: _Half
    recording: Recording
    say: Progress

    def __post_init__(self) -> None:
        self.prior = self.recording.prior

    def attempt(self, count: int) -> Trial:
        """The best of a few placements of `count` full steps, by the mean PSNR of the samples."""
        prior, steps = self.recording.prior, self.recording.transitions
        limit = place(prior, steps, count - 1).error if count > LEAST else math.inf  # or one step fewer would do
        options = [p for p in shortlist(prior, steps, count) if p.error * MARGIN < limit][:OPTIONS]
        tried = []
        for number, option in enumerate(options or [place(prior, steps, count)], 1):
            self.say(f"{count} full steps on tuning seeds, placement {number} of {max(1, len(options))}")
            placed = replace(self.prior, placed={**self.prior.placed, count: option.steps})
            trial = self.tuning.attempt(option.error * MARGIN, placed)
            tried.append((fmean(self.tuning.values), trial, placed))
        _, best, self.prior = max(tried, key=lambda found: found[0])
        return best


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `hits` in `count` (Wilson, 1927)."""
    z, share = 1.959964, hits / count
    middle = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return min(share, max(0.0, (middle - width) / scale)), max(share, min(1.0, (middle + width) / scale))


def _fewest(trials: list[Trial], target: float) -> Trial:
    """The one with the fewest full steps that passed."""
    passed = [t for t in trials if t.bound >= target]
    if not passed:
        most = max(trials, key=lambda t: t.full_steps)
        raise InputError(f"{most.full_steps} full steps give {most.bound:.1f} dB, not {target:g}; ask for less.")
    return min(passed, key=lambda t: t.full_steps)


def _search(attempt: Callable[[int], Trial], few: int, many: int, target: float) -> list[Trial]:
    """Trials by bisection for the fewest full steps, of `few` to `many`, whose bound meets the target."""
    trials = []
    while few <= many:
        middle = (few + many) // 2
        trials.append(attempt(middle))
        few, many = (few, middle - 1) if trials[-1].bound >= target else (middle + 1, many)
    return trials
