"""The python-backend model, run as Triton's stub would run it, on the exported graphs."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import raising
from triton_stub import LOGGED, OUTPUTS, Request, TritonError, ask, started, watched

from rekd_deploy.repository.backend.model import InputChecker, groups_by_length, joined, usable_cores
from rekd_deploy.repository.config import PREDICTOR, SELECTOR


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
    batches = watched(model)
    short, long = encoded(rationalizer, "good", "bad film"), encoded(rationalizer, "good " * 20)
    similar = {name: array[:, :20] for name, array in long.items()}
    answers = ask(model, SELECTOR, long, short, similar, short)
    assert batches == [(5, 20), (1, 32)], "at most a quarter longer than the shortest"
    assert [answer.outputs["mask"].shape for answer in answers] == [(1, 32), (2, 16), (1, 20), (2, 16)]
    inputs = {index: {"positions": ids(4), "input_ids": ids(length)} for index, length in enumerate((48, 16, 18))}
    assert groups_by_length(inputs) == [[1, 2], [0]]
    found = {name: array.tolist() for name, array in joined([texts(2), texts(3)], 7).items()}
    assert found == {"input_ids": [[5, 5, 7], [5, 5, 5]], "attention_mask": [[1, 1, 0], [1, 1, 1]]}


def test_threads_are_those_of_the_config_or_the_instances_share_the_cores_of_the_quota(
    repository, inside_triton, monkeypatch, tmp_path
):
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
