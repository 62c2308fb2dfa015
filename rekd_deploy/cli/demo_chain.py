"""The whole chain on real reviews or images: train, distil, export, serve, query, time, and say how it went.

Each step is the same function that the commands call; the steps meet on disk, under one directory. Finished work is
kept: a stage runs again only when its inputs change.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rekd_deploy
import rekd_train
from rekd_deploy.export.run import publish
from rekd_deploy.parity.reference import agreement
from rekd_deploy.repository.reader import read_description
from rekd_train.checkpoints import read_json
from rekd_train.checkpoints.checkpoint import read_metrics
from rekd_train.config.run import RunConfig, run_config
from rekd_train.errors import CheckpointError
from rekd_train.files import atomic_directory, sha256, write_json
from rekd_train.inputs.prediction import Prediction
from rekd_train.training.state import Observer

MODELS = ("classifier", "teacher", "student_without_teacher", "student")
BATCHES = (1, 8)
TEACHERS = Path(rekd_deploy.__file__).parents[1] / "benchmarks" / "teachers"


@dataclass(frozen=True)
class Subject:
    """What a demo is about: presets, what the examples are called, and what a rationale keeps."""

    student: str
    teacher: Path
    """What a teacher was recorded to say, its figures beside it as JSON."""
    items: str
    features: str
    labels: int = 2000
    """So many training examples have a label, for all but the teacher."""
    alone: tuple[str, ...] = ()
    """Changes for what learns without a teacher: from few labels, each seen more often."""
    taught: tuple[str, ...] = ()
    """Changes for what learns from the teacher, whose word keeps votes from being learnt by heart."""


REVIEWS = Subject(
    "demo_student", TEACHERS / "imdb.parquet", items="reviews", features="words",
    alone=("stages.classifier_epochs=8", "stages.selector_classifier_epochs=0", "stages.selector_warm_start=8",
           "stages.compact_epochs=4"),
    taught=("stages.compact_epochs=3",),
)  # fmt: skip
IMAGES = Subject(
    "demo_images_student", TEACHERS / "fashion_mnist.parquet", items="images", features="patches",
    alone=("stages.classifier_epochs=30", "stages.selector_warm_start=30", "stages.rationale_epochs=0.1",
           "stages.compact_epochs=30"),
)  # fmt: skip


@dataclass(frozen=True)
class Demo:
    """What a demo run is made from."""

    root: Path
    queries: int = 200
    """Held-out examples sent through the server."""
    overrides: tuple[str, ...] = ()
    """``key=value`` changes to the presets, for quick trials."""
    subject: Subject = REVIEWS


@dataclass
class Stages:
    """Named stages, each a directory under ``root``; ``announce`` is told each name, and whether it is reused.

    Beside it, ``<name>.stage.json`` holds the hash of the inputs that made it and the seconds it took; that file is
    written last, so an interrupted stage is simply not finished.
    """

    root: Path
    announce: Callable[[str, bool], None] = lambda name, reused: None
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, inputs: Any, make: Callable[[Path], object]) -> Path:
        """Make ``root/name`` unless it was made from the same inputs before.

        Args:
            inputs: anything JSON can hold that decides the outcome; of earlier stages, their ``key``.
            make: writes the directory it is given, atomically.
        """
        directory, record = self.root / name, self.root / f"{name}.stage.json"
        wanted = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        stored = self._stored(name)
        reused = directory.is_dir() and stored.get("inputs_sha256") == wanted
        self.announce(name, reused)
        if not reused:
            record.unlink(missing_ok=True)
            self.root.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            make(directory)
            stored = {"inputs_sha256": wanted, "seconds": round(time.perf_counter() - start, 2)}
            write_json(record, stored)
        self.seconds[name] = stored["seconds"]
        return directory

    def key(self, name: str) -> str:
        """Hash of a finished stage's inputs, for the inputs of a later one."""
        return self._stored(name)["inputs_sha256"]

    def _stored(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.root / f"{name}.stage.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}


def source_hash(package: Path) -> str:
    """SHA-256 over the Python sources of a package: a change of the code makes stages run again."""
    digest = hashlib.sha256()
    for path in sorted(Path(package).rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def run_demo(demo: Demo, stages: Stages, observer: Observer) -> dict[str, Any]:
    """Run what is not done yet and return the report, which is also in ``root/report.json``.

    CheckpointError: the recorded teacher, which the repository carries, is missing.
    """
    code, deployed = (source_hash(Path(package.__file__).parent) for package in (rekd_train, rekd_deploy))
    subject, said = demo.subject, demo.subject.teacher
    few = f"data.labelled_examples={subject.labels}"
    config = run_config(subject.student, [few, *subject.taught, *demo.overrides])
    alone = run_config(subject.student, [few, *subject.alone, *demo.overrides])
    if not said.is_file():
        raise CheckpointError(f"{said} does not exist; fix: run the demo where the repository was cloned")

    def train(name: str, config: RunConfig, start: str | None = None, teacher: Path | None = None) -> Path:
        from rekd_train.runs import train_run

        half = "predictor" if start else None
        inputs = [config.model_dump(), code, half, start and stages.key(start), teacher and sha256(teacher)]
        return stages.run(name, inputs, lambda path: train_run(
            config, path, warm_start=demo.root / start if start else None, half=half, teacher=teacher,
            observer=observer, overwrite=True,  # what lies there has other inputs
        ))  # fmt: skip

    train("classifier", _classifier(alone))
    train("student_without_teacher", alone, "classifier")
    checkpoint = train("student", config, "classifier", said)
    repository = stages.run(
        "model_repository", [code, deployed, stages.key("student")], lambda path: publish(checkpoint, path)
    )
    served = [code, deployed, stages.key("model_repository")]
    answers = stages.run(
        "answers", [*served, demo.queries], lambda path: _query(checkpoint, repository, config, demo.queries, path)
    )
    timed = stages.run("latency", served, lambda path: _time(checkpoint, repository, path))
    report: dict[str, Any] = {}
    for name in MODELS:
        found = read_json(said.with_suffix(".json")) if name == "teacher" else read_metrics(demo.root / name)
        report[name] = {key: found["test"][key] for key in ("accuracy", "rate")}
    report |= {"query": read_json(answers / "query.json"), "milliseconds": read_json(timed / "milliseconds.json")}
    report["seconds"] = stages.seconds
    write_json(demo.root / "report.json", report)
    return report


def served_predictions(demo: Demo) -> list[Prediction]:
    """The server's answers."""
    # not splitlines: reviews hold U+0085 and other characters that it takes for a line's end
    with open(demo.root / "answers" / "predictions.jsonl", encoding="utf-8", newline="\n") as lines:
        return [Prediction.from_dict(json.loads(line)) for line in lines]


def _classifier(config: RunConfig) -> RunConfig:
    """The plain classifier of the predictor's size, which a pair is measured against and its predictor starts from."""
    plain = {"masked_share": 0.0, "rationale_epochs": 0.0, "compact_epochs": 0.0}
    stages = config.stages.model_copy(update=plain)
    return config.model_copy(update={"name": config.name.replace("student", "classifier"), "stages": stages})


def _time(checkpoint: Path, repository: Path, output: Path) -> None:
    """Milliseconds of the pair and of the classifier of its predictor's size, side by side on ONNX Runtime."""
    from rekd_deploy.bench.latency import measure_latency
    from rekd_deploy.bench.variants import CLASSIFIER, COMPACTED, ONNX_CPU

    settings = read_description(repository).preprocessor().settings
    figures, _ = measure_latency(
        [repository], checkpoint, batches=BATCHES, lengths=settings.buckets[-1:] if settings.kind == "text" else (),
        rounds=40, without=("PyTorch", "torch.compile", "zeroed"),
    )  # fmt: skip
    found: dict[str, Any] = {"length": figures["cells"][0]["length"]}
    for cell in figures["cells"]:
        found[str(cell["batch"])] = {
            way["model"]: way["milliseconds"]["p50"] for way in cell["ways"]
            if way["runtime"] == ONNX_CPU and (way["model"], way["graphs"]) in ((COMPACTED, 2), (CLASSIFIER, 1))
        }  # fmt: skip
    with atomic_directory(output) as work:
        write_json(work / "milliseconds.json", found)


def _query(checkpoint: Path, repository: Path, config: RunConfig, count: int, output: Path) -> None:
    """Send the same requests to the server, the in-process pipeline and the PyTorch model."""
    from rekd_deploy import Client, Pipeline, TritonServer
    from rekd_train.checkpoints.checkpoint import load
    from rekd_train.data import LabelledTexts, load_data

    test = load_data(config.data).splits["test"].head(count)
    items = test.texts if isinstance(test, LabelledTexts) else list(test.images)
    served: list[Prediction] = []
    milliseconds: list[float] = []
    with TritonServer(repository, 0, 0, 0) as server, Client(server.grpc_url) as client:
        client.predict(items[:1])
        for item in items:
            start = time.perf_counter()
            served += client.predict([item])
            milliseconds.append((time.perf_counter() - start) * 1000)
    with Pipeline(repository) as pipeline:
        local = pipeline.predict(items)
    model = load(checkpoint)
    figures = {
        "p50_ms": round(statistics.median(milliseconds), 3),
        "n": len(served),
        "accuracy": sum(p.label == model.labels[y] for p, y in zip(served, test.labels, strict=True)) / len(served),
        "agree_pipeline": agreement(served, local, model.policy.bias),
        "agree_torch": agreement(served, model.predict(items), model.policy.bias),
    }
    with atomic_directory(output) as work:
        write_json(work / "query.json", figures)
        lines = [json.dumps(p.to_dict(), ensure_ascii=False) + "\n" for p in served]
        (work / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
