"""The seam of the TensorRT family: which product builds and runs an engine, and whether it is here. torch-free.

TensorRT 10, TensorRT 11 and TensorRT-RTX have the same Python API as far as this project uses it (a test compares
every name with the lists of both), so everything behind the seam is written once. They differ in this: TensorRT
builds on and for the GPU that is there; TensorRT-RTX builds anywhere, for the compute capabilities it is given, and
compiles the last part where it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from rekd_deploy.errors import EngineError
from rekd_train.errors import MissingExtraError, install_command


@dataclass(frozen=True)
class Product:
    """One library of the TensorRT family."""

    name: str
    """As on the command line and in manifests."""
    title: str
    module: str
    """The Python module with its API."""
    majors: tuple[int, ...]
    """Major versions whose API this project knows."""
    builds_anywhere: bool
    """Whether it builds without a GPU, for named compute capabilities."""


PRODUCTS = {
    product.name: product
    for product in (
        Product("tensorrt", "TensorRT", "tensorrt", (10, 11), builds_anywhere=False),
        Product("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", (1,), builds_anywhere=True),
    )
}
DEFAULT_CAPABILITIES = ("sm86", "sm89", "sm120")
"""GeForce and RTX cards of the last three generations, for products that build anywhere."""


@dataclass(frozen=True)
class Library:
    """A product that is installed."""

    product: Product
    api: ModuleType
    """The module with the API."""
    version: str

    def new_log(self):
        """A logger for one object of the library, which would print to standard error otherwise."""
        api = self.api

        class MessageLog(api.ILogger):
            def __init__(self) -> None:
                api.ILogger.__init__(self)
                self.complaints: list[str] = []

            def log(self, severity, message) -> None:
                if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                    self.complaints.append(str(message))

            def reason(self) -> str:
                """The first useful line of what went wrong."""
                return first_line(self.complaints) or "it gives no reason"

        return MessageLog()

    def capabilities(self, wanted: Sequence[str] | None) -> tuple[str, ...]:
        """Compute capabilities to build for; empty where the product builds for the GPU that is there.

        Args:
            wanted: 'sm89', ...; None: ``DEFAULT_CAPABILITIES``.

        Raises:
            EngineError: the product cannot build for one of them, or for none by name.
        """
        title = self.product.title
        if not self.product.builds_anywhere:
            if wanted:
                raise EngineError(
                    f"{title} builds for the GPU of this machine, not for {', '.join(wanted)}; fix: export there "
                    "without naming any"
                )
            return ()
        names = wanted or DEFAULT_CAPABILITIES
        known = [name.lower() for name in self.api.ComputeCapability.__members__ if name.startswith("SM")]
        if wrong := [name for name in names if name not in known]:
            raise EngineError(
                f"{title} {self.version} cannot build for '{wrong[0]}'; it knows {', '.join(sorted(known))}"
                + ("; fix: for cards of data centres --target tensorrt" if wrong[0] in ("sm90", "sm100") else "")
            )
        return tuple(dict.fromkeys(names))


def load_library(name: str) -> Library:
    """The installed library of a product.

    Args:
        name: one of ``PRODUCTS``.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        EngineError: there is no such product, or it is not installed, cannot be loaded or has an unknown version.
    """
    if name not in PRODUCTS:
        raise EngineError(f"there is no engine '{name}'; engines: {', '.join(PRODUCTS)}")
    product = PRODUCTS[name]
    majors = " or ".join(map(str, product.majors))
    try:
        api = importlib.import_module(product.module)
    except ModuleNotFoundError as error:
        if error.name != product.module or not product.builds_anywhere:
            raise EngineError(
                f"{product.title} {majors} (the Python package '{error.name}') is not installed; fix: export on the "
                f"target machine inside its Triton container, or {install_command(name)} where NVIDIA's own package "
                "index is reachable; for RTX cards: --target python --engine tensorrt-rtx"
            ) from None
        raise MissingExtraError(product.module, name) from None
    except (ImportError, OSError, RuntimeError) as error:  # the wheel is there, its shared libraries are not
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineError(
            f"{product.title} cannot be loaded: {reason}; fix: {install_command(name)} --force-reinstall"
        ) from None
    version = str(api.__version__)
    if version.split(".")[0] not in map(str, product.majors):
        raise EngineError(f"{product.title} is installed in version {version}; fix: install version {majors}")
    return Library(product, api, version)


def first_line(messages: list[str]) -> str:
    """The first line that says what is wrong; a missing driver is only the reason if nothing else is.

    TensorRT looks for a GPU here and there even where it needs none, and complains each time.
    """
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    of_driver = [line for line in lines if "cudaError" in line]
    return next((line for line in lines if line not in of_driver), next(iter(of_driver), ""))
