"""Divergence and collapse are noticed, and only they."""

import pytest
from toys import toy_config

from rekd_train.errors import TrainingError
from rekd_train.training.watch import Watch


def watch(target: float = 0.1, **options) -> Watch:
    config = toy_config(selection={"target": target, "budget": None}, stages={"collapse_window": 60})
    return Watch("rationale", config, 20, **options)


@pytest.mark.parametrize("figures", [{"loss": float("nan")}, {"loss": 1.0, "penalty": float("inf")}])
def test_what_is_not_finite_ends_the_run(figures):
    with pytest.raises(TrainingError, match=r"rationale: diverged, (loss is nan|penalty is inf) at step 40; fix:"):
        watch().judge(40, figures)


@pytest.mark.parametrize("rate", [0.0, 0.004, 0.96, 1.0])
def test_a_whole_window_of_nothing_or_everything_ends_the_run(rate):
    judge = watch()
    for step in (20, 40):
        judge.judge(step, {"rate": rate})
        assert not judge.healthy
    with pytest.raises(TrainingError, match="collapsed.*target 10.00%.*fix:"):
        judge.judge(60, {"rate": rate})


def test_a_way_through_the_extremes_is_no_collapse():
    judge = watch()
    for step, rate in enumerate([1.0, 1.0, 0.5, 0.0, 0.0, 0.02, 0.0, 0.0, 0.1, 0.09]):
        judge.judge(20 * step, {"rate": rate})
    assert judge.healthy


def test_a_target_of_nearly_everything_may_keep_everything():
    judge = watch(target=0.95)
    for step in range(9):
        judge.judge(20 * step, {"rate": 1.0})


def test_a_resumed_watch_remembers():
    first = watch()
    for step in (20, 40):
        first.judge(step, {"rate": 0.0})
    with pytest.raises(TrainingError, match="collapsed"):
        watch(rates=first.rates).judge(60, {"rate": 0.0})
