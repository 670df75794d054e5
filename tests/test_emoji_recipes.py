"""The recipes of emoji-flux, emoji-unet and emoji-video, run end to end on a handful of made-up pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clip_data
import clip_vae
import diffusers
import emoji_flux
import emoji_unet
import emoji_video
import pytest
import torch
from emoji_data import GROUPS, STYLES, Dataset, Emoji
from PIL import Image
from typer.testing import CliRunner

from speca import zoo
from speca.cli.main import app


@pytest.fixture(scope="module")
def pictures() -> Dataset:
    """Discs of many colours, one name in each group and style."""
    names = ("red apple", "banana", "rocket", "key", "crown", "ghost", "turtle", "rose")
    emoji = [Emoji((n, f"{n}s"), g, s, g == 7) for g, n in enumerate(names) for s in STYLES]
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    disc = ((x**2 + y**2) < 28**2).to(torch.uint8) * 255
    colours = torch.randint(0, 180, (len(emoji), 3, 1, 1), generator=torch.Generator().manual_seed(0))
    pixels = torch.cat([colours.expand(-1, -1, 64, 64), disc.expand(len(emoji), 1, 64, 64)], 1).to(torch.uint8)
    return Dataset(emoji, pixels)


def test_sprites_stay_inside_and_the_scorer_sees_where_they_go(pictures: Dataset) -> None:
    clips = clip_data.draw_clips(pictures, 60, torch.Generator().manual_seed(3))
    for clip in clips:
        assert clip.path.min() >= clip.side / 2
        assert clip.path.max() <= 64 - clip.side / 2
        assert 17.99 <= float((clip.path[-1] - clip.path[0]).abs().max()) <= 26.01
    shown = clip_data.render(pictures, clips)
    assert shown.shape == (60, 3, 17, 64, 64)
    assert clip_data.direction(shown) == [clip.direction for clip in clips]
    assert clip_data.direction(shown.flip(2)) != [clip.direction for clip in clips]
    assert set(clip_data.direction(shown[:, :, :1].expand_as(shown))) == {"still"}


FEW = dict(vae_steps=2, steps=2, guided=2, batch=2, threads=1)


def test_emoji_flux(pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_flux, "load", lambda work: pictures)
    out = tmp_path / "weights" / "emoji-flux"
    how: dict[str, Any] = dict(FEW, work=tmp_path, out=out, device="cpu", size="small", compiled=False, bf16=None)
    emoji_flux.main(**how, vae_batch=2, text_steps=2, classifier_steps=2, scored=2)
    logged = (tmp_path / "emoji-flux.log").read_text()
    monkeypatch.setattr(zoo, "WEIGHTS", out.parent)
    (card,) = zoo.models()
    assert (card.name, card.pipeline, card.licence) == ("emoji-flux", "FluxPipeline", "cc-by-4.0")
    assert "64 x 64" in card.makes
    assert card.scores["samples"] == 2
    assert {"samples.png", "call.json", "classifier.safetensors"} <= {path.name for path in out.iterdir()}
    pipe = zoo.load("emoji-flux")
    assert isinstance(pipe, diffusers.FluxPipeline)
    assert len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks) >= 16
    assert zoo.load_classifier("emoji-flux")(torch.zeros(1, 3, 64, 64)).shape == (1, len(GROUPS))
    assert zoo.load_reference("emoji-flux").shape == (3, 1280)
    assert {"kid", "kid_of_real", "frechet", "frechet_of_real"} <= card.scores.keys()
    found = CliRunner().invoke(app, ["check", "emoji-flux", "--json", "--threads", "1"])
    assert json.loads(found.stdout)["supported"], found.output
    emoji_flux.main(**how, vae_batch=2, text_steps=2, classifier_steps=2, scored=2)
    assert (tmp_path / "emoji-flux.log").read_text() == logged, "a finished stage was trained again"


def test_emoji_unet(pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_unet, "load", lambda work: pictures)
    monkeypatch.setattr(emoji_unet, "SUBJECTS", GROUPS)
    out, source = tmp_path / "weights" / "emoji-unet", zoo.WEIGHTS / "emoji-flux"
    flux = zoo.load("emoji-flux")
    how: dict[str, Any] = dict(steps=2, batch=2, scored=2, threads=1, device="cpu", compiled=False)
    emoji_unet.main(work=tmp_path, out=out, source=source, **how)
    monkeypatch.setattr(zoo, "WEIGHTS", out.parent)
    (card,) = zoo.models()
    assert (card.name, card.pipeline, card.licence) == ("emoji-unet", "StableDiffusionPipeline", "cc-by-4.0")
    assert card.scores["samples"] == 2
    assert {"samples.png", "samples.txt", "call.json"} <= {path.name for path in out.iterdir()}
    pipe = zoo.load("emoji-unet")
    assert card.parameters == sum(p.numel() for p in pipe.unet.parameters()) > 2e6
    assert zoo.call_arguments("emoji-unet") == emoji_unet.CALL
    for taken, given in ((pipe.vae, flux.vae), (pipe.text_encoder, flux.text_encoder)):
        assert all(torch.equal(v, given.state_dict()[k]) for k, v in taken.state_dict().items())
    assert torch.load(tmp_path / "emoji-unet.pt")["step"] == 2
    found = CliRunner().invoke(app, ["check", "emoji-unet", "--json", "--threads", "1"])
    assert json.loads(found.stdout)["sampler"].startswith("linear"), found.output


def test_an_inflated_autoencoder_codes_each_frame_as_the_image_autoencoder_does() -> None:
    torch.manual_seed(0)
    image = clip_vae.image_vae().eval()
    video, frames = clip_vae.inflated(image).eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = image.encode(frames).latent_dist.mean
        torch.testing.assert_close(video.encode(frames[:, :, None]).latent_dist.mean[:, :, 0], latents)
        torch.testing.assert_close(video.decode(latents[:, :, None]).sample[:, :, 0], image.decode(latents).sample)
        moving = torch.rand(1, 3, 5, 64, 64) * 2 - 1
        latest = video.encode(moving).latent_dist.mean[:, :, 1]
        gaps = [float((image.encode(moving[:, :, k]).latent_dist.mean - latest).norm()) for k in range(5)]
        assert min(gaps) == gaps[4], "the second latent is of the last frame"
        still = frames[:1, :, None].expand(-1, -1, 5, -1, -1)
        torch.testing.assert_close(video.encode(still).latent_dist.mean[:, :, 1], latents[:1], rtol=1e-3, atol=1e-3)


def test_emoji_video(pictures: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_video, "load", lambda work: pictures)
    out = tmp_path / "weights" / "emoji-video"
    how: dict[str, Any] = dict(FEW, work=tmp_path, out=out, device="cpu", size="small", compiled=False)
    emoji_video.main(**how, stills=2, windows=2, known_steps=2, clips=40, scored=2)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["direction_of_real_clips"] == 1
    assert 0 <= scores["direction"] <= 1
    monkeypatch.setattr(zoo, "WEIGHTS", out.parent)
    pipe = zoo.load("emoji-video")
    assert isinstance(pipe, diffusers.HunyuanVideoPipeline)
    shown = tmp_path / "shown"
    asked = ["generate", "emoji-video", "--prompt", "a key moving up", "--prompt", "a ghost moving left", "--compare"]
    done = CliRunner().invoke(app, [*asked, "--steps", "8", "--out", str(shown), "--threads", "1"])
    assert done.exit_code == 0, done.output
    with Image.open(shown / "clip-001.webp") as animation:
        assert (animation.n_frames, animation.size) == (17, (64, 64))
    assert {"contact.png", "grid.png", "timeline.png", "clip-000.webp"} <= {path.name for path in shown.iterdir()}
    assert not list(shown.glob("image-*.png"))
    pipe.set_progress_bar_config(disable=True)
    call = json.loads((out / "call.json").read_text())
    short, padded = (
        pipe("a key moving up", **{**call, "max_sequence_length": n}, num_inference_steps=2, output_type="pt",
             generator=torch.Generator().manual_seed(0)).frames for n in (12, 256)
    )  # fmt: skip
    assert short.shape == (1, 17, 3, 64, 64)
    assert torch.allclose(short, padded, atol=1e-3), "padding of the prompt reaches the clip"
