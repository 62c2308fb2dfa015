"""The real Triton on images and on a predictor that blanks: the models' answers, and malformed requests."""

from __future__ import annotations

import http.client
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import grpc
import malformed
import numpy as np
import pytest
from families import KINDS, LIBRARIES, assert_same_answers, some_images
from malformed import Request, Tensor, as_bytes, written
from PIL import Image

from rekd_deploy.client.client import Client
from rekd_deploy.client.transport import open_transport
from rekd_deploy.export.graphs import export
from rekd_deploy.repository.config import ENSEMBLE, SINGLE
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.server import TritonServer
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.triton

OUTPUTS = ("scores", "mask", "logits", "probabilities")
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION,
}
"""What a status from 400 to 499 is in gRPC."""


@pytest.fixture(scope="module", params=["vit", "bert-paper", "modernbert"])
def served(wheel, request, tmp_path_factory):
    """A model and a server with its ensemble, its single graph and its text or image endpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    model = (KINDS | LIBRARIES)[request.param]()
    artefacts = export(save(model, folder / "checkpoint"), folder, single_graph=True)
    root = write_repository(artefacts, folder / "repository", text_endpoint=True)
    with TritonServer(root, 0, 0, 0, log_file=folder / "log") as server:
        yield model, server


@pytest.fixture
def kind(served):
    return served[0].preprocessor.settings.kind


@pytest.fixture
def items(kind, texts):
    return some_images(70, height=20, width=15) if kind == "image" else texts * 14


@pytest.fixture
def good(kind):
    """A request of tensors and one of bytes."""
    if kind == "text":
        ids = np.array([[2, 9, 10, 11, 3], [2, 12, 9, 14, 3]], np.int64)
        tensors = (Tensor.of("input_ids", ids), Tensor.of("attention_mask", np.ones_like(ids)))
        content = b"A good film and a bad plot"
    else:
        tensors = (Tensor.of("pixels", np.stack(some_images(2))[..., None]),)
        content = written(Image.fromarray(some_images(1)[0]), "JPEG")
    return Request("rekd", tensors), Request(f"rekd_{kind}", (Tensor(kind, "BYTES", (1, 1), as_bytes(content)),))


@pytest.mark.parametrize("name", [ENSEMBLE, SINGLE])
@pytest.mark.parametrize("protocol", ["grpc_url", "http_url"])
def test_answers_are_the_models(served, items, name, protocol):
    model, server = served
    with Client(getattr(server, protocol), model=name) as client:
        assert_same_answers(client.predict(items), model.predict(items))


def test_every_subset_of_the_outputs(served, items):
    model, server = served
    inputs = model.preprocessor(items[:2]).inputs
    with closing(open_transport(server.grpc_url, 10.0)) as transport:
        whole = transport.submit(ENSEMBLE, inputs, OUTPUTS).result()
        for names in itertools.chain(*(itertools.combinations(OUTPUTS, count) for count in range(1, 5))):
            part = transport.submit(ENSEMBLE, inputs, names).result()
            assert list(part) == list(names)
            for name in names:
                np.testing.assert_array_equal(part[name], whole[name])


def test_the_text_and_image_endpoint(served, kind, items):
    """Over HTTP, as a thin client would use it."""
    from tritonclient.http import InferenceServerClient, InferInput

    model, server = served
    contents = [written(Image.fromarray(i), "PNG") if kind == "image" else i.encode() for i in items[:5]]
    tensor = InferInput(kind, [len(contents), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[content] for content in contents], dtype=object))
    with InferenceServerClient(server.http_url.removeprefix("http://")) as client:
        response = client.infer(f"rekd_{kind}", [tensor])
    outputs = {name: response.as_numpy(name) for name in ("label", "rationale", "probabilities", "truncated")}
    for row, wanted in enumerate(model.predict(items[:5])):
        assert outputs["label"][row, 0].decode() == wanted.label
        np.testing.assert_allclose(outputs["probabilities"][row], [*wanted.probabilities.values()], atol=1e-4)
        assert bool(outputs["truncated"][row, 0]) == wanted.truncated
        for part, other in zip(json.loads(outputs["rationale"][row, 0]), wanted.rationale, strict=True):
            exact = json.loads(json.dumps(vars(other)))
            assert part | {"score": 0} == exact | {"score": 0} and abs(part["score"] - exact["score"]) <= 1e-4


# requests that no server should answer


def bad_requests(kind, tensors, content):
    """Everything that is wrong with one of the good requests."""
    yield from malformed.general_changes(tensors)
    yield from malformed.general_changes(content)
    if kind == "text":
        yield from malformed.token_changes(tensors, 94, 48)
        yield from malformed.byte_changes(content, malformed.bad_texts())
    else:
        for size in ((16, 13, 1), (16, 12, 3), (12, 16, 1)):
            yield tensors.changed(f"size {size} of", shape=(2, *size), content=bytes(2 * int(np.prod(size))))
        yield from malformed.byte_changes(content, malformed.bad_images())


@pytest.fixture
def wire(served):
    """Requests as they are, over gRPC and HTTP, without a client that would refuse to send them."""
    with grpc.insecure_channel(served[1].grpc_url) as channel:
        yield Wire(channel, served[1].http_url.removeprefix("http://"))


class Wire:
    def __init__(self, channel, address):
        from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

        self._stub, self._address = GRPCInferenceServiceStub(channel), address

    def respond(self, request):
        """Bytes of every output by name."""
        response = self._stub.ModelInfer(request.grpc(), timeout=20)
        return dict(zip([each.name for each in response.outputs], response.raw_output_contents, strict=True))

    def grpc_refusal(self, request):
        """Code and reason of a refusal; a bad request that is answered fails the test."""
        try:
            response = self._stub.ModelInfer(request.grpc(), timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details()
        pytest.fail(f"gRPC answered {request.note}: {response.outputs}")

    def http_refusal(self, request):
        """Status and reason of a refusal."""
        with closing(http.client.HTTPConnection(self._address, timeout=20)) as connection:
            connection.request("POST", *request.http())
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}").get("error", "")


def test_malformed_requests_among_good_ones(wire, kind, good):
    bad = list(bad_requests(kind, *good))
    wrong, number = [], itertools.cycle(range(len(good)))
    expected = [wire.respond(each) for each in good]
    with ThreadPoolExecutor(5) as pool:
        for request in bad:
            """Both ways at once, good ones right before, between and after: they may share a batch."""
            index = next(number)
            ways = (wire.respond, wire.grpc_refusal, wire.respond, wire.http_refusal, wire.respond)
            requests = (good[index], request, good[index], request, good[index])
            futures = [pool.submit(send, each) for send, each in zip(ways, requests, strict=True)]
            for future in futures[::2]:
                assert_same(future.result(), expected[index], request.note)
            (code, detail), (status, reason) = futures[1].result(), futures[3].result()
            if code not in REFUSALS or not detail or not 400 <= status <= 499 or not reason:
                wrong.append((request.model, request.note, code, detail, status, reason))
    assert not wrong, wrong
    assert len(bad) > 50


def assert_same(outputs, expected, note):
    assert outputs.keys() == expected.keys(), note
    for name, content in outputs.items():
        if name in ("scores", "logits", "probabilities", "rate"):
            numbers, others = np.frombuffer(content, np.float32), np.frombuffer(expected[name], np.float32)
            np.testing.assert_allclose(numbers, others, atol=1e-6, err_msg=note)
        elif name != "rationale":  # its scores are written out
            assert content == expected[name], note


def test_a_bad_row_is_named_and_other_requests_of_its_batch_are_answered(wire, kind, good):
    content = good[1]
    element = as_bytes(b"\xff\xfe" if kind == "text" else b"\xff\xd8 no JPEG")
    bad = content.changed("a bad row of", shape=(2, 1), content=content.tensors[0].content + element)
    expected = wire.respond(content)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(wire.respond, content) for _ in range(10)]
        code, detail = wire.grpc_refusal(bad)
        assert code is grpc.StatusCode.INVALID_ARGUMENT and f"{kind} 2 " in detail  # counted from 1
        for future in futures:
            assert_same(future.result(), expected, "beside a bad one")
