"""The real Triton: clients, joined texts, its status and its end; every kind of model, and malformed requests."""

import asyncio
import itertools
import json
import os
import re
import signal
import ssl
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from families import KINDS, LIBRARIES, another, assert_same_answers, some_images, written
from proxies import Proxy, server_context
from servers import children_of, is_alive, send, wait_until
from test_triton_model import BAD_FILES
from tritonclient.grpc.service_pb2 import ModelInferRequest
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from rekd_deploy import AsyncClient, Client, Prediction, RetryPolicy, TlsSettings, TritonServer
from rekd_deploy.client.transport import Request, open_transport
from rekd_deploy.errors import InsecureServerError, RejectedError, ServerUnavailableError
from rekd_deploy.export.graphs import export
from rekd_deploy.repository import writer
from rekd_deploy.repository.config import COMPONENTS, ENSEMBLE, SELECTOR, SINGLE
from rekd_deploy.repository.text_endpoint import endpoint_config
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.flags import GRPC_KEY_HEADER, KEY_HEADER
from rekd_deploy.server.program import find_installed
from rekd_deploy.server.status import read_status
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.triton

@pytest.fixture(params=["grpc", "http"])
def protocol(request):
    return request.param


@pytest.fixture
def url(server, protocol):
    return f"{protocol}://127.0.0.1:{server.ports[protocol]}"


def test_both_clients_answer_as_the_model(url, texts, rationalizer):
    """Texts of every length, more than one request holds, the last one longer than the model reads."""
    many = [*texts, *("good film and " * n + "end" for n in range(60)), *(["bad plot"] * 70), "good film " * 10_000]
    async def predict():
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(client.predict(many[n : n + 30]) for n in range(0, len(many), 30)))
    with Client(url) as client:
        found = client.predict(many)
    expected = rationalizer.predict(many)
    assert_same_answers(found, expected)
    assert_same_answers([each for some in asyncio.run(predict()) for each in some], expected)
    assert found[-1].truncated


def test_a_process_that_closes_no_client_ends_and_connections_are_used_again(server, protocol, url):
    with Proxy(server.ports[protocol]) as proxy, Client(f"{protocol}://127.0.0.1:{proxy.port}") as client:
        for _ in range(20):
            client.predict(["good film"])
        assert proxy.connections == 1
        proxy.cut()
        client.predict(["good film"])  # one that broke is noticed, and replaced
        assert proxy.connections == 2
    code = "import sys; from rekd_deploy import Client; print(Client(sys.argv[1]).predict(['good plot'])[0].label)"
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip() in ("negative", "positive")


@pytest.mark.parametrize("asks_the_client", [False, True])
def test_tls(server, protocol, texts, rationalizer, tmp_path, asks_the_client):
    authority = trustme.CA()
    context, mine = server_context(authority), authority.issue_cert("client@example")
    roots, certificate, key = (tmp_path / name for name in ("roots.pem", "client.pem", "client.key"))
    authority.cert_pem.write_to_path(roots)
    certificate.write_bytes(b"".join(blob.bytes() for blob in mine.cert_chain_pems))
    mine.private_key_pem.write_to_path(key)
    settings, stranger = TlsSettings(roots), None  # a root that the system does not know
    if asks_the_client:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        settings, stranger = TlsSettings(roots, certificate, key), settings
    with Proxy(server.ports[protocol], context) as proxy:
        address, once = f"{protocol}s://127.0.0.1:{proxy.port}", RetryPolicy(attempts=1)
        with Client(address, tls=settings) as client:
            assert_same_answers(client.predict(texts), rationalizer.predict(texts))
        assert read_status(address, tls=settings).ready
        refused = (InsecureServerError, ServerUnavailableError) if asks_the_client else InsecureServerError
        with Client(address, tls=stranger, timeout=5.0, retry=once) as client, pytest.raises(refused):
            client.predict(["good"])
        with pytest.raises(ServerUnavailableError, match="with TLS grpcs:// or https://$"):
            read_status(f"{protocol}://127.0.0.1:{proxy.port}", timeout=3.0)


def test_administration_takes_the_key_and_status_and_log_tell_what_was_refused(server, protocol, url):
    name, request = {"grpc": GRPC_KEY_HEADER, "http": KEY_HEADER}[protocol], Request("", 5.0)
    for headers, refused in (({name.upper(): server.key}, False), ({name: "wrong"}, True), ({}, True)):
        transport = open_transport(url, 5.0, headers=headers)
        with closing(transport), pytest.raises(RejectedError) if refused else nullcontext():
            if protocol == "grpc":
                transport._call(transport._client.get_system_shared_memory_status, request)
            else:
                transport._exchange("GET", "v2/systemsharedmemory/status", request)
    assert b"nv_inference_request_success" in send(server.ports["metrics"], "GET", "/metrics")[1]
    ids = np.full((2, 8), 5000)
    with closing(open_transport(url, 5.0)) as transport, pytest.raises(RejectedError, match="outside the vocabulary"):
        tensors = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        transport.submit("rekd", tensors, ("mask",), request_id=f"by {protocol}").result()
    wait_until(lambda: f"[request id: by {protocol}] input_ids[0, 0] is 5000" in server.log_file.read_text())
    command = [sys.executable, "-m", "rekd_deploy.cli.serve", "--status", server.http_url]
    for more, said in (([], "ready, Triton"), (["--json"], '"live": true')):
        done = subprocess.run([*command, *more], capture_output=True, text=True, env={**os.environ, "COLUMNS": "160"})
        assert done.returncode == 0 and said in done.stdout and "rekd_selector" in done.stdout


def test_texts_of_all_lengths_are_joined_answered_as_if_alone_and_counted(server, rationalizer, texts, url):
    """Four clients, lengths as they come, while the models' processes stand still: all wait when they go on."""
    some = [*texts, *("good film and " * n + "end" for n in range(0, 60, 7))]
    requests = [dict(rationalizer.preprocessor([text]).inputs) for text in some]
    assert len({request["input_ids"].shape for request in requests}) == 3
    with closing(open_transport(url, 20.0)) as transport:
        def sent(index):
            return transport.submit("rekd", requests[index], ("scores", "mask", "logits", "probabilities"))
        def send_all(client):
            return [(index, sent(index)) for index in np.random.default_rng(client).permutation(len(requests))]
        def steps():
            status = read_status(url)
            assert status.ready and status.versions == [1] and status.triton
            return {step.model: step for step in status.steps}
        alone = [sent(index).result() for index in range(len(requests))]
        before, stubs = steps(), children_of(server.process_id)
        try:  # for a tenth of a second: Triton takes a process that is silent for two for dead
            for stub in stubs:
                os.kill(stub, signal.SIGSTOP)
            with ThreadPoolExecutor(4) as pool:
                together = [each for client in pool.map(send_all, range(4)) for each in client]
        finally:
            for stub in stubs:
                os.kill(stub, signal.SIGCONT)
        for index, future in together:
            for name, wanted in alone[index].items():
                np.testing.assert_allclose(future.result()[name], wanted, rtol=0, atol=1e-5)
    after = steps()
    assert set(after) == {"rekd", "rekd_selector", "rekd_predictor"}
    for model, step in after.items():
        assert step.requests - before[model].requests == step.rows - before[model].rows == 4 * len(requests)
    assert after[SELECTOR].since(before[SELECTOR])["rows_per_batch"] >= 4
    means = after[SELECTOR].to_dict()
    parts = sum(means[f"{name}_ms"] for name in ("queue", "input", "compute", "output", "other"))
    assert 0 < means["compute_ms"] < means["request_ms"] and parts == pytest.approx(means["request_ms"])


def test_an_installed_server_and_the_newest_version_beside_an_earlier_one(
    wheel, artefacts, tmp_path, monkeypatch, rationalizer, texts):
    """The wheel's parts laid out as a container has them."""
    write_repository(artefacts, tmp_path / "r")
    root = write_repository(another(artefacts, 2), tmp_path / "r", keep=2)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").symlink_to(wheel.executable)
    wheel.place_backends(tmp_path)
    for name, value in wheel.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with TritonServer(root, 0, 0, 0, log_file=tmp_path / "log", program=find_installed(tmp_path)) as server:
        command = Path(f"/proc/{server.process_id}/cmdline").read_bytes().decode().split("\0")
        assert command[0] == str(tmp_path / "bin" / "tritonserver")
        assert f"--backend-directory={tmp_path / 'backends'}" in command
        def executed():
            return {(step.model, step.version): step.executions for step in read_status(server.http_url).steps}
        before = executed()  # the warm-ups
        assert set(before) == {(ENSEMBLE, 2), *((name, version) for name in COMPONENTS for version in (1, 2))}
        with Client(server.grpc_url) as client:
            assert_same_answers(client.predict(texts), rationalizer.predict(texts))
        after = executed()
        assert after[SELECTOR, 1] == before[SELECTOR, 1] and after[SELECTOR, 2] > before[SELECTOR, 2]


@pytest.mark.parametrize(("victim", "number", "code", "said"), [
    ("rekd-serve", signal.SIGTERM, 0, "stopped"),
    ("tritonserver", signal.SIGKILL, 1, "error: the Triton server was killed by signal 9"),
    ("rekd-serve", signal.SIGKILL, -signal.SIGKILL, "stop     Ctrl-C")])  # fmt: skip
def test_the_command_ends_with_all_that_it_started(wheel, repository, tmp_path, victim, number, code, said):
    output, ports = tmp_path / "output", [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    command = [sys.executable, "-m", "rekd_deploy.cli.serve", str(repository), *ports, "--log", str(tmp_path / "log")]
    with open(output, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "Ctrl-C" in output.read_text() or process.poll() is not None, 60)
        started = children_of(process.pid, deep=True)
        url = re.search(r"(?m)^gRPC\s+(\S+)", output.read_text())[1]
        with Client(url) as client:
            assert len(client.predict(["good"])) == 1
        os.kill(process.pid if victim == "rekd-serve" else started[0], number)
        assert process.wait(20) == code
        wait_until(lambda: not any(map(is_alive, started)))
    finally:
        process.kill()
    assert said in output.read_text() and "Traceback" not in output.read_text()
    with Client(url) as client, pytest.raises(ServerUnavailableError):
        client.predict(["good"])


OUTPUTS = ("scores", "mask", "logits", "probabilities")
REFUSALS = set("INVALID_ARGUMENT NOT_FOUND OUT_OF_RANGE RESOURCE_EXHAUSTED FAILED_PRECONDITION".split())  # as 4xx


@pytest.fixture(scope="module", params=["vit", "bert-paper", "modernbert"])
def served(wheel, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = (KINDS | LIBRARIES)[request.param]()
    artefacts = export(save(model, folder / "checkpoint"), folder, single_graph=True)
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "vit":  # as beside graphs that run elsewhere: it asks their models
            patch.setattr(writer, "endpoint_config", lambda *given: endpoint_config(*given[:2], "onnxruntime"))
        root = write_repository(artefacts, folder / "repository", text_endpoint=True)
    assert len(list(root.glob("rekd_*/1/rekd_*/model.onnx"))) == (request.param == "vit")
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
    doubts = [each.doubt for each in model.predict(items[:5])]
    if doubts[0] is not None:
        np.testing.assert_allclose(response.as_numpy("doubt")[:, 0], doubts, rtol=1e-6)
        assert len(set(doubts)) > 1
    for wanted, *row in zip(model.predict(items[:5]), *map(response.as_numpy, names), strict=True):
        label, rate, truncated, probabilities, rationale = row
        found = {"label": label[0].decode(), "probabilities": dict(zip(model.labels, probabilities, strict=True))}
        found |= {"rationale": json.loads(rationale[0]), "pieces": [], "truncated": bool(truncated[0])}
        assert rate[0] == pytest.approx(wanted.rate)
        found |= {"rate": wanted.rate, "text": wanted.text, "doubt": wanted.doubt}
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
