"""The faithfulness tests themselves are tested: models of known behaviour must score at their known levels."""

from types import SimpleNamespace

import numpy as np
import pytest
from planted import Planted, ideal_judge, planted_texts

from rekd_deploy.bench import probes
from rekd_deploy.bench.examples import features_of
from rekd_deploy.bench.faithfulness import examine, exchanged, other_examples, swap_check, swap_test
from rekd_deploy.bench.judges import judged, known_reasons, random_masks
from rekd_deploy.bench.subject import Exam, Selected
from rekd_train.data import ImageSplit, LabelledImages, encode
from rekd_train.data.published import make_mosaics
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
