"""The configuration of a training run: TOML in and out, every mistake reported at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from rekd_train.config.backbone import BackboneConfig, ImageConfig
from rekd_train.config.data import DataConfig
from rekd_train.config.files import PRESETS, override, preset_names, read_document
from rekd_train.config.section import Section, known_keys
from rekd_train.config.training import (
    AccelerationConfig,
    DistillationConfig,
    OptimisationConfig,
    SelectionConfig,
    StagesConfig,
    TemperatureConfig,
)
from rekd_train.errors import ConfigError

__all__ = [
    "PRESETS", "AccelerationConfig", "BackboneConfig", "DataConfig", "DistillationConfig", "ImageConfig",
    "OptimisationConfig", "RunConfig", "SelectionConfig", "StagesConfig", "TemperatureConfig", "explain",
    "preset_names", "run_config",
]  # fmt: skip


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
    def _an_image_keeps_one_patch_at_least(self) -> RunConfig:
        """One word cannot hold a negation ("not bad"); one patch can hold what decides."""
        if self.data.modality == "image" and "minimum" not in self.selection.model_fields_set:
            object.__setattr__(self, "selection", self.selection.model_copy(update={"minimum": 1}))  # frozen
        return self

    @model_validator(mode="after")
    def _backbones_read_the_data(self) -> RunConfig:
        for role, backbone in (("selector", self.selector), ("predictor", self.predictor)):
            if (backbone.image is not None) != (self.data.modality == "image"):
                reads = "texts" if backbone.image is None else "images"
                raise ValueError(
                    f"data '{self.data.name}' are {self.data.modality}s, the {role} (family '{backbone.family}', "
                    f"{'no ' if backbone.image is None else ''}section image) reads {reads}"
                )
            if backbone.image is None and self.data.max_length > backbone.positions:
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
    document = read_document(source)
    mistakes = [mistake for text in overrides if (mistake := override(document, text))]
    config = None
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        mistakes += explain(error, RunConfig)
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
        seen = explain(error, RunConfig)
        return [mistake for mistake in explain(hidden, RunConfig) if mistake not in seen]
    return []


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> list[str]:
    """One short line for each mistake, by its place in the document.

    Args:
        model: what was validated; None: an unknown key gets no hint.
    """
    mistakes = []
    for detail in error.errors():
        place = ".".join(str(part) for part in detail["loc"]) or "configuration"
        if detail["type"] == "extra_forbidden":
            hint = known_keys(model, detail["loc"]) if model else ""
            mistakes.append(f"{place}: unknown key{hint}")
        else:
            nothing_to_show = detail["type"] == "missing" or isinstance(detail["input"], dict)
            shown = "" if nothing_to_show else f" (got {detail['input']!r})"
            mistakes.append(f"{place}: {detail['msg'].removeprefix('Value error, ')}{shown}")
    return mistakes
