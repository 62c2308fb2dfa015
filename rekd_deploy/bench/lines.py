"""The networks of a checkpoint in every arrangement that is timed: compacted, zeroed, other K, plain classifiers.

Times do not depend on weights, so the same networks stand for what was not trained: a pair whose predictor blanks
instead of gathering, and a classifier that reads everything, which is that predictor alone with nothing blanked.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.forms import CLASSIFIER, COMPACTED, LARGE_CLASSIFIER, ZEROED
from rekd_deploy.contract.signature import GraphSignature
from rekd_deploy.errors import BenchmarkError
from rekd_deploy.runtimes.base import Arrays

if TYPE_CHECKING:
    from rekd_train.inputs.policy import SelectionPolicy
    from rekd_train.models.base import Predictor
    from rekd_train.models.rationalizer import Rationalizer

BOTH, PREDICTOR, SINGLE = ("selector", "predictor"), ("predictor",), ("single",)


@dataclass(frozen=True)
class Line:
    """Networks that answer one after another."""

    model: str
    pair: Rationalizer
    roles: tuple[str, ...]

    @property
    def kept(self) -> int | None:
        """K of a compacted pair."""
        return self.pair.capacity if self.model == COMPACTED else None

    @property
    def graphs(self) -> int:
        """How many graphs it has."""
        return len(self.roles)

    def modules(self) -> list[Any]:
        """The exportable modules, in order."""
        from rekd_deploy.graphs.modules import graph_modules

        modules = graph_modules(self.pair)
        return [modules[role] for role in self.roles]

    def signatures(self) -> list[GraphSignature]:
        """Of the modules."""
        from rekd_deploy.graphs.modules import pair_signature

        return [pair_signature(self.pair).graph(role) for role in self.roles]

    def inputs(self, encoded: Arrays) -> Arrays:
        """What the first module takes."""
        return encoded if self.roles == BOTH else all_kept(encoded, self.signatures()[0])


def all_kept(encoded: Arrays, signature: GraphSignature) -> Arrays:
    """The inputs of a predictor that may read everything, which makes it a plain classifier.

    Args:
        encoded: the selector's inputs.
        signature: the predictor's; the width of ``keep`` is fixed for images, for texts it is theirs.
    """
    first = next(iter(encoded.values()))
    width = next(spec.shape[1] for spec in signature.inputs if spec.name == "keep")
    return encoded | {"keep": np.ones((len(first), width if isinstance(width, int) else first.shape[1]), bool)}


def lines_of(pair: Rationalizer, teacher: Rationalizer | None = None, budgets: Sequence[float] = ()) -> list[Line]:
    """Every arrangement of a checkpoint's networks; the first is the one it was trained for.

    Args:
        teacher: gives the size of the larger classifier.
        budgets: other shares of the features that a compacted pair may keep.

    Raises:
        BenchmarkError: a budget is no share, or the teacher reads something else.
    """
    own = ZEROED if pair.predictor.operator == "zero" else COMPACTED
    zeroed, compacted = _with_operator(pair, "zero"), _with_operator(pair, "compact")
    lines = [Line(COMPACTED, compacted, BOTH), Line(ZEROED, zeroed, BOTH), Line(CLASSIFIER, zeroed, PREDICTOR)]
    lines.sort(key=lambda line: line.model != own)
    for budget in budgets:
        if not 0 < budget <= 1:
            raise BenchmarkError(f"the budget {budget:g} is no share; give one above 0, at most 1")
        policy = pair.policy.model_copy(update={"budget": budget})
        other = _rebuilt(pair, compacted.predictor, policy)
        if other.capacity not in {line.kept for line in lines}:
            lines.append(Line(COMPACTED, other, BOTH))
    if teacher is not None:
        ours, theirs = (model.preprocessor for model in (pair, teacher))
        if ours.fingerprint != theirs.fingerprint:
            raise BenchmarkError(
                "the teacher's preprocessing is another, so its classifier cannot be timed on the same tensors; fix: a "
                "teacher with the same tokenizer and max_length, or leave it out"
            )
        lines.append(Line(LARGE_CLASSIFIER, _with_operator(teacher, "zero"), PREDICTOR))
    return lines


def _with_operator(pair: Rationalizer, operator: str) -> Rationalizer:
    """The pair with a predictor of this operator; the networks themselves are shared."""
    if pair.predictor.operator == operator:
        return pair
    predictor = copy.copy(pair.predictor)
    predictor.operator = operator
    return _rebuilt(pair, predictor, pair.policy)


def _rebuilt(pair: Rationalizer, predictor: Predictor, policy: SelectionPolicy) -> Rationalizer:
    parts = (pair.selector, predictor, policy, pair.preprocessor, pair.labels, pair.probability_temperature)
    return type(pair)(*parts).eval()
