"""Verified drafts of one model: its gate, the findings of its self-tests, and the execution of its calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import VerifiedConfig
from ..denoiser.arguments import PACKED
from ..denoiser.branch import Branch
from ..denoiser.executor import Executor
from ..denoiser.rows import Invocation, join, owners, split
from ..denoiser.run import Run
from ..errors import ConfigError
from .evaluation import rows_first
from .gate import Gate
from .player import VerifiedPlayer, Work
from .probe import Discovery, discover, scaled
from .rows import weights
from .rules import Rule, rule

UNKNOWN = Discovery(False, "not tested yet")

MOST = 256
"""Kinds of call whose findings are remembered; of older ones it is found anew."""


class VerifiedDrafts:
    """Attached to one model from the first run that needs it until `detach`.

    Attributes:
        gate: the gate in the model's block lists.
        findings: result of the self-test for each kind of call.
        rule: replaces the rule named in the settings.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.gate = model, Gate(model)
        self.findings: dict[tuple[object, object, bool], Discovery] = {}
        self.rule: Rule | None = None
        self._renewals = 0

    def attach(self) -> str:
        """Attach the gate; return the reason if that is impossible, else an empty string."""
        try:
            if self.gate.lists:
                self.gate.refresh()
            else:
                self.gate.attach()
        except ConfigError as problem:
            return str(problem)
        return ""

    def detach(self) -> None:
        """Detach the gate; keep the findings."""
        self.gate.detach()

    def renew(self, run: Run | None) -> None:
        """Drop findings of replaced blocks, and the features that the run kept of them."""
        if self.gate.renewals == self._renewals:
            return
        self._renewals = self.gate.renewals
        if self.findings:
            self.findings.clear()
            if run is not None:
                run.note(f"blocks of {type(self.model).__name__} were replaced; it was tested anew.")
                run.restart()

    def known(self, key: tuple[object, object, bool]) -> Discovery:
        """Return the finding for this kind of call. A finding for several rows, or for rows of unequal length, also
        holds for one row, or for rows of equal length."""
        if key in self.findings:
            return self.findings[key]
        kind, owned, uneven = key
        wider = [f for (k, o, _), f in self.findings.items() if k == kind and (owned is None or o == owned)]
        return next((f for f in wider if f.supported and not f.ragged and not uneven), UNKNOWN)

    def play(
        self, run: Run, config: VerifiedConfig, branch: Branch, step: int, noise: float, call: Invocation, kind: object
    ) -> tuple[Any, str]:  # fmt: skip
        """Run one call; also return the reason if the model runs without forecasts, else an empty string.

        Args:
            run: the run that the call belongs to.
            config: how drafts are made and checked.
            branch: the branch of the call.
            step, noise: index of the step and diffusion time.
            call: the model's original forward and its arguments.
            kind: key of the finding; calls with equal kinds share one finding.
        """
        player = VerifiedPlayer(config, self.rule or rule(config), run.executor, run.costs)
        short = player.rule.idle(run.total)
        if short:
            run.note(f"{run.total} steps leave nothing to forecast with warmup={config.warmup}, final={config.final}.")
        if branch.last < 0 and (branch.rows > 1 or run.executor.joins):
            branch.uses = tuple(weights(call.arguments, branch.rows))
        key = (kind, owners(call.arguments, branch.rows), branch.uneven)
        work = Work(branch, step, run.total, noise, self.gate, self.known(key), call)
        if work.finding is UNKNOWN and not short:
            return self._discover(run, player, work, key)
        if work.finding.supported and not short and not branch.plain:
            return player.play(work), branch.plain
        reason = "" if work.finding.supported or work.finding is UNKNOWN else work.finding.reason
        out, full = run.plain(branch, step, call), work.finding.flops_full
        if full:
            run.costs.count_flops(branch.rows * full, branch.rows * full)
        return out, reason

    def test(self, executor: Executor, call: Invocation, rows: int, kind: object) -> str:
        """Self-test drafts on a call of `rows` rows unless its `kind` was tested; return why they fail, or nothing."""
        used = weights(call.arguments, rows) if rows > 1 else []
        key = (kind, owners(call.arguments, rows), len(set(used)) > 1)
        if self.known(key) is UNKNOWN:
            found = self._first(executor, call, rows)[1]
            self._keep(key, found)
            return "" if found.supported else found.reason
        return "" if self.known(key).supported else self.known(key).reason

    def _discover(
        self, run: Run, player: VerifiedPlayer, work: Work, key: tuple[object, object, bool]
    ) -> tuple[Any, str]:
        """Run the first call of its kind in full and self-test the model on it."""
        began, rows = run.executor.now(), work.branch.rows
        out, finding, features = self._first(run.executor, work.invocation, rows)
        self._keep(key, finding)
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

    def _keep(self, key: tuple[object, object, bool], finding: Discovery) -> None:
        """Remember what was found of a kind of call, unless it tells nothing of other calls."""
        if finding.lasting:
            self.findings.setdefault(key, finding)  # another thread may have found it meanwhile
            if len(self.findings) > MOST:
                del self.findings[next(iter(self.findings))]

    def _first(self, executor: Executor, call: Invocation, rows: int) -> tuple[Any, Discovery, tuple[Any, ...]]:
        """Run the first call of its kind and self-test drafts on it; return the model's output, the finding, and the
        features (B, ...) to record (none if the model is not supported).

        For an engine, which batches rows of several requests, a single row is tested together with a second one: two
        rows are needed to find the batch dimension of features and to test that rows are independent.
        """
        lasting = True
        if rows == 1 and executor.joins and type(self.model).__name__ not in PACKED:
            try:
                two = Invocation(call.function, join([call.arguments, scaled(call.arguments)], [1, 1]))
                out, finding, features = executor.first(lambda: self._test(two, 2), 2)
            except torch.OutOfMemoryError:
                lasting = False
                self.gate.forget()
            except Exception:  # the model cannot take two rows: run each call of this kind alone
                self.gate.forget()
            else:
                if finding.supported:
                    return split(out, [1, 1])[0], finding, tuple(f[:1] for f in features)
                lasting = finding.lasting
        out, finding, features = executor.first(lambda: self._test(call, rows), rows)
        return out, replace(finding, lasting=lasting and finding.lasting), features

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
