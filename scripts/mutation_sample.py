"""Breaks random lines of the product, one at a time, and counts how many the tests notice.

    python scripts/mutation_sample.py --output /tmp/mutants.jsonl            # 40 lines, an hour or two
    python scripts/mutation_sample.py --count 10 --seed 7 --output FILE      # goes on where FILE ends

Works in a copy of the checkout. Each mutant meets the test files that name its module and those of the folder that
mirrors its package, first their quick tests, then all others. A test that fails with the mutant and passes without it
has caught it; so has a run beyond the limit. Equivalent mutants (a cache's size, a message) are counted as missed:
read the list.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rekd_train", "rekd_deploy")
LIMITS_S = (200, 400, 1500)
"""Of the quick tests near a module, of all near it, and of all others: a mutant may hang."""
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


def test_files(copy: Path, file: str) -> tuple[list[str], list[str]]:
    """Those that are likely to notice a change of a module, and all others."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = Path(file).parts
    folder = Path("tests", parts[0].removeprefix("rekd_"), *parts[1:2])
    mirrored, naming, others = [], [], []
    for path in sorted((copy / "tests").rglob("test_*.py")):
        name = str(path.relative_to(copy))
        named = re.search(rf"\b{re.escape(module)}\b", path.read_text(encoding="utf-8"))
        (mirrored if folder in Path(name).parents else naming if named else others).append(name)
    return mirrored or naming, naming + others if mirrored else others


def failures(copy: Path, arguments: list[str], limit: float = LIMITS_S[-1]) -> list[str]:
    """Ids of the first tests that fail; a run beyond the limit: ['']."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", f"--basetemp={copy.parent / 'tests'}"]
    command += arguments
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return [""]
    found = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1, 2, 5) or (done.returncode in (1, 2) and not found):
        sys.exit(f"error: pytest ended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return found


def noticed(path: Path, changed: str, copy: Path) -> bool:
    """Whether a test fails with the changed module that passes without the change."""
    original = path.read_text(encoding="utf-8")
    near, far = test_files(copy, str(path.relative_to(copy)))
    quick = [*near, "-m", "not (triton or tensorrt or standin or debian or slow)"]
    unsteady: list[str] = []
    try:
        for files, limit in zip((quick, near, far), LIMITS_S, strict=True):
            while True:
                path.write_text(changed, encoding="utf-8")
                found = failures(copy, [*files, *(f"--deselect={name}" for name in unsteady)], limit)
                path.write_text(original, encoding="utf-8")
                if not found:
                    break
                if found == [""] or not failures(copy, found):
                    return True
                unsteady += found
        return False
    finally:
        path.write_text(original, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="a line of JSON a mutant; what is there is kept")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
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
        for mutant in sample(options.count, options.seed)[len(done) :]:
            path = copy / mutant["file"]
            lines = path.read_text(encoding="utf-8").splitlines()
            lines[mutant["line"] - 1] = mutant["after"]
            mutant["caught"] = noticed(path, "\n".join(lines) + "\n", copy)
            shutil.rmtree(cache, ignore_errors=True)
            shutil.copytree(graphs, cache)
            done.append(mutant)
            with options.output.open("a") as file:
                file.write(json.dumps(mutant) + "\n")
            print(f"{'caught' if mutant['caught'] else 'MISSED'}  {mutant['file']}:{mutant['line']}", flush=True)
    print(f"{sum(mutant['caught'] for mutant in done)} of {len(done)} caught")


if __name__ == "__main__":
    main()
