"""Presets: every row of the paper with its numbers, ours with theirs; files extend one another."""

import pytest

from rekd_train.config.run import PRESETS, preset_names, run_config
from rekd_train.errors import ConfigError

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

TEACHERS = {
    "imdb_bert_small": ("imdb_bert_base", 2035),
    "imdb_bert_mini": ("imdb_bert_base", 2035),
    "imdb_bert_tiny": ("imdb_bert_base", 2031),
    **{f"cifar10_vit_{size}": ("cifar10_vit_base", 2029) for size in ("small", "tiny")},
    **{f"cifar100_coarse_vit_{size}": ("cifar100_coarse_vit_base", 2031) for size in ("small", "tiny")},
}


@pytest.mark.parametrize("model", TEACHERS)
def test_a_distilled_row_names_its_teacher(model):
    teacher, seed = TEACHERS[model]
    assert run_config(f"paper_{model}_rekd").source.endswith(f"teacher paper_{teacher}_re of seed {seed}")


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


@pytest.mark.parametrize("name", PAPER)
def test_what_all_rows_share(name):
    config = run_config(name)
    optimisation, distillation, temperature = config.optimisation, config.distillation, config.temperature
    assert (optimisation.batch_size, optimisation.learning_rate, optimisation.schedule) == (32, 1e-5, "constant")
    assert optimisation.gradient_clip is None and optimisation.warmup == 0 and optimisation.betas == (0.9, 0.999)
    assert (temperature.start, temperature.end, temperature.refresh) == (5.0, 0.1, 100)
    assert (distillation.alpha, distillation.rationale_weight, distillation.noise) == (0.5, 0.5, "independent")
    assert distillation.rationale_temperature is None and distillation.teacher_mask == "student"
    assert (config.stages.evaluation, config.stages.best_metric) == ("sampled", "extraction_loss")
    assert config.data.dev_share == 0.2 and config.seed == 2026 and config.acceleration.precision == "fp32"
    text = config.data.modality == "text"
    assert optimisation.weight_decay == (0.0 if text else 1e-3)
    assert config.selector.head_dropout == config.predictor.head_dropout == (0.5 if text else 0.1)
    assert config.selector.head_width == (256 if text else 0) and config.predictor.class_head == "xavier"
    assert optimisation.freeze_selector_embeddings == text
    if text:
        assert config.data.name == "aclimdb" and config.data.max_length == 256
    else:
        assert config.predictor.image.grid == (14, 14) and config.data.augmentation == "crop_flip"
        assert config.selector.final_norm and not config.predictor.final_norm
    for network in (config.selector, config.predictor):
        assert "/" in network.weights and network.layer_norm_eps == 1e-12


def test_minilms_pair_is_the_package_and_its_first_layers():
    teacher, student = run_config("minilm_teacher"), run_config("minilm_student")
    assert (teacher.predictor.layers, student.predictor.layers, student.selector.layers) == (6, 2, 2)
    assert {c.predictor.weights for c in (teacher, student)} == {"minilm"}
    assert (teacher.optimisation.learning_rate, student.optimisation.learning_rate) == (5e-5, 1e-4)
    assert teacher.data.max_length == 256 and teacher.data == student.data


def test_short_texts_keep_three_tenths_of_their_words():
    config = run_config("short_texts")
    selection = config.selection
    assert (selection.target, selection.budget, selection.minimum, selection.decision) == (0.3, 0.35, 3, "top-k")
    assert (config.data.name, config.data.train_examples) == ("rotten_tomatoes", None)
    assert config.predictor == run_config("demo_student").predictor


def test_images_are_cut_as_the_presets_say():
    grids = {name: run_config(name).predictor.image.grid for name in ("fashion_student", "mosaic_2x2", "mosaic_3x3")}
    assert grids == {"fashion_student": (7, 7), "mosaic_2x2": (8, 8), "mosaic_3x3": (12, 12)}
    assert [run_config(name).selection.continuity for name in grids] == [0, 1, 1]
    assert run_config("mosaic_2x2").selection.budget == 0.25 and run_config("mosaic_3x3").selection.budget == 0.11


@pytest.mark.parametrize("name", preset_names())
def test_a_recorded_preset_reads_back_as_it_was(name):
    from rekd_train.config.run import RunConfig

    config = run_config(name)
    assert config.name == name
    assert RunConfig.model_validate(config.model_dump()) == config


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


def test_the_presets_of_the_package_are_all_listed():
    assert preset_names() == sorted(path.stem for path in PRESETS.glob("*.toml"))


def test_the_command_lists_names_and_sources(capsys):
    import json

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
