"""The loop of every stage: devices and batches, its optimiser, its logs, the state that is kept, and when it stops."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_bilstm, make_rationalizer
from toys import Recorder, fitted, toy_config, toy_texts

from rekd_train.config.run import OptimisationConfig
from rekd_train.errors import ConfigError, MissingExtraError, TrainingError
from rekd_train.models.base import Predictor
from rekd_train.training.loop import Watch, optimiser_for, word_tables
from rekd_train.training.runtime import Batches, Runtime
from rekd_train.training.state import Best, JsonLines, Several, StateStore, TensorBoard

FIRST_STAGE = {"classifier_epochs": 1, "rationale_epochs": 0, "compact_epochs": 0}
every_family = pytest.mark.parametrize("make", [make_rationalizer, make_bilstm])


def first_stage(made=None, optimisation=None, options=(), **stages):
    return fitted(made, options=options, optimisation=optimisation or {}, stages=FIRST_STAGE | stages)


# devices and batches


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_batches_go_to_the_device_and_one_that_is_not_there_is_named(device):
    array = np.arange(6).reshape(2, 3)
    assert Runtime("meta").to_device(array).device.type == "meta"
    assert torch.equal(Runtime("cpu").to_device(array), torch.arange(6).reshape(2, 3))
    with pytest.raises(ConfigError, match=f"there is no device '{device}' here"):
        Runtime(device)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_chosen_only_where_the_gpu_computes_in_it(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: enabled)
    runtime = Runtime("cpu")
    assert [runtime.autocast(precision) for precision in ("auto", "bf16", "fp32")] == [False, True, False]
    runtime.device = torch.device("cuda")
    assert [runtime.autocast(precision) for precision in ("auto", "bf16", "fp32")] == [native, True, False]


def test_training_in_bf16_needs_no_float64_on_the_device(monkeypatch):
    """Apple's GPUs have none."""
    monkeypatch.setattr(torch.Tensor, "double", None)
    stages = {"classifier_epochs": 0.5, "rationale_epochs": 1, "compact_epochs": 0.5, "evaluate_every": 0.25}
    pair, _ = fitted(toy_texts(examples=64), stages=stages, acceleration={"precision": "bf16"})
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in pair.parameters())


def test_batches_of_similar_length_hold_less_padding():
    (_, train, _), computed = toy_texts(examples=600), {}
    for buckets in (True, False):
        config = toy_config(optimisation={"batch_size": 20}, acceleration={"length_buckets": buckets})
        batches = list(Batches(config, train, 30, 1, Runtime("cpu")).starting_at(0))
        assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(600))
        computed[buckets] = sum(batch.inputs["input_ids"].numel() for batch in batches)
    assert computed[True] < 0.9 * computed[False]


# the optimiser


@every_family
def test_word_embeddings_have_their_own_rate_and_vectors_do_not_decay(make):
    def groups(**settings) -> dict[int, dict]:
        """The optimiser's group of each trained parameter, by the parameter's id."""
        optimiser = optimiser_for(pair, OptimisationConfig(learning_rate=1e-3, weight_decay=0.1, **settings), pair)
        return {id(parameter): group for group in optimiser.param_groups for parameter in group["params"]}

    pair = make()
    tables = [pair.selector.backbone.table.weight, pair.predictor.backbone.table.weight]
    assert [id(table) for table in word_tables(pair)] == [id(table) for table in tables]
    found = groups(embedding_learning_rate=1e-5, betas=(0.7, 0.8))
    for name, parameter in pair.named_parameters():
        group, word = found[id(parameter)], any(parameter is table for table in tables)
        decay = 0.0 if word or parameter.ndim == 1 else 0.1
        figures = group["lr"], group["weight_decay"], group["betas"], group["fused"]
        assert figures == (1e-5 if word else 1e-3, decay, (0.7, 0.8), True), name
    assert {group["lr"] for group in groups().values()} == {1e-3}
    assert {group["weight_decay"] for group in groups(decay_everything=True).values()} == {0.1}
    found = groups(selector_learning_rate=2e-3, head_learning_rate=3e-3, embedding_learning_rate=1e-5)
    for name, parameter in pair.named_parameters():
        own = 3e-3 if "head" in name else 2e-3 if name.startswith("selector") else 1e-3
        word = any(parameter is table for table in tables)
        assert found[id(parameter)]["lr"] == (1e-5 if word else own), name
    head = Predictor(pair.selector.backbone, 2)  # as a stage's own, which is thrown away
    rates = {id(each): group["lr"] for group in optimiser_for(
        head, OptimisationConfig(learning_rate=1e-5, selector_learning_rate=2e-3), pair).param_groups
        for each in group["params"]}  # fmt: skip
    assert {*rates.values()} == {2e-3}, "it learns as fast as the selector that it is over"
    tables[0].requires_grad_(False)
    assert id(tables[0]) not in groups(), "what is frozen is not optimised"


@pytest.mark.parametrize(("schedule", "warmup", "expected"), [
    ("constant", 0.0, [1e-3, 1e-3]),
    ("linear", 0.0, [1e-3 * 21 / 41, 1e-3 / 41]),
    ("constant", 0.8, [1e-3 * 20 / 41 / 0.8, 1e-3]),
])  # fmt: skip
def test_the_rate_is_constant_or_decays_after_a_warm_up(schedule, warmup, expected):
    """Read twice in a stage of 40 steps."""
    optimisation = {"schedule": schedule, "warmup": warmup, "learning_rate": 1e-3}
    _, seen = first_stage(optimisation=optimisation, classifier_epochs=5)
    assert [values["learning_rate"] for values in seen.values["classifier"]] == pytest.approx(expected)


def test_a_gradient_is_clipped_only_if_a_limit_is_set():
    weights, norms = [], []
    for clip in (None, 1e-6, 1e6):
        pair, seen = first_stage(optimisation={"gradient_clip": clip, "weight_decay": 0.0})
        weights.append(torch.cat([parameter.detach().flatten() for parameter in pair.predictor.parameters()]))
        norms.append(["gradient_norm" in values for values in seen.values["classifier"]])
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1], atol=1e-4)
    assert not any(norms[0]) and all(norms[1])


@every_family
def test_the_selector_s_words_can_be_frozen(make):
    (_, *splits), pair = toy_texts(), make(operator="zero")
    table, before = pair.selector.backbone.table.weight, pair.selector.backbone.table.weight.clone()
    for frozen in (True, False):
        optimisation = {"freeze_selector_embeddings": frozen}
        first_stage((pair, *splits), optimisation=optimisation, classifier_epochs=0, rationale_epochs=1)
        assert torch.equal(table, before) == frozen and table.requires_grad


# logs


def tell(observer):
    observer.stage("rationale", 3, start=1)
    observer.step({})
    observer.step({"loss": 0.5, "selection_rate": 0.1})
    observer.evaluated({"accuracy": 0.75, "best": 1.0})


def test_json_lines_are_appended_one_object_each_behind_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    tell(JsonLines(path))
    with open(path, "a") as file:
        file.write('{"event": "step", "stage": "ratio')  # killed while it wrote
    tell(Several([JsonLines(path), JsonLines(tmp_path / "other")]))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("time") > 1e9 for line in lines)
    assert lines == 2 * [
        {"event": "stage", "stage": "rationale", "step": 1, "steps": 3},
        {"event": "step", "stage": "rationale", "step": 3, "loss": 0.5, "selection_rate": 0.1},
        {"event": "evaluation", "stage": "rationale", "step": 3, "accuracy": 0.75, "best": 1.0},
    ]
    assert len((tmp_path / "other").read_text().splitlines()) == 3
    log = JsonLines(Path("/dev/null"))
    log._path = Path("/dev/full")
    with pytest.raises(TrainingError, match=r"/dev/full cannot be written \(.*No space left.*--resume"):
        log.stage("rationale", 3)


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtraError, match=r"\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_tensorboard_gets_scalars_by_stage(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tell(TensorBoard(tmp_path))
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    figures = ("loss", "selection_rate", "dev/accuracy", "dev/best")
    assert set(events.Tags()["scalars"]) == {f"rationale/{name}" for name in figures}
    (event,) = events.Scalars("rationale/loss")
    assert (event.step, event.value) == (3, 0.5)


# the best state


@pytest.mark.parametrize(("metric", "values", "better"), [
    # of (accuracy, macro-F1, L_RE); the loss decides between equals
    ("accuracy", [(0.5, 0.5, 1), (0.6, 0.5, 2), (0.6, 0.6, 2), (0.6, 0.6, 1.9), (0.5, 0.6, 1.8)], "++-+-"),
    ("macro_f1", [(0.5, 0.5, 1), (0.6, 0.5, 2), (0.6, 0.6, 2), (0.6, 0.6, 1.9), (0.5, 0.6, 1.8)], "+-+++"),
    # the paper's rounds and lets the later of equals win
    ("extraction_loss", [(0, 0, 0.5004), (0, 0, 0.5001), (0, 0, 0.5012), (0, 0, 0.4996)], "++-+"),
    ("extraction_loss", [(0, 0, float("nan")), (0, 0, 0.3)], "-+"),
    ("a classifier's", [(0, 0, 0.5001), (0, 0, 0.5004), (0, 0, 0.5001)], "+-+"),  # not rounded
])  # fmt: skip
def test_the_configured_metric_decides_which_state_is_better_than_all_before(metric, values, better):
    best, more = (Best("extraction_loss"), {}) if "'" in metric else (Best(metric), {"selection_rate": 0.1})
    names = "accuracy", "macro_f1", "extraction_loss"
    found = [best.offer(i, dict(zip(names, each, strict=True)) | more, {}) for i, each in enumerate(values)]
    assert found == [sign == "+" for sign in better]


def test_the_best_state_by_dev_is_kept():
    class Witness(Recorder):
        """Remembers the weights at each evaluation."""

        def evaluated(self, values):
            super().evaluated(values)
            weights.append([p.detach().clone() for p in pair.predictor.parameters()])
            if len(weights) == 5:
                with torch.no_grad():
                    pair.predictor.head[-1].weight.neg_()  # the last epoch starts badly

    (pair, train, dev), weights = toy_texts(), []
    _, log = first_stage((pair, train, dev), options={"observer": Witness()}, classifier_epochs=6, evaluate_every=1)
    ranks = [(figures["accuracy"], -figures["extraction_loss"]) for figures in log.evaluations["classifier"]]
    best = ranks.index(max(ranks))
    assert best < 5, "the last state is not the best: otherwise this shows nothing"
    assert all(torch.equal(a, b) for a, b in zip(weights[best], pair.predictor.parameters(), strict=True))
    firsts = [figures["best"] for figures in log.evaluations["classifier"]]
    assert firsts == [float(rank > max(ranks[:i], default=(-1, 0))) for i, rank in enumerate(ranks)]


# when it stops


def test_patience_ends_a_stage():
    _, log = first_stage(optimisation={"learning_rate": 1e-9}, classifier_epochs=40, evaluate_every=1, patience=2)
    found = [figures["best"] for figures in log.evaluations["classifier"]]
    assert len(found) < 40 and found[-2:] == [0.0, 0.0]


class Breaks(Recorder):
    """The last step of a stage breaks the weights after its reading."""

    def step(self, values):
        if values:
            self.pair.predictor.head[-1].bias.data.fill_(float("inf"))


@pytest.mark.parametrize(("broken", "stages", "match"), [
    (float("nan"), {}, r"diverged, loss is nan at step 8; fix: a lower optimisation\.learning_rate"),
    # dev is measured, and patience ends the stage, before the first reading of the loss
    (float("nan"), {"evaluate_every": 0.25, "patience": 1}, "diverged, loss on dev is nan at step 2"),
    (0.0, {}, "diverged, the weights' norm is nan at step 8; fix"),
])  # fmt: skip
def test_a_diverged_run_stops_and_saves_nothing(broken, stages, match, tmp_path):
    made, store, observer = toy_texts(), StateStore(tmp_path, {}), Recorder() if broken else Breaks()
    observer.pair = made[0]
    observer.pair.predictor.head[-1].bias.data.fill_(broken)
    with pytest.raises(TrainingError, match=f"classifier: {match}"):
        first_stage(made, options={"store": store, "observer": observer}, **stages)
    assert not store.path.exists()


@pytest.mark.parametrize(("logit", "words"), [(30.0, "larger selection.weight"), (-30.0, "smaller selection.weight")])
def test_a_collapsed_run_stops(logit, words):
    made = toy_texts()
    with torch.no_grad():
        made[0].selector.head[-1].bias.copy_(torch.tensor([-logit, logit]))
    stages = {"classifier_epochs": 0, "rationale_epochs": 20, "collapse_window": 40}
    with pytest.raises(TrainingError, match=f"collapsed, the selector keeps .*{words}"):
        first_stage(made, optimisation={"learning_rate": 1e-6}, **stages)


@pytest.mark.parametrize(("rates", "target", "fix"), [
    ([0.1, 0.0, 0.0, 0.0], 0.1, "smaller"), ([0.1, 0.004, 0.004, 0.004], 0.1, "smaller"),
    ([0.1, 0.96, 0.96, 0.96], 0.1, "larger"), ([0.1, 1.0, 1.0, 1.0], 0.1, "larger"),
    ([1.0, 1.0, 0.5, 0.0, 0.0, 0.02, 0.0, 0.0, 0.1, 0.09], 0.1, ""), ([1.0] * 9, 0.95, ""), ([], 0.1, ""),
])  # fmt: skip
def test_a_whole_window_of_nothing_or_everything_is_a_collapse_and_a_way_through_them_is_none(rates, target, fix):
    config = toy_config(selection={"target": target, "budget": None}, stages={"collapse_window": 60})
    watch = Watch("rationale", config, 20)
    for reading, rate in enumerate(rates[:-1] if fix else rates, 1):
        watch.judge(20 * reading, {"selection_rate": rate})
    assert watch.healthy != bool(fix)
    if fix:
        said = f"collapsed, the selector keeps {rates[-1]:.2%}.*at step 80 .target 10.00%.; fix: a {fix} selection.wei"
        with pytest.raises(TrainingError, match=said):
            watch.judge(80, {"selection_rate": rates[-1]})
    with pytest.raises(TrainingError, match=r"rationale: diverged, penalty is inf at step 40; fix:"):
        watch.judge(40, {"loss": 1.0, "penalty": float("inf")})
