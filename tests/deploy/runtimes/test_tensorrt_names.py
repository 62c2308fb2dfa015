"""Every TensorRT name in the code exists in both products, by the class that it is used on."""

import ast
import json
from pathlib import Path

import pytest

from rekd_deploy.runtimes.tensorrt import PRODUCTS as OURS
from rekd_deploy.runtimes.tensorrt_build import DATA_TYPES
from rekd_deploy.runtimes.tensorrt_execution import _TYPES

ROOT = Path(__file__).resolve().parents[3]
API = json.loads((ROOT / "tests" / "golden" / "tensorrt_api.json").read_text(encoding="utf-8"))
PRODUCTS = [key for key in API if key.startswith("tensorrt")]
DEPLOY = ROOT / "rekd_deploy"
MODULES = [*sorted((DEPLOY / "runtimes").glob("tensorrt*.py")), DEPLOY / "repository" / "backend" / "model.py"]

VARIABLES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "engine": "ICudaEngine", "_engine": "ICudaEngine",
    "context": "IExecutionContext", "_runtime": "Runtime", "tensor": "ITensor",
    "memory": "IHostMemory",
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


def used() -> set[tuple[str, str]]:
    """(class, name) of every use of the library; class '' for a name of the module itself."""
    found = set()
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            base = base_name(node.value)
            if base in ("api", "_api"):
                found.add(("", node.attr))
            elif isinstance(node.value, ast.Attribute) and base_name(node.value.value) in ("api", "_api"):
                found.add((base, node.attr))
            elif base in VARIABLES:
                found.add((VARIABLES[base], node.attr))
            elif base == "error" and node.attr in ERRORS:
                found.add(("ParserError", node.attr))
    return found


@pytest.mark.parametrize("product", PRODUCTS)
def test_every_name_exists_in_both_products(product):
    names = used()
    assert len(names) > 40, "the names are no longer found in the code"
    api = API[product]
    known = {("", name) for name in api} | {(owner, name) for owner in api for name in api[owner]}
    missing = {pair for pair in names - known if not pair[1].startswith("__")}
    assert missing == (set() if "rtx" in product else RTX_ALONE)


def test_no_name_of_the_library_escapes_by_an_unknown_variable():
    """A method of the library on a variable that ``VARIABLES`` does not know would not be compared with the lists."""
    everything = {name for product in PRODUCTS for names in API[product].values() for name in names} - ELSEWHERE
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in everything:
                known = {"api", "_api", *VARIABLES, *(["error"] if node.attr in ERRORS else [])}
                names = {base_name(node.value), base_name(getattr(node.value, "value", node.value))}
                own = isinstance(node.value, ast.Name) and node.value.id == "self"
                assert own or names & known, f"{module.name}:{node.lineno}: {ast.unparse(node)}: unknown variable"


def test_types_and_cards_exist():
    for product in PRODUCTS:
        assert {*DATA_TYPES.values(), *_TYPES} <= set(API[product]["DataType"])
    cards = {name.upper() for name in OURS["tensorrt-rtx"].capabilities}
    assert cards and cards <= set(API[PRODUCTS[1]]["ComputeCapability"])
