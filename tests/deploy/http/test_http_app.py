"""The routes, before a stand-in for Triton: what they take and give, limits, the key, and a reason for each refusal."""

import base64
import gzip
import hashlib
import http.client
import json
import logging
import re
import socket
import struct
import threading
import time
from contextlib import ExitStack, closing
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import make_image_rationalizer
from families import some_images, written
from fronts import KEY, Listening, Stub
from servers import wait_until
from starlette.testclient import TestClient
from test_client import OTHER, parameters_of

from rekd_deploy import errors
from rekd_deploy.http import front as fronts_module
from rekd_deploy.http import problems
from rekd_deploy.http.app import create_app
from rekd_deploy.http.front import Front
from rekd_deploy.http.limits import Limits
from rekd_train.errors import ConfigError, MissingExtraError
from rekd_train.inputs import image as image_module

JSON = {"Content-Type": "application/json"}
PREDICT = "/v1/predict"
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
MALFORMED, INVALID, MEDIA = "malformed-body", "invalid-request", "unsupported-media-type"
TEXTS = ["good film", "the end was very bad", "a film"]


@pytest.fixture
def triton(rationalizer):
    return Stub(parameters_of(rationalizer))


@pytest.fixture
def made(triton):
    """Makes a client of the application, with other limits or an environment."""
    with ExitStack() as stack:
        def client(limits=None, transport=triton, **environment):
            app = create_app("triton.example:8001", limits, environment=environment, transport=transport)
            return stack.enter_context(TestClient(app))
        yield client


@pytest.fixture
def client(made):
    return made()


def ask(client, texts=TEXTS, **more):
    return client.post("/v1/predict", json={"texts": texts, **more})


def refused(response, status, kind, *words):
    """Check a problem document; returns it."""
    found = response.json()
    assert (response.status_code, found["status"]) == (status, status), found
    assert response.headers["content-type"] == "application/problem+json"
    assert found["type"] == f"/problems/{kind}" and found["title"] == problems.KINDS[kind].title
    assert found["request_id"] == response.headers["x-request-id"]
    assert all(word in found["detail"] for word in words), found["detail"]
    return found


def test_answers_are_the_predictions_with_the_version_and_the_requests_id(client, triton):
    response = ask(client)
    found = response.json()
    assert response.status_code == 200 and found["model"] == "rekd" and found["version"] == "1"
    assert response.headers["x-model-version"] == "1"
    assert found["request_id"] == response.headers["x-request-id"] == triton.ids[0]
    for text, answer in zip(TEXTS, found["answers"], strict=True):
        share = (len(text.split()) + 2) / 48
        assert answer["probabilities"] == pytest.approx({"negative": 1 - share, "positive": share})
        assert answer["label"] == "negative" and answer["probability"] == pytest.approx(1 - share)
        word = text.split()[0]
        assert [(each["start"], each["end"], each["text"]) for each in answer["spans"]] == [(0, len(word), word)]
        assert answer["rate"] == pytest.approx(1 / len(text.split())) and 0 <= answer["doubt"] <= 1
        assert answer["truncated"] is False and isinstance(answer["spans"][0]["score"], float)
    given = {"X-Request-ID": "order-17"}
    again = client.post("/v1/predict", json={"texts": ["good"]}, headers=given)
    assert again.headers["x-request-id"] == again.json()["request_id"] == triton.ids[-1] == "order-17"
    strange = client.post("/v1/predict", json={"texts": ["good"]}, headers={"X-Request-ID": "a b"})
    assert re.fullmatch("[0-9a-f]{16}", strange.headers["x-request-id"]), "no blank gets into a log"


def test_long_texts_are_cut_or_read_in_windows(client, triton):
    long = " ".join(["good film"] * 60)
    assert ask(client, [long]).json()["answers"][0]["truncated"] is True
    assert len(triton.shapes) == 1
    whole = ask(client, [long], windows=True).json()["answers"][0]
    assert whole["truncated"] is False and len(whole["spans"]) > 1 and sum(rows for rows, _ in triton.shapes) == 5


def test_a_version_is_asked_for_and_the_newest_otherwise(client, triton):
    triton.configs = {"3": triton.configs["1"], "12": triton.configs["1"]}
    assert ask(client).json()["version"] == "12" and triton.asked[-1] == ""
    ask(client, version="3")
    assert triton.asked[-1] == "3"
    listed = client.get("/v1/models").json()
    labels, limits = ["negative", "positive"], listed["limits"]
    expected = {"name": "rekd", "versions": ["12", "3"], "kind": "text", "labels": labels, "budget": 0.25}
    assert listed["models"] == [expected]
    assert limits["texts"] == 256 and limits["seconds"] == 30
    refused(ask(client, version="4"), 404, "model-missing", "version 4", "12, 3")
    refused(ask(client, model="rekd_single"), 404, "model-missing", "rekd_single")
    refused(ask(client, model="rekd_selector"), 404, "model-missing", "one of rekd, rekd_single")


def test_another_model_behind_the_address_answers_the_next_request(client, triton):
    assert ask(client).json()["answers"][0]["label"] == "negative"
    triton.configs = {"2": OTHER}
    found = ask(client).json()
    assert found["version"] == "2" and found["answers"][0]["label"] == "no"


def test_the_form_of_hugging_face(client):
    one = client.post("/v1/huggingface", json={"inputs": "good film"})
    several = client.post("/v1/huggingface", json={"inputs": TEXTS, "options": {"use_cache": False}}).json()
    share = 4 / 48
    assert one.status_code == 200 and one.headers["x-model-version"] == "1"
    [[first, second]] = one.json()
    assert (first["label"], second["label"]) == ("negative", "positive"), "the most probable first"
    assert [first["score"], second["score"]] == pytest.approx([1 - share, share])
    assert set(first) == {"label", "score", "spans"} and first["spans"] == second["spans"] != []
    assert several[0] == one.json()[0] and len(several) == 3
    top = client.post("/v1/huggingface", json={"inputs": "good film", "parameters": {"top_k": 1}})
    assert top.json() == [[first]]
    refused(client.post("/v1/huggingface", json={"inputs": []}), 422, "unusable-items", "is empty")
    sigmoid = {"inputs": "a", "parameters": {"function_to_apply": "sigmoid"}}
    refused(client.post("/v1/huggingface", json=sigmoid), 422, INVALID, "/parameters/function_to_apply")
    none = {"inputs": "a", "parameters": {"top_k": 0}}
    for body in (none, {"inputs": 3}, {"inputs": ["a", 3]}, {"inputs": "a", "more": 1}):
        refused(client.post("/v1/huggingface", json=body), 422, INVALID)


@pytest.fixture(scope="module")
def images():
    return [written(pixels, "PNG") for pixels in some_images(3, height=20, width=15)]


class ImageStub(Stub):
    """Keeps patch 0 and patch 5 of 4 x 3."""

    def submit(self, model, inputs, outputs, **options):
        return super().submit(model, {**inputs, "input_ids": inputs["pixels"][:, :, 0, 0]}, outputs, **options)

    def infer(self, request):
        if self.down is not None:
            raise self.down
        count = len(request.inputs["pixels"])
        mask = np.zeros((count, 12), dtype=bool)
        mask[:, [0, 5]] = True
        outputs = fronts_arrays(scores=np.tile(np.arange(12, dtype=np.float32), (count, 1)), mask=mask,
                                probabilities=np.full((count, 3), [0.1, 0.7, 0.2], dtype=np.float32))  # fmt: skip
        return outputs


def fronts_arrays(**arrays):
    from rekd_deploy.client.transport import Arrays
    outputs = Arrays(arrays)
    outputs.version = "1"
    return outputs


@pytest.fixture
def image_client(made):
    return made(transport=ImageStub(parameters_of(make_image_rationalizer())))


def test_images_are_answered_with_boxes_in_their_own_pixels(image_client, images):
    files = [("image", ("a.png", content)) for content in images]
    found = image_client.post("/v1/predict", files=files, data={"version": "1"}).json()
    assert len(found["answers"]) == 3 and found["version"] == "1"
    for answer in found["answers"]:
        assert answer["label"] == "shoe" and answer["doubt"] is None and "spans" not in answer
        assert answer["boxes"] == [
            {"left": 0, "top": 0, "right": 5, "bottom": 5, "row": 0, "column": 0, "score": 0.0},
            {"left": 10, "top": 5, "right": 15, "bottom": 10, "row": 1, "column": 2, "score": 5.0}]
    broken = [("image", ("a.png", images[0])), ("image", ("b.png", images[1][:60])), ("image", ("c.png", b"no"))]
    problem = refused(image_client.post("/v1/predict", files=broken), 422, "unusable-items", "image 2", "PNG, JPEG")
    assert problem["errors"][0]["index"] == 1
    refused(image_client.post("/v1/predict", data={"version": "1"}, files={"x": ("", b"")}), 422, INVALID)
    refused(image_client.post("/v1/predict", files=files, data={"windows": "1"}), 422, INVALID, "/windows")
    assert image_client.get("/v1/models").json()["models"][0]["kind"] == "image"


def test_a_text_is_never_the_path_of_a_file_here(image_client, made, triton, tmp_path, monkeypatch):
    """Not when the model reads images, and not when it begins to after its description has been read."""
    picture = tmp_path / "a.png"
    picture.write_bytes(written(some_images(1)[0], "PNG"))
    opened = []
    monkeypatch.setattr(image_module, "read_image", lambda item, channels: opened.append(item))
    for path, body in (("/v1/predict", {"texts": [str(picture)]}), ("/v1/huggingface", {"inputs": str(picture)})):
        refused(image_client.post(path, json=body), 422, "unusable-items", "reads images, not texts")
    client = made()
    assert ask(client).status_code == 200
    triton.configs = {"2": parameters_of(make_image_rationalizer())}
    refused(ask(client, [str(picture)]), 422, "unusable-items", "reads images, not texts")
    assert opened == []


@pytest.mark.parametrize(("method", "path", "headers", "content", "status", "kind", "words"), [
    ("GET", "/nowhere", {}, b"", 404, "not-found", "/nowhere"),
    ("GET", "/v1/predict/", {}, b"", 404, "not-found", ""),
    ("GET", PREDICT, {}, b"", 405, "method-not-allowed", "POST"),
    ("DELETE", "/healthz", {}, b"", 405, "method-not-allowed", "GET"),
    ("POST", "/", {}, b"", 405, "method-not-allowed", "GET"),
    ("POST", PREDICT, {}, b'{"texts": ["a"]}', 415, MEDIA, "there is no Content-Type"),
    ("POST", PREDICT, {"Content-Type": "text/plain"}, b"a", 415, MEDIA, "is text/plain"),
    ("POST", "/v1/huggingface", FORM, b"", 415, MEDIA,
     "must be application/json"),
    ("POST", PREDICT, {**JSON, "Content-Encoding": "gzip"}, gzip.compress(b"{}", mtime=0), 415, MEDIA, "gzip"),
    ("POST", PREDICT, JSON, b"", 400, MALFORMED, "EOF"),
    ("POST", PREDICT, JSON, b'{"texts": ["a"', 400, MALFORMED, "column 14"),
    ("POST", PREDICT, JSON, b'{"texts": ["\xff"]}', 400, MALFORMED, ""),
    ("POST", PREDICT, JSON, b'{"texts": ["\\ud800"]}', 400, MALFORMED, "escape"),
    ("POST", PREDICT, JSON, b"[" * 100_000, 400, MALFORMED, "recursion"),
    ("POST", PREDICT, JSON, b"null", 422, INVALID, "the body"),
    ("POST", PREDICT, JSON, b'{"texts": NaN}', 422, INVALID, "/texts"),
    ("POST", PREDICT, JSON, b'{"texts": []}', 422, INVALID, "/texts"),
    ("POST", PREDICT, JSON, b'{"texts": ["a"], "windows": 1}', 422, INVALID, "/windows"),
    ("POST", PREDICT, JSON, b'{"texts": ["a"], "version": "x"}', 422, INVALID, "/version"),
    ("POST", PREDICT, JSON, b'{"texts": ["a"], "text": "b"}', 422, INVALID, "/text"),
    ("POST", PREDICT, JSON, b'{"texts": ["a", "", " "]}', 422, "unusable-items", "text 2 is empty; text 3 is"),
    ("POST", PREDICT, {"Content-Type": "multipart/form-data"}, b"x", 400, MALFORMED, "boundary"),
    ("POST", PREDICT, FORM, b"--y", 400, MALFORMED, "the form"),
    ("POST", PREDICT, FORM, b"--x--\r\n", 422, INVALID, "no file"),
    ("GET", "/problems/none", {}, b"", 404, "not-found", "timeout"),
])  # fmt: skip
def test_refusals_are_problems_with_a_reason(client, method, path, headers, content, status, kind, words):
    response = client.request(method, path, headers=headers, content=content)
    found = refused(response, status, kind, words)
    assert response.headers.get("allow") or status != 405
    if status == 415:
        assert "application/json" in response.headers.get("accept-post", "application/json")
    meaning = client.get(found["type"]).json()
    assert (meaning["title"], meaning["status"]) == (found["title"], status)


@pytest.mark.parametrize(("error", "status", "kind"), [
    (errors.ServerUnavailableError("nothing answers at triton.example:8001"), 503, "model-unavailable"),
    (errors.ServerBusyError("the queue is full"), 503, "overloaded"),
    (errors.DeadlineError("too late"), 504, "timeout"), (errors.ModelMissingError("not there"), 404, "model-missing"),
    (errors.RejectedError("no"), 502, "model-failed"), (errors.InsecureServerError("no TLS"), 502, "model-failed"),
    (errors.ClientError("NaN"), 502, "model-failed")])  # fmt: skip
def test_a_failure_of_triton_has_its_status_and_does_not_name_its_address(client, triton, caplog, error, status, kind):
    assert ask(client).status_code == 200
    triton.down = error
    with caplog.at_level(logging.WARNING, "rekd_deploy.http"):
        response = ask(client)
    found = refused(response, status, kind)
    assert "triton.example" not in found["detail"]
    assert (response.headers.get("retry-after") == "1") == (status == 503)
    if status >= 500:
        assert str(error) in caplog.text and found["request_id"] in caplog.text


def test_a_mistake_of_ours_is_a_problem_too_and_the_log_has_it(client, triton, caplog):
    triton.down = ZeroDivisionError("secret")
    found = refused(ask(client), 500, "internal")
    assert "secret" not in json.dumps(found) and found["request_id"] in caplog.text and "secret" in caplog.text


def test_healthz_asks_triton_unless_it_has_just_answered(client, triton):
    assert client.get("/healthz").json() == {"status": "ready"}
    triton.down = errors.ServerUnavailableError("nothing answers at triton.example:8001")
    refused(client.get("/healthz"), 503, "model-unavailable", "at Triton")
    triton.down = None
    assert ask(client).status_code == 200
    triton.down = errors.DeadlineError("it loads a model")
    assert client.get("/healthz").status_code == 200
    triton.down, triton.configs = None, {}


def test_no_version_ready_is_not_healthy(client, triton):
    triton.configs = {}
    refused(client.get("/healthz"), 503, "model-unavailable", "no version of 'rekd'")
    assert client.get("/v1/models").json()["models"] == []


def test_limits_of_texts_and_bodies(made):
    client = made(Limits(bytes=400, texts=3, characters=20))
    assert ask(client, ["a" * 20] * 3).status_code == 200
    refused(ask(client, ["a"] * 4), 422, "too-many-items", "4 texts", "at most 3")
    refused(ask(client, ["good", "a" * 21]), 422, "item-too-large", "text 2 has 21 characters", "at most 20")
    refused(client.post("/v1/huggingface", json={"inputs": "a" * 21}), 422, "item-too-large")
    body = b'{"texts": ["a"]}'
    assert client.post(PREDICT, content=body + b" " * (400 - len(body)), headers=JSON).status_code == 200
    for content, size in ((body + b" " * 400, 416), (iter([body, b" " * 300, b" " * 200]), 516)):
        response = client.post(PREDICT, content=content, headers=JSON)
        refused(response, 413, "body-too-large", f"{size} bytes", "at most 400")


def test_limits_of_images(made, images):
    triton = ImageStub(parameters_of(make_image_rationalizer()))
    client = made(Limits(images=2, pixels=20 * 15 * 2), triton)
    post = lambda *contents: client.post(PREDICT, files=[("image", ("a.png", each)) for each in contents])  # noqa: E731
    assert post(images[0], images[1]).status_code == 200
    for count in (3, 4, 9):
        refused(post(*[images[0]] * count), 422, "too-many-items", "at most 2")
    client = made(Limits(pixels=20 * 15 * 2 - 1), triton)
    assert post(images[0]).status_code == 200
    refused(post(images[0], images[1]), 422, "item-too-large", "600 pixels", "at most 599")
    refused(post(images[0], images[1][:60]), 422, "item-too-large")  # by its head: nothing is decoded
    bomb = images[0][:16] + struct.pack(">II", 60_000, 60_000) + images[0][24:29]
    bomb += struct.pack(">I", __import__("zlib").crc32(bomb[12:29])) + images[0][33:]
    begun = time.monotonic()
    assert post(bomb).status_code == 422 and time.monotonic() - begun < 2, "nothing is decoded"


def test_the_key(made):
    client = made(REKD_API_KEY=KEY)
    for path in ("/", "/page.js", "/healthz", "/docs", "/openapi.json", "/problems/unauthorized"):
        assert client.get(path).status_code == 200, path
    for headers in ({}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer wrong"}, {"X-API-Key": KEY[:-1]},
                    {"X-API-Key": f"{KEY} "[1:]}, {"X-API-Key": b"\xe4\xff"}):  # fmt: skip
        for method, path in (("POST", PREDICT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere")):
            response = client.request(method, path, headers=headers)
            refused(response, 401, "unauthorized", "Bearer KEY")
            assert response.headers["www-authenticate"].startswith("Bearer")
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"X-API-Key": KEY}):
        assert client.post(PREDICT, json={"texts": ["good"]}, headers=headers).status_code == 200
    for wrong in ("", "short", "with a blank in it", "ü" * 20):
        with pytest.raises(ConfigError, match="REKD_API_KEY"):
            made(REKD_API_KEY=wrong)


def test_metrics_count_requests_failures_and_time_and_a_client_cannot_make_new_ones(client):
    ask(client)
    ask(client, [""])
    for number in range(5):
        client.get(f"/nowhere/{number}", headers={"X-Request-ID": f"r{number}"})
        client.request(f"STRANGE{number}", "/healthz")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(re.findall(r"^(rekd_\S+) (\S+)$", response.text, re.MULTILINE))
    assert values['rekd_http_requests_total{method="POST",route="/v1/predict",status="200"}'] == "1.0"
    assert values['rekd_http_requests_total{method="GET",route="other",status="404"}'] == "5.0"
    assert values['rekd_http_requests_total{method="other",route="/healthz",status="405"}'] == "5.0"
    assert values['rekd_http_failures_total{problem="unusable-items",route="/v1/predict"}'] == "1.0"
    assert values['rekd_http_request_seconds_count{route="/v1/predict"}'] == "2.0"
    assert values['rekd_http_items_total{kind="text"}'] == "3.0" and values["rekd_http_requests_in_flight"] == "1.0"
    assert "nowhere" not in response.text and "STRANGE" not in response.text


class Loaded(HTMLParser):
    """What a page loads, and its inline scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.inline, self._within = [], {"script": [], "style": []}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self._within = tag if tag == "style" or (tag == "script" and "src" not in named) else None
        self.addresses += [value for name, value in attributes if name in ("src", "href") and tag != "a"]
        assert not [name for name, _ in attributes if name.startswith("on") or name == "style"]

    def handle_data(self, data):
        if self._within:
            self.inline[self._within].append(data)
            self._within = None


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere_and_their_policy_allows_what_they_hold(client, path):
    response = client.get(path)
    page, policy = Loaded(response.text), response.headers["content-security-policy"]
    rules = {name: values.split() for name, values in re.findall(r"([a-z-]+) ([^;]+)", policy)}
    assert rules["default-src"] == rules["frame-ancestors"] == ["'none'"] and rules["connect-src"] == ["'self'"]
    assert "'unsafe-inline'" not in rules["script-src"] and "'unsafe-eval'" not in policy
    for address in page.addresses:
        assert address == "data:," or client.get(f"/{address}").status_code == 200, address
    for content in page.inline["script"]:
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in rules["script-src"]
    if path == "/":
        [style] = page.inline["style"]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert page.inline["script"] == [] and rules["style-src"] == [f"'sha256-{digest}'"]
        script = client.get("/page.js").text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://", script + style)
    assert client.get("/openapi.json").json()["paths"].keys() == {
        "/v1/predict", "/v1/huggingface", "/v1/models", "/healthz", "/metrics", "/problems/{name}"}
    assert response.headers["x-content-type-options"] == "nosniff"


def test_the_front_names_what_is_missing_and_what_is_taken(monkeypatch):
    with Listening() as front, pytest.raises(errors.ServerError, match=r"cannot be used .*--http \(0: any free\)"):
        Front(front._port, exposed=False, limits=Limits(), environment={}).__enter__()
    with pytest.raises(ConfigError, match="neither a login"):
        Front(0, "0.0.0.0", exposed=False, limits=Limits(), environment={})
    Front(0, "0.0.0.0", exposed=False, limits=Limits(), environment={"REKD_API_KEY": KEY})
    Front(0, "0.0.0.0", exposed=True, limits=Limits(), environment={})
    monkeypatch.setattr(fronts_module, "_MODULES", ("nonesuch",))
    with pytest.raises(MissingExtraError, match=r"nonesuch.*\[http\]"):
        Listening()


def test_limits_are_read_and_every_mistake_is_named():
    found = Limits.of_environment({"REKD_HTTP_LIMITS": "texts=5, seconds=0.5,"})
    assert (found.texts, found.seconds, found.bytes) == (5, 0.5, Limits().bytes)
    with pytest.raises(ConfigError) as caught:
        Limits().with_values(["texts=0", "seconds=inf", "bytes=1.5", "words=3", "pixels"])
    for mistake in ("'texts=0'", "'seconds=inf'", "'bytes=1.5'", "'words=3'", "'pixels'", "characters=..."):
        assert mistake in str(caught.value)


@pytest.fixture
def slow(triton, monkeypatch):
    """A front on a port, before the stand-in, which takes two requests at once and half a second for each."""
    from rekd_deploy.http import app
    made = app.create_app
    monkeypatch.setattr(app, "create_app", lambda *given, **options: made(*given, **options, transport=triton))
    with Listening(Limits(requests=2, seconds=0.5, bytes=1000)) as front:
        front.start("triton.example:8001")
        wait_until(lambda: front.send("GET", "/healthz").status == 200)
        yield front


def raw(front, content, more=b""):
    """The answer to bytes as they are."""
    host, port = front.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(content)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


def test_a_body_that_does_not_come_and_an_answer_that_does_not_are_given_up(slow, triton):
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    answer = raw(slow, head)
    assert answer.startswith(b"HTTP/1.1 408") and b"/problems/body-timeout" in answer and b"within 0.5 s" in answer
    triton.gate.clear()
    begun = time.monotonic()
    found = slow.send("POST", PREDICT, {"texts": ["good"]})
    assert (found.status, found.content["type"]) == (504, "/problems/timeout") and time.monotonic() - begun < 3
    triton.gate.set()


def problem_in(answer):
    """Status and document of an answer on a socket, which closes behind it."""
    head, _, content = answer.partition(b"\r\n\r\n")
    found = json.loads(content)
    assert b"content-type: application/problem+json" in head.lower() and b"connection: close" in head.lower()
    assert f"x-request-id: {found['request_id']}".encode() in head.lower()
    return int(head.split(b" ", 2)[1]), found


@pytest.mark.parametrize(("content", "status", "words"), [
    (b"hello\r\n\r\n", 400, "illegal request line"), (b"GET / HTTP/1.1\r\n\r\n", 400, "Host"),
    (b"GET / HTTP/1.1\r\nHost: x\r\n: \xff\r\n\r\n", 400, "illegal header"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 200_000, 431, "too long"),
    (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "transfer-encoding"),
    (b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
     b"zz\r\n", 400, "chunk"),
])  # fmt: skip
def test_what_is_no_http_is_a_problem_too(slow, caplog, content, status, words):
    found_status, found = problem_in(raw(slow, content))
    assert (found_status, found["status"], found["type"]) == (status, status, "/problems/malformed-request")
    assert words.lower() in found["detail"].lower() and "fix:" in found["detail"]
    assert slow.send("GET", "/healthz").status == 200 and "Traceback" not in caplog.text


def test_what_is_no_http_in_the_middle_of_an_answer_closes_the_connection(slow, triton, caplog):
    """Broken chunks behind a refusal: there is an answer already."""
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head)
        answer = connection.recv(65536)  # 415: it has no Content-Type
        connection.sendall(b"zz\r\n")
        assert answer.startswith(b"HTTP/1.1 415") and b"HTTP/1.1" not in connection.recv(65536)
    assert "Traceback" not in caplog.text


def test_a_head_that_does_not_come_is_given_up_and_a_quiet_connection_closed(slow, triton):
    good = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    assert raw(slow, b"") == b"", "nothing was asked"
    for before in (b"", good):  # the second is answered, and the connection stays open
        answer = raw(slow, before + b"GET /healthz HTT")
        assert answer.startswith(b"HTTP/1.1 200") == bool(before)
        status, found = problem_in(answer[answer.rindex(b"HTTP/1.1 "):])
        assert (status, found["type"]) == (408, "/problems/head-timeout")
        assert "16 bytes" in found["detail"] and "0.5 s" in found["detail"]
    with closing(http.client.HTTPConnection(slow.url.removeprefix("http://"), timeout=20)) as connection:
        connection.connect()
        used = connection.sock
        for _ in range(2):  # between whole requests there is more time
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b'{"status":"ready"}' and connection.sock is used
            time.sleep(0.8)


def test_a_client_that_goes_before_its_body_is_whole_leaves_no_traceback(slow, caplog):
    head = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    host, port = slow.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head)
    gone = b'rekd_http_requests_total{method="POST",route="/v1/predict",status="499"} 1.0'
    wait_until(lambda: gone in slow.send("GET", "/metrics").content)
    assert "Traceback" not in caplog.text and "internal" not in slow.send("GET", "/metrics").content.decode()


def test_the_interface_is_described_as_it_is(client):
    """References lead somewhere, and refusals are problems there, too."""
    document = client.get("/openapi.json").json()
    def references(part):
        if isinstance(part, dict):
            yield from [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from references(each)
    found = set(references(document))
    for reference in found:
        place = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step.replace("~1", "/").replace("~0", "~")]
    assert any("HuggingFaceParameters" in each for each in found)
    for status in ("4XX", "5XX"):
        assert [*document["paths"][PREDICT]["post"]["responses"][status]["content"]] == ["application/problem+json"]


def test_a_body_that_is_too_large_is_answered_while_it_comes(slow):
    for size in (1001, 3000, 5_000_000):
        found = slow.send("POST", PREDICT, b" " * size, Content_Type="application/json")
        assert (found.status, found.content["type"]) == (413, "/problems/body-too-large")
        assert f"{size:,} bytes" in found.content["detail"]


def test_more_requests_than_are_taken_at_once_are_told_to_come_later(slow, triton):
    triton.gate.clear()
    answers = []
    def request():
        answers.append(slow.send("POST", PREDICT, {"texts": ["good"]}).status)
    threads = [threading.Thread(target=request) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: b"rekd_http_requests_in_flight 3.0" in slow.send("GET", "/metrics").content)
    found = slow.send("POST", PREDICT, {"texts": ["good"]})
    assert (found.status, found.headers["retry-after"]) == (503, "1")
    assert "3 requests" in found.content["detail"] and "at most 2" in found.content["detail"]
    triton.gate.set()
    for thread in threads:
        thread.join()
    assert set(answers) <= {200, 504} and slow.send("POST", PREDICT, {"texts": ["good"]}).status == 200
