"""What Linux says about the processes that a server has started."""

from __future__ import annotations

from pathlib import Path


def children_of(process_id: int) -> set[int]:
    """Process ids of the running children."""
    everyone = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return {each for each in everyone if (known := _state_and_parent(each)) and known[1] == process_id}


def has_ended(process_id: int) -> bool:
    """Whether a process is gone, or dead and not yet waited for."""
    state = _state_and_parent(process_id)
    return state is None or state[0] in "ZX"


def _state_and_parent(process_id: int) -> tuple[str, int] | None:
    try:
        facts = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, parent = facts.rpartition(")")[2].split()[:2]  # the name before it may hold spaces and brackets
    return state, int(parent)
