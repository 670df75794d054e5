"""Acceleration of one model: how each of its calls is answered."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..calibration.knowledge import Knowledge
from ..config import UNPLANNED, Config, VerifiedConfig
from ..core.controller import Plan, Planner
from ..denoiser.arguments import CACHE_ARGUMENTS, PACKED, argument, kind_of, sample_name, time_name
from ..denoiser.branch import Branch
from ..denoiser.executor import Evaluation
from ..denoiser.partial import PartialCalls
from ..denoiser.player import Call
from ..denoiser.rows import Invocation, batch_size
from ..denoiser.run import Run
from ..errors import NotEnabledError
from ..reports.report import Report
from ..verified.drafts import VerifiedDrafts
from .caller import Caller
from .clock import Position
from .companions import bare, foreign_cache, is_compiled, is_compiled_above, is_wrapped_by, learns_order
from .stack import samples_of_call

ATTRIBUTE = "_speca_accelerator"
"""Attribute of an accelerated model under which its accelerator is found."""
COMPILE_BLOCKS = "disable, compile its blocks with compile_repeated_blocks(), enable"

Forward = Callable[..., Any]


class Accelerator:
    """Answers the calls of one model. Each pipeline that calls it has a `Caller` of its own here.

    Attributes:
        model: the accelerated module.
        config: the settings.
        scheduler, steps, time: see `enable`; scheduler and steps of a single module only.
        knowledge: what is known of the model.
        stacked: guidance branches that one's own loop stacks in one call.
        compiled: whether `torch.compile(module)` has wrapped the module.
        drafts: the verified drafts, attached when a run first needs them.
        partial: whether rows can be computed apart, as far as that was tried.
        before: attributes of the instance that were there before, as they were.
        planner: in place of the one that the settings describe, for callers that are new.
        testing: whether to test at the next call if its drafts could be verified, for `check`.
        callers: by pipeline.
        last: who called last.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        home: Any,
        *,
        scheduler: Any = None,
        steps: int | None = None,
        knowledge: Knowledge | None = None,
        time: str | None = None,
        branches: int = 1,
        compiled: bool = False,
    ) -> None:
        """`home` is what was enabled: a pipeline, or the module itself; the other arguments are attributes."""
        self.model, self.config, self.knowledge = model, config, knowledge
        self.scheduler, self.steps, self.time, self.stacked = scheduler, steps, time, branches
        self.compiled = compiled
        self.drafts = VerifiedDrafts(model)
        self.partial = PartialCalls()
        self.before: dict[str, Any] = {}
        self.planner: Planner | None = None
        self.testing = False
        self.callers: weakref.WeakKeyDictionary[Any, Caller] = weakref.WeakKeyDictionary()
        self.last: Caller | None = None
        self._home = weakref.ref(home)
        self._warned: set[str] = set()
        self._signature = inspect.signature(type(model).forward)
        self._ordered = list(self._signature.parameters)[1:]
        self._names = set(self._ordered)
        self._foreign = ""  # what was found of a cache of diffusers when the last run began

    @property
    def branches(self) -> dict[str, Branch]:
        """Branches of the last run, by name."""
        return self.last.branches if self.last else {}

    def report(self, target: Any = None) -> Report:
        """Return cost and savings of the last run: of the pipeline `target`, or of any that this model took part in.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        caller = self.last if target is None or target is self.model else self.callers.get(target)
        if caller is None:
            raise NotEnabledError("nothing has run yet; call the pipeline first, then ask for the report.")
        return caller.report(type(self.model).__name__)

    def call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any, pipeline: Any) -> Any:
        """Answer one call of the model, with forecasts where that is safe, plainly elsewhere.

        Args:
            forward: the model's original forward.
            args, kwargs: its arguments.
            context: diffusers' `CacheContext`, or None.
            pipeline: the pipeline that is calling, None in one's own sampling loop.
        """
        caller = self.last = self.caller(pipeline)
        call = self._bind(forward, args, kwargs)
        wrapped = not caller.running and not self.compiled and is_wrapped_by(self.model, pipeline)
        if wrapped or is_compiled_above(self.model):
            text = f"runs uncompiled, as speca was enabled beneath what was compiled: {COMPILE_BLOCKS}"
            self._note(caller, f"{type(self.model).__name__} {text}.")
        if reason := self._excluded(caller, call.arguments):
            self._note(caller, f"{type(self.model).__name__} runs plainly: {reason}.")
            return caller.executor.plain(lambda: forward(*args, **kwargs))
        try:
            return self._answer(caller, call, context)
        except BaseException:
            self.drafts.gate.forget()
            caller.end()
            raise

    def end(self, pipeline: Any = None) -> None:
        """End the run of a pipeline; without one, every run."""
        for owner, caller in list(self.callers.items()):
            if pipeline is None or pipeline is owner:
                caller.end()

    def caller(self, pipeline: Any) -> Caller:
        """Return who calls: a pipeline, which its models share, or one's own sampling loop."""
        owner = pipeline if pipeline is not None else self._home() or self.model
        found = self.callers.get(owner)
        if found is None:
            siblings = [accelerator_of(m) for m in vars(owner).values() if isinstance(m, nn.Module)]
            found = next((a.callers[owner] for a in siblings if a is not None and owner in a.callers), None)
        if found is None:
            of = weakref.ref(owner)  # a pipeline may be dropped, or given another scheduler
            own = pipeline is None and (self.scheduler is not None or self.steps is not None)
            scheduler = (lambda: self.scheduler) if own else (lambda: getattr(of(), "scheduler", None))
            found = Caller(scheduler, self.steps if own else None, self.config, self.knowledge)
            found.planner = self.planner
        self.callers[owner] = found
        return found

    def is_drafted(self, pipeline: Any, time: Any) -> bool:
        """Return whether a pipeline's coming call at `time` is sure to be forecast, for all samples and branches."""
        caller = self.callers.get(pipeline)
        run = caller.run if caller is not None and caller.running else None
        if caller is None or run is None or self._checked(caller, run) is not None or run.idle:
            return False
        index = caller.clock.peek(time)
        if index is None or index <= caller.begin:
            return False
        step = index - caller.begin
        plans = [plan for b in run.branches.values() if b.last == step - 1 for plan in run.plans(b, step)]
        return bool(plans) and all(plan is Plan.DRAFT for plan in plans)

    # ------------------------------------------------------------------------------------------- one call
    def _answer(self, caller: Caller, call: Invocation, context: Any) -> Any:
        arguments, name = call.arguments, type(self.model).__name__
        time = self.time or time_name(arguments)
        given, noisy = argument(arguments, time), sample_name(arguments, time)
        if noisy is None:
            self._note(caller, f"{name} runs plainly: none of its arguments is a batch of samples.")
            return caller.executor.plain(call)
        packed = name in PACKED
        rows = 1 if packed else batch_size(arguments[noisy])
        placed = caller.place(given.amax() if packed and isinstance(given, Tensor) else given, context)
        if placed is None:
            self._note(caller, f"a call runs plainly: {caller.clock.problem}.")
            return caller.executor.plain(call)
        run = caller.run
        assert run is not None
        step, kind = placed.index, kind_of(arguments, time)
        if self.testing:
            self._test(caller, call, rows, kind)
        if run.idle:
            self._note(caller, run.idle)
        elif placed.jumped:
            run.note(f"steps before step {placed.index} were left out; what was kept of earlier ones was dropped.")
        run.missed(step)
        branch_name = caller.names.name(step, context, (id(self), rows, kind), arguments)
        if branch_name is None:
            self._note(caller, f"a call runs plainly: step {placed.index} was given to the model too often.")
            return caller.executor.plain(call)
        branch = run.branches.get(branch_name) or run.branch(branch_name, rows, self._rows_per_sample(rows))
        caller.took_part(name)
        try:
            if run.idle:
                return run.plain(branch, step, call)
            checked = self._checked(caller, run)
            if checked is None:
                return self._forecast(caller, run, branch, step, call, arguments[noisy])
            return self._verify(caller, run, checked, branch, placed, call, kind)
        finally:
            run.counted(rows)

    def _forecast(self, caller: Caller, run: Run, branch: Branch, step: int, call: Invocation, sample: Any) -> Any:
        """The main road: planned full steps, forecasts of the output between them."""
        executor, model = caller.executor, id(self.model)
        if branch.plain:
            return run.plain(branch, step, call)

        def evaluate(rows: Sequence[int] | None) -> Any:
            part = call if rows is None else call.on(rows, branch.rows)
            count = branch.rows if rows is None else len(rows)
            return executor.run(Evaluation(part, count, step, run.total, model))

        works = partial(self.partial.work, call, branch.rows, executor.plain)
        out = run.play(Call(branch, step, evaluate, sample, works))
        if run.learning and run.knowledge.notice:
            self._warn(run.knowledge.notice)
        if branch.plain:
            self._note(caller, f"{type(self.model).__name__} runs plainly from step {step} on: {branch.plain}.")
        return out

    def _checked(self, caller: Caller, run: Run) -> VerifiedConfig | None:
        """How drafts are verified in this run; None on the main road, where they are not. Requests of an engine bring
        settings of their own."""
        if isinstance(caller.config, VerifiedConfig):
            return caller.config
        if run.planned:
            return None
        return VerifiedConfig(**{**UNPLANNED.to_dict(), "threshold": run.config.threshold})

    def _verify(
        self, caller: Caller, run: Run, config: VerifiedConfig, branch: Branch, placed: Position, call: Invocation,
        kind: object,
    ) -> Any:  # fmt: skip
        """Verified drafts; the model runs plainly where its blocks do not allow them."""
        name = type(self.model).__name__
        if run.response.reason:
            run.note(f"nothing is corrected: {run.response.reason}.")
        reason = self._unverifiable()
        if not reason:
            self.drafts.renew(run)
            out, reason = self.drafts.play(run, config, branch, placed.index, placed.noise, call, kind)
            if reason:
                where = f" from step {placed.index} on" if branch.plain else ""
                self._note(caller, f"{name} runs plainly{where}: {reason}")
            return out
        self._note(caller, f"{name} runs plainly: {reason}.")
        return run.plain(branch, placed.index, call)

    def _test(self, caller: Caller, call: Invocation, rows: int, kind: object) -> None:
        """Find out whether drafts could be verified; the call itself is answered afterwards, as ever."""
        self.testing = False
        if reason := self._unverifiable() or self.drafts.test(caller.executor, call, rows, kind):
            self._note(caller, f"drafts of {type(self.model).__name__} cannot be verified: {reason}")

    def _unverifiable(self) -> str:
        """Why drafts that run some blocks only are impossible now, empty if the gate in the blocks is attached."""
        if self.compiled or is_compiled(self.model):
            return f"it was compiled as a whole, and drafts run some of its blocks only: {COMPILE_BLOCKS}"
        if learns_order(self.model):
            return "diffusers learns from this step what to fetch ahead"
        return self.drafts.attach()

    def _rows_per_sample(self, rows: int) -> int:
        """Rows of one sample in a call: its guidance branches, which the pipeline or the user has stacked."""
        samples = samples_of_call(rows)
        if samples is not None:
            return rows // samples
        return self.stacked if rows % self.stacked == 0 else 1

    def _excluded(self, caller: Caller, arguments: dict[str, Any]) -> str:
        """Why a call cannot be accelerated whatever the model does with it, empty if it can."""
        if self._foreign or not caller.running:
            self._foreign = foreign_cache(self.model, thorough=True)
        if cache := self._foreign or foreign_cache(self.model):
            return cache
        caches = [n for n in arguments if n in CACHE_ARGUMENTS and arguments[n] is not None]
        if caches:
            return f"its blocks keep a cache of their own (`{caches[0]}`), which skipped blocks would not fill"
        if self.model.training:
            return "it is in training mode"
        time = self.time or time_name(arguments)
        if time is None or argument(arguments, time) is None:
            return (
                f"its forward has no time argument of a usual name; pass time='NAME' to speca.enable, one of "
                f"{', '.join(arguments) or 'its arguments'}"
            )
        return ""

    def _bind(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Invocation:
        """The call with its arguments by name, in the order of the signature; those of `**kwargs` follow, and those of
        `*args` are called "*0", "*1", ..."""
        if not args and self._names >= kwargs.keys():  # as pipelines do it
            return Invocation(forward, {name: kwargs[name] for name in self._ordered if name in kwargs})
        bound = dict(self._signature.bind(self.model, *args, **kwargs).arguments)
        bound.pop(next(iter(self._signature.parameters)))
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and name in bound:
                more = {f"*{place}": value for place, value in enumerate(bound.pop(name))}
                first = list(bound)[: len(args) - len(more)]  # what was given before them, by position as well
                bound = {**{n: bound[n] for n in first}, **more, **{n: v for n, v in bound.items() if n not in first}}
                return Invocation(_by_position(forward, [*first, *more]), bound)
        return Invocation(forward, bound)

    def _note(self, caller: Caller, text: str) -> None:
        """Tell the user once, and in the report of each run."""
        caller.note(text)
        self._warn(text)

    def _warn(self, text: str) -> None:
        """Tell the user once."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"speca: {text}", stacklevel=2)


def _by_position(forward: Forward, names: Sequence[str]) -> Forward:
    """A function that takes everything by name and hands the arguments called `names` on by position."""
    return lambda **given: forward(*[given.pop(name) for name in names], **given)


def accelerator_of(model: nn.Module) -> Accelerator | None:
    """Return the accelerator of a module, also if `torch.compile(module)` has wrapped the module since."""
    found: Accelerator | None = model.__dict__.get(ATTRIBUTE) or bare(model).__dict__.get(ATTRIBUTE)
    return found
