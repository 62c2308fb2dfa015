"""The whole chain on real reviews or images: train, distil, export, serve, query, and say how it went.

Each step is the same function that the commands call; the steps meet on disk, under one directory.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rekd_deploy
import rekd_train
from rekd_deploy.cli.stages import Stages, source_hash
from rekd_deploy.export.run import publish
from rekd_deploy.parity.reference import agreement
from rekd_train.checkpoints.checkpoint import read_metrics
from rekd_train.config.run import RunConfig, run_config
from rekd_train.files import atomic_directory, write_json
from rekd_train.inputs.prediction import Prediction
from rekd_train.training.observers import Observer

MODELS = ("classifier", "teacher", "student_without_teacher", "student")


@dataclass(frozen=True)
class Subject:
    """What a demo is about."""

    student: str
    """Preset."""
    teacher: str
    """Preset."""
    items: str
    """What the examples are called."""
    features: str
    """What a rationale keeps."""
    evaluated: bool
    """Whether the full report of ``rekd-train evaluate`` is made as well."""


REVIEWS = Subject("demo_student", "demo_teacher", items="reviews", features="words", evaluated=False)
IMAGES = Subject("demo_images_student", "demo_images_teacher", items="images", features="patches", evaluated=True)


@dataclass(frozen=True)
class Demo:
    """What a demo run is made from."""

    root: Path
    queries: int = 200
    """Held-out examples sent through the server."""
    overrides: tuple[str, ...] = ()
    """``key=value`` changes to both presets, for quick trials."""
    subject: Subject = REVIEWS


def run_demo(demo: Demo, stages: Stages, observer: Observer) -> dict[str, Any]:
    """Run what is not done yet and return the report, which is also in ``root/report.json``."""
    code = source_hash([Path(rekd_train.__file__).parent])
    student, teacher = (run_config(name, demo.overrides) for name in (demo.subject.student, demo.subject.teacher))

    def train(name: str, config: RunConfig, **links: str) -> Path:
        from rekd_train.runs import train_run

        paths = {role: demo.root / stage for role, stage in links.items()}
        inputs = [config.model_dump(), code, {role: stages.key(stage) for role, stage in links.items()}]
        options = {"observer": observer, "overwrite": True}  # what lies there was made from other inputs
        return stages.run(name, inputs, lambda path: _discard(train_run(config, path, **options, **paths)))

    train("classifier", _only_classifier(student, masked_share=0.0))
    train("warm_start", _only_classifier(student))
    train("teacher", teacher)
    train("student_without_teacher", student, warm_start="warm_start")
    checkpoint = train("student", student, warm_start="warm_start", teacher="teacher")

    if demo.subject.evaluated:
        stages.run("evaluation", [code, stages.key("student")], lambda path: _evaluate(checkpoint, demo, path))
    deployed = [code, source_hash([Path(rekd_deploy.__file__).parent])]
    repository = stages.run(
        "model_repository", [*deployed, stages.key("student")], lambda path: _discard(publish(checkpoint, path))
    )
    answers = stages.run(
        "answers",
        [*deployed, stages.key("model_repository"), demo.queries],
        lambda path: _query(checkpoint, repository, student, demo.queries, path),
    )
    report = {name: _figures(demo.root / name) for name in MODELS}
    report["query"] = json.loads((answers / "query.json").read_text(encoding="utf-8"))
    if demo.subject.evaluated:
        report["evaluation"] = json.loads((demo.root / "evaluation" / "report.json").read_text(encoding="utf-8"))
    report["seconds"] = stages.seconds
    write_json(demo.root / "report.json", report)
    return report


def served_predictions(demo: Demo) -> list[Prediction]:
    """The server's answers."""
    # not splitlines: reviews hold U+0085 and other characters that it takes for a line's end
    with open(demo.root / "answers" / "predictions.jsonl", encoding="utf-8", newline="\n") as lines:
        return [Prediction.from_dict(json.loads(line)) for line in lines]


def _only_classifier(config: RunConfig, **changes: float) -> RunConfig:
    """The first stage alone; with ``masked_share=0`` it is a plain classifier that reads everything."""
    stages = config.stages.model_copy(update={"rationale_epochs": 0.0, "compact_epochs": 0.0, **changes})
    return config.model_copy(update={"name": config.name.replace("student", "classifier"), "stages": stages})


def _evaluate(checkpoint: Path, demo: Demo, output: Path) -> None:
    from rekd_train.runs import evaluate_run

    report = evaluate_run(checkpoint, draws=0, teacher=demo.root / "teacher")
    with atomic_directory(output) as work:
        write_json(work / "report.json", report)


def _query(checkpoint: Path, repository: Path, config: RunConfig, count: int, output: Path) -> None:
    """Ask the server, the in-process pipeline and the PyTorch model the same."""
    from rekd_deploy import Client, Pipeline, TritonServer
    from rekd_train.checkpoints.checkpoint import load
    from rekd_train.data import LabelledTexts, load_data

    test = load_data(config.data).splits["test"].head(count)
    items = test.texts if isinstance(test, LabelledTexts) else list(test.images)
    served: list[Prediction] = []
    milliseconds: list[float] = []
    with (
        TritonServer(repository, grpc_port=0, http_port=0, metrics_port=0) as server,
        Client(server.grpc_url) as client,
    ):
        client.predict(items[:1])
        for item in items:
            start = time.perf_counter()
            served += client.predict([item])
            milliseconds.append((time.perf_counter() - start) * 1000)
    with Pipeline(repository) as pipeline:
        local = pipeline.predict(items)
    model = load(checkpoint)
    names = model.labels
    figures = {
        "p50_ms": round(statistics.median(milliseconds), 3),
        "n": len(served),
        "accuracy": sum(p.label == names[y] for p, y in zip(served, test.labels, strict=True)) / len(served),
        "agree_pipeline": agreement(served, local, model.policy.bias),
        "agree_torch": agreement(served, model.predict(items), model.policy.bias),
    }
    with atomic_directory(output) as work:
        write_json(work / "query.json", figures)
        lines = [json.dumps(p.to_dict(), ensure_ascii=False) + "\n" for p in served]
        (work / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")


def _figures(checkpoint: Path) -> dict[str, float]:
    test = read_metrics(checkpoint)["test"]
    return {"accuracy": test["accuracy"], "rate": test["rate"]}


def _discard(_: object) -> None:
    """Stages are judged by what they write."""
