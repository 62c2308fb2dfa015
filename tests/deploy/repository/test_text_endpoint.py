"""The first and the last step of the endpoint for texts or image files. Their answers: test_triton_families."""

import struct
import sys

import numpy as np
import pytest
from families import another, some_images, written
from reference_repository import artefacts_of
from triton_stub import Request, started

from rekd_deploy.repository.backend.endpoint import LARGEST_TEXT
from rekd_deploy.repository.config import CONFIG_FILE, PREPARE, ServingSettings, config_text, read_config
from rekd_deploy.repository.reader import check_repository
from rekd_deploy.repository.text_endpoint import endpoint_configs, place_endpoint
from rekd_deploy.repository.writer import write_repository


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
PNG = written(some_images(1, 40, 30)[0], "PNG")
BAD = [("text", b"", "text 2 is empty"), ("text", b" \t\n ", "only white space"),
       ("text", "très bien 🎬".encode()[:-1], "text 2 is not UTF-8"),
       *(("text", b"A dull " + bad, "byte 8 is wrong") for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80")),
       ("text", b"x" * (LARGEST_TEXT + 1), "at most 1048576"),
       *(("image", bad, "image 2 cannot be read: neither") for bad in (b"", b"no image", written(SHOE, "BMP"))),
       *(("image", written(SHOE, kind)[:90], "image 2 cannot be read") for kind in ("JPEG", "PNG")),
       ("image", PNG[:60] + bytes(99) + PNG[159:], "image 2 cannot be read"),
       ("image", PNG[:16] + struct.pack(">II", 2**16, 2**16) + PNG[24:], "image 2 cannot be read"),
       ("image", PNG[:16] + struct.pack(">II", 0, 40) + PNG[24:], "image 2 cannot be read"),
       ("image", written(some_images(1, 40, 31)[0], "JPEG"), "31 x 40 pixels; at most 1200")]  # fmt: skip
BAD_FILES = {kind: [content for each, content, reason in BAD if each == kind and "1200" not in reason] for kind in GOOD}


@pytest.mark.parametrize(("kind", "content", "reason"), BAD)
def test_what_cannot_be_used_is_refused_and_its_neighbours_are_not(
    rationalizer, image_rationalizer, inside_triton, monkeypatch, tmp_path, kind, content, reason
):
    model, item = (rationalizer, "good film") if kind == "text" else (image_rationalizer, SHOE)
    for name, config in endpoint_configs(artefacts_of(model), ServingSettings()).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG_FILE).write_text(config_text(config))
    (tmp_path / f"rekd_{kind}" / "1").mkdir()
    place_endpoint(artefacts_of(model), tmp_path, "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    prepare = started(tmp_path, PREPARE)
    monkeypatch.setitem(prepare._answer.__globals__, "LARGEST_IMAGE", 1200)
    (name, expected), *_ = model.preprocessor([item]).inputs.items()
    columns = ([[each] for each in contents] for contents in ([GOOD[kind]], [GOOD[kind], content]))
    good, bad = (Request({kind: np.array(column, dtype=object)}, [name]) for column in columns)
    first, refused, last = prepare.execute([good, bad, good])
    assert reason in str(refused.error) and refused.error.code == 1
    for neighbour in (first, last):
        np.testing.assert_array_equal(neighbour.outputs[name], expected)
