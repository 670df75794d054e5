"""One guidance branch of a run: the records of its samples, and what is kept of their full steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..core.controller import FULL, Record


class Kept(Protocol):
    """What a player keeps of full steps until the run ends."""

    def bytes(self) -> int:
        """Return the bytes held, all rows together."""
        ...


@dataclass
class Branch:
    """One branch of a batch, for instance "cond".

    Attributes:
        rows: rows of its calls.
        records: one for each sample.
        kept: what forecasts are made of, None before the first full step and after the run.
        plain: why the branch is run without forecasts, empty if it is not.
        uncorrected: why nothing is corrected, empty if it is.
        placed: whether the full steps of its records were placed since it began, or was last restarted.
        uses: how much of its inputs each row uses, such as the length of its prompt, where that was asked.
    """

    rows: int
    records: list[Record]
    kept: Kept | None = None
    plain: str = ""
    uncorrected: str = ""
    placed: bool = True
    uses: tuple[float, ...] = ()

    @classmethod
    def begin(cls, rows: int, rows_per_sample: int = 1) -> Branch:
        """Return a new branch of `rows` rows; with 2 rows a sample, rows i and i + B/2 belong to one sample."""
        samples = rows // rows_per_sample
        return cls(rows, [Record(i, tuple(range(i, rows, samples))) for i in range(samples)])

    @property
    def last(self) -> int:
        """Index of the last step this branch took part in, -1 before the first."""
        steps = self.records[0].steps
        return steps[-1] if steps else -1

    @property
    def uneven(self) -> bool:
        """Whether rows use their inputs to different lengths."""
        return len(set(self.uses)) > 1

    def stand_at(self, step: int, total: int) -> None:
        """Tell every record where the current step stands."""
        for record in self.records:
            record.step, record.total = step, total

    def note_full(self, step: int, total: int) -> None:
        """Record that all samples were computed in full, also where the step was already noted otherwise."""
        self.stand_at(step, total)
        for record in self.records:
            if record.steps and record.steps[-1] == step:
                record.decisions[-1], record.errors[-1] = FULL, None
            else:
                record.note(FULL)

    def restart(self) -> None:
        """Drop what was kept, so that the next step is full; the records stay."""
        self.forget()
        for record in self.records:
            record.restart()

    def give_up(self, step: int, total: int, why: str) -> None:
        """Run the rest of this branch without forecasts."""
        self.forget()
        self.plain = why
        self.note_full(step, total)

    def forget(self) -> None:
        """Drop everything that was kept of full steps."""
        self.kept = None

    def bytes(self) -> int:
        """Return the bytes kept for all rows together."""
        return self.kept.bytes() if self.kept is not None else 0
