"""The decision rule: by hand, by specification and as it runs."""

import numpy as np
import pytest
import torch

from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, cut_margins, mask_by_specification
from rekd_train.models.base import apply_policy, kept_positions

POLICIES = [SelectionPolicy(bias=0.1, budget=0.25), SelectionPolicy(bias=None, budget=0.3, minimum=0),
            SelectionPolicy(bias=0.0, budget=0.15, minimum=0), SelectionPolicy(bias=-5.0, budget=0.2, minimum=3),
            SelectionPolicy(bias=0.5, budget=None, minimum=1), SelectionPolicy(bias=None, budget=None, minimum=0),
            SelectionPolicy(bias=-0.25, budget=1.0, minimum=2), SelectionPolicy(bias=0.0, budget=1e-6, minimum=0),
            PAPER_POLICY]  # fmt: skip


def random_cases(length: int, seed: int = 0, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed + length)
    scores = (generator.integers(-3, 4, (rows, length)) / 2).astype(np.float32)
    scores[::3] = generator.normal(size=(len(scores[::3]), length))
    selectable = generator.random((rows, length)) < generator.random((rows, 1))
    selectable[0], selectable[1] = False, True
    return scores, selectable


def as_run(scores: np.ndarray, selectable: np.ndarray, policy: SelectionPolicy) -> np.ndarray:
    capacity = policy.capacity(scores.shape[1])
    return apply_policy(torch.from_numpy(scores), torch.from_numpy(selectable), policy, capacity).numpy()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 40])
def test_what_runs_is_what_is_specified_row_by_row_and_lists_its_positions(policy, length):
    """So neither neighbours in the batch nor padding count, which the specification does not look at."""
    scores, selectable = random_cases(length)
    mask, capacity = as_run(scores, selectable, policy), policy.capacity(length)
    np.testing.assert_array_equal(mask, mask_by_specification(scores, selectable, policy))
    assert 1 <= capacity <= length, "a graph without slots cannot be built"
    positions, kept = kept_positions(torch.from_numpy(mask), capacity)
    assert positions.shape == kept.shape == (len(mask), capacity)
    assert positions.dtype == torch.int64 and kept.dtype == torch.bool and not positions[~kept].any()
    for row in range(len(mask)):
        assert positions[row][kept[row]].tolist() == np.flatnonzero(mask[row]).tolist()


EVERYTHING, SOME = [True] * 8, [False, True, True, True, True, False, False, False]


@pytest.mark.parametrize(("bias", "budget", "minimum", "selectable", "scores", "kept"), [
    pytest.param(0.0, 0.5, 1, EVERYTHING, [3, -1, 2, -1, 1, -1, 5, 4], [0, 2, 6, 7], id="budget"),
    pytest.param(0.0, 0.5, 1, EVERYTHING, [3, -1, 2, -1, -1, -1, -1, -1], [0, 2], id="threshold"),
    pytest.param(-2.5, 0.5, 1, EVERYTHING, [3, 0, 2, 0, 0, 0, 0, 0], [0], id="bias"),
    pytest.param(0.0, 0.25, 1, EVERYTHING, [0] * 8, [0], id="zero is not above the threshold"),
    pytest.param(1.0, 0.25, 1, EVERYTHING, [7] * 8, [0, 1], id="ties go to the lower index"),
    pytest.param(0.0, 0.25, 1, EVERYTHING, [1, 2, 1, 1, 2, 2, 1, 1], [1, 4], id="ties at the cut"),
    pytest.param(0.0, 0.5, 2, EVERYTHING, [-3, -1, -2, *[-9] * 5], [1, 2], id="minimum"),
    pytest.param(0.0, 0.01, 0, EVERYTHING, [5] * 8, [], id="nothing is allowed"),
    pytest.param(0.0, 0.01, 1, EVERYTHING, [5] * 8, [0], id="minimum beats budget"),
    pytest.param(None, 0.1, 3, EVERYTHING, [-3, -1, -2, *[-9] * 5], [0, 1, 2], id="top-k"),
    pytest.param(0.0, None, 0, EVERYTHING, [1, -1, 0, 1, 1, 1, 1, 1], [0, 3, 4, 5, 6, 7], id="no budget"),
    pytest.param(0.0, 0.5, 1, SOME, [9, 1, 2, 3, 4, 9, 9, 9], [3, 4], id="half of what is selectable, not of all"),
])  # fmt: skip
def test_by_hand(bias, budget, minimum, selectable, scores, kept):
    policy = SelectionPolicy(bias=bias, budget=budget, minimum=minimum)
    scores, selectable = np.array([scores], dtype=np.float32), np.array([selectable])
    for decide in (as_run, mask_by_specification):
        assert np.flatnonzero(decide(scores, selectable, policy)).tolist() == kept


def test_shares_are_integers_and_a_policy_refuses_what_makes_no_sense():
    policy = SelectionPolicy(budget=0.29, minimum=0)
    assert int(0.29 * 100) == 28, "the trap: a product of floats"
    assert policy.limits(np.array([100, 99, 4, 3, 0])).tolist() == [29, 28, 1, 0, 0]
    assert policy.capacity(100) == 29
    for wrong in ({"budget": 0.0}, {"budget": 1.5}, {"minimum": -1}, {"selectable": "some"}, {"biass": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SelectionPolicy.model_validate(wrong)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_decision_turns_where_its_score_crosses_the_margin_and_not_before(policy):
    generator = np.random.default_rng(4)
    scores = generator.normal(size=(40, 9)).astype(np.float32)
    scores[::4] = scores[::4].round()  # with ties, whose margin may be 0
    selectable = generator.random((40, 9)) < 0.8
    decided = mask_by_specification(scores, selectable, policy)
    margins = cut_margins(scores, selectable, policy)
    assert np.isinf(margins[~selectable]).all()
    def turns(row: int, position: int, score: float) -> bool:
        moved = scores[row : row + 1].copy()
        moved[0, position] = score
        again = mask_by_specification(moved, selectable[row : row + 1], policy)
        return again[0, position] != decided[row, position]
    for row, position in np.argwhere(selectable):
        score, margin = scores[row, position], margins[row, position]
        away = -1 if decided[row, position] else 1
        if np.isinf(margin):
            assert not turns(row, position, away * 99), "no score whatever would turn it"
        else:
            assert turns(row, position, score + away * (margin + 1e-4))
            assert not any(turns(row, position, score + sign * 0.98 * margin) for sign in (-1, 1))
