"""Write docs/settings.md from the configuration's classes: every setting, its values, its default and its meaning.

    python scripts/settings.py

``tests/test_docs.py`` fails when the page and the classes differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rekd_train.config.run import RunConfig
from rekd_train.config.sections import sections_of

PAGE = ROOT / "docs" / "settings.md"
HEAD = """\
# Settings

Every setting of a training run. A preset or a file of yours sets some of them, the others keep their defaults:

```toml
extends = "demo_student"        # a preset, or a file beside this one

[selection]
target = 0.2
```

On the command line: `--set selection.target=0.2`; `none` stands for no value. `rekd-train presets --json` prints the
settings of every preset. What they are for is told in [training.md](training.md) and [data.md](data.md). This page is
written by `scripts/settings.py`.
"""
KINDS = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
LIMITS = {"ge": "≥ {:g}", "gt": "> {:g}", "le": "≤ {:g}", "lt": "< {:g}", "min_length": "(not empty)"}


def page() -> str:
    """The whole page."""
    sections: dict[type[BaseModel], list[str]] = {}
    for name, section in sections_of(RunConfig).items():
        sections.setdefault(section, []).append(name)
    return HEAD + "".join("\n" + _table(section, names) for section, names in sections.items())


def _table(section: type[BaseModel], names: list[str]) -> str:
    title = " and ".join(f"`{name}`" for name in names) if names[0] else "Outside of any section"
    about = (section.__doc__ or "").strip().splitlines()[0]
    rows = [
        f"| `{name}` | {_values(field)} | {_default(field)} | {field.description} |"
        for name, field in section.model_fields.items()
        if field.description
    ]
    return "\n".join(
        [f"## {title}", "", about, "", "| setting | values | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def _values(field: FieldInfo) -> str:
    kinds = get_args(field.annotation) if NoneType in get_args(field.annotation) else (field.annotation,)
    limits = " and ".join(
        said.format(limit) for part in field.metadata for name, said in LIMITS.items()
        if (limit := getattr(part, name, None)) is not None
    )  # fmt: skip
    return " or ".join("`none`" if kind is NoneType else _kind(kind, limits) for kind in kinds)


def _kind(kind: Any, limits: str) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        inner, *more = get_args(kind)
        return f"list of {'' if Ellipsis in more else f'{len(more) + 1} '}{KINDS[inner]}s"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a section"
    if kind in KINDS:
        return f"{KINDS[kind]} {limits}".strip()
    return " or ".join(_kind(each, limits) for each in get_args(kind))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.default
    if value is None:
        return "`none`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value != "" else "empty"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}: written\n")
