"""Settings: one flag each, the same names in a file, and mistakes that are named."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from speca.cli.main import app
from speca.cli.serve import command
from speca.errors import ConfigError
from speca.serve import main, settings
from speca.serve.settings import Limits, ModelSettings, ServerConfig, read


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """The settings with which the command would serve."""
    found: list[ServerConfig] = []
    monkeypatch.setattr(main, "run", found.append)
    return found


def test_every_setting_has_a_flag_with_its_range(chosen: list[ServerConfig]) -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
    flags = set(re.findall(r"--[a-z-]+", shown))
    names = [n for n in ServerConfig.model_fields if n not in ("models", "limits")]
    names += [f"limit-{n}" for n in Limits.model_fields]
    assert {f"--{name.replace('_', '-')}" for name in names} <= flags
    about = {name: p.annotation.__metadata__[0].help for name, p in inspect.signature(command()).parameters.items()}
    assert about["port"].endswith("[0 to 65535] Default: 8000.") and "[more than 0]" in about["keep_s"]
    assert "[4 or more]" in about["limit_steps"] and about["host"].endswith("Default: 127.0.0.1.")


def test_flags_win_over_the_file(chosen: list[ServerConfig], tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        'port = 9000\npreset = "fast"\nsteps = 20\n[limits]\nsteps = 100\npixels = 4096\n'
        '[[models]]\nmodel = "owner/some-model"\nname = "some"\nsteps = 28\n[[models]]\nmodel = "fashion-dit"\n'
    )
    result = CliRunner().invoke(
        app, ["serve", "--config", str(file), "--port", "9001", "--limit-steps", "60", "--no-edits"]
    )
    assert result.exit_code == 0, result.output
    (config,) = chosen
    assert (config.port, config.limits.steps, config.limits.pixels, config.edits) == (9001, 60, 4096, False)
    one, other = (config.of_model(model) for model in config.models)
    assert (one.served_name, one.steps, one.preset) == ("some", 28, "fast")
    assert (other.served_name, other.steps, other.edits) == ("fashion-dit", 20, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fashion-dit", "--port", "99999"], "port"),
        (["fashion-dit", "--limit-steps", "1"], "limits.steps"),
        ([], "name a model"),
        (["fashion-dit", "other/fashion-dit"], "two models are called 'fashion-dit'"),
        (["fashion-dit", "--config", "missing.toml"], "cannot be read"),
        (["fashion-dit", "--host", "0.0.0.0"], "no API keys"),
    ],
)
def test_mistakes_are_one_sentence(chosen: list[ServerConfig], arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "unknown setting 'prot'; did you mean 'port'"),
        ("[limits]\nstep = 5", "did you mean 'steps'"),
        ('[[models]]\nmodel = "a"\nmax_bach = 2', "did you mean 'max_batch'"),
        ("port = [", "no valid TOML"),
    ],
)
def test_mistakes_of_a_file_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read(tmp_path / "s.toml", {})


def test_descriptions_say_what_a_setting_is() -> None:
    for model in (ServerConfig, ModelSettings, Limits, settings.ModelConfig):
        for name, field in model.model_fields.items():
            assert name in ("models", "limits") or (field.description or "").endswith("."), name


def test_without_its_packages_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('no fastapi')")
    code = "import speca.cli; speca.cli.main()"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "fashion-dit"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 2 and "pip install 'speca-diffusers[serve]'" in done.stderr
