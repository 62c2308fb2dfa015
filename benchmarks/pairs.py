"""What a pair gives and what it costs, beside the plain classifier of its predictor's size: accuracy against time.

Resumable as ``imdb_table.py`` is: finished cells are skipped. Students learn from what a teacher was recorded to say
(``teachers/``); every table has the pair alone, distilled, and distilled in the paper's way.

    python benchmarks/pairs.py --setting reviews --jobs 2
    python benchmarks/pairs.py --setting few --seeds 2026
    python benchmarks/pairs.py --setting minilm --only distilled
    python benchmarks/pairs.py --setting reviews --times           # when the machine has nothing else to do
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the code whose hash is recorded is the code that runs

import typer
from _cells import Cell
from _models import environment
from _pareto import picture
from _recipes import Rows, changed, chosen, run_table, seeds_of
from _tables import accuracy_table, comparison_table, provenance

from rekd_deploy.cli.demo_chain import IMAGES, REVIEWS
from rekd_train.cli.command import application, examples, run
from rekd_train.config.run import RunConfig, run_config
from rekd_train.files import sha256, write_json

RESULTS, TEACHERS = Path("benchmarks/results/pairs"), Path("benchmarks/teachers")
PLAIN = {"masked_share": 0.0, "selector_classifier_epochs": 0.0, "rationale_epochs": 0.0, "compact_epochs": 0.0}
PAPER = {"operator": "zero", "classifier_epochs": 2.0, "rationale_epochs": 1.0, "compact_epochs": 2.0}
SELECTORS = {
    "1x64": {
        "selector": {"family": "transformers", "layers": 1, "width": 64, "heads": 2, "feedforward": 128, "dropout": 0.0,
                     "buckets": 131_072, "word_embeddings": "minilm"},
        "optimisation": {"selector_learning_rate": 1e-3},
    },
}  # fmt: skip
"""Selectors beside the preset's; a transformer's learnt by heart after two epochs of its votes."""
BATCHES = (1, 8)
INT8 = ("int8 fused", "int8")
"""Graphs that ``quantize_dynamic`` gets."""


@dataclass(frozen=True)
class Setting:
    """A preset, what is changed in it, and what its teacher was recorded to say."""

    title: str
    preset: str
    knowledge: str
    changes: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    """What is changed in models without a teacher: where labels are few, they see their few texts more often."""
    taught: tuple[str, ...] = REVIEWS.taught
    """What is changed in pairs that learn from one."""
    selectors: tuple[str, ...] = ()
    checkpoints: tuple[str, str] | None = None
    """Of ``teachers.py``: the plain classifier, where pairs alone start, and the teacher, where distilled ones do.
    None: the classifier is trained here, and all start from it."""


SETTINGS = {
    "reviews": Setting("IMDB, predictor 2 x 128", "demo_student", "imdb.parquet"),
    "few": Setting(
        "IMDB, predictor 2 x 128, 2,000 labels; the teacher has seen all", "demo_student", "imdb.parquet",
        changes=(f"data.labelled_examples={REVIEWS.labels}",), alone=REVIEWS.alone, selectors=tuple(SELECTORS),
    ),
    "images": Setting(
        "Fashion-MNIST, predictor 2 x 64, 2,000 labels; the teacher has seen all", "demo_images_student",
        "fashion_mnist.parquet", changes=(f"data.labelled_examples={IMAGES.labels}",), alone=IMAGES.alone,
        taught=IMAGES.taught,
    ),
    "minilm": Setting(
        "IMDB, predictor MiniLM-L6, all labels; the teacher's own predictor", "demo_student", "imdb.parquet",
        changes=(
            "predictor.pretrained=minilm", "predictor.word_embeddings=random", "predictor.layers=6",
            "predictor.width=384", "predictor.heads=12", "predictor.feedforward=1536", "predictor.dropout=0.1",
            "predictor.pooling=mean", "optimisation.learning_rate=3e-5", "stages.compact_epochs=0.4",
        ),
        taught=(), checkpoints=("runs/teachers/imdb_teacher_classifier", "runs/teachers/imdb_teacher"),
    ),
}  # fmt: skip
Name = Enum("Name", {name: name for name in SETTINGS}, type=str)
COMPARISONS = [
    ("distilled", "alone", "Does distillation pay? distilled - alone"),
    ("distilled", "cls", "What does the rationale cost? distilled - plain classifier"),
    ("distilled", "cls_kd", "... distilled - plain classifier that is distilled, too"),
    ("distilled", "paper", "gathered features - the paper's way, both distilled"),
]

app = application(
    help="Train and time pairs beside the classifiers they replace, and write a table.",
    epilog=examples("pairs.py --setting reviews --jobs 2", "pairs.py --setting reviews --times"),
)


@app.command()
def pairs(
    setting: Annotated[Name, typer.Option(help="Which data, predictor and teacher.")] = Name.reviews,
    seeds: Annotated[str, typer.Option(help="Of weights, order and noise.")] = "2026,2027,2028",
    jobs: Annotated[int, typer.Option(min=1, help="Cells side by side, each a process.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    only: Annotated[str, typer.Option(help="Names of cells, with commas; what they need comes along.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the preset.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the result files and the table.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("runs/pairs"),
    times: Annotated[bool, typer.Option("--times", help="Train nothing; time the pairs of the first seed.")] = False,
    table_only: Annotated[bool, typer.Option("--table-only", help="Train nothing, write the table.")] = False,
    any_code: Annotated[
        bool, typer.Option("--any-code", help="Cells that an older state of the code has finished are finished.")
    ] = False,
) -> None:
    """Train and measure what is not finished, or time what is, and write the table."""
    name, given, numbers = setting.value, SETTINGS[setting.value], seeds_of(seeds)
    config = run_config(given.preset, [*given.changes, *(overrides or [])])
    cells = [cell for seed in numbers for cell in cells_of(given, seed, overrides or [])]
    command = shlex.join(["python", "benchmarks/pairs.py", "--setting", name, "--seeds", seeds,
                          *(part for value in overrides or [] for part in ("--set", value))])  # fmt: skip
    timed = results / f"{name}_times.json"
    if times:
        pairs = [cell for cell in chosen(cells, only) if cell.seed == numbers[0] and cell.name.startswith("distilled")]
        write_json(timed, {
            "command": f"{command} --times", "hardware": environment("cpu"),
            "pairs": {cell.name: measured_times(work / name / cell.identity) for cell in pairs},
        })  # fmt: skip

    def render(found) -> list[str]:
        rows = rows_of(given, config)
        pictured = picture(found, timed, results / f"{name}.svg")
        return [
            f"# {given.title}", "",
            "Test examples, noise-free by the stored rule, compacted; mean ± standard deviation over seeds.", "",
            *accuracy_table(found, rows), "", "## Differences", "", *comparison_table(found, COMPARISONS), "",
            *pictured, "## How it was made", "", *provenance(found, command),
        ]  # fmt: skip

    run_table(
        cells, render, results=results / name, work=work / name, jobs=jobs, device=device, draws=0, only=only,
        table_only=table_only or times, any_code=any_code,
    )  # fmt: skip


def cells_of(given: Setting, seed: int, overrides: Sequence[str] = ()) -> list[Cell]:
    """One seed: the plain classifier, which is every predictor's start, and the pairs, alone and distilled."""
    said = {"knowledge": str(TEACHERS / given.knowledge), "sha256": sha256(ROOT / TEACHERS / given.knowledge)}
    config, alone, taught = (run_config(given.preset, [*given.changes, *more, *overrides])
                             for more in ((), given.alone, given.taught))  # fmt: skip

    trained = {"warm_start": "cls"} if given.checkpoints is None else {}
    starts = [{} if path is None else {"warm_start": path, "brief": True} for path in given.checkpoints or (None, None)]

    def pair(suffix: str, alone: dict[str, Any], taught: dict[str, Any]) -> list[Cell]:
        half = {"half": "predictor"}
        return [
            Cell(f"alone{suffix}", seed, "train", alone, trained, half | starts[0]),
            Cell(f"distilled{suffix}", seed, "train", taught, trained, half | said | starts[1]),
        ]

    own = pair("", changed(alone, seed), changed(taught, seed))
    whole = {"selector_classifier_epochs": 0.0}  # all of a transformer learns from the votes, as its recipe was found
    others = [cell for name in given.selectors for cell in pair(
        f"_{name}", changed(alone, seed, **SELECTORS[name], stages=whole),
        changed(taught, seed, **SELECTORS[name], stages=whole | {"selector_warm_start": 2.0}))]  # fmt: skip
    if given.checkpoints is not None:  # the record's hash in the cells of distilled pairs tells teachers apart
        return [Cell("cls", seed, "given", None, {}, {"checkpoint": given.checkpoints[0]}), *own, *others]
    # nobody reads a plain classifier's selector, but the predictor's random start follows its draws: it stays that of
    # the finished cells, whatever the preset's
    plain = {**SELECTORS[given.selectors[0]], "stages": PLAIN} if given.selectors else {"stages": PLAIN}
    return [
        Cell("cls", seed, "train", changed(alone, seed, **plain)),
        Cell("cls_kd", seed, "train", changed(config, seed, **plain, distillation={"classifier": True}), {}, said),
        *own,
        Cell("paper", seed, "train", changed(config, seed, stages=PAPER), {}, said),
        *others,
    ]


def rows_of(given: Setting, config: RunConfig) -> Rows:
    """Titles and targets of those cells."""
    target, sizes = config.selection.target, [(name, f"_{name}") for name in given.selectors]
    own = "n-grams" if config.selector.family == "ngrams" else f"{config.selector.layers}x{config.selector.width}"
    pairs = [
        (f"{kind}{suffix}", f"pair, selector {name.replace('x', ' x ')}, {kind}", target)
        for name, suffix in [(own, ""), *sizes] for kind in ("alone", "distilled")
    ]  # fmt: skip
    plain = ("cls", "plain classifier of the predictor's size", None)
    if given.checkpoints is not None:
        return [plain, *pairs]
    return [
        plain, ("cls_kd", "plain classifier, distilled", None), *pairs,
        ("paper", "pair, distilled the paper's way (zeroed words, then compacted)", target),
    ]  # fmt: skip


def measured_times(checkpoint: Path) -> dict[str, Any]:
    """Median milliseconds of a pair's two graphs and of the classifier of its predictor's size, side by side.

    All on ONNX Runtime, texts of the greatest length. Predictor and classifier are also timed in dynamic int8, what
    ``quantize_dynamic`` makes of them, fused or not, whichever is faster; the selector stays as it is.
    """
    from onnx import TensorProto
    from onnxruntime.quantization import quantize_dynamic

    from rekd_deploy.bench.latency import full_batches
    from rekd_deploy.bench.timing import in_rounds, percentiles
    from rekd_deploy.bench.variants import CLASSIFIER, COMPACTED, all_kept, networks_of
    from rekd_deploy.graphs.modules import pair_signature
    from rekd_deploy.graphs.tracing import traced_graphs
    from rekd_deploy.runtimes.base import RunnerChain
    from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
    from rekd_train.checkpoints.checkpoint import load

    networks = {each.model: each.pair for each in networks_of(load(checkpoint))}
    preprocessor = networks[COMPACTED].preprocessor
    with ExitStack() as stack:
        chains: dict[str, Any] = {}

        def add(name: str, model: str, graphs: dict[str, Any], roles: tuple[str, ...]) -> None:
            signature = pair_signature(networks[model])
            runners = [OnnxRuntimeRunner(graphs[role], signature.graph(role), f"{name} {role}") for role in roles]
            chains[name] = stack.enter_context(RunnerChain(runners)), signature.graph(roles[0])

        def int8(graph: Any) -> bytes:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            # shape inference does not know what fused nodes give
            quantize_dynamic(graph, folder / "int8.onnx", extra_options={"DefaultTensorType": TensorProto.FLOAT})
            return (folder / "int8.onnx").read_bytes()

        pairs, classifiers = ([traced_graphs(networks[model], fused=fused) for fused in (True, False)]
                              for model in (COMPACTED, CLASSIFIER))  # fmt: skip
        selector = pairs[0]["selector"].SerializeToString()
        both = {"selector": selector, "predictor": pairs[0]["predictor"].SerializeToString()}
        add("pair", COMPACTED, both, ("selector", "predictor"))
        add("classifier", CLASSIFIER, {"predictor": classifiers[0]["predictor"].SerializeToString()}, ("predictor",))
        for way, pair, classifier in zip(INT8, pairs, classifiers, strict=True):
            both = {"selector": selector, "predictor": int8(pair["predictor"])}
            add(f"pair, {way}", COMPACTED, both, ("selector", "predictor"))
            add(way, CLASSIFIER, {"predictor": int8(classifier["predictor"])}, ("predictor",))
        cells = {}
        for batch in BATCHES:
            inputs = full_batches(preprocessor, batch, preprocessor.positions)
            ways = {}
            for name, (chain, signature) in chains.items():
                own = inputs if name.startswith("pair") else [all_kept(each, signature) for each in inputs]
                ways[name] = lambda turn, run=chain.run, own=own: run(own[turn % len(own)])
            timings = in_rounds(ways, rounds=120 // batch, warmup_seconds=1.0)
            medians = {name: percentiles(timings.milliseconds[name]) for name in ways}
            best, peer = (min((f"{start}{way}" for way in INT8), key=lambda each: medians[each]["p50"])
                          for start in ("pair, ", ""))  # fmt: skip
            cells[str(batch)] = {
                "milliseconds": medians, "ratio": timings.ratio("pair", "classifier"),
                "ratio_int8": timings.ratio("pair", peer), "ratio_both_int8": timings.ratio(best, peer),
            }  # fmt: skip
    return cells


if __name__ == "__main__":
    run(app)
