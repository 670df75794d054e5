"""The settings: two frozen, strict dataclasses and the named presets. Imports only the standard library.

`SpecaConfig` is the default method: full steps are planned, the steps between them are forecast. `VerifiedConfig` is
the method of the SpeCa paper: each forecast is checked with one real block of the model.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .errors import ConfigError, nearest

MIN_STEPS = 4
"""Runs of fewer steps are left alone: the first full steps already are most of the run."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What both configurations share: every field is checked, and a wrong value raises `ConfigError`."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is ClassVar:
                continue
            _check_type(name, getattr(self, name), hint)
        for name, (low, high) in self.RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}={value} is out of range; use a value from {low} to {high}.")

    @classmethod
    def build(cls, base: str | Settings = "balanced", **overrides: Any) -> SpecaConfig | VerifiedConfig:
        """Return the preset (or configuration) `base` with some fields replaced.

        Raises:
            ConfigError: unknown preset or field (the nearest valid name is given), a field that belongs to the other
                method, or a value out of range.
        """
        if isinstance(base, str):
            if base not in PRESETS:
                raise ConfigError(f"unknown preset {base!r}; {nearest(base, PRESETS)}")
            base = PRESETS[base]
        elif not isinstance(base, (SpecaConfig, VerifiedConfig)):
            raise ConfigError(
                f"expected a preset name, a SpecaConfig or a VerifiedConfig, got {type(base).__name__}; "
                f"presets: {', '.join(PRESETS)}."
            )
        fields = [f.name for f in dataclasses.fields(base)]
        for name in overrides:
            if name not in fields:
                raise ConfigError(_unknown(name, base, fields))
        if isinstance(base, SpecaConfig):
            overrides = _planned_overrides(overrides)
        return dataclasses.replace(base, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, one per field."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class SpecaConfig(Settings):
    """When a step is computed in full, and how the steps between are forecast.

    One of `tolerance`, `speedup` and `schedule` says when; several together hold together.

    Attributes:
        tolerance: error that drafts may cause, 0 or more, as root mean square per element of the latents, whose own
            is about 1. With a measured prior it is the error expected at the end of the run, else the estimated error
            of the drafts after one full step. 0 leaves it to `speedup`.
        speedup: budget, 1 or more: no sample takes more than `steps / speedup` full steps (rounded down, at least
            one); 0 for no budget.
        schedule: indices of the full steps, from 0; the first steps that a forecast needs are full as well.
        order: degree of the polynomial that forecasts outputs where there is no prior, 0 to 4.
        prior: what is taken to be known about the outputs before the run (`core/prior.py`), where the sampler is
            linear: "measured", what a calibration measured, if there is one; "generic", that or else what follows from
            the sampler alone (`core/generic.py`); "none", nothing, so that forecasts are polynomials.
        corrector: whether a full step corrects the drafts before it (`core/correction.py`), where the sampler is
            linear.
        max_draft: most drafts between two full steps that a tolerance may plan, at least 1; a budget may ask for more.
        threshold: where the sampler is not linear, no error can be estimated from outputs. Then short drafts are
            checked with one real block of the model and accepted up to this relative error, 0 or more. 0 asks for
            every step in full, with any sampler.
        calibrated: whether a calibration replaces `tolerance`, as in the presets: "balanced" then meets its target and
            the others keep their distance from it. Giving `tolerance` or `speedup` ends that.
    """

    tolerance: float = 0.01
    speedup: float = 0.0
    schedule: tuple[int, ...] = ()
    order: int = 1
    prior: Literal["measured", "generic", "none"] = "measured"
    corrector: bool = True
    max_draft: int = 12
    threshold: float = 0.03
    calibrated: bool = False

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "tolerance": (0.0, 1e9), "speedup": (0.0, 1000.0), "order": (0, 4), "max_draft": (1, 1000),
        "threshold": (0.0, 1e9),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.speedup < 1:
            raise ConfigError(f"speedup={self.speedup} would be a slow-down; use 1 or more, or 0 for no budget.")

    @property
    def anchors(self) -> int:
        """How many full steps a polynomial forecast is made of: `order + 1`."""
        return self.order + 1

    @property
    def warmup(self) -> int:
        """How many steps are full at the start where no prior is used."""
        return self.order + 1


@dataclass(frozen=True, kw_only=True)
class VerifiedConfig(Settings):
    """The method of the SpeCa paper: features are forecast, and one real block checks each forecast.

    Attributes:
        rule: who decides. "paper": check each draft, recompute a rejected one at that very step. "interval": full every
            `max_draft + 1` steps, nothing is checked (as FORA and TaylorSeer do). "schedule": full at the steps of
            `schedule`, nothing is checked. "released": the authors' published code, which judges the batch as a whole
            and never recomputes; for comparison only.
        forecaster: "taylor" (the paper's finite differences), "newton" (divided differences), "hermite" (HiCache)
            or "reuse" (repeat the last full step).
        order: order of the forecaster, 0 to 4. Needs `warmup >= order + 1`.
        axis: what full steps are spaced by: "step" (step index, as in the paper) or "noise" (diffusion time).
        error: "relative_l2" (the paper), "relative_l1", "linf", "cosine", or "elementwise_l1" (the released code).
        threshold: tau_0, the largest accepted error at the first step; 0 rejects everything.
        threshold_decay: beta in (0, 1]; the threshold at progress p in [0, 1] is `threshold * beta ** p`.
        threshold_floor: lower bound of the threshold; the released code has one, the paper has none.
        warmup: full steps at the start, at least 1.
        final: full steps at the end, 0 or more.
        min_draft: drafts after a full step that are taken without a check, 0 or more.
        max_draft: drafts after a full step before the next one must be full, at least 1.
        schedule: of rule "schedule", the indices of the full steps, from 0.
        history_dtype: storage of kept features: "model" (as computed), "float32", "bfloat16" or "float16".
    """

    rule: Literal["paper", "interval", "schedule", "released"] = "paper"
    forecaster: Literal["taylor", "newton", "hermite", "reuse"] = "newton"
    order: int = 1
    axis: Literal["step", "noise"] = "step"
    error: Literal["relative_l2", "relative_l1", "linf", "cosine", "elementwise_l1"] = "relative_l2"
    threshold: float = 0.1
    threshold_decay: float = 0.5
    threshold_floor: float = 0.0
    warmup: int = 3
    final: int = 1
    min_draft: int = 0
    max_draft: int = 5
    schedule: tuple[int, ...] = ()
    history_dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "order": (0, 4), "threshold": (0.0, 1e9), "threshold_decay": (0.0, 1.0), "threshold_floor": (0.0, 1e9),
        "warmup": (1, 1000), "final": (0, 1000), "min_draft": (0, 1000), "max_draft": (1, 1000),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold_decay == 0:
            raise ConfigError("threshold_decay=0 would reject everything after the first step; use a value in (0, 1].")
        if self.forecaster != "reuse" and self.warmup < self.order + 1:
            raise ConfigError(
                f"order={self.order} needs {self.order + 1} full steps before the first forecast, but "
                f"warmup={self.warmup}; set warmup={self.order + 1} or order={self.warmup - 1}."
            )
        if self.min_draft > self.max_draft:
            raise ConfigError(
                f"min_draft={self.min_draft} exceeds max_draft={self.max_draft}; lower min_draft or raise max_draft."
            )

    @property
    def anchors(self) -> int:
        """How many full steps a forecast is made of: `order + 1`, one for "reuse"."""
        return 1 if self.forecaster == "reuse" else self.order + 1


Config = SpecaConfig | VerifiedConfig


def _planned_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """A budget or schedule alone is to be used up, and what the user asks for is not replaced by a calibration."""
    chosen = dict(overrides)
    if overrides.get("speedup") or overrides.get("schedule"):
        chosen.setdefault("tolerance", 0.0)
    if {"tolerance", "speedup", "schedule"} & overrides.keys():
        chosen.setdefault("calibrated", False)
    return chosen


_REMOVED = {
    "controller": "use VerifiedConfig(rule=...) for the paper's rule, its siblings and fixed schedules of features",
    "verify": "use VerifiedConfig(rule='interval') or rule='schedule' for drafts that are not checked",
    "drafts": "SpecaConfig forecasts outputs and VerifiedConfig forecasts features",
}
"""Fields of `SpecaConfig` before it was split in two, and what replaces them."""


def _unknown(name: str, base: Settings, fields: list[str]) -> str:
    """The message for a setting that `base` does not have."""
    if name in _REMOVED:
        return f"the setting {name!r} is gone; {_REMOVED[name]}."
    other = VerifiedConfig if isinstance(base, SpecaConfig) else SpecaConfig
    if name in {f.name for f in dataclasses.fields(other)}:
        preset = "use preset='paper'" if other is VerifiedConfig else "use another preset than 'paper'"
        return f"{name} is a setting of {other.__name__}, and this is a {type(base).__name__}; {preset}, or drop it."
    return f"unknown setting {name!r}; {nearest(name, fields)}"


def _check_type(name: str, value: object, hint: Any) -> None:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple) or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in value):
            raise ConfigError(f"{name}={value!r} must be a tuple of whole numbers, 0 or more.")
        return
    choices = typing.get_args(hint)
    if choices:
        if value not in choices:
            raise ConfigError(f"{name}={value!r} is not valid; {nearest(str(value), choices)}")
        return
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name}={value!r} must be of type {hint.__name__}, not {type(value).__name__}.")


PRESETS: dict[str, Config] = {
    # Chosen on tuning seeds of `fashion-dit` and of an early `emoji-flux` (docs/LOG.md).
    "faithful": SpecaConfig(tolerance=0.004, threshold=0.02, calibrated=True),
    "balanced": SpecaConfig(tolerance=0.01, threshold=0.03, calibrated=True),
    "fast": SpecaConfig(tolerance=0.02, threshold=0.05, calibrated=True),
    # The paper's method with the settings its authors published for DiT (tau_0 0.3, beta 0.05, at most 8 drafts).
    # Their order 4 needs five full steps; three warm-up steps give three, hence order 2.
    "paper": VerifiedConfig(
        forecaster="taylor", order=2, threshold=0.3, threshold_decay=0.05, warmup=3, final=0, max_draft=8
    ),
}
"""One quality dial: "faithful", "balanced" (default), "fast"; "paper" is the published method and settings."""

UNPLANNED = VerifiedConfig(threshold_decay=1.0, warmup=2, final=0, min_draft=1, max_draft=4)
"""The checked drafts of a planned run whose sampler is not linear; `threshold` is that of its `SpecaConfig`."""
