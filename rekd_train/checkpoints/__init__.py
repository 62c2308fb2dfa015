"""What a checkpoint says of itself, read without torch; its files: docs/architecture.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rekd_train.config.run import explain, upgraded
from rekd_train.errors import CheckpointError

FORMAT = "rekd-checkpoint"
VERSION = 3


def _with_upgraded_settings(description: dict[str, Any]) -> dict[str, Any]:
    """2: settings are gone (one with another value stays: the model is read, its run is not taken up); 3: renamed."""
    training = description.get("training") or {}
    parts = {name: upgraded(training[name]) for name in ("config", "judge") if training.get(name)}
    return upgraded(description) | {"training": training | parts}


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = dict.fromkeys((1, 2), _with_upgraded_settings)
"""From version n of config.json to n + 1. A change of format adds one entry and raises VERSION."""


def read_description(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint, upgraded; CheckpointError: missing, damaged, something else, a newer version."""
    path = Path(directory) / "config.json"
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT} description; fix: a directory that rekd-train has written")
    version = description.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(f"{path} has format version {version}; this rekd reads up to {VERSION}; fix: upgrade "
                              "rekd")
    while version < VERSION:
        if version not in UPGRADES:
            raise CheckpointError(f"{path} has format version {version}, which can no longer be upgraded to {VERSION}")
        description = UPGRADES[version](description)
        version += 1
    return description


def read_json(path: Path) -> Any:
    """The content of a checkpoint's JSON file; CheckpointError: missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; fix: give the directory of a whole checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; fix: copy it again") from None


def in_one_line(error: Exception) -> str:
    """What is wrong with a description that was read."""
    if isinstance(error, ValidationError):
        return "; ".join(explain(error))
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
