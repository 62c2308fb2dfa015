"""Training on tasks with a planted signal: every stage learns, from live and recorded teachers; dev."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_image_rationalizer, make_rationalizer, trained_tokenizer
from toys import ToyTexts, fitted, toy_config, toy_images, toy_texts

from rekd_train.data import LabelledTexts, splits, tokenize
from rekd_train.data import knowledge as known
from rekd_train.data.examples import UNLABELLED, DataSet, later_passages, sentences, some_sentences
from rekd_train.data.knowledge import AlignedKnowledge, Knowledge, Statement
from rekd_train.errors import ConfigError, DataError
from rekd_train.evaluation.forward import measure, run_masks, run_selector
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models.base import apply_policy
from rekd_train.training import objectives
from rekd_train.training.checks import check_teacher, short_texts_notice
from rekd_train.training.runtime import Batch, Runtime, example_weights
from rekd_train.training.stages import compact_pair, fit
from rekd_train.training.teacher import statements_of, write_knowledge
from rekd_train.training.validation import DevEvaluation, base_policy, calibrate_bias, calibrate_policy

LONG = {"classifier_epochs": 8, "rationale_epochs": 10, "compact_epochs": 4, "evaluate_every": 2}


@pytest.fixture(scope="module")
def trained():
    """A pair of images trained alone, and its log; tests/train/test_runs.py has texts."""
    return fitted(toy_images(), stages=LONG)


HALVES = ("selector", "predictor")


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_planted_signal_is_found_within_the_budget(trained):
    pair, log = trained
    assert [name for name, *_ in log.stages] == ["classifier", "selector", "rationale", "compact"]
    for stage, readings in log.values.items():
        assert readings[-1]["loss"] < readings[0]["loss"], stage
    figures = measure(pair, toy_images()[2])
    assert figures["accuracy"] > 0.95 and figures["rate"] == pytest.approx(0.15, abs=0.02)
    assert figures["rate_max"] <= 0.3 and pair.predictor.operator == "compact" and not pair.training


def test_a_student_learns_the_teacher_s_rationales(trained):
    made = toy_images(seed=4)
    student, log = fitted(made, options={"teacher": copy.deepcopy(trained[0])}, stages=LONG)
    rationale = log.losses("distillation", "rationale")
    assert rationale[-1] < 0.8 * rationale[0] and measure(student, made[2])["accuracy"] > 0.6, "chance is a third"


def test_a_seed_fixes_everything_and_another_changes_it():
    one, _ = fitted()
    torch.manual_seed(9)  # whatever the state of torch's own generator
    assert same(one, fitted()[0]) and not same(one, fitted(seed=4)[0])


@pytest.mark.parametrize(("selector", "predictor", "starts"), [
    ({}, {}, True),
    ({"pretrained": "mine"}, {}, False),  # it has pretrained weights of its own
    ({"word_embeddings": "minilm"}, {}, False),
    ({"pretrained": "mine"}, {"pretrained": "mine"}, True),  # one source for both
])  # fmt: skip
def test_a_selector_of_the_predictor_s_size_starts_from_it(selector, predictor, starts):
    made = toy_texts(equal=True)
    before = copy.deepcopy(made[0].selector.backbone)
    stages = {"classifier_epochs": 1, "rationale_epochs": 0.03, "compact_epochs": 0}
    changes = {"selector": selector, "predictor": predictor, "optimisation": {"learning_rate": 1e-9}}
    pair, log = fitted(made, stages=stages, **changes)
    assert [name for name, *_ in log.stages] == ["classifier", *([] if starts else ["selector"]), "rationale"]
    start = pair.predictor.backbone if starts else before
    for mine, theirs in zip(pair.selector.backbone.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_the_warm_start_of_an_unequal_selector_teaches_its_backbone_and_can_be_left_out():
    stages = {"selector_warm_start": 8, "classifier_epochs": 1, "rationale_epochs": 0.03, "compact_epochs": 0}
    losses = fitted(stages=stages)[1].losses("selector")
    assert losses[-1] < losses[0] - 0.01
    assert "selector" not in fitted(stages=stages | {"selector_warm_start": 0})[1].values
    assert list(fitted(options={"warm": HALVES})[1].values) == ["rationale", "compact"]


GATHER = LONG | {"operator": "gather", "classifier_epochs": 10}


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_on_gathered_features_the_votes_of_single_ones_show_the_selector_the_way(make):
    pair, log = fitted(make(), stages=GATHER)
    assert [name for name, *_ in log.stages] == ["selector", "rationale", "compact"]
    assert log.values["selector"][-1]["selection_rate"] == pytest.approx(0.15, abs=0.05)
    figures = measure(pair, make()[2])
    assert figures["accuracy"] > 0.95 and figures["rate_max"] <= 0.3 and pair.predictor.operator == "compact"


@pytest.mark.parametrize(("warm", "names", "follows", "changes"), [
    ((), ["selector", "rationale"], True, {}),
    (("predictor",), ["selector", "rationale"], False, {}),
    (("selector",), ["rationale"], False, {}),
    (HALVES, ["rationale"], False, {}),
    ((), ["selector", "rationale"], False, {"predictor": {"pretrained": "mine"}}),  # it has weights of its own
    ((), ["selector", "rationale"], True, {"selector": {"word_embeddings": "minilm"}}),
])  # fmt: skip
def test_on_gathered_features_a_predictor_of_the_selector_s_size_starts_from_it(warm, names, follows, changes):
    made = toy_texts(equal=True)
    before = copy.deepcopy(made[0].predictor.backbone)
    stages = {"operator": "gather", "classifier_epochs": 2, "rationale_epochs": 0.03, "compact_epochs": 0}
    pair, log = fitted(made, stages=stages, optimisation={"learning_rate": 1e-9}, options={"warm": warm}, **changes)
    assert [name for name, *_ in log.stages] == names
    start = pair.selector.backbone if follows else before
    for mine, theirs in zip(pair.predictor.backbone.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_evidence_is_learnt_by_a_head_over_what_a_classifier_reads():
    made = toy_texts(equal=True)
    alone = {"classifier_epochs": 10, "masked_share": 0, "rationale_epochs": 0, "operator": "gather"}
    classifier = fitted(made, stages=alone)[0]
    before = copy.deepcopy(classifier.selector.backbone.state_dict())
    stages = GATHER | {"selector_start": "evidence", "selector_warm_start": 10, "rationale_epochs": 0.1}
    pair, log = fitted((classifier, *made[1:]), stages=stages, options={"warm": ("predictor",)})
    assert [name for name, *_ in log.stages] == ["selector", "rationale", "compact"]
    for name, value in pair.selector.backbone.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was a classifier's"
    assert log.losses("selector")[-1] < log.losses("selector")[0]
    figures = measure(pair, made[2])
    assert figures["accuracy"] > 0.95 and figures["rate_max"] <= 0.3


@pytest.mark.parametrize("start", ["votes", "evidence"])
@pytest.mark.parametrize("told", [False, True])
def test_a_selector_that_classified_first_keeps_its_network_while_a_head_learns_what_to_keep(trained, told, start):
    pair, train, *rest = toy_images(seed=4)
    if told:  # then the teacher alone tells the class
        train.labels[:] = UNLABELLED
        train.labels[:2] = 0, 1
    stages = GATHER | {"masked_share": 0, "selector_classifier_epochs": 20, "selector_warm_start": 10}
    states: dict[int, Any] = {}

    class Store:
        def save(self, snapshot):
            states.setdefault(snapshot.stage, copy.deepcopy(snapshot.pair))

    options = {"teacher": copy.deepcopy(trained[0]) if told else None, "store": Store()}
    made, log = fitted((pair, train, *rest), stages=stages | {"selector_start": start}, options=options)
    assert [name for name, *_ in log.stages][:2] == ["selector_classifier", "selector"]
    losses = log.losses("selector_classifier")
    assert losses[-1] < 0.8 * losses[0]
    for name, value in made.selector.state_dict().items():
        before = states[1][f"selector.{name}"]
        assert torch.equal(value, before) == name.startswith("backbone."), name
    assert all(each.requires_grad for each in made.parameters())
    assert measure(made, rest[0])["accuracy"] > 0.6, "chance is a third"


def test_a_teacher_s_rationale_takes_the_place_of_the_votes(trained):
    brief = {"operator": "gather", "classifier_epochs": 1, "rationale_epochs": 0.03, "compact_epochs": 0}
    silent = np.full((256, 3), 1 / 3, dtype=np.float32)

    def names(teacher=None, **changes):
        _, log = fitted(toy_images(), options={"teacher": teacher}, **({"stages": brief} | changes))
        return [name for name, *_ in log.stages], log.notes

    classes_alone = AlignedKnowledge(silent, [None] * 256, [None] * 256)
    marked = AlignedKnowledge(silent, [None] * 256, [np.ones(12, dtype=np.float32), *[None] * 255])
    assert names(trained[0]) == (["distillation"], []) and names(marked)[0] == ["distillation"]
    assert names(trained[0], distillation={"alpha": 1.0})[0] == ["selector", "distillation"]
    assert names() == (["selector", "rationale"], [])
    assert names(classes_alone)[0] == names(trained[0], distillation={"rationale_weight": 0})[0] == [
        "selector", "distillation"]  # fmt: skip
    stages, notes = names(stages=brief | {"selector_warm_start": 0})
    assert stages == ["rationale"] and "nothing tells the selector what to keep" in notes[0]


def test_on_dev_a_drawn_rationale_is_read_whole_whatever_the_budget():
    pair, _, dev = toy_texts()
    pair.predictor.use("compact")
    config = toy_config(selection={"target": 0.05, "budget": 0.05}, stages={"evaluation": "sampled"})
    pair.policy = base_policy(config.selection)
    evaluation = DevEvaluation(config, pair, pair.predictor, dev, Runtime("cpu"), with_rationale=True)
    evaluation(0)
    drawn = evaluation._mask
    assert drawn.sum(dim=1).max() > pair.capacity
    whole = torch.from_numpy(run_masks(pair, dev, {"drawn": drawn})["drawn"])
    torch.testing.assert_close(evaluation._class_logits(), whole, rtol=0, atol=1e-5)


def test_a_selector_that_is_not_trained_draws_no_dropout():
    (pair, train, dev), modes = toy_images(examples=64, augmented=True), set()
    forward = pair.train().selector.forward
    pair.selector.forward = lambda inputs: (modes.add(pair.selector.training), forward(inputs))[1]
    compact_pair(toy_config(stages={"compact_epochs": 1}), pair, train, dev)
    assert modes == {False}


def test_one_half_of_a_warm_start_leaves_the_other_its_own():
    stages = {"classifier_epochs": 1, "rationale_epochs": 0.03, "compact_epochs": 0}
    for half, names in (("predictor", ["selector", "rationale"]), ("selector", ["classifier", "rationale"])):
        assert [name for name, *_ in fitted(stages=stages, options={"warm": (half,)})[1].stages] == names


def test_plain_classifier_and_plain_distillation(trained):
    settings = {"stages": {"rationale_epochs": 0, "masked_share": 0.0, "classifier_epochs": 2}}
    taught, distilled = {"teacher": trained[0]}, {"distillation": {"classifier": True}}
    alone, _ = fitted(toy_images(), **settings)
    assert (alone.policy.bias, alone.policy.budget, alone.policy.minimum) == (None, None, 0)
    assert not same(alone, fitted(toy_images(), options=taught, **distilled, **settings)[0])
    brief = {"stages": {"classifier_epochs": 1, "rationale_epochs": 0.2, "compact_epochs": 0, "masked_share": 0.0}}
    logs = [fitted(toy_images(), options=options, **brief)[1].losses("classifier") for options in ((), taught)]
    assert logs[0] == logs[1], "labels alone, unless the classifier is to learn"
    with pytest.raises(ConfigError, match="no stage learns from it"):
        fitted(toy_images(), options=taught, **settings)
    with pytest.raises(ConfigError, match="plain classifier"):
        fitted(toy_images(), options={"teacher": alone})
    weightless = {"distillation": {"rationale_weight": 0.0}, "stages": {"rationale_epochs": 0.2}}
    fitted(toy_images(), options={"teacher": alone}, **weightless)


@pytest.mark.parametrize(("selection", "policy"), [
    ({"decision": "argmax"}, (0.0, 0.3, 1, "real")),
    ({"decision": "top-k"}, (None, 0.15, 1, "real")),
    ({"decision": "argmax", "budget": None, "minimum": 0, "selectable": "all"}, (0.0, None, 0, "all")),
])  # fmt: skip
def test_stored_rules(selection, policy):
    found = fitted(selection=selection, stages={"rationale_epochs": 0.2, "compact_epochs": 0})[0].policy
    assert (found.bias, found.budget, found.minimum, found.selectable) == policy


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_where_padding_is_selectable_every_batch_has_all_of_it(whose):
    (pair, train, dev), teacher, seen = toy_texts(), toy_texts(seed=2)[0], set()
    watched, selection = pair, {"selectable": "all", "denominator": "all", "penalty_on": "counts", "weight": 1e-3}
    if whose == "teacher":
        teacher.policy = teacher.policy.model_copy(update={"selectable": "all"})
        watched, selection = teacher, {}
    forward = watched.selector.forward
    watched.selector.forward = lambda inputs: (
        seen.add((inputs["input_ids"].shape[1], pair.policy.selectable)), forward(inputs))[1]  # fmt: skip
    fit(toy_config(selection=selection, stages={"compact_epochs": 0}), pair, train, dev, teacher=teacher)
    assert seen == {(pair.preprocessor.positions, "all" if whose == "student" else "real")}


def test_augmented_images_are_read_anew(monkeypatch):
    augment, seen = splits.augment, []
    monkeypatch.setattr(splits, "augment", lambda *given: (seen.append(given[1]), augment(*given))[1])
    _, log = fitted(toy_images(augmented=True), options={"teacher": toy_images(seed=3)[0]})
    steps = sum(steps for _, steps, _ in log.stages)
    assert seen == ["flip"] * steps, "one batch a step, no pass over the split"


# what cannot be trained


def test_labels_that_are_no_classes():
    pair, train, dev = toy_texts()
    with pytest.raises(DataError, match="split 'dev' has the label -1.*fix"):
        fit(toy_config(), pair, train, replace(dev, labels=dev.labels - 1))


def cut_short():
    teacher = make_rationalizer()
    for model in (teacher.selector, teacher.predictor):
        model.backbone.settings = model.backbone.settings.model_copy(update={"positions": 32})
    return teacher


def reading(content="", *sizes: int):
    """A teacher that reads texts by another tokenizer, or other images."""
    teacher = make_rationalizer() if content else make_image_rationalizer()
    images = ImagePreprocessor(ImageSettings(*sizes)) if sizes else None
    teacher.preprocessor = images or TextPreprocessor(content, teacher.preprocessor.settings)
    return teacher


@pytest.mark.parametrize(("teacher", "match"), [
    (lambda: make_rationalizer(labels="abc"), r"teacher has 3 classes \(a, b, c"),
    (lambda: make_rationalizer(labels=("positive", "negative")), "orders its classes otherwise"),
    (cut_short, "reads at most 32 tokens.*up to 48; fix: data.max_length=32"),
    (lambda: reading(trained_tokenizer("word pieces")), "another tokenizer; distillation needs the same tokens; fix"),
    (lambda: make_image_rationalizer(labels=("negative", "positive")), "reads image inputs, the student text inputs"),
    (lambda: reading("", 16, 12, 1, 8, 6), r"into \(8, 6\).*patches, the student into \(4, 3\)"),
    (lambda: reading("", 24, 12, 1, 4, 3), r"images of \(24, 12, 1\).*not of \(16, 12, 1\)"),
])  # fmt: skip
def test_a_teacher_that_does_not_fit(teacher, match):
    teacher = teacher()
    images = teacher.preprocessor.settings.kind == "image" and len(teacher.labels) == 3
    with pytest.raises(ConfigError, match=match):
        check_teacher(teacher, (make_image_rationalizer if images else make_rationalizer)(), toy_config())


@pytest.mark.parametrize(("selection", "words", "allowed"), [
    ({"decision": "top-k", "target": 0.1}, 29, "29 words, of which selection.target=0.1 allows 2"),
    ({"decision": "top-k", "target": 0.1}, 30, ""),
    ({"decision": "calibrated", "target": 0.1, "budget": 0.15}, 10, "selection.budget=0.15 allows 1"),
    ({"decision": "calibrated", "target": 0.1, "budget": 0.15}, 20, ""),
    ({"decision": "argmax", "budget": None}, 3, ""),
    (None, 5, ""),
])  # fmt: skip
def test_a_budget_below_three_words_is_noted_for_texts_that_are_short(selection, words, allowed):
    """Most of 9 texts have so many words, a few are longer."""
    lengths, preprocessor = [words] * 6 + [40] * 3, make_rationalizer().preprocessor
    texts = LabelledTexts(["good " * length for length in lengths], np.arange(9) % 2)
    config = toy_config(selection=selection) if selection else toy_config(stages={"rationale_epochs": 0})
    notice = short_texts_notice(config, tokenize(texts, preprocessor), preprocessor)
    assert allowed in notice and bool(notice) == bool(allowed)
    more = LabelledTexts([*texts.texts, *["good"] * 20], np.append(texts.labels, [UNLABELLED] * 20))
    assert short_texts_notice(config, tokenize(more, preprocessor), preprocessor) == notice, "sentences do not count"
    pair, train, _ = toy_images()
    assert short_texts_notice(toy_config(selection={"target": 0.05, "budget": 0.05}), train, pair.preprocessor) == ""


# dev: what is fitted on it, and how a pair is measured on it in training

RULE = SelectionPolicy(bias=0.0, budget=0.5, minimum=1)
ARGMAX = {"decision": "argmax", "budget": None, "minimum": 0}
CPU = Runtime("cpu")
SCORES = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
SELECTABLE = torch.arange(12) < 6 + torch.arange(40)[:, None] % 7


def evaluation(pair, dev, **changes) -> DevEvaluation:
    return DevEvaluation(toy_config(**changes), pair, pair.predictor, dev, CPU, with_rationale=True)


@pytest.mark.parametrize("target", [0.2, 0.3])
def test_the_bias_meets_the_target_and_lies_midway_between_two_scores(target):
    rule = RULE.model_copy(update={"bias": calibrate_bias(SCORES, SELECTABLE, RULE, 6, target)})
    mask, cut = apply_policy(SCORES, SELECTABLE, rule, 6), -rule.bias
    rate = (mask.sum(dim=1) / SELECTABLE.sum(dim=1)).mean().item()
    assert target <= rate < target + 1 / SELECTABLE.sum(dim=1).min() / 40
    above, below = SCORES[SELECTABLE & (cut < SCORES)].min(), SCORES[SELECTABLE & (cut > SCORES)].max()
    assert cut == pytest.approx(((above + below) / 2).item(), abs=2e-6)
    # a target that the budget forbids gives the largest useful bias
    bias = calibrate_bias(SCORES, SELECTABLE, RULE, 6, 0.9)
    assert bias == pytest.approx(-SCORES[SELECTABLE].min().item(), abs=1e-6)


@pytest.mark.parametrize("make", [toy_texts, toy_images])
def test_what_is_served_is_what_is_measured(make):
    pair, _, dev = make()
    figures = evaluation(pair, dev)(10)
    calibrate_policy(toy_config(), pair, dev, CPU)
    measured = measure(pair, dev)
    for name, mine in (("accuracy", "accuracy"), ("macro_f1", "macro_f1"), ("rate", "selection_rate")):
        assert figures[mine] == pytest.approx(measured[name])
    assert figures["selection_rate"] == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize(("make", "selection", "size", "weighted"), [
    (toy_texts, {"continuity": 0.4}, 30, "none"), (toy_images, {"continuity": 0.4}, 30, "none"),
    (toy_texts, {"denominator": "all"}, 64, "none"), (toy_texts, {"penalty_per": "example"}, 30, "balanced"),
])  # fmt: skip
def test_the_loss_on_dev_is_that_of_training_without_noise_in_order(make, selection, size, weighted, monkeypatch):
    pair, _, dev = make()
    dev = replace(dev, labels=(np.arange(64) % 8 == 0).astype(np.int64))
    outputs = run_selector(pair, dev)
    with torch.no_grad():  # about half is kept: there are borders
        pair.selector.head[-1].bias[1] -= float(outputs.scores[outputs.selectable].median()) + 1e-4
    changes = {"selection": {"weight": 3.0, **ARGMAX, **selection}, "optimisation": {"batch_size": size}}
    changes["data"] = {"class_weights": weighted}
    figures = evaluation(pair, dev, **changes)(10)
    monkeypatch.setattr(objectives, "gumbel", lambda *given: 0.0)
    objective, values = objectives.RationaleObjective(toy_config(**changes), pair.eval(), CPU, 0), []
    weights = example_weights(dev.labels, weighted)
    for start in range(0, 64, size):
        rows = np.arange(start, min(start + size, 64))
        inputs = {name: torch.from_numpy(array) for name, array in dev.inputs(rows).items()}
        labels, some = torch.from_numpy(dev.labels[rows]), None if weights is None else torch.from_numpy(weights[rows])
        batch = Batch(torch.from_numpy(rows), inputs, labels, 0, 1, len(rows), len(rows), some)
        values.append(objective(batch)["loss"].item())
    assert figures["extraction_loss"] == pytest.approx(np.mean(values), rel=1e-5)


def test_sampled_masks_differ_between_evaluations_and_follow_the_scores():
    pair, _, dev = toy_texts()
    evaluate, outputs = evaluation(pair, dev, stages={"evaluation": "sampled"}), run_selector(pair, dev)
    rates = [evaluate(step)["selection_rate"] for step in (1, 2, 1)]
    assert rates[0] == rates[2] != rates[1]
    expected = float((torch.sigmoid(outputs.scores) * outputs.selectable).sum(1).div(outputs.selectable.sum(1)).mean())
    assert rates[0] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("decision", ["argmax", "top-k"])
def test_dev_is_measured_by_the_rule_that_will_be_stored(decision):
    pair, _, dev = toy_texts()
    read = run_selector(pair, dev)
    counts, kept = read.selectable.sum(dim=1), (read.selectable & (read.scores > 0)).sum(dim=1)
    if decision == "top-k":
        kept = (counts * 0.15).floor().clamp(min=1)
    selection = {"decision": decision, "budget": None, "minimum": int(decision == "top-k")}
    found, calibrated = (evaluation(pair, dev, selection=each)(10)["selection_rate"] for each in (selection, {}))
    assert found == pytest.approx((kept / counts).mean().item(), rel=1e-6)
    assert abs(calibrated - found) > 1e-3


# a teacher that was recorded teaches what the live one teaches; what it does not say is not learned


LABELS = ("negative", "positive")
SHORT = {"stages": {"classifier_epochs": 1, "rationale_epochs": 1, "compact_epochs": 1},
         "distillation": {"classifier": True}}  # fmt: skip
TEXTS, TRUTH = ToyTexts.words(96, 1)


@pytest.fixture(scope="module")
def teacher():
    return fitted(toy_texts(examples=128))[0]


def losses_with(teacher, labels=None, **changes) -> list[float]:
    """Every loss of a short training on the 96 texts."""
    pair, train, dev = toy_texts(seed=5, examples=96)
    train = train if labels is None else replace(train, labels=labels)
    _, log = fitted((pair, train, dev), options={"teacher": teacher}, **SHORT | changes)
    return [loss for stage, *_ in log.stages for loss in log.losses(stage)]


def said_by(teacher, tmp_path, preprocessor=None, exact: bool = False) -> AlignedKnowledge:
    rows = statements_of(teacher, TEXTS, with_texts=False)
    said = {each["id"]: Statement(each["probabilities"], None, each["scores"].astype(np.float32)) for each in rows}
    knowledge = Knowledge(tmp_path, said, {}, 0)
    if not exact:
        knowledge = known.read_knowledge(write_knowledge(tmp_path / "k.parquet", rows), LABELS)
    return known.align(knowledge, TEXTS, preprocessor or teacher.preprocessor, 2)


def test_recorded_scores_teach_what_the_live_teacher_teaches(teacher, tmp_path):
    live = losses_with(teacher)
    np.testing.assert_allclose(losses_with(said_by(teacher, tmp_path, exact=True)), live, rtol=0, atol=1e-5)
    rounded = losses_with(said_by(teacher, tmp_path))
    assert not np.allclose(rounded, live, rtol=0, atol=1e-5), "a byte a score"
    np.testing.assert_allclose(rounded, live, rtol=0, atol=0.05)


def test_a_plain_classifier_says_what_everything_tells_it_and_wants_no_word_in_particular(teacher):
    plain = copy.deepcopy(teacher)
    plain.policy = SelectionPolicy(bias=None, budget=None, minimum=0)
    rows, pair = statements_of(plain, TEXTS, with_texts=False), statements_of(teacher, TEXTS, with_texts=False)
    expected = [[prediction.probabilities[name] for name in plain.labels] for prediction in plain.predict(TEXTS)]
    temperature = plain.probability_temperature
    for row, other, each in zip(rows, pair, expected, strict=True):
        assert row.keys() == {"id", "probabilities"} and other.keys() == {"id", "probabilities", "scores"}
        logs = np.log(row["probabilities"]) / temperature
        np.testing.assert_allclose(np.exp(logs) / np.exp(logs).sum(), each, atol=1e-5)
    assert not np.allclose([row["probabilities"] for row in rows], [row["probabilities"] for row in pair], atol=1e-3)


def test_a_teacher_with_another_tokenizer_scores_the_same_words(teacher, tmp_path):
    other = TextPreprocessor(trained_tokenizer("byte-level BPE"), TextSettings(200))
    own, theirs = said_by(teacher, tmp_path, exact=True), said_by(teacher, tmp_path, other, exact=True)
    for text, mine, moved in zip(TEXTS, own.scores, theirs.scores, strict=True):
        word = "good" if "good" in text.split() else "bad"
        start = f" {text} ".index(f" {word} ")
        scores = []
        for preprocessor, values in ((teacher.preprocessor, mine), (other, moved)):
            offsets = preprocessor.encode([text])[0].offsets
            scores.append(values[next(at for at, (first, last) in enumerate(offsets) if first == start < last)])
        assert scores[1] == pytest.approx(scores[0])


def test_what_a_teacher_does_not_say_is_not_learned(teacher, tmp_path):
    whole = said_by(teacher, tmp_path, exact=True)
    nothing = AlignedKnowledge(np.full_like(whole.probabilities, np.nan), [None] * 96, [None] * 96)
    scores = [np.full_like(each, np.nan) for each in whole.scores]
    silent = AlignedKnowledge(nothing.probabilities, scores, nothing.marks)
    alone = {"stages": {"classifier_epochs": 0, "rationale_epochs": 1, "compact_epochs": 0},
             "distillation": {"alpha": 0.0}}  # fmt: skip
    assert np.abs(losses_with(silent, **alone)).max() < 1e-6, "no term, no loss"
    with pytest.raises(ConfigError, match="says nothing about any training example"):
        losses_with(nothing, **alone)
    with pytest.raises(ConfigError, match="fix: distillation.teacher_mask=teacher"):  # it cannot answer on another mask
        losses_with(whole, stages={}, distillation={"teacher_mask": "student"})


def test_texts_without_a_label_train_by_the_teacher_alone(teacher, tmp_path):
    said = said_by(teacher, tmp_path, exact=True)
    hidden = np.where(np.arange(96) < 48, TRUTH, UNLABELLED)
    wrong = np.where(np.arange(96) < 48, TRUTH, 1 - TRUTH)
    assert losses_with(said, labels=hidden) != losses_with(said, labels=wrong)
    assert np.isfinite(losses_with(said, labels=hidden)).all()
    assert example_weights(hidden, "none").tolist() == [1.0] * 48 + [0.0] * 48
    balanced = example_weights(hidden, "balanced")
    assert balanced[:48].sum() == pytest.approx(48) and not balanced[48:].any(), "no cross-entropy"


def test_a_file_brings_texts_of_its_own_but_none_of_dev_or_test():
    splits = {name: LabelledTexts([f"{name} text"], np.array([1])) for name in ("train", "dev", "test")}
    data = DataSet(splits, LABELS, "")
    texts = {known.text_id(text): text for text in ("train text", "dev text", "test text", "a new one")}
    said = Knowledge(None, dict.fromkeys(texts, Statement(None, None, None)), texts, 0)
    train = known.with_unlabelled(data, said).splits["train"]
    assert train.texts == ["train text", "a new one"] and train.labels.tolist() == [1, UNLABELLED]


LONG_REVIEW = "It was a good film.<br />I was   never bored in it! Short. It was a good film."


def test_sentences_of_training_texts_that_a_file_tells_about_are_trained_on_too():
    first, second = "It was a good film.", "I was never bored in it!"
    assert sentences(LONG_REVIEW) == [first, second] and sentences("one two three. " + 21 * "x ") == []
    assert some_sentences([LONG_REVIEW, first], 2) == sorted([first, second], key=known.text_id)
    assert len(some_sentences([LONG_REVIEW], 1)) == 1
    splits = {name: LabelledTexts([f"{name}. {LONG_REVIEW}"], np.array([1])) for name in ("train", "dev", "test")}
    splits["dev"] = LabelledTexts([second], np.array([1]))  # never trained on
    told = {known.text_id(each): Statement(None, None, None) for each in (first, second, "not a sentence of it here.")}
    train = known.with_unlabelled(DataSet(splits, LABELS, ""), Knowledge(None, told, {}, 0)).splits["train"]
    assert train.texts == [f"train. {LONG_REVIEW}", first] and train.labels.tolist() == [1, UNLABELLED]


def test_later_passages_that_a_file_tells_about_are_trained_on_too():
    words = [f"w{number}" for number in range(400)]
    long, later = " ".join(words), [" ".join(words[180:360]), " ".join(words[360:])]
    assert later_passages(long) == later and later_passages(" ".join(words[:219])) == []
    told = {known.text_id(part): Statement(None, None, None) for part in (later[1], " ".join(words[:180]))}
    splits = {name: LabelledTexts([f"{name}\n {long}"], np.array([1])) for name in ("train", "dev", "test")}
    splits["train"] = LabelledTexts([long], np.array([1]))
    train = known.with_unlabelled(DataSet(splits, LABELS, ""), Knowledge(None, told, {}, 0)).splits["train"]
    assert train.texts == [long, later[1]] and train.labels.tolist() == [1, UNLABELLED]


def test_marked_passages_are_selected(teacher):
    """Quotes alone, a tenth of them wrong, a third of the texts unmarked: the student finds the words."""
    generator, (texts, _), marks = np.random.default_rng(0), ToyTexts.words(256, 1), []
    for text, encoding in zip(texts, teacher.preprocessor.encode(texts), strict=True):
        words = text.split()
        word = words.index("good") if "good" in words else words.index("bad")
        word = int(generator.integers(len(words))) if generator.random() < 0.1 else word
        row = (np.arange(len(encoding)) == word + 1).astype(np.float32)
        marks.append(None if generator.random() < 1 / 3 else row)
    said = AlignedKnowledge(np.full((256, 2), np.nan, np.float32), [None] * 256, marks)
    found = {}
    for name, given in (("alone", None), ("marked", said)):
        stages = {"classifier_epochs": 1, "rationale_epochs": 6, "compact_epochs": 0}
        changes = {"stages": stages, "distillation": {"rationale_weight": 2.0}}
        pair, _ = fitted(toy_texts(seed=5), options={"teacher": given}, **changes)
        unseen, _ = ToyTexts.words(64, 9)
        kept = [{word for span in each.rationale for word in span.text.split()} for each in pair.predict(unseen)]
        found[name] = sum(bool(words & {"good", "bad"}) for words in kept)
    assert found["marked"] > 50 > found["alone"], found
