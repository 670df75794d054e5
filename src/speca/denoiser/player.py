"""One call of a denoiser: plan, compute or forecast, correct, record.

A step is computed in full for the samples whose plan says so; for the others the output is a weighted sum of the
outputs of their last full steps, and nothing of the model runs. A player keeps no state itself: that of a branch is in
its `Branch`. Shapes: B rows of a call, n rows of a part, K kept full steps, p the memory of the sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..core.controller import ACCEPTED, FULL, Plan, Planner, Record, rows_of, worst
from ..core.correction import Corrector, Interpolation, polynomial, quadrature
from ..core.history import History, on_device
from ..core.placement import FLOW_DENSITY
from ..core.prior import DEPTH, Prior
from ..core.transition import Transition
from ..errors import UnsupportedModelError
from ..reports.costs import Costs
from .branch import Branch
from .executor import Executor
from .learning import Recorder
from .outputs import OutputForm

STRAIGHT = 1e-3
"""A sampler whose Jacobians are smaller than this is that of a flow."""

extrapolation: Interpolation = polynomial
"""Without a prior, the polynomial through the kept outputs forecasts the next ones."""


@dataclass(frozen=True)
class Call:
    """One call of the denoiser, to be answered.

    Attributes:
        branch: whose call it is.
        step: index of the step.
        evaluate: runs the model on some rows, or on all (None), and returns its own output.
        sample: the model's noisy input.
        partial: whether the model can be run on a part of the rows; if not, all samples do the same.
    """

    branch: Branch
    step: int
    evaluate: Callable[[Sequence[int] | None], Any]
    sample: Any = None
    partial: Callable[[], bool] = lambda: True


@dataclass
class KeptOutputs:
    """The outputs of the last full steps of a branch."""

    form: OutputForm
    corrector: Corrector
    others: History | None  # tensors that are forecast but not corrected, such as a predicted variance

    def bytes(self) -> int:
        """Return the bytes held."""
        return self.corrector.bytes() + (self.others.bytes() if self.others is not None else 0)


class Player:
    """Answers the calls of one run.

    Attributes:
        planner: chooses the full steps.
        prior: what is known of the outputs beforehand; None for polynomials. A run chooses both at its second step.
        watches: whether to read from the device how much innovations surprise a prior that was measured.
        recorder: is given the outputs of full steps, None if nothing is learnt from this run.
        kept: outputs of full steps that are kept of each row.
    """

    def __init__(
        self,
        planner: Planner,
        transitions: Sequence[Transition],
        total: int,
        executor: Executor,
        costs: Costs,
        kept: int,
    ) -> None:
        """
        Args:
            planner: see above.
            transitions: (T,) what the sampler does; empty if it is not linear, and then nothing is corrected.
            total: number of steps T.
            executor: reads numbers from the device.
            costs: what is spent is added here.
            kept: see above.
        """
        self.planner, self.transitions, self.total = planner, tuple(transitions), total
        self.executor, self.costs, self.kept = executor, costs, kept
        self.prior: Prior | None = None
        self.watches = False
        self.recorder: Recorder | None = None
        self.flow = bool(transitions) and all(abs(t.jacobian) < STRAIGHT for t in transitions)
        self.density = FLOW_DENSITY if self.flow else 1.0

    def play(self, call: Call) -> Any:
        """Return the output of one call, computed or forecast, and update the records of its branch.

        If the form of the output changes, the rest of the branch is run without forecasts; `branch.plain` says why.
        """
        branch, began = call.branch, self.executor.now()
        if not branch.plain:
            try:
                return self._play(call)
            except UnsupportedModelError as problem:
                branch.give_up(call.step, self.total, str(problem))
        branch.note_full(call.step, self.total)
        out = call.evaluate(None)
        self.costs.count(branch.rows, branch.rows, self.executor.now() - began)
        return out

    def plans(self, branch: Branch, step: int) -> list[Plan]:
        """Return what each sample would do at `step`, without changing anything."""
        return [self.planner.plan(replace(record, step=step, total=self.total)) for record in branch.records]

    def _play(self, call: Call) -> Any:
        branch, began = call.branch, self.executor.now()
        branch.stand_at(call.step, self.total)
        full = [r for r in branch.records if self.planner.plan(r) is Plan.FULL]
        if full and len(full) < len(branch.records) and not call.partial():
            full = list(branch.records)
        computing = {r.sample for r in full}
        drafted = [r for r in branch.records if r.sample not in computing]
        forecast = self._forecast(call, drafted) if drafted else []
        if not full:
            out = self._kept(branch).form.build(forecast)
        else:
            out, computed = self._compute(call, full)
            if computed is not None:
                out = self._kept(branch).form.build(_merged(branch.rows, rows_of(full), computed, forecast))
        for record in branch.records:
            record.note(FULL if record.sample in computing else ACCEPTED)
        self.costs.count(len(rows_of(full)), branch.rows, self.executor.now() - began)
        if call.step == self.total - 1:
            branch.forget()  # nothing is forecast after the last step
        return out

    # ------------------------------------------------------------------------------------------- drafts
    def _forecast(self, call: Call, records: Sequence[Record]) -> list[Tensor]:
        """The forecast outputs (n, ...) of the rows of `records`, with what is pending of corrections."""
        rows, kept = rows_of(records), self._kept(call.branch)
        weights = self._weights(records, rows, call.step)
        main = kept.corrector.forecast(rows, weights)
        others = kept.others.forecast(rows, weights) if kept.others is not None else []
        if self.transitions and not call.branch.uncorrected:
            here = self.transitions[call.step]
            kept.corrector.add_draft(rows, main, call.step, here)
            if (pending := kept.corrector.take(rows, here)) is not None:
                main = main + pending
        return [main, *others]

    def _weights(self, records: Sequence[Record], rows: Sequence[int], step: int) -> list[Sequence[float]]:
        """Forecast weights (n, K) of each row's own full steps, newest first; rows with equal pasts share them."""
        of: dict[Any, Sequence[float]] = {}
        by_row: dict[int, Sequence[float]] = {}
        for record in records:
            prior, past = self._known(record)
            if (prior, past) not in of:
                rule = extrapolation if prior is None else prior.rule
                of[prior, past] = rule(past, [step])[0]
            by_row |= dict.fromkeys(record.rows, of[prior, past])
        return [by_row[row] for row in rows]

    def _known(self, record: Record) -> tuple[Prior | None, tuple[float, ...]]:
        """The prior of a sample, and the full steps that its forecasts are made of, newest first."""
        prior = self.prior if record.measured else None
        return prior, tuple(record.anchors[: self.planner.config.anchors if prior is None else DEPTH])

    def _expected(self, records: Sequence[Record], rows: Sequence[int], step: int) -> list[float | None]:
        """The mean square of the innovation of each row that the prior expects, None without one."""
        by_row: dict[int, float | None] = {}
        for record in records:
            prior, past = self._known(record)
            nodes = [int(p) for p in past]
            by_row |= dict.fromkeys(record.rows, None if prior is None else prior.innovation(nodes, step))
        return [by_row[row] for row in rows]

    # ------------------------------------------------------------------------------------------- full steps
    def _compute(self, call: Call, records: Sequence[Record]) -> tuple[Any, list[Tensor] | None]:
        """The model's own output for the rows of `records`, and its tensors (n, ...) if they are not all of the answer:
        they were corrected, or other rows are forecast."""
        branch, rows = call.branch, rows_of(records)
        whole = len(rows) == branch.rows
        out = call.evaluate(None if whole else rows)
        kept = self._kept(branch, out, call.sample)
        streams = kept.form.split(out, len(rows))
        main, change, pending = streams[0], None, None
        if self.recorder is not None and whole:  # only then can it be one that is learnt from
            self.recorder.add(call.step, main)
        if self.transitions and not branch.uncorrected:
            change = self._correct(call, kept.corrector, records, rows, main)
            pending = kept.corrector.take(rows, self.transitions[call.step])
            for record in records:
                record.density = self.density
        kept.corrector.add_full(rows, main, change)
        if kept.others is not None:
            kept.others.push(rows, streams[1:])
        for record in records:
            record.anchors = [float(call.step), *record.anchors][: self.kept]
        if pending is not None:
            streams[0] = main.float() + (pending if change is None else pending + change)
        return out, streams if pending is not None or not whole else None

    def _correct(
        self, call: Call, corrector: Corrector, records: Sequence[Record], rows: list[int], main: Tensor
    ) -> Tensor | None:
        """Compute the corrections that the output `main` (n, ...) of a full step gives, and plan by their sizes.

        Returns by how much outputs here change with the corrected sample (n, ...), None if nothing is corrected.
        """
        here, change, config = self.transitions[call.step], None, self.planner.config
        if here.inert:
            return None
        if drafted := [r for r in records if corrector.drafts[r.rows[0]]]:
            moved = rows_of(drafted)
            part = on_device([rows.index(row) for row in moved], main.device)
            omega = self._quadrature(call.step, drafted, corrector)
            weights = self._weights(drafted, moved, call.step)
            expected = self._expected(drafted, moved, call.step)
            place = {row: index for index, row in enumerate(moved)}
            same = {row: [place[other] for other in record.rows] for record in drafted for row in record.rows}
            surprises = corrector.observe(moved, main[part], weights, expected, [same[row] for row in moved])
            corrections, sizes = corrector.correction(
                moved, main[part], [omega[row] for row in moved], here, surprises, expected
            )
            self._observe(drafted, sizes, surprises, corrector)
            if config.corrector:
                change = torch.zeros_like(main, dtype=torch.float32).index_add_(0, part, corrections[0] * here.jacobian)
                corrector.add_pending(moved, corrections)
        undrafted = [r for r in records if not corrector.drafts[r.rows[0]] and len(r.anchors) >= config.anchors]
        if self._measures(undrafted):
            known = rows_of(undrafted)
            part = on_device([rows.index(row) for row in known], main.device)
            forecast = corrector.forecast(known, self._weights(undrafted, known, call.step))
            # The innovation in its effect on the next sample: the error of the draft that was not taken.
            missed = (main[part].float() - forecast) * here.effect[0]
            sizes = missed.flatten(1).square().mean(1).sqrt() / here.size
            self._observe(undrafted, sizes, torch.zeros_like(sizes), corrector)
        return change

    def _quadrature(
        self, step: int, drafted: Sequence[Record], corrector: Corrector
    ) -> dict[int, tuple[tuple[float, ...], ...]]:
        """The quadrature weights of each row that has drafted; rows with equal pasts share them."""
        found: dict[Any, tuple[tuple[float, ...], ...]] = {}
        by_row: dict[int, tuple[tuple[float, ...], ...]] = {}
        for record in drafted:
            drafts = corrector.drafts[record.rows[0]]
            prior, nodes = self._known(record)
            past = prior, nodes, tuple(d.position for d in drafts)
            if past not in found:
                rule = polynomial if prior is None else prior.rule
                found[past] = quadrature([float(step), *nodes], drafts, rule)
            by_row |= dict.fromkeys(record.rows, found[past])
        return by_row

    def _observe(self, records: Sequence[Record], sizes: Tensor, surprises: Tensor, corrector: Corrector) -> None:
        """Let the planner plan by the estimated errors (n,) of drafts, or of the one that was not taken; of samples
        with a prior keep how much the innovations (n,) surprise."""
        watched = self.watches and any(r.measured for r in records)
        if not watched and not self._measures(records):
            return
        self.costs.host_reads += 1
        read = self.executor.read(torch.cat([sizes, surprises]))
        by_row = dict(zip(rows_of(records), zip(read[: len(sizes)], read[len(sizes) :], strict=True), strict=True))
        for record in records:
            drafts = len(corrector.drafts[record.rows[0]])
            if self._measures([record]):
                self.planner.observe(record, worst([by_row[row][0] for row in record.rows]), max(1, drafts))
            if drafts and self.watches and record.measured:
                record.surprises.append(fmean(by_row[row][1] for row in record.rows))

    def _measures(self, records: Sequence[Record]) -> bool:
        """Whether errors change the plan of any of these; of a budget alone, or a placement, none is read."""
        return self.planner.measures and any(r.placement is None for r in records)

    def _kept(self, branch: Branch, out: Any = None, sample: Any = None) -> KeptOutputs:
        """What is kept of the branch, made at its first full step from the output of all its rows."""
        if branch.kept is None:
            form = OutputForm.of(out, branch.rows, sample)
            if form.uncorrectable:
                branch.uncorrected = form.uncorrectable
            correctable = self.transitions and not branch.uncorrected
            memory = len(self.transitions[0].keep) if correctable else 0
            corrector = Corrector(self.kept, branch.rows, memory)
            others = History(self.kept, branch.rows) if len(form.dtypes) > 1 or form.channels else None
            branch.kept = KeptOutputs(form, corrector, others)
        assert isinstance(branch.kept, KeptOutputs)
        return branch.kept


def _merged(total: int, rows: Sequence[int], computed: list[Tensor], forecast: list[Tensor]) -> list[Tensor]:
    """The tensors (B, ...) of all rows, from those that were computed, at `rows`, and those of all others."""
    if not forecast:
        return computed
    rest = [row for row in range(total) if row not in rows]
    merged = []
    for one, other in zip(computed, forecast, strict=True):
        whole = one.new_empty((total, *one.shape[1:]))
        whole.index_copy_(0, on_device(list(rows), one.device), one)
        merged.append(whole.index_copy_(0, on_device(rest, one.device), other.to(one.dtype)))
    return merged
