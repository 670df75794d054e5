"""One run of a sampler: what is known of it beforehand, its branches, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from ..calibration.file import fitted, prior_of
from ..calibration.knowledge import Kind, Knowledge
from ..config import MIN_STEPS, SpecaConfig
from ..core.controller import ACCEPTED, Plan, Planner, Record
from ..core.generic import filled, generic
from ..core.placement import COARSE, LEAST, Placement, cheapest, even, place
from ..core.prior import DEPTH, Prior
from ..core.transition import Transition
from ..reports.costs import Costs
from ..reports.report import Report
from ..sampler.response import Response
from .branch import Branch
from .executor import Executor
from .learning import LEAST as FEWEST
from .learning import Recorder
from .player import Call, Player

CAREFUL = 3.0
"""Budget of a run that is learnt from though not every step is computed."""

SEARCHED_AT_ONCE = 24
"""Steps of a run whose full steps are found within some tens of milliseconds; for more the executor may do other things
meanwhile."""

SURPRISE_LIMIT, SURPRISE_LIMIT_OF_BUDGET = 6.0, 20.0
"""Mean surprise of the full steps so far, one without surprise counted in, above which a prior is done without; more
with a budget, which has only even steps to fall back to."""


class Run:
    """A run of T calls of a denoiser, under way or over. Everything that changes in a run is kept here.

    Attributes:
        config: the settings, with the tolerance of a calibration that is used.
        knowledge: where a prior is found, and where what the run shows is left.
        response: what the sampler does; without transitions nothing is corrected.
        total: number of steps T.
        executor: runs the model; by default at once.
        costs: what the calls have cost.
        planner: chooses the full steps; by default as `config` describes.
        prior: what is known of the outputs beforehand, from the second step on; None if nothing is.
        learning: whether the run is learnt from.
        kind: the kind of its calls, known from the second step on where a prior may be used.
        player: answers the calls whose outputs are forecast.
        branches: by name, for instance "cond".
        notes: what the user should know of this run.
    """

    def __init__(
        self,
        config: SpecaConfig,
        response: Response,
        total: int,
        knowledge: Knowledge | None = None,
        executor: Executor | None = None,
        costs: Costs | None = None,
        planner: Planner | None = None,
    ) -> None:
        """The arguments are attributes; `knowledge` is empty where none is given."""
        self.config, self.response, self.total = config, response, total
        self.knowledge = knowledge or Knowledge()
        self.executor = executor or Executor()
        self.costs = Costs() if costs is None else costs
        self.notes: list[str] = []
        self.branches: dict[str, Branch] = {}
        self._given_planner = planner is not None
        self.prior: Prior | None = None
        self.planner = planner or Planner(config)
        self.learning = False
        self._settled = self._measured = self._rejected = False
        self.kind: Kind | None = None
        known = self.knowledge.given is not None or self.knowledge.learns
        uses = bool(
            (config.prior == "generic" or (config.prior == "measured" and known))
            and response.transitions
            and not self.planner.exact
        )
        if uses and not config.corrector:
            self.note("the prior is not used: it needs the corrector.")
        self._uses_prior = uses and config.corrector
        kept = max(DEPTH, config.anchors) if self._uses_prior else config.anchors
        self.player = Player(self.planner, response.transitions, total, self.executor, self.costs, kept)
        if self._uses_prior and self.knowledge.learns and total >= FEWEST:
            self.player.recorder = Recorder(total, self.knowledge.in_full)
        if response.note and not self.idle:
            self.note(f"{response.note}.")

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
        """Return the branch called `name`, begun if it is new."""
        found = self.branches.get(name)
        if found is None:
            found = self.branches[name] = Branch.begin(rows, rows_per_sample)
            found.placed = not self._settled  # `settle` places its full steps
        return found

    def play(self, call: Call) -> Any:
        """Answer one call, without forecasts where its branch has given up on them."""
        if not self.response.transitions and self.response.reason:
            self.note(f"nothing is corrected: {self.response.reason}.")
        self.settle(call.step)
        if not call.branch.placed:
            self._place(call.branch.records, call.step)
            call.branch.placed = True
        out = self.player.play(call)
        if call.branch.uncorrected:
            self.note(f"nothing is corrected: {call.branch.uncorrected}.")
        self.learn()
        self._watch(call.branch, call.step)
        return out

    def plans(self, branch: Branch, step: int) -> list[Plan]:
        """Return what each sample of a branch would do at `step`."""
        self.settle(step)
        return self.player.plans(branch, step)

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
                branch.placed = not self._settled

    def restart(self) -> None:
        """Drop what was kept in all branches, as where conditions change in mid-run: the next step is full, and what is
        left of the budget is placed anew."""
        for branch in self.branches.values():
            branch.restart()
            branch.placed = not self._settled

    def end(self) -> None:
        """Drop all outputs that are kept; the records stay for the report."""
        self.learn()
        over = any(branch.last == self.total - 1 for branch in self.branches.values())
        if self.learning and over and self.kind is not None:
            self.knowledge.stop_learning(self.kind)  # the last step came, and yet there was nothing to learn from
            self.note("nothing could be learnt from this run: its steps differ in their calls.")
        self.player.recorder, self.learning = None, False
        for branch in self.branches.values():
            branch.forget()

    def report(self, model: str) -> Report:
        """Return what the run cost and saved.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        return Report.of(model, self.config.to_dict(), self.records, self.costs, self.notes)

    # ------------------------------------------------------------------------------------------- what is known
    def settle(self, step: int) -> None:
        """At the second step, choose the prior and the full steps: the first step, which is full in any case, has shown
        which calls a step is made of, and so what the run has in common with earlier ones."""
        if self._settled or step == 0 or not self.branches:
            return
        self._settled = True
        recorder, self.player.recorder = self.player.recorder, None
        # What is known is read from files, by a fingerprint of the model.
        known = self.executor.compute(partial(self._find, recorder), "find") if self._uses_prior else None
        if self.kind is not None and known is None and self.config.prior != "generic" and recorder is not None:
            self.learning = self.knowledge.should_learn(self.kind)
        if self.learning:
            self.player.recorder = recorder
            if self.knowledge.notice:
                self.note(self.knowledge.notice)
        self.player.prior, self.player.watches = known, self._measured
        self.prior = known
        if not self._given_planner:
            self.planner = self.player.planner = Planner(self._adapted())
        free = not (self.config.speedup or self.config.schedule or self.planner.exact or self.idle or self.prior)
        if free and self.response.transitions and self.response.transitions[0].noisy:
            self.note(
                "the sampler adds noise at each step, so outputs change abruptly and a tolerance lets few steps be "
                "forecast; speedup= sets a budget."
            )
        self._place(self.records, 0)
        if self.learning and recorder is not None and (placed := self.records[0].placement) is not None:
            recorder.restrict(tuple(placed))

    def _find(self, recorder: Recorder | None) -> Prior | None:
        """What is known of the outputs of this run; the notes say why a calibration is not used."""
        steps, noise = self.response.transitions, self.response.noise
        calls = [branch for branch in self.branches.values() if branch.last == 0]
        size = recorder.elements if recorder is not None else 0
        self.kind = Kind(tuple(len(b.records[0].rows) for b in calls), round(math.log2(size)) if size else 0)
        found = self.knowledge.find(self.kind, noise, steps)
        if found is not self.knowledge.given and (why := self.knowledge.why_not(self.kind, noise, steps)):
            self.note(f"the calibration is not used: {why}.")
        self._measured = found is not None
        if found is not None:
            self.config = fitted(self.config, found)
            prior = prior_of(found)
            assert prior is not None
            return prior.at(noise)
        return generic(noise, steps) if self.config.prior == "generic" else None

    def _adapted(self) -> SpecaConfig:
        """The settings as the planner follows them: all steps in full of a run that is learnt from, or every third; as
        the sampler with so many steps where a budget is small and nothing is known."""
        c = self.config
        if self.learning:
            speedup = 0.0 if self.knowledge.in_full else min(c.speedup or CAREFUL, CAREFUL)
            return dataclasses.replace(c, tolerance=0.0, speedup=speedup, schedule=())
        alone, budget = self.prior is None and not c.tolerance and not c.schedule, Planner(c).budget(self.total)
        if c.speedup and alone and budget < COARSE:
            self.note(
                f"a budget of {budget} full steps is too small to forecast from, as nothing is known of the model; it "
                f"is spent as the sampler with {budget} steps would, and {COARSE} or more give more."
            )
            return dataclasses.replace(c, order=0, corrector=False)
        return c

    def _place(self, records: Sequence[Record], step: int) -> None:
        """Place the full steps of some samples from `step` on, within what is left of their budget."""
        for record in records:
            same = [r for r in self.records if r.sample == record.sample]
            spent = max(sum(d != ACCEPTED for s, d in zip(r.steps, r.decisions, strict=True) if s < step) for r in same)
            record.placement = self._placement(step, spent, record.measured)

    def _placement(self, begin: int, spent: int, measured: bool) -> frozenset[int] | None:
        """The full steps from step `begin` on where they are chosen beforehand: by a prior within tolerance and what is
        left of the budget, or evenly where there is only a budget; None where they are planned on the way."""
        c, steps, rest = self.planner.config, self.response.transitions, self.total - begin
        if c.schedule or self.planner.exact or rest <= 0:
            return None
        left = min(rest, max(1, self.planner.budget(self.total) - spent))
        prior = self.prior if measured else None
        if prior is None:  # a budget alone is spent evenly
            return None if c.tolerance else frozenset(begin + s for s in even(rest, left, self.player.flow))
        search = partial(self._searched, *_rest(prior, steps, begin), left)
        found = search() if rest <= SEARCHED_AT_ONCE else self.executor.compute(search, "search")
        return frozenset(begin + s for s in found.steps) if found else None

    def _searched(self, prior: Prior, steps: tuple[Transition, ...], left: int) -> Placement | None:
        """The best full steps known for these, within the tolerance and at most `left`; None if there is neither."""
        c = self.planner.config
        found = cheapest(prior, steps, c.tolerance) if c.tolerance and self._measured and len(steps) > LEAST else None
        if c.speedup and (found is None or len(found.steps) > left):
            found = place(prior, steps, left)
        return found

    # ------------------------------------------------------------------------------------------- what is learnt
    @property
    def recorder(self) -> Recorder | None:
        """What gathers the outputs of this run, None if it is not learnt from."""
        return self.player.recorder

    def learn(self) -> None:
        """Keep what the run has shown, once its last step has had all its calls. Harmless at any time."""
        recorder = self.player.recorder
        if not self.learning or recorder is None or not recorder.complete or self.kind is None:
            return
        moments, noise = recorder.moments(), self.response.noise
        if moments is None:
            self.knowledge.stop_learning(self.kind)
            self.note("nothing could be learnt from this run: its steps differ in their calls.")
        else:
            steps = self.response.transitions
            found = Prior(tuple(noise[s] for s in recorder.steps), moments, noisy=steps[0].noisy)
            self.knowledge.learn(self.kind, found if self.knowledge.in_full else filled(found, noise, steps))
        self.player.recorder, self.learning = None, False

    def _watch(self, branch: Branch, step: int) -> None:
        """Do without the prior for samples whose full steps show that it does not hold."""
        if not self._measured:
            return
        limit = SURPRISE_LIMIT_OF_BUDGET if self.config.speedup else SURPRISE_LIMIT
        for record in branch.records:
            if record.measured and sum(record.surprises) > limit * (len(record.surprises) + 1):
                mine = [r for r in self.records if r.sample == record.sample]
                for same in mine:
                    same.measured = False
                self._place(mine, step)
                self._reject(branch)

    def _reject(self, branch: Branch) -> None:
        """Say that some samples go on without the prior; if they are most of them, it is not used again, unless runs
        are those of an engine's requests, none of which may change what another one gets."""
        self.note(
            "what is known of the model does not hold for some samples, as their full steps show; they went on "
            "without it."
        )
        most = 2 * sum(not record.measured for record in branch.records) > len(branch.records)
        if most and not self._rejected and self.kind is not None and not self.executor.joins:
            self._rejected = True
            self.knowledge.reject(self.kind)


@lru_cache(maxsize=64)  # the same object for the same steps, so that its placements are found once
def _rest(prior: Prior, transitions: tuple[Transition, ...], begin: int) -> tuple[Prior, tuple[Transition, ...]]:
    """What is known of the steps from `begin` on."""
    if not begin:
        return prior, transitions
    return Prior(prior.noise[begin:], prior.moments[begin:, begin:], noisy=prior.noisy), transitions[begin:]
