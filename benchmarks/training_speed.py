"""What makes training fast, and what each part of it is worth.

Every stage of a student's run is timed with all accelerations on, with each one alone switched off, and with all off.
One round runs every variant once, in an order that turns from round to round, so that a machine that slows down slows
all of them; figures are medians over the rounds. A stage's clock starts after a few warm-up steps and stops when the
device has finished the last. Weights are random: they do not change the speed. The teacher's pass over the data, once a
run, is timed apart.

    python benchmarks/training_speed.py
    python benchmarks/training_speed.py --student minilm_student --teacher minilm_teacher --device cuda --steps 60
    python benchmarks/training_speed.py --steps 6 --rounds 1 --examples 200 --output /tmp/smoke.json
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from _models import environment

from rekd_train.cli.command import application, examples, print_json, run
from rekd_train.config.run import RunConfig, run_config

RESULT = Path(__file__).parent / "results" / "training_speed.json"
SWITCHES: dict[str, dict[str, Any]] = {
    "length_buckets": {"length_buckets": False},
    "bf16": {"precision": "fp32"},
}
"""Acceleration -> the settings that switch it off."""
ALL, NONE = "all on", "all off"
STAGES = ("classifier", "distillation", "compact")

app = application(
    help="Time every training stage with its accelerations on and off.",
    epilog=examples("training_speed.py", "training_speed.py --student minilm_student --teacher minilm_teacher"),
)


@app.command()
def training_speed(
    student: Annotated[str, typer.Option(metavar="PRESET|FILE.toml", help="The pair that is timed.")] = "equal_student",
    teacher: Annotated[str, typer.Option(metavar="PRESET|FILE.toml", help="Its teacher's sizes.")] = "demo_teacher",
    count: Annotated[int, typer.Option("--examples", min=64, help="Training examples.")] = 4000,
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each stage.")] = 40,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every variant runs.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change both configurations.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = RESULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of a table.")] = False,
) -> None:
    """Measure, write the figures and print them."""
    from rekd_train.files import write_json
    from rekd_train.training.runtime import Runtime

    runtime = Runtime(device)
    configs = [run_config(source, overrides or []) for source in (student, teacher)]
    variants = _variants(runtime.device.type == "cuda")
    work = Work(*configs, count, steps, warmup, runtime)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(work.measure(variants[name]))
            typer.echo(f"round {turn + 1}/{rounds}: {name}", err=True)
    result = {
        "command": shlex.join(["python", "benchmarks/training_speed.py", *sys.argv[1:]]),
        "hardware": environment(str(runtime.device)),
        "settings": {
            "student": configs[0].name, "teacher": configs[1].name, "examples": count, "timed_steps": steps,
            "warmup_steps": warmup, "rounds": rounds, "batch_size": configs[0].optimisation.batch_size,
        },
        "variants": {name: _medians(readings) for name, readings in found.items()},
    }  # fmt: skip
    result["worth"] = _worth(result["variants"])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    if as_json:
        print_json(result)
    else:
        _show(result)


def _variants(gpu: bool) -> dict[str, dict[str, Any]]:
    """Name -> acceleration settings; bf16 is an acceleration on a GPU only."""
    switches = {name: off for name, off in SWITCHES.items() if gpu or name != "bf16"}
    everything: dict[str, Any] = {}
    for off in switches.values():
        everything |= off
    return {ALL: {}, **{f"without {name}": off for name, off in switches.items()}, NONE: everything}


class Work:
    """A student, a teacher and their data, ready to be trained again and again."""

    def __init__(self, student: RunConfig, teacher: RunConfig, count: int, steps: int, warmup: int, runtime) -> None:
        from rekd_train.data import encode_splits, load_data
        from rekd_train.models.families import fresh_pair, preprocessor_for

        # dev only calibrates here
        short = {"train_examples": count, "dev_examples": 100, "test_examples": 1}
        self._config = student.model_copy(update={"data": student.data.model_copy(update=short)})
        data = load_data(self._config.data)
        preprocessor = preprocessor_for(self._config)
        self._splits = encode_splits(data, preprocessor, self._config.data)
        self._labels, self._preprocessor = data.label_names, preprocessor
        self._teacher = fresh_pair(teacher, preprocessor, data.label_names).to(runtime.device).eval()
        self._runtime, self._warmup = runtime, warmup
        epochs = (steps + warmup) * student.optimisation.batch_size / len(self._splits["train"])
        self._stages = {
            "classifier_epochs": epochs, "rationale_epochs": epochs, "compact_epochs": epochs, "evaluate_every": 0.0,
            "selector_warm_start": 0.0, "collapse_window": 10**6,
        }  # fmt: skip

    def measure(self, acceleration: dict[str, Any]) -> dict[str, Any]:
        """Run every stage once."""
        from rekd_train.models.families import fresh_pair
        from rekd_train.training.stages import fit

        config = self._config.model_copy(
            update={
                "stages": self._config.stages.model_copy(update=self._stages),
                "acceleration": self._config.acceleration.model_copy(update=acceleration),
            }
        )
        pair = fresh_pair(config, self._preprocessor, self._labels).to(self._runtime.device)
        clock = Clock(self._runtime, self._warmup, config.optimisation.batch_size)
        train, dev = self._splits["train"], self._splits["dev"]
        fit(config, pair, train, dev, teacher=self._teacher, observer=clock, runtime=self._runtime)
        seconds = self._teacher_pass(config) if not train.augmented else None
        return {"stages": clock.stages, "teacher_pass_seconds": seconds}

    def _teacher_pass(self, config: RunConfig) -> float:
        from rekd_train.training.teacher import Teacher

        begun = _now(self._runtime)
        Teacher(self._teacher, self._runtime, config.acceleration.precision, self._splits["train"])
        return _now(self._runtime) - begun


class Clock:
    """An observer that times the steps after the warm-up, waiting for the device at the two ends only."""

    def __init__(self, runtime, warmup: int, batch_size: int) -> None:
        self._runtime, self._warmup, self._batch_size = runtime, warmup, batch_size
        self.stages: dict[str, dict[str, float | None]] = {}

    def stage(self, name: str, steps: int, start: int = 0) -> None:
        self._name, self._steps, self._done = name, steps, 0
        _forget_peak(self._runtime)
        self._begun = _now(self._runtime)

    def step(self, values: dict[str, float]) -> None:
        self._done += 1
        if self._done == self._warmup:
            self._begun = _now(self._runtime)
        if self._done == self._steps:
            seconds = _now(self._runtime) - self._begun
            examples = (self._steps - self._warmup) * self._batch_size
            self.stages[self._name] = {"examples_per_second": examples / seconds, "peak_mb": _peak(self._runtime)}

    def evaluated(self, values: dict[str, float]) -> None:
        pass


def _now(runtime) -> float:
    if runtime.device.type == "cuda":
        import torch

        torch.cuda.synchronize(runtime.device)
    return time.perf_counter()


def _forget_peak(runtime) -> None:
    if runtime.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(runtime.device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak resident size starts anew
        except OSError:
            return


def _peak(runtime) -> float | None:
    """Megabytes: allocated on the GPU, or resident in the process's memory."""
    if runtime.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(runtime.device) / 1e6
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")), None)


def _medians(readings: list[dict[str, Any]]) -> dict[str, Any]:
    stages = {}
    for stage in STAGES:
        speeds = [reading["stages"][stage]["examples_per_second"] for reading in readings]
        peaks = [reading["stages"][stage]["peak_mb"] for reading in readings]
        stages[stage] = {
            "examples_per_second": round(statistics.median(speeds), 1),
            "all_examples_per_second": [round(speed, 1) for speed in speeds],
            "peak_mb": None if None in peaks else round(statistics.median(peaks), 1),
        }
    passes = [reading["teacher_pass_seconds"] for reading in readings]
    return {"stages": stages, "teacher_pass_seconds": None if None in passes else round(statistics.median(passes), 3)}


def _worth(variants: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times faster each stage is with everything on than in each variant."""
    speed = {
        name: {stage: values["examples_per_second"] for stage, values in found["stages"].items()}
        for name, found in variants.items()
    }
    return {
        name: {stage: round(speed[ALL][stage] / speeds[stage], 3) for stage in STAGES}
        for name, speeds in speed.items() if name != ALL
    }  # fmt: skip


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    hardware = "; ".join(f"{key} {value}" for key, value in result["hardware"].items())
    table = Table("variant", title=f"examples/s and peak MB, medians; {hardware}", title_justify="left")
    for stage in STAGES:
        table.add_column(stage, justify="right")
    for name, found in result["variants"].items():
        cells = []
        for stage in STAGES:
            values = found["stages"][stage]
            ratio = "" if name == ALL else f"  /{result['worth'][name][stage]:.2f}"
            cells.append(f"{values['examples_per_second']:.0f}{ratio}  {values['peak_mb'] or 0:.0f} MB")
        table.add_row(name, *cells)
    console = Console()
    console.width = max(console.width, 132)
    console.print(table)
    seconds = result["variants"][ALL]["teacher_pass_seconds"]
    if seconds is not None:
        typer.echo(f"the teacher's pass over {result['settings']['examples']} examples: {seconds:.2f} s, once a run")


if __name__ == "__main__":
    run(app)
