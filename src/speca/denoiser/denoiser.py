"""Denoiser: a wrapper around a model in one's own sampling loop or sampler function, which is a denoiser itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..calibration.cache import PriorCache
from ..calibration.file import Given, known_from
from ..calibration.knowledge import Knowledge
from ..config import SpecaConfig
from ..errors import ConfigError, InputError, NotEnabledError, nearest
from ..reports.report import Report
from ..sampler.function import Prediction, Sampler, broadcast, from_output, function_response, to_output
from ..sampler.response import Response
from ..sampler.scheduler import scheduler_response
from .arguments import Conditions
from .partial import PartialCalls
from .player import Call
from .rows import Invocation
from .run import Run

SLACK = 0.004
"""Relative difference up to which two times are the same: half precision rounds by as much."""


class Denoiser:
    """Stands for a model in a sampling loop, and computes it at some steps only.

        denoise = speca.Denoiser(model, sampler=sample_dpmpp_2m, sigmas=sigmas, speedup=4)
        x = sample_dpmpp_2m(denoise, x, sigmas)
        print(denoise.report())

    It is called as the model is, once for each evaluation: `denoise(x, sigma, *more, **more)`. A run begins with the
    first call, ends with the last one that the sampler makes, and then another one may begin.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        preset: str | SpecaConfig = "balanced",
        *,
        sampler: Sampler | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
        scheduler: Any = None,
        prediction: Prediction | None = None,
        options: dict[str, Any] | None = None,
        calibration: Given | Literal["auto", "online", False] | None = None,
        **overrides: Any,
    ) -> None:
        """
        Args:
            model: `model(x, sigma, *more, **more)` with x (B, ...) and sigma a number or (B,); returns a tensor like x.
                Preconditioning (EDM) and guidance belong inside it.
            preset: "faithful", "balanced" or "fast", or a `SpecaConfig`.
            sampler: the sampler function, `sampler(denoise, x, sigmas, **options)`; it is run once on small inputs to
                find out what it does. Solvers of ODEs with fixed steps are such functions too.
            sigmas: (S,) the schedule that it will be given: sigmas, or times of a flow between 0 and 1.
            scheduler: instead of both, a scheduler object after `set_timesteps`, whose `step` takes what the model
                returns (see `speca/sampler/scheduler.py` for what it must offer).
            prediction: what the model returns: "denoised" (the clean sample; the default with `sampler`), "noise",
                "velocity", or "raw" (anything else; the default with `scheduler`).
            options: further keyword arguments that the sampler will be called with, as far as they change its steps.
            calibration: what `speca.calibrate` found, its file, or a `Prior`; "auto" to compute the first run in full
                and learn from it, for this object, "online" to compute every third step of it.
            **overrides: any field of `SpecaConfig`, such as `speedup` or `tolerance`.

        Raises:
            ConfigError: a wrong setting; or preset "paper", which has to look inside a model.
            InputError: neither a sampler with sigmas nor a scheduler.
        """
        config = SpecaConfig.build(preset, **overrides)
        if not isinstance(config, SpecaConfig):
            raise ConfigError(
                "preset 'paper' checks drafts with a block of the model, and a Denoiser does not look inside it; "
                "use speca.enable(module, 'paper', scheduler=...), or another preset."
            )
        auto = calibration in ("auto", "online")
        self.model, self.config = model, config
        known = None if auto else known_from(calibration)
        self.knowledge = Knowledge(known, PriorCache(None) if auto else None, in_full=calibration != "online")
        self.prediction: Prediction = prediction or ("raw" if scheduler is not None else "denoised")
        if self.prediction not in ("denoised", "noise", "velocity", "raw"):
            valid = nearest(str(prediction), ("denoised", "noise", "velocity", "raw"))
            raise ConfigError(f"prediction={prediction!r} is not valid; {valid}")
        self._sampler, self._scheduler, self._options = sampler, scheduler, options
        self._sigmas = None if sigmas is None else torch.as_tensor(sigmas)
        if scheduler is None and (sampler is None or self._sigmas is None):
            raise InputError("a Denoiser has to know who calls it; pass sampler= and sigmas=, or scheduler=.")
        self._partial = PartialCalls()
        self._response: Response | None = None
        self._run: Run | None = None
        self._step = 0
        self._lost = False
        self._conditions = Conditions()

    @property
    def name(self) -> str:
        """The name of the model, for reports."""
        return str(getattr(self.model, "__name__", type(self.model).__name__))

    @property
    def sampler_name(self) -> str:
        """The name of the sampler function, or the class of the scheduler."""
        if self._scheduler is not None:
            return type(self._scheduler).__name__
        return str(getattr(self._sampler, "__name__", type(self._sampler).__name__))

    @property
    def last(self) -> Run:
        """The run that is under way, or the last one. Raises `NotEnabledError` if nothing has run yet."""
        if self._run is None:
            raise NotEnabledError("nothing has run yet; call the sampler first, then ask for the report.")
        return self._run

    @property
    def response(self) -> Response:
        """What the sampler does, found when it is first asked for."""
        if self._scheduler is not None:
            return scheduler_response(self._scheduler, **(self._options or {}))  # kept for equal schedulers
        if self._response is None:
            assert self._sampler is not None and self._sigmas is not None
            self._response = function_response(self._sampler, self._sigmas, self.prediction, self._options)
        return self._response

    def __call__(self, x: Tensor, sigma: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns for x (B, ...) at `sigma`, computed or forecast."""
        more = {f"*{place}": value for place, value in enumerate(args)}

        def function(x: Tensor, sigma: Any, **given: Any) -> Any:
            return self.model(x, sigma, *[given.pop(name) for name in more], **given)

        invocation = Invocation(function, {"x": x, "sigma": sigma, **more, **kwargs})
        level, rows = broadcast(sigma, x), int(x.shape[0])
        run = self._run_at(level)
        if run is None:
            return invocation()
        step, self._step = self._step, self._step + 1
        run.missed(step)
        if self._conditions.changed({**more, **kwargs}):
            self.restart()
            run.note(
                "conditions changed in mid-run; the next step was computed and the rest of the budget placed anew."
            )
        computed: list[Any] = []

        def evaluate(some: Sequence[int] | None) -> Any:
            part = invocation if some is None else invocation.on(some, rows)
            given, returned = part.arguments["x"], part()
            output = to_output(self.prediction, given, broadcast(part.arguments["sigma"], given), returned)
            computed[:] = [output, returned]
            return output

        try:
            branch = run.branch(f"call {tuple(x.shape)}", rows)  # a loop that changes the shape begins another branch
            works = partial(self._partial.work, invocation, rows, Invocation.__call__)
            out = run.play(Call(branch, step, evaluate, x, works))
            run.counted(rows)
            if branch.plain:
                run.note(f"the model is run plainly from some step on: {branch.plain}.")
        except BaseException:
            self.reset()
            raise
        if computed and out is computed[0]:
            return computed[1]  # the model's own tensor, where nothing was forecast or corrected
        return from_output(self.prediction, x, level, out).to(x.dtype) if self.prediction == "denoised" else out

    def report(self) -> Report:
        """Return what the last run cost and saved.

        Raises:
            NotEnabledError: nothing has run yet.
        """
        return self.last.report(self.name)

    def restart(self) -> None:
        """Tell that what the model is conditioned on changes before the next call of a run, where tensors among its
        arguments do not show it: the next step is computed, and what is left of the budget is placed anew."""
        if self._run is not None:
            self._run.restart()

    def reset(self) -> None:
        """End the run that is under way, as after a loop that was broken off; the next call begins a new one."""
        if self._run is not None:
            self._run.end()
        self._step, self._lost, self._conditions = 0, False, Conditions()

    def _run_at(self, level: Tensor) -> Run | None:
        """The run that a call at this sigma belongs to, begun if need be; None for a call that is run plainly."""
        values = set(level.detach().flatten().tolist())
        time = values.pop() if len(values) == 1 else None
        times = self.response.times
        first = self._run is None or self._step in (0, self._run.total)
        if not first and time is not None and not _same(time, times, self._step) and _same(time, times, 0):
            self.reset()  # the loop before was broken off
            first = True
        if first:
            self.reset()
            self._run = Run(self.config, self.response, len(times), self.knowledge)
        run = self._run
        assert run is not None
        if self._lost or run.idle or not run.planned:
            self._step += 1
            if not times:
                run.note(f"the model is run plainly: {run.response.reason}.")
            elif not self._lost:
                unplanned = f"the model is run plainly: {run.response.reason}; speedup= sets a budget all the same."
                run.note(run.idle or unplanned)
            return None
        if time is None or not _same(time, times, self._step):
            self._lost = True
            expected = f"{times[self._step]:.6g}" if self._step < len(times) else "no more"
            run.note(
                f"call {self._step} came at {time}, not at {expected} as expected; the model is run plainly from it."
            )
            run.end()
            return None
        return run


def _same(time: float, times: Sequence[float], step: int) -> bool:
    """Whether `time` is that of the step, as far as half precision tells."""
    return step < len(times) and abs(time - times[step]) <= SLACK * max(abs(times[step]), 1e-6)
