"""A checkpoint describes itself, is read strictly and written atomically."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_rationalizer, tiny_tokenizer_json
from safetensors import SafetensorError

import rekd_train.checkpoints.checkpoint
from rekd_train import CheckpointError
from rekd_train.checkpoints import description as descriptions
from rekd_train.checkpoints.checkpoint import checkpoint_hash, read_metrics, save
from rekd_train.checkpoints.description import read_description
from rekd_train.files import atomic_directory, write_text

NEEDED = ["config.json", "policy.json", "tokenizer.json", "selector.safetensors", "predictor.safetensors"]


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(directory: Path, **changes) -> None:
    path = directory / "config.json"
    description = json.loads(path.read_text())
    description.update(changes)
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not None}))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        rekd_train.load(directory)
    message = str(caught.value)
    assert "\n" not in message, "one line"
    assert str(directory) in message
    return message


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


# there and back


@pytest.mark.parametrize("operator", ["compact", "zero"])
def test_a_loaded_model_answers_bit_for_bit_the_same(tmp_path, texts, operator):
    original = make_rationalizer(seed=5, operator=operator)
    loaded = rekd_train.load(save(original, tmp_path / "pair"))
    assert not loaded.training
    inputs = {name: torch.from_numpy(array) for name, array in original.preprocessor(texts).inputs.items()}
    with torch.no_grad():
        assert torch.equal(original.selector_logits(inputs), loaded.selector_logits(inputs))
        assert torch.equal(original.class_logits(inputs), loaded.class_logits(inputs))
    assert loaded.predict(texts) == original.predict(texts)
    for attribute in ("policy", "labels", "probability_temperature", "capacity"):
        assert getattr(loaded, attribute) == getattr(original, attribute)
    assert loaded.predictor.operator == operator


def test_saving_again_gives_the_same_files(checkpoint, tmp_path):
    figures, training = {"test": {"accuracy": 0.5}}, {"name": "tiny"}
    again = save(rekd_train.load(checkpoint), tmp_path / "again", metrics=figures, training=training)
    assert listing(again) == listing(checkpoint)
    for name in listing(checkpoint):
        assert (again / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert checkpoint_hash(again) == checkpoint_hash(checkpoint)


def test_the_hash_follows_what_the_model_computes(checkpoint, copy):
    (copy / "README.md").write_text("other words")
    assert checkpoint_hash(copy) == checkpoint_hash(checkpoint)
    policy = (copy / "policy.json").read_text()
    (copy / "policy.json").write_text(policy.replace("0.25", "0.26"))
    assert checkpoint_hash(copy) != checkpoint_hash(checkpoint)


def test_it_describes_itself(checkpoint):
    description = read_description(checkpoint)
    assert (description["format"], description["version"]) == ("rekd-checkpoint", descriptions.VERSION)
    assert description["labels"] == ["negative", "positive"]
    assert description["selector"]["width"] == 8 and description["predictor"]["width"] == 16
    assert read_metrics(checkpoint) == {"test": {"accuracy": 0.5}}
    card = (checkpoint / "README.md").read_text()
    assert "# tiny" in card and "negative, positive" in card and "test.accuracy: 0.5" in card


# damage


def test_a_path_without_checkpoint(tmp_path):
    assert "not a directory" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("left", [None, 0.0, 0.5, 0.99])
def test_a_file_that_is_missing_or_cut_off_is_named(copy, name, left):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if left is None:
        assert f"{name} is missing" in refusal(copy)
        return
    (copy / name).write_bytes(content[: int(len(content) * left)])
    message = refusal(copy)
    assert name in message or "tokenizer" in message
    assert "fix" in message or "damaged" in message or "cannot be read" in message


@pytest.mark.parametrize("name", ["config.json", "policy.json", "tokenizer.json"])
def test_a_file_that_is_not_text_is_named(copy, name):
    (copy / name).write_bytes(b"\xff\xfe\x00garbage")
    assert name in refusal(copy)


def test_files_of_another_model_are_refused_in_one_line(checkpoint, copy, tmp_path):
    other = save(make_rationalizer(seed=9), tmp_path / "other")
    shutil.copy(other / "predictor.safetensors", copy)
    assert "predictor.safetensors is not the file that config.json describes" in refusal(copy)
    shutil.copy(checkpoint / "predictor.safetensors", copy)
    edit(copy, predictor={**read_description(copy)["predictor"], "layers": 3})
    assert "predictor.safetensors does not fit the sizes" in refusal(copy)
    (copy / "tokenizer.json").write_text(tiny_tokenizer_json().replace('"boring"', '"borring"'))
    assert "tokenizer.json is not the one" in refusal(copy)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"labels": None}, "'labels' is missing"),
        ({"weights_sha256": None}, "'weights_sha256' is missing"),
        ({"weights_sha256": {}}, "SHA-256 differs"),
        ({"preprocessing": None}, "'preprocessing' is missing"),
        ({"preprocessing": {"kind": "text", "max_length": 48, "surprise": 1}}, "surprise"),
        ({"selector": {"family": "lstm"}}, "unknown family 'lstm'"),
        ({"predictor": {"width": -1, "heads": 0}}, "width: .*heads: "),
        ({"operator": "sideways"}, "sideways"),
        ({"labels": ["only one"]}, "does not fit"),
        ({"format": "something-else"}, "not a rekd-checkpoint"),
        *(({"version": version}, "format version") for version in (descriptions.VERSION + 1, 99, "1", None, 1.5)),
        ({"version": 0}, "can no longer be upgraded"),
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_is_refused(copy, changes, problem):
    edit(copy, **changes)
    assert re.search(problem, refusal(copy))


@pytest.mark.parametrize("content", ["[]", "3", "{}"])
def test_another_kind_of_directory_is_refused(copy, content):
    (copy / "config.json").write_text(content)
    assert "rekd-checkpoint" in refusal(copy)


# versions


def test_an_older_version_is_upgraded_step_by_step(copy, checkpoint, texts, monkeypatch):
    expected = rekd_train.load(checkpoint).predict(texts)
    description = json.loads((copy / "config.json").read_text())
    labels = description.pop("labels")
    edit(copy, version=-1, labels=None, names=labels)
    monkeypatch.setitem(descriptions.UPGRADES, -1, lambda old: {**old, "classes": old["names"]})
    monkeypatch.setitem(descriptions.UPGRADES, 0, lambda old: {**old, "labels": old["classes"]})
    assert rekd_train.load(copy).predict(texts) == expected


def test_every_older_version_has_a_rule():
    assert sorted(descriptions.UPGRADES) == list(range(1, descriptions.VERSION))


def test_a_checkpoint_of_version_2_is_read_under_todays_names(copy, checkpoint, texts):
    description = json.loads((copy / "config.json").read_text())
    networks = {role: dict(description[role]) for role in ("selector", "predictor")}
    for network in networks.values():
        network["weights"] = network.pop("pretrained")
    judge = {"predictor": networks["predictor"]}
    edit(copy, version=2, **networks, training={"name": "tiny", "config": networks, "judge": judge})
    found = read_description(copy)
    for part in (found, found["training"]["config"], found["training"]["judge"]):
        assert part["predictor"] == description["predictor"]
    assert rekd_train.load(copy).predict(texts) == rekd_train.load(checkpoint).predict(texts)


# writing


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def raising(error):
    def fails(*_, **__):
        raise error

    return fails


def saved_in_vain(copy, expected, match=None) -> None:
    """A save fails, and leaves the old checkpoint and nothing beside it."""
    before = {name: (copy / name).read_bytes() for name in listing(copy)}
    with pytest.raises(expected, match=match):
        save(make_rationalizer(seed=7), copy)
    assert {name: (copy / name).read_bytes() for name in listing(copy)} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("stage", ["save_file", "write_json", "model_card"])
def test_an_interrupted_save_leaves_the_old_checkpoint_and_nothing_else(copy, monkeypatch, stage):
    monkeypatch.setattr(rekd_train.checkpoints.checkpoint, stage, raising(Interrupted()))
    saved_in_vain(copy, Interrupted)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(copy, monkeypatch, error):
    monkeypatch.setattr(rekd_train.checkpoints.checkpoint, "save_file", raising(error))
    saved_in_vain(copy, CheckpointError, "copy cannot be written .*No space left.*fix: make room")


def test_an_interrupt_between_the_two_renames_brings_the_old_one_back(copy, monkeypatch):
    renames = []
    rename = Path.rename

    def second_fails(self, target):
        renames.append(self)
        if len(renames) == 2:
            raise Interrupted
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    saved_in_vain(copy, Interrupted)


def test_saving_replaces_an_older_checkpoint_whole(copy):
    (copy / "stray.txt").write_text("from before")
    save(make_rationalizer(seed=7), copy)
    assert "stray.txt" not in listing(copy)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_saving_never_replaces_what_is_not_a_checkpoint(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="home.*not a checkpoint"):
        save(make_rationalizer(), home)
    with pytest.raises(CheckpointError, match="thesis.txt.*not a checkpoint"):
        save(make_rationalizer(), home / "thesis.txt")
    assert (home / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert rekd_train.load(save(make_rationalizer(), tmp_path / "empty"))


def test_parents_are_made_and_the_result_is_readable_by_others(tmp_path):
    directory = save(make_rationalizer(), tmp_path / "a" / "b" / "pair")
    assert directory.stat().st_mode & 0o777 == 0o755


def test_a_written_file_is_old_or_new_never_half(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    monkeypatch.setattr(Path, "replace", raising(Interrupted()))
    with pytest.raises(Interrupted):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_a_failed_block_leaves_no_directory(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "new") as work:
        (work / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
