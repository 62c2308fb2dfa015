"""A checkpoint describes itself, is read strictly and written atomically."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import NO_ROOM, contents, make_rationalizer, raising, tiny_tokenizer_json
from safetensors import SafetensorError

import rekd_train.checkpoints as descriptions
import rekd_train.checkpoints.checkpoint
from rekd_train import CheckpointError
from rekd_train.checkpoints import VERSION, read_description
from rekd_train.checkpoints.checkpoint import checkpoint_hash, read_metrics, save
from rekd_train.files import write_text
from rekd_train.inputs.familiarity import Familiarity


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def edit(directory: Path, **changes) -> None:
    description = json.loads((directory / "config.json").read_text()) | changes
    description = {key: value for key, value in description.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(description))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        rekd_train.load(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    return message


@pytest.mark.parametrize("operator", ["compact", "zero"])
def test_a_loaded_model_answers_bit_for_bit_the_same(tmp_path, texts, operator):
    original = make_rationalizer(seed=5, operator=operator)
    loaded = rekd_train.load(save(original, tmp_path / "pair"))
    assert not loaded.training and loaded.predictor.operator == operator
    inputs = {name: torch.from_numpy(array) for name, array in original.preprocessor(texts).inputs.items()}
    with torch.no_grad():
        assert torch.equal(original.selector_logits(inputs), loaded.selector_logits(inputs))
        assert torch.equal(original.class_logits(inputs), loaded.class_logits(inputs))
    assert loaded.predict(texts) == original.predict(texts)
    for attribute in ("policy", "labels", "probability_temperature", "capacity"):
        assert getattr(loaded, attribute) == getattr(original, attribute)


def test_saving_again_gives_the_same_files_and_those_of_another_model_are_refused(checkpoint, copy, tmp_path):
    figures, training = {"test": {"accuracy": 0.5}}, {"name": "tiny"}
    (copy / "stray.txt").write_text("from before, which saving replaces")
    save(rekd_train.load(checkpoint), copy, metrics=figures, training=training)
    assert contents(copy) == contents(checkpoint) and read_metrics(copy) == figures
    (copy / "README.md").write_text("other words")
    assert checkpoint_hash(copy) == checkpoint_hash(checkpoint)
    (copy / "policy.json").write_text((copy / "policy.json").read_text().replace("0.25", "0.26"))
    assert checkpoint_hash(copy) != checkpoint_hash(checkpoint)
    other = save(make_rationalizer(seed=9), tmp_path / "other")
    before = checkpoint_hash(other)
    (other / "familiarity.json").rename(tmp_path / "kept")
    assert checkpoint_hash(other) != before
    (tmp_path / "kept").rename(other / "familiarity.json")
    shutil.copy(other / "predictor.safetensors", copy)
    assert "predictor.safetensors is not the file that config.json describes" in refusal(copy)
    shutil.copy(checkpoint / "predictor.safetensors", copy)
    edit(copy, predictor={**read_description(copy)["predictor"], "layers": 3})
    assert "predictor.safetensors does not fit the sizes" in refusal(copy)
    (copy / "tokenizer.json").write_text(tiny_tokenizer_json().replace('"boring"', '"borring"'))
    assert "tokenizer.json is not the one" in refusal(copy)
    shutil.copytree(other, copy, dirs_exist_ok=True)
    (copy / "familiarity.json").write_text(Familiarity.fit([[1]], [[1]], vocabulary=3).packed())
    assert "familiarity.json is missing, or not the file that config.json describes" in refusal(copy)


@pytest.mark.parametrize("name", ["config.json", "policy.json", "tokenizer.json", "familiarity.json",
                                  "selector.safetensors"])  # fmt: skip
@pytest.mark.parametrize("left", [None, 0.0, 0.5, 0.99, "no text"])
def test_a_file_that_is_missing_cut_off_or_no_text_is_named(copy, name, left):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if left is not None:
        (copy / name).write_bytes(b"\xff\xfe" if left == "no text" else content[: int(len(content) * left)])
    said = refusal(copy)
    assert name in said and re.search("is missing|is damaged|cannot be read|not the file|tokenizer cannot", said)
    shutil.rmtree(copy)
    assert "not a directory" in refusal(copy)


@pytest.mark.parametrize(("changes", "problem"), [
    ({"labels": None}, "'labels' is missing"), ({"weights_sha256": None}, "'weights_sha256' is missing"),
    ({"weights_sha256": {}}, "SHA-256 differs"), ({"preprocessing": None}, "'preprocessing' is missing"),
    ({"preprocessing": {"kind": "text", "max_length": 48, "surprise": 1}}, "surprise"),
    ({"selector": {"family": "lstm"}}, "unknown family 'lstm'"),
    ({"predictor": {"width": -1, "heads": 0}}, "width: .*heads: "), ({"operator": "sideways"}, "sideways"),
    ({"labels": ["only one"]}, "does not fit"), ({"format": "something-else"}, "not a rekd-checkpoint"),
    *(({"version": version}, "format version") for version in (VERSION + 1, 99, "1", None, 1.5)),
    ({"version": 0}, "can no longer be upgraded"),
    *((content, "not a rekd-checkpoint") for content in ("[]", "3", "{}"))], ids=str)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused(copy, changes, problem):
    (copy / "config.json").write_text(changes) if isinstance(changes, str) else edit(copy, **changes)
    assert re.search(problem, refusal(copy))


def test_older_versions_are_upgraded_step_by_step_under_todays_names(copy, checkpoint, texts, monkeypatch):
    edit(copy, version=-1, labels=None, names=["negative", "positive"])
    monkeypatch.setitem(descriptions.UPGRADES, -1, lambda old: {**old, "classes": old["names"]})
    monkeypatch.setitem(descriptions.UPGRADES, 0, lambda old: {**old, "labels": old["classes"]})
    assert rekd_train.load(copy).predict(texts) == rekd_train.load(checkpoint).predict(texts)
    assert sorted(descriptions.UPGRADES) == list(range(-1, VERSION)), "every older version has a rule"
    description = read_description(checkpoint)
    networks = {role: dict(description[role]) for role in ("selector", "predictor")}
    for network in networks.values():
        network["weights"] = network.pop("pretrained")
    judge = {"predictor": networks["predictor"]}
    (copy / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    edit(copy, version=2, **networks, training={"name": "tiny", "config": networks, "judge": judge})
    found = read_description(copy)
    for part in (found, found["training"]["config"], found["training"]["judge"]):
        assert part["predictor"] == description["predictor"]
    assert rekd_train.load(copy).predict(texts) == rekd_train.load(checkpoint).predict(texts)


Interrupted = type("Interrupted", (BaseException,), {})


@pytest.mark.parametrize(("where", "error"), [
    ("save_file", Interrupted()), ("write_json", Interrupted()), ("model_card", Interrupted()), ("save_file", NO_ROOM),
    ("save_file", SafetensorError("No space left"))])  # fmt: skip
def test_a_save_that_fails_leaves_what_was_there_and_nothing_beside_it(copy, monkeypatch, where, error):
    before = contents(copy.parent)
    monkeypatch.setattr(rekd_train.checkpoints.checkpoint, where, raising(error))
    full = None if isinstance(error, Interrupted) else "cannot be written .*No space left.*fix: make room"
    for directory in (copy, copy.parent / "new"):
        with pytest.raises(CheckpointError if full else Interrupted, match=full):
            save(make_rationalizer(seed=7), directory)
        assert contents(copy.parent) == before and [*copy.parent.iterdir()] == [copy]


def test_interrupts_leave_the_old_one_or_the_new(copy, monkeypatch):
    before, rename, calls = contents(copy.parent), Path.rename, []
    def second_fails(path: Path, to: Path):
        calls.append(to)
        return raising(Interrupted())() if len(calls) == 2 else rename(path, to)
    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(Interrupted):
        save(make_rationalizer(seed=7), copy)
    assert contents(copy.parent) == before and [*copy.parent.iterdir()] == [copy]
    write_text(file := copy.with_name("metrics.json"), "old")
    before = contents(copy.parent)
    monkeypatch.setattr(Path, "replace", raising(Interrupted()))
    with pytest.raises(Interrupted):
        write_text(file, "new")
    assert contents(copy.parent) == before and file.read_text() == "old"
    for given, named in ((OSError(28, "full"), file), (OSError(2, "gone", "elsewhere"), "elsewhere")):
        monkeypatch.setattr(Path, "write_bytes", raising(given))
        with pytest.raises(OSError) as error:
            write_text(file, "new")
        assert error.value.filename == str(named), "a full disk is noticed by a write, which knows no name"


def test_saving_never_replaces_what_is_not_a_checkpoint(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for place, problem in ((tmp_path, "not a checkpoint"), (tmp_path / "thesis.txt", "thesis.txt.*not a checkpoint")):
        with pytest.raises(CheckpointError, match=problem):
            save(make_rationalizer(), place)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/pair"):
        assert rekd_train.load(save(make_rationalizer(), tmp_path / name))
        modes = [(tmp_path / name / file).stat().st_mode & 0o777 for file in (".", "selector.safetensors")]
        assert modes == [0o755, 0o644], "readable by others"
