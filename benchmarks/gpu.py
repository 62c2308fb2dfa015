"""Everything worth knowing on a GPU, in one command of at most 20 minutes, without a network.

Steps run in the order of what is most worth knowing, each in a process of its own with a limit of its own; what a step
has found so far is always in its file, and a finished step is not run again.

    python benchmarks/gpu.py prepare runs/gpu_graphs            anywhere, minutes; then copy the folder to the GPU
    python benchmarks/gpu.py run runs/gpu_graphs                there
    python benchmarks/gpu.py run runs/gpu_graphs --again parity
    python benchmarks/gpu.py report                             a page of the results
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from rekd_train.cli.command import application, examples, run

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
CHECK = "check"
LIMITS = {
    CHECK: 40, "parity": 150, "latency_fp16": 200, "latency_fp32": 170, "concurrency": 60, "pytorch": 100,
    "compiled": 110, "training": 60, "tensorrt": 110, "imdb": 200,
}  # fmt: skip
"""Seconds of each step, in order; together 20 minutes."""
TO_THE_END = "imdb"
"""Takes whatever is left, so it comes last."""
OF_PYTORCH = ("pytorch", "compiled", "training", "imdb")
"""Steps that --pytorch runs."""
NOTE = "CUDA pretends: values and times mean nothing"

app = application(
    help="Prove and time everything on a GPU: parity, latency, concurrency, training, TensorRT, accuracy.",
    epilog=examples("gpu.py prepare runs/gpu_graphs", "gpu.py run runs/gpu_graphs"),
)
Graphs = Annotated[Path, typer.Argument(help="Folder of the graphs.")]


@app.command()
def prepare(
    graphs: Graphs,
    kinds: Annotated[str | None, typer.Option(help="Whose parity is checked, with commas.", show_default="all")] = None,
    tiny: Annotated[bool, typer.Option(help="Networks of a size at which times mean nothing.")] = False,
) -> None:
    """Write the graphs; needs PyTorch, and no GPU."""
    from _gpu_graphs import prepare

    from rekd_deploy.errors import BenchmarkError

    if graphs.exists():
        raise BenchmarkError(f"{graphs} is there already; fix: another folder, or remove it")
    prepare(graphs, None if kinds is None else kinds.split(","), tiny, lambda step: typer.echo(step, err=True))


@app.command("run")
def run_steps(
    graphs: Graphs,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = RESULTS,
    steps: Annotated[str, typer.Option(help="With commas.")] = ",".join(LIMITS),
    again: Annotated[list[str] | None, typer.Option(metavar="STEP", help="Run a finished step once more.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Of all steps together.")] = 20,
    pytorch: Annotated[
        Path | None, typer.Option(help="Python with a PyTorch for GPUs; runs its steps.", show_default="this one")
    ] = None,
    standin: Annotated[bool, typer.Option(help="Go through all steps on the tests' CUDA, which pretends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each step.")] = False,
) -> None:
    """Run what is not finished yet, and say what came of it."""
    from _gpu_graphs import read
    from _gpu_machine import stands_in

    from rekd_deploy.errors import BenchmarkError

    wanted, digest = steps.split(","), read(graphs)[1]
    if unknown := {*wanted, *(again or ())} - set(LIMITS):
        raise BenchmarkError(f"there is no step '{min(unknown)}'; steps: {', '.join(LIMITS)}")
    if standin and output.resolve().is_relative_to(RESULTS):
        raise BenchmarkError("what pretends is no result; fix: --output with another folder")
    if standin != stands_in():
        said = "the CUDA here is a real one, or none" if standin else "the CUDA here only pretends"
        raise BenchmarkError(f"{said}; fix: {'without' if standin else 'with'} --standin")
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    for name in (name for name in LIMITS if name in wanted):
        file = output / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() and name not in (again or ()) else {}
        if found and found["graphs"] != digest:
            raise BenchmarkError(f"{file} is of other graphs; fix: --again {name}, or another --output")
        if found.get("status") != "done" or name == CHECK:  # the machine may have changed
            python = pytorch if pytorch and name in OF_PYTORCH else Path(sys.executable)
            left = end - time.monotonic()
            limit = left if name == TO_THE_END else min(LIMITS[name], left)
            facts = {"step": name, "graphs": digest, **({"note": NOTE} if standin else {})}
            found = _step(python, name, graphs, file, facts, limit, standin)
        line = {"step": name, **{key: found[key] for key in ("status", "reason", "seconds")}}
        words = f"{name}: {found['status']}, {found['seconds']:.0f} s; {found['reason']}"
        typer.echo(json.dumps(line) if as_json else words)
        if name == CHECK and found["status"] != "done":
            raise typer.Exit(1)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder that run wrote.")] = RESULTS,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page; the summary lies beside it as .md.")] = Path(
        "report.html"
    ),
) -> None:
    """Make a page of the results, with the goals as checks."""
    from _gpu_report import read_gpu

    from rekd_deploy.bench.report import write_report

    page, markdown = write_report("What it is worth on a GPU", [read_gpu(results)], output)
    typer.echo(f"page     {page}\nsummary  {markdown}")


@app.command(hidden=True)
def step(name: str, graphs: Path, file: Path, standin: bool = False) -> None:
    """One step, in this process."""
    from _gpu_graphs import read
    from _gpu_machine import hardware, lacks
    from _gpu_more import STEPS
    from _gpu_steps import PRETENDED, Result, Sizes, Skipped

    from rekd_deploy.errors import BenchmarkError

    begun, result = time.monotonic(), Result(file, json.loads(file.read_text(encoding="utf-8")))
    result.facts["hardware"] = hardware()
    pairs, _ = read(graphs)
    try:
        if name == CHECK:
            fatal, poorer = lacks(pairs[0], file.parent)
            for lack in poorer:
                result.add(lack=lack)
            if fatal:
                raise BenchmarkError("; ".join(fatal))
            status, reason = "done", "; ".join(poorer) or "nothing is missing"
        else:
            status, reason = "done", STEPS[name](pairs, PRETENDED if standin else Sizes(), result)
    except Skipped as error:
        status, reason = "skipped", str(error)
    except Exception as error:  # whatever a library raises: the other steps are still worth their time
        status, reason = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    result.write(status, reason, seconds=round(time.monotonic() - begun, 1))


def _step(
    python: Path, name: str, graphs: Path, file: Path, facts: dict[str, Any], limit: float, standin: bool
) -> dict[str, Any]:
    """Run a step within its limit; its file, completed, whatever became of the process."""
    from rekd_train.files import write_json

    command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    facts = {**facts, "command": command, "limit_seconds": round(limit, 1)}
    write_json(file, {**facts, "status": "unfinished", "reason": ""})
    begun, ended = time.monotonic(), "no time is left"
    if limit > 1:
        arguments = [str(python), __file__, "step", name, str(graphs), str(file), *(["--standin"] if standin else [])]
        # fp16 attention would be cuDNN's on a recent card, and cuDNN refuses to pretend
        environment = os.environ | ({"ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0"} if standin else {})
        process = subprocess.Popen(arguments, stdout=sys.stderr, start_new_session=True, env=environment)
        try:
            code = process.wait(limit)
            ended = f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["status"] == "unfinished":
        found |= {"status": "stopped", "reason": f"{ended}; {len(found.get('cells', []))} cells are there"}
    found.setdefault("seconds", round(time.monotonic() - begun, 1))
    write_json(file, found)
    return found


if __name__ == "__main__":
    run(app)
