"""The front before the real Triton: answers as the client's, the command, malformed requests, the page in a browser."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_image_rationalizer, make_rationalizer
from families import some_images, written
from fronts import Listening, Stub, form
from pytest import MonkeyPatch
from servers import wait_until
from test_client import parameters_of

from rekd_deploy import Client, TritonServer
from rekd_deploy.export.graphs import export
from rekd_deploy.http import app as app_module
from rekd_deploy.repository.writer import write_repository
from rekd_deploy.server.beside import Beside
from rekd_deploy.server.status import running_states
from rekd_train.checkpoints.checkpoint import save
from rekd_train.inputs.policy import SelectionPolicy

pytestmark = pytest.mark.triton
PREDICT = "/v1/predict"


@pytest.fixture(scope="module")
def front(server):
    with Listening() as front:
        front.start(server.grpc_url)
        yield front


@pytest.fixture(scope="module")
def image_server(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    artefacts = export(save(make_image_rationalizer(), folder / "checkpoint"), folder, single_graph=True)
    root = write_repository(artefacts, folder / "repository")
    with TritonServer(root, 0, 0, 0, log_file=folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def image_front(image_server):
    with Listening() as front:
        front.start(image_server.http_url)
        yield front


def test_texts_are_answered_as_by_the_client_and_in_the_form_of_hugging_face(front, server, texts):
    with Client(server.grpc_url) as client:
        expected = client.predict(texts)
    assert expected.version == "1"
    found = front.send("POST", PREDICT, {"texts": texts, "version": "1"}, X_Request_ID="order-7")
    assert (found.status, found.content["version"], found.content["request_id"]) == (200, "1", "order-7")
    for answer, wanted in zip(found.content["answers"], expected, strict=True):
        spans = [vars(span) for span in wanted.rationale]
        assert answer["spans"] == pytest.approx(spans) if not spans else [*map(pytest.approx, spans)] == answer["spans"]
        for name in ("label", "rate", "truncated", "doubt", "probability", "probabilities"):
            assert answer[name] == pytest.approx(getattr(wanted, name)), name
    from huggingface_hub import InferenceClient
    scored = InferenceClient(model=f"{front.url}/v1/huggingface").text_classification(texts[0])
    assert (scored[0].label, scored[0].score) == (expected[0].label, pytest.approx(expected[0].probability))
    assert front.send("GET", "/healthz").status == 200
    missing = front.send("POST", PREDICT, {"texts": texts, "version": "7"})
    assert (missing.status, missing.content["type"]) == (404, "/problems/model-missing")


def test_images_are_answered_as_by_the_client(image_front, image_server):
    pixels = some_images(3, height=20, width=15)
    with Client(image_server.grpc_url) as client:
        expected = client.predict(pixels)
    for name, more in (("rekd", {"version": "1"}), ("rekd_single", {"model": "rekd_single"})):
        body, headers = form(*(written(each, "PNG") for each in pixels), **more)
        found = image_front.send("POST", PREDICT, body, **headers)
        assert found.status == 200 and found.content["model"] == name
        for answer, wanted in zip(found.content["answers"], expected, strict=True):
            boxes = [tuple(box[side] for side in ("left", "top", "right", "bottom")) for box in answer["boxes"]]
            assert boxes == [patch.box for patch in wanted.rationale] and answer["label"] == wanted.label
            assert answer["probability"] == pytest.approx(wanted.probability, abs=1e-5)


def mutated(chance, good):
    """A body with a few bytes changed, cut out, put in or repeated."""
    body = bytearray(good)
    for _ in range(chance.randint(1, 6)):
        start = chance.randrange(len(body) + 1)
        end = min(start + chance.choice([0, 1, 1, 2, 8, 40]), len(body))
        noise = chance.randbytes(chance.randint(1, 5))
        body[start:end] = chance.choice([b"", noise, body[start:end] * 2, b'"', b"{", b"\0"])
    return bytes(body)


HEADS = [
    b"", b"X-Request-ID: \xff\xfe\r\n", b"Content-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b": x\r\n",
    b"Content-Type: application/json; charset=utf-7\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: gzip\r\n",
    b"Authorization: Bearer \xff\r\n", b"A" * 70_000 + b": x\r\n", b"Content-Type: multipart/form-data\r\n",
]  # fmt: skip
"""Header lines before the others; some of them are against HTTP."""


def exchanged(front, content):
    """The status of the answer to these bytes, and its body; None: there is none, as where a request has no end."""
    host, port = front.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=3) as connection:
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError, TimeoutError):
            connection.sendall(content)
            while chunk := connection.recv(65536):
                answer += chunk
    answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split(b" ", 2)[1]) if head else None), body


@pytest.mark.parametrize("seed", range(4))
def test_malformed_requests_are_refused_with_a_reason_and_good_ones_between_are_answered(front, image_front, seed):
    chance = random.Random(seed)
    texts = json.dumps({"texts": ["good film", "Über 🎬"], "windows": True, "version": "1"}).encode()
    image, multipart = form(written(some_images(1)[0], "PNG"), version="1")
    goods = [(front, PREDICT, b"application/json", texts), (front, "/v1/huggingface", b"application/json",
             b'{"inputs": ["good", "bad"], "parameters": {"top_k": 1}}'),
             (image_front, PREDICT, multipart["Content-Type"].encode(), image)]  # fmt: skip
    refusals, until = 0, time.monotonic() + 20
    for number in range(100):
        if time.monotonic() > until:
            break
        place, path, media, good = chance.choice(goods)
        more, body = chance.choice(HEADS) if chance.random() < 0.3 else b"", mutated(chance, good)
        line = f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode()
        length = len(body) - (chance.random() < 0.05)
        request = b"%s%sContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
            line, more, media, length, body)
        if chance.random() < 0.05:
            request = mutated(chance, request)
        status, content = exchanged(place, request)
        assert status is None or status == 200 or 400 <= status < 500, (status, content, request)
        if status is not None and status >= 400:
            refusals += 1
            assert json.JSONDecoder().raw_decode(content.decode())[0]["detail"], request
        if number % 10 == 0:
            place, path, media, good = goods[number // 10 % 3]
            answer = place.send("POST", path, good, Content_Type=media.decode())
            assert answer.status == 200, answer.content
    assert refusals > 20


@pytest.mark.debian
@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_what_the_documents_say_to_type_works(front, image_front, document, tmp_path):
    """To the letter, but for the port."""
    if not shutil.which("curl"):
        pytest.skip("needs the Debian package curl")
    for name in ("shoe.png", "bag.png"):
        (tmp_path / name).write_bytes(written(some_images(1)[0], "PNG"))
    text = (Path(__file__).parents[3] / document).read_text(encoding="utf-8")
    lines = re.findall(r"^(?:curl|python -c) .*localhost:8080.*$", text, re.MULTILINE)
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "localhost:8080" in block]
    assert len(lines) >= 3 and any("/v1/huggingface" in line for line in lines)
    for line in lines + [shlex.join(["python", "-c", block]) for block in blocks]:
        place = image_front if "-F" in line else front
        typed = line.replace("localhost:8080", place.url.removeprefix("http://")).replace("curl", "curl -sS --fail", 1)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(["sh", "-c", typed], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {"PATH": path})  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)
        assert "healthz" in line or re.search("positive|negative|shirt|shoe|bag", done.stdout), (line, done.stdout)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A repository of the same texts with another budget."""
    folder = tmp_path_factory.mktemp("half")
    pair = make_rationalizer(policy=SelectionPolicy(bias=None, budget=0.5))
    return write_repository(export(save(pair, folder / "checkpoint"), folder, single_graph=True), folder / "half")


@pytest.mark.parametrize("alone", [False, True])
def test_the_command_serves_it_with_triton_or_before_one_that_runs(repository, half, tmp_path, request, alone):
    output, log, served = tmp_path / "output", tmp_path / "log", {"rekd": 0.25, "rekd_half": 0.5}
    if alone:
        standing = TritonServer(repository, 0, 0, 0, log_file=log, beside=[Beside("half", half)])
        request.addfinalizer(standing.stop)
        standing.start()
        what = ["--url", standing.grpc_url, "--beside", "half"]
    else:
        what = [str(repository), "--beside", str(half), "--log", str(log)]
        what += [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    command = [sys.executable, "-m", "rekd_deploy.cli.serve", "--http", "0", "--limit", "texts=1", *what]
    with open(output, "w") as file:
        key = {"REKD_API_KEY": "0123456789abcdef"}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | key)
    try:
        wait_until(lambda: "Ctrl-C" in output.read_text() or process.poll() is not None, 90)
        front = Listening()
        front._port = int(re.search(r"(?m)^page\s+http://127.0.0.1:(\d+)/$", output.read_text())[1])
        wait_until(lambda: front.send("GET", "/healthz").status == 200)
        assert front.send("POST", PREDICT, {"texts": ["good"]}).status == 401
        assert front.send("POST", PREDICT, {"texts": ["good"]}, X_API_Key="0123456789abcdef").status == 200
        found = front.send("POST", PREDICT, {"texts": ["good", "bad"]}, X_API_Key="0123456789abcdef")
        assert found.content["type"] == "/problems/too-many-items"
        models = front.send("GET", "/v1/models", X_API_Key="0123456789abcdef").content["models"]
        assert {model["name"]: model["budget"] for model in models} == served
        for name, budget in served.items():
            asked = {"texts": ["good film bad plot " * 5], "model": name}
            [answer] = front.send("POST", PREDICT, asked, X_API_Key="0123456789abcdef").content["answers"]
            assert answer["rate"] == budget
        states = {state.process_id: state.beside for state in running_states()}
        assert states.get(process.pid) == (None if alone else {"rekd_half": str(half)})
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert "stopped" in output.read_text() and "Traceback" not in output.read_text()
    with pytest.raises(OSError):
        front.send("GET", "/healthz")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    own = f"user-data-dir={tmp_path_factory.mktemp('chromium')}"
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync", own):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(service=Service(shutil.which("chromedriver")), options=options) as browser:
        yield browser


def set_width(browser, width):
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def of_page(browser, script, *given):
    return browser.execute_script(f"const at = (id) => document.getElementById(id); {script}", *given)


def shown(browser, what):
    script = f"return !at('{what}').hidden && at('{what}').textContent.trim() !== ''"
    wait_until(lambda: of_page(browser, script), 60)


@pytest.mark.debian
def test_a_browser_highlights_the_words_that_decided_and_shows_what_a_text_holds_as_text(browser, front, server):
    text = "🎬 The <b>film</b> was great!\n<img src=x onerror=\"document.title='broken'\"> Über café 東京 & wonderful"
    with Client(server.grpc_url) as client:
        [expected] = client.predict([text])
    for width, scheme in ((1280, "light"), (390, "dark")):
        set_width(browser, width)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(front.url)
        wait_until(lambda: "rekd, version 1" in of_page(browser, "return at('version-shown').textContent"), 60)
        of_page(browser, "at('text').value = arguments[0]; at('ask').requestSubmit()", text)
        shown(browser, "answer")
        marks = of_page(browser, "return [...document.querySelectorAll('mark')].map((mark) => "
                        "[mark.textContent, Number(mark.style.getPropertyValue('--strength'))])")  # fmt: skip
        assert [mark for mark, _ in marks] == [span.text for span in expected.rationale]
        by_score = sorted(range(len(marks)), key=lambda index: expected.rationale[index].score)
        assert [marks[index][1] for index in by_score] == sorted(strength for _, strength in marks)
        assert of_page(browser, "return at('marked').textContent") == text
        assert of_page(browser, "return at('verdict').textContent").startswith(expected.label)
        assert of_page(browser, "return at('facts').textContent").startswith("read")
        assert browser.get_log("browser") == [] and browser.title != "broken"
        wide, paper = of_page(browser, "return [document.documentElement.scrollWidth, "
                              "getComputedStyle(document.body).backgroundColor]")  # fmt: skip
        assert wide <= width, "nothing sticks out"
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 600) == (scheme == "light")
    curl = of_page(browser, "return at('code').textContent")
    done = subprocess.run(["sh", "-c", f"curl --silent --fail {curl.removeprefix('curl ')}"], capture_output=True)
    if shutil.which("curl"):
        assert json.loads(done.stdout)["answers"][0]["label"] == expected.label, "the shell gets the very text"
    of_page(browser, "at('as-python').click()")
    python = of_page(browser, "return at('code').textContent")
    compile(python, "shown", "exec")
    assert 'json={"texts":[' in python
    unlabelled = of_page(browser, "return [...document.querySelectorAll('input, textarea, select')]"
                         ".filter((field) => !field.labels.length).map((field) => field.id)")  # fmt: skip
    assert unlabelled == []
    of_page(browser, "at('text').value = ''; at('ask').requestSubmit()")
    shown(browser, "alert")


class TwoVersions(Stub):
    """The older one keeps the second word, and is less sure."""

    def infer(self, request):
        outputs = super().infer(request)
        if self.asked[-1] == "1":
            outputs["mask"], outputs["probabilities"] = np.roll(outputs["mask"], 1, axis=1), np.float32([[0.6, 0.4]])
            outputs.version = "1"
        return outputs


@pytest.fixture
def several(rationalizer):
    """A front before a stand-in for Triton that serves two versions, which answer otherwise."""
    triton = TwoVersions(parameters_of(rationalizer))
    triton.configs["2"] = dict(triton.configs["1"])
    with Listening() as front, MonkeyPatch.context() as patch:
        made = app_module.create_app
        patch.setattr(app_module, "create_app", lambda *given, **options: made(*given, **options, transport=triton))
        front.start("triton.example:8001")
        wait_until(lambda: front.send("GET", "/healthz").status == 200)
        yield front


@pytest.mark.debian
def test_a_browser_compares_two_versions(browser, several):
    """Choosing another one asks it of the same text, and says what the one before said."""
    browser.get(several.url)
    wait_until(lambda: not of_page(browser, "return at('version-label').hidden"), 60)
    options = of_page(browser, "return [...at('version').options].map((option) => option.textContent)")
    assert options == [f"rekd, version {number}, up to 25.0% of the words" for number in (2, 1)]
    set_width(browser, 320)
    assert of_page(browser, "return document.documentElement.scrollWidth") <= 320, "nothing sticks out"
    of_page(browser, "at('text').value = 'good film'; at('ask').requestSubmit()")
    shown(browser, "answer")
    marks = "return [...document.querySelectorAll('mark')].map((mark) => mark.textContent)"
    assert of_page(browser, marks) == ["good"] and of_page(browser, "return at('compared').hidden")
    first = of_page(browser, "return at('verdict').lastChild.textContent")
    def choose(index):
        of_page(browser, "at('version').value = arguments[0]; at('version').dispatchEvent(new Event('change'))", index)
    choose("1")
    wait_until(lambda: of_page(browser, marks) == ["film"], 60)
    said = of_page(browser, "return at('compared').textContent")
    assert said == f"rekd, version 2 said negative, {first}, from other words."
    assert first != of_page(browser, "return at('verdict').lastChild.textContent") == "60.0%"
    assert "rekd 1" in of_page(browser, "return at('facts').textContent")
    assert '"model":"rekd","version":"1"' in of_page(browser, "return at('code').textContent")
    choose("0")
    wait_until(lambda: of_page(browser, marks) == ["good"], 60)
    assert "rekd, version 1 said" in of_page(browser, "return at('compared').textContent")
    assert '"version"' not in of_page(browser, "return at('code').textContent"), "the newest, whichever it is"
    of_page(browser, "at('text').value = 'bad film'; at('ask').requestSubmit()")
    wait_until(lambda: of_page(browser, marks) == ["bad"] and of_page(browser, "return at('compared').hidden"), 60)
    assert browser.get_log("browser") == []


@pytest.mark.debian
def test_a_browser_shows_the_patches_that_decided(browser, image_front, image_server, tmp_path):
    pixels = some_images(1, height=32, width=24)[0]
    picture = tmp_path / "a picture.png"
    picture.write_bytes(written(pixels, "PNG"))
    with Client(image_server.grpc_url) as client:
        [expected] = client.predict([pixels])
    browser.get(image_front.url)
    wait_until(lambda: not of_page(browser, "return at('image-part').hidden"), 60)
    browser.find_element("id", "file").send_keys(str(picture))
    shown(browser, "answer")
    best = max(expected.rationale, key=lambda patch: patch.score)
    ranked = of_page(browser, "return [...at('ranked').children].map((item) => item.firstChild.textContent)")
    assert ranked[0] == f"row {best.row + 1}, column {best.column + 1}" and len(ranked) == len(expected.rationale)
    every = [(8 * column, 8 * row, 8 * column + 8, 8 * row + 8) for row in range(4) for column in range(3)]
    others = [box for box in every if box not in [patch.box for patch in expected.rationale]]
    light = of_page(browser, """
        const canvas = at('picture'), pen = canvas.getContext('2d'), factor = canvas.width / 24;
        return arguments[0].map(([left, top, right, bottom]) => {
            const { data } = pen.getImageData(left * factor, top * factor, 8 * factor, 8 * factor);
            return data.filter((_, index) => index % 4 === 2).reduce((sum, value) => sum + value, 0) / data.length;
        });""", [best.box, *others])
    assert light[0] > 1.8 * max(light[1:]), "blue of the strongest patch, and of those that did not decide"
    assert "'image=@a picture.png'" in of_page(browser, "return at('code').textContent")
    assert [entry for entry in browser.get_log("browser") if image_front.url in entry["message"]] == []
