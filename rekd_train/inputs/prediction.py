"""What a prediction is: label, probabilities and the words or patches that decided, torch-free.

The same classes come from the PyTorch model, the in-process pipeline and the Triton client.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

RATIONALE = ".rationale.png"
"""How the names of pictures end that show an image's rationale; no training data set reads them."""


@dataclass(frozen=True)
class Piece:
    """One kept token, exactly as the predictor saw it."""

    start: int
    """First character in the text as given."""
    end: int
    """One past the last character."""
    token: str
    """The vocabulary entry (a WordPiece may start with '##')."""
    position: int
    """Index in the token sequence of the text, not of a window; 0 is [CLS]."""
    score: float
    """Selector score z1 - z0, noise-free; higher is more wanted."""


@dataclass(frozen=True)
class Span:
    """Neighbouring whole words of the rationale, merged."""

    start: int
    """First character in the text as given."""
    end: int
    """One past the last character."""
    text: str
    """``text[start:end]`` of the text as given."""
    score: float
    """Highest selector score among the span's kept pieces."""


@dataclass(frozen=True)
class Patch:
    """One kept patch of an image."""

    row: int
    """Row of the patch grid, 0 at the top."""
    column: int
    """Column of the patch grid, 0 at the left."""
    box: tuple[int, int, int, int]
    """(left, top, right, bottom) in pixels of the image as given; right and bottom are one past the last."""
    score: float
    """Selector score z1 - z0, noise-free; higher is more wanted."""


@dataclass(frozen=True)
class Prediction:
    """An answer and the part of the input it was made from."""

    label: str
    """Name of the most probable class."""
    probabilities: dict[str, float]
    """Calibrated probability of each class, by label name, in the model's class order."""
    rationale: list[Span] | list[Patch]
    """Whole-word spans, or the patches of an image, in reading order."""
    rate: float
    """Kept pieces / real pieces after truncation (by windows: of the whole text), specials excluded; of an image,
    kept patches / patches."""
    truncated: bool
    """True when the text was longer than the model reads and its end was cut."""
    text: str = ""
    """The text as given; empty for an image."""
    pieces: list[Piece] = field(default_factory=list)
    """The kept tokens one by one; empty for an image."""

    @property
    def probability(self) -> float:
        """Probability of ``label``."""
        return self.probabilities[self.label]

    def to_dict(self) -> dict:
        """Plain dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict) -> Prediction:
        """The inverse of ``to_dict``; other keys are left out."""
        own = {each.name: document[each.name] for each in fields(cls) if each.name in document}
        rationale = [_part(part) for part in document["rationale"]]
        pieces = [Piece(**piece) for piece in document["pieces"]]
        return cls(**{**own, "rationale": rationale, "pieces": pieces})


def _part(document: dict) -> Span | Patch:
    if "row" not in document:
        return Span(**document)
    return Patch(**{**document, "box": tuple(document["box"])})  # JSON has lists only
