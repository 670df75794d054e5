"""Which argument of a model is the noisy sample and which the time, and the few facts about arguments of diffusers'
models that shapes cannot tell, as data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

ROW_DIMENSIONS: dict[str, int | None] = {
    # Position tables belong to no row, even where their length happens to equal the number of rows.
    "img_ids": None, "txt_ids": None, "image_rotary_emb": None, "rotary_emb": None, "rotary_embedding": None,
    "freqs_cis": None, "visual_rope_pos": None, "text_rope_pos": None,
    # So do Framepack's frame numbers.
    "indices_latents": None, "indices_latents_clean": None, "indices_latents_history_2x": None,
    "indices_latents_history_4x": None,
    # HiDream: (layers, B, S, D).
    "encoder_hidden_states_llama3": 1,
}  # fmt: skip
"""Arguments whose rows are not dimension 0: the dimension that indexes rows, None for one that all rows share."""

PACKED: frozenset[str] = frozenset({"Cosmos3OmniTransformer", "MiniMaxH3Transformer3DModel"})
"""Classes whose inputs are one packed sequence without a row dimension: every call is one row."""

TIME_ARGUMENTS: tuple[str, ...] = (
    "timestep", "timesteps", "t", "vision_timesteps", "sigma", "sigmas", "time", "times", "ts", "tau", "noise_level",
    "noise_labels", "diffusion_step", "time_step", "c_noise", "timestep_ratio",
)  # fmt: skip
"""Names under which a model takes the time of a step; the first one present counts."""

SAMPLE_ARGUMENTS: tuple[str, ...] = ("hidden_states", "sample", "x", "latents", "x_t", "xt", "noisy", "img", "input")
"""Names under which a model takes the noisy sample, where its first argument is not it."""

CACHE_ARGUMENTS: frozenset[str] = frozenset({"kv_cache", "kv_caches", "kv_cache_mode", "kv_cache_flag"})
"""Arguments that, when given, make blocks read or write a cache of their own: a skipped block would not fill it."""


def time_name(names: Iterable[str]) -> str | None:
    """Return the name among `names` that carries the time, None if none of them is a usual one."""
    known = set(names)
    return next((name for name in TIME_ARGUMENTS if name in known), None)


def argument(arguments: Mapping[str, Any], name: str | None) -> Any:
    """Return the argument called `name`, of a dictionary among them with a dot: "cond.sigma". None if there is none."""
    if name is None:
        return None
    first, _, rest = name.partition(".")
    value = arguments.get(first)
    return argument(value, rest) if rest and isinstance(value, Mapping) else None if rest else value


def sample_name(arguments: Mapping[str, Any], time: str | None) -> str | None:
    """Return the name of the argument that is the noisy sample: the first one, unless that is the time or a scalar.

    None if no argument can be it.
    """
    able = [n for n, v in arguments.items() if n != time and (isinstance(v, (list, tuple)) or _is_batch(v))]
    if able[:1] == list(arguments)[:1]:
        return able[0] if able else None
    return next((n for n in able if n in SAMPLE_ARGUMENTS), next(iter(able), None))


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


class Conditions:
    """Detects when the conditions of a model, such as prompt embeddings, change during a run.

    Arguments that differ between the first two calls of a run are taken to change at every call and are ignored.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[Tensor, int]] | None = None
        self._varying: set[str] | None = None

    def changed(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether any tensor in `arguments` has changed since the previous call.

        A tensor is unchanged if it is the same object and was not written to, or if its values are equal.
        """
        now = {name: (tensor, version_of(tensor)) for name, tensor in _tensors(arguments)}
        before, self._last = self._last, now
        if before is None:
            return False
        differ = set(before.keys() ^ now.keys())
        differ |= {name for name in before.keys() & now.keys() if not _same(before[name], now[name])}
        if self._varying is None:
            self._varying = differ
        return bool(differ - self._varying)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in dictionaries, lists and tuples, with where they are."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _tensors(inner, f"{name}.{place}")


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 for tensors of inference mode, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _same(before: tuple[Tensor, int], now: tuple[Tensor, int]) -> bool:
    (old, version), (new, later) = before, now
    if old is new:
        return version == later
    alike = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return alike and bool((old == new).all())


def kind_of(arguments: dict[str, Any], time: str | None) -> object:
    """Return what is equal in calls of one kind: shapes without rows, dtypes, devices, and options.

    The dtype of the argument `time` does not count: HunyuanVideo's pipeline gives the first timestep in fp32.
    """
    parts: list[object] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append((name, value.shape[1:], None if name == time else value.dtype, value.device))
        elif name == time:
            continue
        elif isinstance(value, (bool, int, str, type(None))):
            parts.append((name, value))
        elif isinstance(value, (list, tuple)):
            tensors = {(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in value}
            parts.append((name, frozenset(tensors)))
        else:
            parts.append((name, type(value)))
    return tuple(parts)
