"""Result files of rekd-bench: what they hold, what cannot be read; compared, worse is worse beyond limit and noise."""

from __future__ import annotations

import json
import sys

import pytest
from bench_results import accuracy, bench, faithfulness, latency, serving

from rekd_deploy.bench.report.compare import Figure, change_of, compare
from rekd_deploy.bench.results import Check, Input, figure_rows, read_result, result, write_result
from rekd_deploy.errors import BenchmarkError

LIMITS = {"percent": 10.0, "points": 1.0}


def some_result():
    checks = [Check(name="a", outcome="failed", words="too much", value=2.0, limit=1.0),
              Check(name="b", outcome="passed", words="fine", value=float("nan"))]  # fmt: skip
    return result(
        "accuracy", {"section": {"accuracy": 0.5, "nothing": float("nan")}}, checks=checks,
        inputs={"data": Input(name="toy", sha256="ab")},
    )  # fmt: skip


def test_a_result_comes_back_as_it_was(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "accuracy", "my repo"])
    made = some_result()
    path = write_result(tmp_path / "new" / "accuracy.json", made)
    assert read_result(path) == made
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("rekd-bench", 1)
    assert document["command"] == "rekd-bench accuracy 'my repo'"
    assert document["checks"][1]["value"] is None
    assert document["figures"]["section"] == {"accuracy": 0.5, "nothing": None}  # JSON has no NaN
    assert document["hardware"]["cores"] >= 1 and document["hardware"]["processor"]
    assert {"rekd", "python", "numpy"} <= set(document["versions"])
    assert [check.name for check in made.failed] == ["a"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d | {"format": "other"}, "no result of rekd-bench"),
        (lambda d: d | {"version": 99}, "version 99"),
        (lambda d: {key: value for key, value in d.items() if key != "figures"}, "damaged"),
        (lambda d: d | {"checks": [{"name": "x", "outcome": "maybe", "words": ""}]}, "damaged"),
        (lambda d: [d], "no result of rekd-bench"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, change, said) -> None:
    path = write_result(tmp_path / "r.json", some_result())
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(BenchmarkError, match=said) as caught:
        read_result(path)
    assert str(path) in str(caught.value) and "fix:" in str(caught.value)


def test_missing_and_cut_off_are_named(tmp_path) -> None:
    with pytest.raises(BenchmarkError, match="does not exist"):
        read_result(tmp_path / "none.json")
    path = write_result(tmp_path / "r.json", some_result())
    path.write_text(path.read_text()[:40])
    with pytest.raises(BenchmarkError, match="damaged"):
        read_result(path)


def test_tables_show_numbers_and_curves() -> None:
    curve = {"rates": [0.05, 1.0], "accuracies": [0.5, 0.75], "area": 0.6, "note": "all"}
    rows = figure_rows({"classification": {"accuracy": 0.5, "bins": [1, 2]}, "curve": {"served": curve}})
    assert rows == [
        ("classification accuracy", "0.5000"), ("curve served at 5%", "0.5000"), ("curve served at 100%", "0.7500"),
        ("curve served area", "0.6000"), ("curve served note", "all"),
    ]  # fmt: skip


# compared


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ((10.0, 9.8, 10.2), (11.5, 11.3, 11.7), "worse"),
        ((10.0, 8.0, 12.0), (11.5, 10.0, 13.0), "within the noise"),
        ((10.0, 9.8, 10.2), (10.9, 10.7, 11.1), "same"),
        ((10.0, 9.8, 10.2), (8.0, 7.9, 8.1), "better"),
        ((10.0, None, None), (11.5, None, None), "worse"),
    ],
)
def test_times(old, new, outcome):
    found = change_of("p50", *(Figure(value, "lower", low, high) for value, low, high in (old, new)), 10.0, 1.0)
    assert found.outcome == outcome


@pytest.mark.parametrize(("share", "outcome"), [(0.80, "worse"), (0.835, "same"), (0.90, "better")])
def test_accuracies_are_compared_in_points(share, outcome):
    found = compare(accuracy(0.84), accuracy(share), **LIMITS)
    assert {change.name: change.outcome for change in found.changes}["accuracy"] == outcome


def test_few_examples_cannot_tell_two_points():
    found = compare(accuracy(0.84, examples=100), accuracy(0.82, examples=100), **LIMITS)
    assert found.changes[0].outcome == "within the noise" and not found.failed


def test_a_slower_model_is_found_by_name():
    found = compare(latency(), latency(factor=1.3), **LIMITS)
    slower = {change.name for change in found.worse}
    assert "batch 8, length 256: ONNX Runtime fp32, compacted, K 32, p50 ms" in slower
    assert "batch 8, length 256: ONNX Runtime fp32, compacted, K 32 / ONNX Runtime fp32, zeroed" in slower
    assert not [name for name in slower if "fp32, zeroed, p50" in name]


def test_a_noisy_machine_fails_nothing():
    assert not compare(latency(spread=0.4), latency(factor=1.3, spread=0.4), **LIMITS).failed


def test_the_same_result_is_the_same():
    for each in (latency(), serving(), accuracy(), faithfulness()):
        found = compare(each, each, **LIMITS)
        assert found.changes and {change.outcome for change in found.changes} == {"same"} and not found.failed


def test_a_check_that_fails_now_is_worse():
    found = compare(faithfulness("passed"), faithfulness("failed"), **LIMITS)
    assert found.failed == ["the check 'mask alone'"]
    assert not compare(faithfulness("failed"), faithfulness("failed"), **LIMITS).failed


def test_other_hardware_is_refused_unless_told():
    other = latency().model_copy(update={"hardware": {**latency().hardware, "cores": 64}})
    with pytest.raises(BenchmarkError, match="cores: 2 and 64.*--other-hardware"):
        compare(latency(), other, **LIMITS)
    found = compare(latency(), other, **LIMITS, other_hardware=True)
    assert "cores: 2 -> 64" in found.notes
    more_memory = latency().model_copy(update={"hardware": {**latency().hardware, "memory_gb": 9.0}})
    assert compare(latency(), more_memory, **LIMITS).changes


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(BenchmarkError, match="'latency', the new of 'serving'"):
        compare(latency(), serving(), **LIMITS)
    data = {**accuracy().inputs, "data": accuracy().inputs["data"].model_copy(update={"sha256": "c" * 64})}
    with pytest.raises(BenchmarkError, match="different data"):
        compare(accuracy(), accuracy().model_copy(update={"inputs": data}), **LIMITS)
    empty = latency().model_copy(update={"figures": {"cells": [], "not_run": []}})
    with pytest.raises(BenchmarkError, match="no figure in common"):
        compare(latency(), empty, **LIMITS)
    broken = latency().model_copy(update={"figures": {}})
    with pytest.raises(BenchmarkError, match="lacks figures"):
        compare(latency(), broken, **LIMITS)


def test_the_command_ends_with_1_and_says_what(tmp_path, capsys):
    old, new = (write_result(tmp_path / name, found) for name, found in
                (("old.json", latency()), ("new.json", latency(factor=1.3))))  # fmt: skip

    assert bench("compare", old, new, "--fail-above", "10%") == 1
    printed = capsys.readouterr()
    assert "compacted, K 32, p50 ms" in printed.err and printed.err.count("\n") == 1
    assert len(json.loads(printed.out.splitlines()[-1])["worse"]) > 0
    assert bench("compare", old, new, "--fail-above", "50%", "--json") == 0
    assert json.loads(capsys.readouterr().out)["worse"] == []
    assert bench("compare", old, new, "--fail-above", "much") == 2
    assert bench("compare", old, tmp_path / "none.json") == 1
