"""What is measured is what is served, for every mask, for texts and images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import WORDS, make_image_rationalizer, make_rationalizer

from rekd_train.data import ImageSplit, LabelledTexts, tokenize
from rekd_train.errors import ConfigError
from rekd_train.evaluation import forward
from rekd_train.evaluation.forward import decide, measure, run_masks, run_selector, run_split
from rekd_train.evaluation.metrics import abstain_threshold
from rekd_train.evaluation.report import CURVE_RATES, REPORT_FORMAT, evaluate, report_rows
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, mask_by_specification
from rekd_train.inputs.preprocessors import vocabulary_of


def make_split(pair, count: int = 40, seed: int = 0):
    """Texts of 1 to 60 words, some cut off."""
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice([*WORDS, ".", ",", "goodly"], 1 + i * 59 // count)) for i in range(count)]
    return tokenize(LabelledTexts(texts, generator.integers(0, 2, count)), pair.preprocessor)


@pytest.fixture(scope="module", params=["zero", "compact"])
def pair(request):
    pair = make_rationalizer(operator=request.param, policy=SelectionPolicy(bias=-1.5, budget=0.25, minimum=1))
    with torch.no_grad():  # scores between -3 and 2: sampled rationales differ; and so do the predictions
        pair.selector.head[-1].weight.mul_(0.1)
        logits = torch.from_numpy(run_split(pair, make_split(pair)).class_logits)
        pair.predictor.head[-1].bias.sub_(logits.median(dim=0).values)
    return pair


@pytest.fixture(scope="module")
def split(pair):
    return make_split(pair)


@pytest.fixture(scope="module")
def selector(pair, split):
    return run_selector(pair, split)


@pytest.fixture(scope="module")
def stored(pair, selector):
    """The rationales by the stored rule."""
    return decide(selector.scores, selector.selectable, pair.policy)


def full_report(pair, split):
    dev = make_split(pair, seed=1)
    return evaluate(pair, {"dev": dev, "test": split}, draws=4, teacher=make_rationalizer(seed=5), risk=0.6)


report = pytest.fixture(full_report, scope="module")


# masks

SEEDED = torch.Generator().manual_seed(0)
SCORES = torch.randn(50, 20, generator=SEEDED).round(decimals=1)  # with ties
SELECTABLE = torch.rand(50, 20, generator=SEEDED) < 0.8


@pytest.mark.parametrize(
    "policy", [SelectionPolicy(bias=0.2, budget=0.3), PAPER_POLICY, SelectionPolicy(bias=None, budget=0.5)]
)
def test_decide_is_the_specified_rule(policy) -> None:
    specified = mask_by_specification(SCORES.numpy(), SELECTABLE.numpy(), policy)
    assert np.array_equal(decide(SCORES, SELECTABLE, policy).numpy(), specified)


def test_fill_and_baselines_keep_exactly_as_many_as_they_should() -> None:
    assert torch.equal(forward.fill(SCORES, SELECTABLE, 0.25).sum(dim=1), (SELECTABLE.sum(dim=1) // 4).clamp(min=1))
    mask = decide(SCORES, SELECTABLE, SelectionPolicy(bias=0.0, budget=0.3))
    first, other = forward.first_like(mask, SELECTABLE), forward.random_like(mask, SELECTABLE, torch.Generator())
    assert torch.equal(other.sum(dim=1), mask.sum(dim=1)) and not (other & ~SELECTABLE).any()
    for row, selectable, count in zip(first, SELECTABLE, mask.sum(dim=1), strict=True):
        assert torch.equal(row.nonzero(), selectable.nonzero()[:count])


def test_drawn_masks_keep_by_probability_and_random_ones_uniformly_and_each_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, selectable = torch.tensor([-2.0, 0.0, 1.5, 9.0]), torch.tensor([True, True, True, False])
    mask = next(forward.drawn(scores.expand(4000, 4), selectable.expand(4000, 4), 1, generator))
    assert torch.allclose(mask.float().mean(dim=0), torch.sigmoid(scores) * selectable, atol=0.03)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0]]).expand(3000, 6).bool()
    first, second = (forward.random_like(mask, torch.ones_like(mask), generator) for _ in range(2))
    assert torch.allclose(first.float().mean(dim=0), torch.full((6,), 1 / 3), atol=0.04)
    assert not torch.equal(first, second)


# passes


def test_every_mask_is_predicted_from_as_the_pair_does_alone(pair, split, selector) -> None:
    """One by one, without batches or padding; masks far above the budget too."""
    masks = {
        "none": torch.zeros_like(selector.selectable),
        "half": forward.fill(selector.scores, selector.selectable, 0.5),
        "all": selector.selectable,
    }
    found = run_masks(pair, split, masks, batch_size=7)
    for row in range(0, len(split), 5):
        inputs = {name: torch.from_numpy(array) for name, array in split.inputs([row]).items()}
        for name, mask in masks.items():
            with torch.inference_mode():
                alone = pair.class_logits(inputs, mask[row : row + 1, : split.lengths[row]])
            assert np.allclose(found[name][row], alone.numpy(), atol=1e-5), name


def test_the_stored_mask_is_the_one_that_is_served(pair, split, selector, stored) -> None:
    outputs = run_split(pair, split)
    assert np.array_equal(stored.sum(dim=1).numpy(), outputs.kept)
    logits = run_masks(pair, split, {"stored": stored})["stored"]
    assert np.allclose(logits, outputs.class_logits, atol=1e-5)
    given = forward.SplitOutputs(logits, stored.sum(dim=1).numpy(), selector.selectable.sum(dim=1).numpy())
    found, expected = measure(pair, split, given), measure(pair, split)
    assert found.pop("never_predicted") == expected.pop("never_predicted")
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_rule_that_may_keep_padding_is_measured_on_full_length_inputs() -> None:
    pair = make_rationalizer(operator="zero", policy=PAPER_POLICY)
    split = make_split(pair, 12)
    outputs, selector = run_split(pair, split, batch_size=4), run_selector(pair, split, batch_size=5)
    assert (outputs.selectable == pair.preprocessor.positions).all()
    assert np.array_equal(decide(selector.scores, selector.selectable, pair.policy).sum(dim=1).numpy(), outputs.kept)
    assert measure(pair, split)["rate"] == pytest.approx(measure(pair, split)["rate_padded"])


# the report


def test_the_report_is_json_and_says_what_measure_says(pair, split, report) -> None:
    assert report["format"] == REPORT_FORMAT and report["version"] == 1
    assert json.loads(json.dumps(report)) == report == full_report(pair, split), "the same seed, the same report"
    assert {(section, figure) for section, figure, _ in report_rows(report)} >= {
        ("classification", "accuracy"), ("rate", "rate_padded"), ("curve", "accuracy at 10%"), ("curve", "area"),
        ("modes", "sampled.flip_rate"), ("calibration", "abstain.threshold"), ("teacher", "mask_jaccard"),
    }  # fmt: skip
    quick = measure(pair, split)
    assert report["modes"]["stored"]["accuracy"] == quick["accuracy"] and report["rate"]["rate"] == quick["rate"]
    assert all(report["classification"][name] == quick[name] for name in ("accuracy", "macro_f1", "never_predicted"))
    for name in ("nll", "ece"):
        assert report["calibration"][name] == pytest.approx(quick[name], abs=1e-5)


def test_modes_differ_as_they_should(selector, report) -> None:
    modes, found = report["modes"], report["selector"]
    assert modes["fill"]["rate"] > modes["stored"]["rate"]
    assert modes["stored"]["over_budget_share"] == 0 and modes["argmax"]["over_budget_share"] > 0
    assert modes["sampled"]["draws"] == 4
    assert 0 < modes["sampled"]["flip_rate"] < 1 and 0 < modes["sampled"]["mask_jaccard"] < 1
    argmax = (selector.selectable & (selector.scores > 0)).sum(dim=1).float().mean()
    assert found["argmax_count"] == pytest.approx(float(argmax))
    assert found["expected_count"] == pytest.approx(modes["sampled"]["count_mean"], rel=0.1)
    assert report["baselines"]["random"]["rate"] == report["rate"]["rate"] == report["baselines"]["first"]["rate"]


def test_the_curve_ends_at_the_full_input(pair, split, selector, report) -> None:
    everything = run_masks(pair, split, {"all": selector.selectable})["all"]
    curve = report["curve"]
    assert curve["rates"] == list(CURVE_RATES)
    assert curve["accuracies"][-1] == np.mean(everything.argmax(axis=1) == split.labels)
    assert curve["realised"][-1] == 1.0 and curve["realised"] == sorted(curve["realised"])


def test_the_abstain_threshold_comes_from_dev(pair, split, report) -> None:
    def confidence(part):
        probabilities = pair.probabilities(torch.from_numpy(run_split(pair, part).class_logits)).numpy()
        return probabilities.max(axis=1), probabilities.argmax(axis=1) == part.labels

    found, abstain = abstain_threshold(*confidence(make_split(pair, seed=1)), 0.6), report["calibration"]["abstain"]
    assert abstain["threshold"] == pytest.approx(found, abs=1e-5)
    assert abstain["coverage"] == pytest.approx(np.mean(confidence(split)[0] >= found), abs=0.03)


def test_a_pair_agrees_with_itself_and_less_with_another(pair, split, report) -> None:
    alone = evaluate(pair, {"dev": split, "test": split}, draws=0, teacher=pair)
    assert "sampled" not in alone["modes"]
    figures = alone["teacher"]
    assert figures.pop("selection_divergence") == pytest.approx(0.0, abs=1e-9) and figures.pop("accuracy") < 1
    assert list(figures.values()) == pytest.approx([1.0] * 4)
    assert report["teacher"]["mask_jaccard"] < 0.9 and report["teacher"]["selection_divergence"] > 0


@pytest.mark.parametrize(("make", "options", "match"), [
    (make_rationalizer, {"labels": ("bad", "good")}, "labels"),
    (make_rationalizer, {"max_length": 32}, "32 positions"),
    (make_image_rationalizer, {"labels": ("negative", "positive")}, "reads image inputs, the student text inputs"),
])  # fmt: skip
def test_a_teacher_that_cannot_be_compared_with_is_refused(make, options, match, pair, split) -> None:
    with pytest.raises(ConfigError, match=match):
        evaluate(pair, {"dev": split, "test": split}, teacher=make(**options), draws=0)


def test_a_plain_classifier_has_no_selection_to_report() -> None:
    pair = make_rationalizer(operator="zero", policy=SelectionPolicy(bias=None, budget=None, minimum=0))
    split = make_split(pair, 10)
    report = evaluate(pair, {"dev": split, "test": split})
    assert report["rate"]["rate"] == 1.0
    assert not {"modes", "curve", "baselines", "selector", "tokens"} & set(report)


def test_images_too() -> None:
    pair, generator = make_image_rationalizer(), np.random.default_rng(1)
    pixels, truth = generator.integers(0, 256, (30, 16, 12, 1), dtype=np.uint8), generator.random((30, 12)) < 0.3
    images = ImageSplit(pixels, generator.integers(0, 3, 30), pair.preprocessor, list(truth))
    report = evaluate(pair, {"dev": images, "test": images}, draws=2, teacher=make_image_rationalizer(seed=4))
    assert report["rate"]["rate_padded"] == pytest.approx(report["rate"]["rate"])  # every patch is real
    selector = run_selector(pair, images)
    kept = decide(selector.scores, selector.selectable, pair.policy).numpy()
    assert report["truth"]["examples"] == 30
    assert report["truth"]["in_truth"] == pytest.approx((kept & truth).sum() / kept.sum())
    assert "tokens" not in report and "human_rationales" not in report
    assert set(report["classification"]["per_class"]) == {"shirt", "shoe", "bag"}


# texts: token kinds and people


def test_token_shares_count_what_is_selected(pair, split, stored, report) -> None:
    vocabulary = vocabulary_of(pair.preprocessor)
    numbers = pair.preprocessor.pad([pair.preprocessor.encode(["film, zoo"])[0].ids], 8)["input_ids"][0]
    kinds = (vocabulary.special, vocabulary.punctuation, vocabulary.continues)  # [CLS] film , z ##o ##o [SEP] [PAD]
    assert [np.flatnonzero(kind[numbers]).tolist() for kind in kinds] == [[0, 6, 7], [2], [4, 5]]
    kept = [split.ids[row][position] for row, position in torch.nonzero(stored).tolist()]
    tokens = [number for ids in split.ids for number in ids if not vocabulary.special[number]]
    expected = {"special_selected": 0.0}
    for name, kind in (("punctuation", vocabulary.punctuation), ("word_pieces", vocabulary.continues)):
        expected |= {f"{name}_selected": np.mean(kind[kept]), name: np.mean(kind[tokens])}
    assert report["tokens"] == pytest.approx(expected) and report["tokens"]["word_pieces"] > 0


def test_human_rationales_over_words(pair) -> None:
    """A human who marks the very words that the model keeps, by one piece of each, agrees fully."""
    split = make_split(pair, 12)
    selector = run_selector(pair, split)
    kept = decide(selector.scores, selector.selectable, pair.policy).numpy()
    continues = vocabulary_of(pair.preprocessor).continues
    truth = []
    for row, ids in enumerate(split.ids):
        words = np.cumsum(~continues[ids])
        marked = np.isin(words, words[kept[row, : len(ids)]])
        truth.append(marked & ~continues[ids])  # the first piece alone
    truth[3] = None
    figures = evaluate(pair, {"test": replace(split, truth=truth)}, draws=0)["human_rationales"]
    assert figures["examples"] == 11
    assert figures["f1_macro"] == figures["f1_micro"] == figures["iou_f1_macro"] == 1.0
    opposite = replace(split, truth=[None if mask is None else ~mask for mask in truth])
    assert evaluate(pair, {"test": opposite}, draws=0)["human_rationales"]["f1_macro"] < 0.6
