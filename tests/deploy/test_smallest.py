"""The wheel in an environment of what it needs and no more: NumPy 2, and Debian's Python 3.13 where there is one.

It serves, asks and answers there as the model does here, and says which extra a command lacks.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from families import assert_same_answers, some_images, written
from servers import wait_until

from rekd_deploy import Client, Prediction
from rekd_deploy.export.graphs import export
from rekd_deploy.repository.config import ENSEMBLE, MANIFEST, SINGLE
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save
from rekd_train.files import sha256, write_json

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-base" / "bin" / "python"
pytestmark = [pytest.mark.triton, pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("rekd_train", "rekd_deploy"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "built", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("built/*.whl"))


class Installed:
    """The wheel in that environment; its programs know nothing of this one's packages."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        if not (PYTHON.parents[1] / "installed").exists():
            pytest.skip("there is no environment .venv-base; fix: make environment")
        self.folder = folder
        packages = folder / "packages"
        command = [PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", packages, wheel]
        subprocess.run(command, check=True)
        own = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        self.options = {"env": {**own, "PYTHONPATH": str(packages)}, "cwd": folder}

    def run(self, *arguments) -> subprocess.CompletedProcess:
        command = [PYTHON, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, **self.options)

    @contextmanager
    def serving(self, repository: Path):
        """What rekd-serve prints, once it is ready."""
        ports, output = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")], self.folder / "output"
        command = [PYTHON, "-m", "rekd_deploy.cli.serve", repository, *ports, "--log", self.folder / "log"]
        with open(output, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **self.options)
        try:
            wait_until(lambda: "Ctrl-C" in output.read_text() or process.poll() is not None, 120)
            yield output.read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="module")
def installed(wheel_file, tmp_path_factory):
    return Installed(wheel_file, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module", params=["text", "image"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, rationalizer, image_rationalizer):
    return rationalizer if kind == "text" else image_rationalizer


@pytest.fixture(scope="module")
def root(kind, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp(kind)
    artefacts = export(save(model, folder / "checkpoint"), folder, single_graph=True)
    return write_repository(artefacts, folder / "repository", text_endpoint=kind == "text")  # Pillow is not there


@pytest.fixture(scope="module")
def served(installed, root):
    with installed.serving(root) as said:
        yield dict(re.findall(r"(?m)^(gRPC|HTTP) +(\S+)", said))
    log = (installed.folder / "log").read_text()
    assert "used_dltensor" not in log and "PyCapsule" not in log and "Traceback" not in log


def test_the_python_is_debians_newest_with_numpy_2(installed):
    said = installed.run("-c", "import numpy, sys; print(sys.version_info[:2], numpy.__version__[0])").stdout
    debians = Path("/usr/bin/python3.13")
    complete = debians.exists() and subprocess.run(
        ["sh", ROOT / "scripts" / "preflight.sh"], env={**os.environ, "PYTHON": str(debians)}, capture_output=True)
    newest = (3, 13) if complete and complete.returncode == 0 else sys.version_info[:2]
    assert said == f"{newest} 2\n"


def test_what_it_serves_is_what_the_model_answers(served, model, kind, texts):
    items = some_images(70) if kind == "image" else [*texts, *("good film and " * n + "end" for n in range(60))]
    for url in served.values():
        for name in (ENSEMBLE, SINGLE):
            with Client(url, model=name) as client:
                assert_same_answers(client.predict(items), model.predict(items))


@pytest.mark.parametrize("kind", ["text"], indirect=True)
def test_strings_come_and_go_whole(served, model, texts):
    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

    def asked(client, *contents):
        tensor = InferInput("text", [len(contents), 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[content] for content in contents], dtype=object))
        return client.infer("rekd_text", [tensor])

    with InferenceServerClient(served["gRPC"]) as client:
        answer, wanted = asked(client, *(text.encode() for text in texts)), model.predict(texts)
        assert answer.as_numpy("label")[:, 0].tolist() == [each.label.encode() for each in wanted]
        for found, each in zip(answer.as_numpy("rationale")[:, 0], wanted, strict=True):
            assert [part["text"] for part in json.loads(found)] == [span.text for span in each.rationale]
        np.testing.assert_allclose(answer.as_numpy("doubt")[:, 0], [each.doubt for each in wanted], rtol=1e-6)
        long = b"x" * (1 << 21)
        for bad, reason in ((b"a\xff", "text 2 is not UTF-8: byte 2"), (b"", "text 2"), (long, "bytes; at most")):
            with pytest.raises(InferenceServerException, match=reason):
                asked(client, b"good", bad)
        assert len(asked(client, "good film é ".encode() * 10_000).as_numpy("label")) == 1


def test_it_asks_a_server_and_answers_in_process(installed, served, model, kind, root, texts):
    if kind == "image":
        (installed.folder / "a.png").write_bytes(written(some_images(1)[0], "PNG"))
        said = installed.run("-m", "rekd_deploy.cli.query", "--local", root, "--image", "a.png").stderr
        assert said == "error: the Python package 'PIL' is not installed; fix: pip install 'rekd-rationales[images]'\n"
        return
    for place in (["--url", served["gRPC"]], ["--url", served["HTTP"]], ["--local", root]):
        done = installed.run("-m", "rekd_deploy.cli.query", *place, "--json", *texts)
        assert done.returncode == 0, done.stderr
        answers = [Prediction.from_dict(json.loads(line)) for line in done.stdout.splitlines()]
        assert_same_answers(answers, model.predict(texts))


@pytest.mark.parametrize("kind", ["text"], indirect=True)
def test_without_dlpack_nothing_wrong_is_answered(installed, root, tmp_path):
    """What the stub does by itself under NumPy 2 is refused at the warm-up."""
    copy = shutil.copytree(root, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST).read_text())
    changed = [*copy.glob("*/1/triton_tensors.py")]
    assert len(changed) == 4, "selector, predictor, both in one, the endpoint"
    for path in changed:
        path.write_text(path.read_text().replace("BY_DLPACK = int", "BY_DLPACK = False and int"))
        manifest["repository"]["files"][path.relative_to(copy).as_posix()] = sha256(path)
    write_json(copy / MANIFEST, manifest)
    with installed.serving(copy) as said:
        assert "Ctrl-C" not in said and "from_dlpack" in said, said


@pytest.mark.parametrize(("arguments", "package", "extra"), [
    ("train.cli.main run demo_student --output new", "jinja2|torch|safetensors", "train"),
    ("train.cli.main evaluate CKPT", "jinja2|torch|safetensors", "train"),
    ("deploy.cli.export CKPT", "onnx|torch", "export"), ("deploy.cli.bench report RESULT", "jinja2", "bench"),
    ("deploy.cli.bench latency REPO --checkpoint CKPT", "torch", "train"),
    ("deploy.cli.serve --http 0", "fastapi", "http"), ("deploy.cli.query --file texts.parquet", "pyarrow", "data"),
    ("deploy.cli.demo", "torch|safetensors|jinja2", "demo")])  # fmt: skip
def test_every_command_says_which_extra_it_lacks(installed, checkpoint, repository, arguments, package, extra):
    (installed.folder / "texts.parquet").touch()
    places = {"CKPT": checkpoint, "REPO": repository,
              "RESULT": ROOT / "benchmarks" / "results" / "demo" / "latency.json"}  # fmt: skip
    module, *rest = arguments.split()
    train = "from rekd_train.cli.main import main; main()"
    command = ["-m", f"rekd_{module}"] if module.startswith("deploy") else ["-c", train]
    done = installed.run(*command, *(places.get(each, each) for each in rest))
    line = done.stderr.strip().splitlines()[-1]
    said = rf"error: the Python package '({package})' is not installed; fix: pip install 'rekd-rationales\[{extra}\]'"
    assert done.returncode == 1 and re.fullmatch(said, line), done.stderr


def test_python_callers_are_told_the_extra_too(installed):
    said = installed.run("-c", "import rekd_train; rekd_train.load").stderr.splitlines()[-1]
    assert said.startswith("rekd_train.errors.MissingExtraError: ") and "rekd-rationales[train]" in said


def test_the_wheel_has_its_licence_its_types_and_its_files(wheel_file):
    with ZipFile(wheel_file) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    for wanted in ("licenses/LICENSE", "rekd_train/py.typed", "rekd_deploy/py.typed", "presets/paper.toml",
                   "model_card.md.j2", "page/index.html", "templates/report.html.j2", "backend/strings.py"):
        assert any(name.endswith(wanted) for name in names), wanted
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11\n" in metadata
    for number in (11, 12, 13):
        assert f"Classifier: Programming Language :: Python :: 3.{number}" in metadata
    assert "Classifier: Typing :: Typed" in metadata
    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    found = {re.split(r"[ \[<>=;]", line.partition(": ")[2])[0] for line in base}
    grpc = {"tritonclient", "grpcio", "protobuf", "packaging"}
    assert found == {"numpy", "pydantic", "tokenizers", "typer", "rich", "urllib3", *grpc}


def test_it_brings_no_number_types_that_it_does_not_use(installed):
    done = installed.run("-c", "import tritonclient.grpc, tritonclient.grpc.model_config_pb2, ml_dtypes")
    assert done.stderr.endswith("No module named 'ml_dtypes'\n"), done.stderr
