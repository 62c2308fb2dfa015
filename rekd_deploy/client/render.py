"""A prediction for people: the review with its rationale highlighted, in a terminal or in HTML. torch-free."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rekd_train.inputs.prediction import Prediction

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

HIGHLIGHT = "bold black on yellow"
_CUT = "(the text is longer than the model reads; its end was cut)"


def segments(prediction: Prediction) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it is part of the rationale."""
    end = 0
    for span in prediction.rationale:
        if span.start > end:
            yield prediction.text[end : span.start], False
        yield prediction.text[span.start : span.end], True
        end = span.end
    if end < len(prediction.text):
        yield prediction.text[end:], False


def summary(prediction: Prediction) -> str:
    """Label, probability and how much was read, on one line."""
    parts = "tokens" if prediction.text else "patches"
    line = f"{prediction.label}  {prediction.probability:.1%}  from {prediction.rate:.1%} of its {parts}"
    return f"{line}  {_CUT}" if prediction.truncated else line


def shows_colours(console: Console) -> bool:
    """Whether a highlight can be seen there: a terminal with colours, not switched off by NO_COLOR."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def terminal_text(prediction: Prediction) -> Text:
    """A summary line and the text, its rationale highlighted; for terminals with colours (else ``plain_text``).

    Control characters in the text are shown as a replacement mark, so that a review cannot steer the terminal.
    """
    from rich.text import Text

    shown = Text()
    shown.append(f"{summary(prediction)}\n", style="bold")
    for piece, chosen in segments(prediction):
        shown.append(_harmless(piece), style=HIGHLIGHT if chosen else None)
    return shown


def plain_text(prediction: Prediction) -> str:
    """As ``terminal_text`` without colours: the rationale stands in [[double brackets]]."""
    if not prediction.text:
        return f"{summary(prediction)}\n{_patches(prediction)}"
    body = "".join(f"[[{_harmless(piece)}]]" if chosen else _harmless(piece) for piece, chosen in segments(prediction))
    return f"{summary(prediction)}\n{body}"


def _patches(prediction: Prediction) -> str:
    """The kept patches of an image, the strongest first; rows and columns counted from 1."""
    ranked = sorted(prediction.rationale, key=lambda patch: -patch.score)
    return ", ".join(f"row {patch.row + 1} column {patch.column + 1} ({patch.score:+.2f})" for patch in ranked)


def html_fragment(prediction: Prediction) -> str:
    """A ``<figure>`` with the rationale in ``<mark>`` elements; text is escaped, no script, no style sheet."""
    body = "".join(
        f"<mark>{html.escape(piece)}</mark>" if chosen else html.escape(piece) for piece, chosen in segments(prediction)
    )
    return (
        f'<figure class="rekd"><figcaption>{html.escape(summary(prediction))}</figcaption>'
        f'<blockquote style="white-space: pre-wrap">{body}</blockquote></figure>'
    )


def _harmless(text: str) -> str:
    return "".join(c if c in "\n\t" or c.isprintable() or c.isspace() and ord(c) > 0x9F else "�" for c in text)
