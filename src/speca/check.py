"""check: is a model supported, what was discovered, what would it hold in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import SpecaConfig
from .pipeline import disable, enable, transformers_of
from .run import ATTRIBUTE


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What the probe found on a real call.

    Attributes:
        model: class of the transformer.
        supported: whether it is accelerated; if not, `reason` says why.
        blocks: block lists and how many of their blocks ran, for instance "transformer_blocks x 16".
        verify_block: the block that checks drafts.
        state: arguments of the verify block that are forecast.
        self_test: result of replaying a full step as a draft.
        bytes_per_sample: features held per image during a run with this preset, all branches together.
        flops_full, flops_draft: of one row and step, full and as a verified draft; None where not counted.
    """

    model: str
    supported: bool
    reason: str
    blocks: str
    verify_block: str
    state: tuple[str, ...]
    self_test: str
    bytes_per_sample: int | None
    flops_full: float | None
    flops_draft: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "state": list(self.state)}

    def __str__(self) -> str:
        if not self.supported:
            return f"{self.model}: runs plainly, {self.reason}"
        share = f"{self.flops_draft / self.flops_full:.1%}" if self.flops_draft and self.flops_full else "not counted"
        return "\n".join(
            [
                f"{self.model}: supported",
                f"  blocks        {self.blocks}",
                f"  verify block  {self.verify_block}",
                f"  state         {', '.join(self.state)}",
                f"  self-test     {self.self_test}",
                f"  memory        {(self.bytes_per_sample or 0) / 2**20:.3f} MiB per sample",
                f"  draft cost    {share} of a full step",
            ]
        )


def check(
    target: Any, call: Callable[[], object], preset: str | SpecaConfig = "balanced", **settings: Any
) -> CheckReport:
    """Run `call` once under acceleration and tell what was found.

    Args:
        target: a pipeline, or a bare transformer (then with `scheduler=` or `num_inference_steps=`).
        call: a short run of it, for instance `lambda: pipe(class_labels=[0], num_inference_steps=8)`.
        preset: settings, which decide the memory held.
        **settings: as for `enable`.

    Raises:
        ConfigError, UnsupportedModelError: as `enable`.
        InputError: the call did not run the transformer.
    """
    enable(target, preset, **settings)
    try:
        runs = [m.__dict__[ATTRIBUTE] for m in transformers_of(target)]
        for run in runs:
            run.curious = True
        call()
        return _finding(next((r for r in runs if r.findings), runs[0]))
    finally:
        disable(target)


def _finding(run: Any) -> CheckReport:
    found = next(iter(run.findings.values()), None)
    name = type(run.model).__name__
    if found is None:
        reason = "; ".join(run.notes) or "the call given to check did not run it"
        return CheckReport(
            model=name, supported=False, reason=reason, blocks="", verify_block="", state=(), self_test="not run",
            bytes_per_sample=None, flops_full=None, flops_draft=None,
        )  # fmt: skip
    return CheckReport(
        model=name,
        supported=found.supported,
        reason=found.reason,
        blocks=", ".join(f"{n} x {k}" for n, k in found.blocks),
        verify_block=found.verify_block,
        state=found.state,
        self_test=found.self_test,
        bytes_per_sample=run.report().bytes_per_sample if found.supported else None,
        flops_full=found.flops_full,
        flops_draft=found.flops_checked,
    )
