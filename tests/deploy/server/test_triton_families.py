"""The real Triton on images and on a predictor that blanks: the models' answers, and malformed requests."""

import itertools
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import grpc
import numpy as np
import pytest
from families import KINDS, LIBRARIES, assert_same_answers, some_images, written
from servers import send
from test_text_endpoint import BAD_FILES
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from rekd_deploy import Client, Prediction, TritonServer
from rekd_deploy.client.transport import open_transport
from rekd_deploy.export.graphs import export
from rekd_deploy.repository.config import ENSEMBLE, SINGLE
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.triton

OUTPUTS = ("scores", "mask", "logits", "probabilities")
REFUSALS = set("INVALID_ARGUMENT NOT_FOUND OUT_OF_RANGE RESOURCE_EXHAUSTED FAILED_PRECONDITION".split())  # as 4xx


@pytest.fixture(scope="module", params=["vit", "bert-paper", "modernbert"])
def served(wheel, request, tmp_path_factory):
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


@pytest.mark.parametrize("name", [ENSEMBLE, SINGLE])
@pytest.mark.parametrize("protocol", ["grpc_url", "http_url"])
def test_answers_are_the_models(served, items, name, protocol):
    model, server = served
    with Client(getattr(server, protocol), model=name) as client:
        assert_same_answers(client.predict(items), model.predict(items))


def test_every_subset_of_the_outputs_and_the_endpoint_answer_as_the_model(served, items, kind):
    model, server = served
    inputs = model.preprocessor(items[:2]).inputs
    with closing(open_transport(server.grpc_url, 10.0)) as transport:
        whole = transport.submit(ENSEMBLE, inputs, OUTPUTS).result()
        for names in itertools.chain(*(itertools.combinations(OUTPUTS, count) for count in range(1, 5))):
            part = transport.submit(ENSEMBLE, inputs, names).result()
            assert list(part) == list(names)
            for name in names:
                np.testing.assert_array_equal(part[name], whole[name])
    from tritonclient.http import InferenceServerClient, InferInput
    model, server = served
    contents = [written(each, "PNG") if kind == "image" else each.encode() for each in items[:5]]
    tensor = InferInput(kind, [len(contents), 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[content] for content in contents], dtype=object))
    with InferenceServerClient(server.http_url.removeprefix("http://")) as client:
        response = client.infer(f"rekd_{kind}", [tensor])
    names = ("label", "rate", "truncated", "probabilities", "rationale")
    for wanted, *row in zip(model.predict(items[:5]), *map(response.as_numpy, names), strict=True):
        label, rate, truncated, probabilities, rationale = row
        found = {"label": label[0].decode(), "probabilities": dict(zip(model.labels, probabilities, strict=True))}
        found |= {"rationale": json.loads(rationale[0]), "pieces": [], "truncated": bool(truncated[0])}
        assert rate[0] == pytest.approx(wanted.rate)
        found |= {"rate": wanted.rate, "text": wanted.text}
        assert_same_answers([Prediction.from_dict(found)], [replace(wanted, pieces=[])])


def of_arrays(model, **arrays):
    message = ModelInferRequest(model_name=model)
    for name, array in arrays.items():
        kind, shape = ("BYTES", (1, 1)) if isinstance(array, bytes) else (array.dtype.name.upper(), array.shape)
        message.inputs.add(name=name, datatype=kind, shape=shape)
        message.raw_input_contents.append(as_bytes(array) if kind == "BYTES" else array.tobytes())
    return message


def changed(good, index=0, content=None, **fields):
    message = ModelInferRequest.FromString(good.SerializeToString())
    for field in fields:
        message.inputs[index].ClearField(field)
    message.inputs[index].MergeFrom(type(message.inputs[index])(**fields))
    if content is not None:
        message.raw_input_contents[index] = content
    return message


def over_http(message):
    """Path, body and headers of the same request, with Triton's binary extension."""
    contents = message.raw_input_contents
    sizes = [{"parameters": {"binary_data_size": len(content)}} for content in contents]
    inputs = [
        {"name": each.name, "datatype": each.datatype, "shape": list(each.shape), **size}
        for each, size in zip(message.inputs, sizes, strict=True)]
    outputs = {"outputs": [{"name": each.name} for each in message.outputs]} if message.outputs else {}
    header = json.dumps({"inputs": inputs, **outputs}).encode()
    path = f"/v2/models/{message.model_name}/versions/{message.model_version}".removesuffix("/versions/")
    return f"{path}/infer", header + b"".join(contents), {"Inference-Header-Content-Length": len(header)}


def general_changes(good):
    """What is wrong whatever the model reads: types, ranks, lengths, names, batches, outputs."""
    for index, (tensor, content) in enumerate(zip(good.inputs, good.raw_input_contents, strict=True)):
        rows, *rest = tensor.shape
        changes = [{"datatype": each} for each in ("FP32", "BOOL", "", "INT63")]
        changes += [{"shape": each} for each in ((), (rows, *rest, 1), (1, rows, *rest), (2**31, *rest))]
        changes += [{"content": each} for each in (b"", content[:-3], content + b"\x01")]
        changes += [{"shape": (65, *rest), "content": content * 65}, {"name": "surprise"}]
        yield from (changed(good, index, **each) for each in changes)
        without = changed(good)
        del without.inputs[index], without.raw_input_contents[index]
        yield without
    empty = changed(good)
    for index, tensor in enumerate(good.inputs):
        empty = changed(empty, index, b"", shape=(0, *tensor.shape[1:]))
    yield empty
    for other in ({"model_name": "nonesuch"}, {"model_version": "99"}, {"outputs": [{"name": "surprise"}]}):
        message = changed(good)
        message.MergeFrom(ModelInferRequest(**other))
        yield message


def token_changes(good, longest):
    """Texts without tokens or too long, and what steps hand over; more that cannot be read: test_triton_model."""
    for width in (0, longest + 1):
        odd = np.ones((2, width), np.int64)
        yield changed(changed(good, 1, odd.tobytes(), shape=odd.shape), 0, odd.tobytes(), shape=odd.shape)
    for name in ("positions", "kept", "keep"):
        message = changed(good)
        message.outputs.add(name=name)
        yield message


def byte_changes(good, bad):
    """Contents that cannot be read, alone and among good ones; and lengths that lie. ``good`` has one (1, 1) tensor."""
    (whole,) = good.raw_input_contents
    for content in map(as_bytes, bad):
        yield changed(good, content=content)
        yield changed(good, content=whole + content + whole, shape=(3, 1))
    payload = whole[4:]
    for claimed in (0, len(payload) - 1, len(payload) + 1, 2**32 - 1):
        yield changed(good, content=struct.pack("<I", claimed) + payload)
    yield changed(good, shape=(2, 1))


def as_bytes(content):
    return struct.pack("<I", len(content)) + content


@pytest.fixture
def good(kind):
    if kind == "text":
        ids = np.array([[2, 9, 10, 11, 3], [2, 12, 9, 14, 3]])
        arrays, content = {"input_ids": ids, "attention_mask": np.ones_like(ids)}, b"A good film and a bad plot"
    else:
        arrays, content = {"pixels": np.stack(some_images(2))[..., None]}, written(some_images(1)[0], "JPEG")
    return of_arrays("rekd", **arrays), of_arrays(f"rekd_{kind}", **{kind: content})


@pytest.fixture
def infer(served):
    """A function: message -> bytes of the outputs that a neighbour in the batch may not change; refused: why."""
    with grpc.insecure_channel(served[1].grpc_url) as channel:
        stub = GRPCInferenceServiceStub(channel)
        def inferred(message):
            try:
                response = stub.ModelInfer(message, timeout=20)
            except grpc.RpcError as error:
                return error.code().name, error.details()
            outputs = zip([each.name for each in response.outputs], response.raw_output_contents, strict=True)
            return {name: content for name, content in outputs if name in ("mask", "label", "truncated")}
        yield inferred


def test_malformed_requests_among_good_ones(served, infer, kind, good):
    """Both ways at once, good ones right before, between and after: they may share a batch."""
    tensors, content = good
    bad = [*general_changes(tensors), *general_changes(content)]
    bad += byte_changes(content, BAD_FILES[kind])
    if kind == "text":
        bad += token_changes(tensors, 48)
    else:
        sizes = ((2, 16, 13, 1), (2, 16, 12, 3), (2, 12, 16, 1))
        bad += [changed(tensors, content=bytes(int(np.prod(size))), shape=size) for size in sizes]
    wrong, expected, port = [], [infer(each) for each in good], served[1].ports["http"]
    assert len(bad) > 50 and all(isinstance(each, dict) and each for each in expected)
    with ThreadPoolExecutor(5) as pool:
        for number, message in enumerate(bad):
            neighbour, (path, body, headers) = good[number % 2], over_http(message)
            sent = [pool.submit(infer, each) for each in (neighbour, message, neighbour)]
            by_http = pool.submit(send, port, "POST", path, body, **headers)
            sent.append(pool.submit(infer, neighbour))
            before, refusal, *after = (each.result() for each in sent)
            assert [before, *after] == [expected[number % 2]] * 3, message
            status, answer = by_http.result()
            refused = isinstance(refusal, tuple) and refusal[0] in REFUSALS and refusal[1]
            if not refused or not 400 <= status <= 499 or not json.loads(answer)["error"]:
                wrong.append((str(message)[:500], refusal, status, answer))
    assert not wrong, wrong
