"""What `speca.calibrate` found for one model and sampler: a small JSON file that `speca.enable` takes.

A folder of `save_pretrained` may bring one along, called `speca.json`; `enable` then uses its prior.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..config import PRESETS, SpecaConfig
from ..core.prior import Prior
from ..errors import ConfigError, InputError

FORMAT, EARLIER = 3, 2  # files of format 2 always say what fresh seeds gave
BESIDE = "speca.json"
"""The calibration that comes with a model, in its folder."""


@dataclass(frozen=True)
class Trial:
    """A number of full steps on the tuning seeds: the error the prior expects at the end, the realised FLOPs speed-up,
    and PSNR in dB to the own full run."""

    full_steps: int
    tolerance: float
    speedup: float
    median: float
    p5: float
    bound: float  # what a fresh sample reaches with the wanted confidence, see `calibrate`


@dataclass(frozen=True)
class Calibration:
    """The prior of a model, what was tried with it, and, if a target was asked for, what it gives on fresh seeds.

    Attributes:
        model: class of the transformer or U-Net; `enable` refuses others.
        scheduler: class of the scheduler. The prior serves others too, what was promised was measured with this one.
        steps: denoising steps.
        prior: the second moments of the model's outputs, of the tuning seeds.
        tuning_seeds: first seed and number of the samples that it was learnt from.
        branches: rows of a sample in each call of a step, see `Kind`; empty where that was not noted, and then the
            calibration is taken to serve all.
        trials: every number of full steps that was tried, on the samples that the prior was learnt from.
        tolerance: `SpecaConfig.tolerance` of the preset "balanced"; None leaves the preset's own.
        target_psnr, confidence: what was asked: at least so many dB for this share of fresh samples; None for nothing.
        speedup: FLOPs of the full run over FLOPs spent on fresh seeds.
        fresh_median, fresh_p5: PSNR in dB on fresh seeds.
        fresh_met: share of fresh samples that met the target; fresh_low, fresh_high: its 95 % interval (Wilson).
        fresh_seeds: first seed and number.
        output: the samples of the full runs, pictures where there are pictures; not in the file.
    """

    model: str
    scheduler: str
    steps: int
    prior: Prior
    tuning_seeds: tuple[int, int] = (0, 1)
    branches: tuple[int, ...] = ()
    trials: tuple[Trial, ...] = ()
    tolerance: float | None = None
    target_psnr: float | None = None
    confidence: float | None = None
    speedup: float | None = None
    fresh_median: float | None = None
    fresh_p5: float | None = None
    fresh_met: float | None = None
    fresh_low: float | None = None
    fresh_high: float | None = None
    fresh_seeds: tuple[int, int] | None = None
    output: Any = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with the version of the format."""
        shallow = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "output"}
        shallow |= {"trials": [dataclasses.asdict(t) for t in self.trials], "prior": self.prior.to_dict()}
        return {"format": FORMAT, **shallow}

    def save(self, path: str | Path) -> None:
        """Write the JSON that `load` and `speca.enable(pipe, calibration=path)` read."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file of `save`.

        Raises:
            ConfigError: there is no such file, or it is none of ours.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values.pop("format") not in (FORMAT, EARLIER):
                raise ConfigError(f"{path} was written by another version of speca; calibrate again.")
            values["trials"] = tuple(Trial(**trial) for trial in values["trials"])
            values["prior"] = Prior.from_dict(values["prior"])
            for name in ("tuning_seeds", "fresh_seeds", "branches"):
                if values.get(name) is not None:
                    values[name] = tuple(values[name])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ConfigError(f"{path} is no calibration ({error}); make one with speca calibrate.") from error

    @classmethod
    def beside(cls, pipe: Any) -> Calibration | None:
        """Return the calibration in the folder that a pipeline was loaded from, if there is one that fits it."""
        folder = Path(str(getattr(getattr(pipe, "config", None), "_name_or_path", None) or ""))
        file = folder / BESIDE
        if not file.is_file():
            return None
        found = _read(file, file.stat().st_mtime_ns)
        models = [getattr(pipe, name, None) for name in ("transformer", "unet")]
        return found if found.model in {type(model).__name__ for model in models} else None

    def demand_fit(self, model: str) -> None:
        """Raise `ConfigError` unless it was made for this class of transformer."""
        if model != self.model:
            raise ConfigError(f"the calibration was made for {self.model}, and this is {model}; calibrate again.")

    def __str__(self) -> str:
        about = f"{self.model}, {self.scheduler}, {self.steps} steps"
        if self.fresh_seeds is None:
            seen = ", ".join(f"{t.full_steps}: {t.median:.1f} dB" for t in sorted(self.trials, key=_by_count))
            count = self.tuning_seeds[1]
            whom = "the sample" if count == 1 else f"the {count} samples"
            again = f"; {whom} drawn again, PSNR by number of full steps: {seen}" if seen else ""
            return f"{about}: learnt from {count} full run{'s' * (count > 1)}{again}"
        return (
            f"{about}: tolerance {self.tolerance:.4g}, {self.speedup:.2f}x "
            f"fewer FLOPs; on {self.fresh_seeds[1]} fresh seeds {self.fresh_median:.1f} dB at the median, "
            f"{self.fresh_p5:.1f} dB at the 5th percentile, {self.fresh_met:.0%} at {self.target_psnr:g} dB or more "
            f"(95 % interval {self.fresh_low:.0%} to {self.fresh_high:.0%})"
        )


def _by_count(trial: Trial) -> int:
    return -trial.full_steps


class PendingCalibration:
    """What `speca.calibrating` yields: the calibration, once its block has ended."""

    def __init__(self) -> None:
        self._found: Calibration | None = None

    def finish(self, found: tuple[Any, Prior] | None, model: str, scheduler: str) -> None:
        """Make the calibration from a kind of run and the prior of such runs; with None there is none."""
        if found is not None:
            kind, prior = found
            self._found = Calibration(model, scheduler, len(prior.noise), prior, branches=kind.branches)

    @property
    def calibration(self) -> Calibration:
        """What was learnt. Raises `InputError` if nothing was."""
        if self._found is None:
            raise InputError(
                "nothing was learnt: no run of a linear sampler came to its end inside speca.calibrating, or the block "
                "has not ended."
            )
        return self._found

    def save(self, path: str | Path) -> None:
        """Write the calibration to a file."""
        self.calibration.save(path)


Given = Calibration | PendingCalibration | Prior | str | Path
"""What users pass as a calibration."""


def known_from(calibration: Given | Literal[False] | None) -> Calibration | Prior | None:
    """Return what was given as a calibration, read from its file where it is a path.

    Raises:
        ConfigError: there is no such file, or it is no calibration.
    """
    if calibration is None or calibration is False:
        return None
    if isinstance(calibration, PendingCalibration):
        return calibration.calibration
    if isinstance(calibration, (Calibration, Prior)):
        return calibration
    file = Path(calibration)
    return _read(file, file.stat().st_mtime_ns) if file.is_file() else Calibration.load(file)


def fitted(config: SpecaConfig, known: Calibration | Prior | None) -> SpecaConfig:
    """Return the configuration with the tolerance that a calibration found, where it is left to one.

    "balanced" then meets the target, and the other presets keep their distance from it.
    """
    if not config.calibrated or not isinstance(known, Calibration) or known.tolerance is None:
        return config
    balanced = PRESETS["balanced"]
    assert isinstance(balanced, SpecaConfig)
    return dataclasses.replace(config, tolerance=known.tolerance * (config.tolerance / balanced.tolerance))


def prior_of(known: Calibration | Prior | None) -> Prior | None:
    """Return the prior of a calibration, or the one that was given."""
    return known.prior if isinstance(known, Calibration) else known


@lru_cache(maxsize=16)
def _read(file: Path, changed: int) -> Calibration:
    """Return the same object for the same file, so that what was found with its prior is found once in a process."""
    return Calibration.load(file)
