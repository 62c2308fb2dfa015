"""Long texts window by window: nothing is lost or counted twice, and the combination follows its rules."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import WORDS

from rekd_deploy.client.batching import Batches, WindowedText, _Whole
from rekd_deploy.client.pipeline import Pipeline
from rekd_train.errors import InputError
from rekd_train.inputs.prediction import Piece, Prediction
from rekd_train.inputs.text import TextPreprocessor, TextSettings

LONG = "Wonderfully dull: " + ", ".join(f"{a} {b}ish" for a in WORDS for b in WORDS[:4]) + " — the café 東京 end!"


@pytest.fixture(scope="module")
def preprocessor(rationalizer):
    return rationalizer.preprocessor  # 48 tokens, so 46 of a text's own


def windowed(preprocessor, text):
    return WindowedText.of(text, preprocessor.encode_checked([text])[0], preprocessor.window_overlap)


def test_the_whole_is_what_a_model_of_any_length_would_read(preprocessor):
    endless = TextPreprocessor(preprocessor.tokenizer_json, TextSettings(max_length=100_000))
    for text in (LONG, LONG[:300], "film " * 47, "film " * 81):
        expected = endless.encode([text])[0]
        windows = windowed(preprocessor, text)
        whole = _Whole(windows.windows, windows.overlap)
        assert len(windows.windows) > 1
        assert whole.tokens == expected.tokens
        assert whole.offsets == expected.offsets
        assert whole.word_ids == expected.word_ids
        assert whole.special_tokens_mask == expected.special_tokens_mask
        for start, window in zip(whole.starts, windows.windows, strict=True):
            own = slice(1, len(window.ids) - 1)
            assert window.tokens[own] == expected.tokens[start + 1 : start + len(window.ids) - 1]


def test_windows_overlap_by_a_quarter(preprocessor):
    windows = windowed(preprocessor, LONG).windows
    assert preprocessor.window_overlap == 11
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.offsets[-1 - 11 : -1] == after.offsets[1 : 1 + 11]


def test_every_token_has_one_vote(preprocessor):
    windows = windowed(preprocessor, LONG)
    whole = _Whole(windows.windows, windows.overlap)
    votes = whole.votes()
    assert votes.sum() == pytest.approx(whole.length - 2)
    assert votes[0] == 46 - 11 / 2 and votes[1] == 46 - 11


def made_up(probability, *pieces):
    return Prediction(
        "x", {"negative": 1 - probability, "positive": probability}, [], 0.0, False,
        pieces=[Piece(0, 0, "", position, score) for position, score in pieces],
    )


def test_how_answers_are_combined(preprocessor):
    words = ["film"] * 70
    words[40] = "wonderfully"  # of several pieces, in both windows
    text = " ".join(words)
    windows = windowed(preprocessor, text)
    whole = _Whole(windows.windows, windows.overlap)
    piece = next(n for n, word in enumerate(whole.word_ids) if word == 40)
    again = piece + 1 - whole.starts[1]
    answer = windows.combined(
        [made_up(0.9, (1, 0.5), (piece, 1.5)), made_up(0.2, (again, 4.0), (20, -0.25), (21, 0.75))]
    )
    real = whole.length - 2
    votes = np.array([46 - 11 / 2, real - 46 + 11 / 2])
    assert answer.probabilities["positive"] == pytest.approx(float(votes @ [0.9, 0.2] / votes.sum()))
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert answer.label == ("positive" if answer.probabilities["positive"] > 0.5 else "negative")
    assert answer.rate == 5 / real and answer.truncated is False and answer.text == text
    assert [text[span.start : span.end] for span in answer.rationale] == [span.text for span in answer.rationale]
    word = text.index("wonderfully")
    assert (word, word + 11) in [(span.start, span.end) for span in answer.rationale]
    assert [piece.position for piece in answer.pieces] == sorted(piece.position for piece in answer.pieces)
    best = next(span for span in answer.rationale if span.start == word)
    assert best.score == 4.0, "the highest of either window"


def test_a_token_kept_twice_counts_once(preprocessor):
    windows = windowed(preprocessor, "film " * 70)
    start = _Whole(windows.windows, windows.overlap).starts[1]
    answer = windows.combined([made_up(0.5, (start + 3, 1.0)), made_up(0.5, (3, 2.0))])
    assert len(answer.pieces) == len(answer.rationale) == 1
    assert (answer.pieces[0].position, answer.pieces[0].score, answer.rate) == (start + 3, 2.0, 1 / 70)


def test_neighbours_kept_by_two_windows_are_one_span(preprocessor):
    windows = windowed(preprocessor, "film " * 70)
    start = _Whole(windows.windows, windows.overlap).starts[1]
    answer = windows.combined([made_up(0.5, (start + 3, 1.0)), made_up(0.5, (4, 2.0))])
    assert [span.text for span in answer.rationale] == ["film film"]


def test_short_texts_are_answered_as_without_windows(repository, texts):
    short = [text for text in texts if len(text) < 100]
    with Pipeline(repository) as pipeline:
        assert pipeline.predict(short, windows=True) == pipeline.predict(short)


def test_long_texts_are_read_to_their_end(repository, texts):
    many = ["good", LONG, *texts, "the good film " * 400]
    with Pipeline(repository, batch_size=7) as pipeline:
        answers = pipeline.predict(many, windows=True)
        cut = pipeline.predict(many)
    assert [answer.text for answer in answers] == many
    assert not any(answer.truncated for answer in answers) and cut[1].truncated
    for answer in answers:
        assert all(answer.text[span.start : span.end] == span.text for span in answer.rationale)
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert len({piece.position for piece in answer.pieces}) == len(answer.pieces)
    assert answers[-1].rationale[-1].end > 0.9 * len(many[-1])


def test_everything_kept_decided_and_nothing_else(repository, preprocessor):
    """The combined rationale holds just what the windows' answers were made from."""
    with Pipeline(repository) as pipeline:
        batches = Batches(preprocessor, [LONG], 64, windows=True)
        kept = set()
        for _, encoded in batches:
            for each in pipeline._predicted(encoded, 0):
                kept |= {(piece.start, piece.end) for piece in each.pieces}
        answer = pipeline.predict([LONG], windows=True)[0]
    assert {(piece.start, piece.end) for piece in answer.pieces} == kept


def test_images_have_no_windows(image_rationalizer):
    batches = Batches(image_rationalizer.preprocessor, [np.zeros((16, 12), np.uint8)], 4, windows=True)
    with pytest.raises(InputError, match="this model reads images; fix: leave windows out"):
        list(batches)
