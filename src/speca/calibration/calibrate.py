"""calibrate: the prior of a model, and the fewest full steps that meet a quality with it, tried on fresh seeds."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config import SpecaConfig
from ..core.placement import LEAST, Placement, even, place, shortlist, with_placements
from ..core.prior import Prior
from ..denoiser.denoiser import Denoiser
from ..denoiser.player import STRAIGHT
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
SPEEDUPS = (3.0, 4.0, 5.0, 7.0)
NEAR = 40.0  # dB: what the preset "balanced" is to reach on the samples that a model was learnt from, without a target
CONDITIONS = frozenset({"class_labels", "prompt", "prompt_embeds"})  # where none is given, examples are
MARGIN = 1.001  # the tolerance is a little above the error expected, so that rounding does not ask for one step more


def calibrate(
    target: DiffusionPipeline | Denoiser,
    call_kwargs: dict[str, Any] | None = None,
    *,
    loop: Generate | None = None,
    target_psnr: float | None = None,
    samples: int | None = None,
    confidence: float = 0.9,
    speedups: Sequence[float] = (),
    batch: int = 16,
    progress: Progress | None = None,
    **call: Any,
) -> Calibration:
    """Learn a model from full runs: by default from one, and try what it gives at several budgets.

        calibration = speca.calibrate(pipe, prompt="a red apple")     # costs about three runs
        calibration.output[0].save("apple.png")                        # the first of them is an ordinary full run
        calibration.save("flux.json")
        speca.enable(pipe, speedup=5, calibration="flux.json")

        speca.calibrate(pipe, target_psnr=35)                          # a promise about fresh samples; some 200 runs
        speca.calibrate(denoise, loop=lambda seeds: sample_euler(denoise, noise(seeds), sigmas))   # one's own loop

    The outputs of the full runs give the prior, see `core/prior.py`. Placements of full steps are then tried by drawing
    the same samples again, and of each number of full steps the one with the best mean PSNR is kept.

    *With a target*, the fewest full steps are found with which samples stay near their own full run: by bisection. A
    number passes if the k-th smallest PSNR of its n samples meets the target, `k = floor((n + 1) (1 - confidence))`:
    the bound of split conformal prediction. As the best of several is taken, and the prior is of the same samples, it
    is then tried on as many fresh seeds, and what those gave is reported.

    Args:
        target: a pipeline, or a `Denoiser`, whose sampler is linear; others cannot be corrected.
        call_kwargs: arguments of the pipeline as a dictionary. Lists with one entry a sample hold `samples` of them, or
            with a target `2 * samples`, the second half for the fresh seeds. By default its classes, or a few plain
            prompts, in turn, and its own steps.
        loop: of a `Denoiser`, one's own loop: from a list of seeds to the samples (n, ...) that it draws by calling the
            denoiser.
        target_psnr: in dB, above 0; of a loop relative to the range of its samples. None promises nothing.
        samples: number of samples that are drawn in full, 1 by default. With a target that of tuning seeds, and of
            fresh ones: 32 by default, `1 / (1 - confidence) - 1` or more.
        confidence: share of fresh samples that are to meet the target, in (0, 1).
        speedups: budgets for which placements are tried, as `enable(pipe, speedup=...)` takes them; above 1. Without a
            target and without any: 3, 4, 5 and 7.
        batch: samples in one call.
        progress: called with what comes next, in words.
        **call: arguments of the pipeline, in place of `call_kwargs`, or in addition.

    Raises:
        InputError: a value out of range, the sampler is not linear, or half the steps in full miss the target.
    """
    say = progress or (lambda words: None)
    arguments = {**(call_kwargs or {}), **call} if call_kwargs is not None or call else None
    if target_psnr is None:
        return _of_few(target, arguments, loop, 1 if samples is None else samples, speedups or SPEEDUPS, batch, say)
    samples = 32 if samples is None else samples
    _demand_enough(target_psnr, samples, confidence, speedups)
    batch = min(batch, samples)
    one, other = _subjects(target, arguments, loop, [(TUNING_SEED, samples), (FRESH_SEED, samples)], batch)
    say("full run on tuning seeds")
    recording = one.record()
    say("placing full steps")
    recording = replace(recording, prior=with_placements(recording.prior, recording.transitions))
    tuning, steps = _Half(one, recording.images, confidence), len(recording.transitions)
    tried = _Tried(tuning, recording, say)
    trials = _search(tried.attempt, max(LEAST, steps // 10), steps // 2, target_psnr)
    counts = _counts(speedups, steps)
    trials += [tried.attempt(count) for count in sorted(counts - {t.full_steps for t in trials}, reverse=True)]
    best = _fewest(trials, target_psnr)
    say("fresh seeds")
    fresh = _Half(other, other.full(), confidence)
    trial, met = fresh.attempt(best.tolerance, tried.prior), sum(value >= target_psnr for value in fresh.values)
    low, high = wilson(met, samples)
    return Calibration(
        model=one.model, scheduler=one.scheduler, steps=steps, branches=recording.branches, prior=tried.prior,
        target_psnr=target_psnr, confidence=confidence, tolerance=best.tolerance,
        speedup=trial.speedup, fresh_median=trial.median, fresh_p5=trial.p5, fresh_met=met / samples, fresh_low=low,
        fresh_high=high, tuning_seeds=(TUNING_SEED, samples), fresh_seeds=(FRESH_SEED, samples), trials=tuple(trials),
        output=pictures(recording.images),
    )  # fmt: skip


def _of_few(
    target: Any, call: dict[str, Any] | None, loop: Generate | None, samples: int, speedups: Sequence[float],
    batch: int, say: Progress,
) -> Calibration:  # fmt: skip
    """Calibrate without a target: learn the prior from full runs, and try budgets on the same samples."""
    if samples < 1 or any(speedup <= 1 for speedup in speedups):
        raise InputError(f"calibrate needs 1 sample or more and speed-ups above 1; got {samples} and {list(speedups)}.")
    (one,) = _subjects(target, call, loop, [(TUNING_SEED, samples)], min(batch, samples))
    say("full run")
    recording = one.record()
    steps = len(recording.transitions)
    tried = _Tried(_Half(one, recording.images, 1 - 1 / (samples + 1)), recording, say)
    trials = [tried.spend(count) for count in sorted(_counts(speedups, steps), reverse=True)]
    fewest = ([t for t in trials if t.bound >= NEAR] or trials[:1])[-1].full_steps
    error, fewer = (place(tried.prior, recording.transitions, max(1, n)).error for n in (fewest, fewest - 1))
    return Calibration(
        model=one.model, scheduler=one.scheduler, steps=steps, branches=recording.branches, prior=tried.prior,
        tuning_seeds=(TUNING_SEED, samples), trials=tuple(trials), tolerance=min(error * MARGIN, fewer / MARGIN),
        output=pictures(recording.images),
    )  # fmt: skip


def _counts(speedups: Sequence[float], steps: int) -> set[int]:
    """The numbers of full steps of some budgets."""
    return {max(LEAST, math.floor(steps / speedup + 1e-9)) for speedup in speedups}


def _subjects(
    target: Any, call: dict[str, Any] | None, loop: Generate | None, parts: Sequence[tuple[int, int]], batch: int
) -> list[Subject]:
    """The subject of each part, which is a first seed and a number of seeds; all parts are equally long."""
    seeds = [list(range(first, first + count)) for first, count in parts]
    if isinstance(target, Denoiser):
        if loop is None:
            raise InputError("calibrate needs the loop of a Denoiser: pass loop=, from seeds to samples (n, ...).")
        return [LoopSubject(target, loop, part, batch) for part in seeds]
    if not isinstance(getattr(target, "components", None), dict):
        raise InputError(
            f"calibrate takes a diffusers pipeline, not {type(target).__name__}; of a model in your own loop, make a "
            "speca.Denoiser and pass it with loop=, or run the loop inside speca.calibrating(model, scheduler=...)."
        )
    together = [seed for part in seeds for seed in part]
    asked = dict(call or {})
    if asked.keys() & {"generator", "latents"}:
        raise InputError("calibrate draws the noise of its samples itself; leave out generator and latents.")
    takes = CONDITIONS & inspect.signature(target.__call__).parameters.keys()
    if not asked or (takes and not asked.keys() & CONDITIONS):
        asked = {**example_call(target, together), **asked}
    return [PipelineSubject(target, *part, batch) for part in split(asked, together, len(seeds[0]))]


def pictures(samples: Tensor) -> Any:
    """Return samples (N, height, width, channels) in [0, 1] as PIL images; others as they are."""
    if samples.dim() != 4 or samples.shape[3] not in (1, 3, 4):
        return samples
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor.numpy_to_pil(samples.numpy())


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

    def attempt(self, tolerance: float, prior: Prior, speedup: float = 0.0) -> Trial:
        """Return what a prior gives with `tolerance`, or with a budget if there is one."""
        config = SpecaConfig(tolerance=0.0 if speedup else tolerance, speedup=speedup)
        images, report = self.subject.attempt(config, prior)
        self.values = psnr(images, self.full).tolist()
        k = max(1, math.floor((len(self.values) + 1) * (1 - self.confidence) + 1e-9))
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
        """Try a few placements of `count` full steps; return the trial with the highest mean PSNR."""
        prior, steps = self.recording.prior, self.recording.transitions
        limit = place(prior, steps, count - 1).error if count > LEAST else math.inf  # or one step fewer would do
        options = [p for p in shortlist(prior, steps, count) if p.error * MARGIN < limit][:OPTIONS]
        return self._best(count, options or [place(prior, steps, count)])

    def spend(self, count: int) -> Trial:
        """Try two placements of `count` full steps, the one with the least expected error and an even one; return the
        trial with the higher mean PSNR."""
        prior, steps = self.recording.prior, self.recording.transitions
        evenly = even(len(steps), count, all(abs(t.jacobian) < STRAIGHT for t in steps))
        plain = place(replace(prior, placed={count: evenly}), steps, count)
        return self._best(count, [place(prior, steps, count), plain], len(steps) / count)

    def _best(self, count: int, options: Sequence[Placement], speedup: float = 0.0) -> Trial:
        tried = []
        for number, option in enumerate(options, 1):
            self.say(f"{count} full steps on tuning seeds, placement {number} of {len(options)}")
            placed = replace(self.prior, placed={**self.prior.placed, count: option.steps})
            trial = self.tuning.attempt(option.error * MARGIN, placed, speedup)
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
