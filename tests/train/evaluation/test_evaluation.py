"""What is measured is what is served, for every mask, for texts and images."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WORDS, make_image_rationalizer, make_rationalizer

from rekd_train.data import ImageSplit, LabelledTexts, tokenize
from rekd_train.errors import ConfigError
from rekd_train.evaluation.forward import (
    decide,
    drawn,
    evaluate_with_masks,
    fill,
    first_like,
    measure,
    random_like,
    run_masks,
    run_selector,
    run_split,
)
from rekd_train.evaluation.metrics import never_predicted
from rekd_train.evaluation.report import CURVE_RATES, REPORT_FORMAT, evaluate, report_rows
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, mask_by_specification
from rekd_train.inputs.preprocessors import vocabulary_of


def make_split(pair, count: int = 40, seed: int = 0):
    """Texts of 1 to 60 words, some cut off."""
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice([*WORDS, ".", ",", "goodly"], 1 + i * 59 // count)) for i in range(count)]
    return tokenize(LabelledTexts(texts, generator.integers(0, 2, count)), pair.preprocessor)


def make_images(pair, count: int = 30) -> ImageSplit:
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (count, 16, 12, 1), dtype=np.uint8)
    truth = [generator.random(12) < 0.3 for _ in range(count)]
    return ImageSplit(pixels, generator.integers(0, 3, count), pair.preprocessor, truth)


@pytest.fixture(scope="module", params=["zero", "compact"])
def pair(request):
    pair = make_rationalizer(operator=request.param, policy=SelectionPolicy(bias=-1.5, budget=0.25, minimum=1))
    with torch.no_grad():  # scores between -3 and 2: sampled rationales differ; and so do the answers
        pair.selector.head[-1].weight.mul_(0.1)
        logits = torch.from_numpy(run_split(pair, make_split(pair)).class_logits)
        pair.predictor.head[-1].bias.sub_(logits.median(dim=0).values)
    return pair


@pytest.fixture(scope="module")
def split(pair):
    return make_split(pair)


@pytest.fixture(scope="module")
def report(pair, split):
    dev = make_split(pair, seed=1)
    return evaluate(pair, {"dev": dev, "test": split}, draws=4, teacher=make_rationalizer(seed=5), risk=0.6)


# masks


def random_scores(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(50, 20, generator=generator).round(decimals=1)
    return scores, torch.rand(50, 20, generator=generator) < 0.8


def test_decide_is_the_specified_rule() -> None:
    scores, selectable = random_scores()
    for policy in (SelectionPolicy(bias=0.2, budget=0.3), PAPER_POLICY, SelectionPolicy(bias=None, budget=0.5)):
        specified = mask_by_specification(scores.numpy(), selectable.numpy(), policy)
        assert np.array_equal(decide(scores, selectable, policy).numpy(), specified)


def test_fill_keeps_exactly_the_share() -> None:
    scores, selectable = random_scores()
    counts = selectable.sum(dim=1)
    assert torch.equal(fill(scores, selectable, 0.25).sum(dim=1), (counts // 4).clamp(min=1))
    assert torch.equal(fill(scores, selectable, 1.0), selectable)


def test_drawn_masks_keep_each_feature_with_its_probability() -> None:
    scores = torch.tensor([[-2.0, 0.0, 1.5, 9.0]]).expand(4000, 4)
    selectable = torch.tensor([True, True, True, False]).expand(4000, 4)
    mask = next(drawn(scores, selectable, 1, torch.Generator().manual_seed(0)))
    expected = torch.sigmoid(scores[0]) * selectable[0]
    assert torch.allclose(mask.float().mean(dim=0), expected, atol=0.03)


def test_baselines_keep_as_many_as_the_rationale() -> None:
    scores, selectable = random_scores()
    mask = decide(scores, selectable, SelectionPolicy(bias=0.0, budget=0.3))
    for other in (random_like(mask, selectable, torch.Generator().manual_seed(0)), first_like(mask, selectable)):
        assert torch.equal(other.sum(dim=1), mask.sum(dim=1))
        assert not (other & ~selectable).any()
    first = first_like(mask, selectable)
    for row in range(len(mask)):
        where = torch.nonzero(selectable[row]).flatten()[: int(mask[row].sum())]
        assert torch.equal(torch.nonzero(first[row]).flatten(), where)


def test_random_masks_are_uniform_and_differ_between_draws() -> None:
    selectable = torch.ones(3000, 6, dtype=torch.bool)
    mask = torch.zeros(3000, 6, dtype=torch.bool)
    mask[:, :2] = True
    generator = torch.Generator().manual_seed(0)
    first, second = (random_like(mask, selectable, generator) for _ in range(2))
    assert torch.allclose(first.float().mean(dim=0), torch.full((6,), 1 / 3), atol=0.04)
    assert not torch.equal(first, second)


# passes


def test_every_mask_is_answered_as_the_pair_answers_it_alone(pair, split) -> None:
    """One by one, without batches or padding; masks far above the budget too."""
    selector = run_selector(pair, split)
    masks = {
        "none": torch.zeros_like(selector.selectable),
        "half": fill(selector.scores, selector.selectable, 0.5),
        "all": selector.selectable,
    }
    answers = run_masks(pair, split, masks, batch_size=7)
    for row in range(0, len(split), 5):
        inputs = {name: torch.from_numpy(array) for name, array in split.inputs([row]).items()}
        for name, mask in masks.items():
            with torch.inference_mode():
                alone = pair.class_logits(inputs, mask[row : row + 1, : split.lengths[row]])
            assert np.allclose(answers[name][row], alone.numpy(), atol=1e-5), name


def test_the_stored_mask_is_the_one_that_is_served(pair, split) -> None:
    selector, outputs = run_selector(pair, split), run_split(pair, split)
    stored = decide(selector.scores, selector.selectable, pair.policy)
    assert np.array_equal(stored.sum(dim=1).numpy(), outputs.kept)
    assert np.allclose(run_masks(pair, split, {"stored": stored})["stored"], outputs.class_logits, atol=1e-5)
    figures = evaluate_with_masks(pair, split, stored, selector.selectable)
    measured = measure(pair, split)
    assert measured.pop("never_predicted") == never_predicted(outputs.class_logits.argmax(1), split.labels, pair.labels)
    assert figures == pytest.approx(measured, abs=1e-5)


def test_a_rule_that_may_keep_padding_is_measured_on_full_length_inputs() -> None:
    pair = make_rationalizer(operator="zero", policy=PAPER_POLICY)
    split = make_split(pair, 12)
    outputs = run_split(pair, split, batch_size=4)
    assert (outputs.selectable == pair.preprocessor.positions).all()
    selector = run_selector(pair, split, batch_size=5)
    stored = decide(selector.scores, selector.selectable, pair.policy)
    assert np.array_equal(stored.sum(dim=1).numpy(), outputs.kept)
    assert measure(pair, split)["rate"] == pytest.approx(measure(pair, split)["rate_padded"])


# the report


def test_the_report_is_json_and_says_what_it_is(report) -> None:
    assert report["format"] == REPORT_FORMAT and report["version"] == 1
    assert json.loads(json.dumps(report)) == report
    assert {(section, figure) for section, figure, _ in report_rows(report)} >= {
        ("classification", "accuracy"), ("rate", "rate_padded"), ("curve", "accuracy at 10%"), ("curve", "area"),
        ("modes", "sampled.flip_rate"), ("calibration", "abstain.threshold"), ("teacher", "mask_jaccard"),
    }  # fmt: skip


def test_the_stored_mode_is_what_measure_says(pair, split, report) -> None:
    quick = measure(pair, split)
    assert report["classification"]["accuracy"] == report["modes"]["stored"]["accuracy"] == quick["accuracy"]
    assert report["rate"]["rate"] == quick["rate"]
    assert report["classification"]["macro_f1"] == quick["macro_f1"]
    assert report["classification"]["never_predicted"] == quick["never_predicted"]
    assert report["calibration"]["nll"] == pytest.approx(quick["nll"], abs=1e-5)


def test_modes_differ_as_they_should(pair, split, report) -> None:
    modes = report["modes"]
    assert modes["fill"]["rate"] > modes["stored"]["rate"]
    assert modes["stored"]["over_budget_share"] == 0 and modes["argmax"]["over_budget_share"] > 0
    assert modes["sampled"]["draws"] == 4
    assert 0 < modes["sampled"]["flip_rate"] < 1 and 0 < modes["sampled"]["mask_jaccard"] < 1
    scores = run_selector(pair, split)
    assert report["selector"]["argmax_count"] == pytest.approx(
        float((scores.selectable & (scores.scores > 0)).sum(dim=1).float().mean())
    )
    assert report["selector"]["expected_count"] == pytest.approx(modes["sampled"]["count_mean"], rel=0.1)
    assert report["baselines"]["random"]["rate"] == report["rate"]["rate"] == report["baselines"]["first"]["rate"]


def test_the_curve_ends_at_the_full_input(pair, split, report) -> None:
    selectable = run_selector(pair, split).selectable
    everything = run_masks(pair, split, {"all": selectable})["all"]
    curve = report["curve"]
    assert curve["rates"] == list(CURVE_RATES)
    assert curve["accuracies"][-1] == np.mean(everything.argmax(axis=1) == split.labels)
    assert curve["realised"][-1] == 1.0 and curve["realised"] == sorted(curve["realised"])


def test_the_abstain_threshold_comes_from_dev(pair, split, report) -> None:
    from rekd_train.evaluation.metrics import abstain_threshold

    def confidence(part):
        logits = torch.from_numpy(run_split(pair, part).class_logits)
        probabilities = pair.probabilities(logits).numpy()
        return probabilities.max(axis=1), probabilities.argmax(axis=1) == part.labels

    found = abstain_threshold(*confidence(make_split(pair, seed=1)), 0.6)
    abstain = report["calibration"]["abstain"]
    assert abstain["threshold"] == pytest.approx(found, abs=1e-5)
    sure, correct = confidence(split)
    assert abstain["coverage"] == pytest.approx(np.mean(sure >= found), abs=0.03)


def test_a_pair_agrees_with_itself(pair, split) -> None:
    report = evaluate(pair, {"dev": split, "test": split}, draws=0, teacher=pair)
    assert report["teacher"]["mask_jaccard"] == report["teacher"]["mask_f1"] == 1.0
    assert report["teacher"]["label_agreement"] == 1.0
    assert report["teacher"]["score_rank_correlation"] == pytest.approx(1.0)
    assert report["teacher"]["selection_divergence"] == pytest.approx(0.0, abs=1e-9)
    assert "sampled" not in report["modes"]


def test_another_teacher_agrees_less(report) -> None:
    assert report["teacher"]["mask_jaccard"] < 0.9
    assert report["teacher"]["selection_divergence"] > 0


def test_a_teacher_that_cannot_be_compared_with_is_refused(pair, split) -> None:
    splits = {"dev": split, "test": split}
    with pytest.raises(ConfigError, match="labels"):
        evaluate(pair, splits, teacher=make_rationalizer(labels=("bad", "good")), draws=0)
    with pytest.raises(ConfigError, match="32 positions"):
        evaluate(pair, splits, teacher=make_rationalizer(max_length=32), draws=0)
    with pytest.raises(ConfigError, match="other features"):
        evaluate(pair, splits, teacher=make_image_rationalizer(labels=("negative", "positive")), draws=0)


def test_the_same_seed_gives_the_same_report(pair, split, report) -> None:
    dev = make_split(pair, seed=1)
    again = evaluate(pair, {"dev": dev, "test": split}, draws=4, teacher=make_rationalizer(seed=5), risk=0.6)
    assert again == report


def test_a_plain_classifier_has_no_selection_to_report() -> None:
    pair = make_rationalizer(operator="zero", policy=SelectionPolicy(bias=None, budget=None, minimum=0))
    split = make_split(pair, 10)
    report = evaluate(pair, {"dev": split, "test": split})
    assert report["rate"]["rate"] == 1.0
    assert not {"modes", "curve", "baselines", "selector", "tokens"} & set(report)


def test_images_too() -> None:
    pair = make_image_rationalizer()
    images = make_images(pair)
    report = evaluate(pair, {"dev": images, "test": images}, draws=2, teacher=make_image_rationalizer(seed=4))
    assert report["rate"]["rate_padded"] == pytest.approx(report["rate"]["rate"])  # every patch is real
    selector = run_selector(pair, images)
    kept = decide(selector.scores, selector.selectable, pair.policy).numpy()
    truth = np.stack(images.truth)
    assert report["truth"]["in_truth"] == pytest.approx((kept & truth).sum() / kept.sum())
    assert "tokens" not in report and "human_rationales" not in report
    assert set(report["classification"]["per_class"]) == {"shirt", "shoe", "bag"}


# texts: token kinds and people


def test_token_kinds(pair) -> None:
    vocabulary = vocabulary_of(pair.preprocessor)
    ids = pair.preprocessor.encode(["film, zoo"])[0].ids
    numbers = pair.preprocessor.pad([ids], 8)["input_ids"][0]  # [CLS] film , z ##o ##o [SEP] [PAD]
    assert vocabulary.special[numbers].tolist() == [True, False, False, False, False, False, True, True]
    assert vocabulary.punctuation[numbers].tolist() == [False, False, True, False, False, False, False, False]
    assert vocabulary.continues[numbers].tolist() == [False, False, False, False, True, True, False, False]


def test_token_shares_count_what_is_selected(pair, split, report) -> None:
    vocabulary, selector = vocabulary_of(pair.preprocessor), run_selector(pair, split)
    stored = decide(selector.scores, selector.selectable, pair.policy)
    kept = [split.ids[row][position] for row, position in torch.nonzero(stored).tolist()]
    tokens = [number for ids in split.ids for number in ids if not vocabulary.special[number]]
    assert report["tokens"]["punctuation_selected"] == pytest.approx(np.mean(vocabulary.punctuation[kept]))
    assert report["tokens"]["punctuation"] == pytest.approx(np.mean(vocabulary.punctuation[tokens]))
    assert report["tokens"]["word_pieces"] == pytest.approx(np.mean(vocabulary.continues[tokens]))
    assert report["tokens"]["word_pieces"] > 0
    assert report["tokens"]["special_selected"] == 0


def test_human_rationales_over_words(pair) -> None:
    """A human who marks the very words that the model keeps, by one piece of each, agrees fully."""
    split = make_split(pair, 12)
    selector = run_selector(pair, split)
    stored = decide(selector.scores, selector.selectable, pair.policy).numpy()
    continues = vocabulary_of(pair.preprocessor).continues
    truth = []
    for row, ids in enumerate(split.ids):
        words = np.cumsum(~continues[ids])
        marked = np.isin(words, words[stored[row, : len(ids)]])
        truth.append(marked & ~continues[ids])  # the first piece alone
    truth[3] = None
    split = replace(split, truth=truth)
    figures = evaluate(pair, {"dev": split, "test": split}, draws=0)["human_rationales"]
    assert figures["examples"] == 11
    assert figures["f1_macro"] == figures["f1_micro"] == figures["iou_f1_macro"] == 1.0
    opposite = [None if mask is None else ~mask for mask in truth]
    split = replace(split, truth=opposite)
    assert evaluate(pair, {"dev": split, "test": split}, draws=0)["human_rationales"]["f1_macro"] < 0.6


def test_nothing_is_said_about_people_where_nobody_was_asked(report) -> None:
    assert "human_rationales" not in report and "truth" not in report


def test_figures_load_no_torch() -> None:
    code = (
        "import sys, rekd_train.evaluation.metrics, rekd_train.evaluation.mask_metrics;"
        " import rekd_train.inputs.preprocessors; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
