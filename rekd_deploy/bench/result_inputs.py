"""What was measured, as a result file names it: without paths, with a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rekd_deploy.bench.results import Input


def repository_input(root: Path) -> Input:
    """A model repository; its manifest's digest stands for the whole, since the manifest has those of all files."""
    from rekd_deploy.repository.reader import MANIFEST
    from rekd_train.files import sha256

    return Input(name=Path(root).resolve().name, sha256=sha256(Path(root) / MANIFEST))


def checkpoint_input(path: Path) -> Input:
    """A checkpoint."""
    from rekd_train.checkpoints.checkpoint import checkpoint_hash

    return Input(name=Path(path).resolve().name, sha256=checkpoint_hash(path))


def items_input(items: Sequence[Any], origin: str) -> Input:
    """Texts or images that were asked about."""
    digest = hashlib.sha256()
    for item in items:
        content = item.tobytes() if isinstance(item, np.ndarray) else str(item).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return Input(name=origin, sha256=digest.hexdigest())
