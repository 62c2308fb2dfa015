"""Run a pair over a split and measure it, as it is served; the masks to measure it on, and what it compares with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rekd_train.data import Split, bucketed_batches
from rekd_train.errors import ConfigError
from rekd_train.evaluation import metrics
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.preprocessors import full_length, same_tokens
from rekd_train.models.base import Inputs, apply_policy, selection_scores
from rekd_train.models.rationalizer import Rationalizer

# what is kept: by the rule, by others, and as many by chance

ARGMAX = SelectionPolicy(bias=0.0, budget=None, minimum=0)  # z1 > z0 and nothing else: the mode of the trained sampler


def decide(scores: Tensor, selectable: Tensor, policy: SelectionPolicy) -> Tensor:
    """The noise-free mask of any policy: (n, N) bool from (n, N) float32 scores and (n, N) bool."""
    return apply_policy(scores, selectable, policy, policy.capacity(scores.shape[1]))


def fill(scores: Tensor, selectable: Tensor, share: float, minimum: int = 1) -> Tensor:
    """Exactly the budget: the floor(share * n) highest scores of each example, at least ``minimum``: (n, N) bool."""
    return decide(scores, selectable, SelectionPolicy(bias=None, budget=share, minimum=minimum))


def drawn(scores: Tensor, selectable: Tensor, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Sampled rationales (n, N) bool, ``draws`` times, as training and the authors' evaluation draw them.

    z1 + G1 > z0 + G0 with independent Gumbel noise, which is d + logistic noise > 0: P(keep) = sigmoid(d) at
    every temperature. No budget holds.
    """
    for _ in range(draws):
        uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
        yield selectable & (scores + torch.logit(uniform, eps=1e-12) > 0)


def random_like(mask: Tensor, selectable: Tensor, generator: torch.Generator) -> Tensor:
    """As many features of each example as ``mask`` keeps, uniformly at random: (n, N) bool."""
    chances = torch.rand(mask.shape, generator=generator).masked_fill(~selectable, -1)
    ranked = chances.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(mask.shape[1]).expand_as(ranked).contiguous())
    return selectable & (ranks < mask.sum(dim=1, keepdim=True))


def first_like(mask: Tensor, selectable: Tensor) -> Tensor:
    """As many features of each example as ``mask`` keeps, the first ones: (n, N) bool."""
    return selectable & (selectable.to(torch.int64).cumsum(dim=1) <= mask.sum(dim=1, keepdim=True))


# outputs of the pair


class SplitOutputs(NamedTuple):
    """Outputs for every example of a split, in its order."""

    class_logits: np.ndarray  # (n, C) float32
    kept: np.ndarray  # (n,) kept features
    selectable: np.ndarray  # (n,) selectable features


class SelectorOutputs(NamedTuple):
    """Selector scores of a split, padded to its longest example."""

    scores: Tensor  # (n, N) float32
    selectable: Tensor  # (n, N) bool


@torch.inference_mode()
def run_split(rationalizer: Rationalizer, split: Split, batch_size: int = 128) -> SplitOutputs:
    """Select and classify every example."""
    class_logits = np.zeros((len(split), len(rationalizer.labels)), dtype=np.float32)
    kept, selectable = np.zeros(len(split), dtype=np.int64), np.zeros(len(split), dtype=np.int64)
    for indices, inputs in _batches(rationalizer, split, batch_size):
        present = rationalizer.selectable(inputs)
        # a plain classifier's selector has nothing to say, and may be as large as its predictor
        mask = present if rationalizer.policy.keeps_everything else rationalizer.select(inputs).mask
        class_logits[indices] = classify(rationalizer, inputs, mask).cpu().numpy()
        kept[indices] = mask.sum(dim=1).cpu().numpy()
        selectable[indices] = present.sum(dim=1).cpu().numpy()
    return SplitOutputs(class_logits, kept, selectable)


@torch.inference_mode()
def run_selector(rationalizer: Rationalizer, split: Split, batch_size: int = 128) -> SelectorOutputs:
    """Selector scores of every example, on the CPU."""
    everywhere = rationalizer.policy.selectable == "all"
    width = rationalizer.preprocessor.positions if everywhere else int(split.lengths.max())
    scores, selectable = torch.zeros(len(split), width), torch.zeros(len(split), width, dtype=torch.bool)
    for indices, inputs in _batches(rationalizer, split, batch_size):
        logits = rationalizer.selector_logits(inputs)
        rows = torch.from_numpy(indices)
        scores[rows, : logits.shape[1]] = selection_scores(logits).cpu()
        selectable[rows, : logits.shape[1]] = rationalizer.selectable(inputs).cpu()
    return SelectorOutputs(scores, selectable)


@torch.inference_mode()
def run_masks(rationalizer: Rationalizer, split: Split, masks: Mapping[str, Tensor],
              batch_size: int = 128) -> dict[str, np.ndarray]:
    """The predictor's (n, C) float32 logits on given rationales, (n, N) bool on the CPU of any size, by their names."""
    class_logits = {name: np.zeros((len(split), len(rationalizer.labels)), dtype=np.float32) for name in masks}
    for indices, inputs in _batches(rationalizer, split, batch_size):
        selectable, rows = rationalizer.selectable(inputs), torch.from_numpy(indices)
        for name, mask in masks.items():
            part = mask[rows, : selectable.shape[1]]
            slots = max(1, int(part.sum(dim=1).max()))
            logits = classify(rationalizer, inputs, part.to(selectable.device), slots)
            class_logits[name][indices] = logits.cpu().numpy()
    return class_logits


def measure(rationalizer: Rationalizer, split: Split, outputs: SplitOutputs | None = None) -> dict[str, Any]:
    """Accuracy given the rationale, calibration and realised selection rate on a split: one pass, no more.

    ``outputs``: on rationales from elsewhere (random ones, the first words) instead of the selector's.
    """
    outputs, labels = outputs or run_split(rationalizer, split), split.labels
    probabilities = rationalizer.probabilities(torch.from_numpy(outputs.class_logits)).numpy()
    predicted = outputs.class_logits.argmax(axis=1)
    limits, positions = rationalizer.policy.limits(outputs.selectable), rationalizer.preprocessor.positions
    return {
        "examples": len(labels), "accuracy": metrics.accuracy(probabilities, labels),
        "macro_f1": metrics.macro_f1(predicted, labels), "nll": metrics.negative_log_likelihood(probabilities, labels),
        "ece": metrics.expected_calibration_error(probabilities, labels),
        **metrics.selection_summary(outputs.kept, outputs.selectable, limits, positions),
        "never_predicted": metrics.never_predicted(predicted, labels, rationalizer.labels),
    }


def check_comparable(student: Rationalizer, teacher: Rationalizer) -> None:
    """Raise ConfigError unless both models read the same features and predict the same labels."""
    if student.labels != teacher.labels:
        raise ConfigError(f"the teacher's labels are {teacher.labels}, this model's {student.labels}")
    check_features(student, teacher)
    mine, theirs = student.preprocessor, teacher.preprocessor
    if mine.positions != theirs.positions:
        raise ConfigError(f"the teacher reads other features ({theirs.positions} positions) than this model "
                          f"({mine.positions}); give one with the same tokenizer, length or patch grid")  # fmt: skip


def check_features(student: Rationalizer, teacher: Rationalizer) -> None:
    """Raise ConfigError where two models read other modalities, other tokens, or other images or patches."""
    theirs, mine = teacher.preprocessor, student.preprocessor
    kinds = theirs.settings.kind, mine.settings.kind
    if kinds == ("text", "text") and not same_tokens(theirs, mine):
        raise ConfigError("the teacher was trained with another tokenizer; distillation needs the same tokens; fix: a "
                          "teacher with the student's tokenizer")
    if "image" not in kinds:
        return
    if kinds != ("image", "image"):
        raise ConfigError(f"the teacher reads {kinds[0]} inputs, the student {kinds[1]} inputs")
    sizes = [(s.height, s.width, s.channels) for s in (theirs.settings, mine.settings)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"the teacher reads images of {sizes[0]} (height, width, channels), not of {sizes[1]}")
    grids = [(s.rows, s.columns) for s in (theirs.settings, mine.settings)]
    if grids[0] != grids[1]:
        raise ConfigError(f"the teacher cuts images into {grids[0]} (rows, columns) patches, the student into "
                          f"{grids[1]}; distillation needs the same patches; fix: the same image.patch and size")


def _batches(rationalizer: Rationalizer, split: Split, size: int) -> Iterator[tuple[np.ndarray, Inputs]]:
    """The whole split for a model in evaluation mode: indices, and inputs on the model's device."""
    rationalizer.eval()
    device = next(rationalizer.parameters()).device
    for indices in bucketed_batches(split.lengths, size):
        inputs = split.inputs(indices)
        if rationalizer.policy.selectable == "all":
            inputs = full_length(inputs, rationalizer.preprocessor)
        yield indices, {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


def classify(rationalizer: Rationalizer, inputs: Inputs, mask: Tensor, slots: int | None = None) -> Tensor:
    """As it is served: a compact predictor computes on the kept features alone."""
    if rationalizer.predictor.operator != "compact":
        return rationalizer.class_logits(inputs, mask)
    return rationalizer.gathered_class_logits(inputs, mask, slots)
