"""Where the reason of a label is known: people's marks on texts, the deciding tile of a mosaic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rekd_deploy.bench.features import Features
from rekd_deploy.bench.judges import random_masks
from rekd_deploy.bench.results import Check
from rekd_deploy.bench.subject import Selected
from rekd_deploy.bench.verdicts import better_check, not_applicable, paired

if TYPE_CHECKING:
    from rekd_train.data import Split

NAME = "rationales lie where the reason is known to be"


def known_reasons(
    split: Split, features: Features, chosen: Selected, seed: int = 0
) -> tuple[dict[str, Any], Check]:
    """Plausibility or truth figures of the rationales, and of random masks of equal size with random scores.

    Returns:
        ``human_rationales`` or ``truth`` (docs/evaluation.md), each with ``random`` beside it, and ``share_inside``:
        mean share of the kept features inside the known reason; nothing where none is known.
    """
    import torch

    from rekd_train.evaluation.agreement import human_figures

    known = [] if split.truth is None else [row for row, truth in enumerate(split.truth) if truth is not None]
    known = [row for row in known if split.truth[row].any()]
    if not known:
        return {}, not_applicable(NAME, "the data name no reasons", limit=0.0)
    generator = np.random.default_rng(seed)
    mask = chosen.mask & features.selectable
    random = random_masks(mask, features.selectable, generator)
    scores = generator.random(chosen.scores.shape).astype(np.float32)
    selectable = torch.from_numpy(features.selectable)
    ours, theirs = (
        human_figures(features.preprocessor, split, torch.from_numpy(values), selectable, torch.from_numpy(kept))
        for values, kept in ((chosen.scores, mask), (scores, random))
    )
    figures: dict[str, Any] = {name: {**found, "random": theirs[name]} for name, found in ours.items()}
    inside = [_inside(each, split, known) for each in (mask, random)]
    gain = paired(inside[0] - inside[1])
    figures["share_inside"] = {"rationale": float(inside[0].mean()), "random": float(inside[1].mean()), "gain": gain}
    said = f"{inside[0].mean():.1%} of what is kept lies inside, above as many random features"
    return figures, better_check(NAME, gain, said)


def _inside(mask: np.ndarray, split: Split, known: list[int]) -> np.ndarray:
    """(known,) share of the kept features that lie in the reason; an empty rationale: 0."""
    shares = []
    for row in known:
        truth = split.truth[row]
        kept = mask[row, : len(truth)]
        shares.append((kept & truth).sum() / max(int(mask[row].sum()), 1))
    return np.array(shares)
