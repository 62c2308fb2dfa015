"""What a request may cost at most, and the key that it must carry. Light: commands read it first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace

from rekd_train.errors import ConfigError

KEY, LIMITS, URL = "REKD_API_KEY", "REKD_HTTP_LIMITS", "REKD_TRITON_URL"
"""Environment variables: the key that requests must carry, ``NAME=VALUE,...``, Triton's address."""
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class Limits:
    """Most that one request may hold or take. Each is more than 0."""

    bytes: int = 16 << 20
    """Of a request's body."""
    texts: int = 256
    """Texts of a request."""
    characters: int = 100_000
    """Of a text."""
    images: int = 64
    """Images of a request."""
    pixels: int = 32_000_000
    """Of all images of a request together, decoded."""
    seconds: float = 30.0
    """That the body may take to come; and as many for Triton's answer, with every batch and retry."""
    requests: int = 64
    """On their way at once; more are refused with 503."""

    def with_values(self, values: Iterable[str]) -> Limits:
        """These limits with others in their place, each ``NAME=VALUE``; ConfigError: all that cannot be used."""
        known = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        found, mistakes = {}, []
        for each in values:
            name, sign, value = (part.strip() for part in each.partition("="))
            try:
                if not sign or name not in known:
                    raise ValueError(f"is not one of {', '.join(f'{known_name}=...' for known_name in known)}")
                found[name] = _number(value, known[name])
            except ValueError as error:
                mistakes.append(f"the limit '{each}' {error}")
        if mistakes:
            raise ConfigError("; ".join(mistakes))
        return replace(self, **found)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Limits:
        """Those of ``REKD_HTTP_LIMITS``; ConfigError: one cannot be used."""
        return cls().with_values(filter(str.strip, environment.get(LIMITS, "").split(",")))


def _number(value: str, kind: type) -> int | float:
    try:
        number = kind(value)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise ValueError(f"is no {'whole number' if kind is int else 'number'} above 0")
    return number


def api_key(environment: Mapping[str, str]) -> str | None:
    """The value of ``REKD_API_KEY``; None: it is not set. ConfigError: it is too short, or cannot stand in a header."""
    key = environment.get(KEY)
    if key is None:
        return None
    fix = "fix: a word of letters and digits such as openssl rand -hex 32 prints, or unset it to take every request"
    if len(key) < _SHORTEST_KEY:  # an empty one, too: whoever wrote it down meant to have one
        raise ConfigError(f"{KEY} has {len(key)} characters; it must have at least {_SHORTEST_KEY}; {fix}")
    if not all("!" <= letter <= "~" for letter in key):
        raise ConfigError(f"{KEY} holds a blank, or a sign that is not ASCII; {fix}")
    return key
