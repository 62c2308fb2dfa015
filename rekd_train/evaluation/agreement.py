"""Rationales beside something else: a teacher's, people's, the known place of the answer, the kinds of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rekd_train.data import Split
from rekd_train.errors import ConfigError
from rekd_train.evaluation.forward import SelectorOutputs, decide, run_masks, run_selector
from rekd_train.evaluation.mask_metrics import (
    overlap,
    plausibility,
    rank_correlation,
    selection_divergence,
    truth_summary,
    words_from_pieces,
)
from rekd_train.evaluation.metrics import ratio
from rekd_train.inputs.preprocessors import Preprocessor, same_tokens, vocabulary_of
from rekd_train.inputs.text import TextPreprocessor
from rekd_train.models.rationalizer import Rationalizer


def teacher_figures(
    student: Rationalizer,
    teacher: Rationalizer,
    split: Split,
    selector: SelectorOutputs,
    mask: Tensor,
    class_logits: np.ndarray,
) -> dict[str, float]:
    """How far a student decides as its teacher does, both noise-free by their stored policies.

    Args:
        selector: the student's outputs.
        mask: (n, N) bool, the student's rationales.
        class_logits: (n, C), the student's answers.

    Raises:
        ConfigError: the teacher reads other features or has other labels.
    """
    check_comparable(student, teacher)
    theirs = run_selector(teacher, split)
    width = min(selector.scores.shape[1], theirs.scores.shape[1])  # one that may select padding is padded wider
    both = (selector.selectable[:, :width] & theirs.selectable[:, :width]).numpy()
    their_mask = decide(theirs.scores, theirs.selectable, teacher.policy)
    answers = run_masks(teacher, split, {"own": their_mask})["own"].argmax(axis=1)
    scores, their_scores = selector.scores[:, :width].numpy(), theirs.scores[:, :width].numpy()
    shared = overlap(mask[:, :width].numpy() & both, their_mask[:, :width].numpy() & both)
    return {
        "accuracy": float(np.mean(answers == split.labels)),
        "label_agreement": float(np.mean(answers == class_logits.argmax(axis=1))),
        "mask_jaccard": shared["jaccard"],
        "mask_f1": shared["f1"],
        "score_rank_correlation": rank_correlation(scores, their_scores, both),
        "selection_divergence": selection_divergence(their_scores, scores, both),
    }


def check_comparable(student: Rationalizer, teacher: Rationalizer) -> None:
    """Raise ConfigError unless both models read the same features and answer with the same labels."""
    mine, theirs = student.preprocessor, teacher.preprocessor
    if student.labels != teacher.labels:
        raise ConfigError(f"the teacher's labels are {teacher.labels}, this model's {student.labels}")
    texts = isinstance(mine, TextPreprocessor), isinstance(theirs, TextPreprocessor)
    same = same_tokens(mine, theirs) if all(texts) else mine.special_ids == theirs.special_ids
    if texts[0] != texts[1] or not same or mine.positions != theirs.positions:
        raise ConfigError(
            f"the teacher reads other features ({theirs.positions} positions) than this model ({mine.positions}); "
            "give one with the same tokenizer, length or patch grid"
        )


def token_figures(preprocessor: Preprocessor, split: Split, mask: Tensor) -> dict[str, Any]:
    """What kind of tokens are selected; nothing for images.

    ``punctuation_selected`` is to be read beside ``punctuation``, its share of all tokens of the texts.
    """
    if not isinstance(preprocessor, TextPreprocessor):
        return {}
    vocabulary = vocabulary_of(preprocessor)
    ids = _padded_ids(preprocessor, split, mask.shape[1])
    kept = ids[mask.numpy()]
    texts = ids[~vocabulary.special[ids]]
    figures = {
        "special_selected": ratio(vocabulary.special[kept].sum(), len(kept)),
        "punctuation_selected": ratio(vocabulary.punctuation[kept].sum(), len(kept)),
        "punctuation": ratio(vocabulary.punctuation[texts].sum(), len(texts)),
        "word_pieces_selected": ratio(vocabulary.continues[kept].sum(), len(kept)),
        "word_pieces": ratio(vocabulary.continues[texts].sum(), len(texts)),
    }
    return {"tokens": figures}


def human_figures(
    preprocessor: Preprocessor, split: Split, scores: Tensor, selectable: Tensor, mask: Tensor
) -> dict[str, Any]:
    """Against the known reason of each label, where the data have one: people's marks, or the true tile.

    For texts over whole words (a word is selected or marked if any of its pieces is) within what the model
    reads, by the ERASER conventions; for images over patches.
    """
    if split.truth is None:
        return {}
    known = [row for row, truth in enumerate(split.truth) if truth is not None]
    if not isinstance(preprocessor, TextPreprocessor):
        width = mask.shape[1]
        truth = np.zeros((len(known), width), dtype=bool)
        for place, row in enumerate(known):
            truth[place, : len(split.truth[row])] = split.truth[row]
        return {"truth": {"examples": len(known), **truth_summary(mask[known].numpy(), truth)}}
    continues = vocabulary_of(preprocessor).continues
    ids = _padded_ids(preprocessor, split, mask.shape[1])
    predicted, soft, human = [], [], []
    for row in known:
        where = np.flatnonzero(selectable[row].numpy()[: len(split.truth[row])])
        joined = continues[ids[row, where]]
        predicted.append(words_from_pieces(mask[row].numpy()[where], joined))
        soft.append(words_from_pieces(scores[row].numpy()[where], joined))
        human.append(words_from_pieces(split.truth[row][where], joined))
    return {"human_rationales": plausibility(predicted, soft, human)}


def _padded_ids(preprocessor: TextPreprocessor, split: Split, width: int) -> np.ndarray:
    """(n, width) token ids of a split."""
    ids = np.full((len(split), width), preprocessor.special_ids["pad"], dtype=np.int64)
    for row, mine in enumerate(split.ids):
        ids[row, : len(mine)] = mine
    return ids
