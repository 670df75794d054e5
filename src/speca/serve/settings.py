"""Settings of the server: from a TOML file, from flags, or both; flags win."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Limits(_Strict):
    """What one request may ask for, and how many may wait."""

    steps: int = Field(250, ge=4, description="Most denoising steps of a request.")
    pixels: int = Field(2_097_152, ge=64, description="Most pixels of an image or of one frame: width times height.")
    frames: int = Field(257, ge=1, description="Most frames of a video.")
    images: int = Field(10, ge=1, description="Most images of one request (`n`).")
    prompt: int = Field(4_000, ge=1, description="Most characters of a prompt.")
    body: int = Field(33_554_432, ge=1_024, description="Most bytes of a request, uploads included.")
    upload_pixels: int = Field(
        16_777_216, ge=64, description="Most pixels of an uploaded picture, before it is decoded."
    )
    priority: int = Field(3, ge=0, description="Largest priority that a client may ask for, and smallest if negative.")
    deadline_s: float = Field(600.0, gt=0, description="Longest time that an image may take, in seconds.")
    slowdown: float = Field(
        3.0,
        gt=1,
        description="An image is refused with 429 where requests before it would make it take more than so many times "
        "as long as on an idle server, at least half a second more.",
    )
    wait_s: float = Field(
        60.0, gt=0, description="Longest time that a new image is expected to wait in any case, in seconds."
    )
    per_key: int = Field(
        32, ge=1, description="Most images and jobs that one API key, or one address without keys, may have under way."
    )


class ModelSettings(_Strict):
    """How a model is run; what a model does not say itself is taken from the server's own settings."""

    preset: Literal["faithful", "balanced", "fast", "paper"] = Field(
        "balanced", description="How close images stay to the full run, for requests that do not say."
    )
    speedup: float | None = Field(
        None,
        ge=1,
        description="Budget of requests that do not say: at most one step of so many is computed in full; default: as "
        "the preset decides.",
    )
    steps: int = Field(50, ge=4, description="Denoising steps of requests that do not say.")
    max_batch: int = Field(16, ge=1, description="Most rows of one call of the model.")
    max_live: int | None = Field(
        None, ge=1, description="Most requests under way at a time; default: as many as rows fit in a batch."
    )
    memory: str | None = Field(
        None, description="What requests under way may hold together, for instance 8GiB; default: no limit."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Precision of the model.")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, mps...; default: the accelerator, if any.")
    edits: bool = Field(True, description="Whether to offer edits where the model can start from a picture.")


class ModelConfig(ModelSettings):
    """One model that is served."""

    model: str = Field(description="A bundled model, a folder, or a hub id.")
    name: str = Field("", description="What clients call it; default: the last part of `model`.")

    @property
    def served_name(self) -> str:
        """What clients call it."""
        return self.name or self.model.rstrip("/").rpartition("/")[2]


class ServerConfig(ModelSettings):
    """All settings of `speca serve`. The fields of a model stand for all models that do not say otherwise."""

    models: tuple[ModelConfig, ...] = ()
    host: str = Field("127.0.0.1", description="Address to listen at; 0.0.0.0 for all, which needs API keys.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen at; 0 takes a free one.")
    api_keys: Path | None = Field(
        None, description="File with one API key a line; without it, and without SPECA_API_KEYS, none is asked for."
    )
    open: bool = Field(False, description="Allow an address other than the own machine without API keys.")
    jobs: Path = Field(
        Path(platformdirs.user_data_dir("speca")) / "jobs", description="Folder for jobs and their results."
    )
    keep_s: float = Field(
        86_400.0, gt=0, description="How long results of jobs and images given by URL are kept, in seconds."
    )
    grace_s: float = Field(
        30.0, ge=0, description="After SIGTERM: how long requests under way may take to finish, in seconds."
    )
    log: Literal["text", "json"] = Field("text", description="Form of the log.")
    cors: tuple[str, ...] = Field((), description="Origins of web pages that may call the server; default: none.")
    playground: bool = Field(True, description="Whether to serve the playground at /.")
    threads: int | None = Field(None, ge=1, description="CPU threads of the models; default: torch's own choice.")
    limits: Limits = Limits()

    def of_model(self, served: ModelConfig) -> ModelConfig:
        """Return a model's settings, with those of the server where it says nothing itself."""
        inherited = {n: getattr(self, n) for n in ModelSettings.model_fields}
        return ModelConfig(**{**inherited, **served.model_dump(exclude_unset=True)})

    def keys(self) -> frozenset[str]:
        """Return the API keys, from the file and from the variable SPECA_API_KEYS (commas between).

        Raises:
            ConfigError: the file cannot be read or has no key.
        """
        found = {key.strip() for key in os.environ.get("SPECA_API_KEYS", "").split(",")}
        if self.api_keys is not None:
            try:
                lines = self.api_keys.read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise ConfigError(f"api_keys={self.api_keys} cannot be read ({error.strerror}).") from error
            named = {line.strip() for line in lines if not line.startswith("#")} - {""}
            if not named:
                raise ConfigError(f"api_keys={self.api_keys} has no key; write one a line.")
            found |= named
        return frozenset(found - {""})


def read(file: Path | None, flags: dict[str, Any]) -> ServerConfig:
    """Return the settings of a TOML file and of flags.

    Args:
        file: the TOML file, None for none.
        flags: by name, those of `limits` as "limits.steps"; a flag replaces what the file says.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or out of range.
    """
    given: dict[str, Any] = {}
    if file is not None:
        try:
            given = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"--config {file} cannot be read ({error.strerror}).") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{file} is no valid TOML: {error}.") from error
    limits = {**given.get("limits", {})}
    for name, value in flags.items():
        folder, dot, field = name.partition(".")
        if dot:
            limits[field] = value
        else:
            given[folder] = value
    if limits:
        given["limits"] = limits
    try:
        config = ServerConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(_words(error)) from error
    names = [config.of_model(m).served_name for m in config.models]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two models are called {sorted(twice)[0]!r}; give one of them another `name`.")
    if config.host not in ("127.0.0.1", "localhost", "::1") and not config.keys() and not config.open:
        raise ConfigError(
            f"host={config.host} can be reached from other machines, and no API keys are set; give a file of keys "
            "(--api-keys), or allow everybody with --open."
        )
    return config


def _words(error: ValidationError) -> str:
    """The first fault of the settings, in a sentence."""
    fault = error.errors()[0]
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        return f"{place}={fault['input']!r} is not valid: {fault['msg']}."
    folders: dict[str, type[BaseModel]] = {"limits": Limits, "models": ModelConfig}
    within = folders.get(str(fault["loc"][0]), ServerConfig)
    return f"unknown setting {place!r}; {nearest(str(fault['loc'][-1]), within.model_fields)}"
