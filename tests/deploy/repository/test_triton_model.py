"""What runs inside Triton, as Triton's stub would run it: both steps on exported graphs, and the endpoint."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import triton_stub
from conftest import make_rationalizer, raising
from families import another, some_images, written
from onnx import TensorProto, helper
from reference_repository import artefacts_of
from triton_stub import LOGGED, OUTPUTS, Request, TritonError, ask, started, watched

from rekd_deploy.export.graphs import export
from rekd_deploy.repository.backend import graphs
from rekd_deploy.repository.backend.endpoint import LARGEST_TEXT
from rekd_deploy.repository.backend.graphs import OnnxGraph
from rekd_deploy.repository.backend.model import InputChecker, groups_by_length, joined, usable_cores
from rekd_deploy.repository.config import FORMER, PREDICTOR, SELECTOR, ServingSettings, config_text, read_config
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.repository.text_endpoint import endpoint_config, place_endpoint
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save
from rekd_train.inputs.policy import SelectionPolicy


@pytest.fixture
def start(repository, inside_triton):
    return lambda name: started(repository, name)


def encoded(rationalizer, *texts):
    return rationalizer.preprocessor(list(texts)).inputs


def test_bad_requests_are_logged_or_found_and_their_neighbours_answered(start, rationalizer):
    good = encoded(rationalizer, "a good film")
    bad = {**good, "input_ids": good["input_ids"] - 50}
    requests = [(good, "fine"), (bad, "order 7"), (bad, ""), (bad, "two\nlines " + 200 * "é"), (good, "")]
    answers = start(SELECTOR).execute([Request(each, OUTPUTS[SELECTOR], name) for each, name in requests])
    assert [answer.error is None for answer in answers] == [True, False, False, False, True]
    assert "input_ids[0, 0]" in str(answers[1].error) and answers[1].error.code == TritonError.INVALID_ARG
    np.testing.assert_array_equal(answers[0].outputs["scores"], answers[4].outputs["scores"])
    assert LOGGED[0].startswith("[request id: order 7] input_ids[0, 0]")
    assert LOGGED[1].startswith("[request id: <none>] input_ids[0, 0]")
    assert len(LOGGED) == 3 and LOGGED[2].startswith(r"[request id: two\nlines \xe9")
    assert "\n" not in LOGGED[2] and len(LOGGED[2]) < 400
    model = start(SELECTOR)
    session = model._graph
    def run(names, inputs):
        return session.run(names, inputs) if (inputs["input_ids"] != 60).all() else raising(RuntimeError("boom"))()
    model._graph = SimpleNamespace(run=run)
    good = encoded(rationalizer, "a good film")
    answers = ask(model, SELECTOR, good, {**good, "input_ids": np.where(good["attention_mask"] == 1, 60, 0)}, good)
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert "boom" in str(answers[1].error) and answers[1].error.code == TritonError.INTERNAL


def ids(length, value=5, rows=1):
    return np.full((rows, length), value)


def texts(length, value=5, rows=1, mask=1):
    return {"input_ids": ids(length, value, rows), "attention_mask": ids(length, mask, rows)}


PREDICTING = {"input_ids": ids(16), "positions": ids(11), "kept": np.ones((1, 11), dtype=bool)}


@pytest.mark.parametrize(("bad", "reason"), [
    (texts(16, -1), r"input_ids\[0, 0\] is -1, outside the vocabulary"),
    (texts(16, 94), "is 94, outside the vocabulary 0..93"), (texts(16, -(2**63)), "outside the vocabulary"),
    (texts(16) | {"attention_mask": ids(8, 1)}, r"attention_mask has shape \[1, 8\], input_ids \[1, 16\]"),
    (texts(16, mask=2), r"attention_mask\[0, 0\] is 2"), (texts(16, mask=0), "row 0 of attention_mask is all 0"),
    (texts(49), "at most 48"), (texts(0), "no axis may be empty"), (texts(16, rows=0), "no axis may be empty"),
    (PREDICTING | {"positions": ids(11, 16)}, r"positions\[0, 0\] is 16, outside the sequence 0..15"),
    (PREDICTING | {"positions": ids(11, -1)}, "outside the sequence"),
    (PREDICTING | {"kept": np.ones((1, 4), dtype=bool)}, r"positions has shape \[1, 11\] and kept \[1, 4\]"),
])  # fmt: skip
def test_bad_values_are_refused_with_a_reason(start, bad, reason):
    name, good = (PREDICTOR, PREDICTING) if "kept" in bad else (SELECTOR, texts(16))
    accepted, refused = ask(start(name), name, good, bad)
    assert accepted.error is None and refused.error.code == TritonError.INVALID_ARG
    with pytest.raises(TritonError, match=reason):
        raise refused.error


def test_images_are_checked_by_patches_and_gpus_need_their_runtime(repository, inside_triton):
    reason_to_refuse, pixels = InputChecker(12).reason_to_refuse, np.zeros((1, 16, 12, 1))
    assert reason_to_refuse({"pixels": pixels, "keep": ids(12)}) is None
    assert "keep has 11 columns; the" in reason_to_refuse({"pixels": pixels, "keep": ids(11)})
    assert "outside the patches 0..11" in reason_to_refuse({"positions": ids(2, 12), "kept": ids(2)})
    with pytest.raises(RuntimeError, match=r"serves no GPUs; fix: install onnxruntime-gpu\[cuda,cudnn\] there"):
        started(repository, SELECTOR, model_instance_kind="GPU", model_instance_device_id="0")


def test_texts_are_grouped_by_length_run_as_one_batch_and_filled_up_with_the_pad_id(start, rationalizer):
    model = start(SELECTOR)
    batches, model._run_in_tokens = watched(model), 20
    short, long = encoded(rationalizer, "good", "bad film"), encoded(rationalizer, "good " * 40)
    similar = {name: array[:, :20] for name, array in long.items()}
    answers = ask(model, SELECTOR, long, short, similar, short)
    assert batches == [(5, 20), (1, 48)], "16 tokens of padding cost less than a run, 5 x 28 more"
    assert [answer.outputs["mask"].shape for answer in answers] == [(1, 48), (2, 16), (1, 20), (2, 16)]
    inputs = {index: {"positions": ids(4), "input_ids": ids(length)} for index, length in enumerate((48, 16, 18))}
    groups = [groups_by_length(inputs, limit) for limit in (1, 2, 59, 60)]
    assert groups == [[[1], [2], [0]], [[1, 2], [0]], [[1, 2], [0]], [[1, 2, 0]]]
    found = {name: array.tolist() for name, array in joined([texts(2), texts(3)], 7).items()}
    assert found == {"input_ids": [[5, 5, 7], [5, 5, 5]], "attention_mask": [[1, 1, 0], [1, 1, 1]]}


@pytest.mark.parametrize(("lengths", "milliseconds", "expected"), [
    ((8, 16, 32, 256), lambda length: 4 + 0.1 * length, 40), ((8, 16), lambda length: 4 + 0.4 * length, 10),
    ((8, 64), lambda length: length**2 / 100, 0), ((8, 64), lambda length: 2 - length / 100, 512),
    ((8,), lambda length: 1, 0), ((), lambda length: 1, 0)])
def test_a_run_is_measured_in_tokens(monkeypatch, lengths, milliseconds, expected):
    graph, asked = OnnxGraph.__new__(OnnxGraph), []
    graph._session = SimpleNamespace(run=lambda names, text: asked.append(text["input_ids"].shape[1]))
    clock = SimpleNamespace(perf_counter=lambda: sum(map(milliseconds, asked)) / 1000)  # the runs alone take time
    monkeypatch.setattr(graphs, "time", clock)
    found = graph.run_in_tokens([{"input_ids": ids(length)} for length in lengths])
    assert found == pytest.approx(expected) and 256 not in asked, "four times the shortest says enough"


def test_what_a_run_costs_is_measured_with_the_warm_ups_of_whatever_shape(start, inside_triton, tmp_path):
    assert all(0 < start(name)._run_in_tokens <= 512 for name in (SELECTOR, PREDICTOR))
    twelve = make_rationalizer(policy=SelectionPolicy(bias=0.1, budget=0.25, minimum=12))  # words of any text
    artefacts = export(save(twelve, tmp_path / "checkpoint"), tmp_path)
    predictor = started(write_repository(artefacts, tmp_path / "repository"), PREDICTOR)
    given = {"input_ids": ids(16), "positions": np.arange(12)[None], "kept": np.ones((1, 12), bool)}
    assert predictor._run_in_tokens > 0 and ask(predictor, PREDICTOR, given)[0].error is None


def test_what_every_request_would_meet_ends_the_loading(
    repository, image_rationalizer, inside_triton, monkeypatch, tmp_path):
    """Triton itself may die of a warm-up that fails, and say nothing."""
    artefacts = export(save(image_rationalizer, tmp_path / "checkpoint"), tmp_path)
    for root in (repository, write_repository(artefacts, tmp_path / "repository")):
        started(root, SELECTOR)
        with pytest.raises(Exception, match="nothing"):
            started(root, SELECTOR, lambda config: config.output.add(name="nothing"))
    def misread(read):
        return lambda self, **given: read(triton_stub.Tensor.received("", self.array * 0), **given)
    for name in ("as_numpy", "__dlpack__"):
        monkeypatch.setattr(triton_stub.Tensor, name, misread(getattr(triton_stub.Tensor, name)))
    with pytest.raises(RuntimeError, match="stub misreads input_ids, kept, positions; fix: "):
        started(repository, PREDICTOR)


def test_numbers_near_zero_are_zero_where_the_graph_is_served(tmp_path):
    product = helper.make_node("Mul", ["x", "x"], ["y"])
    row, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in ("x", "y"))
    graph = helper.make_graph([product], "square", [row], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    code = (
        "import sys, pathlib, numpy as np\nfrom rekd_deploy.repository.backend.graphs import OnnxGraph\n"
        "graph = OnnxGraph(pathlib.Path(sys.argv[1]), 1)\n"
        "squares = [graph.run(['y'], {'x': np.full((1, 1), x, 'float32')})[0] for x in (1e-15, 1e-22)]\n"
        "print([square.view('int32').item() != 0 for square in squares])"  # whatever this processor now makes of 1e-44
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[True, False]"


@pytest.mark.parametrize("padded", [False, True])
def test_padding_is_cut_off_before_the_graph_and_changes_nothing_but_itself(start, rationalizer, padded):
    model, inputs = start(SELECTOR), encoded(rationalizer, "good", "bad film and a very good plot")
    assert inputs["input_ids"].shape == (2, 16)
    graph, shapes = model._graph, []
    real = int(inputs["attention_mask"].sum(axis=1).max())
    session = graph._session
    def run(names, given):
        shapes.append(given["input_ids"].shape)
        return session.run(names, given)
    graph._session = SimpleNamespace(run=run)
    if padded:
        inputs = {name: np.pad(array, ((0, 0), (0, 9))) for name, array in inputs.items()}
    (answer,) = ask(model, SELECTOR, inputs)
    (whole,) = session.run(["scores"], inputs)
    assert shapes == [(2, real)] and answer.outputs["mask"].shape == inputs["input_ids"].shape
    kept = inputs["attention_mask"] == 1
    np.testing.assert_allclose(answer.outputs["scores"][kept], whole[kept], atol=1e-5)
    for name in ("scores", "mask"):
        assert not answer.outputs[name][~kept].any(), "at the end of the shorter text, too, whatever its neighbour"
    one = encoded(rationalizer, "good")
    ask(model, SELECTOR, {name: array[:, :3] for name, array in one.items()})
    assert shapes[1] == (1, 3), "nothing to cut"


def test_threads_are_those_of_the_config_or_the_instances_share_the_cores_of_the_quota(
    repository, inside_triton, monkeypatch, tmp_path):
    quota, read = tmp_path / "cpu.max", Path.read_text
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert usable_cores(str(quota)) == 8
    for content, expected in (("max", 8), ("50000", 1), ("150000", 2), ("1600000", 8), ("", 8)):
        quota.write_text(f"{content} 100000" if content else "")
        assert usable_cores(str(quota)) == expected
    monkeypatch.setattr(Path, "read_text", lambda path, *_, **options: (
        "max 100000" if path.name == "cpu.max" else read(path, *_, **options)))
    for threads, instances, expected in ((3, 1, 3), (3, 2, 3), (0, 1, 4), (0, 2, 4), (0, 3, 2), (0, 9, 1)):
        def edit(config, threads=threads, instances=instances):
            config.parameters["intra_op_thread_count"].string_value = str(threads)
            config.instance_group[0].count = instances
        options = started(repository, SELECTOR, edit)._graph._session.get_session_options()
        assert options.intra_op_num_threads == expected


def test_it_comes_stays_and_goes_with_its_export(artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "r", text_endpoint=True)
    files, before = check_repository(root)["repository"]["files"], root.stat().st_ino
    held = {"rekd_selector/model.onnx", "rekd_predictor/model.onnx", "tokenizer.json", "rekd_train/inputs/text.py"}
    assert {"rekd_text/config.pbtxt", *(f"rekd_text/1/{name}" for name in held)} <= set(files)
    write_repository(artefacts, root, text_endpoint=True)
    assert root.stat().st_ino == before, "the same export again changes nothing"
    write_repository(another(artefacts, 2), root, text_endpoint=True, keep=2)
    assert list(read_config(root / "rekd_text" / "config.pbtxt").version_policy.specific.versions) == [2]
    assert sorted(path.name for path in (root / "rekd_text").iterdir()) == ["2", "config.pbtxt"]
    for folder in FORMER:  # of an older export
        (root / folder).mkdir()
    write_repository(artefacts, root)
    assert not any((root / name).exists() for name in ("rekd_text", *FORMER))
    check_repository(root)


def endpoint(folder, artefacts, target):
    """The endpoint's model for a target, started, and its files."""
    written = endpoint_config(artefacts, ServingSettings(), target)
    (folder / written.name / "1").mkdir(parents=True)
    (folder / written.name / "config.pbtxt").write_text(config_text(written))
    place_endpoint(artefacts, folder, {written.name: written}, "1")
    return started(folder, written.name)


def column(*contents):
    return np.array([[each] for each in contents], dtype=object)


ANSWERS = ["label", "rationale", "rate", "truncated", "probabilities", "doubt"]


@pytest.mark.parametrize("target", ["python", "onnxruntime"])
def test_the_endpoint_answers_as_the_model_whoever_runs_the_graphs(
    artefacts, repository, rationalizer, texts, inside_triton, monkeypatch, tmp_path, target):
    """In its own process on a CPU; elsewhere it asks the models that are there, one after the other."""
    asked = {name: started(repository, name) for name in (SELECTOR, PREDICTOR)}
    monkeypatch.setattr(triton_stub, "ASKED", {} if target == "python" else asked)
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, some = endpoint(tmp_path, artefacts, target), [*texts, "good film " * 50]
    contents = column(*(each.encode() for each in some))
    known = [name for name in ANSWERS if name != "doubt" or rationalizer.preprocessor.familiarity]
    (answer,) = model.execute([Request({"text": contents}, known)])
    assert answer.error is None and list(answer.outputs) == known
    for row, wanted in enumerate(rationalizer.predict(some)):
        label, rationale, rate, truncated, probabilities = (answer.outputs[name][row] for name in ANSWERS[:5])
        assert (label[0].decode(), bool(truncated[0])) == (wanted.label, wanted.truncated)
        assert rate[0] == pytest.approx(wanted.rate)
        np.testing.assert_allclose(probabilities, list(wanted.probabilities.values()), atol=1e-4)
        spans = [(span["start"], span["end"], span["text"]) for span in json.loads(rationale[0])]
        assert spans == [(span.start, span.end, span.text) for span in wanted.rationale]
    assert answer.outputs["truncated"][-1] and not answer.outputs["truncated"].all()
    folder = tmp_path / "rekd_text" / "1"
    assert [path.is_dir() for path in (folder / SELECTOR, folder / PREDICTOR)] == [target == "python"] * 2
    if target != "python":
        monkeypatch.setattr(asked[PREDICTOR], "_graph", SimpleNamespace(run=raising(RuntimeError("boom"))))
        (failed,) = model.execute([Request({"text": contents}, known, "order 7")])
        assert "boom" in str(failed.error) and failed.error.code == TritonError.INTERNAL
        assert LOGGED[-1].startswith("[request id: order 7] RuntimeError")


SHOE = some_images(1)[0]
GOOD = {"text": b"good film", "image": written(SHOE, "PNG")}
PNG = written(some_images(1, 40, 30)[0], "PNG")
BAD = [("text", b"", "text 2 is empty"), ("text", b" \t\n ", "only white space"),
       ("text", "très bien 🎬".encode()[:-1], "text 2 is not UTF-8"),
       *(("text", b"A dull " + bad, "byte 8 is wrong") for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80")),
       ("text", b"x" * (LARGEST_TEXT + 1), "at most 1048576"),
       *(("image", bad, "image 2 cannot be read: neither") for bad in (b"", b"no image", written(SHOE, "BMP"))),
       *(("image", written(SHOE, kind)[:90], "image 2 cannot be read") for kind in ("JPEG", "PNG")),
       ("image", PNG[:60] + bytes(99) + PNG[159:], "image 2 cannot be read"),
       ("image", PNG[:16] + struct.pack(">II", 2**16, 2**16) + PNG[24:], "image 2 cannot be read"),
       ("image", PNG[:16] + struct.pack(">II", 0, 40) + PNG[24:], "image 2 cannot be read"),
       ("image", written(some_images(1, 40, 31)[0], "JPEG"), "31 x 40 pixels; at most 1200")]  # fmt: skip
BAD_FILES = {kind: [content for each, content, reason in BAD if each == kind and "1200" not in reason] for kind in GOOD}


@pytest.mark.parametrize(("kind", "content", "reason"), BAD)
def test_what_cannot_be_used_is_refused_and_its_neighbours_are_not(
    rationalizer, image_rationalizer, inside_triton, monkeypatch, tmp_path, kind, content, reason):
    model = rationalizer if kind == "text" else image_rationalizer
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = endpoint(tmp_path, artefacts_of(model), "onnxruntime")
    names = ("label", "rate", "truncated")
    def run(outputs, inputs):
        rows, width = len(next(iter(inputs.values()))), 12
        made = {"mask": np.ones((rows, width), bool), "probabilities": np.full((rows, len(model._labels)), 0.5)}
        return [made.get(name, np.zeros((rows, width), np.float32)) for name in outputs]
    monkeypatch.setattr(model, "_steps", [(run, step) for _, step in model._steps])
    monkeypatch.setitem(model._encoded.__globals__, "LARGEST_IMAGE", 1200)
    good, bad = (Request({kind: column(*each)}, names) for each in ([GOOD[kind]], [GOOD[kind], content]))
    first, refused, last = model.execute([good, bad, good])
    assert reason in str(refused.error) and refused.error.code == TritonError.INVALID_ARG
    assert first.error is last.error is None and first.outputs == last.outputs != {}
