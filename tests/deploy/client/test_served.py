"""A served model's description survives the config and refuses what does not belong together."""

from __future__ import annotations

import base64
import subprocess
import sys
import zlib

import pytest

from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import RepositoryError


@pytest.fixture(scope="module")
def description(rationalizer) -> ServedDescription:
    return ServedDescription.of(rationalizer.preprocessor, tuple(rationalizer.labels))


def test_parameters_round_trip(description, rationalizer):
    parameters = description.to_parameters()
    assert all(isinstance(value, str) for value in parameters.values())
    again = ServedDescription.from_parameters(parameters)
    assert again == description
    text = ["The film was great!"]
    ours, theirs = again.preprocessor()(text).inputs, rationalizer.preprocessor(text).inputs
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize("key", ["labels", "preprocessing", "tokenizer", "preprocessing_sha256"])
def test_missing_parameter_is_named(description, key):
    parameters = description.to_parameters()
    del parameters[key]
    with pytest.raises(RepositoryError, match=key):
        ServedDescription.from_parameters(parameters)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", "{"),
        ("preprocessing", "[]"),
        ("preprocessing", '{"kind": "sound", "max_length": 8, "lengths": []}'),
        ("preprocessing", '{"kind": "text", "max_length": 1, "lengths": []}'),
        ("preprocessing", '{"kind": "text", "max_length": 8, "lengths": [], "unknown": 1}'),
        ("tokenizer", "not base64!"),
        ("tokenizer", "QUJD"),
    ],
)
def test_unreadable_parameter(description, key, value):
    with pytest.raises(RepositoryError, match="cannot be read"):
        ServedDescription.from_parameters(description.to_parameters() | {key: value})


def test_another_tokenizer_is_refused(description):
    changed = description.tokenizer_json.replace('"film"', '"kilm"')
    assert changed != description.tokenizer_json
    tokenizer = base64.b64encode(zlib.compress(changed.encode())).decode()
    served = ServedDescription.from_parameters(description.to_parameters() | {"tokenizer": tokenizer})
    with pytest.raises(RepositoryError, match="fingerprint"):
        served.preprocessor()


def test_no_torch():
    code = (
        "import sys, rekd_deploy.contract.description;"
        " sys.exit(any(m in sys.modules for m in ('torch', 'onnxruntime')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
