"""Does what Triton's onnxruntime backend serves equal what the gate proved, on other releases and other processors?

The graphs of a repository answer the checkpoint's examples here, in the gate's own sessions, and in every other Python
that is named, with the options that Triton's backend has. A name may begin with an emulator, for a processor without
VNNI (Debian: qemu-user).

    rekd-export runs/demo/student --target onnxruntime --cpu --precision int8 --output /tmp/int8
    python benchmarks/int8_targets.py /tmp/int8 runs/demo/student --python /opt/ort-1.19.2/bin/python \\
        --python "qemu-x86_64 -cpu Haswell /opt/ort-1.19.2/bin/python"
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import typer
from _models import environment

from rekd_train.cli.command import application, examples, print_json, run

RESULT = Path(__file__).parent / "results" / "int8_targets.json"
ANSWER = """
import json, sys, numpy as np, onnxruntime
selector, predictor, threads, source, target = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads, options.enable_mem_pattern = int(threads), 1, False
options.log_severity_level = 4
provided = dict(providers=["CPUExecutionProvider"])
steps = [onnxruntime.InferenceSession(path, options, **provided) for path in (selector, predictor)]
known = dict(np.load(source))
for step in steps:
    names = [value.name for value in step.get_outputs()]
    known.update(zip(names, step.run(names, {value.name: known[value.name] for value in step.get_inputs()})))
np.savez(target, **known)
print(onnxruntime.__version__)
"""
COMPARED = ("scores", "mask", "logits", "probabilities")

app = application(
    help="Compare what the gate computes with what Triton's onnxruntime backend does, elsewhere.",
    epilog=examples("int8_targets.py /tmp/int8 runs/demo/student --python /opt/ort-1.19.2/bin/python"),
)


@app.command()
def int8_targets(
    repository: Annotated[Path, typer.Argument(help="Written by rekd-export --target onnxruntime.")],
    checkpoint: Annotated[Path, typer.Argument(help="What it was exported from.")],
    pythons: Annotated[
        list[str] | None, typer.Option("--python", metavar="COMMAND", help="With numpy and onnxruntime; repeatable.")
    ] = None,
    count: Annotated[int, typer.Option("--examples", min=1, help="How many of the checkpoint's.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="Threads inside one operator.")] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the figures go.")] = RESULT,
) -> None:
    """Answer, compare, write the figures and print them."""
    from rekd_deploy.parity.examples import parity_examples, with_lengths
    from rekd_deploy.repository.reader import check_repository, graph_path
    from rekd_train.checkpoints.checkpoint import load
    from rekd_train.files import write_json

    manifest = check_repository(repository)
    rationalizer = load(checkpoint)
    preprocessor = with_lengths(rationalizer.preprocessor, tuple(manifest.get("lengths", ())))
    inputs = preprocessor(parity_examples(checkpoint, preprocessor).items[:count]).inputs
    paths = [graph_path(repository, manifest, role) for role in ("selector", "predictor")]
    proved = _proved(manifest, paths, inputs, threads)
    found = {}
    with TemporaryDirectory() as folder:
        np.savez(source := Path(folder) / "inputs.npz", **inputs)
        for command in [sys.executable, *(pythons or [])]:
            target = Path(folder) / "answers.npz"
            call = [*shlex.split(command), "-c", ANSWER, *map(str, [*paths, threads, source, target])]
            done = subprocess.run(call, capture_output=True, text=True, check=True)
            name = " ".join(["ONNX Runtime", done.stdout.strip(), *shlex.split(command)[1:-1]])
            found[name] = _compared(proved, dict(np.load(target)), inputs)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/int8_targets.py", *sys.argv[1:]]),
        "hardware": environment("cpu") | {"processor_has": _extensions()},
        "gate": {key: manifest["parity"][key] for key in (
            "examples", "flipped_positions", "positions", "score_difference", "logit_difference",
            "probability_difference", "class_agreement",
        )},
        "precisions": {role: entry["observed"] for role, entry in manifest["artefacts"].items()},
        "against_the_gate": found,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    print_json(result)


def _proved(manifest: dict[str, Any], paths: list[Path], inputs: dict[str, np.ndarray], threads: int) -> dict:
    """Every tensor of the pair in the gate's own sessions."""
    from rekd_deploy.repository.manifest import signature_from_dict
    from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner

    signature, known = signature_from_dict(manifest["signature"]), dict(inputs)
    for graph, path in zip((signature.selector, signature.predictor), paths, strict=True):
        with OnnxRuntimeRunner(path, graph, path.name, threads=threads, target="onnxruntime") as runner:
            known |= runner.run({spec.name: known[spec.name] for spec in graph.inputs})
    return known


def _compared(proved: dict[str, np.ndarray], found: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> dict:
    same = (proved["mask"] == found["mask"]).all(axis=1)
    differences = {
        name: float(f"{np.abs(proved[name] - found[name])[same].max():.2g}") for name in COMPARED if name != "mask"
    }
    return {
        "bit_for_bit": all(bool((proved[name] == found[name]).all()) for name in COMPARED),
        "examples": len(same),
        "same_rationale": int(same.sum()),
        "flipped_positions": int((proved["mask"] != found["mask"]).sum()),
        "same_class": int((proved["logits"].argmax(1) == found["logits"].argmax(1)).sum()),
        "largest_differences_on_the_same_rationale": differences,
    }


def _extensions() -> list[str]:
    flags = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    return sorted(flags & {"avx2", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8"})


if __name__ == "__main__":
    run(app)
