"""Texts to tensors and masks back to spans."""

import hashlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_tokenizer_json
from PIL import Image

from rekd_train.errors import CheckpointError, ConfigError, FaultyItemsError, InputError
from rekd_train.inputs.prediction import Prediction
from rekd_train.inputs.text import TextPreprocessor, TextSettings, clean_text

MAXIMUM = 48


@pytest.fixture(scope="module")
def preprocessor() -> TextPreprocessor:
    return TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=MAXIMUM, lengths=(16, 32)))


def tokens(preprocessor: TextPreprocessor, text: str) -> list[str]:
    return preprocessor.encode([text])[0].tokens


def predict(
    preprocessor: TextPreprocessor, text: str, kept: list[int], scores: dict[int, float] | None = None
) -> Prediction:
    """The prediction when ``kept`` positions are the rationale; position i scores i unless told."""
    encoded = preprocessor([text])
    width = encoded.inputs["input_ids"].shape[1]
    mask = np.zeros((1, width), dtype=bool)
    mask[0, kept] = True
    values = np.arange(width, dtype=np.float32)[None].copy()
    for position, score in (scores or {}).items():
        values[0, position] = score
    return encoded.predictions(["no", "yes"], np.array([[0.25, 0.75]]), mask, values)[0]


# texts to tensors


def test_tensors_are_padded_int64_with_a_mask(preprocessor):
    encoded = preprocessor(["the film was great", "bad"])
    ids, mask = encoded.inputs["input_ids"], encoded.inputs["attention_mask"]
    assert list(encoded.inputs) == ["input_ids", "attention_mask"]
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (2, 16)
    assert mask.sum(axis=1).tolist() == [6, 3]
    special = preprocessor.special_ids
    assert ids[1, 0] == special["cls"] and ids[1, 2] == special["sep"] and (ids[1, 3:] == special["pad"]).all()


def test_the_files_own_truncation_and_padding_are_off(preprocessor):
    document = json.loads(tiny_tokenizer_json())
    assert document["truncation"]["max_length"] == 8 and document["padding"], "the file has both, as the real one"
    assert len(tokens(preprocessor, "good " * 20)) == 22
    assert len(tokens(preprocessor, "good")) == 3


def test_the_smallest_bucket_that_fits_is_used(preprocessor):
    widths = [preprocessor(["good " * n]).inputs["input_ids"].shape[1] for n in (1, 14, 15, 30, 31, 46, 60)]
    assert widths == [16, 16, 32, 32, 48, 48, 48]
    assert preprocessor(["good"], pad_to=40).inputs["input_ids"].shape == (1, 40)
    with pytest.raises(InputError, match="22 tokens.*pad_to.*20"):
        preprocessor(["good " * 20], pad_to=20)


@pytest.mark.parametrize(
    ("most", "lengths", "buckets"), [(160, (), (32, 64, 96, 128, 160)), (100, (), (32, 64, 96, 100)), (20, (), (20,)),
                                     (64, (32,), (32, 64))],
)  # fmt: skip
def test_buckets_default_to_multiples_of_32(most, lengths, buckets):
    assert TextSettings(most, lengths).buckets == buckets


def test_impossible_lengths_are_named():
    with pytest.raises(ConfigError, match=r"lengths \(1,\) must lie within 3..max_length \(9\)"):
        TextSettings(max_length=9, lengths=(1,))
    with pytest.raises(ConfigError, match="max_length is 2"):
        TextSettings(max_length=2, lengths=(1,))


def test_special_token_names_in_a_text_are_text(preprocessor):
    encoded = preprocessor(["[SEP] good [CLS] [PAD]"])
    specials = set(preprocessor.special_ids.values())
    inner = encoded.inputs["input_ids"][0, 1 : len(encoded.encodings[0].ids) - 1]
    assert not specials & set(inner.tolist())
    assert tokens(preprocessor, "[SEP]")[1:-1] == ["[UNK]", "s", "##e", "##p", "[UNK]"]


def test_truncation_is_reported(preprocessor):
    encoded = preprocessor(["good " * 46, "good " * 47])
    assert encoded.truncated == [False, True]
    assert [len(encoding.ids) for encoding in encoded.encodings] == [MAXIMUM, MAXIMUM]


def test_other_threads_go_on_while_a_long_text_is_tokenised(preprocessor):
    text, moments, done = "good film " * 300_000, [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            moments.append(time.perf_counter())
            time.sleep(0.001)

    ticking = threading.Thread(target=tick)
    ticking.start()
    begun = time.perf_counter()
    preprocessor.encode([text])
    took = time.perf_counter() - begun
    done.set()
    ticking.join()
    assert max(np.diff([begun, *moments])) < took / 2, "the interpreter's lock is let go"


# line-break tags and characters beyond ASCII


@pytest.mark.parametrize("tag", ["<br />", "<br>", "<BR  />"])
def test_line_break_tags_become_spaces_of_the_same_length(preprocessor, tag):
    text = f"bad{tag}{tag}good"
    assert clean_text(text) == "bad" + " " * (2 * len(tag)) + "good"
    assert tokens(preprocessor, text) == ["[CLS]", "bad", "good", "[SEP]"]
    span = predict(preprocessor, text, [2]).rationale[0]
    assert (span.text, span.start) == ("good", text.index("good"))


@pytest.mark.parametrize(
    ("text", "kept", "shown"),
    [
        pytest.param("a 🎬 good", [2, 3], "🎬 good", id="emoji"),
        pytest.param("👨‍👩‍👧 good", [1], "👨‍👩‍👧", id="joined emoji"),
        pytest.param("東京 good", [1], "東", id="CJK characters are words"),
        pytest.param("東京 good", [2, 3], "京 good", id="CJK then a word"),
        pytest.param("Über good", [3], "Über", id="accent composed"),
        pytest.param("Cafe\u0301 good", [1], "Cafe\u0301", id="accent as a combining character, at the end"),
        pytest.param("e\u0301a good", [1], "e\u0301a", id="accent as a combining character, inside"),
        pytest.param("a\u00a0GOOD\u3000film", [2], "GOOD", id="wide spaces and capitals"),
    ],
)
def test_offsets_count_characters_of_the_text_as_given(preprocessor, text, kept, shown):
    (span,) = predict(preprocessor, text, kept).rationale
    assert span.text == shown == text[span.start : span.end]


# masks back to spans


def test_a_word_is_whole_when_any_piece_is_kept(preprocessor):
    text = "xyz good"
    assert tokens(preprocessor, text) == ["[CLS]", "x", "##y", "##z", "good", "[SEP]"]
    for piece in (1, 2, 3):
        prediction = predict(preprocessor, text, [piece])
        assert [span.text for span in prediction.rationale] == ["xyz"]
        assert [(p.token, p.position, p.start, p.end) for p in prediction.pieces] == [
            (tokens(preprocessor, text)[piece], piece, piece - 1, piece)
        ]


def test_neighbouring_words_merge_and_others_do_not(preprocessor):
    text = "the film was great , not bad"
    prediction = predict(preprocessor, text, [1, 2, 4, 6, 7])
    assert [span.text for span in prediction.rationale] == ["the film", "great", "not bad"]
    assert [text[span.start : span.end] for span in prediction.rationale] == ["the film", "great", "not bad"]


def test_a_span_scores_as_its_best_kept_piece(preprocessor):
    prediction = predict(preprocessor, "xyz film bad", [1, 3, 5], {1: -2.0, 2: 50.0, 3: -1.0, 4: 9.0, 5: 4.0})
    assert [(span.text, span.score) for span in prediction.rationale] == [("xyz", -1.0), ("bad", 4.0)]
    assert [piece.score for piece in prediction.pieces] == [-2.0, -1.0, 4.0]


def test_rate_is_kept_pieces_of_real_pieces(preprocessor):
    assert predict(preprocessor, "xyz good", [2, 4]).rate == pytest.approx(2 / 4), "specials and padding do not count"
    cut = predict(preprocessor, "good " * 100, [1, 2, 3])
    assert cut.rate == pytest.approx(3 / (MAXIMUM - 2)), "after truncation"
    assert cut.truncated
    empty = predict(preprocessor, "good", [])
    assert (empty.rationale, empty.pieces, empty.rate) == ([], [], 0.0)
    assert predict(preprocessor, "good", [1, 9]).rate == 1.0, "a mask on padding is ignored"


def test_label_and_probabilities_go_by_name(preprocessor):
    prediction = predict(preprocessor, "good", [1])
    assert (prediction.label, prediction.probability) == ("yes", 0.75)
    assert prediction.probabilities == {"no": 0.25, "yes": 0.75}
    document = json.loads(json.dumps(prediction.to_dict()))
    assert document["rationale"] == [{"start": 0, "end": 4, "text": "good", "score": 1.0}]


# what cannot be used


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "list of texts is empty"),
        ("good", "give a list of str"),
        (b"good", "texts is bytes"),
        (None, "texts is NoneType"),
        (["good", ""], "text 2 is empty"),
        (["good", " \n\t\u00a0"], "text 2 is only white space"),
        (["good", None], "text 2 is NoneType"),
        (["good", b"bad"], "text 2 is bytes"),
        (["a \ud800 b"], "unpaired surrogate at character 3"),
        (["good", "<br /><br />"], "text 2 holds no word"),
        (["\u200b"], "text 1 holds no word"),
        (["\x00\x01"], "text 1 holds no word"),
    ],
)
def test_texts_that_cannot_be_used_are_named(preprocessor, texts, message):
    with pytest.raises(InputError, match=message):
        preprocessor(texts)


def test_every_text_that_cannot_be_used_is_named_at_once(preprocessor):
    with pytest.raises(FaultyItemsError) as raised:
        preprocessor(["good", "", "bad", "\u200b", 7, " "], first_index=10)
    assert str(raised.value) == (
        "text 12 is empty; text 14 holds no word that the tokenizer knows; text 15 is int; "
        "text 16 is only white space; fix: give at least one word, or give texts as str"
    )
    assert list(raised.value.faults) == [11, 13, 14, 15]
    with pytest.raises(FaultyItemsError, match="text 20 is empty; and 5 more; fix: give at least one word$"):
        preprocessor([""] * 25)


@pytest.mark.parametrize("image", [Path("shoe.png"), np.zeros((4, 4, 3), np.uint8), Image.new("L", (4, 4))])
def test_a_text_model_given_an_image_says_what_it_reads(preprocessor, image):
    with pytest.raises(InputError, match=r"^text 1 is \w+, an image; fix: give this model texts \(str\)"):
        preprocessor([image])


def test_a_tokenizer_that_cannot_be_used_is_refused():
    settings = TextSettings(max_length=MAXIMUM)
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextPreprocessor(tiny_tokenizer_json()[:-100], settings)


def test_without_a_token_for_padding_the_start_token_pads():
    nameless = TextPreprocessor(tiny_tokenizer_json().replace("[PAD]", "[NOP]"), TextSettings(max_length=MAXIMUM))
    assert nameless.special_ids["pad"] == nameless.special_ids["cls"]


# identity


def test_the_fingerprint_says_which_preprocessing_it_is(preprocessor, tmp_path):
    settings = preprocessor.settings
    (tmp_path / "tokenizer.json").write_text(preprocessor.tokenizer_json, encoding="utf-8")
    assert TextPreprocessor.load(tmp_path, settings).fingerprint == preprocessor.fingerprint
    hashed = [json.loads(tiny_tokenizer_json()), {"max_length": MAXIMUM, "lengths": [16, 32], "kind": "text"}]
    canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    assert preprocessor.fingerprint == hashlib.sha256(canonical.encode()).hexdigest(), "checkpoints hold it"
    indented = json.dumps(json.loads(tiny_tokenizer_json()), indent=4)
    assert TextPreprocessor(indented, settings).fingerprint == preprocessor.fingerprint, "layout does not matter"
    others = [
        TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=47, lengths=(16, 32))),
        TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=48, lengths=(16,))),
        TextPreprocessor(tiny_tokenizer_json().replace('"boring"', '"borring"'), settings),
    ]
    assert len({preprocessor.fingerprint, *(other.fingerprint for other in others)}) == 4
