"""The unmodified client of OpenAI against the server: images, streams, edits, videos, errors."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from serve.conftest import STEPS
from serve.served import Served
from speca.serve.settings import read

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client: OpenAI's own videos end


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def picture(image: Any) -> Image.Image:
    """The picture of an object with `b64_json`."""
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def told(image: Any) -> dict[str, Any]:
    """What the server says of an image beside OpenAI's fields."""
    found: dict[str, Any] = image.model_extra["speca"]
    return found


def test_images_are_those_of_their_seeds(client: openai.OpenAI) -> None:
    extra = {"seed": 7, "num_inference_steps": STEPS, "speedup": 3}
    both = client.images.generate(model="emoji-flux", prompt="red apple", n=2, extra_body=extra)
    assert both.data is not None
    assert [told(image)["seed"] for image in both.data] == [7, 8]
    assert both.output_format == "png" and both.size == "64x64"
    for image in both.data:
        about = told(image)
        assert about["steps"] == STEPS == about["full"] + about["accepted"] and about["full"] <= STEPS // 3
        assert about["seconds"] > 0 and about["flops_speedup"] > 1.5
    alone = client.images.generate(model="emoji-flux", prompt="red apple", extra_body={**extra, "seed": 8})
    assert alone.data is not None
    assert np.abs(np.asarray(picture(alone.data[0]), int) - np.asarray(picture(both.data[1]), int)).max() <= 1


def test_classes_are_prompts(client: openai.OpenAI) -> None:
    found = client.images.generate(model="fashion-dit", prompt="Sneaker", extra_body={"seed": 1})
    same = client.images.generate(model="fashion-dit", prompt="7", extra_body={"seed": 1})
    assert found.data is not None and same.data is not None and found.data[0].b64_json == same.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="did you mean 'sneaker'"):
        client.images.generate(model="fashion-dit", prompt="sneeker")


def test_full_is_every_step_and_quality_is_a_preset(client: openai.OpenAI) -> None:
    full = client.images.generate(model="emoji-flux", prompt="moon", extra_body={"preset": "full", "seed": 3})
    low = client.images.generate(model="emoji-flux", prompt="moon", quality="low", extra_body={"seed": 3})
    assert full.data is not None and low.data is not None
    assert told(full.data[0])["full"] == STEPS > told(low.data[0])["full"]


@pytest.mark.parametrize("form", ["jpeg", "webp", "png"])
def test_formats(client: openai.OpenAI, form: Any) -> None:
    found = client.images.generate(model="fashion-dit", prompt="bag", output_format=form, output_compression=20)
    assert found.data is not None and picture(found.data[0]).format == form.upper() and found.output_format == form


def test_images_by_url_are_kept_for_their_owner(client: openai.OpenAI) -> None:
    found = client.images.generate(model="fashion-dit", prompt="bag", n=2, response_format="url")
    assert found.data is not None
    pictures = [Image.open(io.BytesIO(httpx.get(str(image.url)).content)) for image in found.data]
    assert [p.size for p in pictures] == [(28, 28), (28, 28)] and pictures[0].tobytes() != pictures[1].tobytes()
    assert httpx.get(str(found.data[0].url).replace("picture_", "picture_0")).status_code == 404
    assert not httpx.get(f"{client.base_url!s}jobs").json()["data"], "they are no jobs"


def test_a_stream_has_previews_progress_and_the_same_image(client: openai.OpenAI) -> None:
    extra = {"seed": 5, "stream_progress": True}
    asked: dict[str, Any] = dict(model="fashion-dit", prompt="coat", partial_images=2, stream=True, extra_body=extra)
    events = list(client.images.generate(**asked))
    kinds = [event.type for event in events]
    assert kinds.count("image_generation.completed") == 1 == kinds[::-1].index("image_generation.completed") + 1
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == list(range(len(partial))) and 1 <= len(partial) <= 2
    steps = [event.model_extra["step"] for event in events if event.type == "speca.progress"]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS and len(steps) > STEPS // 2  # early ones may be missed
    plain = client.images.generate(model="fashion-dit", prompt="coat", extra_body={"seed": 5})
    assert plain.data is not None and events[-1].b64_json == plain.data[0].b64_json
    assert events[-1].model_extra["speca"]["seed"] == 5


def test_edits_begin_with_a_picture(client: openai.OpenAI) -> None:
    drawn = client.images.generate(model="emoji-flux", prompt="red apple", extra_body={"seed": 1})
    assert drawn.data is not None
    first = picture(drawn.data[0]).convert("RGB")
    extra = {"seed": 2, "num_inference_steps": STEPS}

    def edited(strength: float, **more: Any) -> np.ndarray[Any, Any]:
        found = client.images.edit(
            model="emoji-flux", image=("apple.png", png(first)), prompt="green apple",
            extra_body={**extra, "strength": strength}, **more,
        )  # fmt: skip
        assert found.data is not None and abs(told(found.data[0])["steps"] - STEPS * strength) <= 1
        return np.asarray(picture(found.data[0]).convert("RGB"), float)

    apart = [np.abs(edited(strength) - np.asarray(first, float)).mean() for strength in (0.34, 0.9)]
    assert apart[0] < apart[1]
    transparent = first.convert("RGBA")
    transparent.putalpha(Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(64, 0)))
    changed = np.abs(edited(0.9, mask=("mask.png", png(transparent))) - np.asarray(first, float)).mean((0, 2))
    assert changed[:28].mean() > 2 * changed[36:].mean()  # the left half alone is drawn anew


def test_edits_are_refused_where_the_model_cannot(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="fashion-dit cannot edit pictures"):
        client.images.edit(model="fashion-dit", image=("a.png", png(Image.new("RGB", (32, 32)))), prompt="bag")
    with pytest.raises(openai.BadRequestError, match="no picture that can be read"):
        client.images.edit(model="emoji-flux", image=("a.png", b"\x89PNG broken"), prompt="bag")


def test_videos_are_polled_and_downloaded(client: openai.OpenAI) -> None:
    import av

    video = client.videos.create_and_poll(
        model="emoji-video", prompt="red apple", poll_interval_ms=50,
        extra_body={"seed": "3", "num_inference_steps": "8", "num_frames": "5"},
    )  # fmt: skip
    assert video.status == "completed" and video.progress == 100, video
    assert video.model_extra is not None and video.model_extra["speca"]["seed"] == 3
    content = client.videos.download_content(video.id).read()
    with av.open(io.BytesIO(content)) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (64, 64, 3) and frames[0].std() > 1
    assert video.id in [other.id for other in client.videos.list(limit=10)]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (dict(prompt="x", extra_body={"num_inference_stepz": 5}), "num_inference_stepz", "num_inference_steps"),
        (dict(prompt="x", extra_body={"num_inference_steps": 61}), "num_inference_steps", "at most 60"),
        (dict(prompt="x", extra_body={"num_inference_steps": "20"}), "num_inference_steps", "valid integer"),
        (dict(prompt="x", size="99999x99999"), "size", "pixels"),
        (dict(prompt="x", size="big"), "size", "1024x1024"),
        (dict(prompt="x" * 5000), "prompt", "at most 4000"),
        (dict(prompt="x", n=11), "n", "at most 10"),
        (dict(prompt="x", style="vivid"), "style", "unknown field"),
        (dict(prompt="x", background="transparent"), "background", "opaque"),
        (dict(prompt="x", partial_images=2), "partial_images", "stream"),
        (dict(prompt="x", extra_body={"scheduler": "DDIM"}), "scheduler", "FlowMatchEulerDiscreteScheduler"),
        (dict(prompt="x", extra_body={"strength": 0.5}), "strength", "unknown field"),
        (dict(prompt="x", extra_body={"speedup": 0.5}), "speedup", "greater than or equal to 1"),
        (dict(prompt="x", extra_body={"deadline_s": 1e9}), "deadline_s", "at most 600"),
        (dict(prompt=""), "prompt", "at least 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(model="emoji-flux", **fields)
    assert caught.value.param == param and words in str(caught.value), caught.value


def test_fields_that_a_model_does_not_take_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="fashion-dit does not take negative_prompt"):
        client.images.generate(model="fashion-dit", prompt="bag", extra_body={"negative_prompt": "coat"})
    with pytest.raises(openai.BadRequestError, match="makes videos"):
        client.images.generate(model="emoji-video", prompt="x")
    with pytest.raises(openai.NotFoundError, match="did you mean 'emoji-flux'"):
        client.images.generate(model="emoji-flox", prompt="x")
    with pytest.raises(openai.BadRequestError, match="name a model"):
        client.images.generate(prompt="x")


def test_a_deadline_that_passes_is_said(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(model="emoji-flux", prompt="x", extra_body={"deadline_s": 0.001})
    assert caught.value.status_code == 504 and caught.value.code == "deadline_exceeded"


def test_models_say_what_they_take(client: openai.OpenAI) -> None:
    about = {model.id: (model.model_extra or {})["speca"] for model in client.models.list()}
    assert about["fashion-dit"]["classes"][0] == "ankle boot" and about["fashion-dit"]["size"] is None
    assert about["emoji-flux"]["size"] == "64x64" and about["emoji-flux"]["edits"]
    assert about["emoji-video"]["task"] == "video" and "negative_prompt" not in about["fashion-dit"]["takes"]
    assert client.models.retrieve("emoji-flux").id == "emoji-flux"


def test_python_in_the_guide_runs(served: Served) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert "http://127.0.0.1:8000" in code
    said: list[Any] = []
    exec(code.replace("http://127.0.0.1:8000", served.url), {"print": lambda *words: said.extend(words)})
    assert said[0].startswith("iVBOR") and said[1]["full"] <= STEPS // 4 and said[1]["seed"] == 7


def test_the_toml_in_the_guide_is_valid(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "keys.txt").write_text("one\n")
    (tmp_path / "server.toml").write_text(text.replace("keys.txt", str(tmp_path / "keys.txt")))
    config = read(tmp_path / "server.toml", {})
    assert [config.of_model(m).served_name for m in config.models] == [
        "flux",
        "fashion-dit",
    ] and config.limits.steps == 100
