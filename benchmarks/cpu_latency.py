"""What a rationale costs on a CPU: the two steps compacted, zeroed, joined, in int8, and beside a plain classifier.

Weights are random (they do not change the time), texts have full length, and the rationale always fills its budget: the
worst case. All variants of one size and batch are timed in rounds, so that a machine that slows down slows all of them.

    python benchmarks/cpu_latency.py
    python benchmarks/cpu_latency.py --sizes mini --batches 1 --rounds 5 --output /tmp/trial.json
"""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
from _models import environment

from rekd_deploy.bench.variants import PYTORCH, ZEROED, in_rounds, percentiles
from rekd_deploy.bench.variants_torch import BOTH, Networks, pytorch_runnables
from rekd_train.cli.command import application, examples, print_json, run

RESULT = Path(__file__).parent / "results" / "cpu_latency.json"
SIZES = {"mini": (4, 256, 4), "small": (4, 512, 8), "minilm": (6, 384, 12)}
"""Layers, width, heads: BERT mini and small, MiniLM-L6."""
BATCHES_AT_HAND = 4

COMPARISONS = [
    ("compact", "zero", "compacted / zeroed, fp32", {1: 0.58, 8: 0.55, 32: 0.55}),
    ("compact", "eager zero", "compacted / zeroed in PyTorch, fp32", {1: 0.57, 8: 0.57, 32: 0.57}),
    ("compact int8", "eager zero", "compacted int8 / zeroed in PyTorch", {1: 0.4, 8: 0.4, 32: 0.4}),
    ("compact int8", "compact", "int8 / fp32, compacted", {}),
    ("classifier int8", "classifier", "int8 / fp32, plain classifier", {}),
    ("compact", "classifier", "compacted / plain classifier, fp32", {}),
    ("half compact", "classifier", "compacted, half the selector / plain classifier, fp32", {1: 1.0, 8: 1.0, 32: 1.0}),
    ("half compact int8", "classifier int8", "compacted, half the selector / plain classifier, int8",
     {1: 1.0, 8: 1.0, 32: 1.0}),
    ("single", "compact", "one graph / two, fp32", {}),
    ("single int8", "compact int8", "one graph / two, int8", {}),
]  # fmt: skip
"""Variant, what it is compared with, what to call it, and the ratio hoped for by batch size."""

app = application(
    help="Time the two steps on a CPU, compacted and not, against PyTorch and a plain classifier.",
    epilog=examples("cpu_latency.py", "cpu_latency.py --sizes mini,minilm --batches 1,8 --rounds 31"),
)


@app.command()
def cpu_latency(
    sizes: Annotated[str, typer.Option(help=f"With commas, of {', '.join(SIZES)}.")] = ",".join(SIZES),
    batches: Annotated[str, typer.Option(help="Texts answered at once, with commas.")] = "1,8,32",
    length: Annotated[int, typer.Option(min=32, max=512, help="Tokens of each text.")] = 256,
    budget: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the words that is kept.")] = 0.1,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds of each variant; at batch 1 five times as many.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="the cores")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = RESULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of a table.")] = False,
) -> None:
    """Measure, write the figures and a table beside them, and print it."""
    import onnxruntime
    import torch

    from rekd_deploy.runtimes.onnxruntime import available_cores
    from rekd_train.files import write_json, write_text

    threads = threads or available_cores()
    torch.set_num_threads(threads)
    cells, kept = [], 0
    for size in sizes.split(","):
        if size not in SIZES:
            raise typer.BadParameter(f"no size '{size}'; sizes: {', '.join(SIZES)}", param_hint="--sizes")
        with ExitStack() as stack:
            graphs = _Graphs(SIZES[size], length, budget, threads, stack)
            kept = graphs.kept
            for batch in map(int, batches.split(",")):
                count = rounds * 5 if batch == 1 else rounds
                cells.append({"size": size, "batch": batch, "rounds": count, **graphs.measure(batch, count)})
                typer.echo(f"{size}, batch {batch}: done", err=True)
    result = {
        "command": shlex.join(["python", "benchmarks/cpu_latency.py", *sys.argv[1:]]),
        "hardware": {**environment("cpu"), "onnxruntime": onnxruntime.__version__},
        "settings": {"length": length, "budget": budget, "kept": kept, "threads": threads},
        "cells": cells,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    table = "\n".join(_markdown(result)) + "\n"
    write_text(output.with_suffix(".md"), table)
    if as_json:
        print_json(result)
    else:
        typer.echo(table)


class _Graphs:
    """The graphs of one size in every form, loaded once."""

    def __init__(
        self, size: tuple[int, int, int], length: int, budget: float, threads: int, stack: ExitStack
    ) -> None:
        from rekd_deploy.graphs import onnx_model
        from rekd_deploy.graphs.fusion import embeddings_together
        from rekd_deploy.graphs.modules import pair_signature
        from rekd_deploy.graphs.tracing import OPSET, traced_graphs
        from rekd_deploy.runtimes.base import RunnerChain
        from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner

        self._length, self._random = length, np.random.default_rng(0)
        layers, width, heads = size
        self._chains: dict[str, Any] = {}
        self._networks: dict[str, Any] = {}

        def add(name: str, signature, models: dict[str, Any]) -> None:
            runners = []
            for role, model in models.items():
                graph = embeddings_together(model).SerializeToString()
                runner = OnnxRuntimeRunner(graph, signature.graph(role), f"{name} {role}", threads=threads)
                runners.append(runner)
            self._chains[name] = stack.enter_context(RunnerChain(runners))

        for name, selector_layers, operator in (
            ("zero", layers, "zero"), ("compact", layers, "compact"), ("half compact", layers // 2, "compact"),
        ):  # fmt: skip
            pair = random_pair(selector_layers, layers, width, heads, length, budget, operator)
            self.kept = pair.capacity
            signature = pair_signature(pair)
            models = traced_graphs(pair, fused=True, opset=OPSET)
            integer = _int8(pair, models, signature, [self._inputs(1) for _ in range(4)])
            for suffix, versions in (("", models), (" int8", integer)):
                add(f"{name}{suffix}", signature, versions)
                if name == "zero":  # a predictor that may read everything is a plain classifier
                    add(f"classifier{suffix}", signature, {"predictor": versions["predictor"]})
                if name == "compact":
                    both = onnx_model.joined(versions["selector"], versions["predictor"], signature)
                    add(f"single{suffix}", signature, {"single": both})
            if name == "zero":
                self._networks["eager zero"] = Networks(ZEROED, pair, BOTH)

    def measure(self, batch: int, rounds: int) -> dict[str, Any]:
        """Percentiles of every variant and the ratios of the comparisons."""

        inputs = [self._inputs(batch) for _ in range(BATCHES_AT_HAND)]
        ways = {
            name: lambda turn, chain=chain: chain.run(inputs[turn % BATCHES_AT_HAND])
            for name, chain in self._chains.items()
        }
        for name, networks in self._networks.items():
            (ways[name],), _ = pytorch_runnables(networks, inputs, "cpu", [PYTORCH])
        timings = in_rounds(ways, rounds=rounds)
        ratios = [
            {"way": way, "baseline": baseline, "title": title, "goal": goals.get(batch), **timings.ratio(way, baseline)}
            for way, baseline, title, goals in COMPARISONS
        ]
        return {"milliseconds": {name: percentiles(timings.milliseconds[name]) for name in ways}, "ratios": ratios}

    def _inputs(self, batch: int) -> dict[str, np.ndarray]:
        shape = (batch, self._length)
        words = self._random.integers(1000, 30_000, size=shape)
        return {
            "input_ids": words, "attention_mask": np.ones(shape, dtype=np.int64), "keep": np.ones(shape, dtype=bool),
        }  # fmt: skip


def random_pair(selector_layers: int, layers: int, width: int, heads: int, length: int, budget: float, operator: str):
    """An untrained pair of BERTs whose rationales always fill the budget."""
    from rekd_train.config.run import RunConfig
    from rekd_train.inputs.policy import SelectionPolicy
    from rekd_train.models.families import fresh_pair, preprocessor_for

    sizes = {"width": width, "heads": heads, "feedforward": 4 * width, "positions": 512}
    config = RunConfig.model_validate({
        "name": "random", "data": {"name": "imdb", "max_length": length},
        "selector": {"family": "bert", "layers": selector_layers, **sizes},
        "predictor": {"family": "bert", "layers": layers, **sizes},
    })  # fmt: skip
    pair = fresh_pair(config, preprocessor_for(config), ["negative", "positive"]).eval()
    pair.policy = SelectionPolicy(bias=None, budget=budget)
    pair.predictor.operator = operator
    return pair


def _int8(pair, models, signature, samples):
    """Both graphs in int8, whatever that does to random rationales."""
    from rekd_deploy.graphs.int8 import to_int8
    from rekd_deploy.graphs.modules import head_layers
    from rekd_deploy.graphs.precision import HEAD_OUTPUTS, guarded_nodes, name_nodes
    from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner

    heads, named = head_layers(pair), {role: name_nodes(model) for role, model in models.items()}
    with OnnxRuntimeRunner(models["selector"].SerializeToString(), signature.selector, "the selector") as selector:
        singles = [
            inputs | selector.run({spec.name: inputs[spec.name] for spec in signature.selector.inputs})
            for inputs in samples
        ]
    return {
        role: to_int8(model, guarded_nodes(model, HEAD_OUTPUTS[role], heads[role]), singles)
        for role, model in named.items()
    }


def _markdown(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    lines = [
        f"# Latency on {result['hardware']['device']}, {settings['threads']} threads",
        "",
        f"Texts of {settings['length']} tokens, K = {settings['kept']}; ratios of times with their 95 % interval, "
        "goals in brackets.",
        "",
    ]
    sizes = list(dict.fromkeys(cell["size"] for cell in result["cells"]))
    for size in sizes:
        cells = [cell for cell in result["cells"] if cell["size"] == size]
        layers, width, _ = SIZES[size]
        heads = " | ".join(f"batch {cell['batch']}" for cell in cells)
        lines += [f"## {size}: {layers} layers x {width}", "", f"| ratio | {heads} |", f"|---|{'---|' * len(cells)}"]
        for index, (_, _, title, _) in enumerate(COMPARISONS):
            found = [cell["ratios"][index] for cell in cells]
            lines.append(f"| {title} | {' | '.join(map(_ratio, found))} |")
        lines += ["", f"| milliseconds, median | {heads} |", f"|---|{'---|' * len(cells)}"]
        for name in cells[0]["milliseconds"]:
            medians = [f"{cell['milliseconds'][name]['p50']:.1f}" for cell in cells]
            lines.append(f"| {name} | {' | '.join(medians)} |")
        lines.append("")
    versions = "; ".join(f"{key} {value}" for key, value in result["hardware"].items())
    return [*lines, "## How it was made", "", "```sh", result["command"], "```", "", f"- {versions}"]


def _ratio(found: dict[str, Any]) -> str:
    goal = "" if found["goal"] is None else f" (goal {found['goal']:.2f})"
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]{goal}"


if __name__ == "__main__":
    run(app)
