"""Atomic writes: a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a fresh directory that replaces ``target`` when the block ends well, and vanishes otherwise."""
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    old = work.with_name(work.name + "-old")
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            target.rename(old)
        work.rename(target)
    finally:
        if old.exists() and not target.exists():  # interrupted between the two renames
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON (sorted nowhere, two spaces, newline at the end) by renaming a finished file."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text by renaming a finished file."""
    write_bytes(path, content.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file by renaming a finished one."""
    path = Path(path)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_bytes(content)
        work.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk is noticed by a write, which knows no name
            error.filename = str(path)
        raise
    finally:
        work.unlink(missing_ok=True)


AGAIN = "make room, then run the same command again"
RESUME = "make room, then go on with --resume"


def cannot_write(path: Path, error: Exception, fix: str = AGAIN) -> str:
    """One line about a failed write: why, how much room there is, what is intact, and ``fix``."""
    problem = " ".join(str(error).split())[:200]
    try:
        room = shutil.disk_usage(path.parent).free
        free = f"{room / 1e6:.0f} MB are free"
        if room < 1e6 and not isinstance(error, OSError):  # libraries that write by themselves speak of their files
            problem = os.strerror(errno.ENOSPC)
    except OSError:
        free = "the free space is unknown"
    return f"{path} cannot be written ({problem}; {free}); what was saved before is intact; fix: {fix}"


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
