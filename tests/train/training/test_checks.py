"""What cannot be trained is refused before training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import make_image_rationalizer, make_rationalizer, tiny_tokenizer_json
from toys import toy_config, toy_images, toy_texts

from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.data import LabelledTexts, tokenize
from rekd_train.errors import ConfigError, DataError
from rekd_train.evaluation.agreement import check_comparable
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.text import TextPreprocessor
from rekd_train.models.base import Predictor, Selector
from rekd_train.models.families import build_backbone
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training.stages import check_fit, short_texts_notice
from rekd_train.training.teacher import check_teacher


def refused(error, match, train=None, dev=None, teacher=None, make=toy_texts, **changes):
    pair, own_train, own_dev = make()
    with pytest.raises(error, match=match) as caught:
        check_fit(toy_config(**changes), pair, train or own_train, dev or own_dev, teacher, warm=False)
    assert "\n" not in str(caught.value) and "fix" in str(caught.value)


def test_what_fits_passes():
    pair, train, dev = toy_texts()
    check_fit(toy_config(), pair, train, dev, make_rationalizer(4), warm=False)
    pair, train, dev = toy_images()
    check_fit(toy_config(), pair, train, dev, make_image_rationalizer(4), warm=False)


def test_labels_that_are_no_classes():
    _, train, dev = toy_texts()
    train.labels = train.labels + 1
    refused(DataError, "split 'train' has the label 2; there are 2 classes, 0 to 1; fix", train=train)
    dev.labels = dev.labels - 1
    refused(DataError, "split 'dev' has the label -1", dev=dev)


def test_one_class_only_and_nothing_at_all():
    _, train, _ = toy_texts()
    train.labels = np.zeros_like(train.labels)
    refused(DataError, "training examples are all of one class; fix", train=train)
    train.labels = train.labels[:-1]
    refused(DataError, "256 examples and 255 labels", train=train)
    train.labels = train.labels[:0]
    refused(DataError, "256 examples and 0 labels", train=train)


def test_a_teacher_of_other_classes():
    refused(ConfigError, r"teacher has 3 classes \(a, b, c", teacher=make_rationalizer(labels=("a", "b", "c")))
    swapped = make_rationalizer(labels=("positive", "negative"))
    with pytest.raises(ConfigError, match="orders its classes otherwise"):
        check_teacher(swapped, make_rationalizer(), toy_config())


def test_a_teacher_of_another_tokenizer():
    document = json.loads(tiny_tokenizer_json())
    vocabulary = document["model"]["vocab"]
    vocabulary["film"], vocabulary["movie"] = vocabulary["movie"], vocabulary["film"]
    teacher = make_rationalizer()
    teacher.preprocessor = TextPreprocessor(json.dumps(document), teacher.preprocessor.settings)
    refused(ConfigError, "another tokenizer; distillation needs the same tokens", teacher=teacher)


def as_vocabulary(content: str, directory, **options) -> str:
    """The same tokenizer as another library writes it, from its vocab.txt."""
    from tokenizers import BertWordPieceTokenizer

    words = json.loads(content)["model"]["vocab"]
    (directory / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)))
    return BertWordPieceTokenizer(str(directory / "vocab.txt"), **options).to_str()


def test_a_teacher_whose_tokenizer_is_only_written_otherwise(tmp_path):
    pair, train, dev = toy_texts()
    teacher = make_rationalizer(4)
    same = as_vocabulary(tiny_tokenizer_json(), tmp_path, lowercase=True)
    assert same != teacher.preprocessor.tokenizer_json
    teacher.preprocessor = TextPreprocessor(same, teacher.preprocessor.settings)
    check_fit(toy_config(), pair, train, dev, teacher, warm=False)
    check_comparable(pair, teacher)
    cased = as_vocabulary(tiny_tokenizer_json(), tmp_path, lowercase=False)
    teacher.preprocessor = TextPreprocessor(cased, teacher.preprocessor.settings)
    refused(ConfigError, "another tokenizer; distillation needs the same tokens", teacher=teacher)
    with pytest.raises(ConfigError, match="reads other features"):
        check_comparable(pair, teacher)


def test_a_teacher_that_reads_less():
    student = make_rationalizer(max_length=64)
    teacher = make_rationalizer()
    for model in (teacher.selector, teacher.predictor):
        model.backbone.settings = model.backbone.settings.model_copy(update={"positions": 48})
    with pytest.raises(ConfigError, match="reads at most 48 tokens.*up to 64; fix: data.max_length=48"):
        check_teacher(teacher, student, toy_config())


def test_a_teacher_of_another_modality():
    teacher = make_image_rationalizer(labels=("negative", "positive"))
    with pytest.raises(ConfigError, match="teacher reads image inputs, the student text inputs"):
        check_teacher(teacher, make_rationalizer(), toy_config())


@pytest.mark.parametrize(
    ("image", "match"),
    [
        ({"height": 16, "width": 12, "channels": 1, "patch": 2}, r"into \(8, 6\).*patches, the student into \(4, 3\)"),
        ({"height": 24, "width": 12, "channels": 1, "patch": 4}, r"images of \(24, 12, 1\).*not of \(16, 12, 1\)"),
    ],
)
def test_a_teacher_of_another_patch_grid_or_size(image, match):
    settings = BackboneConfig(family="vit", layers=1, width=8, heads=2, feedforward=8, image=ImageConfig(**image))
    student = make_image_rationalizer()
    networks = [build_backbone(settings, {}) for _ in range(2)]
    teacher = Rationalizer(
        Selector(networks[0]), Predictor(networks[1], 3), student.policy, ImagePreprocessor(ImageSettings.of(settings)),
        student.labels,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=match):
        check_teacher(teacher, student, toy_config())


def notice(words: int, **selection) -> str:
    """Of 9 texts, most of which have so many words and a few of which are longer."""
    pair = make_rationalizer()
    lengths = [words] * 6 + [40] * 3
    texts = LabelledTexts(["good " * length for length in lengths], np.arange(9) % 2)
    config = toy_config(selection=selection) if selection else toy_config(stages={"rationale_epochs": 0})
    return short_texts_notice(config, tokenize(texts, pair.preprocessor), pair.preprocessor)


@pytest.mark.parametrize(
    ("selection", "words", "allowed"),
    [
        ({"decision": "top-k", "target": 0.1}, 29, "29 words, of which selection.target=0.1 allows 2"),
        ({"decision": "top-k", "target": 0.1}, 30, ""),
        ({"decision": "calibrated", "target": 0.1, "budget": 0.15}, 10, "selection.budget=0.15 allows 1"),
        ({"decision": "calibrated", "target": 0.1, "budget": 0.15}, 20, ""),
        ({"decision": "top-k", "target": 0.3, "budget": 0.35}, 10, ""),
        ({"decision": "argmax", "budget": None}, 3, ""),
        ({}, 5, ""),
    ],
)
def test_a_budget_below_three_words_is_noted_for_texts_that_are_short(selection, words, allowed):
    assert allowed in notice(words, **selection) and bool(notice(words, **selection)) == bool(allowed)


def test_images_get_no_note_about_words():
    pair, train, _ = toy_images()
    assert short_texts_notice(toy_config(selection={"target": 0.05, "budget": 0.05}), train, pair.preprocessor) == ""
