"""How the loop of an engine runs what requests ask for: a batch as one call, in the settings of those who asked."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from ..denoiser.arguments import kind_of
from ..denoiser.executor import Evaluation
from ..verified.evaluation import GatedEvaluation
from .activations import Peak
from .bounded import Bounded
from .components import Call, Components
from .executor import Plain
from .packing import Packer
from .rendezvous import Ambient
from .scheduler import Scheduler

T = TypeVar("T")


class Forwards:
    """Runs batches.

    Attributes:
        packer: says which evaluations of the model can be one.
        components: says it of text encoders and autoencoders.
    """

    def __init__(self, scheduler: Scheduler, devices: tuple[str, ...]) -> None:
        """`devices` are the kinds of devices in use; what forwards take of memory is told to the scheduler."""
        self.packer, self._scheduler, self._devices = Packer(), scheduler, devices
        self.components = Components(self.packer.tokens, devices, weighing=scheduler.memory is not None)
        self._measured: Bounded[Hashable, bool] = Bounded()  # kinds of forwards whose memory is known

    def bucket(self, question: Evaluation, ambient: Ambient) -> Hashable | None:
        """Return a name that is equal for evaluations that can be one; None for one that has to run alone."""
        return self.within(ambient, lambda: self.packer.bucket(question))  # which may try the model

    def answers(self, questions: Sequence[Any], ambient: Ambient) -> list[Any]:
        """Return what each question of a batch gives. Raises what running it as one raises."""
        first = questions[0]
        if isinstance(first, Plain):
            return [self.within(ambient, first.forward)]
        if isinstance(first, Call):
            found = self.within(ambient, lambda: self.components.run(questions))
            self._scheduler.component = self.components.most
            return list(found)
        return list(self.within(ambient, lambda: self._evaluate(questions)))

    def within(self, ambient: Ambient, what: Callable[[], T]) -> T:
        """Call `what` with the settings of the request that has asked: whether gradients are recorded, and autocast."""
        here = Ambient.here(self._devices)
        ambient.restore()
        try:
            return what()
        finally:
            here.restore()

    def _evaluate(self, asked: Sequence[Evaluation]) -> list[Any]:
        """Where memory is limited, that of each new kind is measured."""
        first = asked[0]
        kind = first.kind, kind_of(first.arguments, None)
        if self._scheduler.memory is None or kind in self._measured or isinstance(first, GatedEvaluation):
            return self.packer.run(asked)
        with Peak() as peak:
            found = self.packer.run(asked)
        self._measured[kind] = True
        self._scheduler.forward = max(self._scheduler.forward, peak.most // sum(a.rows for a in asked))
        return found
