"""Further exports beside the one that is served, such as one with another budget: each answers under a name of its own.

What is served of them is the single graph, as ``rekd_<name>``; their repositories stay as they are.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rekd_deploy.errors import RepositoryError
from rekd_deploy.repository.config import CONFIG_FILE, ENDPOINTS, FORMER, MODELS, SINGLE, config_text, read_config
from rekd_deploy.repository.manifest import Versions
from rekd_deploy.repository.reader import check_repository, models_of
from rekd_train.errors import ConfigError
from rekd_train.files import write_text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}")
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
        name, _, path = given.rpartition("=")
        repository = Path(path)
        found = cls(name or repository.resolve().name, repository)
        if not _NAME.fullmatch(found.name) or found.model in _TAKEN:
            reason = "is another model's" if found.model in _TAKEN else "is no model's name"
            fix = f"fix: --beside NAME={repository}, of letters, digits, _ . and -"
            raise ConfigError(f"'{found.name}' {reason}; {fix}")
        return found


def all_beside(given: Sequence[str]) -> tuple[Beside, ...]:
    """See ``Beside.of``; ConfigError: two have one name, too."""
    found = tuple(map(Beside.of, given))
    names = [each.name for each in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two exports beside are named {', '.join(twice)}; fix: --beside NAME=REPO")
    return found


def place_beside(exports: Sequence[Beside], folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Copy the single graph of each into a repository for Triton, ``folder``; their roots and checked manifests.

    Raises:
        RepositoryError: one is missing or damaged, or holds no single graph.
    """
    found = []
    for each in exports:
        manifest = check_repository(each.repository)
        if SINGLE not in models_of(manifest["repository"]["files"]):
            fix = f"fix: rekd-export CHECKPOINT --output {each.repository} --single-graph"
            raise RepositoryError(f"{each.repository} holds no single graph, which is what is served beside; {fix}")
        shutil.copytree(each.repository / SINGLE, folder / each.model, ignore=shutil.ignore_patterns("__pycache__"))
        config = read_config(each.repository / SINGLE / CONFIG_FILE)
        config.name = each.model
        config.version_policy.specific.versions[:] = [Versions.of(manifest).current]
        write_text(folder / each.model / CONFIG_FILE, config_text(config))
        found.append((each.repository, manifest))
    return found
