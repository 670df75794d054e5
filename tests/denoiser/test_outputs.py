"""A model's output, taken apart and put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from speca.denoiser.outputs import OutputForm, take, tensors
from speca.errors import UnsupportedModelError


def test_take_is_one_row_of_any_output() -> None:
    y = torch.randn(3, 2)
    assert torch.equal(take((y, None), 1, 3)[0], y[1:2])
    assert torch.equal(take(dict(sample=y.repeat_interleave(2, 0)), 1, 3)[0], y[[1, 1]])
    assert take(([y[0], y[1], y[2]],), 2, 3)[0] is not None
    assert [t.shape for t in tensors(dict(a=[y, y], b=None))] == [(3, 2), (3, 2)]
    holder = Fields("name", y, 3)
    assert tensors(holder)[0] is y and torch.equal(take(holder, 1, 3)[0], y[1:2])


@dataclass(frozen=True)
class Fields:
    """An output with fields, as models outside of diffusers return them."""

    name: str
    sample: Tensor
    level: int


class Pair(NamedTuple):
    """An output of two tensors."""

    video: Tensor
    audio: Tensor


ROWS, SAMPLE = 2, torch.zeros(2, 4, 3, 3)


def structure(out: Any) -> Any:
    """Types, shapes and everything that is no tensor."""
    if isinstance(out, Tensor):
        return out.shape, out.dtype
    if isinstance(out, dict):
        return type(out), {k: structure(v) for k, v in out.items()}
    if isinstance(out, (list, tuple)):
        return type(out), [structure(v) for v in out]
    return {**vars(out), "sample": structure(out.sample)} if isinstance(out, Fields) else out


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y, lambda y: (y,), lambda y: (y, None), lambda y: {"sample": y, "scale": 2.0},
        lambda y: Transformer2DModelOutput(sample=y), lambda y: Fields("name", y, 3),
    ],
)  # fmt: skip
def test_one_tensor_of_all_rows_is_one_stream_in_any_structure(make: Any) -> None:
    y = torch.randn(ROWS, 4, 3, 3, dtype=torch.bfloat16)
    out = make(y)
    form = OutputForm.of(out, ROWS, SAMPLE)
    assert not form.uncorrectable and not form.channels and not form.listed
    assert all(t.numel() == 0 for t in tensors(form.example)), "nothing of the output is held"
    (main,) = form.split(out, ROWS)
    assert main is y
    made = form.build([main.float() + 1])
    assert structure(made) == structure(out) and torch.equal(tensors(made)[0], (y.float() + 1).bfloat16())
    assert structure(form.build([torch.cat([main, main])])) == structure(make(torch.cat([y, y])))


def test_a_predicted_variance_is_another_stream() -> None:
    """The sampler uses the mean; of mean and variance the model's output is made again."""
    y = torch.randn(ROWS, 8, 3, 3)
    form = OutputForm.of((y,), ROWS, SAMPLE)
    assert form.channels == 4 and not form.uncorrectable
    mean, variance = form.split((y,), ROWS)
    assert torch.equal(mean, y[:, :4]) and torch.equal(variance, y[:, 4:])
    (made,) = form.build([mean + 1, variance])
    assert torch.equal(made[:, :4], y[:, :4] + 1) and torch.equal(made[:, 4:], y[:, 4:])
    assert OutputForm.of((y,), ROWS, SAMPLE[:, :, :2]).channels == 0, "of another size than the sample"


def test_several_tensors_are_streams_that_cannot_be_corrected() -> None:
    out = Pair(torch.randn(ROWS, 5), torch.randn(ROWS, 3, dtype=torch.float16))
    form = OutputForm.of(out, ROWS)
    assert form.uncorrectable == "the model's output is not one tensor of all rows"
    video, audio = form.split(out, ROWS)
    assert video is out.video and audio is out.audio
    made = form.build([video, audio.float()])
    assert isinstance(made, Pair) and torch.equal(made.video, video) and torch.equal(made.audio, audio)


def test_rows_that_are_folded_with_frames_are_unfolded_and_folded_again() -> None:
    y = torch.randn(3 * ROWS, 5)
    form = OutputForm.of(y, ROWS)
    (main,) = form.split(y, ROWS)
    assert main.shape == (ROWS, 3, 5)
    assert torch.equal(form.build([main]), y)


@pytest.mark.parametrize("wrap", [lambda items: items, lambda items: (items,), lambda items: {"sample": items}])
def test_a_list_with_a_tensor_a_row_is_one_stream_and_a_list_again(wrap: Any) -> None:
    """As Z-Image gives its output."""
    items = [torch.randn(4, 1, 3, 3) for _ in range(ROWS)]
    out, whole = wrap(items), torch.stack(items)
    form = OutputForm.of(out, ROWS, items)
    assert form.listed and not form.uncorrectable
    (main,) = form.split(out, ROWS)
    assert torch.equal(main, whole)
    main.add_(1.0)
    assert torch.equal(torch.stack(items), whole), "the model's own tensors are left alone"
    made = form.build([torch.cat([whole, whole])])
    assert type(made) is type(out) and len(tensors(made)) == 2 * ROWS
    assert torch.equal(torch.stack(tensors(made)), torch.cat([whole, whole]))
    for uneven in ([items[0], items[1][:, :, :2]], [items[0], items[1].double()]):
        with pytest.raises(UnsupportedModelError, match="not of one tensor for each of 2 rows"):
            OutputForm.of(wrap(uneven), ROWS, uneven)


def test_a_list_of_tensors_of_all_rows_holds_a_stream_in_each() -> None:
    layers = [torch.randn(ROWS, 4), torch.randn(ROWS, 3)]
    form = OutputForm.of({"layers": layers}, ROWS)
    assert form.uncorrectable and form.split({"layers": layers}, ROWS) == layers
    assert form.build(layers)["layers"][1] is layers[1]


@pytest.mark.parametrize(
    "out", [torch.randn(3, 2), torch.ones(ROWS, 2, dtype=torch.int64), torch.tensor(1.0), (), None, ("text",)]
)
def test_what_holds_no_rows_of_numbers_is_refused(out: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="does not hold 2 rows"):
        OutputForm.of(out, ROWS)


def test_an_output_of_another_form_is_refused() -> None:
    form = OutputForm.of((torch.randn(ROWS, 4),), ROWS)
    for other in ((torch.randn(ROWS, 5),), (torch.randn(ROWS, 4), torch.randn(ROWS, 4)), (torch.randn(ROWS, 4, 1),)):
        with pytest.raises(UnsupportedModelError, match="another shape"):
            form.split(other, ROWS)
