"""One transformer call over rows: plan, draft, verify, redo, record.

It knows neither pipelines nor schedulers, nor who else is running: its `Executor` runs each forward, at once or
packed with those of other requests. Rows of one call may do different things: at most three forwards are run (checked
drafts, unchecked drafts, full), each on its own rows, and their outputs are put together again. Shapes: B rows of the
call, n rows of a part, K anchors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .branch import Branch, Spent, Work
from .config import SpecaConfig
from .core.controller import ACCEPTED, FULL, REJECTED, Plan, Trajectory, controller
from .core.corrector import Corrector, Transition, polynomial, quadrature
from .core.forecast import forecaster
from .core.history import History, table
from .core.placement import cheapest, place
from .core.prior import DEPTH, Prior
from .core.verify import error_function
from .errors import UnsupportedModelError
from .executor import Executor
from .model import rows as rowwise
from .model.gate import Mode
from .model.shards import total_of


class Speculator:
    """Plays calls of gated transformers."""

    def __init__(self, config: SpecaConfig, executor: Executor, prior: Prior | None = None) -> None:
        self.config, self.executor, self.prior = config, executor, prior
        self.controller = controller(config)
        self.forecast = forecaster(config.forecaster)
        self.error = error_function(config.error)
        dtypes = {"model": None, **{n: getattr(torch, n) for n in ("float32", "bfloat16", "float16")}}
        self.history_dtype: torch.dtype | None = dtypes[config.history_dtype]
        self.spent = Spent()

    def play(self, work: Work) -> Any:
        """Answer one call; the records of its branch are updated, the output has all its rows.

        Where features turn out not to fit those kept, as the first call could not show, the rest of the branch is run
        plainly; `branch.trouble` says why.
        """
        try:
            return self._play(work)
        except UnsupportedModelError as problem:
            work.branch.give_up(work.position, str(problem))
            return self.executor.plain(lambda: work.forward(**work.arguments))

    def _play(self, work: Work) -> Any:
        began, branch = self.executor.now(), work.branch
        # Plan: each sample from its own record.
        plans: dict[Plan, list[Trajectory]] = {plan: [] for plan in Plan}
        branch.stand_at(work.position)
        for trajectory in branch.trajectories:
            plans[self.controller.plan(trajectory)].append(trajectory)
        # Draft, and verify where that was planned.
        parts, rejected = self._check(work, plans[Plan.CHECKED]) if plans[Plan.CHECKED] else ([], [])
        if drafted := plans[Plan.UNCHECKED]:
            parts.append((_rows(drafted), self._draft(work, drafted, Mode.UNCHECKED)[0]))
            self._drafted(work, _rows(drafted), *parts[-1])
            for trajectory in drafted:
                trajectory.note(ACCEPTED)
        # Full: planned and rejected samples together, and no others.
        full = plans[Plan.FULL] + rejected
        if full:
            parts.append((_rows(full), self._full(work, full)))
            for trajectory in plans[Plan.FULL]:
                trajectory.note(FULL)
        self._account(plans, full, work, self.executor.now() - began)
        if work.position.index == work.position.total - 1:
            branch.forget()  # nothing is forecast from the last step
        return rowwise.merge(parts, branch.rows)

    def place(self, branch: Branch, prior: Prior, transitions: Sequence[Transition]) -> None:
        """Let the prior place the full steps of a run that is to begin, within the tolerance and the budget."""
        c, steps = self.config, tuple(transitions)
        if c.controller != "planned" or not (c.tolerance or c.speedup):
            return
        found = cheapest(prior, steps, c.tolerance) if c.tolerance and self.prior is not None else None
        if c.speedup and (found is None or len(found.steps) > self.controller.budget(len(steps))):
            found = place(prior, steps, max(2, self.controller.budget(len(steps))))
        for trajectory in branch.trajectories:
            trajectory.placement = frozenset(found.steps) if found else None

    def record(self, work: Work, trajectories: Sequence[Trajectory], features: Sequence[Tensor], out: Any) -> None:
        """Keep what a full pass over the rows of `trajectories` gave, features (n, ...), as their newest anchor, and
        correct `out`."""
        branch, rows = work.branch, _rows(trajectories)
        if branch.history is None:
            branch.template = rowwise.template(out, len(rows)) if self._forecasts_output(work, out) else None
        if branch.template is not None:
            features = rowwise.streams(out, len(rows))
        if branch.history is None:
            branch.history = History(self._depth(work), branch.rows, self.history_dtype)
            branch.shapes = tuple(f.shape[1:] for f in features)
        if work.ragged:  # a part of the batch may have less padding than the whole batch had
            features = [rowwise.fit(f, (len(rows), *shape)) for f, shape in zip(features, branch.shapes, strict=True)]
        if any(f.shape[1:] != shape for f, shape in zip(features, branch.shapes, strict=True)):
            raise UnsupportedModelError("some rows of the batch have block features of another shape than all of them.")
        branch.history.push(rows, features)
        if work.transitions:
            self._correct(work, trajectories, out)
        for trajectory in trajectories:
            trajectory.anchors = [self._where(work), *trajectory.anchors][: self._depth(work)]

    def _depth(self, work: Work) -> int:
        """How many full steps are kept."""
        return self.config.anchors if work.prior is None else DEPTH

    def _forecasts_output(self, work: Work, out: Any) -> bool:
        """Whether this run's drafts forecast the model's output rather than features."""
        asked = self.config.drafts == "output" or (self.config.drafts == "auto" and work.prior is not None)
        if not (asked and work.transitions):
            return False
        try:
            rows = rowwise.streams(out, work.branch.rows)[0].shape[0]
            return rowwise.main(out, rows, work.arguments) is not None
        except UnsupportedModelError:
            return False

    def _drafted(self, work: Work, taken: list[int], rows: list[int], out: Any) -> None:
        """Note for the corrector that the rows `taken`, of those of `out`, go on with a draft."""
        corrector = work.branch.corrector
        if corrector is None or not taken:
            return
        main = rowwise.main(out, len(rows), work.arguments)
        part = table([rows.index(row) for row in taken], main.device)
        transition = work.transitions[work.position.index]
        by_row = {row: t for t in work.branch.trajectories for row in t.rows}
        if transition.pull and self.config.corrector:
            lacking = corrector.pulled(taken, self._weights([by_row[row] for row in taken], work))
            main.index_add_(0, part, lacking.to(main.dtype))
        corrector.draft(taken, main[part], self._where(work), transition)
        if (paid := corrector.pay(taken, transition)) is not None:
            main.index_add_(0, part, paid.to(main.dtype))
        rowwise.put(out, main)

    def _correct(self, work: Work, trajectories: Sequence[Trajectory], out: Any) -> None:
        """Move samples by what their full step tells of the drafts before it, through the model's output `out`."""
        branch, rows = work.branch, _rows(trajectories)
        try:
            main = rowwise.main(out, len(rows), work.arguments)
        except UnsupportedModelError as problem:
            branch.uncorrected = str(problem)
            return
        transition = work.transitions[work.position.index]
        if branch.corrector is None:
            trust = None if work.prior is None else math.inf  # its weights weigh their own error already
            branch.corrector = Corrector(self._depth(work), branch.rows, trust, len(transition.keep))
        corrector, here = branch.corrector, self._where(work)
        told = main.clone()
        change = torch.zeros_like(told, dtype=torch.float32)
        drafted = [t for t in trajectories if corrector.drafts[t.rows[0]]]
        if drafted and not transition.still:
            moved, index = _rows(drafted), {row: i for i, row in enumerate(rows)}
            rule = polynomial if work.prior is None else work.prior.rule
            of = {row: quadrature([here, *t.anchors], corrector.drafts[row], rule) for t in drafted for row in t.rows}
            part = table([index[row] for row in moved], main.device)
            moves, sizes = corrector.move(moved, told[part], [of[row] for row in moved], transition)
            self._plan_ahead(corrector, drafted, moved, sizes)
            if self.config.corrector:
                change.index_add_(0, part, moves[0] * transition.pull)
                corrector.owe(moved, moves)
        self._look_back(work, [t for t in trajectories if not corrector.drafts[t.rows[0]]], rows, told)
        if (paid := corrector.pay(rows, transition)) is not None:
            main.add_((change + paid).to(main.dtype))
            rowwise.put(out, main)
        corrector.anchor(rows, told, change)
        flow = all(abs(t.pull) < STRAIGHT for t in work.transitions)
        for trajectory in trajectories:
            trajectory.linear, trajectory.bend = True, FLOW_BEND if flow else 1.0

    def _plan_ahead(
        self, corrector: Corrector, drafted: Sequence[Trajectory], rows: Sequence[int], sizes: Tensor
    ) -> None:
        """Let the controller plan the next drafts of samples by the estimated errors (n,) of their rows."""
        if not self._plans(drafted):
            return
        by_row = dict(zip(rows, self._read(sizes), strict=True))
        for trajectory in drafted:
            estimate = _worst([by_row[row] for row in trajectory.rows])
            self.controller.observe(trajectory, estimate, len(corrector.drafts[trajectory.rows[0]]))

    def _look_back(self, work: Work, trajectories: Sequence[Trajectory], rows: Sequence[int], out: Tensor) -> None:
        """Let the controller plan by what drafts at this very step would have been wrong by, now that the output `out`
        of `rows` is known: of samples that took none since their last full step, and so have no correction."""
        known = [t for t in trajectories if len(t.anchors) >= self.config.anchors]
        transition, corrector = work.transitions[work.position.index], work.branch.corrector
        if transition.still or not known or not self._plans(known):
            return
        assert corrector is not None
        told, by_row = _rows(known), {row: t for t in known for row in t.rows}
        weights = self._weights([by_row[row] for row in told], work)
        part = table([rows.index(row) for row in told], out.device)
        missed = (out[part].float() - corrector.history.forecast(told, weights)[0]) * transition.move[0]
        sizes = dict(zip(told, self._read(missed.flatten(1).square().mean(1).sqrt() / transition.size), strict=True))
        for trajectory in known:
            self.controller.observe(trajectory, _worst([sizes[row] for row in trajectory.rows]), 1)

    def _plans(self, trajectories: Sequence[Trajectory]) -> bool:
        """Whether errors plan anything: of a budget alone, or where a prior has placed the steps, none is read."""
        by_errors = self.controller.plans_ahead and self.config.tolerance > 0
        return by_errors and any(t.placement is None for t in trajectories)

    def _full(self, work: Work, trajectories: Sequence[Trajectory]) -> Any:
        """Run the rows of `trajectories` through all blocks and record them."""
        ran = self.executor.run(work.on(_rows(trajectories), Mode.FULL))
        if ran.features:
            self.record(work, trajectories, ran.features, ran.out)
        return ran.out

    def _draft(self, work: Work, trajectories: Sequence[Trajectory], mode: Mode) -> tuple[Any, list[Tensor]]:
        """The output of a draft and, where it is checked, the errors (n,) of its rows, possibly in parts.

        Ragged rows are drafted one by one: what a row counts as its tokens must not depend on its batch-mates.
        """
        rows, by_row = _rows(trajectories), {row: t for t in trajectories for row in t.rows}
        parts = [[i] for i in range(len(rows))] if work.ragged else [list(range(len(rows)))]
        outputs, errors = [], []
        for part in parts:
            drafted = [rows[i] for i in part]
            weights = self._weights([by_row[row] for row in drafted], work)
            out, error = self._draft_rows(work, drafted, weights, mode)
            outputs.append((part, out))
            errors += [] if error is None else [error]
        return rowwise.merge(outputs, len(rows)), errors

    def _draft_rows(self, work: Work, rows: list[int], weights: Tensor, mode: Mode) -> tuple[Any, Tensor | None]:
        """One forward as a draft of `rows`: its output and, where it is checked, their errors (n,)."""
        assert work.branch.history is not None
        streams, main = work.branch.history.forecast(rows, weights), work.finding.main
        if work.branch.template is not None:
            return rowwise.like(work.branch.template, streams), None
        ran = self.executor.run(work.on(rows, mode, streams))
        if not ran.features:
            return ran.out, None
        computed = ran.features[main]
        told = rowwise.fit(streams[len(work.finding.state) + main], computed.shape)
        return ran.out, self.error(told, computed, total_of(work.gate.model))

    def _check(
        self, work: Work, trajectories: Sequence[Trajectory]
    ) -> tuple[list[tuple[list[int], Any]], list[Trajectory]]:
        """Draft, verify and judge; returns the output of the accepted rows and the rejected trajectories."""
        out, parts = self._draft(work, trajectories, Mode.CHECKED)
        rows, errors = _rows(trajectories), parts[0] if len(parts) == 1 else torch.cat(parts)
        by_row = dict(zip(rows, self._read(errors), strict=True))
        # An image's cond and uncond share one verdict: guidance would amplify the gap between a full and a draft one.
        errors_of = self.controller.judged([_worst([by_row[row] for row in t.rows]) for t in trajectories])
        verdicts = self.controller.accept(trajectories, errors_of)
        by_verdict = {row: ok for t, ok in zip(trajectories, verdicts, strict=True) for row in t.rows}
        rejected = []
        for trajectory, error, accepted in zip(trajectories, errors_of, verdicts, strict=True):
            trajectory.note(ACCEPTED if accepted else REJECTED, error)
            if not accepted:
                rejected.append(trajectory)
        taken = [row for row in rows if by_verdict[row]]
        self._drafted(work, taken, rows, out)
        return ([] if len(rejected) == len(trajectories) else [(rows, out)]), rejected

    def _weights(self, trajectories: Sequence[Trajectory], work: Work) -> Tensor:
        """Forecast weights (n, K), newest anchor first, from each row's own anchors."""
        kept, here = self._depth(work), self._where(work)
        if work.prior is not None:
            known = [work.prior.rule(t.anchors, [here])[0] for t in trajectories]
            return torch.tensor([[*w, *[0.0] * (kept - len(w))] for w in known], dtype=torch.float64)
        # Missing anchors are given distinct far positions, so that no gap is zero; their weights are zero.
        padded = [[*t.anchors, *(1e6 * (j + 1) for j in range(len(t.anchors), kept))] for t in trajectories]
        positions = torch.tensor(padded, dtype=torch.float64)
        count = torch.tensor([len(t.anchors) for t in trajectories])
        target = torch.full((len(trajectories),), here, dtype=torch.float64)
        return self.forecast(positions, count, target, self.config.order)

    def _where(self, work: Work) -> float:
        by_noise = self.config.axis == "noise" and work.prior is None
        return work.position.noise if by_noise else float(work.position.index)

    def _read(self, errors: Tensor) -> list[float]:
        """The one device-to-host read of a draft call."""
        self.spent.host_reads += 1
        return self.executor.read(errors)

    def _account(self, plans: dict[Plan, list[Trajectory]], full: list[Trajectory], work: Work, seconds: float) -> None:
        spent, finding, rows = self.spent, work.finding, work.branch.rows
        spent.seconds += seconds
        costs = (
            (plans[Plan.CHECKED], finding.flops_checked),
            (plans[Plan.UNCHECKED], 0.0 if work.branch.template is not None else finding.flops_unchecked),
            (full, finding.flops_full),
        )
        spent.flops += sum(len(_rows(t)) * (flops or 0.0) for t, flops in costs)
        spent.flops_full += rows * (finding.flops_full or 0.0)
        if len(plans[Plan.FULL]) == len(full) and len(_rows(full)) == rows:
            spent.full_rates.append(seconds / rows)


FLOW_BEND = 1.75  # where nothing is calibrated, how much denser the full steps of a flow are at the beginning
STRAIGHT = 1e-3  # a sampler whose outputs follow its sample by less, on paper, is that of a flow


def _rows(trajectories: Sequence[Trajectory]) -> list[int]:
    return sorted(row for t in trajectories for row in t.rows)


def _worst(errors: Sequence[float]) -> float:
    """The largest error; NaN if any is NaN, so that a broken row is never accepted."""
    return max(errors, key=lambda e: float("inf") if math.isnan(e) else e)
