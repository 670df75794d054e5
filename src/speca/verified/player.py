"""One call of a model whose block features are forecast: plan, draft, verify, recompute what failed, record.

Rows of one call may do different things: at most three forwards are run (checked drafts, unchecked drafts, full), each
on its own rows, and their outputs are put together again. Shapes: B rows of the call, n rows of a part, K kept full
steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import VerifiedConfig
from ..core.controller import ACCEPTED, FULL, REJECTED, Plan, Record, rows_of, worst
from ..core.history import History
from ..denoiser.branch import Branch
from ..denoiser.executor import Executor
from ..denoiser.rows import Invocation
from ..errors import UnsupportedModelError
from ..reports.costs import Costs
from . import layouts
from .errors import error_function
from .evaluation import GatedEvaluation, Passed
from .forecasters import forecaster
from .gate import Gate, Mode
from .probe import Discovery
from .rows import merge
from .rules import Rule
from .shards import total_of


@dataclass(frozen=True)
class Work:
    """One call of a gated model.

    Attributes:
        branch: the branch of the call.
        step, total: index of the step and number of steps.
        noise: diffusion time, about 1 at pure noise.
        gate: the gate of the model.
        finding: result of the self-test of this kind of call.
        invocation: the model's original forward and its arguments.
    """

    branch: Branch
    step: int
    total: int
    noise: float
    gate: Gate
    finding: Discovery
    invocation: Invocation

    def on(self, rows: Sequence[int], mode: Mode, forecast: Sequence[Tensor] = ()) -> GatedEvaluation:
        """Return the forward of `rows` of the model's own inputs."""
        uses = tuple(self.branch.uses[row] for row in rows) if self.branch.uses else ()
        return GatedEvaluation(
            invocation=self.invocation.on(rows, self.branch.rows), rows=len(rows), step=self.step, total=self.total,
            model=id(self.gate.model), gate=self.gate, finding=self.finding, mode=mode, forecast=tuple(forecast),
            uses=uses,
        )  # fmt: skip

    @property
    def ragged(self) -> bool:
        """Return whether rows have fewer tokens alone than in their batch."""
        return self.finding.learnt is not None and self.finding.learnt.ragged


@dataclass
class KeptFeatures:
    """The verify block's state and outputs at the last full steps of a branch."""

    history: History
    shapes: tuple[torch.Size, ...]  # of one row of each feature

    def bytes(self) -> int:
        """Return the bytes held."""
        return self.history.bytes()


class VerifiedPlayer:
    """Runs the calls of one run with forecast features. It has no state; the state of a branch is in its `Branch`."""

    def __init__(self, config: VerifiedConfig, rule: Rule, executor: Executor, costs: Costs) -> None:
        """
        Args:
            config: the settings.
            rule: plans the steps of samples and accepts or rejects drafts.
            executor: runs forwards and reads numbers.
            costs: FLOPs and counts are added here.
        """
        self.config, self.rule, self.executor, self.costs = config, rule, executor, costs
        self.forecaster = forecaster(config.forecaster)
        self.error = error_function(config.error)
        dtypes = {"model": None, **{n: getattr(torch, n) for n in ("float32", "bfloat16", "float16")}}
        self.history_dtype: torch.dtype | None = dtypes[config.history_dtype]

    def play(self, work: Work) -> Any:
        """Run one call; update the records of its branch and return the output of all rows.

        If features do not fit the shapes of those kept, the rest of the branch runs without forecasts, and
        `branch.plain` is the reason.
        """
        began = self.executor.now()
        try:
            return self._play(work)
        except UnsupportedModelError as problem:
            work.branch.give_up(work.step, work.total, str(problem))
            out = self.executor.plain(work.invocation)
            self._count({}, work.branch.records, work, self.executor.now() - began)
            return out

    def _play(self, work: Work) -> Any:
        began, branch = self.executor.now(), work.branch
        plans: dict[Plan, list[Record]] = {plan: [] for plan in Plan}
        branch.stand_at(work.step, work.total)
        for record in branch.records:
            plans[self.rule.plan(record)].append(record)
        parts, rejected = self._check(work, plans[Plan.CHECKED]) if plans[Plan.CHECKED] else ([], [])
        if drafted := plans[Plan.DRAFT]:
            parts.append((rows_of(drafted), self._draft(work, drafted, Mode.UNCHECKED)[0]))
            for record in drafted:
                record.note(ACCEPTED)
        # Planned and rejected samples are computed in full together, and no others.
        if full := plans[Plan.FULL] + rejected:
            parts.append((rows_of(full), self._full(work, full)))
            for record in plans[Plan.FULL]:
                record.note(FULL)
        self._count(plans, full, work, self.executor.now() - began)
        if work.step == work.total - 1:
            branch.forget()  # nothing is forecast after the last step
        return merge(parts, branch.rows)

    def record(self, work: Work, records: Sequence[Record], features: Sequence[Tensor]) -> None:
        """Record the features (n, ...) of a full forward over the rows of `records` as their newest full step."""
        branch, rows = work.branch, rows_of(records)
        if branch.kept is None:
            shapes = tuple(f.shape[1:] for f in features)
            branch.kept = KeptFeatures(History(self.config.anchors, branch.rows, self.history_dtype), shapes)
        kept = self._kept(branch)
        if work.ragged:  # a part of the batch may have less padding than the whole batch had
            features = [layouts.fit(f, (len(rows), *shape)) for f, shape in zip(features, kept.shapes, strict=True)]
        if any(f.shape[1:] != shape for f, shape in zip(features, kept.shapes, strict=True)):
            raise UnsupportedModelError("some rows of the batch have block features of another shape than all of them.")
        kept.history.push(rows, features)
        for record in records:
            record.anchors = [self._where(work), *record.anchors][: self.config.anchors]

    def _full(self, work: Work, records: Sequence[Record]) -> Any:
        """Run all blocks on the rows of `records`; record their features and return the output."""
        passed: Passed = self.executor.run(work.on(rows_of(records), Mode.FULL))
        if passed.features:
            self.record(work, records, passed.features)
        return passed.out

    def _draft(self, work: Work, records: Sequence[Record], mode: Mode) -> tuple[Any, list[Tensor]]:
        """Return the output of a draft and, if checked, the errors (n,) of its rows.

        Ragged rows are drafted one by one, as their number of tokens must not depend on other rows of the batch.
        """
        rows, by_row = rows_of(records), {row: record for record in records for row in record.rows}
        parts = [[i] for i in range(len(rows))] if work.ragged else [list(range(len(rows)))]
        outputs, errors = [], []
        for part in parts:
            drafted = [rows[i] for i in part]
            weights = self._weights([by_row[row] for row in drafted], work)
            out, error = self._draft_rows(work, drafted, weights, mode)
            outputs.append((part, out))
            errors += [] if error is None else [error]
        return merge(outputs, len(rows)), errors

    def _draft_rows(self, work: Work, rows: list[int], weights: Tensor, mode: Mode) -> tuple[Any, Tensor | None]:
        """Run one draft of `rows`; return its output and, if checked, the errors (n,)."""
        streams, main = self._kept(work.branch).history.forecast(rows, weights.tolist()), work.finding.main
        passed: Passed = self.executor.run(work.on(rows, mode, streams))
        if not passed.features:
            return passed.out, None
        computed = passed.features[main]
        forecast = layouts.fit(streams[len(work.finding.state) + main], computed.shape)
        return passed.out, self.error(forecast, computed, total_of(work.gate.model))

    def _check(self, work: Work, records: Sequence[Record]) -> tuple[list[tuple[list[int], Any]], list[Record]]:
        """Draft and verify; return the output of the accepted rows and the rejected records."""
        out, parts = self._draft(work, records, Mode.CHECKED)
        rows, errors = rows_of(records), parts[0] if len(parts) == 1 else torch.cat(parts)
        self.costs.host_reads += 1
        by_row = dict(zip(rows, self.executor.read(errors), strict=True))
        # Both guidance rows of a sample share one verdict, as guidance amplifies a difference of draft and full.
        errors_of = self.rule.judged([worst([by_row[row] for row in record.rows]) for record in records])
        verdicts = self.rule.accept(records, errors_of)
        rejected = []
        for record, error, accepted in zip(records, errors_of, verdicts, strict=True):
            record.note(ACCEPTED if accepted else REJECTED, error)
            if not accepted:
                rejected.append(record)
        return ([] if len(rejected) == len(records) else [(rows, out)]), rejected

    def _weights(self, records: Sequence[Record], work: Work) -> Tensor:
        """Return forecast weights (n, K), newest full step first, from each row's own full steps."""
        depth = self.config.anchors
        # Missing full steps are given distinct far positions, so that no gap is zero; their weights are zero.
        padded = [[*r.anchors, *(1e6 * (j + 1) for j in range(len(r.anchors), depth))] for r in records]
        positions = torch.tensor(padded, dtype=torch.float64)
        count = torch.tensor([len(r.anchors) for r in records])
        target = torch.full((len(records),), self._where(work), dtype=torch.float64)
        return self.forecaster(positions, count, target, self.config.order)

    def _where(self, work: Work) -> float:
        return work.noise if self.config.axis == "noise" else float(work.step)

    @staticmethod
    def _kept(branch: Branch) -> KeptFeatures:
        assert isinstance(branch.kept, KeptFeatures)
        return branch.kept

    def _count(self, plans: dict[Plan, list[Record]], full: Sequence[Record], work: Work, seconds: float) -> None:
        finding, rows = work.finding, work.branch.rows
        self.costs.count(len(rows_of(full)), rows, seconds)
        spent = (
            (plans.get(Plan.CHECKED, ()), finding.flops_checked),
            (plans.get(Plan.DRAFT, ()), finding.flops_unchecked),
            (full, finding.flops_full),
        )
        flops = sum(len(rows_of(records)) * (each or 0.0) for records, each in spent)
        if finding.flops_full:
            self.costs.count_flops(flops, rows * finding.flops_full)
