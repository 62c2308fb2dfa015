"""A served model's description survives the config and refuses what does not belong together."""

from __future__ import annotations

import base64
import zlib

import pytest
from families import some_images

from rekd_deploy.contract.description import ServedDescription
from rekd_deploy.errors import RepositoryError


@pytest.fixture(scope="module")
def description(rationalizer) -> ServedDescription:
    return ServedDescription.of(rationalizer.preprocessor, tuple(rationalizer.labels))


def test_parameters_round_trip(rationalizer, image_rationalizer):
    for model, items in ((rationalizer, ["The film was great!"]), (image_rationalizer, some_images(1))):
        description = ServedDescription.of(model.preprocessor, tuple(model.labels))
        parameters = description.to_parameters()
        again = ServedDescription.from_parameters(parameters)
        assert again == description and ("tokenizer" in parameters) == (model is rationalizer)
        ours, theirs = (each(items).inputs for each in (again.preprocessor(), model.preprocessor))
        assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("labels", "preprocessing", "tokenizer", "preprocessing_sha256")),
        ("labels", "{"),
        ("preprocessing", "[]"),
        ("preprocessing", '{"kind": "image", "height": 16}'),
        ("preprocessing", '{"kind": "sound", "max_length": 8, "lengths": []}'),
        ("preprocessing", '{"kind": "text", "max_length": 1, "lengths": []}'),
        ("preprocessing", '{"kind": "text", "max_length": 8, "lengths": [], "unknown": 1}'),
        ("tokenizer", "not base64!"),
        ("tokenizer", "QUJD"),
    ],
)
def test_a_parameter_that_is_missing_or_unreadable(description, key, value):
    parameters = {name: text for name, text in (description.to_parameters() | {key: value}).items() if text is not None}
    with pytest.raises(RepositoryError, match=f"no parameter {key};" if value is None else "cannot be read"):
        ServedDescription.from_parameters(parameters)


def test_another_tokenizer_is_refused(description):
    changed = description.tokenizer_json.replace('"film"', '"kilm"')
    tokenizer = base64.b64encode(zlib.compress(changed.encode())).decode()
    served = ServedDescription.from_parameters(description.to_parameters() | {"tokenizer": tokenizer})
    with pytest.raises(RepositoryError, match="fingerprint"):
        served.preprocessor()
