"""Faithfulness tests of models of known behaviour; the commands accuracy and faithfulness on a tiny served pair."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_rationalizer
from planted import Planted, ideal_judge, planted_texts, table_file

from rekd_deploy import Pipeline
from rekd_deploy.bench import probes
from rekd_deploy.bench.accuracy import measure_accuracy
from rekd_deploy.bench.examples import features_of
from rekd_deploy.bench.faithfulness import (
    examine,
    exchanged,
    measure_faithfulness,
    other_examples,
    swap_check,
    swap_test,
)
from rekd_deploy.bench.judges import judged, known_reasons, random_masks
from rekd_deploy.bench.results import read_result
from rekd_deploy.bench.subject import Exam, Selected
from rekd_deploy.cli.bench import app
from rekd_deploy.export.graphs import export
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints import checkpoint as checkpoints
from rekd_train.config.run import RunConfig
from rekd_train.data import ImageSplit, LabelledImages, encode, load_data
from rekd_train.data.published import make_mosaics
from rekd_train.evaluation import forward
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings

pytestmark = pytest.mark.slow

SWAP = "unselected content has no influence"
HURTS = "removing the rationale hurts the independent judge"
KNOWN = "rationales lie where the reason is known to be"


@pytest.fixture(scope="module")
def split():
    return planted_texts()


@pytest.fixture(scope="module")
def features(split):
    return features_of(split, split.preprocessor)


@pytest.fixture(scope="module")
def examined(split, features):
    def found(kind):
        subject = Planted(split.preprocessor, kind)
        figures, checks = examine(subject, features, split, {"independent": ideal_judge(features)})
        return SimpleNamespace(**figures, outcomes={check.name: check.outcome for check in checks})
    return found


def exam_of(features, labels, mask) -> Exam:
    chosen, logits = Selected(np.zeros(mask.shape, np.float32), mask), np.zeros((len(labels), 2), np.float32)
    return Exam(Planted(features.preprocessor, "honest"), features, chosen, logits, labels)


def test_an_honest_model_passes_every_check_and_a_planted_code_is_caught(examined) -> None:
    found = examined("honest")
    assert set(found.outcomes.values()) == {"passed"}, found.outcomes
    assert found.answers["accuracy"] == 1.0
    swap, pipeline, judge = found.structure["swap"], found.judges["pipeline"], found.judges["independent"]
    assert swap["largest_difference"] == 0 and swap["content_changed"] > 0.8
    assert found.structure["selected_swap"]["follows"] == 1.0
    assert pipeline["rationale"]["sufficiency"] == 0  # by construction
    # without its cue the honest model answers (1/2, 1/2); before it was all but sure
    assert pipeline["rationale"]["comprehensiveness"] == pytest.approx(0.5, abs=0.01)
    assert judge["rationale"]["comprehensiveness"] == pytest.approx(0.45)
    assert judge["rationale"]["sufficiency"] == pytest.approx(0)
    assert judge["accuracy"]["rationale"] == 1.0 and judge["accuracy"]["rest"] == 0.5
    found = examined("cheat")
    assert found.answers["accuracy"] == 1.0 and found.outcomes[SWAP] == "passed"
    follows = "the answer follows the selected content"
    for name in (probes.MASK_ONLY, probes.NEUTRAL, probes.OTHERS, probes.CODE, follows, HURTS, KNOWN):
        assert found.outcomes[name] == "failed", name
    assert found.probes["mask_only"]["mask_only"] > 0.95 and found.probes["neutral_content"]["accuracy"] == 1.0
    assert found.probes["other_masks"]["follows_other_class"] > 0.95
    assert found.structure["selected_swap"]["follows"] == 0.0
    assert found.judges["independent"]["accuracy"]["rationale"] == 0.5


def test_random_masks_score_at_the_level_of_chance(examined, features) -> None:
    found = examined("random")
    kept_of_one = float(np.mean(3 / features.counts))  # chance that three of n words hold the one cue
    inside, judge = found.known["share_inside"], found.judges["independent"]
    assert inside["rationale"] == pytest.approx(kept_of_one / 3, abs=0.03)
    assert inside["gain"]["low"] < 0 < inside["gain"]["high"]
    for kind in ("rationale", "random"):
        assert judge[kind]["comprehensiveness"] == pytest.approx(0.45 * kept_of_one, abs=0.05)
        assert judge["accuracy"][kind] == pytest.approx(0.5 + kept_of_one / 2, abs=0.08)
    assert found.outcomes[HURTS] == found.outcomes[KNOWN] == "failed"
    # what it gets right the judge gets right as well: bad rationales, but no code
    for name in (probes.MASK_ONLY, probes.OTHERS, probes.CODE):
        assert found.outcomes[name] != "failed", name


def test_an_influence_of_a_millionth_is_found_and_no_swap_proves_nothing(examined, split, features):
    found, changed = examined("leaky"), 0.9 * len(split)
    assert found.outcomes[SWAP] == "failed" and found.structure["swap"]["examples_changed"] > changed
    assert 0 < found.structure["swap"]["largest_difference"] < 1e-2
    found = swap_test(exam_of(features, split.labels, features.selectable), np.random.default_rng(0))
    assert found["content_changed"] == 0 and swap_check(found).outcome == "not applicable"


def test_exchanged_words_and_patches_leave_the_rest(split, features) -> None:
    donors = other_examples(len(features), np.random.default_rng(0))
    assert (donors != np.arange(len(features))).all() and donors.max() < len(features)
    where = features.selectable & (np.arange(features.selectable.shape[1]) % 2 == 0)
    swapped = exchanged(features, where, donors)
    assert (swapped.content[~where] == features.content[~where]).all()
    assert not np.isin(swapped.content[where], list(split.preprocessor.special_ids.values())).any()
    split = mosaics()
    features = features_of(split, split.preprocessor)
    assert features.content.shape == (120, 16, 2, 2, 1)
    for rows, inputs in features.batches(50):
        np.testing.assert_array_equal(inputs["pixels"], split.pixels[rows])
    one = features.selectable & (np.arange(16) == 5)  # second row, second column
    swapped = exchanged(features, one, other_examples(120, np.random.default_rng(0)))
    for rows, inputs in swapped.batches(120):
        different = inputs["pixels"] != split.pixels[rows]
        assert different[:, 2:4, 2:4].any() and not np.delete(different, [2, 3], axis=1).any()
    preprocessor = ImagePreprocessor(ImageSettings(8, 8, 1, 3, 3))
    images = encode(LabelledImages(np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 2), preprocessor)
    assert not features_of(images, preprocessor).separable and swap_check(None).outcome == "not applicable"


def test_small_classes_lengths_that_tell_the_label_and_empty_and_full_rationales(split, features) -> None:
    labels = np.arange(len(split)) // (len(split) - 1)
    assert labels.sum() == 1 and probes.mask_probe(features.selectable, features, labels) is None
    _, checks = probes.leakage(exam_of(features, labels, features.selectable))
    assert {check.outcome for check in checks} == {"not applicable"}
    labels = (np.argsort(np.argsort(split.lengths)) >= len(split) // 2).astype(np.int64)
    third = features.selectable & (np.arange(features.selectable.shape[1]) % 3 == 0)
    mask = random_masks(third, features.selectable, np.random.default_rng(0))
    probe = probes.mask_probe(mask, features, labels)
    assert probe.figures["mask_only"] > 0.9 and probe.figures["length_only"] > 0.95
    assert probe.pattern.mean() - probe.baseline.mean() <= 0.05
    subject = Planted(split.preprocessor, "honest")
    subject.classify = lambda inputs, mask: np.tile(np.float32([0, 1]), (len(mask), 1))  # nobody of another class
    checks = {check.name: check.outcome for check in examine(subject, features, split, {})[1]}
    assert checks["the answer follows the selected content"] == "not applicable"
    for full, comprehensiveness, sufficiency in ((False, 0, 0.45), (True, 0.45, 0)):  # p(x) - p(nothing)
        found = judged(ideal_judge(features), exam_of(features, split.labels, features.selectable & full)).figures
        assert found["rationale"]["comprehensiveness"] == pytest.approx(comprehensiveness)
        assert found["rationale"]["sufficiency"] == pytest.approx(sufficiency)


def mosaics(tiles: int = 2, count: int = 120) -> ImageSplit:
    random, side = np.random.default_rng(0), 4 * tiles
    items = LabelledImages(random.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8), np.arange(count) % 3)
    preprocessor = ImagePreprocessor(ImageSettings(side, side, 1, side // 2, side // 2))
    return encode(make_mosaics(items, tiles, random), preprocessor)


@pytest.mark.parametrize("tiles", [2, 3])
def test_random_masks_find_the_true_tile_as_often_as_it_is_large(tiles) -> None:
    split = mosaics(tiles)
    features, random = features_of(split, split.preprocessor), np.random.default_rng(1)
    mask = random_masks(features.selectable & (np.arange(features.selectable.shape[1]) < 4), features.selectable,
                        random)  # fmt: skip
    figures, check = known_reasons(split, features, Selected(random.random(mask.shape).astype(np.float32), mask))
    for found in (figures["truth"], figures["truth"]["random"]):
        assert found["in_truth"] == pytest.approx(1 / tiles**2, abs=0.06)
    assert check.outcome == "failed"
    truth = np.stack(split.truth)
    figures, check = known_reasons(split, features, Selected(truth.astype(np.float32), truth))
    assert figures["share_inside"]["rationale"] == 1.0 and check.outcome == "passed"


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
    for name in ("predictor", "independent"):
        assert set(judges[name]["rationale"]) == set(judges[name]["random"]) == figures
    assert {"mask_only", "neutral_content", "other_masks", "random_masks", "tokens"} == set(measured.figures["probes"])
    assert {"repository", "checkpoint", "judge", "data"} == set(measured.inputs)
    # the served answers themselves are the judges' first row
    accuracy = measure_accuracy(repository, checkpoint=path).figures["classification"]["accuracy"]
    assert measured.figures["answers"]["accuracy"] == pytest.approx(accuracy)
    # the judge is kept: the second run reads it, whatever its epochs, and finds the same
    run_cli(app, *arguments)
    assert read_result(file).figures == measured.figures
