"""Over the wire, hundreds of malformed requests: each is refused with a reason, and good ones are answered."""

from __future__ import annotations

import http.client
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import malformed
import numpy as np
import pytest
from families import some_images
from malformed import Request, Tensor, as_bytes
from PIL import Image

from rekd_deploy.export.graphs import export
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.server import TritonServer
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.triton

REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION,
}
"""What a status from 400 to 499 is in gRPC."""
_PARSER = ("failed to parse the request JSON", "Unable to parse", "Unable to set")
"""How Triton 2.51's own parser of JSON begins; it calls what it cannot read an error of the server, 500."""


@pytest.fixture(scope="module", params=["text", "image"])
def served(wheel, request, artefacts, image_rationalizer, tmp_path_factory):
    """What is asked, a server with both ensembles and the single graph, and good requests to it."""
    folder = tmp_path_factory.mktemp("malformed")
    kind = request.param
    if kind == "image":
        (folder / "work").mkdir()
        artefacts = export(save(image_rationalizer, folder / "checkpoint"), folder / "work")
    root = write_repository(artefacts, folder / "repository", text_endpoint=True)
    with TritonServer(root, 0, 0, 0, log_file=folder / "log") as server:
        yield kind, server, good_requests(kind)


def good_requests(kind):
    """A request of tensors and a request of bytes."""
    if kind == "text":
        ids = np.array([[2, 9, 10, 11, 3], [2, 12, 9, 14, 3]], np.int64)
        tensors = (Tensor.of("input_ids", ids), Tensor.of("attention_mask", np.ones_like(ids)))
        raw = Tensor("text", "BYTES", (1, 1), as_bytes(b"A good film and a bad plot"))
    else:
        tensors = (Tensor.of("pixels", np.stack(some_images(2))[..., None]),)
        picture = malformed.written(Image.fromarray(some_images(1)[0]), "JPEG")
        raw = Tensor("image", "BYTES", (1, 1), as_bytes(picture))
    return Request("rekd", tensors), Request(f"rekd_{kind}", (raw,))


def bad_requests(kind):
    """Everything that is wrong with one of the good requests."""
    generator = np.random.default_rng(5)
    tensors, raw = good_requests(kind)
    yield from malformed.general_changes(tensors)
    yield from malformed.general_changes(raw)
    if kind == "text":
        yield from malformed.token_changes(tensors, 94, 48, generator)
        yield from malformed.byte_changes(raw, malformed.bad_texts(generator))
    else:
        for size in ((16, 13, 1), (15, 12, 1), (16, 12, 3), (12, 16, 1)):
            array = np.zeros((2, *size), np.uint8)
            yield tensors.changed(f"size {size} of", shape=array.shape, content=array.tobytes())
        yield from malformed.byte_changes(raw, malformed.bad_images(generator))


class Wire:
    """Requests as they are, over gRPC and HTTP, without a client that would refuse to send them."""

    def __init__(self, server):
        from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

        self._channel = grpc.insecure_channel(server.grpc_url)
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._address = server.http_url.removeprefix("http://")

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        self._channel.close()

    def answer(self, request):
        """Bytes of every output by name."""
        answer = self._stub.ModelInfer(request.grpc(), timeout=20)
        names = [output.name for output in answer.outputs]
        return dict(zip(names, answer.raw_output_contents, strict=True))

    def grpc_refusal(self, request):
        """Code and reason of a refusal; a bad request that is answered fails the test."""
        try:
            answer = self._stub.ModelInfer(request.grpc(), timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details()
        pytest.fail(f"gRPC answered {request.note}: {answer.outputs}")

    def post(self, path, body, headers):
        connection = http.client.HTTPConnection(self._address, timeout=20)
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"{}").get("error", "")
        finally:
            connection.close()

    def http_refusal(self, request):
        return self.post(*request.http())


def test_hundreds_of_malformed_requests_among_good_ones(served):
    kind, server, good = served
    bad = list(bad_requests(kind))
    with Wire(server) as wire, ThreadPoolExecutor(6) as pool:
        wanted = [wire.answer(each) for each in good]
        turn = itertools.cycle(range(len(good)))

        def one(request):
            """Both ways at once, good ones right before, between and after: they may share a batch."""
            number = next(turn)
            companions = [pool.submit(wire.answer, good[number])]
            refusals = [pool.submit(wire.grpc_refusal, request)]
            companions.append(pool.submit(wire.answer, good[number]))
            refusals.append(pool.submit(wire.http_refusal, request))
            companions.append(pool.submit(wire.answer, good[number]))
            for companion in companions:
                same(companion.result(), wanted[number], request.note)
            return [refusal.result() for refusal in refusals]

        wrong = []
        for request in bad:
            (code, detail), (status, reason) = one(request)
            if code not in REFUSALS or not detail:
                wrong.append((request.model, request.note, "gRPC", code, detail))
            if not 400 <= status <= 499 or not reason:
                wrong.append((request.model, request.note, "HTTP", status, reason))
        assert not wrong, wrong
    assert 2 * len(bad) >= 250, "both models together make more than 500"


def same(answer, wanted, note):
    assert answer.keys() == wanted.keys(), note
    for name, content in answer.items():
        if name in ("scores", "logits", "probabilities", "rate"):
            numbers, others = np.frombuffer(content, np.float32), np.frombuffer(wanted[name], np.float32)
            np.testing.assert_allclose(numbers, others, atol=1e-6, err_msg=note)
        elif name != "rationale":  # its scores are written out
            assert content == wanted[name], note


def test_bodies_that_are_cut_or_lie_about_their_parts(served):
    _, server, good = served
    with Wire(server) as wire:
        for request in good:
            wanted = wire.answer(request)
            for path, body, headers, note in malformed.wire_changes(request):
                status, reason = wire.post(path, body, headers)
                assert 400 <= status <= 499 and reason, (note, status, reason)
                same(wire.answer(request), wanted, note)


def test_documents_that_triton_itself_cannot_read(served):
    """No code of ours sees them: 500 is how this server's parser says that JSON is wrong. A reason it gives."""
    kind, server, (tensors, _) = served

    def document():
        if kind == "text":
            data = {"input_ids": [2, 9, 3], "attention_mask": [1, 1, 1]}
            return {"inputs": [{"name": n, "datatype": "INT64", "shape": [1, 3], "data": d} for n, d in data.items()]}
        return {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 16, 12, 1], "data": [7] * 192}]}

    with Wire(server) as wire:
        assert wire.post("/v2/models/rekd/infer", json.dumps(document()).encode(), {})[0] == 200
        wanted = wire.answer(tensors)
        for body, note in malformed.documents(document):
            status, reason = wire.post("/v2/models/rekd/infer", body, {})
            assert reason and (400 <= status <= 499 or (status == 500 and reason.startswith(_PARSER))), (note, reason)
        same(wire.answer(tensors), wanted, "after all of them")


def test_connections_that_break_off(served):
    _, server, good = served
    with Wire(server) as wire:
        wanted = [wire.answer(each) for each in good]
        for request, share in itertools.product(good, (0.0, 0.4, 0.9)):
            path, body, headers = request.http()
            connection = http.client.HTTPConnection(server.http_url.removeprefix("http://"), timeout=20)
            connection.putrequest("POST", path)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                connection.putheader(key, value)
            connection.endheaders()
            connection.send(body[: int(share * len(body))])
            connection.close()
        for request, answer in zip(good, wanted, strict=True):
            same(wire.answer(request), answer, "after connections that broke off")


def test_a_bad_row_is_named_and_other_requests_of_its_batch_are_answered(served):
    kind, server, (_, raw) = served
    content = as_bytes(b"\xff\xfe" if kind == "text" else b"\xff\xd8 no JPEG")
    bad = raw.changed("a bad row of", shape=(2, 1), content=raw.tensors[0].content + content)
    with Wire(server) as wire, ThreadPoolExecutor(8) as pool:
        wanted = wire.answer(raw)
        asked = [pool.submit(wire.answer, raw) for _ in range(10)]
        code, detail = wire.grpc_refusal(replace(bad))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and f"{kind} 2 " in detail  # counted from 1
        for each in asked:
            same(each.result(), wanted, "beside a bad one")
