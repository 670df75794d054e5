"""What the calls of a run have cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Costs:
    """Sums over the calls of a run.

    Attributes:
        evaluations, evaluations_full: rows computed in full, and rows of all calls.
        flops, flops_full: of checked drafts and their full steps, by PyTorch's counter; None where nothing was counted,
            as drafts of outputs run nothing of the model.
        seconds: inside calls of the model, with the work of this library.
        full_rates: seconds a row of the calls in which every row was computed.
        host_reads: times that numbers were read from the device.
        row_calls: rows of all calls, also of those that were run plainly.
        peak: most bytes kept at a time.
    """

    evaluations: int = 0
    evaluations_full: int = 0
    flops: float | None = None
    flops_full: float | None = None
    seconds: float = 0.0
    full_rates: list[float] = field(default_factory=list)
    host_reads: int = 0
    row_calls: int = 0
    peak: int = 0

    def count(self, computed: int, rows: int, seconds: float) -> None:
        """Add a call of `rows` rows, `computed` of which were computed in full."""
        self.evaluations += computed
        self.evaluations_full += rows
        self.seconds += seconds
        if computed == rows:
            self.full_rates.append(seconds / rows)

    def count_flops(self, spent: float, full: float) -> None:
        """Add the FLOPs of a call, and those of the same call in full."""
        self.flops = (self.flops or 0.0) + spent
        self.flops_full = (self.flops_full or 0.0) + full
