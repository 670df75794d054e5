"""Priors of one model: from a given calibration, or learnt from earlier full runs and stored in the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..core.generic import blended
from ..core.prior import Prior
from ..core.transition import Transition
from .cache import PriorCache
from .file import Calibration, prior_of

FEW = 8
"""Priors of fewer samples are blended with the generic one (`core/generic.py`)."""

MOST_REJECTIONS = 4
"""Full runs that a kind of call is learnt from, if later runs keep showing that what was learnt does not hold."""


class Kind(NamedTuple):
    """What a prior belongs to besides its model.

    Attributes:
        branches: rows of a sample in each call of a step: (2,) where guidance stacks its branches in one call, (1, 1)
            where it makes two calls, (1,) without guidance.
        octave: base-2 logarithm of the number of elements of an output, rounded: pictures of half the area are another
            kind.
    """

    branches: tuple[int, ...]
    octave: int


class Knowledge:
    """Finds the prior for a run, and stores the priors that runs have measured.

    Attributes:
        given: the calibration or prior of the model, if there is one.
        learns: whether a run of which nothing is known is to be computed in full, to learn from it.
        in_full: whether such a run has every step in full, or only every third.
        notice: what to tell the user of such a run, empty for nothing.
    """

    def __init__(
        self,
        given: Calibration | Prior | None = None,
        cache: PriorCache | None = None,
        model: Callable[[], str] = lambda: "",
        in_full: bool = True,
    ) -> None:
        """
        Args:
            given: see above.
            cache: where priors of full runs are kept; None to learn nothing.
            model: returns the fingerprint of the model as it is now.
            in_full: see above.
        """
        self.in_full = in_full
        steps = "every step" if in_full else "at least every third step"
        self.notice = f"{steps} of this run is computed, to learn from it; later runs are accelerated by what it shows."
        self.given, self._cache, self._model = given, cache, model
        self._now = ""  # the fingerprint when something was last looked for, at the beginning of a run
        self._given_rejected: set[Kind] = set()  # kinds of call for which what is given was found not to hold
        self._rejections: dict[tuple[str, Kind], int] = {}  # how often what was learnt did not hold, by what it was of
        self._rejected: set[tuple[str, Kind]] = set()  # since a run was last learnt from

    @property
    def learns(self) -> bool:
        """Whether full runs are learnt from."""
        return self._cache is not None

    def find(
        self, kind: Kind, noise: Sequence[float], transitions: tuple[Transition, ...]
    ) -> Calibration | Prior | None:
        """Return what is known of a run, None if nothing is.

        Args:
            kind: the kind of its calls.
            noise: (T,) where its steps stand, see `Prior.noise`.
            transitions: (T,) what its sampler does.
        """
        if self.given is not None and not self.why_not(kind, noise, transitions):
            return self.given
        if self._cache is None:
            return None
        self._now = self._model()
        if (self._now, kind) in self._rejected:
            return None
        found = self._cache.find((self._now, *kind, transitions[0].noisy), noise)
        if found is None and not self.in_full:
            found = self._cache.find((self._now, *kind, transitions[0].noisy, "online"), noise)
        return None if found is None or not found.covers(noise) else blended(found.at(noise), transitions)

    def _fits(self, kind: Kind) -> bool:
        branches = self.given.branches if isinstance(self.given, Calibration) else ()
        return not branches or branches == kind.branches

    def why_not(self, kind: Kind, noise: Sequence[float], transitions: tuple[Transition, ...]) -> str:
        """Return why what was given is not used in a run, empty if nothing was given or it is used."""
        given = prior_of(self.given)
        if given is None:
            return ""
        if given.noisy != transitions[0].noisy:
            other = "adds noise at each step" if given.noisy else "adds none"
            return f"it was measured with a sampler that {other}, unlike this one"
        if not self._fits(kind):
            return "it was measured with another kind of guidance than that of this call"
        if not given.covers(noise):
            return "it was measured at steps too far apart for the steps of this run"
        return "full steps of an earlier run showed that it does not hold here" if kind in self._given_rejected else ""

    def should_learn(self, kind: Kind) -> bool:
        """Return whether to learn from a run of this kind: learning is on, and has not failed too often."""
        return self._cache is not None and self._rejections.get((self._now, kind), 0) < MOST_REJECTIONS

    def learn(self, kind: Kind, prior: Prior) -> None:
        """Store the prior of a run."""
        assert self._cache is not None
        self._rejected.discard((self._now, kind))
        self._cache.add((self._now, *kind, prior.noisy, *(() if self.in_full else ("online",))), prior)

    def reject(self, kind: Kind) -> None:
        """Do not use the prior of this kind of run again, as it did not fit one; the next run is learnt from, at most
        `MOST_REJECTIONS` times."""
        self._given_rejected.add(kind)
        if self._cache is not None:
            key = (self._now, kind)
            self._rejected.add(key)
            self._rejections[key] = self._rejections.get(key, 0) + 1

    def stop_learning(self, kind: Kind) -> None:
        """Do not try again to learn from runs of this kind."""
        if self._cache is not None:
            self._rejections[self._now, kind] = MOST_REJECTIONS


class Learner(Knowledge):
    """Knows nothing, so that every run is computed in full, and keeps what each has shown.

    Attributes:
        runs: the kind of each run and its prior.
        transitions: (T,) of the sampler of the last run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.notice = ""
        self.runs: list[tuple[Kind, Prior]] = []
        self.transitions: tuple[Transition, ...] = ()

    @property
    def learns(self) -> bool:
        """Yes."""
        return True

    def find(
        self, kind: Kind, noise: Sequence[float], transitions: tuple[Transition, ...]
    ) -> Calibration | Prior | None:
        """Return None."""
        self.transitions = transitions
        return None

    def should_learn(self, kind: Kind) -> bool:
        """Return True."""
        return True

    def learn(self, kind: Kind, prior: Prior) -> None:
        """Keep what a run has shown."""
        self.runs.append((kind, prior))

    def stop_learning(self, kind: Kind) -> None:
        """Do nothing: the next run may be another."""

    def mean(self, samples: int | None = None) -> tuple[Kind, Prior] | None:
        """Return the most frequent kind of run and the mean prior of its runs that have the same steps as the first of
        them; None if nothing was learnt. That of few `samples`, by default one a run, is blended with the generic
        prior."""
        if not self.runs:
            return None
        kind = Counter(kind for kind, _ in self.runs).most_common(1)[0][0]
        priors = [prior for one, prior in self.runs if one == kind]
        same = [p.moments for p in priors if p.noise == priors[0].noise]
        prior = Prior(priors[0].noise, np.mean(same, axis=0), noisy=priors[0].noisy)
        few = (len(same) if samples is None else samples) < FEW and len(prior.noise) == len(self.transitions)
        return kind, blended(prior, self.transitions) if few else prior
