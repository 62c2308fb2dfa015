"""Every TensorRT name in the code exists in both products, by the class that it is used on."""

import ast
import json
from pathlib import Path

from rekd_deploy.runtimes.tensorrt import PRODUCTS
from rekd_deploy.runtimes.tensorrt_build import DATA_TYPES
from rekd_deploy.runtimes.tensorrt_execution import _TYPES

ROOT = Path(__file__).resolve().parents[3]
LISTS = json.loads((ROOT / "tests" / "golden" / "tensorrt_api.json").read_text(encoding="utf-8"))
TENSORRT, RTX = (LISTS[key] for key in LISTS if key.startswith("tensorrt"))
DEPLOY = ROOT / "rekd_deploy"
MODULES = [*sorted((DEPLOY / "runtimes").glob("tensorrt*.py")), DEPLOY / "repository" / "backend" / "model.py"]

VARIABLES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "engine": "ICudaEngine", "_engine": "ICudaEngine",
    "context": "IExecutionContext", "_runtime": "Runtime", "tensor": "ITensor", "memory": "IHostMemory",
}  # fmt: skip
"""What the modules call their objects of the library's classes."""
ERRORS = {"desc", "node_operator", "node_name"}
"""Of ``ParserError``, which shares its variable with Python's exceptions."""
RTX_ALONE = {
    ("IBuilderConfig", "num_compute_capabilities"), ("IBuilderConfig", "set_compute_capability"),
    ("", "ComputeCapability"),
}  # fmt: skip
"""Used only where the product builds anywhere."""
ELSEWHERE = {"name", "value", "log", "dtype", "shape", "nbytes", "desc", "infer_shapes", "node"}
"""Names of the library that are common words; on other variables they are Python's."""


def base_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def test_every_name_exists_in_both_products():
    everything = {name for api in (TENSORRT, RTX) for names in api.values() for name in names} - ELSEWHERE
    used = set()
    """(class, name), class '' for a name of the module itself."""
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            base, before = base_name(node.value), base_name(getattr(node.value, "value", node.value))
            if base in ("api", "_api"):
                used.add(("", node.attr))
            elif before in ("api", "_api"):
                used.add((base, node.attr))
            elif base in VARIABLES:
                used.add((VARIABLES[base], node.attr))
            elif base == "error" and node.attr in ERRORS:
                used.add(("ParserError", node.attr))
            else:  # it would be compared with no list
                where = f"{module.name}:{node.lineno}: {ast.unparse(node)}: unknown variable"
                assert base == "self" or node.attr not in everything, where
    assert len(used) > 40, "the names are no longer found in the code"
    for api, alone in ((TENSORRT, RTX_ALONE), (RTX, set())):
        known = {("", name) for name in api} | {(owner, name) for owner in api for name in api[owner]}
        assert {pair for pair in used - known if not pair[1].startswith("__")} == alone
        assert {*DATA_TYPES.values(), *_TYPES} <= set(api["DataType"])
    cards = {name.upper() for name in PRODUCTS["tensorrt-rtx"].capabilities}
    assert cards and cards <= set(RTX["ComputeCapability"])
