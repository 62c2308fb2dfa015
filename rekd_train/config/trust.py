"""Code of the user's own, named in a configuration or a checkpoint, and whether it may run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rekd_train.errors import CodeError

_trusted = False


@contextmanager
def trusted_code(trust: bool = True) -> Iterator[None]:
    """Code of the user's own may run inside of it, in every thread; ``trust=False`` leaves things as they are."""
    global _trusted
    before, _trusted = _trusted, _trusted or trust
    try:
        yield
    finally:
        _trusted = before


def own_class(name: str) -> Any:
    """What ``package.module:Class`` names.

    Raises:
        CodeError: it is not trusted, or is not there.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise CodeError(f"'{name}' names no class; fix: write package.module:Class")
    if not _trusted:
        raise CodeError(
            f"{name} is code outside of REKD, which runs only when you trust it; fix: --trust-code "
            "(in Python: load(path, trust_code=True))"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise CodeError(f"{name}: the module {module} has no class {attribute}; fix: check the name") from None
    except Exception as error:  # whatever running the module raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CodeError(
            f"{name}: {module} cannot be imported ({reason}); fix: install it, or put its folder into PYTHONPATH"
        ) from error
