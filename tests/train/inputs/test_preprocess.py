"""Texts to tensors and masks back to spans."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TOKENIZERS, tiny_tokenizer_json, trained_tokenizer
from PIL import Image

from rekd_train.errors import CheckpointError, ConfigError, FaultyItemsError, InputError
from rekd_train.inputs.prediction import Prediction, Span, merged_spans
from rekd_train.inputs.text import TextPreprocessor, TextSettings

MAXIMUM = 48
SETTINGS = TextSettings(max_length=MAXIMUM, lengths=(16, 32))
PREPROCESSOR = TextPreprocessor(tiny_tokenizer_json(), SETTINGS)
SPECIAL = PREPROCESSOR.special_ids


def tokens(text: str) -> list[str]:
    return PREPROCESSOR.encode([text])[0].tokens


def predict(text: str, kept: list[int], scores: Sequence[float] = range(MAXIMUM)) -> Prediction:
    encoded = PREPROCESSOR([text])
    mask = np.zeros(encoded.inputs["input_ids"].shape, dtype=bool)
    mask[0, kept] = True
    values = np.array([scores], dtype=np.float32)
    return encoded.predictions(["no", "yes"], np.array([[0.25, 0.75]]), mask, values)[0]


def test_tensors_have_the_smallest_bucket_and_pieces_are_what_was_seen(monkeypatch):
    encoded = PREPROCESSOR(["the film was great", "bad"])
    ids, mask = encoded.inputs["input_ids"], encoded.inputs["attention_mask"]
    assert list(encoded.inputs) == ["input_ids", "attention_mask"] and ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (2, 16) and mask.sum(axis=1).tolist() == [6, 3]
    assert ids[1].tolist() == [SPECIAL["cls"], ids[1, 1], SPECIAL["sep"], *[SPECIAL["pad"]] * 13]
    assert json.loads(tiny_tokenizer_json())["truncation"]["max_length"] == 8, "ours, not the file's"
    for count, width in ((1, 16), (14, 16), (15, 32), (30, 32), (31, 48), (46, 48), (60, 48)):
        encoded = PREPROCESSOR(["good " * count])
        assert encoded.inputs["input_ids"].shape == (1, width)
        assert encoded.truncated == [count > 46] and len(encoded.encodings[0].ids) == min(count + 2, MAXIMUM)
    assert PREPROCESSOR(["good"], pad_to=40).inputs["input_ids"].shape == (1, 40)
    for settings, buckets in (((160,), (32, 64, 96, 128, 160)), ((100,), (32, 64, 96, 100)), ((20,), (20,)),
                              ((64, (32,)), (32, 64))):  # fmt: skip
        assert TextSettings(*settings).buckets == buckets
    with pytest.raises(InputError, match="22 tokens.*pad_to.*20"):
        PREPROCESSOR(["good " * 20], pad_to=20)
    inner = PREPROCESSOR.encode(["[SEP] good [CLS] [PAD]"])[0].ids[1:-1]
    assert not set(SPECIAL.values()) & set(inner)
    assert tokens("[SEP]")[1:-1] == ["[UNK]", "s", "##e", "##p", "[UNK]"]
    nameless = TextPreprocessor(tiny_tokenizer_json().replace("[PAD]", "[NOP]"), SETTINGS)
    assert nameless.special_ids["pad"] == nameless.special_ids["cls"]
    assert tokens("xyz<br />film bad") == ["[CLS]", "x", "##y", "##z", "film", "bad", "[SEP]"]
    prediction = predict("xyz film bad", [1, 3, 5], [0, -2.0, 50.0, -1.0, 9.0, 4.0, *range(10)])
    assert [(span.text, span.score) for span in prediction.rationale] == [("xyz", -1.0), ("bad", 4.0)]
    pieces = [(piece.token, piece.position, piece.start, piece.end, piece.score) for piece in prediction.pieces]
    assert pieces == [("x", 1, 0, 1, -2.0), ("##z", 3, 2, 3, -1.0), ("bad", 5, 9, 12, 4.0)]
    encodings = SimpleNamespace(encode=lambda text: "alone", encode_batch=lambda texts: ["in a batch"] * len(texts))
    with monkeypatch.context() as patch:
        patch.setattr(PREPROCESSOR, "_tokenizer", encodings)
        for texts, way in ((["a" * 2000], "alone"), (["a" * 2001], "in a batch"), (["a", "b"], "in a batch")):
            assert PREPROCESSOR.encode(texts) == [way] * len(texts)
    with pytest.raises(FaultyItemsError) as raised:
        PREPROCESSOR(["good", "", "bad", "\u200b", 7, " "], first_index=10)
    assert str(raised.value) == (
        "text 12 is empty; text 14 holds no word that the tokenizer knows; text 15 is int; "
        "text 16 is only white space; fix: give at least one word, or give texts as str")
    assert list(raised.value.faults) == [11, 13, 14, 15]


def test_what_cannot_be_a_preprocessing_is_named_and_the_fingerprint_says_which_it_is(tmp_path):
    with pytest.raises(ConfigError, match=r"lengths \(1,\) must lie within 3..max_length \(9\)"):
        TextSettings(max_length=9, lengths=(1,))
    with pytest.raises(ConfigError, match="max_length is 2"):
        TextSettings(max_length=2, lengths=(1,))
    startless = json.dumps(json.loads(trained_tokenizer("byte-level BPE")) | {"post_processor": None})
    for tokenizer, problem in ((tiny_tokenizer_json()[:-100], "cannot be read"),
                               (startless, "puts no start token before a text.*fix: a tokenizer.json")):  # fmt: skip
        with pytest.raises(CheckpointError, match=problem):
            TextPreprocessor(tokenizer, SETTINGS)
    document = json.loads(tiny_tokenizer_json())
    hashed = [document, {"max_length": MAXIMUM, "lengths": [16, 32], "kind": "text"}]
    canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    assert PREPROCESSOR.fingerprint == hashlib.sha256(canonical.encode()).hexdigest(), "checkpoints hold it"
    (tmp_path / "tokenizer.json").write_text(json.dumps(document, indent=4), encoding="utf-8")
    assert TextPreprocessor.load(tmp_path, SETTINGS).fingerprint == PREPROCESSOR.fingerprint, "layout does not matter"
    others = [(tiny_tokenizer_json(), TextSettings(47, (16, 32))), (tiny_tokenizer_json(), TextSettings(48, (16,))),
              (tiny_tokenizer_json().replace('"boring"', '"borring"'), SETTINGS)]  # fmt: skip
    assert len({PREPROCESSOR.fingerprint, *(TextPreprocessor(*other).fingerprint for other in others)}) == 4


@pytest.mark.parametrize(("text", "kept", "shown"), [
    *(pytest.param(f"bad{tag}{tag}good", [2], ["good"], id=tag) for tag in ("<br />", "<br>", "<BR  />")),
    pytest.param("a 🎬 good", [2, 3], ["🎬 good"], id="emoji"),
    pytest.param("👨‍👩‍👧 good", [1], ["👨‍👩‍👧"], id="joined emoji"),
    pytest.param("東京 good", [1], ["東"], id="CJK characters are words"),
    pytest.param("東京 good", [2, 3], ["京 good"], id="CJK then a word"),
    pytest.param("Über good", [3], ["Über"], id="accent composed"),
    pytest.param("Cafe\u0301 good", [1], ["Cafe\u0301"], id="accent as a combining character, at the end"),
    pytest.param("e\u0301a good", [1], ["e\u0301a"], id="accent as a combining character, inside"),
    pytest.param("a\u00a0GOOD\u3000film", [2], ["GOOD"], id="wide spaces and capitals"),
    *(pytest.param("xyz good", [piece], ["xyz"], id=f"a word is whole by piece {piece}") for piece in (1, 2, 3)),
    pytest.param("the film was great , not bad", [1, 2, 4, 6, 7], ["the film", "great", "not bad"], id="merging"),
    pytest.param("good", [], [], id="nothing")])  # fmt: skip
def test_spans_are_whole_words_of_the_text_as_given(text, kept, shown):
    spans = predict(text, kept).rationale
    assert [span.text for span in spans] == shown == [text[span.start : span.end] for span in spans]


@pytest.mark.parametrize(("text", "kept", "rate", "truncated"), [
    ("xyz good", [2, 4], 2 / 4, False), ("good " * 100, [1, 2, 3], 3 / (MAXIMUM - 2), True), ("good", [], 0.0, False),
    ("good", [1, 9], 1.0, False),  # specials and padding do not count; a mask on padding is ignored
])  # fmt: skip
def test_rate_is_kept_pieces_of_real_pieces_and_probabilities_go_by_name(text, kept, rate, truncated):
    prediction = predict(text, kept)
    assert (prediction.rate, prediction.truncated) == (pytest.approx(rate), truncated)
    assert (prediction.label, prediction.probability) == ("yes", 0.75)
    assert prediction.probabilities == {"no": 0.25, "yes": 0.75}
    again = Prediction.from_dict(json.loads(json.dumps(prediction.to_dict())))
    assert again == prediction


ALPHABETS = ("abc déf Über naïve don't re-do Straße", "привет мир", "שלום עולם", "مرحبا بالعالم", "我喜欢这部电影。",
             "この映画は素晴らしい", "ภาพยนตร์เรื่องนี้ดี", "한국 영화는 좋다", "नमस्ते दुनिया", "👍🏽 👩‍👩‍👧 ❤️",
             "e\u0301a\u0308 o\u0302", "1,234.5 $ % -- ... !?", "<br />\t\n")  # fmt: skip
WORD = re.compile(r"(?<![\w'])[A-Za-zß-öø-ÿЀ-ӿ֐-׿\u0621-\u064a\uac00-\ud7a3]+(?!\w)")


def spans_of(preprocessor: TextPreprocessor, text: str, kept: list[int]) -> list[Span]:
    encoding = preprocessor.encode([text])[0]
    return merged_spans(text, encoding, np.array(kept, dtype=int), np.arange(len(encoding), dtype=float))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spans_are_whole_words_in_order_and_special_tokens_are_found(kind):
    preprocessor, generator, tokens = TextPreprocessor(trained_tokenizer(kind), TextSettings(256)), Random(kind), 0
    for _ in range(10_000 // len(TOKENIZERS) + 1):
        parts = [generator.choice(ALPHABETS) for _ in range(generator.randint(1, 4))]
        text = "".join(letter for part in parts for letter in part + generator.choice(["", " "])
                       if generator.random() < 0.9)  # fmt: skip
        length = len(preprocessor.encode([text])[0])
        kept = [position for position in range(1, length) if generator.random() < 0.3]
        spans, end = spans_of(preprocessor, text, kept), -1
        tokens += len(kept)
        for span in spans:
            assert span.text == text[span.start : span.end] and span.text == span.text.strip() != ""
            assert span.start > end, "spans overlap or touch"
            end = span.end
        edges = {edge for span in spans for edge in (span.start, span.end)}
        for word in WORD.finditer(text):
            assert not {*range(word.start() + 1, word.end())} & edges, f"{word.group()!r} is cut: {spans}"
    assert tokens > 5_000
    chinese, text = "我喜欢 这部电影", "so wonderfulness  ends"
    preprocessor = TextPreprocessor(trained_tokenizer(kind), TextSettings(64))
    ids, special = preprocessor.encode(["good film"])[0].ids, preprocessor.special_ids
    assert ids[0] == special["cls"] and preprocessor.pad([[5]], 3)["input_ids"][0, -1] == special["pad"]
    around = 1 if kind == "start token alone" else 2
    assert preprocessor.features == 64 - around and (ids[-1] == special.get("sep")) == (around == 2)
    words = preprocessor.encode([chinese])[0].word_ids
    (span,) = spans_of(preprocessor, chinese, [max(at for at, word in enumerate(words) if word is not None)])
    assert span.end == len(chinese) and span.start >= len(chinese) - 4, "not the whole sentence"
    offsets = preprocessor.encode([text])[0].offsets
    (span,) = spans_of(preprocessor, text, [p for p, (start, end) in enumerate(offsets) if start < 16 == end][-1:])
    assert span.text == "wonderfulness", "whole, without the space"


@pytest.mark.parametrize(("texts", "message"), [
    ([], "list of texts is empty"), ("good", "give a list of str"), (b"good", "texts is bytes"),
    (None, "texts is NoneType"), (["good", None], "text 2 is NoneType"), (["good", b"bad"], "text 2 is bytes"),
    (["good", ""], "text 2 is empty"), (["good", " \n\t\u00a0"], "text 2 is only white space"),
    (["a \ud800 b"], "unpaired surrogate at character 3"), (["good", "<br /><br />"], "text 2 holds no word"),
    (["\u200b"], "text 1 holds no word"), (["\x00\x01"], "text 1 holds no word"),
    *(([image], r"^text 1 is \w+, an image; fix: give this model texts \(str\)")
      for image in (Path("shoe.png"), np.zeros((4, 4, 3), np.uint8), Image.new("L", (4, 4)))),
    ([""] * 25, "text 20 is empty; and 5 more; fix: give at least one word$")])  # fmt: skip
def test_texts_that_cannot_be_used_are_named(texts, message):
    with pytest.raises(InputError, match=message):
        PREPROCESSOR(texts)
