"""One run of a sampler: what is known of it beforehand, its branches, and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..config import MIN_STEPS, SpecaConfig
from ..core.controller import Planner, Record
from ..core.generic import generic
from ..core.placement import COARSE, cheapest, even, place
from ..core.prior import Prior
from ..reports.costs import Costs
from ..reports.report import Report
from ..sampler.response import Response
from .branch import Branch
from .executor import Executor
from .player import Call, Player


class Run:
    """A run of T calls of a denoiser, under way or over. Everything that changes in a run is kept here.

    Attributes:
        config: the settings.
        response: what the sampler does; without transitions nothing is corrected.
        total: number of steps T.
        executor: runs the model; by default at once.
        costs: what the calls have cost.
        planner: chooses the full steps; by default as `config` describes.
        prior: what is known of the outputs beforehand.
        player: answers the calls whose outputs are forecast.
        branches: by name, for instance "cond".
        notes: what the user should know of this run.
    """

    def __init__(
        self,
        config: SpecaConfig,
        response: Response,
        total: int,
        known: Prior | None = None,
        executor: Executor | None = None,
        costs: Costs | None = None,
        planner: Planner | None = None,
    ) -> None:
        """`known` is the measured prior of the model, if there is one; the other arguments are attributes."""
        alone = config.speedup and not config.tolerance and not config.schedule and config.prior != "generic"
        if alone and known is None and planner is None and Planner(config).budget(total) < COARSE:
            config = dataclasses.replace(config, order=0, corrector=False)  # as the sampler with so many steps
        self.config, self.response, self.total = config, response, total
        self.executor = executor or Executor()
        self.costs = Costs() if costs is None else costs
        self.notes: list[str] = []
        self.branches: dict[str, Branch] = {}
        self.planner = planner or Planner(config)
        self._measured = known is not None
        self.prior = self._prior_for(known)
        self.player = Player(self.planner, response.transitions, total, self.prior, self.executor, self.costs)
        if response.note and not self.idle:
            self.note(f"{response.note}.")
        free = not (config.speedup or config.schedule or self.planner.exact or self.idle) and self.prior is None
        if free and response.transitions and response.transitions[0].noisy:
            self.note(
                "the sampler adds noise at each step, so outputs change abruptly and a tolerance lets few steps be "
                "forecast; speedup= sets a budget."
            )

    @property
    def idle(self) -> str:
        """Why a run of so few steps is left alone, empty if it is not."""
        if self.total < MIN_STEPS:
            return f"{self.total} steps leave nothing to forecast (at least {MIN_STEPS}); ran plainly."
        if self.planner.idle(self.total):
            return f"{self.total} steps leave nothing to forecast; ran plainly."
        return ""

    @property
    def planned(self) -> bool:
        """Whether full steps can be planned: errors are known by corrections, or they do not matter."""
        c = self.config
        return bool(self.response.transitions or c.speedup or c.schedule or self.planner.exact)

    @property
    def records(self) -> list[Record]:
        """The records of all samples in all branches."""
        return [record for branch in self.branches.values() for record in branch.records]

    def note(self, text: str) -> None:
        """Keep a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def branch(self, name: str, rows: int, rows_per_sample: int = 1) -> Branch:
        """Return the branch called `name`, begun if it is new; where a prior places the full steps, it does so then."""
        found = self.branches.get(name)
        if found is None:
            found = self.branches[name] = Branch.begin(rows, rows_per_sample)
            placement = self._placement()
            for record in found.records:
                record.placement = placement
        return found

    def play(self, call: Call) -> Any:
        """Answer one call, without forecasts where its branch has given up on them."""
        if not self.response.transitions and self.response.reason:
            self.note(f"nothing is corrected: {self.response.reason}.")
        out = self.player.play(call)
        if call.branch.uncorrected:
            self.note(f"nothing is corrected: {call.branch.uncorrected}.")
        return out

    def plain(self, branch: Branch, step: int, call: Callable[[], Any]) -> Any:
        """Run a call of all rows of a branch without forecasts, and count it."""
        branch.note_full(step, self.total)
        began = self.executor.now()
        out = self.executor.plain(call)
        self.costs.count(branch.rows, branch.rows, self.executor.now() - began)
        return out

    def counted(self, rows: int) -> None:
        """Count a call of `rows` rows that is answered, and the memory held after it."""
        self.costs.row_calls += rows
        self.costs.peak = max(self.costs.peak, sum(branch.bytes() for branch in self.branches.values()))

    def missed(self, step: int) -> None:
        """Restart branches that left out the step before `step`: their outputs are old and need not be kept."""
        for branch in self.branches.values():
            if 0 <= branch.last < step - 1:
                branch.restart()

    def restart(self) -> None:
        """Drop what was kept in all branches, as where conditions change in mid-run: the next step is full."""
        for branch in self.branches.values():
            branch.restart()

    def end(self) -> None:
        """Drop all outputs that are kept; the records stay for the report."""
        for branch in self.branches.values():
            branch.forget()

    def report(self, model: str) -> Report:
        """Return what the run cost and saved.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        return Report.of(model, self.config.to_dict(), self.records, self.costs, self.notes)

    # ------------------------------------------------------------------------------------------- the prior
    def _prior_for(self, measured: Prior | None) -> Prior | None:
        """What is known of the outputs of this run beforehand; the notes say why a measured prior is not used."""
        c, steps = self.config, self.response.transitions
        from_sampler = c.prior == "generic"
        if c.prior == "none" or self.planner.exact or not steps or not (from_sampler or measured is not None):
            return None
        if not c.corrector:
            if measured is not None or c.prior == "generic":
                self.note("the prior is not used: it needs the corrector.")
            return None
        if measured is not None and measured.noisy != steps[0].noisy:
            other = "adds noise at each step" if measured.noisy else "adds none"
            self.note(f"the prior is not used: it was measured with a sampler that {other}, unlike this one.")
            measured = None
        if measured is not None:
            return measured.at(self.response.noise)
        self._measured = False
        return generic(self.response.noise, tuple(steps)) if from_sampler else None

    def _placement(self) -> frozenset[int] | None:
        """The full steps where they are chosen beforehand: by a prior within tolerance and budget, or evenly where
        there is only a budget; None where they are planned on the way."""
        c, steps = self.config, self.response.transitions
        if c.schedule or self.planner.exact:
            return None
        if self.prior is None:  # a budget alone is spent evenly
            return (
                frozenset(even(self.total, self.planner.budget(self.total), self.player.flow))
                if not c.tolerance
                else None
            )
        found = cheapest(self.prior, steps, c.tolerance) if c.tolerance and self._measured else None
        if c.speedup and (found is None or len(found.steps) > self.planner.budget(self.total)):
            found = place(self.prior, steps, self.planner.budget(self.total))
        return frozenset(found.steps) if found else None
