"""The whole evidence about one trained pair, by the commands a user has: export, accuracy, latency, load, faithfulness.

    python benchmarks/student_report.py runs/demo/student --name demo
    python benchmarks/student_report.py runs/demo-images/student --name demo_images

Every measurement is a result file in ``results/NAME``; ``report.html`` and ``report.md`` there are made of them.
``precisions.json`` holds what the parity gate found for each precision. ``--steps`` repeats some alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import typer
from _models import environment

from rekd_train.cli.command import application, examples, run
from rekd_train.files import write_json, write_text

RESULTS = Path("benchmarks/results")
PRECISIONS = ("fp32", "fp16", "int8")
"""What ``rekd-export`` offers for a CPU."""
STEPS = ("export", "accuracy", "faithfulness", "latency", "serving", "report")

app = application(
    help="Measure everything about one trained pair, and write the report.",
    epilog=examples(
        "student_report.py runs/demo/student --name demo",
        "student_report.py runs/demo/student --name demo --steps serving,report",
    ),
)


@app.command()
def student_report(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="The pair.")],
    name: Annotated[str, typer.Option(help="Folder of the results.")],
    teacher: Annotated[Path | None, typer.Option(help="Gives the size of a larger plain classifier.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "What the rationales cost, and are worth",
    work: Annotated[Path, typer.Option(help="Folder of the repositories.")] = Path("runs/student_report"),
    steps: Annotated[str, typer.Option(help=f"With commas, of {', '.join(STEPS)}.")] = ",".join(STEPS),
) -> None:
    """Measure everything about one trained pair, and write the report."""
    chosen = steps.split(",")
    if unknown := set(chosen) - set(STEPS):
        raise typer.BadParameter(f"no step '{sorted(unknown)[0]}'; steps: {', '.join(STEPS)}", param_hint="--steps")
    checkpoint, teacher, work = map(_from_root, (checkpoint, teacher, work))
    os.chdir(ROOT)  # so that the commands in the results name no machine's paths
    results, repositories = RESULTS / name, work / name
    results.mkdir(parents=True, exist_ok=True)
    repositories.mkdir(parents=True, exist_ok=True)
    fp32, config = repositories / "fp32", _config(checkpoint, repositories)
    larger = ["--teacher", teacher] if teacher else []
    if "export" in chosen:
        _export(checkpoint, repositories, results / "precisions.json")
    if "accuracy" in chosen:
        for precision in PRECISIONS:
            output = results / f"accuracy_{precision}.json"
            _bench("accuracy", repositories / precision, "--checkpoint", checkpoint, "--output", output)
    if "faithfulness" in chosen:
        output = results / "faithfulness.json"
        _bench("faithfulness", fp32, "--checkpoint", checkpoint, "--judge", repositories / "judge", "--output", output)
    if "latency" in chosen:
        precisions = [repositories / precision for precision in ("fp32", "int8")]
        output = results / "latency.json"
        _bench("latency", *precisions, "--checkpoint", checkpoint, *larger, "--output", output)
    if "serving" in chosen:
        load = ["--batches", "1,2,4", "--seconds", "8", "--turns", "4", "--rounds", "200"]
        _bench("serving", fp32, "--data", config, *load, "--output", results / "serving.json")
    if "report" in chosen:
        order = ["accuracy_fp32", "accuracy_int8", "accuracy_fp16", "latency", "serving", "faithfulness"]
        found = [path for each in order if (path := results / f"{each}.json").is_file()]
        _bench("report", *found, "--output", results / "report.html", "--title", title)


def _from_root(path: Path | None) -> Path | None:
    return path and Path(os.path.relpath(path, ROOT))


def _export(checkpoint: Path, repositories: Path, output: Path) -> None:
    """Repositories of every precision, and what the gate found for each."""
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        extra = ["--single-graph"] if precision == "fp32" else []
        target = repositories / precision
        _command("rekd-export", checkpoint, "--output", target, "--precision", precision, *extra)
        parity = json.loads((target / "manifest.json").read_text(encoding="utf-8"))["parity"]
        found[precision] = parity
    hardware = environment("cpu")
    command = f"python benchmarks/student_report.py {checkpoint} --name {output.parent.name} --steps export"
    write_json(output, {"command": command, "hardware": hardware, "precisions": found})


def _config(checkpoint: Path, repositories: Path) -> Path:
    """The data that the checkpoint records, as a file for --data."""
    from rekd_train.checkpoints.recorded import recorded_config

    data = recorded_config(checkpoint, None, ()).data.model_dump(mode="json", exclude_defaults=True)
    path = repositories / "data.toml"
    write_text(path, "\n".join(["[data]", *(f"{key} = {json.dumps(value)}" for key, value in data.items())]) + "\n")
    return path


def _bench(kind: str, *arguments: Any) -> None:
    """A measurement; that a check of it failed is for the report to tell."""
    output = Path(arguments[arguments.index("--output") + 1])
    output.unlink(missing_ok=True)
    _command("rekd-bench", kind, *arguments, allowed=(0, 1))
    if not output.is_file():
        raise typer.Exit(1)


def _command(program: str, *arguments: Any, allowed: Sequence[int] = (0,)) -> None:
    line = [program, *map(str, arguments)]
    typer.echo(f"$ {' '.join(line)}", err=True)
    line[0] = str(Path(sys.executable).with_name(program))
    if (code := subprocess.run(line).returncode) not in allowed:
        raise typer.Exit(code)


if __name__ == "__main__":
    run(app)
