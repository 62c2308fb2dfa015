"""Fixed splits: which examples train, which choose, which measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rekd_train.data.examples import SPLITS, Examples, SomeExamples


def stratified_split(examples: SomeExamples, shares: Sequence[float], seed: int) -> list[SomeExamples]:
    """Split so that every part has each label in the same proportion; shares sum to 1.

    Within a part the order is random, fixed by the seed.
    """
    generator = np.random.default_rng(seed)
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for label in np.unique(examples.labels):
        members = generator.permutation(np.flatnonzero(examples.labels == label))
        edges = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, chosen in zip(parts, np.split(members, edges), strict=True):
            part.append(chosen)
    orders = [generator.permutation(np.concatenate(part)) for part in parts]
    return [examples.take(order) for order in orders]


def completed(
    splits: Mapping[str, SomeExamples], dev_share: float, test_share: float, seed: int
) -> dict[str, SomeExamples]:
    """All three splits: what a source does not bring is taken out of its training examples, stratified.

    Args:
        splits: 'train' and, where the source has them, 'dev' and 'test'; those keep their examples, in an
            order that is random and always the same, so that the first of them are a fair sample.
        dev_share: share of the training examples that becomes 'dev', if there is none.
        test_share: share of the training examples that becomes 'test', if there is none.
        seed: of the split.
    """
    shares = {"dev": dev_share, "test": test_share}
    missing = [name for name in SPLITS[1:] if name not in splits]
    taken = [shares[name] for name in missing]
    parts: list[Examples] = stratified_split(splits["train"], [1 - sum(taken), *taken], seed)
    whole = {name: stratified_split(examples, [1.0], seed=0)[0] for name, examples in splits.items()}
    whole |= dict(zip(["train", *missing], parts, strict=True))
    return {name: whole[name] for name in SPLITS}
