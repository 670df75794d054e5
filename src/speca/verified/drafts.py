"""The verified drafts of one model: its gate, what was found about it, and how its calls are answered."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import VerifiedConfig
from ..denoiser.arguments import PACKED
from ..denoiser.branch import Branch
from ..denoiser.rows import Invocation, join, owners, split, weights
from ..denoiser.run import Run
from ..errors import ConfigError
from .evaluation import rows_first
from .gate import Gate
from .player import VerifiedPlayer, Work
from .probe import Discovery, discover, scaled
from .rules import Rule, rule

UNKNOWN = Discovery(False, "not tested yet")


class VerifiedDrafts:
    """Attached to one model from the first run that needs it until `detach`.

    Attributes:
        gate: what the model's block lists are iterated through.
        findings: what was found for each kind of call.
        rule: in place of the one that the settings name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.gate = model, Gate(model)
        self.findings: dict[tuple[object, object, bool], Discovery] = {}
        self.rule: Rule | None = None
        self._renewals = 0

    def attach(self) -> str:
        """Put the gate in place; returns why that is impossible, empty if it is done."""
        try:
            if self.gate.lists:
                self.gate.refresh()
            else:
                self.gate.attach()
        except ConfigError as problem:
            return str(problem)
        return ""

    def detach(self) -> None:
        """Take the gate off; what was found is kept."""
        self.gate.detach()

    def renew(self, run: Run | None) -> None:
        """Forget what was found of blocks that have been replaced, and what the run kept of them."""
        if self.gate.renewals == self._renewals:
            return
        self._renewals = self.gate.renewals
        if self.findings:
            self.findings.clear()
            if run is not None:
                run.note(f"blocks of {type(self.model).__name__} were replaced; it was tested anew.")
                run.restart()

    def known(self, key: tuple[object, object, bool]) -> Discovery:
        """Return what was found for this kind of call. What held for many rows, or for uneven ones, holds for one row,
        or for even ones."""
        if key in self.findings:
            return self.findings[key]
        kind, owned, uneven = key
        wider = [f for (k, o, _), f in self.findings.items() if k == kind and (owned is None or o == owned)]
        return next((f for f in wider if f.supported and not f.ragged and not uneven), UNKNOWN)

    def play(
        self, run: Run, config: VerifiedConfig, branch: Branch, step: int, noise: float, call: Invocation, kind: object,
        *, curious: bool = False,
    ) -> tuple[Any, str]:  # fmt: skip
        """Answer one call; also returns why the model runs without forecasts, empty if it does not.

        Args:
            run: the run that the call belongs to.
            config: how drafts are made and checked.
            branch: whose call it is.
            step, noise: index of the step and diffusion time.
            call: the model's original forward and its arguments.
            kind: what must be equal in calls that one finding holds for.
            curious: test the model even where the run is too short to gain from it.
        """
        player = VerifiedPlayer(config, self.rule or rule(config), run.executor, run.costs)
        short = player.rule.idle(run.total)
        if short:
            run.note(f"{run.total} steps leave nothing to forecast with warmup={config.warmup}, final={config.final}.")
        if branch.last < 0 and (branch.rows > 1 or run.executor.joins):
            branch.uses = tuple(weights(call.arguments, branch.rows))
        key = (kind, owners(call.arguments, branch.rows), branch.uneven)
        work = Work(branch, step, run.total, noise, self.gate, self.known(key), call)
        if work.finding is UNKNOWN and (curious or not short):
            return self._discover(run, player, work, key)
        if work.finding.supported and not short and not branch.plain:
            return player.play(work), branch.plain
        reason = "" if work.finding.supported or work.finding is UNKNOWN else work.finding.reason
        out, full = run.plain(branch, step, call), work.finding.flops_full
        if full:
            run.costs.count_flops(branch.rows * full, branch.rows * full)
        return out, reason

    def _discover(
        self, run: Run, player: VerifiedPlayer, work: Work, key: tuple[object, object, bool]
    ) -> tuple[Any, str]:
        """The first call of its kind runs in full and is learnt from."""
        began, rows = run.executor.now(), work.branch.rows
        out, finding, features = self._first(run, work.invocation, rows)
        self.findings[key] = finding
        work.branch.note_full(work.step, run.total)
        run.costs.evaluations += rows
        run.costs.evaluations_full += rows
        if not finding.supported or not features:
            run.costs.seconds += run.executor.now() - began
            return out, finding.reason
        found = Work(work.branch, work.step, run.total, work.noise, self.gate, finding, work.invocation)
        player.record(found, work.branch.records, features)
        full, checked, unchecked = (
            f or 0.0 for f in (finding.flops_full, finding.flops_checked, finding.flops_unchecked)
        )
        if full:
            run.costs.count_flops((rows + 1) * full + rows * (2 * checked + unchecked), rows * full)
        run.costs.seconds += run.executor.now() - began
        run.note("cost and time include the self-test, which runs once for a model and input size")
        return out, ""

    def _first(self, run: Run, call: Invocation, rows: int) -> tuple[Any, Discovery, tuple[Any, ...]]:
        """Run the first call of its kind and test the draft path on it: the model's output, what was found, and the
        features (B, ...) to be recorded, none if it is not supported.

        Where an engine may put rows of several requests together, one row is tested beside another one: only with two
        can be seen where features carry their rows, and that rows do not touch each other.
        """
        if rows == 1 and run.executor.joins and type(self.model).__name__ not in PACKED:
            try:
                two = Invocation(call.function, join([call.arguments, scaled(call.arguments)], [1, 1]))
                out, finding, features = run.executor.first(lambda: self._test(two, 2), 2)
            except Exception:  # of a model that cannot take two: then each call of this kind is run alone
                self.gate.forget()
            else:
                if finding.supported:
                    return split(out, [1, 1])[0], finding, tuple(f[:1] for f in features)
        found: tuple[Any, Discovery, tuple[Any, ...]] = run.executor.first(lambda: self._test(call, rows), rows)
        return found

    def _test(self, call: Invocation, rows: int) -> tuple[Any, Discovery, tuple[Any, ...]]:
        with self.gate.lock:
            try:
                out, finding = discover(self.gate, call.function, call.arguments, rows)
                features = self.gate.features
            finally:
                self.gate.forget()
        if features is None or finding.learnt is None:
            return out, finding, ()
        return out, finding, rows_first(features, rows, finding.learnt.layouts)
