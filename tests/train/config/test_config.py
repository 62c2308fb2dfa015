"""Configurations: TOML in, every mistake in one message; the presets, each with the settings it is known by."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from rekd_train.config.run import RunConfig, preset, run_config
from rekd_train.config.sections import sections_of
from rekd_train.errors import ConfigError

DIGESTS = json.loads((Path(__file__).parents[2] / "golden" / "preset_digests.json").read_text())
"""Of the settings that differ from the defaults: a preset's figures were made with these."""


@pytest.fixture
def write(tmp_path):
    def written(text: str, name: str = "run.toml") -> Path:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        return tmp_path / name

    return written


def mistakes_of(source, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run_config(source, overrides)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


def test_a_file_sets_what_it_names_and_nothing_else(write):
    config = run_config(write('name = "mine"\n[predictor]\nlayers = 4\n[data]\nlengths = [64, 160]\n'))
    document = {"name": "mine", "predictor": {"layers": 4}, "data": {"lengths": [64, 160]}}
    assert config == RunConfig.model_validate(document) and config.selector.layers == 2
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_every_mistake_is_in_one_message(write):
    path = write(
        'namee = "x"\n[selector]\nlayerz = 2\nwidth = 10\nheads = 3\n[data]\nmax_length = "long"\n'
        "[selection]\ntarget = 0.3\nbudget = 0.2\n"
    )
    message = mistakes_of(path, "stages.rationale_epochs=-1", "what", "seed.x=1")
    for part in (
        str(path), "name: Field required", "namee: unknown key", "selector.layerz: unknown key",
        "selector: heads (3) must divide width (10)", "data.max_length:", "(got 'long')",
        "target (0.3) must not exceed budget (0.2)", "stages.rationale_epochs:", "(got -1)",
        "--set what: write key=value",
    ):  # fmt: skip
        assert part in message, message


@pytest.mark.parametrize(("overrides", "part"), [
    (["data.name=table"], "path is needed for the data 'table'"),
    (["data.path=reviews.csv"], "the data 'imdb' come with a package and have no path (got 'reviews.csv')"),
    (["data.augmentation=flip"], "augmentation 'flip' is for images"),
    (["data.dev_share=0.5", "data.test_share=0.5"], "leave nothing to train on"),
    (["data.name=digits"], "the selector (family 'transformers', no section image) reads texts"),
    (["data.name=cifar"], "data.name:"),
    (["data.image_column=a"], "image_column ('a') is for the data 'hf', not 'imdb'"),
    (['data.labels=["a", "b"]'], "'imdb' name their own classes"),
    (["data.name=table", "data.path=x.csv", 'data.labels=["a", "b", "b"]'], "labels ['a', 'b', 'b'] must be diff"),
    (["seed=y", "data.max_length=100", "data.lengths=[2, 128]"], "data: lengths (2, 128) must lie within 3..max"),
    (["seed=y", "selector.positions=128"], "data.max_length (160) exceeds selector.positions (128)"),
    (["selector.image.patch=5", "selector.image.height=32"], "patch (5) must divide the image's height and width"),
    (["selector.image.mean=[0.5, 0.5]"], "mean must hold 1 value or one for each of the 3 channels"),
    (["selector.image.std=[0.0]"], "std (0.0,) must be positive"),
    (["distillation.alpha=1.5"], "alpha (1.5) must lie within 0..1 or be 'anneal'"),
    (["optimisation.betas=[0.9, 1.0]"], "betas (0.9, 1.0) must lie within 0..1, 1 excluded"),
    (["seed"], "--set seed"), (["=3"], "--set =3"), (["name.deeper=1"], "--set name.deeper=1"),
    (["selection.target=none"], "selection.target"),
    (["selector.layerz=2"], "selector.layerz: unknown key, did you mean 'layers'?"),
    (["stages.rational_epochs=2"], "stages.rational_epochs: unknown key, did you mean 'rationale_epochs'?"),
    (["optimization.learning_rate=1"], "optimization: unknown key, did you mean 'optimisation'?"),
    (["selector.image.heigth=8"], "selector.image.heigth: unknown key, did you mean 'height'?"),
    (["learning_rate=1"], "learning_rate: unknown key, did you mean 'optimisation.learning_rate'?"),
    (["optimisation.seed=1"], "optimisation.seed: unknown key, did you mean 'seed' or 'data.seed'?"),
    (["temperature.qqq=1"], "run.toml: temperature.qqq: unknown key (temperature has start, end, refresh)"),
    (["qqq=1"], "unknown key (the top level has name, source, seed, data, "),
])  # fmt: skip
def test_settings_that_make_no_sense_are_explained(write, overrides, part):
    assert part in mistakes_of(write('name = "x"'), *overrides)


@pytest.mark.parametrize(("overrides", "setting", "value"), [
    (["stages.rationale_epochs=2"], "stages.rationale_epochs", 2.0),
    (["name=other name"], "name", "other name"), (['name="quoted"'], "name", "quoted"),
    (["distillation.alpha=anneal"], "distillation.alpha", "anneal"),
    (["data.lengths=[32, 64]"], "data.lengths", (32, 64)),
    (["optimisation.learning_rate=1e-3"], "optimisation.learning_rate", 0.001),
    (["seed=2", "seed=3"], "seed", 3), (["selection.budget=none"], "selection.budget", None),
    (["distillation.noise=none"], "distillation.noise", "none"),
    (["data.name=table", "data.path=~/a.csv"], "data.path", "/home/ada/a.csv"),
    (["data.name=table", "data.path=b~/a.csv"], "data.path", "b~/a.csv"),
    (["selection.minimum=2"], "selection.minimum", 2), ([], "selection.minimum", 3),
    (["data.name=digits"], "selection.minimum", 1), (["name=digits", "selection.minimum=3"], "selection.minimum", 3),
])  # fmt: skip
def test_overrides_are_toml_values_or_bare_words(write, monkeypatch, overrides, setting, value):
    monkeypatch.setenv("HOME", "/home/ada")
    digits = any("digits" in text for text in overrides)
    found = run_config("digits" if digits else write('name = "x"'), overrides)
    for name in setting.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(("source", "pattern"), [
    ("demo_studnet", r"^no preset 'demo_studnet', did you mean 'demo_student'\? (?!.*paper_).*presets.*.toml"),
    ("nonesuch", "no preset 'nonesuch'; presets: " + ", ".join(sorted(DIGESTS))),
    ("absent.toml", "absent.toml does not exist"),
    ("predictor.positions = 8", r"name: Field required; .*data.max_length \(160\) exceeds predictor"),
    ("name = ", "not valid TOML"), ("name = '\xff\xfe'", "not valid TOML"),
    ('extends = "nonesuch"', "no preset 'nonesuch'"), ('extends = "absent.toml"', "absent.toml does not exist"),
    ('extends = "run.toml"', "run.toml extends itself"), ("extends = 3", "extends is 3"),
])  # fmt: skip
def test_what_is_not_there_is_named(write, source, pattern):
    assert re.search(pattern, mistakes_of(write(source) if "=" in source else source))


def test_every_field_says_what_it_is():
    for section in sections_of(RunConfig).values():
        for name, field in section.model_fields.items():
            assert field.description or name in sections_of(RunConfig) or name == "image", name


def test_a_setting_by_its_older_name_replaces_the_one_of_today(write):
    stages = '[stages]\ncriterion = "accuracy"\n'
    old = write(f'extends = "paper_imdb_bert_tiny_re"\nname = "x"\n{stages}[selector]\nweights = "a/b"\n', "old.toml")
    config = run_config(old, ["predictor.weights=minilm"])
    assert (config.selector.pretrained, config.predictor.pretrained) == ("a/b", "minilm")
    assert config.stages.best_metric == "accuracy"
    new = write('extends = "old.toml"\n[stages]\nbest_metric = "macro_f1"\n')
    assert run_config(new).stages.best_metric == "macro_f1"
    assert run_config(old, ["stages.criterion=macro_f1"]).stages.best_metric == "macro_f1"
    both = write(f'name = "x"\n{stages}best_metric = "macro_f1"\n')
    assert "stages.criterion: unknown key" in mistakes_of(both)


@pytest.mark.parametrize("name", DIGESTS)
def test_a_preset_has_the_settings_it_had_and_reads_back(name):
    config = preset(name)
    assert config.name == name and config.source, "it says where its settings come from"
    assert RunConfig.model_validate(config.model_dump()) == config
    document = json.dumps(config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    assert hashlib.sha256(document.encode()).hexdigest()[:16] == DIGESTS[name], "not what its figures were made with"


def test_a_preset_that_starts_from_what_is_named_says_what_is_missing(write):
    assert mistakes_of("hf_text", "selector.pretrained=a", "seeed=1") == (
        "hf_text: it starts from what you name; fix: --set data.path=PATH --set predictor.pretrained=PATH; "
        "seeed: unknown key, did you mean 'seed'? (the top level has "
        + ", ".join(RunConfig.model_fields) + ")"
    )  # fmt: skip
    mine = write('extends = "timm_images"\nname = "mine"\n[data]\npath = "photos"\n[selector]\npretrained = "a"\n')
    assert mistakes_of(mine).endswith("fix: --set predictor.pretrained=PATH")
    config = run_config(mine, ["predictor.pretrained=b"])
    assert (config.selector.pretrained, config.predictor.pretrained, config.data.path) == ("a", "b", "photos")
    named = ["data.path=x.csv", "selector.pretrained=a", "predictor.pretrained=b", "data.max_length=2000"]
    assert run_config("hf_text", named).data.max_length == 2000, "how long is seen where a network is opened"
    assert "exceeds predictor.positions (900)" in mistakes_of("hf_text", *named, "predictor.positions=900")
    assert "exceeds selector.positions (512)" in mistakes_of("demo_student", "data.max_length=2000")


def test_a_file_extends_a_preset_or_a_file_beside_it_and_leaves_it_as_it_is(write):
    write('extends = "paper_imdb_bert_tiny_re"\nname = "base"\n[data]\nmax_length = 64\n', "base.toml")
    mine = write('extends = "base.toml"\nname = "mine"\n[data]\ntrain_examples = 10\n[selector]\ndropout = 0.5\n')
    config, base = run_config(mine, ["selector.layers=1"]), run_config("paper_imdb_bert_tiny_re")
    assert (config.name, config.data.max_length, config.data.train_examples) == ("mine", 64, 10)
    assert (config.selector.layers, config.selector.dropout) == (1, 0.5)
    assert config.predictor == base.predictor and (base.selector.layers, base.selector.dropout) == (2, 0.1)
    assert config.source == "as base.toml, changed"
