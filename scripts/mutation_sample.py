"""Breaks random lines of the product, one at a time, and counts how many the tests notice.

    python scripts/mutation_sample.py --output /tmp/mutants.jsonl            # 40 lines, an hour
    python scripts/mutation_sample.py --count 10 --seed 7 --output FILE      # goes on where FILE ends
    python scripts/mutation_sample.py --far --output FILE                    # what is missed meets all other tests, too

Works in a copy of the checkout. Each mutant meets the tests of the folder that mirrors its package, the quick tests of
the files that name its module first, then the other quick ones, then the slow ones, then files elsewhere that name it.
The first test that fails has caught it; so has a run beyond the limit. At the end all these tests
run once without a mutant, and one that fails there has caught nothing: its mutants are tried again without it. Tests
that need a server, an engine or a second environment run with --far alone. Equivalent mutants (a cache's size, a
message) are counted as missed: read the list.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rekd_train", "rekd_deploy")
LIMIT_S, FAR_S = 400, 1500
"""Of a stage of tests, and of all tests: a mutant may hang."""
HEAVY = "numpy torch transformers timm onnx onnxscript onnxruntime datasets pyarrow.parquet scipy.stats sklearn".split()
QUICK = "not (triton or tensorrt or standin or debian or slow)"
HERE = "not (triton or tensorrt or standin or debian)"
OPPOSITES = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
}  # fmt: skip


def broken(node: ast.AST) -> ast.AST | None:
    """A changed copy of an expression or statement; None for kinds that are left alone."""
    copy = deepcopy(node)
    match copy:
        case ast.Compare(ops=[operator]) if type(operator) in OPPOSITES:
            copy.ops = [OPPOSITES[type(operator)]()]
        case ast.BoolOp(op=operator):
            copy.op = OPPOSITES[type(operator)]()
        case ast.BinOp(op=operator, left=left) if type(operator) in OPPOSITES and not isinstance(left, ast.Constant):
            copy.op = OPPOSITES[type(operator)]()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.Constant(value=bool(value)):
            copy.value = not value
        case ast.Constant(value=int(value)):
            copy.value = value + 1
        case ast.IfExp(test=test):
            copy.test = ast.UnaryOp(ast.Not(), test)
        case ast.Return(value=ast.AST()):
            copy.value = ast.Constant(None)
        case ast.Expr(value=ast.Call()):
            return ast.Pass()
        case _:
            return None
    return copy


def candidates(path: Path) -> Iterator[tuple[int, ast.AST]]:
    """Line and node of everything in a module that could be broken; annotations and defaults of settings are not."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            pending += [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, ast.AST)]
        one_line = getattr(node, "lineno", 0) and node.lineno == node.end_lineno
        if one_line and isinstance(node, ast.stmt | ast.expr) and broken(node) is not None:
            yield node.lineno, node


def sample(count: int, seed: int) -> list[dict[str, object]]:
    """That many lines, each with one way to break it."""
    generator = random.Random(seed)
    lines: dict[tuple[str, int], list[ast.AST]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for line, node in candidates(path):
                lines.setdefault((str(path.relative_to(ROOT)), line), []).append(node)
    mutants = []
    for file, line in generator.sample(sorted(lines), count):
        node = generator.choice(lines[file, line])
        whole = (ROOT / file).read_text(encoding="utf-8").splitlines()[line - 1].encode()
        start, end = node.col_offset, node.end_col_offset
        text = ast.unparse(broken(node))
        if isinstance(node, ast.expr) and not isinstance(node, ast.Constant):
            text = f"({text})"
        after = (whole[:start] + text.encode() + whole[end:]).decode()
        mutants.append({"file": file, "line": line, "before": whole.decode().strip(), "after": after})
    return mutants


def stages(copy: Path, file: str, far: bool) -> list[list[str]]:
    """Arguments of pytest, one list a stage: the tests that are likely to notice a change of a module come first."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = Path(file).parts
    folder = Path("tests", parts[0].removeprefix("rekd_"), *parts[1:2])
    package, _, last = module.rpartition(".")
    named = rf"\b{re.escape(module)}\b|^from {re.escape(package)} import .*\b{last}\b"
    mirrored, naming = [], []
    for path in sorted((copy / "tests").rglob("test_*.py")):
        name = str(path.relative_to(copy))
        if re.search(named, path.read_text(encoding="utf-8"), re.MULTILINE):
            naming.append(name)
        if folder in Path(name).parents:
            mirrored.append(name)
    near = mirrored or naming
    first = [name for name in near if name in naming]
    found = [[*first, "-m", QUICK]] if first and len(first) < len(near) else []
    found += [[*near, "-m", QUICK], [*near, "-m", HERE]]
    if elsewhere := [name for name in naming if name not in near]:
        found.append([*elsewhere, "-m", HERE])
    return [*found, *([["tests"]] if far else [])]


def failures(copy: Path, arguments: list[str], limit: float = FAR_S, every: bool = False) -> list[str]:
    """Ids of the first tests that fail, or of every one; a run beyond the limit: [''].

    In a copy of this process, which has loaded the heavy libraries already, and nothing of ours.
    """
    output = copy.parent / "output"
    process = multiprocessing.get_context("fork").Process(target=_tested, args=(copy, arguments, output, every))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return [""]
    text = output.read_text(encoding="utf-8", errors="replace")
    if process.exitcode == 4 and "conftest" in text:
        return ["tests/conftest.py"]  # which does not load
    found = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    if process.exitcode not in (0, 1, 2, 5) or (process.exitcode in (1, 2) and not found):
        sys.exit(f"error: pytest ended with {process.exitcode}\n{text[-3000:]}")
    return found


def _tested(copy: Path, arguments: list[str], output: Path, every: bool) -> None:
    os.setsid()
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    os.environ.update(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    sys.dont_write_bytecode = True  # a mutant of the same second and size would be taken for the original
    sys.path.insert(0, str(copy))
    command = ["-q", f"--basetemp={copy.parent / 'tests'}", *arguments]
    code = pytest.main(command if every else ["-x", *command])
    sys.stdout.flush()
    os._exit(int(code))


def noticed(path: Path, changed: str, copy: Path, far: bool, unsteady: list[str]) -> str | None:
    """The first test that fails with the changed module, '' for a run that never ended; None: none fails."""
    original = path.read_text(encoding="utf-8")
    try:
        path.write_text(changed, encoding="utf-8")
        for each in stages(copy, str(path.relative_to(copy)), far):
            limit = FAR_S if each == ["tests"] else LIMIT_S
            if found := failures(copy, [*each, *(f"--deselect={name}" for name in unsteady)], limit):
                return found[0]
        return None
    finally:
        path.write_text(original, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="a line of JSON a mutant; what is there is kept")
    parser.add_argument("--far", action="store_true", help="what is missed near it meets every test")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    os.environ["OMP_NUM_THREADS"] = "1"
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ImportError):
        for name in HEAVY:
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy, graphs = Path(folder) / "copy", Path(folder) / "graphs"
        ignored = shutil.ignore_patterns(".venv*", "runs", ".pytest_cache")  # .git stays: a test reads it
        shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
        (copy / ".venv-gpu").symlink_to(ROOT / ".venv-gpu")
        cache = copy / ".pytest_cache" / "d" / "graphs"
        if (ROOT / ".pytest_cache" / "d" / "graphs").exists():
            shutil.copytree(ROOT / ".pytest_cache" / "d" / "graphs", cache)
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copytree(cache, graphs)
        mutants, unsteady = sample(options.count, options.seed), []
        while pending := mutants[len(done) :]:
            for mutant in pending:
                path = copy / mutant["file"]
                lines = path.read_text(encoding="utf-8").splitlines()
                lines[mutant["line"] - 1] = mutant["after"]
                mutant["by"] = noticed(path, "\n".join(lines) + "\n", copy, options.far, unsteady)
                shutil.rmtree(cache, ignore_errors=True)
                shutil.copytree(graphs, cache)
                done.append(mutant)
                options.output.write_text("".join(json.dumps(each) + "\n" for each in done))
                said = "MISSED" if mutant["by"] is None else "caught"
                print(f"{said}  {mutant['file']}:{mutant['line']}  {mutant['by'] or ''}", flush=True)
            names = sorted({mutant["by"] for mutant in done} - {None, ""})
            unsteady += failures(copy, names, every=True) if names else []
            done = [mutant for mutant in done if mutant["by"] not in unsteady]
            places = [(mutant["file"], mutant["line"]) for mutant in done]
            mutants = done + [mutant for mutant in mutants if (mutant["file"], mutant["line"]) not in places]
    print(f"{sum(mutant['by'] is not None for mutant in done)} of {len(done)} caught")


if __name__ == "__main__":
    main()
