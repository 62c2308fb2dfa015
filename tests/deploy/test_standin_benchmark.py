"""benchmarks/gpu.py from end to end on the CUDA that pretends: every step, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import standin

from rekd_deploy.errors import EngineError
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.tensorrt.library import PRODUCTS, Library

pytestmark = pytest.mark.standin

BENCHMARKS = standin.ROOT / "benchmarks"
PROGRAM = "../../benchmarks/gpu.py"
ON_THE_DEVICE = ("parity", "latency_fp16", "latency_fp32", "concurrency")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    standin.libraries()
    folder = tmp_path_factory.mktemp("gpu") / "graphs"
    with pytest.MonkeyPatch.context() as patch:  # in this process, where what was traced once is known
        patch.syspath_prepend(str(BENCHMARKS))
        import _gpu_graphs

        _gpu_graphs.prepare(folder, ["bert"], True, lambda step: None)
    return folder


@pytest.fixture(scope="module")
def finished(graphs):
    """Folder of the results, and the line of each step."""
    output = graphs.parent / "results"
    lines = run(graphs, output, "--pytorch", sys.executable)
    return output, {line["step"]: line for line in lines}


def run(graphs, output, *options, without=""):
    return standin.run(PROGRAM, "run", graphs, "--output", output, "--standin", "--json", *options, without=without)


def result(output, step):
    return json.loads((output / f"{step}.json").read_text())


def test_every_step_is_gone_through(finished):
    output, lines = finished
    said = {step: (line["status"], line["reason"]) for step, line in lines.items()}
    assert list(lines) == ["check", *ON_THE_DEVICE, "pytorch", "compiled", "training", "tensorrt"]
    for step in ("check", *ON_THE_DEVICE, "pytorch", "training"):
        assert said[step][0] == "done", said
    assert said["compiled"][0] == "skipped" and "has no CUDA" in said["compiled"][1]
    assert said["tensorrt"][0] == "skipped" and "not installed" in said["tensorrt"][1]
    for step in lines:
        found = result(output, step)
        assert "CUDA pretends" in found["note"] and found["hardware"]["stand_in"], step
        assert found["hardware"]["processor"] and found["hardware"]["state"] and "gpu.py run" in found["command"]
    assert result(output, "parity")["hardware"]["onnxruntime-gpu"].startswith("1.")


def test_each_form_runs_on_the_device_captured_and_not(finished):
    output, _ = finished
    parity = result(output, "parity")
    assert parity["not_run"] == [] and len(parity["cells"]) == 2 * 2 * 2 * 3, "pairs, precisions, captured, roles"
    for precision in ("fp16", "fp32"):
        found = result(output, f"latency_{precision}")
        assert [each["reason"] for each in found["not_run"]] == ["PyTorch is not installed"] and not found["fell_back"]
        for cell in found["cells"]:
            forms = {(way["runtime"], way["model"], way["graphs"]) for way in cell["ways"]}
            models = {("compacted", 2), ("compacted", 1), ("compacted, small selector", 2),
                      ("compacted, small selector", 1), ("classifier", 1)}  # fmt: skip
            assert forms == {(runtime, *model) for model in models
                             for runtime in ("ONNX Runtime CUDA", "ONNX Runtime, CUDA graphs")}  # fmt: skip
            assert {way["precision"] for way in cell["ways"]} == {precision}
            held = {(each["way"], each["baseline"]) for each in cell["ratios"]}
            captured = f"ONNX Runtime, CUDA graphs {precision}"
            assert (f"{captured}, compacted, small selector", f"{captured}, classifier") in held
    assert result(output, "latency_fp32")["cells"][1]["real_tokens"] < 1, "real padding"
    assert {cell["concurrency"] for cell in result(output, "concurrency")["cells"]} == {1, 4}
    assert not any(cell["failed"] for cell in result(output, "concurrency")["cells"])


def test_what_ran_elsewhere_says_so(finished):
    output, _ = finished
    for step in ("pytorch", "training"):
        assert "ran on the CPU" in result(output, step)["fell_back"][0]


@pytest.mark.parametrize(
    ("told", "without", "said"),
    [
        ("a card, 535.10, 80000, 70000, 9.0", "", ["the driver 535.10 is too old for CUDA 13", "; fix: 580 or later"]),
        ("a card, 590.10, 80000, 700, 9.0", "", ["700 MB of the GPU are free, 8000 are needed; fix: "]),
        ("a card, 590.10, 80000, 70000, 9.0", "libcublas.so.13", ["libcublas.so.13", "; fix: "]),
    ],
)
def test_what_is_missing_stops_all_of_it_with_a_line(graphs, tmp_path, monkeypatch, told, without, said):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{told}'")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    with pytest.raises(AssertionError):  # the command fails
        run(graphs, tmp_path, without=without)
    found = result(tmp_path, "check")
    assert found["status"] == "failed" and all(part in found["reason"] for part in said), found["reason"]
    assert "\n" not in found["reason"] and found["hardware"]["gpu"]["driver_version"] in told
    assert not (tmp_path / "parity.json").exists()


def test_a_finished_step_is_kept_and_an_unfinished_one_is_not(finished, graphs):
    output, _ = finished
    before = {step: (output / f"{step}.json").read_bytes() for step in ON_THE_DEVICE}
    cut = result(output, "parity") | {"status": "stopped"}
    (output / "parity.json").write_text(json.dumps(cut))
    lines = run(graphs, output, "--steps", "parity,latency_fp16,concurrency", "--again", "concurrency")
    assert [line["status"] for line in lines] == ["done"] * 3
    assert (output / "latency_fp16.json").read_bytes() == before["latency_fp16"]
    assert (output / "concurrency.json").read_bytes() != before["concurrency"]
    assert result(output, "parity")["status"] == "done"


def test_a_step_is_stopped_at_its_limit_and_what_it_found_is_there(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    slow, file = tmp_path / "python", tmp_path / "parity.json"
    slow.write_text(f"""#!/bin/sh
printf '{{"status": "unfinished", "cells": [1, 2]}}' >{file}
sleep 60 & wait""")
    slow.chmod(0o755)
    found = gpu._step(slow, "parity", tmp_path, file, {}, 1.5, True)
    assert found == json.loads(file.read_text())
    assert (found["status"], found["reason"]) == ("stopped", "stopped after 2 s; 2 cells are there")
    assert found["cells"] == [1, 2] and found["seconds"] < 20
    found = gpu._step(slow, "parity", tmp_path, file, {"step": "parity"}, -3.0, True)
    assert (found["step"], found["reason"]) == ("parity", "no time is left; 0 cells are there")


def test_engines_are_built_where_tensorrt_is_and_timed_beside_the_rest(graphs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _gpu_more as more
    from _gpu_graphs import read
    from _gpu_steps import PRETENDED, Result

    folder = shutil.copytree(graphs, tmp_path / "graphs")
    for name in ("equal", "classifier"):
        shutil.copytree(folder / name / "fp32", folder / name / "unfused")
    built = {}

    def build(library, graph, plan, signature, profiles, settings):
        built[plan.stem] = (settings.precision, profiles[0]["input_ids"])
        shutil.copy(graph, plan)

    def load(product):
        if product != "tensorrt":
            raise EngineError("it is not installed")
        return Library(PRODUCTS[product], None, "11")

    monkeypatch.setattr(more, "load_library", load)
    monkeypatch.setattr(more, "build_engine", build)
    monkeypatch.setattr(
        more, "TensorRTRunner", lambda plan, signature, name, engine: OnnxRuntimeRunner(plan, signature, name)
    )
    result = Result(tmp_path / "tensorrt.json", {})
    assert more.tensorrt(read(folder)[0], PRETENDED, result).startswith("2 of 2 cells")
    assert built == dict.fromkeys(
        ("tensorrt_equal_selector", "tensorrt_equal_predictor", "tensorrt_classifier_predictor"),
        ("fp16", ((1, 3), (4, 32), (4, 32))),
    )
    for cell in result.cells:
        assert {(way["runtime"], way["model"]) for way in cell["ways"]} == {
            ("TensorRT", "compacted"), ("TensorRT", "classifier"),
        }  # fmt: skip
        assert len(cell["ratios"]) == 1
    assert "it is not installed" in {each["reason"] for each in result.not_run}


def test_what_pretends_never_lies_among_the_results(graphs, tmp_path):
    standin.libraries()
    for options, said in (
        (["--standin"], "what pretends is no result; fix: --output"),
        (["--output", str(tmp_path), "--standin"], "the CUDA here is a real one, or none; fix: without --standin"),
        (["--output", str(tmp_path), "--steps", "nothing"], "there is no step 'nothing'; steps: check, parity"),
    ):
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "gpu.py", "run", graphs, *options], capture_output=True, text=True
        )
        assert done.returncode == 1 and done.stderr.startswith(f"error: {said}"), done.stderr
    assert not (BENCHMARKS / "results" / "gpu").exists()
