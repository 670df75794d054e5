"""check: what a sampler does, whether a model's drafts can be verified, and what would be held in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..diffusers.accelerator import Accelerator
from ..diffusers.enable import accelerators_of, disable, enable
from ..verified.probe import Discovery


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What was found on a real call.

    Attributes:
        model: class of the model.
        supported: whether its drafts can be verified by a block; if not, `reason` says why. Forecasts of the output,
            which the presets but "paper" make, need a linear sampler only.
        sampler: what its sampler does: "linear, memory 1", or why it is not linear.
        blocks: block lists and how many of their blocks ran, for instance "transformer_blocks x 16".
        verify_block: the block that checks drafts.
        state: arguments of the verify block that are forecast.
        self_test: result of replaying a full step as a draft.
        bytes_per_sample: what is held per sample during a run with these settings, all branches together; None where
            the run is too short to hold anything, or its outputs are not forecast.
        flops_full, flops_draft: of one row and step, full and as a verified draft; None where not counted.
    """

    model: str
    supported: bool
    reason: str
    sampler: str
    blocks: str
    verify_block: str
    state: tuple[str, ...]
    self_test: str
    bytes_per_sample: int | None
    flops_full: float | None
    flops_draft: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**dataclasses.asdict(self), "state": list(self.state)}

    def __str__(self) -> str:
        share = f"{self.flops_draft / self.flops_full:.1%}" if self.flops_draft and self.flops_full else "not counted"
        held = f"{self.bytes_per_sample / 2**20:.3f} MiB per sample" if self.bytes_per_sample else "nothing is held"
        lines = [f"{self.model}", f"  sampler          {self.sampler}", f"  memory           {held}"]
        if not self.supported:
            return "\n".join([*lines, f"  verified drafts  not possible: {self.reason}"])
        return "\n".join(
            [
                *lines,
                f"  verified drafts  possible (preset 'paper'), {share} of a full step each",
                f"  blocks           {self.blocks}",
                f"  verify block     {self.verify_block}",
                f"  state            {', '.join(self.state)}",
                f"  self-test        {self.self_test}",
            ]
        )


def check(target: Any, call: Callable[[], object], preset: str | Config = "balanced", **settings: Any) -> CheckReport:
    """Run `call` once and tell what was found: what the sampler does, and whether drafts can be verified by blocks.

    Args:
        target: a pipeline, or a single model (then with `scheduler=` or `num_inference_steps=`).
        call: a short run of it, for instance `lambda: pipe(class_labels=[0], num_inference_steps=8)`.
        preset, **settings: as for `enable`; they decide the memory held.

    Raises:
        ConfigError, UnsupportedModelError: as `enable`.
    """
    enable(target, preset, **{"calibration": None, **settings})
    try:
        accelerators = accelerators_of(target)
        for accelerator in accelerators:
            accelerator.testing = True
        call()
        tested = next((a for a in accelerators if a.drafts.findings), accelerators[0])
        return _finding(tested)
    finally:
        disable(target)


def _sampler(accelerator: Accelerator) -> str:
    """What the sampler of the last run does, in words."""
    run = accelerator.last.run if accelerator.last is not None else None
    if run is None:
        return "not known: the call did not run the model"
    steps = run.response.transitions
    if not steps:
        return run.response.reason or "not asked for by preset 'paper'"
    return f"linear, memory {len(steps[0].keep)}{', adds noise' if steps[0].noisy else ''}"


def _finding(accelerator: Accelerator) -> CheckReport:
    """What the self-test and the run have shown of one model."""
    last = accelerator.last
    held = accelerator.report().bytes_per_sample if last is not None else 0
    reason = "; ".join(last.notes) if last is not None else "the call given to check did not run it"
    found = next(iter(accelerator.drafts.findings.values()), None) or Discovery(False, reason)
    return CheckReport(
        model=type(accelerator.model).__name__, supported=found.supported, reason=found.reason,
        sampler=_sampler(accelerator), blocks=", ".join(f"{n} x {k}" for n, k in found.blocks),
        verify_block=found.verify_block, state=found.state, self_test=found.self_test, bytes_per_sample=held or None,
        flops_full=found.flops_full, flops_draft=found.flops_checked,
    )  # fmt: skip
