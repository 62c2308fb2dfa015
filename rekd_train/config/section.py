"""What every section of a configuration has in common, and how a misspelt name is answered."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Frozen; unknown keys are mistakes; the word "none" means None where a field may be that (TOML has no null)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if value == "none" and key in optional else value for key, value in values.items()}


def sections_of(model: type[BaseModel], name: str = "") -> dict[str, type[BaseModel]]:
    """A model and every section beneath it by its dotted name, the model itself by ''."""
    sections = {name: model}
    for key, field in model.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                sections |= sections_of(part, f"{name}.{key}" if name else key)
    return sections


def did_you_mean(name: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """", did you mean 'layers'?" with the known name most like ``name``, then ``others``; else ''."""
    found = [*get_close_matches(name, list(known), n=1), *others][:3]
    return f", did you mean {' or '.join(repr(each) for each in found)}?" if found else ""


def known_keys(model: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """What to say behind the unknown key at ``place``: what was probably meant, and the names of its section."""
    *parents, name = map(str, place)
    sections = sections_of(model)
    section = sections.pop(here := ".".join(parents), None)
    if section is None:
        return ""
    elsewhere = (f"{other}.{name}".lstrip(".") for other, part in sections.items() if name in part.model_fields)
    meant = did_you_mean(name, section.model_fields, elsewhere)
    return f"{meant} ({here or 'the top level'} has {', '.join(section.model_fields)})"
