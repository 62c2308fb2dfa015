"""Presets: every row of the paper with its numbers, ours with theirs; files extend one another."""

import hashlib
import json
from pathlib import Path

import pytest

from rekd_train.config.run import RunConfig, preset_names, run_config
from rekd_train.errors import ConfigError

DIGESTS = json.loads((Path(__file__).parents[1] / "golden" / "preset_digests.json").read_text())
"""Of the settings that differ from the defaults: a preset's figures were made with these."""

PAPER = [name for name in preset_names() if name.startswith("paper_")]

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
    assert set(PAPER) == rows | {f"paper_{model}_cls" for model in ROWS}


@pytest.mark.parametrize("model", ROWS)
def test_a_row_has_the_papers_numbers(model):
    *kinds, (layers, width) = ROWS[model]
    for kind, target, weight in kinds:
        config = run_config(f"paper_{model}_{kind}")
        selection, stages = config.selection, config.stages
        assert (selection.target, selection.weight) == (target, weight)
        assert (selection.penalty_on, selection.penalty_per) == ("counts", "batch")
        assert (selection.denominator, selection.selectable, selection.decision) == ("all", "all", "argmax")
        assert selection.budget is None and selection.minimum == 0
        assert (stages.classifier_epochs, stages.rationale_epochs, stages.compact_epochs) == (0, 35, 0)
        assert {config.selector.layers, config.predictor.layers} == {layers}
        assert {config.selector.width, config.predictor.width} == {width}
        assert kind.upper() in config.source or config.source.startswith("no row of the paper")
    classifier = run_config(f"paper_{model}_cls").stages
    assert (classifier.classifier_epochs, classifier.masked_share, classifier.rationale_epochs) == (20, 0, 0)


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
