"""Configurations: TOML in, every mistake in one message; the presets, each with the settings it is known by."""

import hashlib
import json
from pathlib import Path

import pytest

from rekd_train.config.run import RunConfig, preset_names, run_config
from rekd_train.errors import ConfigError


def write(tmp_path, text: str):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes_of(source, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        run_config(source, overrides)
    message = str(caught.value)
    assert "\n" not in message, "one line"
    return message


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path):
    config = run_config(write(tmp_path, 'name = "mine"\n[predictor]\nlayers = 4\n[data]\nlengths = [64, 160]\n'))
    assert (config.name, config.predictor.layers, config.selector.layers) == ("mine", 4, 2)
    assert config.data.lengths == (64, 160)
    document = {"name": "mine", "predictor": {"layers": 4}, "data": {"lengths": [64, 160]}}
    assert config == RunConfig.model_validate(document)


def test_every_mistake_is_in_one_message(tmp_path):
    path = write(
        tmp_path,
        """
        namee = "x"
        [selector]
        layerz = 2
        width = 10
        heads = 3
        [data]
        max_length = "long"
        [selection]
        target = 0.3
        budget = 0.2
        """,
    )
    message = mistakes_of(path, ["stages.rationale_epochs=-1", "what", "seed.x=1"])
    assert str(path) in message
    for part in (
        "name: Field required",
        "namee: unknown key",
        "selector.layerz: unknown key",
        "selector: heads (3) must divide width (10)",
        "data.max_length:", "(got 'long')",
        "target (0.3) must not exceed budget (0.2)",
        "stages.rationale_epochs:", "(got -1)",
        "--set what: write key=value",
    ):
        assert part in message, message


def test_inputs_must_fit_the_position_embeddings(tmp_path):
    message = mistakes_of(write(tmp_path, 'name = "x"\n[data]\nmax_length = 160\n[selector]\npositions = 128\n'))
    assert "data.max_length (160) exceeds selector.positions (128)" in message


def test_lengths_are_checked_with_the_rest(tmp_path):
    message = mistakes_of(write(tmp_path, 'name = "x"\nseed = "y"\n[data]\nmax_length = 100\nlengths = [2, 128]\n'))
    assert "data: lengths" in message and "(100)" in message and "seed" in message


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("stages.rationale_epochs=2", lambda c: c.stages.rationale_epochs, 2.0),
        ("name=other name", lambda c: c.name, "other name"),
        ('name="quoted"', lambda c: c.name, "quoted"),
        ("distillation.alpha=anneal", lambda c: c.distillation.alpha, "anneal"),
        ("data.lengths=[32, 64]", lambda c: c.data.lengths, (32, 64)),
        ("optimisation.learning_rate=1e-3", lambda c: c.optimisation.learning_rate, 0.001),
    ],
)
def test_overrides_are_toml_values_or_bare_words(tmp_path, override, read, value):
    assert read(run_config(write(tmp_path, 'name = "x"'), [override])) == value


def test_a_later_override_wins(tmp_path):
    assert run_config(write(tmp_path, 'name = "x"\nseed = 1'), ["seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize("override", ["seed", "=3", "seed.deeper=1"])
def test_a_malformed_override_is_quoted(tmp_path, override):
    assert f"--set {override}" in mistakes_of(write(tmp_path, 'name = "x"\nseed = 1'), [override])


def test_an_override_of_an_unknown_key_is_named(tmp_path):
    assert "stages.epochs: unknown key" in mistakes_of(write(tmp_path, 'name = "x"'), ["stages.epochs=1"])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("selector.layerz=2", "'layers'"),
        ("stages.rational_epochs=2", "'rationale_epochs'"),
        ("optimization.learning_rate=1", "'optimisation'"),
        ("selector.image.heigth=8", "'height'"),
        ("learning_rate=1", "'optimisation.learning_rate'"),
        ("optimisation.seed=1", "'seed' or 'data.seed'"),
    ],
)
def test_a_misspelt_or_misplaced_setting_is_answered_with_the_one_that_was_meant(override, meant):
    key = override.partition("=")[0]
    place = "optimization" if key.startswith("optimization") else key
    assert f"{place}: unknown key, did you mean {meant}?" in mistakes_of("digits", [override])


def test_an_unknown_setting_lists_the_settings_of_its_section_and_no_other():
    message = mistakes_of("demo_student", ["temperature.qqq=1"])
    assert message == "demo_student: temperature.qqq: unknown key (temperature has start, end, refresh)"
    assert "unknown key (the top level has name, source, seed, data, " in mistakes_of("demo_student", ["qqq=1"])
    assert "did you mean" not in message


def test_a_misspelt_preset_is_answered_with_the_one_that_was_meant():
    message = mistakes_of("demo_studnet")
    assert message.startswith("no preset 'demo_studnet', did you mean 'demo_student'?")
    assert "paper_" not in message and "rekd-train presets" in message and ".toml" in message


def test_an_unknown_preset_lists_the_presets_that_are_there():
    message = mistakes_of("nonesuch")
    assert "no preset 'nonesuch'" in message and ".toml" in message
    for name in preset_names():
        assert name in message


def test_a_missing_a_broken_and_a_binary_file_are_named(tmp_path):
    assert "does not exist" in mistakes_of(tmp_path / "absent.toml")
    assert "not valid TOML" in mistakes_of(write(tmp_path, "name = "))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"name = '\xff\xfe'")
    assert "not valid TOML" in mistakes_of(binary)


def test_a_text_keeps_three_words_at_least_an_image_one_patch_and_what_is_said_stands(tmp_path):
    path = write(tmp_path, 'name = "x"')
    assert run_config(path).selection.minimum == 3
    assert run_config("demo_student").selection.minimum == run_config("short_texts").selection.minimum == 3
    assert [run_config(name).selection.minimum for name in ("digits", "fashion_student", "mosaic_3x3")] == [1, 1, 1]
    for source in (path, "digits"):
        assert run_config(source, ["selection.minimum=2"]).selection.minimum == 2
    assert run_config("digits", ["selection.minimum=3"]).selection.minimum == 3


def test_configurations_cannot_be_changed_by_accident(tmp_path):
    config = run_config(write(tmp_path, 'name = "x"'))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


def test_every_field_says_what_it_is():
    pending = [RunConfig]
    while pending:
        for name, field in pending.pop().model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                pending.append(field.annotation)
            else:
                assert field.description, name


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["data.name=table"], "path is needed for the data 'table'"),
        (["data.path=reviews.csv"], "the data 'imdb' come with a package and have no path (got 'reviews.csv')"),
        (["data.augmentation=flip"], "augmentation 'flip' is for images"),
        (["data.dev_share=0.5", "data.test_share=0.5"], "leave nothing to train on"),
        (["data.name=digits"], "data 'digits' are images, the selector (family 'bert', no section image) reads texts"),
        (["data.name=cifar"], "data.name:"),
    ],
)
def test_data_settings_that_make_no_sense_are_explained(tmp_path, settings, part):
    assert part in mistakes_of(write(tmp_path, 'name = "x"'), settings)


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert run_config("demo_student", ["data.name=table", "data.path=~/a.csv"]).data.path == "/home/ada/a.csv"
    assert run_config("demo_student", ["data.name=table", "data.path=b~/a.csv"]).data.path == "b~/a.csv"


def test_labels_are_different_names_of_own_data(tmp_path):
    path = write(tmp_path, 'name = "x"\n[data]\nname = "table"\npath = "x.csv"\n')
    assert run_config(path, ['data.labels=["b", "a"]']).data.labels == ("b", "a")
    assert "labels ['a', 'b', 'b'] must be different" in mistakes_of(path, ['data.labels=["a", "b", "b"]'])
    assert "'imdb' name their own classes" in mistakes_of("demo_student", ['data.labels=["a", "b"]'])


def test_a_setting_by_its_older_name_replaces_the_one_of_today(tmp_path):
    def kept(name: str, text: str, *overrides: str) -> str:
        (tmp_path / name).write_text(text)
        return run_config(tmp_path / name, overrides).stages.best_metric

    stages = '[stages]\ncriterion = "accuracy"\n'
    assert run_config("paper_imdb_bert_tiny_re").stages.best_metric == "extraction_loss"
    assert kept("old.toml", f'extends = "paper_imdb_bert_tiny_re"\nname = "x"\n{stages}') == "accuracy"
    assert kept("new.toml", 'extends = "old.toml"\n[stages]\nbest_metric = "macro_f1"\n') == "macro_f1"
    assert kept("new.toml", 'extends = "old.toml"\n', "stages.criterion=macro_f1") == "macro_f1"
    (tmp_path / "weights.toml").write_text('name = "x"\n[selector]\nweights = "a/b"\n')
    config = run_config(tmp_path / "weights.toml", ["predictor.weights=minilm"])
    assert (config.selector.pretrained, config.predictor.pretrained) == ("a/b", "minilm")
    with pytest.raises(ConfigError, match="stages.criterion: unknown key"):
        kept("both.toml", f'name = "x"\n{stages}best_metric = "macro_f1"\n')


# presets


DIGESTS = json.loads((Path(__file__).parents[2] / "golden" / "preset_digests.json").read_text())
"""Of the settings that differ from the defaults: a preset's figures were made with these."""

ROWS = {  # method.md 1.7: target and lambda of the penalty on counts; sizes of the network
    "imdb_bert_base": (("re", 0.10, 5e-5), (12, 768)),
    "imdb_bert_small": (("re", 0.095, 1e-4), ("rekd", 0.10, 1e-4), (4, 512)),
    "imdb_bert_mini": (("re", 0.10, 1e-4), ("rekd", 0.10, 1e-4), (4, 256)),
    "imdb_bert_tiny": (("re", 0.10, 2e-4), ("rekd", 0.10, 2e-4), (2, 128)),
    **{
        f"{data}_vit_{size}": (*((kind, target, weight) for kind in kinds), sizes)
        for data, target in (("cifar10", 0.15), ("cifar100_coarse", 0.15), ("cifar100_fine", 0.20))
        for size, weight, kinds, sizes in (
            ("base", 5e-3, ("re",), (12, 768)),
            ("small", 1e-2, ("re", "rekd"), (12, 384)),
            ("tiny", 5e-2, ("re", "rekd"), (12, 192)),
        )
    },
}


def test_every_row_of_the_paper_is_there_and_no_other():
    rows = {f"paper_{model}_{kind}" for model, row in ROWS.items() for kind, *_ in row[:-1]}
    assert rows | {f"paper_{model}_cls" for model in ROWS} == {name for name in DIGESTS if name.startswith("paper_")}


@pytest.mark.parametrize("model", ROWS)
def test_a_row_has_the_papers_numbers(model):
    *kinds, (layers, width) = ROWS[model]
    for kind, target, weight in kinds:
        config = run_config(f"paper_{model}_{kind}")
        assert (config.selection.target, config.selection.weight) == (target, weight)
        assert {(each.layers, each.width) for each in (config.selector, config.predictor)} == {(layers, width)}
        assert kind.upper() in config.source or config.source.startswith("no row of the paper")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_the_settings_it_had_and_reads_back(name):
    config = run_config(name)
    assert config.name == name
    assert RunConfig.model_validate(config.model_dump()) == config
    document = json.dumps(config.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    assert hashlib.sha256(document.encode()).hexdigest()[:16] == DIGESTS[name], "not what its figures were made with"


def test_the_presets_are_those_whose_settings_are_known():
    assert preset_names() == sorted(DIGESTS)


def test_what_extends_or_overrides_a_row_leaves_the_row_as_it_is(tmp_path):
    name = "paper_imdb_bert_tiny_re"
    (tmp_path / "mine.toml").write_text(f'extends = "{name}"\nname = "mine"\n[selector]\ndropout = 0.5\n')
    changed = run_config(tmp_path / "mine.toml", ["selector.layers=1"])
    assert (changed.selector.layers, changed.selector.dropout) == (1, 0.5)
    kept = run_config(name).selector
    assert (kept.layers, kept.dropout) == (2, 0.1)


def test_a_file_extends_a_preset_or_a_file_beside_it(tmp_path):
    (tmp_path / "base.toml").write_text('extends = "demo_student"\nname = "base"\n[data]\nmax_length = 64\n')
    (tmp_path / "mine.toml").write_text('extends = "base.toml"\nname = "mine"\n[data]\ntrain_examples = 10\n')
    config = run_config(tmp_path / "mine.toml")
    assert (config.name, config.data.max_length, config.data.train_examples) == ("mine", 64, 10)
    assert config.predictor == run_config("demo_student").predictor
    assert config.source == "as base.toml, changed"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('extends = "nonesuch"', "no preset 'nonesuch'"),
        ('extends = "absent.toml"', "absent.toml does not exist"),
        ('extends = "mine.toml"', "extends itself"),
        ("extends = 3", "extends is 3"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, text, word):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=word):
        run_config(tmp_path / "mine.toml")


def test_none_is_a_word_where_a_setting_may_be_none():
    config = run_config("demo_student", ["selection.budget=none", "optimisation.gradient_clip=none"])
    assert config.selection.budget is None and config.optimisation.gradient_clip is None
    assert run_config("demo_student", ["distillation.noise=none"]).distillation.noise == "none"
    with pytest.raises(ConfigError, match="selection.target"):
        run_config("demo_student", ["selection.target=none"])


def test_the_command_lists_names_and_sources(capsys):
    from rekd_train.cli.command import run
    from rekd_train.cli.main import app

    for arguments in (["presets"], ["presets", "imdb_bert_mini"], ["presets", "mini", "--json"]):
        with pytest.raises(SystemExit) as request:
            run(app, arguments)
        assert request.value.code == 0
    everything, some = capsys.readouterr().out.split("preset ")[1:3]
    assert all(name in everything for name in preset_names())
    assert "paper_imdb_bert_mini_rekd" in some and "vit" not in some.partition("{")[0]
    assert set(json.loads(some[some.index("{") :])) == {name for name in preset_names() if "mini" in name}
    with pytest.raises(SystemExit) as request:
        run(app, ["presets", "nonesuch"])
    assert request.value.code == 2
