"""Models whose behaviour is known, to hold the faithfulness tests against: honest, random, cheating, leaky."""

from pathlib import Path

import numpy as np
from conftest import WORDS, make_rationalizer

from rekd_deploy.bench.examples import Features
from rekd_train.data import TokenizedTexts

CUES = ("bad", "good")
KEPT = 3


def planted_texts(examples: int = 240) -> TokenizedTexts:
    """Neutral words and one cue, 'bad' (class 0) or 'good' (class 1); the cue is the known reason."""
    preprocessor, random = make_rationalizer().preprocessor, np.random.default_rng(0)
    neutral = [word for word in WORDS if word not in CUES]
    labels, texts, places = np.arange(examples) % 2, [], []
    for label in labels:
        words = list(random.choice(neutral, size=random.integers(8, 20)))
        places.append(int(random.integers(len(words))))
        words.insert(places[-1], CUES[label])
        texts.append(" ".join(words))
    ids = [np.asarray(encoding.ids, dtype=np.int64) for encoding in preprocessor.encode(texts)]
    truth = [np.arange(len(row)) == place + 1 for row, place in zip(ids, places, strict=True)]  # after [CLS]
    return TokenizedTexts(ids, labels.astype(np.int64), preprocessor, truth)


class Planted:
    """'honest' keeps the cue and two words at random, and reads the cue; 'random' keeps three words at random and reads
    the cue if it is there; 'cheat' keeps the first three words without a cue for class 0, the last for class 1, and
    reads nothing but where they are; 'leaky' is honest, but its prediction depends a little on what it does not keep.
    """

    batch_size = 32

    def slots(self, width: int) -> None:
        return None

    def __init__(self, preprocessor, kind: str) -> None:
        self.kind = kind
        ids = {preprocessor.token(number): number for number in range(preprocessor.vocabulary_size)}
        self.cues = [ids[cue] for cue in CUES]
        self.special = list(preprocessor.special_ids.values())

    def select(self, inputs):
        ids = inputs["input_ids"]
        selectable = (inputs["attention_mask"] > 0) & ~np.isin(ids, self.special)
        # noise that depends on the text alone, so that the same text has the same rationale
        seeds = (ids * (np.arange(ids.shape[1]) + 1)).sum(axis=1)
        scores = np.stack([np.random.default_rng(int(seed)).normal(size=ids.shape[1]) for seed in seeds])
        cue = np.isin(ids, self.cues)
        if self.kind in ("honest", "leaky"):
            scores = scores + 100 * cue
        if self.kind == "cheat":
            late = (ids == self.cues[1]).any(axis=1, keepdims=True)
            scores = np.where(late, 1, -1) * np.arange(ids.shape[1]) - 1000.0 * cue
        ranked = np.argsort(np.argsort(np.where(selectable, -scores, np.inf), axis=1, kind="stable"), axis=1)
        return scores.astype(np.float32), selectable & (ranked < KEPT)

    def classify(self, inputs, mask):
        ids = inputs["input_ids"]
        votes = ((ids == self.cues[1]) & mask).sum(axis=1) - ((ids == self.cues[0]) & mask).sum(axis=1) + 0.0
        if self.kind == "cheat":
            place = (mask * np.arange(ids.shape[1])).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
            votes = place / inputs["attention_mask"].sum(axis=1) - 0.5
        if self.kind == "leaky":
            votes += 1e-6 * (ids * ~mask).sum(axis=1)
        return np.stack([-4 * votes, 4 * votes], axis=1).astype(np.float32)


def ideal_judge(features: Features):
    """Reads the cue where it is shown and knows nothing otherwise: what a perfect independent judge would say."""
    cues = Planted(features.preprocessor, "honest").cues
    def judge(masks):
        found = {}
        for name, mask in masks.items():
            bad, good = (((features.content == cue) & mask).any(axis=1) for cue in cues)
            positive = 0.5 + 0.45 * good - 0.45 * bad
            found[name] = np.stack([1 - positive, positive], axis=1)
        return found
    return judge


def table_file(folder: Path, examples: int = 40, seed: int = 0) -> Path:
    random, path = np.random.default_rng(seed), folder / "reviews.csv"
    texts = [" ".join(random.choice(WORDS, size=random.integers(3, 60))) for _ in range(examples)]
    rows = [f"{text} {number},{('negative', 'positive')[number % 2]}" for number, text in enumerate(texts)]
    path.write_text("\n".join(["text,label", *rows, ""]))
    return path
