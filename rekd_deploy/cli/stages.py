"""Finished work is kept: a stage runs again only when its inputs change.

A stage writes a directory. Beside it, ``<name>.stage.json`` holds the hash of the inputs that made it and
the seconds it took; that file is written last, so an interrupted stage is simply not finished.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rekd_train.files import write_json


class Stages:
    """Named stages under one directory.

    Args:
        root: where the stages' directories lie.
        announce: told the name of each stage and whether it is reused.
    """

    def __init__(self, root: Path, announce: Callable[[str, bool], None] = lambda name, reused: None) -> None:
        self.root = Path(root)
        self.seconds: dict[str, float] = {}
        self._announce = announce

    def run(self, name: str, inputs: Any, make: Callable[[Path], None]) -> Path:
        """Make ``root/name`` unless it was made from the same inputs before.

        Args:
            inputs: anything JSON can hold that decides the outcome; of earlier stages, their ``key``.
            make: writes the directory it is given, atomically.
        """
        directory, record = self.root / name, self.root / f"{name}.stage.json"
        wanted = _hash(inputs)
        stored = _read(record)
        reused = directory.is_dir() and stored.get("inputs_sha256") == wanted
        self._announce(name, reused)
        if not reused:
            record.unlink(missing_ok=True)
            self.root.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            make(directory)
            stored = {"inputs_sha256": wanted, "seconds": round(time.perf_counter() - start, 2)}
            write_json(record, stored)
        self.seconds[name] = stored["seconds"]
        return directory

    def key(self, name: str) -> str:
        """Hash of a finished stage's inputs, for the inputs of a later one."""
        return _read(self.root / f"{name}.stage.json")["inputs_sha256"]


def source_hash(packages: Iterable[Path]) -> str:
    """SHA-256 over the Python sources of packages: a change of the code makes stages run again."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(Path(package).rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _hash(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _read(record: Path) -> dict[str, Any]:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
