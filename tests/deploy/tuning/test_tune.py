"""rekd-export --tune: which candidates there are, which is chosen, and that the choice is what is published."""

import json

import pytest
from conftest import contents, raising

from rekd_deploy.cli.export_summary import _tuning_note
from rekd_deploy.errors import BenchmarkError, ServerError
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.export.run import publish
from rekd_deploy.repository.config import THREADS, read_config
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.tuning import tune as tuning
from rekd_deploy.tuning.tune import candidates, check_tunable, choice, tune
from rekd_train.errors import ConfigError


@pytest.mark.parametrize(("cores", "expected"), [
    (1, {(1, 1)}), (2, {(1, 1), (1, 2), (2, 1)}), (4, {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}),
    (64, {(1, 1), (1, 32), (1, 8), (2, 1), (2, 32), (8, 1)})])
def test_candidates_share_the_cores(cores, expected):
    found = candidates(cores)
    assert {(each["instances"], each["threads"]) for each in found.values()} == expected and len(found) == len(expected)


def cell(name, clients, per_second, p50, different=0, failed=0):
    judged = {"equal": 9, **({"different": different} if different else {})}
    return {"variant": name, "clients": clients, "per_second": per_second, "failed": failed, "errors": [],
            "milliseconds": {"p50": p50, "p95": 2 * p50, "p99": 3 * p50}, "answers_compared": judged}  # fmt: skip


def test_the_most_requests_of_those_that_answer_a_lone_one_soon_and_none_that_answers_otherwise():
    quick = [cell("quick", 1, 500, 2.0), cell("quick", 8, 900, 9.0)]
    near = [cell("near", 1, 460, 2.19), cell("near", 8, 1100, 8.0)]
    slow = [cell("slow", 1, 400, 2.3), cell("slow", 8, 2000, 4.0)]
    wrong = [cell("wrong", 1, 900, 1.0), cell("wrong", 8, 9000, 1.0, different=1)]
    failing = [cell("failing", 1, 900, 1.0, failed=1), cell("failing", 8, 9000, 1.0)]
    assert choice(quick + near + slow + wrong + failing) == "near"
    assert choice(quick + slow) == "quick"
    with pytest.raises(BenchmarkError, match="answers differ under load; fix: leave out --tune"):
        choice(wrong + failing)


def test_people_are_told_what_was_chosen():
    cells = [cell("1 x 2", 1, 500, 2.0), cell("1 x 2", 8, 900, 9.0), cell("2 x 1", 1, 400, 3.0)]
    figures = {"chosen": "1 x 2", "instances": 1, "threads": 2, "candidates": list(map(tuning._kept, cells))}
    said = "--instances 1 --threads 2, of 2; 500 requests/s with 1 at once, 900 requests/s with 8 at once"
    assert _tuning_note(figures) == f"tuned: {said}"


@pytest.mark.parametrize(("options", "reason"), [
    ({"target": "onnxruntime", "gpu": False}, "the target python on CPUs alone"), ({"gpu": True}, "CPUs alone"),
    ({"engine": "tensorrt-rtx"}, "CPUs alone"), ({"threads": 2}, "leave out --instances and --threads"),
    ({"instances": 1}, "leave out --instances and --threads")])
def test_what_cannot_be_tuned_is_refused_first(options, reason, monkeypatch):
    monkeypatch.setattr(tuning, "find_wheel", raising(ServerError("no server")))
    with pytest.raises(ConfigError, match=reason):
        check_tunable(ExportOptions(**options))
    with pytest.raises(ServerError, match="no server"):
        check_tunable(ExportOptions())


@pytest.mark.slow
def test_what_was_chosen_is_published_with_its_figures_and_a_failure_leaves_what_was_there(checkpoint, tmp_path):
    trials = []
    def chosen(repository):
        check_repository(repository)
        trials.append(repository)
        return {"instances": 3, "threads": 1}, {"chosen": "3 x 1"}
    published = publish(checkpoint, tmp_path / "r", tune=chosen)
    assert published.manifest["tuning"] == {"chosen": "3 x 1"} and "tune" in published.seconds
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["tuning"] == {"chosen": "3 x 1"}
    for name in ("rekd_selector", "rekd_predictor", "rekd_single", "rekd_text"):
        config = read_config(tmp_path / "r" / name / "config.pbtxt")
        assert (config.instance_group[0].count, config.parameters[THREADS].string_value) == (3, "1")
    before = contents(tmp_path / "r")
    with pytest.raises(BenchmarkError):
        publish(checkpoint, tmp_path / "r", tune=raising(BenchmarkError("none")))
    assert contents(tmp_path / "r") == before and not trials[0].exists()


@pytest.mark.triton
def test_candidates_are_served_asked_and_compared(wheel, repository):
    steps = []
    settings, figures = tune(repository, steps.append, rounds=1, seconds=0.5)
    names = candidates(figures["hardware"]["cores"]) if figures["hardware"]["cores"] > 1 else candidates(2)
    assert figures["chosen"] in {each["variant"] for each in figures["candidates"]} <= {*names}
    assert settings == {name: figures[name] for name in ("instances", "threads")} and figures["model"] == "rekd"
    assert {each["clients"] for each in figures["candidates"]} == {1, 8}
    assert all(each["per_second"] > 0 < each["p50"] <= each["p99"] for each in figures["candidates"])
    assert "tune: measure" in steps
