"""rekd-bench accuracy and faithfulness on a tiny served pair: figures, files, verdicts, exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rationalizer
from planted import table_file

from rekd_deploy import Pipeline
from rekd_deploy.bench.accuracy import measure_accuracy
from rekd_deploy.bench.faithfulness import measure_faithfulness
from rekd_deploy.bench.results import read_result
from rekd_deploy.cli.bench import app
from rekd_deploy.export.graphs import export
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints import checkpoint as checkpoints
from rekd_train.config.run import RunConfig
from rekd_train.data import encode, load_data
from rekd_train.evaluation import forward

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("accuracy")
    data = {"name": "table", "path": str(table_file(folder, 60)), "max_length": 48, "test_share": 0.4}
    config = RunConfig.model_validate({"name": "tiny", "data": data})
    pair = make_rationalizer()
    test = encode(load_data(config.data).splits["test"], pair.preprocessor)
    path = checkpoints.save(pair, folder / "pair", metrics={"test": forward.measure(pair, test)},
                            training={"config": config.model_dump()})  # fmt: skip
    return path, write_repository(export(path, folder), folder / "repository")


@pytest.fixture
def accuracy(recorded, tmp_path, run_cli):
    path, repository = recorded

    def ran(*arguments):
        file = tmp_path / "result.json"
        code, out, err = run_cli(app, "accuracy", repository, "--checkpoint", path, "-o", file, *arguments)
        return code, out, err, read_result(file)

    return ran


def test_the_served_predictions_are_measured_as_they_are(recorded, accuracy) -> None:
    path, repository = recorded
    code, out, err, result = accuracy("--json")
    assert code == 0 and out.count("\n") == 1, err
    assert json.loads(out) == result.model_dump(mode="json")
    config = RunConfig.model_validate(checkpoints.read_description(path)["training"]["config"])
    test, own = load_data(config.data).splits["test"], checkpoints.read_metrics(path)["test"]
    answers = Pipeline(repository).predict(test.texts)
    classes = np.array([("negative", "positive").index(answer.label) for answer in answers])
    figures = result.figures
    assert figures["classification"]["accuracy"] == pytest.approx(np.mean(classes == test.labels))
    assert figures["rate"]["rate"] == pytest.approx(np.mean([answer.rate for answer in answers]))
    assert figures["rate"]["over_budget_share"] == 0
    assert sum(bin["examples"] for bin in figures["calibration"]["reliability"]) == len(test) == 24
    assert figures["calibration"]["nll"] == pytest.approx(own["nll"], abs=1e-4)
    assert (figures["reference"]["accuracy"], figures["reference"]["gap_points"]) == (own["accuracy"], 0)
    assert result.checks[0].outcome == "passed"
    assert result.inputs["checkpoint"].sha256 == checkpoints.checkpoint_hash(path)
    # the curve ends where the slots do, and goes on by the checkpoint
    served, whole = figures["curve"]["served"], figures["curve"]["checkpoint"]
    assert served["rates"] == [0.05, 0.1, 0.15, 0.2]  # at most 11 of up to 46
    assert "slots" in served["note"] and "not by what is served" in whole["note"]
    assert whole["rates"][-1] == 1.0 and whole["realised"][-1] == 1.0
    assert served["accuracies"] == whole["accuracies"][:4]
    assert served["realised"] == pytest.approx(whole["realised"][:4])


def test_a_gap_to_the_checkpoint_is_an_error_both_ways(recorded, accuracy, monkeypatch) -> None:
    right, own = forward.measure, checkpoints.read_metrics(recorded[0])["test"]["accuracy"]
    for shift in (0.05, -0.05):  # better is another model, too
        shifted = own + shift
        monkeypatch.setattr(forward, "measure", lambda *given, shifted=shifted: right(*given) | {"accuracy": shifted})
        code, out, err, result = accuracy()
        said, last = err.splitlines()[-1], json.loads(out.splitlines()[-1])
        assert code == 1 and said.startswith("error: served as trained: ")
        assert f"{-100 * shift:+.2f} points (limit 0.5)" in said
        assert (last["kind"], last["checks"]) == ("accuracy", {"served as trained": "failed"})
        assert result.failed and Path(last["result"]).is_file()  # written all the same
        assert accuracy("--limit", "5")[0] == 0, "exactly the limit"


def test_some_examples_or_a_file_without_a_checkpoint_and_wrong_use_is_said(recorded, tmp_path, run_cli) -> None:
    path, repository = recorded
    found = measure_accuracy(repository, checkpoint=path, examples=10)
    assert found.figures["reference"]["examples"] == 10 == found.settings["examples"]
    assert found.figures["reference"]["gap_points"] == 0
    found = measure_accuracy(repository, data=str(table_file(tmp_path, 30, seed=5)))
    assert found.settings["examples"] == 30 and set(found.figures["curve"]) == {"served"}
    assert found.checks[0].outcome == "not applicable" and "no --checkpoint" in found.checks[0].words
    found = measure_faithfulness(recorded[1], data=str(table_file(tmp_path)), examples=24)
    missing = [check.outcome for check in found.checks if "without --checkpoint" in check.words]
    assert set(found.figures["judges"]) == {"pipeline"} and found.settings["examples"] == 24
    assert missing == ["not applicable"] * 3
    other = checkpoints.save(make_rationalizer(seed=1), tmp_path / "other")
    repository, out = recorded[1], tmp_path / "x"
    for arguments, code, said in (
        ([], 2, "REPO"), ([repository, "--url", "localhost:1"], 2, "REPO"), ([repository], 1, "no data to measure on"),
        ([repository, "--data", tmp_path / "none.csv"], 1, "none.csv"),
        ([repository, "--checkpoint", other, "--data", table_file(tmp_path)], 1, "was exported from the checkpoint")):
        found, _, errors = run_cli(app, "accuracy", *arguments, "-o", out)
        assert found == code and said in errors and not out.exists()


def test_every_test_of_faithfulness_runs_on_what_is_served(recorded, tmp_path, run_cli) -> None:
    path, repository = recorded
    file, judge = tmp_path / "result.json", tmp_path / "judge"
    arguments = ["faithfulness", repository, "--checkpoint", path, "--judge", judge, "--device", "cpu", "-o", file]
    code, out, err = run_cli(app, *arguments, "--judge-epochs", "0.5")
    measured = read_result(file)
    outcomes = {check.name: check.outcome for check in measured.checks}
    assert json.loads(out.splitlines()[-1]) == {"kind": "faithfulness", "result": str(file), "checks": outcomes}
    assert code == (1 if measured.failed else 0) and all(check.name in err for check in measured.failed)
    assert all(check.words for check in measured.checks)
    assert outcomes["unselected content has no influence"] == "passed"  # the exported graph, bit for bit
    assert outcomes["rationales lie where the reason is known to be"] == "not applicable"
    swap, judges = measured.figures["structure"]["swap"], measured.figures["judges"]
    assert swap["content_changed"] > 0.5 and swap["examples"] == 24 == measured.settings["examples"]
    assert set(judges) == {"pipeline", "predictor", "independent"}
    figures = {"comprehensiveness", "sufficiency", "aopc_comprehensiveness", "aopc_sufficiency"}
    for judged in ("predictor", "independent"):
        assert set(judges[judged]["rationale"]) == set(judges[judged]["random"]) == figures
    assert {"mask_only", "neutral_content", "other_masks", "random_masks", "tokens"} == set(measured.figures["probes"])
    assert {"repository", "checkpoint", "judge", "data"} == set(measured.inputs)
    # the served answers themselves are the judges' first row
    accuracy = measure_accuracy(repository, checkpoint=path).figures["classification"]["accuracy"]
    assert measured.figures["answers"]["accuracy"] == pytest.approx(accuracy)
    # the judge is kept: the second run reads it, whatever its epochs, and finds the same
    run_cli(app, *arguments)
    assert read_result(file).figures == measured.figures
