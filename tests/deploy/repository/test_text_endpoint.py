"""The first and the last step of the endpoint for texts or image files. Their answers: test_triton_families."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from families import another, some_images
from malformed import written
from reference_repository import artefacts_of
from test_triton_model import Request, started, utilities  # noqa: F401  a fixture

from rekd_deploy.repository.backend.endpoint import LARGEST_TEXT
from rekd_deploy.repository.config import ANSWER, CONFIG_FILE, PREPARE, ServingSettings, config_text, read_config
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.repository.text_endpoint import endpoint_configs, place_endpoint
from rekd_deploy.repository.writer import write_repository


@pytest.fixture(params=["text", "image"])
def kind(request):
    return request.param


@pytest.fixture
def model(kind, rationalizer, image_rationalizer):
    return {"text": rationalizer, "image": image_rationalizer}[kind]


@pytest.fixture
def steps(kind, model, tmp_path):
    """A folder with both steps' models."""
    made = artefacts_of(model)
    for name, config in endpoint_configs(made, ServingSettings()).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).write_text(config_text(config))
    (tmp_path / f"rekd_{kind}" / "1").mkdir()
    place_endpoint(made, tmp_path, "1")
    return tmp_path


def test_the_steps_of_the_endpoint(kind, model):
    for single, graphs in ((False, ["rekd_selector", "rekd_predictor"]), (True, ["rekd_single"])):
        whole = endpoint_configs(artefacts_of(model, single), ServingSettings())[f"rekd_{kind}"]
        assert [tensor.name for tensor in whole.input] == [kind]
        answers = ["label", "rationale", "rate", "truncated", "probabilities"]
        assert [tensor.name for tensor in whole.output] == answers
        assert [step.model_name for step in whole.ensemble_scheduling.step] == [PREPARE, *graphs, ANSWER]


def test_it_comes_stays_and_goes_with_its_export(artefacts, tmp_path):
    root = write_repository(artefacts, tmp_path / "r", text_endpoint=True)
    files, before = check_repository(root)["repository"]["files"], root.stat().st_ino
    assert {"rekd_text/config.pbtxt", "rekd_text/1/.gitkeep", "rekd_prepare/1/tokenizer.json",
            "rekd_answer/1/rekd_train/inputs/text.py"} <= set(files)  # fmt: skip
    assert "rekd_answer/1/tokenizer.json" not in files, "texts are tokenised once"
    write_repository(artefacts, root, text_endpoint=True)
    assert root.stat().st_ino == before, "the same export again changes nothing"
    write_repository(another(artefacts, 2), root, text_endpoint=True, keep=2)
    steps = read_config(root / "rekd_text" / CONFIG_FILE).ensemble_scheduling.step
    assert [step.model_version for step in steps] == [2, 2, 2, 2]
    assert sorted(path.name for path in (root / PREPARE).iterdir()) == ["2", CONFIG_FILE]
    write_repository(artefacts, root)
    assert not (root / "rekd_text").exists() and not (root / PREPARE).exists()
    check_repository(root)


SHOE = some_images(1)[0]
GOOD = {"text": b"good film", "image": written(SHOE, "PNG")}
BAD = [
    ("text", b"", "text 2 is empty"),
    ("text", b"  ", "only white space"),
    ("text", b"\xff\xfe", "text 2 is not UTF-8"),
    ("text", b"x" * (LARGEST_TEXT + 1), "at most 1048576"),
    ("image", b"no image", "image 2 cannot be read: neither JPEG nor PNG"),
    ("image", GOOD["image"][:90], "image 2 cannot be read"),
    ("image", written(SHOE, "BMP"), "neither JPEG nor PNG"),
    ("image", written(some_images(1, 20, 30)[0], "JPEG"), "30 x 20 pixels; at most 200"),
]


@pytest.mark.parametrize(("kind", "content", "reason"), BAD, indirect=["kind"])
def test_what_cannot_be_used_is_refused_and_its_neighbours_are_not(
    steps, kind, model, utilities, monkeypatch, content, reason  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(sys, "path", [*sys.path])
    prepare = started(steps, PREPARE)
    monkeypatch.setitem(prepare._answer.__globals__, "LARGEST_IMAGE", 200)
    (name, expected), *_ = model.preprocessor([SHOE if kind == "image" else "good film"]).inputs.items()
    columns = ([[each] for each in contents] for contents in ([GOOD[kind]], [GOOD[kind], content]))
    good, bad = (Request({kind: np.array(column, dtype=object)}, [name]) for column in columns)
    first, refused, last = prepare.execute([good, bad, good])
    assert reason in str(refused.error) and refused.error.code == 1
    for neighbour in (first, last):
        np.testing.assert_array_equal(neighbour.outputs[name], expected)


def test_the_copied_modules_suffice(steps, tmp_path):
    """A server has no rekd: the step is built where nothing of ours can be imported but the copies."""
    folder = shutil.copytree(steps / PREPARE / "1", tmp_path / "alone")
    code = (
        "import sys, json; from pathlib import Path; sys.path[:] = [p for p in sys.path if p]\n"
        f"folder = Path({str(folder)!r}); sys.path.insert(0, str(folder)); sys.meta_path = "
        "[f for f in sys.meta_path if 'editable' not in getattr(f, '__name__', type(f).__name__).lower()]\n"
        "import model, rekd_train\n"
        "assert rekd_train.__file__.startswith(str(folder))\n"
        "model.build_step('prepare', json.loads((folder / 'served.json').read_text()), folder)\n"
        "assert not {'torch', 'rekd_deploy'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
