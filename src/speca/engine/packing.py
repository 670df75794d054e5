"""Which forwards of different requests may be one, and how they are made one and taken apart again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..executor import Executor, Pass, Ran
from ..model import rows as rowwise
from ..model.gate import Mode
from ..model.probe import discover


class Tokens:
    """Equal for tensors of equal content. A tensor is read once, when it is first seen."""

    def __init__(self) -> None:
        self._seen: Any = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor) -> Hashable:
        """Of a tensor that calls share, such as position ids."""
        version = None if tensor.is_inference() else tensor._version
        kept = self._seen.get(tensor)
        if kept is None or kept[0] != version:
            digest = hashlib.blake2b(rowwise.content(tensor), digest_size=16).digest()
            kept = self._seen[tensor] = version, (tensor.shape, tensor.dtype, tensor.device, digest)
        token: Hashable = kept[1]
        return token


class Packer:
    """Names the bucket of a forward, and runs the forwards of one bucket as one.

    Rows whose inputs are used to different lengths (prompts with a mask) are put together only if that was tested: the
    first time two such calls meet, they are run together and one of them alone.
    """

    def __init__(self) -> None:
        self.executor, self.tokens = Executor(), Tokens()
        self._mixing: dict[Hashable, bool] = {}
        self._first: dict[Hashable, Pass] = {}  # of each kind that is not tested yet, one call

    def bucket(self, asked: Pass) -> Hashable | None:
        """Equal for forwards that can be one; None for one that has to run alone."""
        finding = asked.finding
        learnt = finding.learnt
        if learnt is None or learnt.ragged or "whole" in learnt.layouts:
            return None
        same = id(asked.gate), id(learnt), rowwise.signature(asked.arguments, asked.rows, self.tokens)
        return *same, asked.mode, None if self._mix(same, asked) else asked.uses

    def _mix(self, same: Hashable, asked: Pass) -> bool:
        """Whether calls may differ in what their rows use of their inputs."""
        if same in self._mixing:
            return self._mixing[same]
        if asked.mode is not Mode.FULL:
            return False
        other = self._first.setdefault(same, asked)
        if set(other.uses) == set(asked.uses):
            return False
        joined = rowwise.join([other.arguments, asked.arguments], [other.rows, asked.rows])
        try:
            _, finding = discover(asked.gate, asked.forward, joined, other.rows + asked.rows)
        except Exception:  # of a model that cannot take them together: then it need not
            self._mixing[same] = False
        else:
            self._mixing[same] = finding.supported and finding.learnt is not None and not finding.learnt.ragged
        asked.gate.forget()
        del self._first[same]
        return self._mixing[same]

    def run(self, passes: Sequence[Pass]) -> list[Ran]:
        """What each of the forwards of one bucket gives."""
        if len(passes) == 1:
            return [self.executor.run(passes[0])]
        first, counts = passes[0], [p.rows for p in passes]
        joined = dataclasses.replace(
            first,
            arguments=rowwise.join([p.arguments for p in passes], counts),
            rows=sum(counts),
            forecast=tuple(torch.cat(streams) for streams in zip(*[p.forecast for p in passes], strict=True)),
        )
        ran = self.executor.run(joined)
        features = [torch.split(f, counts) for f in ran.features]
        outs = rowwise.split(ran.out, counts)
        return [Ran(out, tuple(f[i] for f in features)) for i, out in enumerate(outs)]
