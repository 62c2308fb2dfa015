"""Blocks of figures about the demo: the README, and the precisions of its student."""

from __future__ import annotations

from typing import Any

from _blocks import block, listed, read

_MODELS = {
    "classifier": "plain classifier of the predictor's size, reads everything",
    "student_without_teacher": "pair, without a teacher",
    "student": "pair, distilled",
    "teacher": "its teacher, which had all labels",
}
_TIMED = {"classifier": "classifier", "student_without_teacher": "compacted", "student": "compacted"}


@block("demo.json", "demo_images.json")
def demo() -> list[str]:
    lines = []
    for name, kept, data in (
        ("demo", "words", "held-out IMDB reviews"), ("demo_images", "patches", "test images"),
    ):  # fmt: skip
        examples = read(f"{name}/accuracy_fp32.json")["settings"]["examples"]
        result = read(f"{name}.json")
        report, query, hardware = result["report"], result["report"]["query"], result["hardware"]
        minutes = sum(report["seconds"].values()) / 60
        lines += [
            *([""] if lines else []),
            f"`{result['command']}` on {hardware['cores']} cores ({hardware['processor']}), on {examples:,} {data},",
            f"rationales noise-free, the pairs compacted; {minutes:.1f} minutes for the whole chain:",
            "",
            f"| model | accuracy | {kept} kept | ms, one | ms, eight |",
            "|---|---|---|---|---|",
            *(
                f"| {what} | {report[model]['accuracy']:.3f} | {report[model]['rate']:.1%} | "
                + " | ".join(_milliseconds(report, model, batch) for batch in ("1", "8")) + " |"
                for model, what in _MODELS.items()
            ),
            "",
            f"{query['n']} of them through Triton, one at a time: {query['p50_ms']:.1f} ms a query (median, preparing",
            f"included); {query['agree_pipeline']} answers equal to the pipeline's in process,",
            f"{query['agree_torch']} to PyTorch's (label, {kept}, probabilities within 1e-4).",
        ]
    return lines


def _milliseconds(report: dict[str, Any], model: str, batch: str) -> str:
    return f"{report['milliseconds'][batch][_TIMED[model]]:.2f}" if model in _TIMED else ""


@block("unseen.json")
def unseen() -> list[str]:
    found = read("unseen.json")["figures"]
    sixty, sentences, strange = found["sixty"], found["rotten_tomatoes"], found["strangers"]
    return [
        "| texts unlike its training | |",
        "|---|---|",
        *(f"| sentences of ten words or fewer, {kind}: right | {each['right']} of {each['all']} |"
          for kind, each in sixty.items()),
        f"| Rotten Tomatoes, {sentences['examples']} sentences: accuracy | {sentences['accuracy']:.1%} |",
        f"| {strange['texts']} texts in other languages, gibberish and code against test reviews: AUROC of the doubt | "
        f"{strange['auroc']['reviews']:.3f} |",
        f"| ... against Rotten Tomatoes | {strange['auroc']['sentences']:.3f} |",
        "| called doubtful: of them, of test reviews, of Rotten Tomatoes | "
        + ", ".join(f"{strange['called_doubtful'][name]:.1%}" for name in ("strangers", "reviews", "sentences")) + " |",
    ]  # fmt: skip


@block("demo/", "demo_images/", "minilm_serving.json")
def evidence() -> list[str]:
    lines = [
        "| | demo's student, reviews | demo's student, images |",
        "|---|---|---|",
    ]
    rows: dict[str, list[str]] = {}
    for name in ("demo", "demo_images"):
        for title, value in _evidence(name).items():
            rows.setdefault(title, []).append(value)
    lines += [f"| {title} | {' | '.join(values)} |" for title, values in rows.items()]
    return [
        *lines,
        "",
        "Each with its page: [reviews](benchmarks/results/demo/report.md), "
        "[images](benchmarks/results/demo_images/report.md).",
        *_minilm_under_load(),
    ]


def _minilm_under_load() -> list[str]:
    serving = read("minilm_serving.json")
    load = max(serving["figures"]["closed"], key=lambda load: load["concurrency"])
    added, settings = serving["figures"]["in_process"]["added_ms"]["p50"], serving["settings"]
    return [
        f"A pair of MiniLM-L6's size, {load['concurrency']} clients for {settings['seconds']:.0f} s, mixed lengths, "
        f"batches of {listed(settings['batches'])}:",
        f"{load['compared']:,} texts answered, {load['compared'] - load['equal']} of them other than by the pipeline, "
        f"{load['failed']} failures;",
        f"{load['throughput']['ratio']:.2f} of the throughput in process; one request at a time takes {added:.1f} ms "
        "longer than in process",
        f"([figures](benchmarks/results/minilm_serving.json)). Checks that fail: {_failed(serving)}.",
    ]


def _failed(result: dict[str, Any]) -> str:
    return ", ".join(check["name"] for check in result["checks"] if check["outcome"] == "failed") or "none"


def _evidence(name: str) -> dict[str, str]:
    """What the README says of one student, from its folder of results."""
    accuracy = {each: read(f"{name}/accuracy_{each}.json") for each in ("fp32", "fp16", "int8")}
    served = {each: result["figures"]["classification"]["accuracy"] for each, result in accuracy.items()}
    reference = accuracy["fp32"]["figures"]["reference"]["accuracy"]
    faith, serving = read(f"{name}/faithfulness.json"), read(f"{name}/serving.json")
    judge = faith["figures"]["judges"]["independent"]["accuracy"]
    times = serving["figures"]["in_process"]["milliseconds"]
    return {
        "accuracy of the checkpoint": f"{reference:.2%}",
        "served, fp32 / fp16 / int8": " / ".join(f"{value:.2%}" for value in served.values()),
        "an independent judge given the rationale / as many random features / everything":
            " / ".join(f"{judge[kind]:.1%}" for kind in ("rationale", "random", "full")),
        "checks of faithfulness that fail": _failed(faith),
        "one request through Triton / in process": " / ".join(
            f"{times[way]['p50']:.1f} ms" for way in ("served", "in process")
        ),
    }  # fmt: skip


@block("demo/precisions.json", "demo/accuracy_fp32.json", "demo/accuracy_fp16.json", "demo/accuracy_int8.json")
def precisions() -> list[str]:
    found = read("demo/precisions.json")["precisions"]
    positions = found["fp32"]["masks"]["positions"]
    lines = [
        f"| | flipped of {positions:,} | Jaccard | same class | accuracy when served | largest score difference |",
        "|---|---|---|---|---|---|",
    ]
    for precision, parity in found.items():
        masks = parity["masks"]
        served = read(f"demo/accuracy_{precision}.json")["figures"]["classification"]["accuracy"]
        lines.append(
            f"| {precision} | {masks['flipped']:,} | {masks['jaccard']:.4f} | {parity['class_agreement']:.1%} | "
            f"{served:.4f} | {parity['score_difference']:.2g} |"
        )
    return lines
