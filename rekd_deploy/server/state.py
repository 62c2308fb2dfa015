"""What a running rekd-serve writes down for its user alone: where it listens, and the key of its administration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rekd_deploy.server.processes import has_ended

_PREFIX = "serving-"


@dataclass(frozen=True)
class ServerState:
    """One running rekd-serve."""

    process_id: int
    """Of rekd-serve itself."""
    repository: str
    grpc_url: str
    http_url: str
    metrics_url: str
    log_file: str
    key: str
    """Of the restricted interfaces."""
    version: int
    """Of the export that is served."""
    restarts: int = 0
    """How often the server had to be started again."""

    @property
    def urls(self) -> tuple[str, str]:
        """The addresses under which clients know it."""
        return self.grpc_url, self.http_url


def user_folder() -> Path:
    """Where logs and states of this user's servers lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rekd"


def write_state(state: ServerState) -> Path:
    """Write it where only this user can read it; returns the file."""
    folder = user_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_PREFIX}{state.process_id}.json"
    work = path.with_suffix(".new")
    work.unlink(missing_ok=True)
    # readable to others at no moment
    descriptor = os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(state), file, indent=2)
    work.replace(path)
    return path


def remove_state(process_id: int) -> None:
    """Forget a rekd-serve that ends."""
    (user_folder() / f"{_PREFIX}{process_id}.json").unlink(missing_ok=True)


def running_states() -> list[ServerState]:
    """This user's running servers, by process id; what killed ones left behind is removed."""
    return sorted(_running(), key=lambda state: state.process_id)


def _running() -> Iterator[ServerState]:
    for path in user_folder().glob(f"{_PREFIX}*.json"):
        with suppress(OSError, ValueError, TypeError):
            state = ServerState(**json.loads(path.read_text(encoding="utf-8")))
            if has_ended(state.process_id):
                path.unlink(missing_ok=True)
            else:
                yield state
