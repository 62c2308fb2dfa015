"""Configuration files: presets and TOML files of the user's, each of which may extend another one.

``extends = "NAME"`` at the top of a file takes everything from a preset or, when it ends in .toml, from a file
beside it; what the file says itself wins, key by key.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from rekd_train.config.section import did_you_mean
from rekd_train.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_document(source: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a preset or a TOML file, with what it extends filled in.

    Args:
        source: a preset's name or a path that ends in .toml.
        seen: the files that extend this one.

    Raises:
        ConfigError: no such preset or file, not TOML, or a circle of files that extend each other.
    """
    path = Path(source)
    if path.suffix != ".toml":
        path = PRESETS / f"{source}.toml"
        if not path.is_file():
            meant = did_you_mean(str(source), preset_names())
            names = "'rekd-train presets' lists them all" if meant else f"presets: {', '.join(preset_names())}"
            raise ConfigError(f"no preset '{source}'{meant or ';'} {names}; a file of yours must end in .toml")
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    document = with_current_names(document)
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


def with_current_names(document: dict[str, Any]) -> dict[str, Any]:
    """A document of an older version, so that what extends or overrides it replaces the same keys."""
    stages = document.get("stages")
    if not isinstance(stages, dict) or "criterion" not in stages or "best_metric" in stages:
        return document
    renamed = {"best_metric" if key == "criterion" else key: value for key, value in stages.items()}
    return document | {"stages": renamed}


def override(document: dict[str, Any], text: str) -> str | None:
    """Apply one ``key=value`` to a document; returns the mistake, if any."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return f"--set {text}: write key=value"
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    *parents, last = ("stages.best_metric" if key == "stages.criterion" else key).split(".")
    target = document
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            return f"--set {text}: '{parent}' is not a section"
    target[last] = value
    return None
