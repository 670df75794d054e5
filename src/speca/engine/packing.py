"""Which evaluations of different requests can be one, and how they are put together and taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoiser import rows as rowwise
from ..denoiser.executor import Evaluation
from ..denoiser.outputs import tensors
from ..denoiser.partial import close
from ..denoiser.rows import Invocation
from ..verified.evaluation import GatedEvaluation, Passed
from ..verified.gate import Mode
from ..verified.probe import discover
from .bounded import Bounded
from .signature import Tokens, form_of, signature


class Packer:
    """Says which evaluations can be one (those of one bucket), and runs the evaluations of a bucket as one.

    Nothing is concluded from calls that are not finite, or for which memory did not suffice.

    That rows of different requests do not influence each other is tested: the first time two calls of a kind meet, they
    are run together and one of them alone. Verified drafts have been tested by their model's self-test; there only
    calls whose rows use their inputs to different lengths (prompts with a mask) are tested again.
    """

    def __init__(self) -> None:
        self.tokens = Tokens()
        self._joined: Bounded[Hashable, bool] = Bounded()  # of each kind that was tested
        self._first: Bounded[Hashable, tuple[Hashable, Evaluation]] = Bounded(64)  # of others, a call and its bucket

    def bucket(self, asked: Evaluation) -> Hashable | None:
        """Return a name that is equal for evaluations that can be one; None for one that has to run alone."""
        same = signature(asked.arguments, asked.rows, self.tokens)
        if not isinstance(asked, GatedEvaluation):
            return (asked.kind, same) if self._test(same, asked) else None
        learnt = asked.finding.learnt
        if learnt is None or learnt.ragged or "whole" in learnt.layouts:
            return None
        return asked.kind, same, None if self._test_uneven(same, asked) else asked.uses

    def _test(self, same: Hashable, asked: Evaluation) -> bool:
        """Whether calls of this kind can be one. Until two of them have met, each is run alone: the first has its
        bucket to itself, and others have none.

        A kind is everything but the content of what rows share, so that a timestep that all rows share does not
        make a kind of every step.
        """
        kind = asked.kind, signature(asked.arguments, asked.rows, form_of)
        if kind in self._joined:
            return self._joined[kind]
        of, other = self._first.setdefault(kind, (same, asked))
        if other is asked:
            return True
        if of != same or not _differ(other, asked):
            self._first[kind] = same, asked  # who comes next is more likely to meet this one
            return False
        try:
            found = self._agree(other, asked)
        except torch.OutOfMemoryError:
            found = None
        if found is None:  # one of the two is wrong by itself, and tells nothing of the others
            if not _is_sound(other):
                self._first[kind] = same, asked
            return False
        self._joined[kind] = found
        del self._first[kind]
        return found

    def _agree(self, other: Evaluation, asked: Evaluation) -> bool | None:
        """Whether a call gives together with another one what it gives alone; None if one of them is wrong."""
        alone = _tensors_of(asked)
        if alone is None or not all(bool(t.isfinite().all()) for t in alone[0]):
            return None
        both = _tensors_of(lambda: self._together([_unlike(other, asked), asked]), (other.rows, asked.rows))
        if both is not None and close(both[1], alone[0]):
            return True
        return False if _is_sound(other) else None

    def _test_uneven(self, same: Hashable, asked: GatedEvaluation) -> bool:
        """Whether calls may differ in what their rows use of their inputs."""
        kind = asked.model, id(asked.finding.learnt), same  # of full forwards and drafts alike
        if kind in self._joined:
            return self._joined[kind]
        if asked.mode is not Mode.FULL:
            return False
        _, other = self._first.setdefault(kind, (same, asked))
        if not isinstance(other, GatedEvaluation) or set(other.uses) == set(asked.uses):
            return False
        del self._first[kind]
        with asked.gate.lock:
            try:
                call = self._together([other, asked]).invocation
                _, finding = discover(asked.gate, call.function, call.arguments, other.rows + asked.rows)
            except torch.OutOfMemoryError:
                return False
            except Exception:  # as above
                self._joined[kind] = False
            else:
                learnt = finding.learnt
                if not finding.lasting:
                    return False
                self._joined[kind] = finding.supported and learnt is not None and not learnt.ragged
            finally:
                asked.gate.forget()
        return self._joined[kind]

    def run(self, asked: Sequence[Evaluation]) -> list[Any]:
        """Return what each of the evaluations of one bucket gives."""
        if len(asked) == 1:
            return [asked[0].run()]
        counts = [a.rows for a in asked]
        ran = self._together(asked).run()
        if not isinstance(ran, Passed):
            return rowwise.split(ran, counts)
        features = [torch.split(f, counts) for f in ran.features]
        outs = rowwise.split(ran.out, counts)
        return [Passed(out, tuple(f[i] for f in features)) for i, out in enumerate(outs)]

    @staticmethod
    def _together(asked: Sequence[Evaluation]) -> Evaluation:
        """Return one evaluation of all rows of these."""
        first, counts = asked[0], [a.rows for a in asked]
        call = Invocation(first.invocation.function, rowwise.join([a.arguments for a in asked], counts))
        if not isinstance(first, GatedEvaluation):
            return dataclasses.replace(first, invocation=call, rows=sum(counts))
        forecasts = zip(*[a.forecast for a in asked if isinstance(a, GatedEvaluation)], strict=True)
        forecast = tuple(torch.cat(streams) for streams in forecasts)
        return dataclasses.replace(first, invocation=call, rows=sum(counts), forecast=forecast)


def _tensors_of(asked: Evaluation | Callable[[], Evaluation], parts: Sequence[int] = ()) -> list[list[Tensor]] | None:
    """The tensors that an evaluation gives, of each of its parts of so many rows; None where the model refuses it.

    Raises:
        torch.OutOfMemoryError: memory did not suffice.
    """
    try:
        out = (asked if isinstance(asked, Evaluation) else asked()).run()
        return [tensors(part) for part in (rowwise.split(out, parts) if parts else [out])]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any kind: a wrong request, or a model that cannot take several
        return None


def _is_sound(asked: Evaluation) -> bool:
    """Whether an evaluation by itself gives finite numbers, as far as memory suffices to see it."""
    try:
        found = _tensors_of(asked)
    except torch.OutOfMemoryError:
        return True
    return found is not None and all(bool(t.isfinite().all()) for t in found[0])


def _unlike(one: Evaluation, other: Evaluation) -> Evaluation:
    """The evaluation `one` with other numbers than `other` wherever it has one number a row: the time, a guidance
    scale. A model that takes the first of them for all rows would not be noticed where all are equal."""
    arguments = dict(one.arguments)
    for name, value in arguments.items():
        known = other.arguments[name]
        if isinstance(value, Tensor) and value.shape == (one.rows,) and bool((value == known.flatten()[0]).any()):
            if value.is_floating_point():
                arguments[name] = value * 0.9 + 0.01
            elif value.dtype != torch.bool:
                arguments[name] = torch.where(value > 0, value - 1, value + 1)
    return dataclasses.replace(one, invocation=Invocation(one.invocation.function, arguments))


def _differ(one: Evaluation, other: Evaluation) -> bool:
    """Whether the rows of two calls are not all equal, so that a mix-up would be seen."""
    pairs = zip(tensors(one.arguments), tensors(other.arguments), strict=True)
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
