"""The decision rule: by hand, by specification and as it runs."""

import numpy as np
import pytest
import torch

from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, cut_margins, mask_by_specification
from rekd_train.models.base import apply_policy, kept_positions

POLICIES = [
    SelectionPolicy(bias=0.1, budget=0.25),
    SelectionPolicy(bias=None, budget=0.3, minimum=0),
    SelectionPolicy(bias=0.0, budget=0.15, minimum=0),
    SelectionPolicy(bias=-5.0, budget=0.2, minimum=3),
    SelectionPolicy(bias=0.5, budget=None, minimum=1),
    SelectionPolicy(bias=None, budget=None, minimum=0),
    SelectionPolicy(bias=-0.25, budget=1.0, minimum=2),
    SelectionPolicy(bias=0.0, budget=1e-6, minimum=0),
    PAPER_POLICY,
]


def random_cases(length: int, seed: int = 0, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties (rows, length), selectable positions with empty and full rows."""
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
def test_what_runs_is_what_is_specified(policy, length):
    scores, selectable = random_cases(length)
    np.testing.assert_array_equal(
        as_run(scores, selectable, policy), mask_by_specification(scores, selectable, policy)
    )


EVERYTHING = np.ones((1, 8), dtype=bool)


@pytest.mark.parametrize(
    ("policy", "scores", "kept"),
    [
        pytest.param(SelectionPolicy(bias=0.0, budget=0.5), [3, -1, 2, -1, 1, -1, 5, 4], [0, 2, 6, 7], id="budget"),
        pytest.param(SelectionPolicy(bias=0.0, budget=0.5), [3, -1, 2, -1, -1, -1, -1, -1], [0, 2], id="threshold"),
        pytest.param(SelectionPolicy(bias=-2.5, budget=0.5), [3, 0, 2, 0, 0, 0, 0, 0], [0], id="bias"),
        pytest.param(SelectionPolicy(bias=0.0, budget=0.25), [0] * 8, [0], id="zero is not above the threshold"),
        pytest.param(SelectionPolicy(bias=1.0, budget=0.25), [7] * 8, [0, 1], id="ties go to the lower index"),
        pytest.param(SelectionPolicy(bias=0.0, budget=0.25), [1, 2, 1, 1, 2, 2, 1, 1], [1, 4], id="ties at the cut"),
        pytest.param(SelectionPolicy(bias=0.0, budget=0.5, minimum=2), [-3, -1, -2] + [-9] * 5, [1, 2], id="minimum"),
        pytest.param(SelectionPolicy(bias=0.0, budget=0.01, minimum=0), [5] * 8, [], id="nothing is allowed"),
        pytest.param(SelectionPolicy(bias=0.0, budget=0.01, minimum=1), [5] * 8, [0], id="minimum beats budget"),
        pytest.param(SelectionPolicy(bias=None, budget=0.1, minimum=3), [-3, -1, -2] + [-9] * 5, [0, 1, 2], id="top-k"),
        pytest.param(PAPER_POLICY, [1, -1, 0, 1, 1, 1, 1, 1], [0, 3, 4, 5, 6, 7], id="paper"),
    ],
)
def test_by_hand(policy, scores, kept):
    scores = np.array([scores], dtype=np.float32)
    assert np.flatnonzero(as_run(scores, EVERYTHING, policy)).tolist() == kept
    assert np.flatnonzero(mask_by_specification(scores, EVERYTHING, policy)).tolist() == kept


def test_padding_and_specials_are_never_kept_nor_counted():
    selectable = np.array([[False, True, True, True, True, False, False, False]])
    scores = np.array([[9, 1, 2, 3, 4, 9, 9, 9]], dtype=np.float32)
    mask = as_run(scores, selectable, SelectionPolicy(bias=0.0, budget=0.5))
    assert np.flatnonzero(mask).tolist() == [3, 4], "half of 4 selectable positions is 2, not half of 8"


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_an_answer_does_not_depend_on_its_neighbours_or_on_padding(policy):
    scores, selectable = random_cases(17)
    together = as_run(scores, selectable, policy)
    padded = as_run(np.pad(scores, ((0, 0), (0, 6)), constant_values=99), np.pad(selectable, ((0, 0), (0, 6))), policy)
    np.testing.assert_array_equal(padded[:, :17], together)
    assert not padded[:, 17:].any()
    for row in range(5):
        alone = as_run(scores[row : row + 1], selectable[row : row + 1], policy)
        np.testing.assert_array_equal(alone[0], together[row])


def test_shares_are_integers_so_every_runtime_agrees():
    policy = SelectionPolicy(budget=0.29, minimum=0)
    assert int(0.29 * 100) == 28, "the trap: a product of floats"
    assert policy.limits(np.array([100, 99, 4, 3, 0])).tolist() == [29, 28, 1, 0, 0]
    assert policy.capacity(100) == 29


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_capacity_is_the_most_that_can_be_kept(policy):
    for features in (1, 7, 40, 158):
        limits = policy.limits(np.arange(features + 1))
        assert limits.max() <= policy.capacity(features) <= features
        assert (limits <= np.arange(features + 1)).all()
        assert policy.capacity(features) >= 1, "a graph without slots cannot be built"


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_kept_positions_lists_the_mask(policy):
    scores, selectable = random_cases(17)
    mask = torch.from_numpy(as_run(scores, selectable, policy))
    positions, kept = kept_positions(mask, policy.capacity(17))
    assert positions.shape == kept.shape == (len(mask), policy.capacity(17))
    assert positions.dtype == torch.int64 and kept.dtype == torch.bool
    for row in range(len(mask)):
        assert positions[row][kept[row]].tolist() == np.flatnonzero(mask[row]).tolist()
        assert (positions[row][~kept[row]] == 0).all()


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_decision_turns_where_its_score_crosses_the_margin_and_not_before(policy):
    generator = np.random.default_rng(4)
    scores = generator.normal(size=(40, 9)).astype(np.float32)
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


@pytest.mark.parametrize(
    ("policy", "scores", "margins"),
    [
        pytest.param(SelectionPolicy(bias=None, budget=0.5, minimum=0), [2, 1, 1, 0], [1, 0, 0, 1], id="tie"),
        pytest.param(SelectionPolicy(bias=0.0, budget=0.25, minimum=0), [5, 1e-7, -1e-7, -3], [5, 5, 5, 8],
                     id="outside the budget the threshold does not matter"),
        # kept: 4 and 3. They fall out when they drop to 1; 1 and -2 come in when they rise to 3
        pytest.param(SelectionPolicy(bias=None, budget=0.5, minimum=1), [4, 3, 1, -2], [3, 2, 2, 5], id="budget"),
        pytest.param(SelectionPolicy(bias=0.5, budget=None, minimum=0), [4, 3, 1, -2], [4.5, 3.5, 1.5, 1.5], id="bias"),
    ],
)  # fmt: skip
def test_margins_by_hand(policy, scores, margins):
    found = cut_margins(np.array([scores], dtype=np.float32), np.ones((1, 4), bool), policy)[0]
    assert found.tolist() == pytest.approx(margins)


def test_a_policy_refuses_what_makes_no_sense():
    for wrong in ({"budget": 0.0}, {"budget": 1.5}, {"minimum": -1}, {"selectable": "some"}, {"biass": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SelectionPolicy.model_validate(wrong)
