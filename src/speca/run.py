"""Acceleration of one transformer: what is known of the model, and how each of its calls is answered."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .branch import Branch, Work
from .calibration import Calibration
from .config import MIN_STEPS, SpecaConfig
from .core.controller import FULL
from .core.corrector import Transition
from .core.generic import FEW
from .core.prior import Prior
from .course import Course
from .errors import NotEnabledError
from .executor import Executor
from .model import rows as rowwise
from .model.calls import Position, time_argument
from .model.companions import foreign_cache, is_compiled_above, learns_order
from .model.gate import Gate
from .model.overrides import CACHE_ARGUMENTS, PACKED
from .model.probe import Discovery, Forward
from .report import Report
from .speculator import Speculator

ATTRIBUTE = "_speca_run"
MAX_TIED = 4  # rows of one image that a pipeline may stack in one call: cond, uncond and up to two more
NOT_COMPILED = "its forward runs uncompiled; disable, compile its blocks with compile_repeated_blocks(), enable"
UNKNOWN = Discovery(False, "not tested yet")


class Run:
    """Acceleration of one transformer. Each pipeline that calls it has a course of its own here.

    Calls are answered one at a time: what the gate lets through must not depend on another thread.
    """

    def __init__(
        self, model: nn.Module, config: SpecaConfig, home: Any, scheduler: Any = None, steps: int | None = None,
        known: Calibration | Prior | None = None,
    ) -> None:  # fmt: skip
        """`home` was enabled: a pipeline, or the model itself, then with its scheduler or number of steps."""
        self.model, self.config = model, config
        self.scheduler, self.steps = scheduler, steps
        self.gate = Gate(model)
        self.known = known
        self.speculator = self.speculator_for(config, Executor())
        self.config = self.speculator.config
        self.findings: dict[tuple[object, object, bool], Discovery] = {}
        self._renewals = 0  # of the blocks that the findings are about
        self.before: dict[str, Any] = {}
        self.curious = False  # test the model even where a run is too short to gain from it
        self._home = weakref.ref(home)
        self._told: set[str] = set()
        self._signature = inspect.signature(type(model).forward)
        self._time = time_argument(model)
        self._foreign = ""  # what was found of a cache of diffusers when the last run began
        self.courses: weakref.WeakKeyDictionary[Any, Course] = weakref.WeakKeyDictionary()
        self.last: Course | None = None
        self._lock = threading.RLock()

    @property
    def branches(self) -> dict[str, Branch]:
        """Records of the last run, by branch."""
        return self.last.branches if self.last else {}

    @property
    def notes(self) -> list[str]:
        """Remarks on the last run."""
        return self.last.notes if self.last else []

    def report(self, target: Any = None) -> Report:
        """Cost and savings of the last run: of the pipeline `target`, or of any that this transformer took part in.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        course = self.last if target is None or target is self.model else self.courses.get(target)
        if course is None:
            raise NotEnabledError("nothing has run yet; call the pipeline first, then ask for the report.")
        return course.report(type(self.model).__name__, self.speculator_of(course).config.to_dict())

    def speculator_for(self, config: SpecaConfig, executor: Executor) -> Speculator:
        """One with settings of its own, that knows what was calibrated."""
        known = self.known
        if isinstance(known, Calibration):
            return Speculator(known.fitted(config), executor, known.prior)
        return Speculator(config, executor, known)

    def speculator_of(self, course: Course) -> Speculator:
        """Who plays the calls of a course: its own, as a request of an engine has one, or that of all."""
        return course.speculator or self.speculator

    def call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any, caller: Any) -> Any:
        """Answer one call of the transformer, accelerated where that is safe, plainly elsewhere.

        Args:
            forward: the model's original forward.
            args, kwargs: its arguments.
            context: diffusers' `CacheContext`, or None.
            caller: the pipeline that is calling, None in one's own sampling loop.
        """
        with self._lock:
            course = self.last = self._course(caller)
            arguments = self._bind(args, kwargs)
            self._renew(course)
            if is_compiled_above(self.model):
                self._note(course, f"{type(self.model).__name__} was compiled after speca.enable: {NOT_COMPILED}.")
            if reason := self._excluded(course, arguments):
                self._note(course, f"{type(self.model).__name__} runs plainly: {reason}.")
                return self.speculator_of(course).executor.plain(lambda: forward(*args, **kwargs))
            try:
                return self._play(course, forward, arguments, context)
            except BaseException:
                self.gate.forget()
                course.end()
                raise

    def end(self, caller: Any = None) -> None:
        """End of a pipeline's run; without `caller`, of every run."""
        with self._lock:
            for owner, course in list(self.courses.items()):
                if caller is None or caller is owner:
                    course.end()

    # -------------------------------------------------------------------------------------------- one call
    def _course(self, caller: Any) -> Course:
        """The course of a pipeline, which its transformers share, or that of one's own sampling loop."""
        owner = caller if caller is not None else self._home() or self.model
        course = self.courses.get(owner)
        if course is None:
            siblings = [m.__dict__[ATTRIBUTE] for m in vars(owner).values() if ATTRIBUTE in getattr(m, "__dict__", {})]
            course = next((r.courses[owner] for r in siblings if owner in r.courses), None)
        if course is None:
            pipe = weakref.ref(owner)  # which may be dropped, or given another scheduler
            told = self.scheduler is not None or self.steps is not None
            if caller is None and told:
                course = Course((lambda: self.scheduler) if self.scheduler is not None else None, self.steps)
            else:
                course = Course(lambda: getattr(pipe(), "scheduler", None))
        self.courses[owner] = course
        return course

    def _play(self, course: Course, forward: Forward, arguments: dict[str, Any], context: Any) -> Any:
        speculator = self.speculator_of(course)
        plain = functools.partial(speculator.executor.plain, lambda: forward(**arguments))
        first, given = next(iter(arguments.values())), arguments.get(self._time or "")
        packed = type(self.model).__name__ in PACKED
        rows, kind = 1 if packed else rowwise.batch_size(first), _kind(arguments, self._time)
        call = course.place(given.amax() if packed and isinstance(given, Tensor) else given, context)
        if call is None:
            text = "a call runs plainly: its step is not on the scheduler's time axis, or rows differ in time."
            self._note(course, text)
            return plain()
        here = call.position
        if here.total - course.begin < MIN_STEPS:
            text = f"{here.total - course.begin} steps leave nothing to forecast (at least {MIN_STEPS}); ran plainly."
            self._note(course, text)
            return plain()
        if call.jumped:
            course.note(f"steps before step {here.index} were left out; what was kept of earlier ones was dropped.")
        course.missed(here.index)
        name = course.names.name(here.index, context, (id(self), rows, kind), arguments)
        if name is None:
            self._note(course, f"a call runs plainly: step {here.index} was given to the model too often.")
            return plain()
        branch = self._branch(course, name, here, arguments, rows)
        speculator.spent = course.spent
        key = (kind, rowwise.owners(arguments, rows), branch.uneven)
        try:
            linear = self._transitions(course, branch, here)
            prior = self._prior(course, branch, here, linear)
            work = Work(branch, here, self.gate, self._known(key), forward, arguments, linear, prior)
            return self._answer(course, work, key)
        finally:
            course.count(rows, type(self.model).__name__)

    def _transitions(self, course: Course, branch: Branch, position: Position) -> Sequence[Transition]:
        """What the sampler does at each step, where that is wanted and known; the run's notes say why it is not."""
        speculator = self.speculator_of(course)
        if not (speculator.config.corrector or speculator.controller.plans_ahead) or branch.idle:
            return ()
        found, reason = course.transitions(position.total)
        if reason := reason or branch.uncorrected:
            course.note(f"nothing is corrected: {reason}.")
        return () if branch.uncorrected else found

    def _prior(self, course: Course, branch: Branch, position: Position, linear: Sequence[Transition]) -> Prior | None:
        """What is known of this run beforehand; it places the full steps as the run begins."""
        speculator = self.speculator_of(course)
        measured, wanted = speculator.prior, speculator.config.prior
        few = speculator.controller.budget(position.total) <= FEW
        generic = wanted == "generic" or (wanted == "auto" and few)
        if wanted == "none" or not (linear and speculator.controller.heeds_prior and (generic or measured is not None)):
            return None
        if course.begin or not speculator.config.corrector:
            if measured is not None or wanted == "generic":
                course.note("the prior is not used: it needs the corrector, and a run from the first step on.")
            return None
        if measured is not None and measured.noisy != linear[0].noisy:
            other = "adds noise at each step" if measured.noisy else "adds none"
            course.note(f"the prior is not used: it was measured with a sampler that {other}, unlike this one.")
            measured = None
        if measured is None and not generic:
            return None
        prior = course.prior(measured, linear)
        if branch.last < 0 and prior is not None:
            speculator.place(branch, prior, linear)
        return prior

    def _known(self, key: tuple[object, object, bool]) -> Discovery:
        """What was found for this kind of call; what held for many rows, or for uneven ones, holds for one, or even."""
        if key in self.findings:
            return self.findings[key]
        kind, owned, uneven = key
        wider = [f for (k, o, _), f in self.findings.items() if k == kind and (owned is None or o == owned)]
        return next((f for f in wider if f.supported and not f.ragged and not uneven), UNKNOWN)

    def _answer(self, course: Course, work: Work, key: tuple[object, object, bool]) -> Any:
        """By the speculator, or plainly where nothing is gained or the model is not supported."""
        finding, branch, speculator = work.finding, work.branch, self.speculator_of(course)
        if learns_order(self.model):
            _note_full(branch, work.position)
            branch.restart()  # of this step nothing is kept
            course.note(f"step {work.position.index} ran plainly, as diffusers learns from it what to fetch ahead.")
            return speculator.executor.plain(lambda: work.forward(**work.arguments))
        if finding is UNKNOWN and (self.curious or not branch.idle):
            return self._discover(course, work, key)
        if finding.supported and not branch.idle:
            out = speculator.play(work)
            if branch.trouble:
                self._note(
                    course,
                    f"{type(self.model).__name__} runs plainly from step {work.position.index} on: {branch.trouble}",
                )
            return out
        if not finding.supported and finding is not UNKNOWN:
            self._note(course, f"{type(self.model).__name__} runs plainly: {finding.reason}")
        _note_full(branch, work.position)
        return speculator.executor.plain(lambda: work.forward(**work.arguments))

    def _discover(self, course: Course, work: Work, key: tuple[object, object, bool]) -> Any:
        """The first call of its kind runs in full and is learnt from."""
        branch, speculator = work.branch, self.speculator_of(course)
        began = speculator.executor.now()
        out, finding, features = speculator.executor.discover(self.gate, work.forward, work.arguments, branch.rows)
        self.findings[key] = finding
        _note_full(branch, work.position)
        if not finding.supported or not features:
            self._note(course, f"{type(self.model).__name__} runs plainly: {finding.reason}")
            return out
        speculator.record(dataclasses.replace(work, finding=finding), branch.trajectories, features, out)
        course.spent.add_probe(finding, branch.rows, speculator.executor.now() - began)
        course.note("cost and time include the self-test, which runs once for a model and input size")
        return out

    def _branch(self, course: Course, name: str, position: Position, arguments: dict[str, Any], rows: int) -> Branch:
        """The branch of this call, begun if it is new; its ties are confirmed at its second step."""
        branch, first = course.branches.get(name), next(iter(arguments.values()))
        if branch is None:
            branch = course.branches[name] = Branch.begin(rows, _stacked(first, rows))
            left, speculator = position.total - course.begin, self.speculator_of(course)
            if rows > 1 or speculator.executor.packs:
                branch.uses = tuple(rowwise.weights(arguments, rows))
            branch.idle = speculator.controller.idle(left)
            if branch.idle:
                c = speculator.config
                course.note(f"{left} steps leave nothing to forecast with warmup={c.warmup}, final={c.final}.")
            return branch
        first_record = branch.trajectories[0]
        second_step = branch.tied and len(first_record.decisions) == 1
        if second_step and _stacked(first, rows) != len(first_record.rows):
            branch.untie()
        return branch

    def _renew(self, course: Course) -> None:
        """Forget what was learnt of blocks that were replaced, and what was kept of them."""
        self.gate.refresh()
        if self.gate.renewals == self._renewals:
            return
        self._renewals = self.gate.renewals
        if not self.findings:
            return
        self.findings.clear()
        course.note(f"blocks of {type(self.model).__name__} were replaced; it was tested anew.")
        for branch in [b for c in self.courses.values() if c.running for b in c.branches.values()]:
            branch.restart()

    def _excluded(self, course: Course, arguments: dict[str, Any]) -> str:
        """Why a call cannot be accelerated whatever the model does with it; empty if it can."""
        if self._foreign or not course.running:
            self._foreign = foreign_cache(self.model, thorough=True)
        if cache := self._foreign or foreign_cache(self.model):
            return cache
        caches = [n for n in arguments if n in CACHE_ARGUMENTS and arguments[n] is not None]
        if caches:
            return f"its blocks keep a cache of their own (`{caches[0]}`), which skipped blocks would not fill"
        if self.model.training:
            return "it is in training mode"
        return "" if self._time is not None and arguments else "its forward has no timestep argument"

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, in the order of the signature; keyword arguments of `**kwargs` follow."""
        bound = dict(self._signature.bind(self.model, *args, **kwargs).arguments)
        bound.pop(next(iter(self._signature.parameters)))
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        return bound

    def _note(self, course: Course, text: str) -> None:
        """Tell the user once, and in the report of each run."""
        course.note(text)
        if text not in self._told:
            self._told.add(text)
            warnings.warn(f"speca: {text}", stacklevel=2)


def _note_full(branch: Branch, position: Position) -> None:
    branch.stand_at(position)
    for trajectory in branch.trajectories:
        trajectory.note(FULL)


def _kind(arguments: dict[str, Any], time: str | None) -> object:
    """What one finding of the probe holds for: shapes without rows, dtypes, devices, and options that steer blocks.

    The dtype of the argument `time` does not count: HunyuanVideo's pipeline gives the first timestep in fp32.
    """
    parts: list[object] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append((name, value.shape[1:], None if name == time else value.dtype, value.device))
        elif isinstance(value, (bool, int, str, type(None))):
            parts.append((name, value))
        elif isinstance(value, (list, tuple)):
            tensors = {(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in value}
            parts.append((name, frozenset(tensors)))
        else:
            parts.append((name, type(value)))
    return tuple(parts)


def _stacked(first: Any, rows: int) -> int:
    """Rows per image: guidance stacks copies of the same latents, so equal parts of a batch are its branches."""
    for parts in range(min(MAX_TIED, rows), 1, -1):
        if rows % parts == 0:
            n = rows // parts
            chunks = [first[k * n : (k + 1) * n] for k in range(parts)]
            if all(_equal(chunks[0], c) for c in chunks[1:]):
                return parts
    return 1


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
