"""Interleaved timing: every way has its turn, a drifting machine changes no ratio."""

import numpy as np
import pytest

from rekd_deploy.bench.variants import COMPACTED, PYTORCH, Timings, in_rounds, percentiles
from rekd_deploy.bench.variants_torch import BOTH, Networks, pytorch_runnables
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.runtimes.base import RunnerChain
from rekd_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from rekd_train.errors import ConfigError


class Machine:
    """A clock that only work moves, on a machine that grows slower."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[tuple[str, int]] = []

    def way(self, name: str, seconds: float):
        def work(turn: int) -> None:
            self.order.append((name, turn))
            self.now += seconds * (1 + turn)

        return work


def test_a_machine_that_slows_down_changes_no_ratio():
    machine = Machine()
    ways = {"fast": machine.way("fast", 0.001), "slow": machine.way("slow", 0.004)}
    timings = in_rounds(ways, rounds=9, clock=lambda: machine.now)
    assert percentiles(timings.milliseconds["fast"])["p50"] == pytest.approx(5.0)
    found = timings.ratio("fast", "slow")
    assert found == pytest.approx({"ratio": 0.25, "low": 0.25, "high": 0.25})


def test_the_order_turns_and_every_way_runs_once_a_round():
    machine = Machine()
    in_rounds({name: machine.way(name, 1.0) for name in "abc"}, rounds=3, clock=lambda: machine.now)
    timed = machine.order[3:]  # the first three warm up
    assert timed == [("a", 0), ("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 1), ("c", 2), ("a", 2), ("b", 2)]


def test_each_way_warms_up_for_its_time():
    machine = Machine()
    in_rounds({"a": machine.way("a", 0.5)}, rounds=3, warmup_seconds=2.0, clock=lambda: machine.now)
    assert len(machine.order) == 4 + 3


def test_the_interval_holds_the_spread_of_the_rounds():
    generator = np.random.default_rng(0)
    noise = generator.lognormal(0.0, 0.3, size=41)
    found = Timings({"a": 2.0 * noise, "b": np.ones(41)}).ratio("a", "b")
    assert found["low"] < 2.0 < found["high"] and found["low"] <= found["ratio"] <= found["high"]


def test_two_rounds_are_refused():
    with pytest.raises(ConfigError, match="2 rounds"):
        in_rounds({"a": lambda turn: None}, rounds=2)


def test_graphs_and_modules_answer_alike(rationalizer, artefacts, texts):
    inputs = dict(rationalizer.preprocessor(texts[:3]).inputs)
    signature = pair_signature(rationalizer)
    (eager,), _ = pytorch_runnables(Networks(COMPACTED, rationalizer.eval(), BOTH), [inputs], "cpu", [PYTORCH])
    selector = OnnxRuntimeRunner(artefacts.selector, signature.selector, "selector")
    predictor = OnnxRuntimeRunner(artefacts.predictor, signature.predictor, "predictor")
    with RunnerChain([selector, predictor]) as chain:
        found = chain.run(inputs)
    np.testing.assert_allclose(found["logits"], eager(0), atol=1e-5)
