"""Further exports beside the one that is served, such as one with another budget: each answers under a name of its own.

What is served of them is a copy of the single graph, as ``rekd_<name>``, made once: no restart exchanges it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rekd_deploy.contract.description import BUDGET
from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import CONFIG_FILE, ENDPOINTS, FORMER, MODELS, SINGLE, config_text, read_config
from rekd_deploy.repository.reader import models_of
from rekd_deploy.server.live_repository import checked_copy
from rekd_train.errors import ConfigError
from rekd_train.files import write_text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_TAKEN = {*MODELS, *FORMER, *ENDPOINTS.values(), SINGLE}


@dataclass(frozen=True)
class Beside:
    """An export and the name that it answers to."""

    name: str
    repository: Path

    @property
    def model(self) -> str:
        """Triton's model: what ``Client(model=...)`` and requests over HTTP name."""
        return f"rekd_{self.name}"

    @classmethod
    def of(cls, given: str) -> Self:
        """From ``NAME=REPO``, or ``REPO``, whose folder is the name.

        Raises:
            ConfigError: that cannot be a model's name, or another model has it.
        """
        name, equals, path = given.partition("=")
        if not equals or "/" in name:  # a path may hold one, too
            name, path = "", given
        found = cls(name or Path(path).resolve().name, Path(path))
        if not path:
            raise ConfigError(f"'{given}' names no repository; fix: --beside NAME=REPO")
        if found.model in _TAKEN:
            raise ConfigError(f"'{found.name}' is another model's name; fix: another NAME, --beside NAME='{path}'")
        if not _NAME.fullmatch(found.name):
            limits = "one to 40 letters, digits, _ . and -, beginning with a letter or digit"
            raise ConfigError(f"'{found.name}' is no model's name; fix: --beside NAME='{path}', NAME of {limits}")
        return found


def all_beside(given: Sequence[str]) -> tuple[Beside, ...]:
    """See ``Beside.of``; ConfigError: two have one name, too."""
    found = tuple(map(Beside.of, given))
    names = [each.name for each in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two exports beside are named {', '.join(twice)}; fix: --beside NAME=REPO")
    return found


def models_beside(names: Sequence[str]) -> list[str]:
    """Triton's names of exports that a running server has beside its own; ``five`` and ``rekd_five`` are the same.

    Raises:
        ConfigError: no export beside can have that name.
    """
    found = {name: f"rekd_{name.removeprefix('rekd_')}" for name in names}
    for name, model in found.items():
        if model in _TAKEN or not _NAME.fullmatch(model.removeprefix("rekd_")):
            raise ConfigError(f"no export beside is named '{name}'; fix: --beside NAME, as the server was given it")
    return list(dict.fromkeys(found.values()))


def place_beside(exports: Sequence[Beside], folder: Path, check: Callable[[Path, dict[str, Any]], None]) -> None:
    """Copy the single graph of each into ``folder``, which is a repository for Triton then.

    Args:
        check: is given each repository and its manifest; raises what makes it none to be served.

    Raises:
        RepositoryError: one is missing or damaged, or holds no single graph, or there is no room.
    """
    for each in exports:
        manifest = checked_copy(each.repository, copy := folder.with_name("copy"))
        check(each.repository, manifest)
        if SINGLE not in models_of(manifest["repository"]["files"]):
            fix = "fix: rekd-export CHECKPOINT --single-graph --output another folder"
            raise RepositoryError(f"{each.repository} holds no single graph, which is what is served beside; {fix}")
        config = read_config(copy / SINGLE / CONFIG_FILE)
        config.name = each.model
        if (budget := manifest["policy"]["budget"]) is not None:  # exports of before do not tell it
            config.parameters[BUDGET].string_value = str(budget)
        write_text(copy / SINGLE / CONFIG_FILE, config_text(config))
        folder.mkdir(exist_ok=True)
        (copy / SINGLE).rename(folder / each.model)
        shutil.rmtree(copy)
