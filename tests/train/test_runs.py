"""Whole runs on a planted word and on images, and the independent judge of one: what meets on disk tells the truth."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import fashion_folder, make_image_rationalizer, make_rationalizer, tiny_tokenizer_json
from PIL import Image
from toys import Recorder, ToyTexts, plain, recorded_pair, toy_config

import rekd_train
from rekd_train import runs
from rekd_train.checkpoints import checkpoint
from rekd_train.config.run import RunConfig, run_config
from rekd_train.data import load_data
from rekd_train.data.examples import UNLABELLED, some_sentences, text_id
from rekd_train.data.knowledge import align, read_knowledge
from rekd_train.errors import CheckpointError, ConfigError, DataError
from rekd_train.evaluation.forward import run_masks, run_selector
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.judge import fit_judge, judge_figures, judge_run
from rekd_train.models.families import fresh_pair, preprocessor_for

pytestmark = pytest.mark.slow

TARGET = 0.2
LABELS = ("negative", "positive")
PREPROCESSOR = TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=24))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path, rows = tmp_path_factory.mktemp("planted") / "texts.jsonl", []
    for seed, (split, count) in enumerate({"train": 256, "dev": 64, "test": 48}.items()):
        for number, (text, label) in enumerate(zip(*ToyTexts.words(count, seed), strict=True)):
            # what is learnt from is right, so that processors agree on what is learnt; what measures is not, so that
            # the temperature has something to fit
            wrong = split != "train" and number % 20 == 0
            rows.append(json.dumps({"text": text, "label": LABELS[label ^ wrong], "split": split}))
    path.write_text("\n".join(rows))
    sizes = {"layers": 1, "width": 16, "heads": 2, "feedforward": 32, "head_width": 16}
    network = sizes | {"vocabulary": PREPROCESSOR.vocabulary_size}
    data = {"name": "table", "path": str(path), "split_column": "split", "max_length": 24}
    document = {"name": "toy", "data": data, "selector": network,
                "selection": {"target": TARGET, "budget": 0.3, "minimum": 1}, "predictor": network,
                "optimisation": {"learning_rate": 1e-2, "batch_size": 16},
                "stages": {"classifier_epochs": 8, "rationale_epochs": 8, "compact_epochs": 3}}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        texts = "preprocessor_for", lambda run: PREPROCESSOR if run.data.modality == "text" else preprocessor_for(run)
        patch.setattr(runs, *texts)
        yield lambda **changes: RunConfig.model_validate(document | changes)


@pytest.fixture(scope="module")
def teacher(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "teacher"
    return output, runs.train_run(config(name="teacher"), output)


@pytest.fixture(scope="module")
def student(config, teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "student"
    return output, runs.train_run(config(name="student"), output, teacher=teacher[0])


@pytest.mark.parametrize("run", ["teacher", "student"])
def test_a_run_learns_the_planted_word_within_its_rate(run, request):
    output, metrics = request.getfixturevalue(run)
    assert metrics["test"]["accuracy"] > 0.8
    assert abs(metrics["dev"]["rate"] - TARGET) < 0.05
    assert metrics["test"]["rate_max"] <= 0.3 and metrics["test"]["empty_share"] == 0
    kept = json.loads((output / "metrics.json").read_text())
    assert kept.items() >= metrics.items(), "what is printed is kept"
    log = output.with_name(f"{output.name}.training") / "log.jsonl"
    log = [json.loads(line) for line in log.read_text().splitlines()]
    stages = ["classifier", {"teacher": "rationale", "student": "distillation"}[run], "compact"]
    assert [line["stage"] for line in log if line["event"] == "stage" and line["stage"] != "selector"] == stages
    assert all("loss" in line for line in log if line["event"] == "step")
    pair = rekd_train.load(output)
    assert pair.predictor.operator == "compact"
    prediction = pair.predict(["the film was good and the plot was dark but the actor and the end"])[0]
    assert prediction.label == "positive" and 0 < prediction.rate <= 0.3
    strange = pair.predict(["boring boring boring dull dull dull boring boring"])[0]
    assert prediction.doubt < 0.9 < strange.doubt <= 1, "what the dev texts are like is known"
    card = (output / "README.md").read_text()
    assert "texts.jsonl" in card and f"# {output.name}" in card
    examples = [json.loads(line) for line in (output / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 64 and examples[0].keys() >= {"text", "label"}


def test_compacting_and_calibrating_change_what_they_are_for_alone(student, tmp_path):
    metrics = runs.compact_run(student[0], tmp_path / "compact")
    before, after = (rekd_train.load(path) for path in (student[0], tmp_path / "compact"))
    for name, weight in before.selector.state_dict().items():
        assert torch.equal(weight, after.selector.state_dict()[name]), name
    assert before.policy == after.policy
    assert before.preprocessor.familiarity.packed() == after.preprocessor.familiarity.packed()
    assert any(not torch.equal(w, after.predictor.state_dict()[n]) for n, w in before.predictor.state_dict().items())
    assert metrics["test"]["accuracy"] > 0.8
    metrics = runs.calibrate_run(student[0], tmp_path / "less", 0.1)
    assert abs(metrics["dev"]["rate"] - 0.1) < 0.05
    before, after = (rekd_train.load(path) for path in (student[0], tmp_path / "less"))
    assert after.policy.bias < before.policy.bias
    assert before.preprocessor.familiarity.packed() == after.preprocessor.familiarity.packed()
    assert after.probability_temperature != before.probability_temperature
    runs.calibrate_run(student[0], tmp_path / "top", 0.1, overrides=["selection.decision=top-k"])
    assert rekd_train.load(tmp_path / "top").policy.budget == 0.1
    argmax = ["selection.decision=argmax"]
    for target, overrides, match in (
        (0.1, argmax, "decision is 'argmax'.*fix: --set selection.decision=calibrated"),
        (0.1, [*argmax, "selection.budget=none"], "decision is 'argmax'"),
        *((target, [], "selection.target: Input should be") for target in (0.0, -1.0, 1.5, float("nan"))),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            runs.calibrate_run(student[0], tmp_path / "out", target, overrides=overrides)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "labels", "swapped", "error", "message"), [
    ({}, "abc", False, DataError, r"data have 2 classes .*model has 3 \(a, b, c\); fix"),
    ({}, LABELS[::-1], False, DataError, "classes in the same order"),
    ({}, LABELS, True, ConfigError, "reads other tokens than this run; fix"),
    ({"layers": 2}, LABELS, False, ConfigError, r"other sizes .*\(layers\).*fix")])  # fmt: skip
def test_a_warm_start_that_does_not_fit_is_refused(config, tmp_path, changes, labels, swapped, error, message):
    content, mine = tiny_tokenizer_json(), config()
    if swapped:
        content = content.replace('"film"', '"?"').replace('"movie"', '"film"').replace('"?"', '"movie"')
    other = mine.model_copy(update={"selector": mine.predictor.model_copy(update=changes)})
    pair = fresh_pair(other, TextPreprocessor(content, TextSettings(max_length=24)), labels)
    start = checkpoint.save(pair, tmp_path / "start", training={"name": "start"})
    with pytest.raises(error, match=message):
        runs.train_run(mine, tmp_path / "out", warm_start=start, device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("half", [None, "predictor"])
def test_evidence_is_refused_where_the_selector_has_learnt_nothing(config, student, tmp_path, half):
    mine = config(stages={"operator": "gather", "selector_start": "evidence", "rationale_epochs": 1})
    with pytest.raises(ConfigError, match="has learnt to classify; fix: --warm-start a plain classifier"):
        runs.train_run(mine, tmp_path / "out", warm_start=student[0] if half else None, half=half, device="cpu")
    with pytest.raises(ValueError, match="'evidence' needs operator 'gather'"):
        config(stages={"selector_start": "evidence"})


def test_half_of_a_warm_start_is_taken_over_alone_whatever_the_other_half_s_sizes(config, student, tmp_path):
    mine = config()
    mine = mine.model_copy(update={
        "selector": mine.selector.model_copy(update={"width": 8, "head_width": 8}),
        "predictor": mine.predictor.model_copy(update={"attention_dropout": 0.2}),  # no size
    })
    still = {"learning_rate": 1e-12, "batch_size": 16}
    short = {"operator": "gather", "classifier_epochs": 0.1, "rationale_epochs": 0.1, "compact_epochs": 0}
    mine = RunConfig.model_validate(mine.model_dump() | {"optimisation": still, "stages": short})
    runs.train_run(mine, tmp_path / "out", warm_start=student[0], half="predictor", device="cpu")
    made, start = (rekd_train.load(path).predictor.state_dict() for path in (tmp_path / "out", student[0]))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-6)


def test_the_selector_of_a_plain_classifier_has_yet_to_learn_what_to_gather(config, student, tmp_path, monkeypatch):
    found, pair = [], rekd_train.load(student[0])
    monkeypatch.setattr(checkpoint, "load", lambda path: pair)
    monkeypatch.setattr(runs, "fit", lambda *given, warm, **options: found.append(warm))
    monkeypatch.setattr(runs, "_finish", lambda *given, **options: {})
    for policy in (pair.policy, SelectionPolicy(bias=None, budget=None, minimum=0)):
        pair.policy = policy
        for operator, half in (("zero", None), ("gather", None), ("gather", "selector")):
            mine = config()
            mine = mine.model_copy(update={"stages": mine.stages.model_copy(update={"operator": operator})})
            runs.train_run(mine, tmp_path / "out", warm_start=student[0], half=half, device="cpu", overwrite=True)
    both = ("selector", "predictor")
    assert found == [both, both, ("selector",), both, ("predictor",), ()]


def test_half_of_nothing_is_refused_and_another_half_is_another_run(config, student, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="predictor of no checkpoint .*fix: --warm-start CKPT"):
        runs.train_run(config(), tmp_path / "out", half="predictor", device="cpu")
    found = []
    monkeypatch.setattr(runs, "fit", lambda *given, store, **options: found.append(store._identity))
    monkeypatch.setattr(runs, "_finish", lambda *given, **options: {})
    for half in (None, "predictor", "selector"):
        runs.train_run(config(), tmp_path / "out", warm_start=student[0], half=half, device="cpu", overwrite=True)
    assert len({identity["half"] for identity in found}) == 3


SMALL = [
    "data.train_examples=64", "stages.classifier_epochs=1", "stages.rationale_epochs=1", "stages.compact_epochs=1",
    *(f"{role}.{size}" for role in ("selector", "predictor") for size in ("layers=1", "width=16", "feedforward=16")),
]  # fmt: skip


def test_a_mosaic_is_trained_compared_with_the_true_tile_and_carries_its_images(tmp_path):
    path = tmp_path / "pair"
    config = run_config("mosaic_2x2", [*SMALL, f"data.path={fashion_folder(tmp_path / 'f', 100)}"])
    runs.train_run(config, path, device="cpu")
    report = runs.evaluate_run(path, draws=0, device="cpu")
    assert report["examples"] == report["truth"]["examples"] == 100 and "Fashion-MNIST" in report["data"]
    dev = load_data(config.data).splits["dev"]
    with np.load(path / "examples.npz") as stored:
        pixels, labels = stored["pixels"], stored["labels"]
    assert pixels.shape == (len(dev), 56, 56, 1) and pixels.dtype == np.uint8
    assert (pixels == dev.images[:64]).all() and (labels == dev.labels[:64]).all()
    card = (path / "README.md").read_text()
    assert "How unselected patches are removed" in card and "Fashion-MNIST" in card


def test_an_imported_vision_pair_is_calibrated_on_other_images(tmp_path):
    pair = make_image_rationalizer(labels=tuple(str(digit) for digit in range(10)))
    path = checkpoint.save(pair, tmp_path / "pair", training={"name": "imported", "stage": "imported"})
    budget = ["selection.budget=0.5"]
    metrics = runs.calibrate_run(path, tmp_path / "calibrated", 0.25, "cpu", data="digits", overrides=budget)
    assert metrics["dev"]["rate"] == pytest.approx(0.25, abs=0.08)
    assert json.loads((tmp_path / "calibrated" / "policy.json").read_text())["policy"]["budget"] == 0.5


def test_few_labels_train_on_what_has_one_or_what_the_teacher_tells_about(config, student, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    file, found = tmp_path / "k.parquet", []
    count = runs.record_run(student[0], file, device="cpu")
    monkeypatch.setattr(runs, "fit", lambda config, pair, train, *given, **options: found.append(train.labels))
    monkeypatch.setattr(runs, "_finish", lambda *given, **options: {})
    few = config(data=config().data.model_dump() | {"labelled_examples": 12})
    for teacher in (None, file, student[0]):
        runs.train_run(few, tmp_path / "out", teacher=teacher, device="cpu", overwrite=True)
    assert [len(labels) for labels in found] == [12, count, count] and (found[0] != UNLABELLED).all()
    assert all((labels != UNLABELLED).sum() == 12 for labels in found[1:])
    counts = runs.check_knowledge(file, few.data)
    assert counts["known"] == counts["statements"] and counts["agreement"] is not None


def test_a_text_that_is_a_sentence_is_told_about_once(config, student, tmp_path):
    pytest.importorskip("pyarrow")
    texts = [*load_data(config().data).splits["train"].texts]
    assert set(some_sentences(texts, 1)) <= set(texts) and some_sentences(texts, 1)
    count = runs.record_run(student[0], tmp_path / "k.parquet", sentences=1, device="cpu")
    assert count == len(set(texts)) == len(read_knowledge(tmp_path / "k.parquet", LABELS).statements)


def test_later_passages_are_told_about(config, student, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(runs, "later_passages", lambda text: [f"later {text}"])
    texts = {*load_data(config().data).splits["train"].texts}
    for passages, told in ((True, texts | {f"later {text}" for text in texts}), (False, texts)):
        count = runs.record_run(student[0], tmp_path / "k.parquet", passages=passages, device="cpu", overwrite=True)
        said = read_knowledge(tmp_path / "k.parquet", LABELS).statements
        assert count == len(said) and said.keys() == {text_id(text) for text in told}


def test_an_image_pair_is_recorded_and_teaches_from_the_file(tmp_path):
    pytest.importorskip("pyarrow")
    generator = np.random.default_rng(0)
    for number in range(48):
        path = tmp_path / "pictures" / ("dark", "bright")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (20, 30), dtype=np.uint8) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    own = [*SMALL, "data.name=image_folder", f"data.path={tmp_path / 'pictures'}", "data.augmentation=none"]
    config, file = run_config("fashion_teacher", own), tmp_path / "k.parquet"
    runs.train_run(config, tmp_path / "teacher", device="cpu")
    assert runs.record_run(tmp_path / "teacher", file, device="cpu") == 38
    counts = runs.check_knowledge(file, config.data)
    assert counts["statements"] == counts["known"] == 38 and counts["probabilities"] == counts["scores"] == 1
    pair, images = checkpoint.load(tmp_path / "teacher"), load_data(config.data).splits["train"].images
    knowledge = read_knowledge(file, pair.labels, "image")
    said = align(knowledge, images, pair.preprocessor, 2, tmp_path / "pictures")
    scores = pair.select({"pixels": torch.from_numpy(pair.preprocessor(images).inputs["pixels"])}).scores
    np.testing.assert_allclose(said.scores, scores.detach(), rtol=0, atol=6e-4)
    metrics = runs.train_run(run_config("fashion_student", own), tmp_path / "student", teacher=file, device="cpu")
    assert metrics["test"]["rate"] > 0
    flipped = run_config("fashion_student", [*own, "data.augmentation=flip"])
    with pytest.raises(ConfigError, match="images as they are; fix: --set data.augmentation=none"):
        runs.train_run(flipped, tmp_path / "other", teacher=file)
    with pytest.raises(CheckpointError, match="no.parquet does not exist; fix: --teacher CKPT, or a file"):
        runs.train_run(config, tmp_path / "other", teacher=tmp_path / "no.parquet")
    with pytest.raises(DataError, match="k.jsonl would hold Parquet; fix: --output .*k.parquet"):
        runs.record_run(tmp_path / "teacher", tmp_path / "k.jsonl")
    with pytest.raises(DataError, match="sentences 1, but the pair reads images; fix: leave --sentences out"):
        runs.record_run(tmp_path / "teacher", tmp_path / "sentences.parquet", sentences=1)
    with pytest.raises(DataError, match="passages, but the pair reads images; fix: leave --passages out"):
        runs.record_run(tmp_path / "teacher", tmp_path / "passages.parquet", passages=True)


@pytest.mark.parametrize("operator", ["zero", "compact"])
def test_it_learns_to_read_what_is_shown_and_no_more(operator) -> None:
    judge = plain(make_rationalizer(11, operator=operator))
    train, dev = ToyTexts.split(judge, 512, 1), ToyTexts.split(judge, 128, 2)
    selector = copy.deepcopy(judge.selector.state_dict())
    fit_judge(toy_config(), judge, train, epochs=8)
    figures = judge_figures(judge, dev)
    assert judge.predictor.operator == operator and figures["accuracy"] > 0.9
    assert 0.45 < figures["accuracy_random_10"] < figures["accuracy_random_50"] < 0.95
    assert all(torch.equal(value, selector[name]) for name, value in judge.selector.state_dict().items())
    cues = [judge.preprocessor.encode([word])[0].ids[1] for word in ("bad", "good")]
    shown = torch.zeros_like(run_selector(judge, dev).selectable)
    for row in range(len(dev)):
        ids = dev.inputs([row])["input_ids"][0]
        shown[row, : len(ids)] = torch.from_numpy(np.isin(ids, cues))
    alone = run_masks(judge, dev, {"cue": shown})["cue"].argmax(axis=1)
    assert np.mean(alone == dev.labels) > 0.9  # a rationale of one word is enough for it


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path, observer = recorded_pair(tmp_path_factory.mktemp("judge")), Recorder()
    return path, judge_run(path, path.with_name("judge"), epochs=0.5, observer=observer, device="cpu"), observer


def test_it_is_trained_once_and_kept_and_another_models_is_refused(trained) -> None:
    path, judge, observer = trained
    kept = judge_run(path, path.with_name("judge"), observer=observer, device="cpu")
    assert [name for name, *_ in observer.stages] == ["judge"]
    own = checkpoint.load(path)
    for mine, theirs, pairs in zip(*(each.predictor.parameters() for each in (judge, kept, own)), strict=True):
        # other weights than the pair's predictor, from the first layer to the last
        assert torch.equal(mine, theirs) and not (pairs.std() > 0 and torch.equal(mine, pairs))
    assert kept.predictor.operator == own.predictor.operator and kept.policy.bias is None
    dev = checkpoint.read_metrics(path.with_name("judge"))["dev"]
    assert set(dev) == {"accuracy", "accuracy_random_10", "accuracy_random_50"}
    for options, match in (
        ({"epochs": 1.0}, "epochs differ"), ({"overrides": ["seed=5"]}, "seed differ"),
        ({"overrides": ["data.class_weights=balanced"]}, "data differ"), ({"output": "pair"}, "but no judge"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=match):
            judge_run(path, path.with_name(options.pop("output", "judge")), device="cpu", **options)
    file = path.with_name("judge") / "config.json"
    description = json.loads(file.read_text())
    del description["training"]["judge"]["data"]["class_weights"]
    file.write_text(json.dumps(description))
    judge_run(path, file.parent, device="cpu")  # one from before a setting is still taken
