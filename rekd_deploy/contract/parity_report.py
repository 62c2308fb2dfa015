"""What the gate found, and what each precision must keep. torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

Precision = Literal["fp32", "fp16", "bf16", "int8"]
RUNTIME_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
"""Those that ONNX Runtime has CPU kernels for."""
GPU_PRECISIONS: tuple[Precision, ...] = tuple(each for each in RUNTIME_PRECISIONS if each != "int8")
"""What ONNX Runtime computes on GPUs; products of int8 it has for CPUs alone."""


@dataclass(frozen=True)
class ParityLimits:
    """What a pair must keep; None: no limit, but the figure must be a number. The defaults are fp32's."""

    scores: float | None = 1e-4
    """Largest difference of a selector score; of a class logit and of a probability on the same mask."""
    logits: float | None = 1e-4
    probabilities: float | None = 1e-4
    tie_margin: float = 1e-5
    """A flipped position is a near-tie when the reference score is at most this far from its cut."""
    flipped_share: float | None = None
    """Largest share of real positions that may be flipped; None: near-ties alone."""
    mask_jaccard: float | None = None
    """Least mean Jaccard index of the masks."""
    class_agreement: float | None = None
    """Least share of examples that graphs and model, each on its own mask, put into the same class."""
    accuracy_drop: float | None = None
    """Most accuracy that may be lost; where labels are unknown, most disagreement."""


_TIES_PER, _A_PAIR = 100_000, 2
"""One near-tie may flip in this many positions, two in any case: one for want of budget has a counterpart."""
_ROUNDING = 1e-9
"""A share of a count is not exact."""
_FIGURES = {"scores": "score_difference", "logits": "logit_difference", "probabilities": "probability_difference"}
"""What a report calls the figure of each limit."""
_MASKS: dict[str, Any] = {"scores": None, "flipped_share": 0.005, "mask_jaccard": 0.97}
_CLASSES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"logits": None, "probabilities": None, "class_agreement": 0.995},
    "bf16": {"logits": None, "probabilities": None, "class_agreement": 0.995},
    "int8": {"logits": None, "probabilities": None, "accuracy_drop": 0.01},
}


def limits_of(selector: Precision, predictor: Precision | None = None) -> ParityLimits:
    """The limits of a pair; ``predictor`` None: in the selector's precision."""
    return ParityLimits(**({} if selector == "fp32" else _MASKS), **_CLASSES[predictor or selector])


@dataclass
class MaskAgreement:
    """How far the masks of examples agree."""

    examples: int = 0
    positions: int = 0
    flipped: int = 0
    _jaccard_sum: float = 0.0

    def add(self, ours: np.ndarray, theirs: np.ndarray, real: np.ndarray) -> None:
        """Count a batch; all (B, N) bool."""
        union, shared = (ours | theirs).sum(axis=1), (ours & theirs).sum(axis=1)
        self.examples += len(ours)
        self.positions += int(real.sum())
        self.flipped += int((ours != theirs).sum())
        self._jaccard_sum += float(np.sum(np.where(union > 0, shared / np.maximum(union, 1), 1.0)))

    @property
    def jaccard(self) -> float:
        """Mean over the examples; two empty masks agree."""
        return self._jaccard_sum / self.examples if self.examples else 1.0

    @property
    def flipped_share(self) -> float:
        """Of the real positions."""
        return self.flipped / self.positions if self.positions else 0.0

    def complaints(self, limits: ParityLimits) -> list[str]:
        """What is beyond the limits."""
        found = []
        if limits.flipped_share is not None and self.flipped_share > limits.flipped_share:
            found.append(
                f"{self.flipped} of {self.positions} real positions are flipped, {self.flipped_share:.2%} (limit "
                f"{limits.flipped_share:.2%})"
            )
        if limits.mask_jaccard is not None and self.jaccard < limits.mask_jaccard:
            found.append(f"the masks' mean Jaccard index is {self.jaccard:.4f} (limit {limits.mask_jaccard:g})")
        return found


@dataclass
class ParityReport:
    """What was compared and how far apart it was; counts are of real positions where nothing else is said."""

    source: str
    """Where the examples come from: 'file', 'checkpoint' or 'generated'."""
    limits: ParityLimits = field(default_factory=ParityLimits)
    device: str = "cpu"
    """Where the graphs ran: 'cpu', 'cuda' or 'cuda:N'."""
    examples: int = 0
    constructed_rows: int = 0
    positions: int = 0
    score_difference: float = 0.0
    logit_difference: float = 0.0
    probability_difference: float = 0.0
    flipped_positions: int = 0
    near_ties: int = 0
    """Flipped positions within ``tie_margin`` of the cut, among the examples alone."""
    wrong_flips: int = 0
    """Flipped positions that are not near-ties."""
    rule_violations: int = 0
    """Positions where the mask is not the specification's on the graph's own or constructed scores."""
    handover_violations: int = 0
    """Rows whose positions and kept slots do not say what the mask says."""
    label_disagreements: int = 0
    """Rows that the graphs and the model, each on its own mask, put into different classes."""
    example_disagreements: int = 0
    """The same among the examples alone."""
    labelled: int = 0
    """Examples whose class is known."""
    model_correct: int = 0
    graphs_correct: int = 0
    masks: MaskAgreement = field(default_factory=MaskAgreement)
    """Of the examples alone."""
    emulated: bool = False
    """Whether the graphs' roundings were computed in float32, for want of kernels."""

    @property
    def class_agreement(self) -> float:
        """Share of the examples that are put into the same class."""
        return 1 - self.example_disagreements / self.examples if self.examples else 1.0

    def failures(self) -> list[str]:
        """What forbids publication; empty when the graphs are the model."""
        limits, found = self.limits, []
        for what, value, limit in (
            ("a selector score", self.score_difference, limits.scores),
            ("a class logit on the same mask", self.logit_difference, limits.logits),
            ("a probability on the same mask", self.probability_difference, limits.probabilities),
        ):
            if limit is None and not np.isfinite(value):
                found.append(f"{what} is not a finite number (limit: any finite one)")
            elif limit is not None and not value <= limit:  # also true for NaN
                found.append(f"{what} differs by {value:.3g} (limit {limit:g})")
        exact = limits.flipped_share is None
        ties, margin = max(_A_PAIR, self.positions // _TIES_PER), limits.tie_margin
        for count, allowed, what in (
            (self.near_ties * exact, ties, f"of {self.positions} real positions are flipped near-ties"),
            (self.wrong_flips * exact, 0, f"mask positions are flipped farther than {margin:g} from the cut"),
            (self.rule_violations, 0, "mask positions do not follow the decision rule"),
            (self.handover_violations, 0, "rows hand other positions to the predictor than their mask holds"),
        ):
            if count > allowed:
                found.append(f"{count} {what} (limit {allowed})")
        return found + self.masks.complaints(limits) + self._class_complaints()

    def _class_complaints(self) -> list[str]:
        least, drop, found = self.limits.class_agreement, self.limits.accuracy_drop, []
        if drop is not None and not self.labelled:
            least = 1 - drop
        elif drop is not None and self.model_correct - self.graphs_correct > drop * self.labelled + _ROUNDING:
            found.append(
                f"the accuracy falls from {self.model_correct / self.labelled:.4f} to "
                f"{self.graphs_correct / self.labelled:.4f} (limit {drop:g} less)"
            )
        if least is not None and self.example_disagreements > (1 - least) * self.examples + _ROUNDING:
            found.append(
                f"{self.example_disagreements} of {self.examples} examples are put into another class, agreement "
                f"{self.class_agreement:.4f} (limit {least:g})"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """For the manifest and --json; differences to three digits."""
        figures = asdict(self)
        for key in _FIGURES.values():
            figures[key] = float(f"{figures[key]:.3g}")
        figures["masks"] = {
            "positions": self.masks.positions, "flipped": self.masks.flipped,
            "flipped_share": round(self.masks.flipped_share, 6), "jaccard": round(self.masks.jaccard, 6),
        }
        figures["class_agreement"] = round(self.class_agreement, 6)
        return figures


def verification_limits(parity: Mapping[str, Any]) -> dict[str, Any]:
    """What the same graphs must keep on another machine, from a report as ``to_dict`` gives it.

    Where a precision has no limit it is twice what the gate found: another processor rounds otherwise.
    """
    limits = dict(parity["limits"])
    for name, figure in _FIGURES.items():
        if limits[name] is None:
            limits[name] = 2 * parity[figure] + getattr(ParityLimits, name)
    limits["flips"] = 0 if limits.get("flipped_share") is None else 2 * parity["flipped_positions"] + 1
    return limits
