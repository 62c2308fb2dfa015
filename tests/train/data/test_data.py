"""Splits, encoding and batches: the same examples every time, the right tensors, the reason where it is known."""

import numpy as np
import pytest
from conftest import make_image_rationalizer, tiny_tokenizer_json
from PIL import Image
from rich.console import Console

from rekd_train.checkpoints.checkpoint import model_card
from rekd_train.cli.command import progress_bars
from rekd_train.config.run import DataConfig
from rekd_train.data import DataSet, LabelledImages, LabelledTexts, encode, encode_splits, load_data, summarise
from rekd_train.data.examples import UNLABELLED, check_data, completed, stratified_split, summary_notes, summary_rows
from rekd_train.data.splits import augment
from rekd_train.errors import ConfigError, DataError
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.text import TextPreprocessor, TextSettings

SPLITS = ("train", "dev", "test")
WORDS = TextPreprocessor(tiny_tokenizer_json(), TextSettings(32))
PATCHES = make_image_rationalizer().preprocessor  # of 16 x 12 grey images, 4 x 3 patches of 4 x 4 pixels


def labelled(*labels: int) -> LabelledTexts:
    return LabelledTexts([f"text {i}" for i in range(len(labels))], np.array(labels, dtype=int))


def test_parts_hold_labels_in_proportion_and_splits_that_a_source_brings_are_kept():
    parts = stratified_split(labelled(*[0, 1, 2, 3] * 50), (0.8, 0.1, 0.1), seed=1)
    assert [len(part) for part in parts] == [160, 20, 20]
    for part in parts:
        assert set(np.bincount(part.labels)) == {len(part) // 4}
        assert all(int(text.split()[1]) % 4 == label for text, label in zip(part.texts, part.labels, strict=True))
    assert sorted(text for part in parts for text in part.texts) == sorted(labelled(*[0, 1] * 100).texts)
    first, again, other = (stratified_split(labelled(*[0, 1] * 50), (0.5, 0.5), seed)[0].texts for seed in (1, 1, 2))
    assert first == again != other
    some = LabelledTexts(["a", "b", "c"], np.array([0, 1, 0]), [[(0, 1)], None, []]).take([2, 0])
    assert (some.texts, some.labels.tolist(), some.rationales) == (["c", "a"], [0, 0], [[], [(0, 1)]])
    images = LabelledImages(np.arange(3).reshape(3, 1, 1, 1), np.array([0, 1, 2]), np.eye(3, 4, dtype=int)).take([2])
    assert images.images.ravel().tolist() == [2] and images.regions.tolist() == [[0, 0, 1, 0]]
    shares = {"dev_share": 0.2, "test_share": 0.3}
    examples, test = labelled(*[0] * 50, *[1] * 50), labelled(*[0, 1] * 5)
    whole = completed({"train": examples, "test": test}, DataConfig(**shares))
    assert sorted(whole["test"].texts) == sorted(test.texts) and [*map(len, whole.values())] == [80, 20, 10]
    again = completed({"train": labelled(*[0, 1] * 40), "test": test}, DataConfig(seed=9))
    assert whole["test"].texts == again["test"].texts
    made = completed({"train": examples}, DataConfig(**shares))
    assert [*map(len, made.values())] == [50, 20, 30] and [*made] == [*whole] == [*SPLITS]
    for part in (*whole.values(), *made.values()):
        assert len(set(part.head(12).labels)) == 2
    pytest.importorskip("sklearn")
    whole = load_data(DataConfig(name="digits"))
    some = load_data(DataConfig(name="digits", train_examples=50, dev_examples=20, test_examples=10))
    assert [*map(len, some.splits.values())] == [50, 20, 10]
    assert (some.splits["dev"].images == whole.splits["dev"].images[:20]).all()
    few = load_data(DataConfig(name="digits", train_examples=50, labelled_examples=20)).splits["train"]
    assert (few.labels[:20] == whole.splits["train"].labels[:20]).all() and (few.labels[20:] == UNLABELLED).all()
    assert len(few) == 50 and len(few.labelled()) == 20 and (few.labelled().images == few.images[:20]).all()


@pytest.mark.parametrize(("splits", "word"), [
    ({"train": labelled(0, 1), "dev": labelled()}, "'dev' is empty"),
    ({"train": labelled(0, 0)}, "all of one class"), ({"train": labelled(-1, 0)}, "all of one class"),
    ({"train": labelled(0, 1, 2)}, "label 2; there are 2 classes"), ({"train": labelled(-2, 0)}, "label -2"),
    ({"train": labelled(0, 1), "dev": labelled(-1, 0)}, "'dev' has the label -1"),
    ({"train": LabelledTexts(["a"], np.array([0, 1]))}, "'train' has 1 examples and 2 labels")])  # fmt: skip
def test_data_that_cannot_be_learnt_from_are_refused(splits, word):
    with pytest.raises(DataError, match=f"data 'mine': .*{word}"):
        check_data(DataSet(splits, ("a", "b"), ""), "mine")


def test_texts_become_padded_batches_tokenised_a_few_at_once(monkeypatch):
    examples = LabelledTexts(["the film was great", "bad film"], np.array([1, 0]), [[(4, 8), (16, 18)], None])
    split = encode(examples, WORDS)
    assert split.lengths.tolist() == [6, 4] and not split.augmented
    batch = split.inputs([1, 0])
    assert batch["input_ids"].shape == (2, 6) and batch["attention_mask"].sum(axis=1).tolist() == [4, 6]
    assert split.truth[0].tolist() == [False, False, True, False, True, False]  # [CLS] the film was great [SEP]
    assert split.truth[1] is None and encode(labelled(0), WORDS).truth is None
    with pytest.raises(DataError, match=r"hold no word .*: '\\u200b'; '\\u200c'; fix: leave them out"):
        encode(LabelledTexts(["good", "\u200b", "bad", "\u200c"], np.array([0, 1, 0, 1])), WORDS)
    whole, sizes = TextPreprocessor.encode, []
    monkeypatch.setattr(TextPreprocessor, "encode", lambda self, some: sizes.append(len(some)) or whole(self, some))
    cut = encode(words(2, 30, 31, 57, 500), WORDS)  # [CLS] and [SEP] belong to the length
    assert (cut.lengths.tolist(), cut.whole_lengths.tolist()) == ([4, 32, 32, 32, 32], [4, 32, 33, 59, 502])
    split = encode(words(*[3] * 1200), WORDS)
    assert sizes == [5, 512, 512, 176] and sum(ids.nbytes for ids in split.ids) == 1200 * 5 * 4


def images(count: int = 3, height: int = 16, width: int = 12, channels: int = 1) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return LabelledImages(pixels, np.arange(count) % 3, np.tile([4, 0, 8, 12], (count, 1)))


def test_images_stay_or_are_converted_and_half_a_patch_is_truth(tmp_path):
    split = encode(images(), PATCHES)
    assert split.lengths.tolist() == [12, 12, 12]
    assert (split.inputs([2, 0])["pixels"] == images().images[[2, 0]]).all()
    assert encode(images(2, 32, 24, 3), PATCHES).inputs([0, 1])["pixels"].shape == (2, 16, 12, 1)
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(images(1, 20, 20, 3).images[0]).save(good)
    assert encode(LabelledImages([good], np.array([0])), PATCHES).inputs([0])["pixels"].shape == (1, 16, 12, 1)
    bad.write_bytes(good.read_bytes()[:60])
    with pytest.raises(DataError, match="bad.png"):
        encode(LabelledImages([good, bad], np.array([0, 1])), PATCHES)
    with pytest.raises(ConfigError, match="data are images, the model reads texts"):
        encode(images(), WORDS)
    with pytest.raises(ConfigError, match="data are texts, the model reads images"):
        encode(labelled(0, 1), PATCHES)
    for region, covered in (((4, 0, 8, 12), [3, 4, 5]), ((0, 0, 6, 4), [0, 3]), ((0, 0, 5, 4), [0])):
        examples = LabelledImages(images(1).images, np.array([0]), np.array([region]))
        assert np.flatnonzero(encode(examples, PATCHES).truth[0]).tolist() == covered


@pytest.mark.parametrize("augmentation", ["crop", "flip", "crop_flip"])
def test_augmentation_needs_a_generator_is_fixed_by_it_and_is_for_training_alone(augmentation):
    data = DataSet({name: images(40) for name in SPLITS}, ("a", "b", "c"), "")
    splits = encode_splits(data, PATCHES, DataConfig(name="digits", augmentation=augmentation))
    assert [split.augmented for split in splits.values()] == [True, False, False]
    plain = splits["train"].inputs(np.arange(40))["pixels"]
    assert (plain == images(40).images).all()
    changed, again = (splits["train"].inputs(np.arange(40), np.random.default_rng(5))["pixels"] for _ in range(2))
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
        if (padded[i, top : top + 16, left : left + 12] == shifted[i]).all()]
    assert len(places) == 60 and len(set(places)) > 20


def words(*lengths: int, label: int = 0) -> LabelledTexts:
    return LabelledTexts([" ".join(["good"] * length) for length in lengths], np.array([label] * len(lengths)))


def summary_of(splits: dict[str, LabelledTexts], names=("neg", "pos"), **found) -> dict:
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(16))
    encoded = {name: encode(part, preprocessor) for name, part in splits.items()}
    return summarise(DataSet(splits, names, "mine", **found), encoded)


@pytest.fixture(scope="module")
def summary() -> dict:
    train = LabelledTexts(words(*range(1, 43)).texts, np.array([0] * 38 + [1] * 2 + [-1] * 2))
    contradictions = tuple(f"line {n} 'neg' (kept), line {n + 40} 'pos': '[b]'" for n in range(23))
    splits = {"train": train, "dev": words(3), "test": words(30, 30, label=1)}
    return summary_of(splits, duplicates=25, contradictions=contradictions)


def test_counts_are_rows_or_lines_and_many_classes_are_summed_up(summary):
    assert summary["splits"]["train"] == {
        "examples": 42, "classes": {"neg": 38, "pos": 2}, "cut": 28, "unlabelled": 2,
        "tokens": {"p5": 5, "p50": 23, "p95": 41, "max": 44},  # of the whole texts, with [CLS] and [SEP]
    }  # fmt: skip
    assert (summary["max_length"], summary["duplicates_dropped"], summary["contradicting"]) == (16, 25, 23)
    rows = {title: figures for title, *figures in summary_rows(summary)}
    assert rows["class pos"] == ["2 (4.8%)", "0 (0.0%)", "2 (100.0%)"] and rows["tokens, median"] == ["23", "5", "32"]
    assert rows["cut at 16 tokens"] == ["28 (66.7%)", "0 (0.0%)", "2 (100.0%)"]
    notes = summary_notes(summary)
    assert notes[:2] == ["duplicates dropped: 25", "examples with contradicting labels: 23"]
    assert notes[2] == "  line 0 'neg' (kept), line 40 'pos': '[b]'"
    assert notes[22] == "  and 3 more" and notes[23].startswith("uneven classes: 38 training examples of 'neg', 2 of")
    train = LabelledTexts(["good"] * 60, np.arange(60) % 30)
    rows = summary_rows(summary_of(dict.fromkeys(SPLITS, train), tuple(f"c{n}" for n in range(30))))
    assert [title for title, *_ in rows][20:22] == ["11 more classes", "tokens, 5th percentile"]
    assert rows[20][1] == "22 (36.7%)"
    summary = summarise(DataSet({}, ("shirt", "shoe", "bag"), "mine"), dict.fromkeys(SPLITS, encode(images(), PATCHES)))
    assert [title for title, *_ in summary_rows(summary)] == ["examples", "class shirt", "class shoe", "class bag"]
    assert summary_notes(summary) == [], "nobody has looked for duplicates"


def test_it_is_shown_once_within_80_columns_and_the_card_has_it(summary, capsys, monkeypatch):
    monkeypatch.setattr(Console, "width", 80)
    with progress_bars() as bars:
        bars.data(summary)
        bars.data(dict(summary))
    shown = capsys.readouterr().err
    assert shown.count("class pos") == 1 and "'[b]'" in shown and "4.8%" in shown
    assert max(map(len, shown.splitlines())) <= 80
    network = {"family": "bert", "layers": 1, "width": 8, "heads": 2}
    description = {"training": {}, "labels": ["neg", "pos"], "operator": "zero", "preprocessing": {"kind": "text"}}
    description |= {"selector": network, "predictor": network}
    policy, metrics = SelectionPolicy(minimum=1), {"test": {"accuracy": 0.5, "never_predicted": ["pos"]}}
    card = model_card(description, policy, metrics | {"data": summary})
    assert "| class pos | 2 (4.8%) | 0 (0.0%) | 2 (100.0%) |" in card and "\n  - line 0 'neg' (kept)" in card
    assert "test.never_predicted: pos" in card and "data.splits" not in card
    assert "class pos" not in model_card(description, policy, metrics)
