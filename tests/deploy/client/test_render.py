"""What people see of a prediction: every character of the text once, the rationale marked, nothing executed."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from rekd_deploy.client import render
from rekd_deploy.client.render import HIGHLIGHT, captioned, highlighted, plain_text, terminal_text
from rekd_train.inputs.prediction import Patch, Prediction, Span


def prediction(text, *spans, truncated=False):
    rationale = [Span(start, end, text[start:end], 1.0) for start, end in spans]
    return Prediction("positive", {"negative": 0.125, "positive": 0.875}, rationale, 0.1, truncated, text)


def test_every_character_once_the_rationale_marked_and_the_terminal_is_not_steered():
    texts = {"a good film": ((2, 6),), "good film": ((0, 4), (5, 9)), "no words kept": (), "東京 🎬": ((3, 4),)}
    shown = [plain_text(prediction(text, *spans)).partition("\n")[2] for text, spans in texts.items()]
    assert shown == ["a [[good]] film", "[[good]] [[film]]", "no words kept", "東京 [[🎬]]"]
    found = prediction("a good [film] :smile:", (2, 6))
    shown = terminal_text(found)
    assert shown.plain == "positive  87.5%  from 10.0% of its tokens\na good [film] :smile:"
    assert [shown.plain[span.start : span.end] for span in shown.spans if span.style == HIGHLIGHT] == ["good"]
    assert plain_text(found) == "positive  87.5%  from 10.0% of its tokens\na [[good]] [film] :smile:"
    assert plain_text(prediction("x", truncated=True)).endswith("its end was cut)\nx")
    for doubt, shown in ((None, False), (0.99, False), (0.999, True)):
        assert ("doubtful: unlike" in plain_text(replace(prediction("x"), doubt=doubt))) is shown
    for terminal, variables in ((True, {}), (False, {}), (True, {"NO_COLOR": "1"}), (True, {"TERM": "dumb"})):
        console = Console(force_terminal=terminal, _environ={"TERM": "xterm-256color", **variables})
        assert render.shows_colours(console) is (terminal and not variables)
    text = "good\x1b[2J\x07 \x9b31m film\tx\ny\u202e"
    for shown in (terminal_text(prediction(text, (0, 4))).plain, plain_text(prediction(text, (0, 4)))):
        assert not set("\x1b\x07\x9b\u202e") & set(shown) and "film\tx\ny" in shown


GREY = np.full((16, 12), 200, np.uint8)


def bag(*patches, label="bag"):
    """A prediction with patches of 4 x 4 pixels: row, column, score."""
    kept = [Patch(r, c, (c * 4, r * 4, c * 4 + 4, r * 4 + 4), score) for r, c, score in patches]
    return Prediction(label, {label: 0.75}, kept, len(kept) / 12, False)


def test_stronger_patches_are_brighter_and_the_rest_is_dimmed():
    patches = [(0, 0, 3.0), (1, 1, -1.0), (2, 2, 1.0)]
    shown = np.asarray(highlighted(GREY, bag(*patches)))
    assert shown.shape == (16 * 20, 12 * 20, 3) and tuple(shown[6 * 20, 10 * 20]) == (50, 50, 50)
    assert [int(shown[(r * 4 + 2) * 20, (c * 4 + 2) * 20, 0]) for r, c, _ in patches] == [200, 120, 160]
    assert [int(shown[r * 80, c * 80, 0]) for r, c, _ in patches] == [255, 153, 204], "the frames"
    assert tuple(shown[0, 0]) == tuple(shown[79, 79]) == (255, 213, 0)
    assert plain_text(bag(*patches)) == (
        "bag  75.0%  from 25.0% of its patches\nrow 1 column 1 (+3.00), row 3 column 3 (+1.00), row 2 column 2 (-1.00)"
    )
    assert np.asarray(highlighted(GREY, bag((1, 2, 0.5))))[6 * 20, 10 * 20, 0] == 200, "a lone patch"


@pytest.mark.parametrize("label", ["bag", "long label " * 20])
def test_label_and_probability_stand_above_the_picture(label):
    below = np.asarray(highlighted(GREY, bag()))
    picture = np.asarray(captioned(GREY, bag(label=label)))
    caption = picture[: -len(below)]
    assert picture.shape[1] == 320 and (picture[-len(below) :, 40:280] == below).all()
    assert (caption > 200).any() and not caption[:, :8].any() and not caption[:, -8:].any(), "within its margins"
    assert (caption != np.asarray(captioned(GREY, bag(label="coat")))[: -len(below)]).any()
