"""Graphs with fixed buffers: the same answers, nothing copied between the steps. On a CPU; GPUs run the same code."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
from families import assert_same_answers

from rekd_deploy.bench import variants_graphs
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import EngineError
from rekd_deploy.repository import reader
from rekd_deploy.runtimes import onnxruntime_device
from rekd_deploy.runtimes.base import Graph, parse_device
from rekd_deploy.runtimes.onnxruntime_device import DeviceChain, chain_on


@pytest.fixture(scope="module")
def graphs(artefacts):
    return [Graph(path, artefacts.signature.graph(role), role) for role, path in artefacts.graphs.items()]


@pytest.fixture(scope="module")
def plain(graphs):
    with chain_on(graphs) as chain:
        yield chain.run


@pytest.fixture
def encoded(rationalizer, texts):
    return lambda count: dict(rationalizer.preprocessor((texts * 3)[:count]).inputs)


@pytest.mark.parametrize("batches", [(), (1, 4, 8)], ids=["every size", "buckets"])
def test_answers_are_those_of_plain_sessions(graphs, plain, encoded, batches):
    with DeviceChain(graphs, device="cpu", batches=batches) as chain:
        rows = [[0], [0, 1, 2], [0, 1, 2, 3, 4], [4, 3, 2], [2]]  # shapes come back, their buffers hold other rows then
        requests = [{name: array[chosen] for name, array in encoded(5).items()} for chosen in rows]
        for found, expected in zip([chain.run(inputs) for inputs in requests], map(plain, requests), strict=True):
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], atol=1e-5 * (found[name].dtype == np.float32))
        assert {dict(key)["batch"] for key in chain._shapes} == ({*batches} or {1, 3, 5})


def test_threads_share_a_chain_steps_read_where_the_last_wrote_and_mistakes_are_named(
    graphs, plain, encoded, monkeypatch):
    requests = [{name: array[row : row + 1] for name, array in encoded(5).items()} for row in range(5)]
    expected = [plain(inputs)["logits"] for inputs in requests]
    with DeviceChain(graphs, device="cpu") as chain, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda turn: chain.run(requests[turn % 5])["logits"], range(400)))
    for turn, logits in enumerate(found):
        np.testing.assert_allclose(logits, expected[turn % 5], atol=1e-5)
    with DeviceChain(graphs, device="cpu", batches=(4,)) as chain:
        chain.run(encoded(3))
        (shape,) = chain._shapes.values()
        bound = {name: shape.buffers[name].data_ptr() for name in ("positions", "kept")}
        chain.run({name: array[:2] for name, array in encoded(3).items()})
        assert list(chain._shapes.values()) == [shape]  # 2 and 3 share the bucket
        assert {name: shape.buffers[name].data_ptr() for name in bound} == bound
    monkeypatch.setattr(onnxruntime_device, "_MOST_SHAPES", 2)
    with DeviceChain(graphs, device="cpu") as chain:
        for count in (1, 2, 1, 3):
            chain.run(encoded(count))
        assert [dict(key)["batch"] for key in chain._shapes] == [1, 3]
    with pytest.raises(EngineError, match="with"):
        DeviceChain(graphs, device="cpu").run(encoded(1))
    with DeviceChain(graphs, device="cpu", batches=(1, 2)) as chain:
        with pytest.raises(EngineError, match="3 is above the largest bucket, 2"):
            chain.run(encoded(3))
        with pytest.raises(EngineError, match="'attention_mask' is missing"):
            chain.run({"input_ids": encoded(1)["input_ids"]})
    assert [parse_device(name) for name in ("cpu", "cuda", "cuda:3")] == [("cpu", 0), ("cuda", 0), ("cuda", 3)]
    for name in ("gpu", "cuda:x", "cuda:²", "cuda:", "cpu:1", "cpu:", ""):
        with pytest.raises(EngineError, match=f"'{name}'"):
            DeviceChain(graphs, device=name)


def test_what_is_not_captured_is_not_timed_as_captured(repository, monkeypatch):
    class OnCpu(DeviceChain):
        def __init__(self, graphs, *, device, captured):
            super().__init__(graphs, device="cpu")
            self.uncaptured = {graphs[0].name: "its LSTM copies"} if captured else {}
    monkeypatch.setattr(variants_graphs, "DeviceChain", OnCpu)
    with ExitStack() as stack:
        loaded = variants_graphs.Loaded(stack, "cuda", None)
        loaded.add_repository(repository)
        assert {form.runtime for form in loaded.variants} == {"ONNX Runtime CUDA"}
        assert [each.reason for each in loaded.not_run] == ["not captured: its LSTM copies"] * 2


def test_a_pipeline_on_a_device_answers_as_on_the_cpu_and_fills_its_batches(repository, texts, monkeypatch):
    """A batch of every length by itself would be filled up with rows of nothing."""
    seen = []
    class OnCpu(DeviceChain):
        def __init__(self, graphs, **options):
            seen.append((options["device"], sorted(options["batches"]), sorted(options["outputs"])))
            super().__init__(graphs, **options | {"device": "cpu"})
        def run(self, inputs):
            seen.append(inputs["input_ids"].shape)
            return super().run(inputs)
    monkeypatch.setattr(reader, "DeviceChain", OnCpu)
    many = [text for number in (40, 2, 20, 3, 30) for text in ("good " * number, *texts[:1])]
    with Pipeline(repository) as plain, Pipeline(repository, device="cuda:1") as pipeline:
        assert plain._filled_to == [] and pipeline._filled_to == [1, 8, 16, 32, 64]
        assert_same_answers(pipeline.predict(many), plain.predict(many))
        assert_same_answers(pipeline.predict(texts), plain.predict(texts))
    assert seen == [("cuda:1", [1, 8, 16, 32, 64], ["mask", "probabilities", "scores"]), (10, 48), (5, 48)]
    with pytest.raises(EngineError, match="GPUs alone"):
        Pipeline(repository, device="cpu", engine=True)
