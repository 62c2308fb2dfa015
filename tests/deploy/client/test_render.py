"""What people see of a prediction: every character of the text once, the rationale marked, nothing executed."""

from __future__ import annotations

import pytest
from rich.console import Console

from rekd_deploy.client.render import HIGHLIGHT, plain_text, segments, shows_colours, terminal_text
from rekd_train.inputs.prediction import Prediction, Span


def prediction(text, *spans, truncated=False):
    rationale = [Span(start, end, text[start:end], 1.0) for start, end in spans]
    return Prediction("positive", {"negative": 0.125, "positive": 0.875}, rationale, 0.1, truncated, text)


@pytest.mark.parametrize(
    ("text", "spans", "expected"),
    [
        ("a good film", [(2, 6)], [("a ", False), ("good", True), (" film", False)]),
        ("good film", [(0, 4), (5, 9)], [("good", True), (" ", False), ("film", True)]),
        ("no words kept", [], [("no words kept", False)]),
        ("東京 🎬", [(3, 4)], [("東京 ", False), ("🎬", True)]),
    ],
)
def test_segments(text, spans, expected):
    assert list(segments(prediction(text, *spans))) == expected


def test_text_below_its_summary():
    found = prediction("a good [film] :smile:", (2, 6))
    shown = terminal_text(found)
    assert shown.plain == "positive  87.5%  from 10.0% of its tokens\na good [film] :smile:"
    assert [shown.plain[span.start : span.end] for span in shown.spans if span.style == HIGHLIGHT] == ["good"]
    assert plain_text(found) == "positive  87.5%  from 10.0% of its tokens\na [[good]] [film] :smile:"
    assert plain_text(prediction("x", truncated=True)).endswith("its end was cut)\nx")


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [(True, {"TERM": "xterm-256color"}, True), (False, {"TERM": "xterm-256color"}, False),
     (True, {"TERM": "xterm-256color", "NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False)],
)  # fmt: skip
def test_a_highlight_needs_a_terminal_that_shows_it(terminal, environment, expected):
    assert shows_colours(Console(force_terminal=terminal, _environ=environment)) is expected


def test_a_review_cannot_steer_the_terminal():
    text = "good\x1b[2J\x07 \x9b31m film\tx\ny\u202e"
    for shown in (terminal_text(prediction(text, (0, 4))).plain, plain_text(prediction(text, (0, 4)))):
        assert not set("\x1b\x07\x9b\u202e") & set(shown) and "film\tx\ny" in shown
