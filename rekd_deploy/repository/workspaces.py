"""Folders that belong to one process: gone when it ends, and cleared away later if it was killed.

The owner holds a lock on a file inside; the kernel releases it however the process ends. So a folder whose lock can
be taken has no owner any more, whichever container or user looks.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from glob import escape
from pathlib import Path

from rekd_deploy.errors import RepositoryError

_LOCK = "owner.lock"
_NEW, _OLD = "new", "old"
_CURRENT_FOLDER, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2."""


class Workspace(AbstractContextManager["Workspace"]):
    """A fresh folder of this process in ``parent``, None: a temporary one; leftovers of its prefix are removed."""

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir() if parent is None else parent)
        remove_leftovers(parent, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        unlocked = self.path / f".{_LOCK}"
        self._lock = os.open(unlocked, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / _LOCK)  # so that no one sees the lock before it is held

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder; safe to call twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_leftovers(parent: Path, prefix: str) -> None:
    """Remove workspaces whose process is gone."""
    for folder in Path(parent).glob(f"{escape(prefix)}*"):
        with suppress(OSError):  # no lock: not one of ours, or not yet; held or another user's: none of our business
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def refuse_unwritable_place(root: Path) -> None:
    """Raise RepositoryError where nothing can be put at ``root``."""
    place = next(folder for folder in Path(root).resolve().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "read-only here" if place.is_dir() else "a file"
        raise RepositoryError(
            f"{root} cannot be written, since {place} is {what}; fix: choose another --output, or run as a user who "
            "may write there"
        )


@contextmanager
def one_at_a_time(target: Path) -> Iterator[None]:
    """Wait until no other process writes at ``target`` or beside it, and keep others waiting meanwhile.

    The lock is on the folder above and leaves no file behind; where there are no locks nobody waits.
    """
    folder = Path(target).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a fresh directory that takes the place of ``target`` when the block ends well, and vanishes otherwise.

    Even a killed process leaves the old directory or the new one, whole. Of a link, what it leads to is replaced.
    """
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-rekd-"
    for old in target.parent.glob(f"{escape(prefix)}*/{_OLD}"):  # left by a killed process
        if not target.exists():
            old.rename(target)
    with Workspace(prefix, target.parent) as space:
        new = space.path / _NEW
        new.mkdir()
        yield new
        if not target.exists():
            new.rename(target)
        elif not _exchanged(new, target):
            old = space.path / _OLD  # for a moment there is none; put back above if this process is killed in it
            target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                old.rename(target)
                raise


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system, its C library or this file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_CURRENT_FOLDER, os.fsencode(one), _CURRENT_FOLDER, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
