"""Splits, encoding and batches: the same examples every time, the right tensors, the reason where it is known."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image_rationalizer, tiny_tokenizer_json
from PIL import Image
from rich.console import Console

from rekd_train.checkpoints.checkpoint import model_card
from rekd_train.cli import progress as cli_progress
from rekd_train.config.run import DataConfig
from rekd_train.data import (
    DataSet,
    LabelledImages,
    LabelledTexts,
    encode,
    encode_splits,
    load_data,
    summarise,
    tokenize,
)
from rekd_train.data.examples import check_data, completed, stratified_split, summary_notes, summary_rows
from rekd_train.data.splits import augment
from rekd_train.errors import ConfigError, DataError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.text import TextPreprocessor, TextSettings

TESTS = Path(__file__).parents[2]
SPLITS = ("train", "dev", "test")


def texts(count: int, classes: int = 2) -> LabelledTexts:
    return LabelledTexts([f"text {i}" for i in range(count)], np.arange(count) % classes)


def shares(dev: float, test: float, seed: int = 0) -> DataConfig:
    return DataConfig(dev_share=dev, test_share=test, seed=seed)


@pytest.fixture(scope="module")
def preprocessor() -> TextPreprocessor:
    return TextPreprocessor(tiny_tokenizer_json(), TextSettings(32))


@pytest.fixture(scope="module")
def patches():
    """Of 16 x 12 grey images, 4 x 3 patches of 4 x 4 pixels."""
    return make_image_rationalizer().preprocessor


# splits


def test_parts_hold_each_label_in_proportion_and_each_example_once():
    parts = stratified_split(texts(200, 4), (0.8, 0.1, 0.1), seed=1)
    assert [len(part) for part in parts] == [160, 20, 20]
    for part in parts:
        assert set(np.bincount(part.labels)) == {len(part) // 4}
        assert all(int(text.split()[1]) % 4 == label for text, label in zip(part.texts, part.labels, strict=True))
    assert sorted(text for part in parts for text in part.texts) == sorted(texts(200).texts)


def test_a_seed_fixes_the_split_and_another_changes_it():
    first, again, other = (stratified_split(texts(100), (0.5, 0.5), seed)[0].texts for seed in (1, 1, 2))
    assert first == again != other


def test_splits_that_a_source_brings_are_kept():
    test = texts(10)
    whole = completed({"train": texts(100), "test": test}, shares(0.2, 0.3))
    assert sorted(whole["test"].texts) == sorted(test.texts) and len(whole["dev"]) == 20 and len(whole["train"]) == 80
    assert whole["test"].texts == completed({"train": texts(80), "test": test}, shares(0.1, 0.1, 9))["test"].texts
    assert {name: len(part) for name, part in completed({"train": texts(100)}, shares(0.2, 0.3)).items()} == dict(
        zip(SPLITS, (50, 20, 30), strict=True)
    )


def test_the_first_examples_are_a_fair_sample_of_sorted_data():
    examples = LabelledTexts([f"text {i}" for i in range(100)], np.arange(100) // 50)
    for part in completed({"train": examples, "test": examples}, shares(0.2, 0.1)).values():
        assert len(set(part.head(12).labels)) == 2


def test_taking_examples_takes_all_that_belongs_to_them():
    some = LabelledTexts(["a", "b", "c"], np.array([0, 1, 0]), [[(0, 1)], None, []]).take([2, 0])
    assert (some.texts, some.labels.tolist(), some.rationales) == (["c", "a"], [0, 0], [[], [(0, 1)]])
    images = LabelledImages(np.arange(3).reshape(3, 1, 1, 1), np.array([0, 1, 2]), np.eye(3, 4, dtype=int)).take([2])
    assert images.images.ravel().tolist() == [2] and images.regions.tolist() == [[0, 0, 1, 0]]
    files = LabelledImages([Path("a"), Path("b")], np.array([0, 1])).head(1)
    assert files.images == [Path("a")] and files.labels.tolist() == [0]


@pytest.mark.parametrize(
    ("splits", "word"),
    [
        ({"train": texts(4), "dev": texts(0), "test": texts(2)}, "'dev' is empty"),
        ({"train": LabelledTexts(["x", "y"], np.zeros(2, int))}, "all of one class"),
        ({"train": texts(4, 3)}, "label 2; there are 2 classes"),
        ({"train": LabelledTexts(["x", "y"], np.array([-2, 0]))}, "label -2"),
        ({"train": texts(4), "dev": LabelledTexts(["x", "y"], np.array([-1, 0]))}, "'dev' has the label -1"),
        ({"train": LabelledTexts(["x", "y"], np.array([-1, 0]))}, "all of one class"),
    ],
)
def test_data_that_cannot_be_learnt_from_are_refused(splits, word):
    with pytest.raises(DataError, match=f"data 'mine': .*{word}"):
        check_data(DataSet(splits, ("a", "b"), ""), "mine")


def test_limits_take_the_first_of_each_split():
    pytest.importorskip("sklearn")
    whole = load_data(DataConfig(name="digits"))
    some = load_data(DataConfig(name="digits", train_examples=50, dev_examples=20, test_examples=10))
    assert {name: len(part) for name, part in some.splits.items()} == {"train": 50, "dev": 20, "test": 10}
    assert (some.splits["dev"].images == whole.splits["dev"].images[:20]).all()


# texts


def test_texts_become_padded_batches(preprocessor):
    split = tokenize(LabelledTexts(["the film", "a great film !"], np.array([0, 1])), preprocessor)
    assert split.lengths.tolist() == [4, 6] and not split.augmented and split.truth is None
    batch = split.inputs([1, 0])
    assert batch["input_ids"].shape == (2, 6) and batch["attention_mask"].sum(axis=1).tolist() == [6, 4]


def test_a_human_rationale_becomes_the_tokens_it_touches(preprocessor):
    examples = LabelledTexts(["the film was great", "bad film"], np.array([1, 0]), [[(4, 8), (16, 18)], None])
    split = tokenize(examples, preprocessor)
    assert split.truth[0].tolist() == [False, False, True, False, True, False]  # [CLS] the film was great [SEP]
    assert split.truth[1] is None


def test_texts_without_any_token_are_all_named(preprocessor):
    with pytest.raises(DataError, match=r"hold no word .*: '\\u200b'; '\\u200c'; fix: leave them out"):
        tokenize(LabelledTexts(["good", "\u200b", "bad", "\u200c"], np.array([0, 1, 0, 1])), preprocessor)


def test_the_length_of_a_cut_text_is_known(preprocessor):
    examples = LabelledTexts([" ".join(["good"] * count) for count in (2, 30, 31, 57, 500)], np.zeros(5, dtype=int))
    split = tokenize(examples, preprocessor)  # [CLS] and [SEP] belong to the length
    assert split.lengths.tolist() == [4, 32, 32, 32, 32]
    assert split.whole_lengths.tolist() == [4, 32, 33, 59, 502]


MEMORY = """
import resource
import numpy as np
from conftest import tiny_tokenizer_json
from rekd_train.data import LabelledTexts, tokenize
from rekd_train.inputs.text import TextPreprocessor, TextSettings

def some(count):
    return LabelledTexts([" ".join(["good bad dull"] * 50)] * count, np.zeros(count, dtype=np.int64))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(64))
tokenize(some(16), preprocessor)
before = peak()
split = tokenize(some(6000), preprocessor)
print((peak() - before) / 6000, sum(ids.nbytes for ids in split.ids) / 6000)
"""


def test_tokenising_keeps_the_ids_and_no_windows():
    """150 words: their encoding with its windows takes 30 kB, the ids of 64 tokens a quarter of one."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=TESTS, env=os.environ | {"PYTHONPATH": f"{TESTS.parent}"},
                          capture_output=True, text=True, check=True)  # fmt: skip
    peak, kept = map(float, done.stdout.split())
    assert kept == 64 * 4 and peak < 12_000


# images


def images(count: int = 3, height: int = 16, width: int = 12, channels: int = 1) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return LabelledImages(pixels, np.arange(count) % 3, np.tile([4, 0, 8, 12], (count, 1)))


def test_images_of_the_right_size_stay_as_they_are_and_others_are_converted(patches, tmp_path):
    split = encode(images(), patches)
    assert split.lengths.tolist() == [12, 12, 12]
    assert (split.inputs([2, 0])["pixels"] == images().images[[2, 0]]).all()
    assert encode(images(2, 32, 24, 3), patches).inputs([0, 1])["pixels"].shape == (2, 16, 12, 1)
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(images(1, 20, 20, 3).images[0]).save(good)
    assert encode(LabelledImages([good], np.array([0])), patches).inputs([0])["pixels"].shape == (1, 16, 12, 1)
    bad.write_bytes(good.read_bytes()[:60])
    with pytest.raises(DataError, match="bad.png"):
        encode(LabelledImages([good, bad], np.array([0, 1])), patches)


@pytest.mark.parametrize(("region", "patches_in"), [((4, 0, 8, 12), [3, 4, 5]), ((0, 0, 6, 4), [0, 3]),
                                                    ((0, 0, 5, 4), [0])])  # fmt: skip
def test_a_patch_is_part_of_the_truth_where_half_of_it_is_covered(patches, region, patches_in):
    examples = images(1)
    examples.regions[0] = region
    assert np.flatnonzero(encode(examples, patches).truth[0]).tolist() == patches_in


def test_a_model_of_the_other_modality_is_refused(preprocessor, patches):
    with pytest.raises(ConfigError, match="data are images, the model reads texts"):
        encode(images(), preprocessor)
    with pytest.raises(ConfigError, match="data are texts, the model reads images"):
        encode(texts(2), patches)


@pytest.mark.parametrize("augmentation", ["crop", "flip", "crop_flip"])
def test_augmentation_needs_a_generator_and_is_fixed_by_it(patches, augmentation):
    split = encode(images(40), patches, augmentation)
    rows = np.arange(40)
    plain = split.inputs(rows)["pixels"]
    assert split.augmented and (plain == images(40).images).all()
    changed, again = (split.inputs(rows, np.random.default_rng(5))["pixels"] for _ in range(2))
    assert (changed == again).all() and (changed != plain).any() and changed.shape == plain.shape


def test_a_flip_mirrors_and_a_crop_shifts_over_a_black_border():
    pixels = images(60).images
    mirrored = augment(pixels, "flip", np.random.default_rng(0))
    kinds = [(mirrored[i] == pixels[i]).all() * 1 + (mirrored[i] == pixels[i][:, ::-1]).all() * 2 for i in range(60)]
    assert set(kinds) == {1, 2}
    shifted = augment(pixels, "crop", np.random.default_rng(0))
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    places = [
        (top, left) for i in range(60) for top in range(9) for left in range(9)
        if (padded[i, top : top + 16, left : left + 12] == shifted[i]).all()
    ]
    assert len(places) == 60 and len(set(places)) > 20


def test_only_training_images_are_augmented(patches):
    data = DataSet({name: images() for name in SPLITS}, ("a", "b", "c"), "")
    splits = encode_splits(data, patches, DataConfig(name="digits", augmentation="flip"))
    assert {name: split.augmented for name, split in splits.items()} == {"train": True, "dev": False, "test": False}


# the summary: counted before training, shown, kept in metrics.json and in the card


def summary_of(splits: dict[str, LabelledTexts], names=("neg", "pos"), **found) -> dict:
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(16))
    encoded = {name: encode(part, preprocessor) for name, part in splits.items()}
    return summarise(DataSet(splits, names, "mine", **found), encoded)


def words(*lengths: int, label: int = 0) -> LabelledTexts:
    return LabelledTexts([" ".join(["good"] * length) for length in lengths], np.array([label] * len(lengths)))


@pytest.fixture(scope="module")
def summary() -> dict:
    train = LabelledTexts(words(*range(1, 41)).texts, np.array([0] * 38 + [1] * 2))
    contradictions = tuple(f"line {n} 'neg' (kept), line {n + 40} 'pos': '[b]'" for n in range(23))
    splits = {"train": train, "dev": words(3), "test": words(30, 30, label=1)}
    return summary_of(splits, duplicates=25, contradictions=contradictions)


def test_it_counts_examples_classes_lengths_and_what_is_cut(summary):
    train = summary["splits"]["train"]
    assert (train["examples"], train["classes"]) == (40, {"neg": 38, "pos": 2})
    assert train["tokens"] == {"p5": 4, "p50": 22, "p95": 40, "max": 42}, "of the whole texts, with [CLS] and [SEP]"
    assert (train["cut"], summary["max_length"]) == (26, 16), "from 15 words on"
    assert summary["splits"]["test"]["cut"] == 2 and summary["splits"]["dev"]["classes"] == {"neg": 1, "pos": 0}
    assert (summary["duplicates_dropped"], summary["contradicting"]) == (25, 23)


def test_every_count_is_a_row_and_the_rest_a_line(summary):
    rows = {title: figures for title, *figures in summary_rows(summary)}
    assert rows["class pos"] == ["2 (5.0%)", "0 (0.0%)", "2 (100.0%)"]
    assert rows["cut at 16 tokens"] == ["26 (65.0%)", "0 (0.0%)", "2 (100.0%)"]
    notes = summary_notes(summary)
    assert notes[:2] == ["duplicates dropped: 25", "examples with contradicting labels: 23"]
    assert notes[2] == "  line 0 'neg' (kept), line 40 'pos': '[b]'"
    assert notes[22] == "  and 3 more" and notes[23].startswith("uneven classes: 38 training examples of 'neg', 2 of")


def test_many_classes_are_summed_up():
    names = tuple(f"c{n}" for n in range(30))
    train = LabelledTexts(["good"] * 60, np.arange(60) % 30)
    rows = summary_rows(summary_of(dict.fromkeys(SPLITS, train), names))
    assert [title for title, *_ in rows][20:22] == ["11 more classes", "tokens, 5th percentile"]
    assert rows[20][1] == "22 (36.7%)"


def test_images_have_no_lengths(patches):
    split = encode(images(), patches)
    summary = summarise(DataSet({}, ("shirt", "shoe", "bag"), "mine"), dict.fromkeys(SPLITS, split))
    assert [title for title, *_ in summary_rows(summary)] == ["examples", "class shirt", "class shoe", "class bag"]
    assert summary_notes(summary) == [], "nobody has looked for duplicates"


def test_it_is_shown_once_within_80_columns(summary, capsys, monkeypatch):
    monkeypatch.setattr(Console, "width", 80)
    with cli_progress.progress_bars() as bars:
        bars.data(summary)
        bars.data(dict(summary))
    shown = capsys.readouterr().err
    assert shown.count("class pos") == 1 and "'[b]'" in shown and "5.0%" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_card_has_it(summary):
    description = {
        "training": {}, "labels": ["neg", "pos"], "operator": "zero", "preprocessing": {"kind": "text"},
        **dict.fromkeys(("selector", "predictor"), {"family": "bert", "layers": 1, "width": 8, "heads": 2}),
    }  # fmt: skip
    policy = SelectionPolicy(bias=0.0, budget=0.2, minimum=1)
    card = model_card(description, policy, {"test": {"accuracy": 0.5, "never_predicted": ["pos"]}, "data": summary})
    assert "| class pos | 2 (5.0%) | 0 (0.0%) | 2 (100.0%) |" in card and "\n  - line 0 'neg' (kept)" in card
    assert "test.never_predicted: pos" in card and "data.splits" not in card
    assert "class pos" not in model_card(description, policy, {})
