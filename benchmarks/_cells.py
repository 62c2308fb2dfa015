"""Tables of trained models, cell by cell: what is finished is kept, what is independent runs side by side.

A cell is one model of one seed. Its key is a hash of everything that decides its figures: the training code, its
configuration, and the keys of the cells it needs (a teacher, a warm start). A cell whose result file holds the same
key is finished; the files are small and are committed. A second key leaves the code out, for whoever knows that a
change of the code did not matter. Checkpoints lie in a work directory and may be deleted: what is needed of them is
made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rekd_train.cli.command import finite
from rekd_train.files import write_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cell:
    """One model of one seed, or one measurement of it."""

    name: str
    seed: int
    kind: str
    """'train', 'given', 'compact' or 'masks': see ``_models.run_cell``."""
    config: dict[str, Any] | None = None
    """A ``RunConfig``'s values (train)."""
    needs: dict[str, str] = field(default_factory=dict)
    """Roles and the names of the cells that fill them: of the same seed, or of N where the name ends in '@N'."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        return f"{self.name}_{self.seed}"

    @property
    def needed(self) -> dict[str, str]:
        """Roles and the identities of the cells that fill them."""
        parts = {role: name.partition("@") for role, name in self.needs.items()}
        return {role: f"{name}_{seed or self.seed}" for role, (name, _, seed) in parts.items()}


Say = Callable[[str], None]
Work = Callable[[dict[str, Any]], dict[str, Any]]
"""From a job, as ``Table.job`` makes it, to the figures of the cell. Runs in a process of its own."""


class Table:
    """Cells with their results on disk.

    Args:
        cells: all of them; those that are needed come before those that need them.
        results: where the result files lie.
        work: where the checkpoints lie.
        code: hash of the code that decides the figures.
        settings: passed to every job, without influence on the figures (device).
        any_code: cells that other code has finished are finished, too.
    """

    def __init__(
        self,
        cells: Iterable[Cell],
        results: Path,
        work: Path,
        code: str,
        settings: dict[str, Any],
        any_code: bool = False,
    ) -> None:
        self.cells = {cell.identity: cell for cell in cells}
        self.results, self.work, self.code, self.settings = Path(results), Path(work), code, settings
        self._decides = "settings_sha256" if any_code else "inputs_sha256"
        self.keys = {"inputs_sha256": self._keys(code), "settings_sha256": self._keys("")}

    def _keys(self, code: str) -> dict[str, str]:
        keys: dict[str, str] = {}
        for cell in self.cells.values():
            needed = {role: keys[identity] for role, identity in cell.needed.items()}
            inputs = [code, cell.name, cell.seed, cell.kind, cell.config, cell.options, needed]
            keys[cell.identity] = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        return keys

    def needed(self, cell: Cell) -> list[Cell]:
        """The cells whose checkpoints this one reads."""
        return [self.cells[identity] for identity in cell.needed.values()]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What the finished cell found; None if it is not finished, or was from other inputs."""
        stored = _read(self._file(cell))
        return stored if self._matches(cell, stored) else None

    def job(self, cell: Cell) -> dict[str, Any]:
        """All that a process needs to know; plain values."""
        return {
            "name": cell.name, "seed": cell.seed, "kind": cell.kind, "config": cell.config, "options": cell.options,
            "output": str(self.work / cell.identity), "key": self.keys["inputs_sha256"][cell.identity],
            "needs": {role: str(self.work / identity) for role, identity in cell.needed.items()},
            **self.settings,
        }  # fmt: skip

    def pending(self) -> list[Cell]:
        """Cells to run, in order: the unfinished ones, and what they need if its checkpoint is gone."""
        wanted: set[str] = set()
        for cell in reversed(self.cells.values()):  # what needs before what is needed
            if self.result(cell) is None or cell.identity in wanted:
                wanted.add(cell.identity)
                wanted |= {each.identity for each in self.needed(cell) if not self._has_checkpoint(each)}
        return [cell for cell in self.cells.values() if cell.identity in wanted]

    def store(self, cell: Cell, figures: dict[str, Any]) -> None:
        """Record a finished cell."""
        keys = {name: keys[cell.identity] for name, keys in self.keys.items()}
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(self._file(cell), finite({
            "cell": cell.name, "seed": cell.seed, **keys, "code_sha256": self.code, "kind": cell.kind,
            "needs": cell.needs, "options": cell.options, "config": cell.config, **figures,
        }))  # fmt: skip
        if (self.work / cell.identity).is_dir():
            write_json(self.work / f"{cell.identity}.key.json", keys)

    def _has_checkpoint(self, cell: Cell) -> bool:
        return self._matches(cell, _read(self.work / f"{cell.identity}.key.json"))

    def _matches(self, cell: Cell, stored: dict[str, Any]) -> bool:
        return stored.get(self._decides) == self.keys[self._decides][cell.identity]

    def _file(self, cell: Cell) -> Path:
        return self.results / f"{cell.identity}.json"


def execute(table: Table, work: Work, jobs: int, say: Say) -> int:
    """Run what is pending; with ``jobs`` > 1 in so many processes. Returns how many cells failed.

    A cell starts once the cells it needs are done. One that fails is reported, and what needs it is left out.
    """
    pending = table.pending()
    say(f"{len(table.cells) - len(pending)} of {len(table.cells)} cells are finished")
    waiting = {cell.identity: cell for cell in pending}
    running: dict[Future, Cell] = {}
    failures = 0
    if jobs == 1:
        while waiting:
            cell = next(iter(waiting.values()))
            del waiting[cell.identity]
            failures += _finish(table, cell, lambda cell=cell: work(table.job(cell)), waiting, say)
        return failures
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        # processes side by side share the cores; set here, since theirs import torch before any code of ours runs
        os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // jobs)))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            for cell in list(waiting.values()):
                unfinished = waiting.keys() | {each.identity for each in running.values()}
                if not unfinished & {each.identity for each in table.needed(cell)} and len(running) < jobs:
                    running[pool.submit(work, table.job(cell))] = waiting.pop(cell.identity)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                failures += _finish(table, running.pop(future), future.result, waiting, say)
    return failures


def source_hash(package: Path) -> str:
    """SHA-256 over a package's Python sources."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _finish(
    table: Table,
    cell: Cell,
    figures: Callable[[], dict[str, Any]],
    waiting: dict[str, Cell],
    say: Say,
) -> int:
    """Store a cell's figures; if it failed, take what needs it out of ``waiting``. Returns the cells lost."""
    start = time.perf_counter()
    try:
        found = figures()
    except Exception as error:  # one cell's failure must not lose the others
        lost = [cell.identity]
        for each in list(waiting.values()):
            if {need.identity for need in table.needed(each)} & set(lost):
                lost.append(waiting.pop(each.identity).identity)
        left_out = f"; not run for it: {', '.join(lost[1:])}" if lost[1:] else ""
        say(f"{cell.identity} failed: {type(error).__name__}: {error}{left_out}")
        return len(lost)
    table.store(cell, found)
    seconds = found.get("seconds", time.perf_counter() - start)
    say(f"{cell.identity}: {found['accuracy']:.4f} at {found['rate']:.2%} ({seconds:.0f} s)")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
