"""Result files of rekd-bench: what they hold, and what is said about one that cannot be read."""

from __future__ import annotations

import json

import pytest

from rekd_deploy.bench.results import Check, Input, figure_rows, read_result, result, write_result
from rekd_deploy.errors import BenchmarkError


def some_result():
    checks = [Check(name="a", outcome="failed", words="too much", value=2.0, limit=1.0),
              Check(name="b", outcome="passed", words="fine", value=float("nan"))]  # fmt: skip
    return result(
        "accuracy", {"section": {"accuracy": 0.5, "nothing": float("nan")}}, checks=checks,
        inputs={"data": Input(name="toy", sha256="ab")}, arguments=["accuracy", "my repo"],
    )  # fmt: skip


def test_a_result_comes_back_as_it_was(tmp_path) -> None:
    made = some_result()
    path = write_result(tmp_path / "new" / "accuracy.json", made)
    assert read_result(path, "accuracy") == made
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


def test_missing_cut_off_and_other_kinds_are_named(tmp_path) -> None:
    with pytest.raises(BenchmarkError, match="does not exist"):
        read_result(tmp_path / "none.json")
    path = write_result(tmp_path / "r.json", some_result())
    with pytest.raises(BenchmarkError, match="holds 'accuracy'; wanted is 'latency'"):
        read_result(path, "latency")
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
