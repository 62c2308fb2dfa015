"""What is measured is what is served, for every mask, for texts and images."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS, make_image_rationalizer, make_rationalizer
from pytest import approx

from rekd_train.data import ImageSplit, LabelledTexts, tokenize
from rekd_train.errors import ConfigError
from rekd_train.evaluation import forward
from rekd_train.evaluation.forward import decide, measure, run_masks, run_selector, run_split
from rekd_train.evaluation.metrics import abstain_threshold
from rekd_train.evaluation.report import CURVE_RATES, REPORT_FORMAT, evaluate, report_rows
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, mask_by_specification
from rekd_train.inputs.preprocessors import vocabulary_of


def make_split(pair, count: int = 40, seed: int = 0):
    generator = np.random.default_rng(seed)
    texts = [" ".join(generator.choice([*WORDS, ".", ",", "goodly"], 1 + i * 59 // count)) for i in range(count)]
    return tokenize(LabelledTexts(texts, generator.integers(0, 2, count)), pair.preprocessor)


def full_report(pair, split):
    dev = make_split(pair, seed=1)
    return evaluate(pair, {"dev": dev, "test": split}, draws=4, teacher=make_rationalizer(seed=5), risk=0.6)


@pytest.fixture(scope="module", params=["zero", "compact"])
def seen(request):
    """A pair, a split, its scores, the rationales by the stored rule, the predictor on everything, and the report."""
    pair = make_rationalizer(operator=request.param, policy=SelectionPolicy(bias=-1.5, budget=0.25, minimum=1))
    split = make_split(pair)
    with torch.no_grad():  # scores between -3 and 2: sampled rationales differ; and so do the predictions
        pair.selector.head[-1].weight.mul_(0.1)
        logits = torch.from_numpy(run_split(pair, split).class_logits)
        pair.predictor.head[-1].bias.sub_(logits.median(dim=0).values)
    scores, selectable = run_selector(pair, split)
    stored, report = decide(scores, selectable, pair.policy), full_report(pair, split)
    return SimpleNamespace(pair=pair, split=split, scores=scores, selectable=selectable, stored=stored, report=report)


SEEDED = torch.Generator().manual_seed(0)
SCORES = torch.randn(50, 20, generator=SEEDED).round(decimals=1)  # with ties
SELECTABLE = torch.rand(50, 20, generator=SEEDED) < 0.8


def test_decide_is_the_specified_rule_and_fill_baselines_and_drawn_masks_keep_as_they_should() -> None:
    for policy in (SelectionPolicy(bias=0.2, budget=0.3), PAPER_POLICY, SelectionPolicy(bias=None, budget=0.5)):
        specified = mask_by_specification(SCORES.numpy(), SELECTABLE.numpy(), policy)
        assert np.array_equal(decide(SCORES, SELECTABLE, policy).numpy(), specified)
    assert torch.equal(forward.fill(SCORES, SELECTABLE, 0.25).sum(dim=1), (SELECTABLE.sum(dim=1) // 4).clamp(min=1))
    mask = decide(SCORES, SELECTABLE, SelectionPolicy(bias=0.0, budget=0.3))
    first, other = forward.first_like(mask, SELECTABLE), forward.random_like(mask, SELECTABLE, torch.Generator())
    assert torch.equal(other.sum(dim=1), mask.sum(dim=1)) and not (other & ~SELECTABLE).any()
    for row, selectable, count in zip(first, SELECTABLE, mask.sum(dim=1), strict=True):
        assert torch.equal(row.nonzero(), selectable.nonzero()[:count])
    generator = torch.Generator().manual_seed(0)
    scores, selectable = torch.tensor([-2.0, 0.0, 1.5, 9.0]), torch.tensor([True, True, True, False])
    mask = next(forward.drawn(scores.expand(4000, 4), selectable.expand(4000, 4), 1, generator))
    assert torch.allclose(mask.float().mean(dim=0), torch.sigmoid(scores) * selectable, atol=0.03)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0]]).expand(3000, 6).bool()
    first, second = (forward.random_like(mask, torch.ones_like(mask), generator) for _ in range(2))
    assert torch.allclose(first.float().mean(dim=0), torch.full((6,), 1 / 3), atol=0.04)
    assert not torch.equal(first, second)


@torch.inference_mode()
def test_every_mask_is_predicted_from_as_the_pair_does_and_the_stored_one_is_served(seen) -> None:
    """One by one, without batches or padding; masks far above the budget too."""
    half = forward.fill(seen.scores, seen.selectable, 0.5)
    masks = {"none": torch.zeros_like(half), "half": half, "all": seen.selectable}
    found = run_masks(seen.pair, seen.split, masks, batch_size=7)
    for row in range(0, len(seen.split), 5):
        inputs = {name: torch.from_numpy(array) for name, array in seen.split.inputs([row]).items()}
        for name, mask in masks.items():
            alone = seen.pair.class_logits(inputs, mask[row : row + 1, : seen.split.lengths[row]])
            assert np.allclose(found[name][row], alone.numpy(), atol=1e-5), name
    outputs, kept = run_split(seen.pair, seen.split), seen.stored.sum(dim=1).numpy()
    assert np.array_equal(kept, outputs.kept)
    logits = run_masks(seen.pair, seen.split, {"stored": seen.stored})["stored"]
    assert np.allclose(logits, outputs.class_logits, atol=1e-5)
    given = forward.SplitOutputs(logits, kept, seen.selectable.sum(dim=1).numpy())
    found, expected = measure(seen.pair, seen.split, given), measure(seen.pair, seen.split)
    assert found.pop("never_predicted") == expected.pop("never_predicted") and found == approx(expected, abs=1e-5)


def test_plain_classifiers_padding_and_images_are_measured_by_their_rule() -> None:
    pair = make_rationalizer(operator="zero", policy=PAPER_POLICY)
    split = make_split(pair, 12)
    outputs, (scores, selectable) = run_split(pair, split, batch_size=4), run_selector(pair, split, batch_size=5)
    assert (outputs.selectable == pair.preprocessor.positions).all()
    assert np.array_equal(decide(scores, selectable, pair.policy).sum(dim=1).numpy(), outputs.kept)
    assert measure(pair, split)["rate"] == approx(measure(pair, split)["rate_padded"])
    pair = make_rationalizer(operator="zero", policy=SelectionPolicy(bias=None, budget=None, minimum=0))
    report = evaluate(pair, {"test": make_split(pair, 10)})
    assert report["rate"]["rate"] == 1.0
    assert not {"modes", "curve", "baselines", "selector", "tokens"} & set(report)
    pair, generator = make_image_rationalizer(), np.random.default_rng(1)
    pixels, truth = generator.integers(0, 256, (30, 16, 12, 1), dtype=np.uint8), generator.random((30, 12)) < 0.3
    images = ImageSplit(pixels, generator.integers(0, 3, 30), pair.preprocessor, list(truth))
    report = evaluate(pair, {"dev": images, "test": images}, draws=2, teacher=make_image_rationalizer(seed=4))
    assert report["rate"]["rate_padded"] == approx(report["rate"]["rate"])  # every patch is real
    kept = decide(*run_selector(pair, images), pair.policy).numpy()
    assert report["truth"]["examples"] == 30 and report["modes"]["sampled"]["draws"] == 2
    assert report["truth"]["in_truth"] == approx((kept & truth).sum() / kept.sum())
    assert "tokens" not in report and "human_rationales" not in report
    assert set(report["classification"]["per_class"]) == {"shirt", "shoe", "bag"}


def test_the_report_says_what_measure_says_and_modes_differ_as_they_should(seen) -> None:
    report, quick = seen.report, measure(seen.pair, seen.split)
    assert report["format"] == REPORT_FORMAT and report["version"] == 1
    assert json.loads(json.dumps(report)) == report == full_report(seen.pair, seen.split), "the same seed, the same"
    assert {(section, figure) for section, figure, _ in report_rows(report)} >= {
        ("classification", "accuracy"), ("rate", "rate_padded"), ("curve", "accuracy at 10%"), ("curve", "area"),
        ("modes", "sampled.flip_rate"), ("calibration", "abstain.threshold"), ("teacher", "mask_jaccard"),
    }  # fmt: skip
    assert report["modes"]["stored"]["accuracy"] == quick["accuracy"] and report["rate"]["rate"] == quick["rate"]
    assert all(report["classification"][name] == quick[name] for name in ("accuracy", "macro_f1", "never_predicted"))
    assert all(report["calibration"][name] == approx(quick[name], abs=1e-5) for name in ("nll", "ece"))
    modes, found, curve = (seen.report[name] for name in ("modes", "selector", "curve"))
    assert modes["fill"]["rate"] > modes["stored"]["rate"] and modes["sampled"]["draws"] == 4
    assert modes["stored"]["over_budget_share"] == 0 and modes["argmax"]["over_budget_share"] > 0
    assert 0 < modes["sampled"]["flip_rate"] < 1 and 0 < modes["sampled"]["mask_jaccard"] < 1
    argmax = (seen.selectable & (seen.scores > 0)).sum(dim=1).float().mean()
    assert found["argmax_count"] == approx(float(argmax))
    assert found["expected_count"] == approx(modes["sampled"]["count_mean"], rel=0.1)
    assert {seen.report["baselines"][name]["rate"] for name in ("random", "first")} == {seen.report["rate"]["rate"]}
    everything = run_masks(seen.pair, seen.split, {"all": seen.selectable})["all"]
    assert curve["rates"] == list(CURVE_RATES) and curve["realised"] == sorted(curve["realised"])
    assert curve["accuracies"][-1] == np.mean(everything.argmax(axis=1) == seen.split.labels)
    assert curve["realised"][-1] == 1.0


def test_the_abstain_threshold_comes_from_dev_and_a_teacher_is_compared_if_it_can_be(seen) -> None:
    def confidence(part):
        probabilities = seen.pair.probabilities(torch.from_numpy(run_split(seen.pair, part).class_logits)).numpy()
        return probabilities.max(axis=1), probabilities.argmax(axis=1) == part.labels
    found, abstain = abstain_threshold(*confidence(make_split(seen.pair, seed=1)), 0.6), seen.report["calibration"]
    assert abstain["abstain"]["threshold"] == approx(found, abs=1e-5)
    assert abstain["abstain"]["coverage"] == approx(np.mean(confidence(seen.split)[0] >= found), abs=0.03)
    alone = evaluate(seen.pair, {"dev": seen.split, "test": seen.split}, draws=0, teacher=seen.pair)
    figures, other = alone["teacher"], seen.report["teacher"]
    assert "sampled" not in alone["modes"] and figures.pop("accuracy") < 1
    assert figures.pop("selection_divergence") == approx(0.0, abs=1e-9)
    assert list(figures.values()) == approx([1.0] * 4)
    assert other["mask_jaccard"] < 0.9 and other["selection_divergence"] > 0
    for stranger, match in (
        (make_rationalizer(labels=("bad", "good")), "labels"), (make_rationalizer(max_length=32), "32 positions"),
        (make_image_rationalizer(labels=("negative", "positive")), "reads image inputs, the student text inputs"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            evaluate(seen.pair, {"dev": seen.split, "test": seen.split}, teacher=stranger, draws=0)


def test_token_shares_and_human_rationales_over_words(seen) -> None:
    vocabulary, preprocessor = vocabulary_of(seen.pair.preprocessor), seen.pair.preprocessor
    numbers = preprocessor.pad([preprocessor.encode(["film, zoo"])[0].ids], 8)["input_ids"][0]
    kinds = (vocabulary.special, vocabulary.punctuation, vocabulary.continues)  # [CLS] film , z ##o ##o [SEP] [PAD]
    assert [np.flatnonzero(kind[numbers]).tolist() for kind in kinds] == [[0, 6, 7], [2], [4, 5]]
    kept = [seen.split.ids[row][position] for row, position in torch.nonzero(seen.stored).tolist()]
    tokens = [number for ids in seen.split.ids for number in ids if not vocabulary.special[number]]
    expected = {"special_selected": 0.0}
    for name, kind in (("punctuation", vocabulary.punctuation), ("word_pieces", vocabulary.continues)):
        expected |= {f"{name}_selected": np.mean(kind[kept]), name: np.mean(kind[tokens])}
    assert seen.report["tokens"] == approx(expected) and seen.report["tokens"]["word_pieces"] > 0
    continues, truth = vocabulary_of(seen.pair.preprocessor).continues, []
    for kept, ids in zip(seen.stored.numpy(), seen.split.ids, strict=True):
        words = np.cumsum(~continues[ids])
        truth.append(np.isin(words, words[kept[: len(ids)]]) & ~continues[ids])  # the first piece alone
    truth[3] = None
    opposite = [None if mask is None else ~mask for mask in truth]
    same, other = (
        evaluate(seen.pair, {"test": replace(seen.split, truth=marks)}, draws=0)["human_rationales"]
        for marks in (truth, opposite))
    assert same["examples"] == 39 and same["f1_macro"] == same["f1_micro"] == same["iou_f1_macro"] == 1.0
    assert other["f1_macro"] < 0.6
