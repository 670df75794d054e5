"""The response of a sampler that is a function, `sampler(denoise, x, sigmas, **options)`, found by a dry run.

A function cannot be stepped, but it can be run on a denoiser that answers its j-th call with the j-th unit output: what
it hands to the denoiser at call j is then row j of the response. A first run on zeros counts the calls, as methods of
second order evaluate the model twice a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from .path import path_of_times
from .response import Probe, Response, transitions_of

Sampler = Callable[..., Any]
"""`sampler(denoise, x, sigmas, **options)` with `denoise(x, sigma, **kwargs)`; returns the final sample."""

Prediction = Literal["denoised", "noise", "velocity", "raw"]
"""What a denoiser returns: the clean sample, the noise, the velocity of a flow, or anything else, taken as it is."""

MOST_CALLS = 10_000


def to_output(prediction: Prediction, x: Tensor, sigma: Tensor, returned: Tensor) -> Tensor:
    """Return the output that is forecast from what a denoiser `returned`.

    Of a clean sample D it is `(x - D) / sigma`: the noise if `x = x_0 + sigma noise`, the velocity on a flow's path.
    Either changes slowly along a run. Everything else is taken as it is.
    """
    return (x - returned) / sigma if prediction == "denoised" else returned


def from_output(prediction: Prediction, x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
    """Undo `to_output`."""
    return x - sigma * output if prediction == "denoised" else output


def broadcast(sigma: Any, x: Tensor) -> Tensor:
    """Return `sigma`, a number or a tensor of one or B entries, as a tensor that can be multiplied with x (B, ...)."""
    found = torch.as_tensor(sigma, device=x.device)
    return found.reshape(-1, *[1] * (x.dim() - 1)) if found.dim() else found


def function_response(
    sampler: Sampler, sigmas: Tensor, prediction: Prediction = "denoised", options: dict[str, Any] | None = None
) -> Response:
    """Return what a sampler function does on a schedule.

    It is run in fp64, or in fp32 where it does not work in fp64. Noise that it draws, by a `noise_sampler` argument or
    from torch, is replaced; no random generator is touched.

    Args:
        sampler: the function.
        sigmas: (S,) its schedule, as it will be given.
        prediction: what its denoiser returns.
        options: its further keyword arguments.
    """
    name = getattr(sampler, "__name__", type(sampler).__name__)
    accepted = inspect.signature(sampler).parameters
    given = {n: v for n, v in (options or {}).items() if n != "callback"}
    if "disable" in accepted:
        given.setdefault("disable", True)  # its progress bar
    if "noise_sampler" in accepted:
        given["noise_sampler"] = None  # replaced in each run
    reason = ""
    for dtype in (torch.float64, torch.float32):
        run = partial(_run, sampler, sigmas.detach().cpu().to(dtype), prediction, given)
        try:
            return _tried(name, run, dtype)
        except _NotLinearError as problem:
            return Response(reason=str(problem))
        except Exception as problem:  # whatever a function raises at inputs it was not made for
            reason = f"{name} cannot be run on its own ({type(problem).__name__}: {problem})"
    return Response(reason=reason)


class _NotLinearError(Exception):
    """The reason why a sampler cannot be planned."""


def _tried(name: str, run: Callable[[Probe, int], tuple[list[float], list[Tensor]]], dtype: torch.dtype) -> Response:
    """The response of a sampler: a first run on zeros counts its calls, a second one plays the units."""
    times, _ = run(Probe(0, dtype), MOST_CALLS)
    probe = Probe(len(times), dtype)
    again, samples = run(probe, len(times) + 1)
    if again != times:
        raise _NotLinearError(f"the calls of {name} depend on values ({len(times)}, then {len(again)} of them)")
    found = probe.response(samples)
    if found is None:
        raise _NotLinearError(f"{name} is not linear in what the model returns")
    signals, sizes, _ = path_of_times(times)
    steps = transitions_of(*found, signals, sizes)
    if not steps:
        raise _NotLinearError(f"{name} remembers more than 3 outputs")
    noise = tuple((n - p) / n for p, n in zip(signals, sizes, strict=True))
    return Response(steps, noise, tuple(times))


def _run(
    sampler: Sampler, sigmas: Tensor, prediction: Prediction, options: dict[str, Any], probe: Probe, most: int
) -> tuple[list[float], list[Tensor]]:
    """The sigma of each call, at most `most`, and the samples: what was handed over at each call, and the result. The
    outputs are those of the probe, then zeros."""
    times: list[float] = []
    samples: list[Tensor] = []

    def denoise(x: Tensor, sigma: Any, *args: Any, **kwargs: Any) -> Tensor:
        if (kwargs.get("model_options") or {}).get("sampler_post_cfg_function"):
            raise _NotLinearError("it uses a second output of the model (cfg_pp), which a forecast does not have")
        if len(times) >= most:
            raise _NotLinearError("its calls depend on values")
        level = broadcast(sigma, x)
        times.append(round(float(level.reshape(-1)[0]), 9))
        samples.append(x.clone())
        output = probe.inputs[len(times)].clone() if len(times) < len(probe.inputs) else torch.zeros_like(x)
        return from_output(prediction, x, level.to(x.dtype), output.to(x.dtype))

    x = probe.inputs[0]
    if "noise_sampler" in options:
        options = {**options, "noise_sampler": lambda *_: torch.randn_like(x)}
    with torch.no_grad(), probe.noise():
        result = sampler(denoise, x.clone(), sigmas, **options)
    samples.append(last_sample(result))
    return times, samples


def last_sample(result: Any) -> Tensor:
    """Return the final sample from what a sampler function has returned: a tensor, or a tuple that begins with it.

    Raises:
        InputError: it is neither.
    """
    found = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(found, Tensor):
        raise InputError(f"a sampler must return the final sample, not {type(found).__name__}.")
    return found
