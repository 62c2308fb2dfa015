"""The table of docs/backbones.md."""

from __future__ import annotations

from _blocks import block, read

_MEANING = {"exact": "as masked", "windowed": "as masked, local layers by place", "packed": "packed sequence"}


@block("backbones.json")
def backbones() -> list[str]:
    lines = [
        "| network | tokenizer | kept words alone | gathered = attended within | compact = PyTorch | zero = PyTorch "
        "| through Triton |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for kind, row in read("backbones.json")["rows"].items():
        cells = (
            f"`{kind}`", row["tokenizer"] or "patches", _MEANING.get(row.get("gathering"), "none: patches are blanked"),
            {None: "", "packed": "by definition"}.get(row.get("gathering"), f"{row.get('apart', 0):.0e}"),
            row["exported"].get("compact", "not possible"), row["exported"]["zero"], row.get("served", ""),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines
