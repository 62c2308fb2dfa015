"""Exported graphs, shared by content (torch's exporter is most of the suite's time), and kept in pytest's cache folder.

A graph is found again by all that it follows from: the module with its weights, the arguments, our code, the libraries.
"""

import hashlib
import os
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

TESTS = Path(__file__).parent
CODE = ("rekd_train/**", "rekd_deploy", *(f"rekd_deploy/{name}/**" for name in ("contract", "runtimes", "graphs")))
EVERY_MODULES_OWN = vars(torch.nn.Module()).keys()
LIBRARIES = ("torch", "transformers", "timm", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")


def origin() -> str:
    """What every graph follows from: the libraries, and our code as far as tracing may import it (LAYERS)."""
    digest = hashlib.sha256(repr([metadata.version(name) for name in LIBRARIES]).encode())
    for folder in CODE:
        for path in sorted(TESTS.glob(f"../{folder}/*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def content(module: torch.nn.Module, arguments: tuple, options: dict) -> str:
    """A digest of what one graph follows from besides ``origin``; of classes that tests define, their files."""
    digest = hashlib.sha256(repr((arguments, options)).encode())
    files = set()
    for name, part in module.named_modules():
        own = sorted((key, value) for key, value in vars(part).items() if key not in EVERY_MODULES_OWN)
        plain = [(key, written(value)) for key, value in own]
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr((name, type(part), plain))).encode())
        files.add(Path(sys.modules[type(part).__module__].__file__))
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.detach().numpy().tobytes())
    for path in sorted(path for path in files if path.is_relative_to(TESTS)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def written(value: object) -> object:
    """What ``repr`` tells apart: it leaves out the middle of large arrays, and the order of sets is any."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return str(value.dtype), tuple(value.shape), np.asarray(value).tobytes()
    return sorted(value, key=str) if isinstance(value, set) else value


class TracedOnce:
    """Stands before ``rekd_deploy.graphs.tracing.onnx_from_module``."""

    def __init__(self, trace, folder: Path) -> None:
        self.trace, self._folder = trace, folder

    def __call__(self, module, *arguments, **options) -> onnx.ModelProto:
        path = self._folder / content(module.eval(), arguments, options)
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
            unfinished.write_bytes(self.trace(module, *arguments, **options).SerializeToString())
            unfinished.replace(path)
        return onnx.load_from_string(path.read_bytes())


@pytest.fixture(scope="session", autouse=True)
def shared_graphs(request, tmp_path_factory):
    if not any("deploy" in item.path.parts for item in request.session.items):
        yield  # what exports nothing need not load the exporter
        return
    from rekd_deploy.graphs import tracing
    cache = getattr(request.config, "cache", None)  # None: switched off by -p no:cacheprovider
    folder = (cache.mkdir("graphs") if cache else tmp_path_factory.mktemp("graphs")) / origin()
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "onnx_from_module", TracedOnce(tracing.onnx_from_module, folder))
        yield
