"""rekd-train run: logs, --resume, and what it says when it must stop."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import NO_ROOM, raising, tiny_tokenizer_json
from toys import ToyTexts, rekd_train

from rekd_train import runs
from rekd_train.checkpoints import checkpoint
from rekd_train.config.run import preset_names
from rekd_train.data import DataSet, LabelledTexts
from rekd_train.inputs.text import TextPreprocessor, TextSettings

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs ``rekd-train run`` on a toy task: (exit code, its lines of a kind on stderr)."""
    texts, labels = ToyTexts.words(200, seed=1)
    parts = {"train": slice(0, 120), "dev": slice(120, 160), "test": slice(160, 200)}
    splits = {name: LabelledTexts(texts[part], labels[part]) for name, part in parts.items()}
    data = DataSet(splits, ("negative", "positive"), "made up")
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=24))
    monkeypatch.setattr(runs, "load_data", lambda config: data)
    monkeypatch.setattr(runs, "preprocessor_for", lambda config: preprocessor)
    sizes = "layers = 1\nwidth = 16\nheads = 2\nfeedforward = 32\nhead_width = 16\nvocabulary = "
    sizes += f"{preprocessor.vocabulary_size}\n"
    document = f'name = "toy"\n[data]\nmax_length = 24\n[selector]\n{sizes}[predictor]\n{sizes}'
    (tmp_path / "toy.toml").write_text(f"{document}[optimisation]\nbatch_size = 16\n[stages]\nsave_every = 4\n")
    def call(*arguments: str, kind: str = "error") -> tuple[int, str]:
        code = rekd_train("run", tmp_path / "toy.toml", "-o", tmp_path / "out", "--device", "cpu", *arguments)
        return code, "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith(kind))
    return call


@pytest.fixture
def refused(command, tmp_path):
    """Asserts that calls end in one line each, by patterns, and change nothing."""
    def call(*cases: tuple[tuple[str, ...], str]) -> None:
        before = contents(tmp_path)
        for arguments, pattern in cases:
            code, error = command(*arguments)
            assert code == 1 and re.fullmatch(f"error: .*{pattern}.*", error) and contents(tmp_path) == before
    return call


def interrupt(command, count: int) -> list[int]:
    """Ctrl-C right after the state is saved for the ``count``-th time; the steps of what was saved."""
    save, saved = runs.StateStore.save, []
    def saving(store, snapshot):
        save(store, snapshot)
        saved.append(snapshot.step)
        if len(saved) == count:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.StateStore, "save", saving)
        assert command()[0] == 130
    return saved


def contents(tmp_path) -> dict:
    return {path: path.read_bytes() for path in tmp_path.glob("out*/*")}


def log_of(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out.training" / "log.jsonl").read_text().splitlines()]


def stages_of(tmp_path) -> list[tuple[str, int]]:
    return [(line["stage"], line["step"]) for line in log_of(tmp_path) if line["event"] == "stage"]


def test_notes_and_tensorboard(command, tmp_path):
    short = [f"--set=stages.{stage}" for stage in ("classifier_epochs=0.1", "rationale_epochs=0.1", "compact_epochs=0")]
    code, notes = command(*short, kind="note")
    assert code == 0 and notes.startswith("note: half of the training texts") and "preset short_texts" in notes
    large = ("--set", "selection.target=0.3", "--set", "selection.budget=0.35")
    assert command(*short, *large, "--overwrite", kind="note") == (0, "")
    pytest.importorskip("tensorboard")
    assert command("--overwrite", "--tensorboard")[0] == 0
    assert any("tfevents" in path.name for path in (tmp_path / "out.training").iterdir())


def test_a_run_leaves_a_checkpoint_and_a_log_and_is_not_replaced_unasked(command, refused, tmp_path):
    assert command() == (0, "")
    assert checkpoint.load(tmp_path / "out").labels == ["negative", "positive"]
    assert [path.name for path in (tmp_path / "out.training").iterdir()] == ["log.jsonl"], "and no state"
    assert [stage for stage, _ in stages_of(tmp_path)] == ["classifier", "rationale", "compact"]
    figures = {"loss", "selection_rate", "penalty", "extraction", "learning_rate", "examples_per_second"}
    assert figures <= set().union(*(line for line in log_of(tmp_path) if line["stage"] == "rationale"))
    before, already = contents(tmp_path), f"{tmp_path / 'out'} is a checkpoint already; fix: .*--overwrite"
    refused(((), already), (("--resume",), already), (("--set", "seed=5"), already))
    assert command("--set", "seed=5", "--overwrite") == (0, "")
    assert contents(tmp_path) != before and len(stages_of(tmp_path)) == 3, "a new run begins a new log"


def test_an_interrupted_run_goes_on_and_is_not_replaced_unasked(command, refused, tmp_path):
    saved, state = interrupt(command, 3), tmp_path / "out.training" / "state.pt"
    assert not (tmp_path / "out").exists() and state.exists()
    another = "state of another run: config.seed differ.*fix: the same settings, or --overwrite instead of --resume"
    refused((("--set", "seed=5"), "holds an interrupted run; fix: --resume.*--overwrite"),
            (("--set", "seed=7", "--resume"), another))  # fmt: skip
    assert command("--resume") == (0, "")
    assert stages_of(tmp_path)[:2] == [("classifier", 0), ("classifier", saved[2])] and not state.exists()


def test_there_must_be_something_to_resume(command, refused, tmp_path, monkeypatch):
    state = tmp_path / "out.training" / "state.pt"
    refused((("--resume",), f"nothing to resume: {state} does not exist; fix: "))
    assert list(tmp_path.iterdir()) == [tmp_path / "toy.toml"]
    interrupt(command, 1)
    state.unlink()
    refused(((), "log.jsonl is the log of an earlier run; fix: .*--overwrite"),
            (("--resume",), "nothing to resume.*fix: --overwrite"))  # fmt: skip
    state.write_bytes(b"of an older run")
    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", raising(KeyboardInterrupt()))
        assert command("--overwrite")[0] == 130
    refused((("--resume",), "nothing to resume"))  # a run that begins anew leaves no older state
    assert command("--overwrite") == (0, "")


def test_a_rare_class_is_seen_before_and_after(command, tmp_path, monkeypatch, capsys):
    data = runs.load_data(None)
    splits = {
        name: LabelledTexts([*part.texts, "good film", "bad film"], np.append(part.labels, [2, 2]))
        for name, part in data.splits.items()}
    rare = replace(data, splits=splits, label_names=("negative", "positive", "mixed"), duplicates=3)
    monkeypatch.setattr(runs, "load_data", lambda config: rare)
    assert rekd_train("run", tmp_path / "toy.toml", "-o", tmp_path / "out", "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert "class mixed" in err and "2 (1.6%)" in err and "duplicates dropped: 3" in err
    assert re.search("warning: on test no example is predicted as .*mixed; fix: --set data.class_weights=balanced", out)
    kept = checkpoint.read_metrics(tmp_path / "out")
    assert kept["data"]["splits"]["train"]["classes"] == {"negative": 60, "positive": 60, "mixed": 2}
    assert kept["test"]["never_predicted"][-1] == "mixed" and 0 < kept["test"]["macro_f1"] < 0.8


def test_a_full_disk_leaves_the_old_checkpoint_and_the_state(command, refused, tmp_path, monkeypatch):
    assert command()[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", raising(NO_ROOM))
        assert re.search("cannot be written.*No space left.*--resume", command("--set", "seed=5", "--overwrite")[1])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    refused((("--set", "seed=5", "--resume"), "is a checkpoint already"))
    assert command("--set", "seed=5", "--resume", "--overwrite") == (0, ""), "only the writing is done again"
    assert (tmp_path / "out" / "selector.safetensors").read_bytes() != before["selector.safetensors"]


def test_presets_are_listed_with_their_sources(capsys):
    assert [rekd_train("presets", *more) for more in (["mini"], ["mini", "--json"], ["nonesuch"])] == [0, 0, 2]
    table, _, document = capsys.readouterr().out.partition("{")
    names = {name for name in preset_names() if "mini" in name}
    assert all(name in table for name in names) and "vit" not in table and "BERT-mini on IMDB" in table
    assert set(json.loads("{" + document)) == names
