"""A checkpoint taken up again: under its own record, with other data, or imported without any record."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from toys import rekd_train

from rekd_train.checkpoints import checkpoint, read_description
from rekd_train.checkpoints.recorded import recorded_config
from rekd_train.config.run import run_config
from rekd_train.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
WORDS = ["good", "bad", "film", "the", "was"]
PAIR = ["--selector", GOLDEN / "g_bert", "--predictor", GOLDEN / "f_bert", "--backbone", GOLDEN / "bert-backbone"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    more = ["--tokenizer", root / "vocab.txt", "--labels", "a, b,c", "--max-length", 32, "--output", root / "pair"]
    assert rekd_train("import-official", "--family", "bert", *PAIR, *more) == 0
    return root / "pair"


def test_an_import_is_calibrated_compacted_evaluated_and_replaces_nothing_unasked(imported, tmp_path, capsys):
    rows = [{"text": " ".join(np.random.default_rng(i).choice(WORDS, 14)), "label": "abc"[i % 3]} for i in range(90)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, settings = f'name = "table"\npath = "{tmp_path / "mine.jsonl"}"\nlengths = [64]\n', tmp_path / "mine.toml"
    settings.write_text(f'name = "mine"\n[data]\n{data}')
    pair, calibrated, compacted = checkpoint.load(imported), tmp_path / "calibrated", tmp_path / "compacted"
    assert (pair.labels, pair.policy.selectable, pair.policy.budget) == (["a", "b", "c"], "all", None)
    assert pair.preprocessor.settings.max_length == 32
    for output, *arguments in (
        (calibrated, "calibrate", imported, "--data", settings, "--target", 0.2, "--set", "selection.budget=0.3",
         "--set", "selection.minimum=1"),
        (tmp_path / "again", "import-official", "--family", "bert", *PAIR, "--tokenizer", imported / "tokenizer.json"),
        (compacted, "compact", calibrated, "--set", "stages.compact_epochs=1", "--json")):  # fmt: skip
        before = {path.name: path.read_bytes() for path in shutil.copytree(imported, output).iterdir()}
        assert rekd_train(*arguments, "--output", output) == 1
        assert f"{output.name} is a checkpoint already; fix: " in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        assert rekd_train(*arguments, "--output", output, "--overwrite") == 0
    policy, origins = checkpoint.load(calibrated).policy, str(read_description(calibrated)["training"]["origins"])
    assert "authors' code" in origins and "mine.jsonl" in origins
    assert (policy.budget, policy.selectable) == (0.3, "real")
    assert checkpoint.read_metrics(calibrated)["dev"]["rate"] == pytest.approx(0.2, abs=0.05)
    assert checkpoint.load(compacted).predictor.operator == "compact"
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(compacted)
    assert rekd_train("evaluate", imported, "--data", settings, "--draws", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["examples"] == 90, "an import has seen none of it"


def test_without_a_record_the_data_must_be_named_and_the_networks_are_the_checkpoints(imported):
    with pytest.raises(CheckpointError, match="--data PRESET"):
        recorded_config(imported)
    config = recorded_config(imported, overrides=["data.name=aclimdb", "data.path=x", "data.max_length=30"])
    assert (config.data.name, config.predictor.width, config.optimisation.learning_rate) == ("aclimdb", 32, 5e-5)
    config = recorded_config(imported, "minilm_teacher", ["data.train_examples=100"])
    assert (config.data.name, config.data.train_examples, config.predictor.width) == ("imdb", 100, 32)
    assert config.data.max_length == 32, "the model's own"
    for data, overrides, message in (
        ("minilm_teacher", ["data.trian_examples=100"], "data.trian_examples: unknown key"),
        ("digits", [], "data 'digits' are images"), ("nonesuch", [], "no preset 'nonesuch'")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            recorded_config(imported, data, overrides)


def test_records_are_used_changed_and_taken_up(rationalizer, tmp_path):
    record = run_config("demo_student", ["seed=7"]).model_dump()
    path = checkpoint.save(rationalizer, tmp_path / "c", training={"name": "x", "config": record})
    assert recorded_config(path) == run_config("demo_student", ["seed=7"])
    record["selection"]["minimum"] = 1
    old = checkpoint.save(rationalizer, tmp_path / "old", training={"name": "x", "config": record})
    assert recorded_config(old).selection.minimum == 1, "as it was trained, not today's default"
    changed = recorded_config(path, None, ["selection.target=0.05"])
    assert changed.selection.target == 0.05 and changed.seed == 7
    record = json.loads((GOLDEN / "run_v1.json").read_text())
    path = checkpoint.save(rationalizer, tmp_path / "c", training={"name": "x", "config": record})
    description = json.loads((path / "config.json").read_text()) | {"version": 1}
    (path / "config.json").write_text(json.dumps(description))
    assert recorded_config(path) == run_config("paper_imdb_bert_tiny_rekd")
    description["training"]["config"]["acceleration"]["gather"] = False
    (path / "config.json").write_text(json.dumps(description))
    texts = ["a good film"]
    assert checkpoint.load(path).predict(texts) == rationalizer.predict(texts), "the model is whole all the same"
    with pytest.raises(ConfigError, match="acceleration.gather=False is no longer there.*'true'; fix"):
        recorded_config(path)
