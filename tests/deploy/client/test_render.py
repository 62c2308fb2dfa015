"""What people see of a prediction: every character of the text once, the rationale marked, nothing executed."""

from __future__ import annotations

import pytest
from rich.console import Console

from rekd_deploy.client.render import HIGHLIGHT, plain_text, segments, shows_colours, summary, terminal_text
from rekd_train.inputs.prediction import Prediction, Span


def prediction(text, *spans, truncated=False):
    rationale = [Span(start, end, text[start:end], 1.0) for start, end in spans]
    return Prediction("positive", {"negative": 0.125, "positive": 0.875}, rationale, 0.1, truncated, text)


@pytest.mark.parametrize(
    ("text", "spans", "expected"),
    [
        ("a good film", [(2, 6)], [("a ", False), ("good", True), (" film", False)]),
        ("good", [(0, 4)], [("good", True)]),
        ("good film", [(0, 4), (5, 9)], [("good", True), (" ", False), ("film", True)]),
        ("no words kept", [], [("no words kept", False)]),
        ("東京 🎬", [(3, 4)], [("東京 ", False), ("🎬", True)]),
    ],
)
def test_segments(text, spans, expected):
    assert list(segments(prediction(text, *spans))) == expected


def test_summary():
    assert summary(prediction("x")) == "positive  87.5%  from 10.0% of its tokens"
    assert "cut" in summary(prediction("x", truncated=True)) and "cut" not in summary(prediction("x"))


def test_terminal_highlights_exactly_the_rationale():
    text = terminal_text(prediction("a good [film] :smile:", (2, 6)))
    assert text.plain == "positive  87.5%  from 10.0% of its tokens\na good [film] :smile:"
    marked = [text.plain[span.start : span.end] for span in text.spans if span.style == HIGHLIGHT]
    assert marked == ["good"]


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [(True, {"TERM": "xterm-256color"}, True), (False, {"TERM": "xterm-256color"}, False),
     (True, {"TERM": "xterm-256color", "NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)  # fmt: skip
def test_a_highlight_needs_a_terminal_that_shows_it(terminal, environment, expected):
    console = Console(force_terminal=terminal, _environ=environment)
    assert shows_colours(console) is expected


def test_plain_text_marks_with_brackets():
    assert plain_text(prediction("a good film", (2, 6))).endswith("\na [[good]] film")


def test_a_review_cannot_steer_the_terminal():
    text = "good\x1b[2J\x07 \x9b31m film\tx\ny\u202e"
    for shown in (terminal_text(prediction(text, (0, 4))).plain, plain_text(prediction(text, (0, 4)))):
        assert not set("\x1b\x07\x9b\u202e") & set(shown) and "film\tx\ny" in shown
