"""Long texts window by window: nothing is lost or counted twice, and the combination follows its rules."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import WORDS

from rekd_deploy.client.batching import Batches, WindowedText
from rekd_deploy.client.pipeline import Pipeline
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Piece, Prediction
from rekd_train.inputs.text import TextPreprocessor, TextSettings

LONG = "Wonderfully dull: " + ", ".join(f"{a} {b}ish" for a in WORDS for b in WORDS[:4]) + " — the café 東京 end!"


@pytest.fixture(scope="module")
def preprocessor(rationalizer):
    return rationalizer.preprocessor  # 48 tokens, so 46 of a text's own


@pytest.fixture
def windowed(preprocessor):
    """A function: text -> its windows."""
    return lambda text: WindowedText(text, preprocessor.encode_checked([text])[0], preprocessor.window_overlap)


@pytest.mark.parametrize("text", [LONG, LONG[:300], "film " * 47, "film " * 81])
def test_the_whole_is_what_a_model_of_any_length_would_read(preprocessor, windowed, text):
    endless = TextPreprocessor(preprocessor.tokenizer_json, TextSettings(max_length=100_000))
    expected = endless.encode([text])[0]
    windows = windowed(text)
    whole = windows.whole()
    assert len(windows.windows) > 1 and windows.real == len(expected) - 2
    for name in ("tokens", "offsets", "word_ids"):
        assert getattr(whole, name) == getattr(expected, name)
    for start, window in zip(windows.starts, windows.windows, strict=True):
        assert window.tokens[1:-1] == expected.tokens[start + 1 : start + len(window) - 1]
    for before, after in zip(windows.windows, windows.windows[1:], strict=False):
        assert before.offsets[-1 - 11 : -1] == after.offsets[1 : 1 + 11], "they share a quarter"


def made_up(probability, *pieces):
    return Prediction(
        "x", {"negative": 1 - probability, "positive": probability}, [], 0.0, False,
        pieces=[Piece(0, 0, "", position, score) for position, score in pieces],
    )


def test_how_predictions_are_combined(windowed):
    words = ["film"] * 70
    words[40] = "wonderfully"  # of several pieces, in both windows
    text = " ".join(words)
    windows = windowed(text)
    piece = windows.whole().word_ids.index(40)
    again = piece + 1 - windows.starts[1]
    first, second = made_up(0.9, (1, 0.5), (piece, 1.5)), made_up(0.2, (again, 4.0), (20, -0.25), (21, 0.75))
    found = windows.combined([first, second])
    votes = windows.votes()
    assert list(votes) == [46 - 11 / 2, windows.real - 46 + 11 / 2], "every token has one"
    assert list(windowed(LONG).votes()[:2]) == [46 - 11 / 2, 46 - 11]
    assert found.probabilities["positive"] == pytest.approx(float(votes @ [0.9, 0.2] / votes.sum()))
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.label == ("positive" if found.probabilities["positive"] > 0.5 else "negative")
    assert found.rate == 5 / windows.real and found.truncated is False and found.text == text
    assert [text[span.start : span.end] for span in found.rationale] == [span.text for span in found.rationale]
    assert [piece.position for piece in found.pieces] == sorted(piece.position for piece in found.pieces)
    best = next(span for span in found.rationale if span.text == "wonderfully")
    assert best.score == 4.0, "the highest of either window"


@pytest.mark.parametrize(("second", "words", "pieces"), [(3, "film", 1), (4, "film film", 2)])
def test_what_two_windows_kept_counts_once_and_neighbours_are_one_span(windowed, second, words, pieces):
    windows = windowed("film " * 70)
    start = windows.starts[1]
    found = windows.combined([made_up(0.5, (start + 3, 1.0)), made_up(0.5, (second, 2.0))])
    assert [span.text for span in found.rationale] == [words] and len(found.pieces) == pieces
    assert (found.pieces[-1].position, found.pieces[-1].score, found.rate) == (start + second, 2.0, pieces / 70)


def test_long_texts_are_read_to_their_end_and_short_ones_as_without_windows(repository, texts, preprocessor):
    many = ["good", LONG, *texts, "the good film " * 400]
    with Pipeline(repository, batch_size=7) as pipeline:
        found, cut = pipeline.predict(many, windows=True), pipeline.predict(many)
        kept = set()
        for _, encoded in Batches(preprocessor, [LONG], 64, windows=True):
            for each in pipeline._predicted(encoded, 0):
                kept |= {(piece.start, piece.end) for piece in each.pieces}
    assert [prediction.text for prediction in found] == many
    assert not any(prediction.truncated for prediction in found) and cut[1].truncated
    for prediction, without in zip(found, cut, strict=True):
        assert without.truncated or prediction.label == without.label and prediction.pieces == without.pieces
        assert all(prediction.text[span.start : span.end] == span.text for span in prediction.rationale)
        assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert len({piece.position for piece in prediction.pieces}) == len(prediction.pieces)
    assert found[-1].rationale[-1].end > 0.9 * len(many[-1])
    assert {(piece.start, piece.end) for piece in found[1].pieces} == kept, "all that decided, and nothing else"


def test_images_have_no_windows(image_rationalizer):
    batches = Batches(image_rationalizer.preprocessor, [np.zeros((16, 12), np.uint8)], 4, windows=True)
    with pytest.raises(InputError, match="this model reads images; fix: leave windows out"):
        list(batches)
