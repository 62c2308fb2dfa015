"""The faithfulness tests themselves are tested: models of known behaviour must score at their known levels."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_rationalizer
from planted import Planted, ideal_judge, planted_texts

from rekd_deploy.bench import probes
from rekd_deploy.bench.examples import features_of
from rekd_deploy.bench.faithfulness import examine, exchanged, other_examples, swap_check, swap_test
from rekd_deploy.bench.judges import judged, known_reasons, random_masks
from rekd_deploy.bench.subject import Exam, Selected, TorchPair
from rekd_train.data import ImageSplit, LabelledImages, encode
from rekd_train.data.published import make_mosaics
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings

pytestmark = pytest.mark.slow

SWAP = "unselected content has no influence"
HURTS = "removing the rationale hurts the independent judge"
KNOWN = "rationales lie where the reason is known to be"


def outcomes(checks) -> dict[str, str]:
    return {check.name: check.outcome for check in checks}


@pytest.fixture(scope="module")
def split():
    return planted_texts()


@pytest.fixture(scope="module")
def features(split):
    return features_of(split, split.preprocessor)


def examined(subject, split):
    features = features_of(split, split.preprocessor)
    return examine(subject, features, split, {"independent": ideal_judge(features)})


def exam_of(features, labels, mask) -> Exam:
    """Of the honest model on a given mask."""
    chosen, logits = Selected(np.zeros(mask.shape, np.float32), mask), np.zeros((len(labels), 2), np.float32)
    return Exam(Planted(features.preprocessor, "honest"), features, chosen, logits, labels)


def test_an_honest_model_passes_every_check(split) -> None:
    figures, checks = examined(Planted(split.preprocessor, "honest"), split)
    assert set(outcomes(checks).values()) == {"passed"}, outcomes(checks)
    assert figures["answers"]["accuracy"] == 1.0
    assert figures["structure"]["swap"]["largest_difference"] == 0
    assert figures["structure"]["swap"]["content_changed"] > 0.8
    assert figures["structure"]["selected_swap"]["follows"] == 1.0
    pipeline = figures["judges"]["pipeline"]
    assert pipeline["rationale"]["sufficiency"] == 0  # by construction
    # without its cue the honest model answers (1/2, 1/2); before it was all but sure
    assert pipeline["rationale"]["comprehensiveness"] == pytest.approx(0.5, abs=0.01)
    judge = figures["judges"]["independent"]
    assert judge["rationale"]["comprehensiveness"] == pytest.approx(0.45)
    assert judge["rationale"]["sufficiency"] == pytest.approx(0)
    assert judge["accuracy"]["rationale"] == 1.0 and judge["accuracy"]["rest"] == 0.5


def test_a_planted_code_in_the_positions_is_caught(split) -> None:
    """Right every time, and bit for bit blind to unselected content: only the probes see that it cheats."""
    figures, checks = examined(Planted(split.preprocessor, "cheat"), split)
    found = outcomes(checks)
    assert figures["answers"]["accuracy"] == 1.0
    assert found[SWAP] == "passed"
    for name in (
        probes.MASK_ONLY, probes.NEUTRAL, probes.OTHERS, probes.CODE, "the answer follows the selected content",
        HURTS, KNOWN,
    ):  # fmt: skip
        assert found[name] == "failed", name
    assert figures["probes"]["mask_only"]["mask_only"] > 0.95
    assert figures["probes"]["neutral_content"]["accuracy"] == 1.0
    assert figures["probes"]["other_masks"]["follows_other_class"] > 0.95
    assert figures["structure"]["selected_swap"]["follows"] == 0.0
    assert figures["judges"]["independent"]["accuracy"]["rationale"] == 0.5


def test_random_masks_score_at_the_level_of_chance(split, features) -> None:
    figures, checks = examined(Planted(split.preprocessor, "random"), split)
    found = outcomes(checks)
    kept_of_one = float(np.mean(3 / features.counts))  # chance that three of n words hold the one cue
    inside = figures["known"]["share_inside"]
    assert inside["rationale"] == pytest.approx(kept_of_one / 3, abs=0.03)
    assert inside["gain"]["low"] < 0 < inside["gain"]["high"]
    judge = figures["judges"]["independent"]
    for kind in ("rationale", "random"):
        assert judge[kind]["comprehensiveness"] == pytest.approx(0.45 * kept_of_one, abs=0.05)
        assert judge["accuracy"][kind] == pytest.approx(0.5 + kept_of_one / 2, abs=0.08)
    assert found[probes.MASK_ONLY] != "failed" and found[probes.OTHERS] != "failed"
    assert found[HURTS] == "failed"
    assert found[KNOWN] == "failed"
    # what it gets right the judge gets right as well: bad rationales, but no code
    assert found[probes.CODE] != "failed"


def test_an_untrained_selector_knows_no_reason(split) -> None:
    figures, checks = examined(TorchPair(make_rationalizer(operator="compact")), split)
    found = outcomes(checks)
    assert found[SWAP] == "passed"
    assert 0.35 < figures["answers"]["accuracy"] < 0.65
    # it looks at no label, so the pattern tells none
    assert figures["probes"]["mask_only"]["mask_only"] < 0.62
    assert figures["probes"]["mask_only"]["gain"]["low"] < 0.05


def test_a_rule_that_does_not_look_at_the_content_tells_nothing(split, features) -> None:
    """Position 1 to 3, whatever they hold: no probe may find the label in it."""
    mask = features.selectable & (np.cumsum(features.selectable, axis=1) <= 3)
    probe = probes.mask_probe(mask, features, split.labels)
    assert probe.figures["mask_only"] < 0.6


def test_an_influence_of_a_millionth_is_found(split) -> None:
    figures, checks = examined(Planted(split.preprocessor, "leaky"), split)
    assert outcomes(checks)[SWAP] == "failed"
    assert 0 < figures["structure"]["swap"]["largest_difference"] < 1e-2
    assert figures["structure"]["swap"]["examples_changed"] > 0.9 * len(split)


def test_a_swap_that_changes_nothing_proves_nothing(split, features) -> None:
    found = swap_test(exam_of(features, split.labels, features.selectable), np.random.default_rng(0))
    assert found["content_changed"] == 0 and swap_check(found).outcome == "not applicable"


def test_exchanged_words_bring_no_special_token_and_leave_the_rest(split, features) -> None:
    donors = other_examples(len(features), np.random.default_rng(0))
    assert (donors != np.arange(len(features))).all() and donors.max() < len(features)
    where = features.selectable & (np.arange(features.selectable.shape[1]) % 2 == 0)
    swapped = exchanged(features, where, donors)
    assert (swapped.content[~where] == features.content[~where]).all()
    assert not np.isin(swapped.content[where], list(split.preprocessor.special_ids.values())).any()


def test_the_probe_passes_over_classes_too_small_to_fold(split, features) -> None:
    labels = np.zeros(len(split), dtype=np.int64)
    labels[0] = 1
    assert probes.mask_probe(features.selectable, features, labels) is None
    _, checks = probes.leakage(exam_of(features, labels, features.selectable))
    assert {check.outcome for check in checks} == {"not applicable"}


def test_lengths_that_tell_the_label_are_not_blamed_on_the_pattern(split, features) -> None:
    """Long texts of one class: a fixed share of the words tells the length, and the length the label."""
    order = np.argsort(split.lengths)
    labels = np.zeros(len(split), dtype=np.int64)
    labels[order[len(split) // 2 :]] = 1
    third = features.selectable & (np.arange(features.selectable.shape[1]) % 3 == 0)
    mask = random_masks(third, features.selectable, np.random.default_rng(0))
    probe = probes.mask_probe(mask, features, labels)
    assert probe.figures["mask_only"] > 0.9 and probe.figures["length_only"] > 0.95
    assert probe.pattern.mean() - probe.baseline.mean() <= 0.05


@pytest.mark.parametrize(("full", "comprehensiveness", "sufficiency"), [(False, 0, 0.45), (True, 0.45, 0)])
def test_an_empty_and_a_full_rationale(split, features, full, comprehensiveness, sufficiency) -> None:
    """Empty: comprehensiveness 0, sufficiency p(x) - p(nothing); full: sufficiency 0."""
    found = judged(ideal_judge(features), exam_of(features, split.labels, features.selectable & full)).figures
    assert found["rationale"]["comprehensiveness"] == pytest.approx(comprehensiveness)
    assert found["rationale"]["sufficiency"] == pytest.approx(sufficiency)


def mosaics(tiles: int = 2, count: int = 120) -> ImageSplit:
    """Mosaics of random 4 x 4 items with 2 x 2 patches, the deciding tile known."""
    random = np.random.default_rng(0)
    items = LabelledImages(random.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8), np.arange(count) % 3)
    made = make_mosaics(items, tiles, random)
    side = 4 * tiles
    preprocessor = ImagePreprocessor(ImageSettings(side, side, 1, side // 2, side // 2))
    return encode(made, preprocessor)


@pytest.mark.parametrize("tiles", [2, 3])
def test_random_masks_find_the_true_tile_as_often_as_it_is_large(tiles) -> None:
    split = mosaics(tiles)
    features = features_of(split, split.preprocessor)
    random = np.random.default_rng(1)
    four = features.selectable & (np.arange(features.selectable.shape[1]) < 4)
    mask = random_masks(four, features.selectable, random)
    figures, check = known_reasons(split, features, Selected(random.random(mask.shape).astype(np.float32), mask))
    assert figures["truth"]["in_truth"] == pytest.approx(1 / tiles**2, abs=0.06)
    assert figures["truth"]["random"]["in_truth"] == pytest.approx(1 / tiles**2, abs=0.06)
    assert check.outcome == "failed"
    truth = np.stack(split.truth)
    figures, check = known_reasons(split, features, Selected(truth.astype(np.float32), truth))
    assert figures["share_inside"]["rationale"] == 1.0 and check.outcome == "passed"


def test_patches_can_be_taken_apart_and_put_together() -> None:
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


def test_a_grid_that_does_not_end_where_pixels_do_is_not_exchanged() -> None:
    preprocessor = ImagePreprocessor(ImageSettings(8, 8, 1, 3, 3))
    images = encode(LabelledImages(np.zeros((20, 8, 8, 1), np.uint8), np.arange(20) % 2), preprocessor)
    assert not features_of(images, preprocessor).separable and swap_check(None).outcome == "not applicable"
