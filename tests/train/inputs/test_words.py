"""Tokenizers of every kind: special tokens are found, and a rationale is made of whole words in any script."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from conftest import TOKENIZERS, trained_tokenizer

from rekd_train.errors import CheckpointError
from rekd_train.inputs.prediction import merged_spans
from rekd_train.inputs.text import TextPreprocessor, TextSettings

ALPHABETS = (
    "abc déf Über naïve don't re-do Straße", "привет мир", "שלום עולם", "مرحبا بالعالم", "我喜欢这部电影。",
    "この映画は素晴らしい", "ภาพยนตร์เรื่องนี้ดี", "한국 영화는 좋다", "नमस्ते दुनिया", "👍🏽 👩‍👩‍👧 ❤️",
    "e\u0301a\u0308 o\u0302", "1,234.5 $ % -- ... !?", "<br />\t\n",
)  # fmt: skip


def preprocessor_of(kind: str, length: int = 64) -> TextPreprocessor:
    return TextPreprocessor(trained_tokenizer(kind), TextSettings(length))


def spans_of(preprocessor: TextPreprocessor, text: str, kept: list[int]):
    encoding = preprocessor.encode([text])[0]
    return encoding, merged_spans(text, encoding, np.array(kept, dtype=int), np.arange(len(encoding), dtype=float))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_are_found_by_what_is_put_around_a_text(kind):
    preprocessor = preprocessor_of(kind)
    ids = preprocessor.encode(["good film"])[0].ids
    assert ids[0] == preprocessor.special_ids["cls"]
    around = 1 if kind == "start token alone" else 2
    assert preprocessor.features == 64 - around
    assert (ids[-1] == preprocessor.special_ids.get("sep")) == (around == 2)
    assert preprocessor.pad([[5]], 3)["input_ids"][0, -1] == preprocessor.special_ids["pad"]


def test_a_tokenizer_without_a_start_token_is_refused():
    document = json.loads(trained_tokenizer("byte-level BPE"))
    document["post_processor"] = None
    with pytest.raises(CheckpointError, match="puts no start token before a text.*fix: a tokenizer.json"):
        TextPreprocessor(json.dumps(document), TextSettings(64))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spans_are_whole_words_in_order(kind):
    preprocessor, generator = preprocessor_of(kind, 256), random.Random(kind)
    tokens = 0
    for _ in range(10_000 // len(TOKENIZERS) + 1):
        parts = [generator.choice(ALPHABETS) for _ in range(generator.randint(1, 4))]
        text = "".join(letter for part in parts for letter in part + generator.choice(["", " "])
                       if generator.random() < 0.9)  # fmt: skip
        encoding = preprocessor.encode([text])[0]
        kept = [position for position in range(1, len(encoding)) if generator.random() < 0.3]
        _, spans = spans_of(preprocessor, text, kept)
        tokens += len(kept)
        end = -1
        for span in spans:
            assert span.text == text[span.start : span.end] and span.text == span.text.strip() != ""
            assert span.start > end, "spans overlap or touch"
            end = span.end
        edges = {edge for span in spans for edge in (span.start, span.end)}
        for word in re.finditer(r"(?<![\w'])[A-Za-zß-öø-ÿЀ-ӿ֐-׿\u0621-\u064a\uac00-\ud7a3]+(?!\w)", text):
            inside = set(range(word.start() + 1, word.end()))
            assert not inside & edges, f"{word.group()!r} is cut: {spans}"
    assert tokens > 5_000


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_in_scripts_without_spaces_each_token_is_a_word_and_others_are_shown_whole(kind):
    chinese, text = "我喜欢 这部电影", "so wonderfulness  ends"
    preprocessor = preprocessor_of(kind)
    words = preprocessor.encode([chinese])[0].word_ids
    _, (span,) = spans_of(preprocessor, chinese, [max(at for at, word in enumerate(words) if word is not None)])
    assert span.end == len(chinese) and span.start >= len(chinese) - 4, "not the whole sentence"
    offsets = preprocessor.encode([text])[0].offsets
    _, (span,) = spans_of(preprocessor, text, [p for p, (start, end) in enumerate(offsets) if start < 16 == end][-1:])
    assert span.text == "wonderfulness", "whole, without the space"
