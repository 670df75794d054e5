"""The configuration: one frozen, strict dataclass and the named presets. Imports only the standard library."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError, nearest

MIN_STEPS = 4
"""Below this many steps nothing can be forecast: warm-up and the last step already are the whole run."""


@dataclass(frozen=True, kw_only=True)
class SpecaConfig:
    """How steps are forecast, checked and accepted. Every field has a range; a wrong value raises `ConfigError`.

    Attributes:
        controller: who decides. "speca": verify each draft, reject per sample at that very step (the paper).
            "interval": full every `max_draft + 1` steps, never verified. "released": the authors' published code
            (deferred, one verdict for the batch), for comparison only. "planned": each sample's drafts are as long as
            `tolerance` or `speedup` allow; needs a linear sampler. "schedule": full at the steps of `schedule`, never
            verified.
        forecaster: "taylor" (the paper's finite differences), "newton" (divided differences), "hermite" (HiCache)
            or "reuse" (repeat the last full step).
        order: order of the forecaster, 0 to 4. Needs `warmup >= order + 1`.
        axis: what anchors are spaced by: "step" (step index, as in the paper) or "noise" (diffusion time).
        error: "relative_l2" (the paper), "relative_l1", "linf", "cosine", or "elementwise_l1" (the released code).
        threshold: tau_0, the largest accepted error at the first step; 0 rejects everything.
        threshold_decay: beta in (0, 1]; the threshold at progress p in [0, 1] is `threshold * beta ** p`.
        threshold_floor: lower bound of the threshold; the released code has one, the paper has none.
        warmup: full steps at the start, at least 1.
        final: full steps at the end, 0 or more.
        min_draft: drafts after a full step that are taken without verification, 0 or more.
        max_draft: drafts after a full step before the next one must be full, at least 1; a budget may ask for more.
        verify: whether drafts are verified at all.
        corrector: whether a full step corrects the drafts before it (`core/corrector.py`), where the sampler is linear.
        tolerance: of controller "planned", the error allowed, as root mean square per element of the latents, whose own
            is about 1: with a prior the one expected at the end of the run, else the estimate of what the drafts after
            a full step may add up to. 0 leaves it to `speedup`.
        calibrated: whether a calibration replaces `tolerance`, as in the presets: "balanced" then meets its target, and
            others keep their distance from it. Setting `tolerance` or `speedup` ends that.
        speedup: of controller "planned", a budget, 1 or more: no sample takes more than `steps / speedup` full steps,
            and no period is shorter than an even share of what is left; 0 is no budget.
        schedule: of controller "schedule", the indices of the full steps.
        drafts: what a draft forecasts: "features", what enters the verify block, which can be checked and goes through
            the model's own head; "output", the model's output, which costs nothing of the model and cannot be checked;
            "auto", the output where a prior is at hand. Outputs need a linear sampler, else features are forecast.
        prior: what is taken to be known of a run beforehand, where the sampler is linear (`core/prior.py`): "measured",
            what was measured of the model, if anything; "generic" that, else what the sampler alone tells
            (`core/generic.py`); "auto" that only where a budget leaves few full steps; "none" nothing, so that
            forecasts and corrections are polynomials, and full steps come as their errors or an even share say.
        history_dtype: storage of kept features: "model" (as computed), "float32", "bfloat16" or "float16".
    """

    controller: Literal["speca", "interval", "released", "planned", "schedule"] = "speca"
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
    verify: bool = True
    corrector: bool = False
    tolerance: float = 0.01
    calibrated: bool = False
    speedup: float = 0.0
    schedule: tuple[int, ...] = ()
    drafts: Literal["auto", "features", "output"] = "auto"
    prior: Literal["auto", "measured", "generic", "none"] = "auto"
    history_dtype: Literal["model", "float32", "bfloat16", "float16"] = "model"

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}={value} is out of range; use a value from {low} to {high}.")
        if self.threshold_decay == 0:
            raise ConfigError("threshold_decay=0 would reject everything after the first step; use a value in (0, 1].")
        if self.forecaster != "reuse" and self.warmup < self.order + 1:
            raise ConfigError(
                f"order={self.order} needs {self.order + 1} full steps before the first forecast, but "
                f"warmup={self.warmup}; set warmup={self.order + 1} or order={self.warmup - 1}."
            )
        if self.speedup and self.controller != "planned":
            raise ConfigError(f"speedup={self.speedup} is a budget of controller 'planned', not {self.controller!r}.")
        if 0 < self.speedup < 1:
            raise ConfigError(f"speedup={self.speedup} would be a slow-down; use 1 or more, or 0 for no budget.")
        if self.drafts == "output" and self.controller in ("speca", "released") and self.verify:
            raise ConfigError(
                f"drafts='output' cannot be checked, as controller {self.controller!r} does; use controller='planned', "
                "or drafts='features'."
            )
        if self.min_draft > self.max_draft:
            raise ConfigError(
                f"min_draft={self.min_draft} exceeds max_draft={self.max_draft}; lower min_draft or raise max_draft."
            )

    @property
    def anchors(self) -> int:
        """How many full steps a forecast is made of: `order + 1`, one for "reuse"."""
        return 1 if self.forecaster == "reuse" else self.order + 1

    @classmethod
    def build(cls, base: str | SpecaConfig = "balanced", **overrides: Any) -> SpecaConfig:
        """The preset (or configuration) `base` with some fields replaced.

        Raises:
            ConfigError: unknown preset or field (the nearest valid name is given), or a value out of range.
        """
        if isinstance(base, str):
            if base not in PRESETS:
                raise ConfigError(f"unknown preset {base!r}; {nearest(base, PRESETS)}")
            base = PRESETS[base]
        elif not isinstance(base, SpecaConfig):
            raise ConfigError(
                f"expected a preset name or a SpecaConfig, got {type(base).__name__}; presets: {', '.join(PRESETS)}."
            )
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in overrides:
            if name not in fields:
                raise ConfigError(f"unknown setting {name!r}; {nearest(name, fields)}")
        chosen = {"tolerance": 0.0, **overrides} if overrides.get("speedup") else dict(overrides)  # it is to be spent
        if {"tolerance", "speedup"} & overrides.keys():
            chosen.setdefault("calibrated", False)
        config = dataclasses.replace(base, **chosen)
        if "tolerance" in overrides and config.controller != "planned":
            raise ConfigError(f"tolerance belongs to controller 'planned', not {config.controller!r}; use threshold.")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one per field; `SpecaConfig(**d)` restores it."""
        return dataclasses.asdict(self)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("order", 0, 4),
    ("threshold", 0.0, 1e9),
    ("threshold_decay", 0.0, 1.0),
    ("threshold_floor", 0.0, 1e9),
    ("tolerance", 0.0, 1e9),
    ("speedup", 0.0, 1000.0),
    ("warmup", 1, 1000),
    ("final", 0, 1000),
    ("min_draft", 0, 1000),
    ("max_draft", 1, 1000),
)


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


_PLANNED = SpecaConfig(
    controller="planned",
    corrector=True,
    calibrated=True,
    warmup=2,
    final=0,
    max_draft=12,
    min_draft=1,
    threshold=0.03,
    threshold_decay=1.0,
)

# Chosen on tuning seeds of `fashion-dit` and of an early `emoji-flux` (docs/LOG.md, 2026-11-24). Where a sampler is not
# linear the thresholds count: a first draft after a full step was hardly ever wrong, so its check is not worth a block.
PRESETS: dict[str, SpecaConfig] = {
    "faithful": dataclasses.replace(_PLANNED, tolerance=0.004, threshold=0.02),
    "balanced": dataclasses.replace(_PLANNED, tolerance=0.01),
    "fast": dataclasses.replace(_PLANNED, tolerance=0.02, threshold=0.05),
    # The paper's method with the settings its authors published for DiT (tau_0 0.3, beta 0.05, at most 8 drafts).
    # Their order 4 needs five anchors; three warm-up steps give three, hence order 2.
    "paper": SpecaConfig(
        forecaster="taylor", order=2, threshold=0.3, threshold_decay=0.05, warmup=3, final=0, max_draft=8
    ),
}
"""One quality dial: "faithful", "balanced" (default), "fast"; "paper" keeps the published method and settings."""
