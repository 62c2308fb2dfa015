"""The configuration of a training run: TOML in and out, every mistake reported at once."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Iterable
from functools import cache, reduce
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from rekd_train.config.sections import BackboneConfig, DataConfig, ImageConfig, Section, did_you_mean, explain
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
    "AccelerationConfig", "BackboneConfig", "DataConfig", "DistillationConfig", "ImageConfig",
    "OptimisationConfig", "RunConfig", "SelectionConfig", "StagesConfig", "TemperatureConfig", "explain",
    "preset", "preset_names", "run_config",
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
    def _one_patch_can_hold_what_decides(self) -> RunConfig:  # but not one word, with a negation ("not bad")
        if self.data.modality == "image" and "minimum" not in self.selection.model_fields_set:
            object.__setattr__(self, "selection", self.selection.model_copy(update={"minimum": 1}))  # frozen
        return self

    @model_validator(mode="after")
    def _backbones_read_the_data(self) -> RunConfig:
        for role, backbone in (("selector", self.selector), ("predictor", self.predictor)):
            if (backbone.image is not None) != (self.data.modality == "image"):
                reads = "texts" if backbone.image is None else "images"
                raise ValueError(f"data '{self.data.name}' are {self.data.modality}s, the {role} (family "
                                 f"'{backbone.family}', {'no ' if backbone.image is None else ''}section image) reads "
                                 f"{reads}")
            if backbone.pretrained and "positions" not in backbone.model_fields_set:
                continue  # how much it reads is seen when it is opened
            if backbone.image is None and self.data.max_length > backbone.positions:
                raise ValueError(f"data.max_length ({self.data.max_length}) exceeds {role}.positions "
                                 f"({backbone.positions})")
        return self


def run_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The settings of a preset or a path that ends in .toml; ConfigError lists every mistake at once.

    ``overrides``: for example ``stages.rationale_epochs=2`` (values in TOML syntax; bare words are strings).
    """
    return checked_config(read_document(source), overrides, source)


def checked_config(document: dict[str, Any], overrides: Iterable[str], source: str | Path) -> RunConfig:
    """The configuration of a document, changed by ``key=value`` overrides; ConfigError lists every mistake at once."""
    needed = document.pop("needs", ())
    mistakes = [mistake for text in overrides if (mistake := override(document, text))]
    if missing := [f"{key}=PATH" for key in needed if not _at(document, *key.split("."))]:
        mistakes.append("it starts from what you name; fix: " + " ".join(f"--set {text}" for text in missing))
        for text in missing:  # so that each is missing once
            override(document, text)
    mistakes += _mistakes(document)
    if mistakes:
        raise ConfigError(f"{source}: " + "; ".join(mistakes))
    return RunConfig.model_validate(document)


def _at(document: dict[str, Any], *keys: Any) -> Any:
    """What stands beneath these keys, one in the other; None: nothing."""
    return reduce(lambda value, key: value.get(key) if isinstance(value, dict) else None, keys, document)


def _mistakes(document: dict[str, Any]) -> list[str]:
    """Those of the fields, and those across fields, which are seen once the wrong fields are left out."""
    try:
        RunConfig.model_validate(document)
        return []
    except ValidationError as error:
        found = explain(error, RunConfig)
        wrong = [detail["loc"] for detail in error.errors() if detail["type"] != "value_error" and detail["loc"]]
    remaining = copy.deepcopy(document)
    for *parents, key in wrong:
        if isinstance(section := _at(remaining, *parents), dict):
            section.pop(key, None)
    remaining.setdefault("name", "unnamed")  # the one field without a default
    return found if remaining == document else list(dict.fromkeys([*found, *_mistakes(remaining)]))


PRESETS = Path(__file__).parents[1] / "presets"
REMOVED: dict[str, Any] = {
    "distillation.prediction_temperature": None, "distillation.teacher_temperature": None,
    "acceleration.teacher_cache": True, "acceleration.gather": True, "acceleration.fused_optimiser": True}
"""Settings of older versions, with the value that is all that is left."""
RENAMED = {"stages.criterion": "stages.best_metric", "selector.weights": "selector.pretrained",
           "predictor.weights": "predictor.pretrained"}  # settings of older versions, and what they are called today
PAPER = PRESETS / "paper.toml"


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted([*(path.stem for path in PRESETS.glob("*.toml") if path != PAPER), *paper_presets()])


def preset(name: str) -> RunConfig:
    """The settings of a preset, with 'PATH' for what is to be named on the command line."""
    return run_config(name, [f"{key}=PATH" for key in read_document(name).get("needs", ())])


@cache
def paper_presets() -> dict[str, dict[str, Any]]:
    """The rows of the paper's tables as documents, by name, from the one table that has them all."""
    with open(PAPER, "rb") as file:
        table = tomllib.load(file)
    documents = {}
    for model, row in table["models"].items():
        network = {"selector": row["network"], "predictor": row["network"], "data": {"name": row["data"]}}
        shared = _merged(_merged(table["text"], table["image"] if "vit" in model else {}), network)
        rows = {kind: row[kind] for kind in ("re", "rekd") if kind in row}
        rows["cls"] = [*row["re"][:2], table["cls_source"].format(title=row["title"])]
        for kind, (target, weight, source) in rows.items():
            name = f"paper_{model}_{kind}"
            selection = {"name": name, "source": source, "selection": {"target": target, "weight": weight}}
            documents[name] = _merged(_merged(shared, selection), table.get(kind, {}))
    return documents


def read_document(source: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a preset or a TOML file, with what it extends filled in.

    ``extends = "NAME"`` at the top of a file takes everything from a preset or, when it ends in .toml, from a file
    beside it; what the file says itself wins, key by key. ``needs``, at the top, too, lists settings that whoever takes
    it must name. ``seen``: the files that extend this one.

    ConfigError: no such preset or file, not TOML, or a circle of files that extend each other.
    """
    path = Path(source)
    if path.suffix != ".toml":
        if (row := paper_presets().get(str(source))) is not None:
            return copy.deepcopy(row)
        path = PRESETS / f"{source}.toml"
        if not path.is_file() or path == PAPER:
            meant = did_you_mean(str(source), preset_names())
            names = "'rekd-train presets' lists them all" if meant else f"presets: {', '.join(preset_names())}"
            raise ConfigError(f"no preset '{source}'{meant or ';'} {names}; a file of yours must end in .toml")
    try:
        with open(path, "rb") as file:
            document = upgraded(tomllib.load(file))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    check_removed(document)
    if "extends" not in document:
        return document
    base = document.pop("extends")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r}; it must be a preset's name or a path that ends in .toml")
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself, by way of {', '.join(str(each) for each in seen)}")
    beneath = read_document(path.parent / base if base.endswith(".toml") else base, (*seen, path.resolve()))
    return _merged(beneath | {"source": f"as {base}, changed"}, document)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def upgraded(document: dict[str, Any]) -> dict[str, Any]:
    """A document of an older version under today's names, so that what extends or overrides it replaces the same keys.

    Settings that are gone are left out where they say what is done now anyway; others stay (see ``check_removed``).
    """
    for old, new in RENAMED.items():
        (section, key), today = old.split("."), new.split(".")[1]
        values = document.get(section)
        if isinstance(values, dict) and key in values and today not in values:
            document = document | {section: {today if each == key else each: values[each] for each in values}}
    for name, left in REMOVED.items():
        section, _, key = name.partition(".")
        values = document.get(section)
        if isinstance(values, dict) and values.get(key, "") in (left, "none" if left is None else left):
            document = document | {section: {each: values[each] for each in values if each != key}}
    return document


def check_removed(document: dict[str, Any]) -> None:
    """Raise ConfigError if an upgraded document asks for what is no longer there."""
    for name, left in REMOVED.items():
        section, _, key = name.partition(".")
        if isinstance(document.get(section), dict) and key in document[section]:
            raise ConfigError(f"{name}={document[section][key]} is no longer there: training does as with "
                              f"'{'none' if left is None else str(left).lower()}'; fix: leave the setting out")


def override(document: dict[str, Any], text: str) -> str | None:
    """Apply one ``key=value`` to a document; returns the mistake, if any."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return f"--set {text}: write key=value"
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    *parents, last = RENAMED.get(key, key).split(".")
    target = document
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            return f"--set {text}: '{parent}' is not a section"
    target[last] = value
    return None
