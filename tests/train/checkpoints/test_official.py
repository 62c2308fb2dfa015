"""Import of the authors' checkpoints: exact against their own outputs, strict about every key."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, tiny_tokenizer_json
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import ViTConfig, ViTModel

from rekd_train.checkpoints.checkpoint import load
from rekd_train.checkpoints.description import read_description
from rekd_train.checkpoints.official import import_official
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.inputs.policy import PAPER_POLICY
from rekd_train.models.rationalizer import Rationalizer

GOLDEN = Path(__file__).parents[2] / "golden"
INPUTS = ("input_ids", "attention_mask", "pixel_values")


def golden_import(family: str, output: Path, **replaced) -> Rationalizer:
    files = {
        "selector": GOLDEN / f"g_{family}",
        "predictor": GOLDEN / f"f_{family}",
        "backbone": GOLDEN / f"{family}-backbone",
    }
    options = {key: value for key, value in replaced.items() if key not in files}
    if family == "bert" and "tokenizer" not in options:
        options["tokenizer"] = output / "tokenizer.json"
        options["tokenizer"].write_text(tiny_tokenizer_json())
    files |= {key: value for key, value in replaced.items() if key in files}
    return load(import_official(family, output=output / "imported", **files, **options))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_import_answers_as_the_authors_code(family: str, tmp_path: Path) -> None:
    model = golden_import(family, tmp_path)
    with np.load(GOLDEN / f"{family}_io.npz") as stored:
        reference = {name: torch.from_numpy(stored[name]) for name in stored}
    inputs = {name: reference[name] for name in INPUTS if name in reference}
    with torch.inference_mode():
        torch.testing.assert_close(model.selector_logits(inputs), reference["selector_logits"], atol=1e-5, rtol=0)
        mask = model.select(inputs).mask
        assert torch.equal(mask.float(), reference["mask_noise_free"])
        for given, name in (
            (None, "class_logits_no_mask"),
            (mask, "class_logits_noise_free_mask"),
            (reference["random_mask"], "class_logits_random_mask"),
        ):
            torch.testing.assert_close(model.class_logits(inputs, given), reference[name], atol=1e-5, rtol=0, msg=name)
    assert model.policy == PAPER_POLICY and model.predictor.operator == "zero"
    assert model.labels == ["0", "1", "2"]


def own_vit(classes: int = 5) -> tuple[dict[str, Tensor], dict[str, Tensor], dict, ViTModel, ViTModel]:
    """Another size: 3 layers x 24, images of 224 in patches of 16."""
    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40, image_size=224, patch_size=16,
        layer_norm_eps=1e-6, initializer_range=0.2,
    )
    models, states = (ViTModel(config).eval(), ViTModel(config).eval()), []
    for model in models:
        state = {f"vit.vit.{old_name(name)}": tensor for name, tensor in model.state_dict().items()}
        embeddings = {name: tensor for name, tensor in state.items() if ".embeddings." in name}
        copies = {name.replace("vit.vit.embeddings", "vit.embedding"): tensor for name, tensor in embeddings.items()}
        states.append(state | copies)
    states[0] |= {"fc.weight": torch.randn(2, 24), "fc.bias": torch.randn(2)}
    states[1] |= {"classifier.weight": torch.randn(classes, 24), "classifier.bias": torch.randn(classes)}
    return *states, config.to_dict(), *models


def old_name(name: str) -> str:
    """transformers 4 names, which the authors' files have, of transformers 5 weights."""
    name = re.sub(r"^layers\.", "encoder.layer.", name)
    name = re.sub(r"attention\.(q|k|v)_proj", lambda m: "attention.attention." + {
        "q": "query", "k": "key", "v": "value"}[m[1]], name)
    name = name.replace("attention.o_proj", "attention.output.dense")
    return name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")


def write(directory: Path, selector: dict, predictor: dict, config: dict) -> dict[str, Path]:
    backbone = directory / "backbone"
    backbone.mkdir(parents=True)
    (backbone / "config.json").write_text(json.dumps(config))
    files = {"selector": directory / "g_own2026", "predictor": directory / "f_own2026", "backbone": backbone}
    torch.save(selector, files["selector"])
    torch.save(predictor, files["predictor"])
    return files


@torch.inference_mode()
def test_vit_of_another_size(tmp_path: Path) -> None:
    selector, predictor, config, generator, encoder = own_vit()
    model = golden_import("vit", tmp_path, labels=list("abcde"), **write(tmp_path / "own", selector, predictor, config))
    settings = model.predictor.backbone.settings.image
    assert (settings.height, settings.upscale_to, settings.grid) == (32, 224, (14, 14)), "CIFAR, upscaled as they do"
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (settings.mean, settings.std))
    large = interpolate(pixels.permute(0, 3, 1, 2) / 255.0, size=(224, 224), mode="bilinear", align_corners=False)
    normalised = (large - mean) / std
    hidden = generator(normalised).last_hidden_state[:, 1:]
    logits = hidden @ selector["fc.weight"].T + selector["fc.bias"]
    hooked = []  # what the last block returns: their encoder has no final norm
    encoder.layernorm.register_forward_pre_hook(lambda module, given: hooked.append(given[0]))
    encoder(normalised)
    expected = hooked[0][:, 0] @ predictor["classifier.weight"].T + predictor["classifier.bias"]
    for inputs in ({"pixels": pixels}, {"pixel_values": normalised}):
        torch.testing.assert_close(model.selector_logits(inputs), logits, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(model.class_logits(inputs), expected, atol=1e-4, rtol=1e-5)
    assert [answer.label in "abcde" for answer in model.predict(pixels.numpy())] == [True, True]


@pytest.mark.parametrize(
    ("name", "lowercase", "expected"),
    [("tokenizer.json", True, "good"), ("vocab.txt", True, "good"), ("vocab.txt", False, "[UNK]")],
)
@pytest.mark.parametrize("beside", [True, False])
def test_tokenizers(name: str, lowercase: bool, expected: str, beside: bool, tmp_path: Path) -> None:
    directory = tmp_path / "backbone" if beside else tmp_path / "elsewhere"
    shutil.copytree(GOLDEN / "bert-backbone", tmp_path / "backbone")
    directory.mkdir(exist_ok=True)
    if name == "tokenizer.json":
        (directory / name).write_text(tiny_tokenizer_json())
    else:
        (directory / name).write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    tokenizer = None if beside else directory / name
    model = golden_import("bert", tmp_path, backbone=tmp_path / "backbone", tokenizer=tokenizer)
    assert model.preprocessor.encode(["Good film"])[0].tokens == ["[CLS]", expected, "film", "[SEP]"]
    assert model.preprocessor.settings.max_length == 64, "at most the backbone's positions"
    (answer,) = model.predict(["The film was great"])
    assert answer.label in model.labels and answer.rate == len(answer.pieces) / 4


def test_keys_that_their_forward_never_reads_are_recorded(tmp_path: Path) -> None:
    golden_import("vit", tmp_path)
    training = read_description(tmp_path / "imported")["training"]
    assert "vit.vit.layernorm.weight" in training["unread_keys"]["predictor"]
    assert "vit.vit.layernorm.weight" not in training["unread_keys"]["selector"]
    assert "vit.vit.pooler.dense.weight" in training["unread_keys"]["selector"]
    assert "authors' code" in (tmp_path / "imported" / "README.md").read_text()


def changed(source: str, target: Path, change) -> Path:
    state = torch.load(GOLDEN / source, weights_only=True)
    state = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    torch.save(state, target)
    return target


def misfits(state: dict[str, Tensor]) -> None:
    state["extra.weight"] = torch.zeros(2)
    del state["bert.bert.encoder.layer.1.output.dense.bias"]
    state["bert.bert.embeddings.LayerNorm.weight"] = torch.zeros(7)
    state["embedding_layer.weight"][3, 4] += 1
    state["fc.bias"][0] = float("nan")


def test_every_key_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        golden_import("bert", tmp_path, predictor=changed("f_bert", tmp_path / "f", misfits))
    message = str(caught.value)
    for part in (
        "extra.weight is unknown",
        "encoder.layer.1.output.dense.bias is missing",
        "embeddings.LayerNorm.weight is (7,), the backbone's config.json asks for (32,)",
        "embedding_layer.weight differs from bert.bert.embeddings.word_embeddings.weight",
        "fc.bias holds values that are not finite",
    ):
        assert part in message
    assert "\n" not in message and not (tmp_path / "imported").exists()


def test_both_files_are_judged_at_once_and_a_renamed_head_is_no_other_size(tmp_path: Path) -> None:
    selector = changed("g_bert", tmp_path / "g", lambda state: state.update(more=torch.zeros(1)))
    predictor = changed("f_bert", tmp_path / "f", lambda state: state.update({"head.weight": state.pop("fc.weight")}))
    with pytest.raises(CheckpointError) as caught:
        golden_import("bert", tmp_path, selector=selector, predictor=predictor)
    message = str(caught.value)
    assert message == (
        f"{selector} does not fit: more is unknown; "
        f"{predictor} does not fit: fc.weight is missing; head.weight is unknown"
    )


@pytest.mark.parametrize("copy", ["embedding_layer.position_embeddings", "vit.embedding.cls_token"])
def test_vit_copies_must_agree(copy: str, tmp_path: Path) -> None:
    predictor = changed("f_vit", tmp_path / "f", lambda state: state[copy].add_(1))
    with pytest.raises(CheckpointError, match=f"{copy} differs from vit.vit.embeddings"):
        golden_import("vit", tmp_path, predictor=predictor)


def test_copies_may_be_absent(tmp_path: Path) -> None:
    selector = changed("g_bert", tmp_path / "g", lambda state: state.pop("bert.embedding.weight"))
    assert golden_import("bert", tmp_path, selector=selector).labels == ["0", "1", "2"]


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickles_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"fc.weight": torch.zeros(1), "x": Evil()}, tmp_path / "evil")
    (tmp_path / "old").write_bytes(pickle.dumps(Evil()))
    for name in ("evil", "old"):
        with pytest.raises(CheckpointError, match="could run code: refused") as caught:
            golden_import("bert", tmp_path, selector=tmp_path / name)
        assert "weights_only" not in str(caught.value), "no advice to load it unsafely"
        assert name != "evil" or "it names print" in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("role", ["selector", "predictor"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot be read"),
        (b"PK\x03\x04 cut off", "cannot be read"),
        ([torch.zeros(2)], "holds no state dictionary"),
        ({"epoch": 3}, "holds no state dictionary"),
        ({"resnet.weight": torch.zeros(2)}, "resnet.weight is unknown"),
    ],
    ids=["missing", "empty", "cut off", "a list", "other values", "foreign"],
)
def test_files_that_are_no_checkpoints(role: str, content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        golden_import("bert", tmp_path, **{role: path})


def test_swapped_files_and_families_are_recognised(tmp_path: Path) -> None:
    for family in ("bert", "vit"):
        with pytest.raises(CheckpointError, match="is a predictor .*swap the two files"):
            golden_import(family, tmp_path, selector=GOLDEN / f"f_{family}")
        with pytest.raises(CheckpointError, match="is a selector .*swap the two files"):
            golden_import(family, tmp_path, predictor=GOLDEN / f"g_{family}")
    with pytest.raises(CheckpointError, match="is of the family 'vit', not 'bert'"):
        golden_import("bert", tmp_path, selector=GOLDEN / "g_vit")
    with pytest.raises(ConfigError, match="unknown family 'resnet'.*bert, vit"):
        golden_import("resnet", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "vit"}, "model_type is 'vit'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_size": None}, "does not fit the family 'bert': width: Input should be a valid integer .got None.$"),
        ({"num_attention_heads": 5}, r"heads \(5\) must divide width \(32\)$"),
        ({"num_hidden_layers": 3}, "encoder.layer.2.output.dense.weight is missing"),
        ({"num_hidden_layers": 1}, "encoder.layer.1.output.dense.weight is unknown"),
        ({"vocab_size": 100}, r"word_embeddings.weight is \(99, 32\).*asks for \(100, 32\)"),
    ],
)
def test_backbones_that_do_not_fit(change: dict, message: str, tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "bert-backbone" / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        golden_import("bert", tmp_path, backbone=tmp_path)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        golden_import("bert", tmp_path, backbone=tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        golden_import("bert", tmp_path, backbone=tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(CheckpointError, match=r"'hidden_size' is missing"):
        golden_import("bert", tmp_path, backbone=tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer at"):
        golden_import("bert", tmp_path, tokenizer=tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="vocab.txt cannot be read as a fast tokenizer"):
        golden_import("bert", tmp_path, tokenizer=tmp_path / "vocab.txt")
    for labels in (["a", "b"], ["a", "b", "b"]):
        with pytest.raises(ConfigError, match="3 classes"):
            golden_import("bert", tmp_path, labels=labels)


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(200))]))
    with pytest.raises(ConfigError, match="the tokenizer has 204 ids, the network only 99"):
        golden_import("bert", tmp_path, tokenizer=tmp_path / "vocab.txt")
