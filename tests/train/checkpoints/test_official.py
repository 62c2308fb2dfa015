"""Import of the authors' checkpoints: exact against their own outputs, strict about every key."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import WORDS, tiny_tokenizer_json
from torch.nn.functional import interpolate

from rekd_train.checkpoints import read_description
from rekd_train.checkpoints.checkpoint import load
from rekd_train.checkpoints.official import import_official
from rekd_train.errors import CheckpointError, RekdError
from rekd_train.inputs.policy import PAPER_POLICY
from rekd_train.models.rationalizer import Rationalizer

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = ("bert", "vit")
Evil = type("Evil", (), {"__reduce__": lambda self: (print, ("code ran",))})


def golden_import(family: str, output: Path, **replaced) -> Rationalizer:
    files = {"selector": f"g_{family}", "predictor": f"f_{family}", "backbone": f"{family}-backbone"}
    options = {name: GOLDEN / file for name, file in files.items()} | replaced
    if family == "bert" and "tokenizer" not in options:
        options["tokenizer"] = output / "tokenizer.json"
        options["tokenizer"].write_text(tiny_tokenizer_json())
    return load(import_official(family, output=output / "imported", **options))


def backbone(family: str, directory: Path, **changes) -> Path:
    directory.mkdir(exist_ok=True)
    config = json.loads((GOLDEN / f"{family}-backbone" / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@torch.inference_mode()
def test_small_images_are_upscaled_as_theirs_are(tmp_path: Path) -> None:
    own = backbone("vit", tmp_path / "own", layer_norm_eps=1e-3, hidden_dropout_prob=0.2)
    model = golden_import("vit", tmp_path, labels=["a", "b", "c"], backbone=own, image_side=16)
    network, image = model.predictor.backbone.settings, model.predictor.backbone.settings.image
    assert (image.height, image.upscale_to, image.grid) == (16, 32, (4, 4))
    assert (network.layer_norm_eps, network.dropout, network.attention_dropout) == (1e-3, 0.2, 0.0)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    large = interpolate(pixels.permute(0, 3, 1, 2) / 255.0, size=(32, 32), mode="bilinear", align_corners=False)
    for answers in (model.selector_logits, model.class_logits):
        expected = answers({"pixel_values": (large - mean) / std})
        torch.testing.assert_close(answers({"pixels": pixels}), expected, atol=1e-4, rtol=1e-5)
    assert [answer.label in "abc" for answer in model.predict(pixels.numpy())] == [True, True]


@pytest.mark.parametrize(("name", "lowercase", "expected"), [
    ("tokenizer.json", True, "good"), ("vocab.txt", True, "good"), ("vocab.txt", False, "[UNK]")])  # fmt: skip
@pytest.mark.parametrize("beside", [True, False])
def test_tokenizers(name: str, lowercase: bool, expected: str, beside: bool, tmp_path: Path) -> None:
    own = backbone("bert", tmp_path / "backbone")
    directory = own if beside else backbone("bert", tmp_path / "elsewhere")
    vocabulary = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    (directory / name).write_text(tiny_tokenizer_json() if name == "tokenizer.json" else vocabulary)
    (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    config = json.loads((own / "config.json").read_text())
    del config["model_type"]  # the published small BERTs have none
    (own / "config.json").write_text(json.dumps(config))
    model = golden_import("bert", tmp_path, backbone=own, tokenizer=None if beside else directory / name)
    assert model.preprocessor.encode(["Good film"])[0].tokens == ["[CLS]", expected, "film", "[SEP]"]
    assert model.preprocessor.settings.max_length == 64, "at most the backbone's positions"
    (answer,) = model.predict(["The film was great"])
    assert answer.label in model.labels and answer.rate == len(answer.pieces) / 4


def state(name: str, change: Callable[[dict], object]) -> dict:
    found = {key: tensor.clone() for key, tensor in torch.load(GOLDEN / name, weights_only=True).items()}
    change(found)
    return found


def file(option: str, content: object, name: str = "file") -> Callable[[Path], dict[str, Path]]:
    def made(directory: Path) -> dict[str, Path]:
        path = directory / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return {option: directory if option == "backbone" else path}
    return made


def config(**changes) -> Callable[[Path], dict[str, Path]]:
    return lambda at: {"backbone": backbone("bert", at / "own", **changes)}


@pytest.mark.parametrize("family", FAMILIES)
def test_import_answers_as_the_authors_code(family: str, tmp_path: Path) -> None:
    without_copy = file("selector", state("g_bert", lambda state: state.pop("bert.embedding.weight")))
    model = golden_import(family, tmp_path, **(without_copy(tmp_path) if family == "bert" else {}))
    with np.load(GOLDEN / f"{family}_io.npz") as stored:
        reference = {name: torch.from_numpy(stored[name]) for name in stored}
    inputs = {name: reference[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in reference}
    with torch.inference_mode():
        torch.testing.assert_close(model.selector_logits(inputs), reference["selector_logits"], atol=1e-5, rtol=0)
        mask = model.select(inputs).mask
        assert torch.equal(mask.float(), reference["mask_noise_free"])
        for given, name in ((None, "no"), (mask, "noise_free"), (reference["random_mask"], "random")):
            expected = reference[f"class_logits_{name}_mask"]
            torch.testing.assert_close(model.class_logits(inputs, given), expected, atol=1e-5, rtol=0, msg=name)
    assert model.policy == PAPER_POLICY and model.predictor.operator == "zero"
    assert model.labels == ["0", "1", "2"]
    training, norm = read_description(tmp_path / "imported")["training"], "vit.vit.layernorm.weight"
    unread = {role: set(keys) for role, keys in training["unread_keys"].items()}
    assert (norm in unread["predictor"], norm in unread["selector"]) == (family == "vit", False)
    assert f"{family}.{family}.pooler.dense.weight" in unread["selector"] & unread["predictor"]
    assert "authors' code" in (tmp_path / "imported" / "README.md").read_text()


def misfits(state: dict) -> None:
    state["extra.weight"] = torch.zeros(2)
    del state["bert.bert.encoder.layer.1.output.dense.bias"]
    state["bert.bert.embeddings.LayerNorm.weight"] = torch.zeros(7)
    state["embedding_layer.weight"][3, 4] += 1
    state["fc.bias"][0] = float("nan")
    state["head.weight"] = state.pop("fc.weight")


def test_every_key_that_does_not_fit_is_named_at_once_for_both_files(tmp_path: Path) -> None:
    files = file("selector", state("g_bert", lambda state: state.update(more=torch.zeros(1))), "selector")(tmp_path)
    files |= file("predictor", state("f_bert", misfits))(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        golden_import("bert", tmp_path, **files)
    assert str(caught.value) == (
        f"{files['selector']} does not fit: more is unknown; {files['predictor']} does not fit: fc.weight is missing; "
        "bert.bert.embeddings.LayerNorm.weight is (7,), the backbone's config.json asks for (32,); "
        "bert.bert.encoder.layer.1.output.dense.bias is missing; embedding_layer.weight differs from "
        "bert.bert.embeddings.word_embeddings.weight, of which it is another name; "
        "fc.bias holds values that are not finite; extra.weight is unknown; head.weight is unknown")
    assert not (tmp_path / "imported").exists()


LARGE = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(200))]).encode()


@pytest.mark.parametrize(("family", "change", "message"), [
    ("bert", {"selector": Path("nowhere")}, "does not exist"), ("bert", file("predictor", b""), "cannot be read"),
    ("bert", file("selector", b"PK\x03\x04 cut off"), "cannot be read"),
    ("bert", file("predictor", [torch.zeros(2)]), "holds no state dictionary"),
    ("bert", file("selector", {"epoch": 3}), "holds no state dictionary"),
    ("bert", file("predictor", {"resnet.weight": torch.zeros(2)}), "resnet.weight is unknown"),
    ("bert", file("selector", {"fc.weight": torch.zeros(1), "x": Evil()}), r"run code: refused \(it names print"),
    ("bert", file("predictor", pickle.dumps(Evil())), "run code: refused.*; fix: save state_dict.. alone$"),
    *((family, {"selector": GOLDEN / f"f_{family}"}, "is a predictor .*swap the two") for family in FAMILIES),
    *((family, {"predictor": GOLDEN / f"g_{family}"}, "is a selector .*swap the two") for family in FAMILIES),
    ("bert", {"selector": GOLDEN / "g_vit"}, "is of the family 'vit', not 'bert'"),
    *(("vit", file("predictor", state("f_vit", lambda state, key=key: state[key].add_(1))), f"{key} differs from")
      for key in ("embedding_layer.position_embeddings", "vit.embedding.cls_token")),
    ("bert", config(hidden_act="relu"), "hidden_act is 'relu'"),
    ("bert", config(model_type="vit"), "model_type is 'vit'"),
    ("bert", config(position_embedding_type="relative_key"), "position_embedding_type"),
    ("bert", config(hidden_size=None), "fit the family 'bert': width: Input should be a valid integer .got None.$"),
    ("bert", config(num_attention_heads=5), r"heads \(5\) must divide width \(32\)$"),
    ("bert", config(num_hidden_layers=3), "encoder.layer.2.output.dense.weight is missing"),
    ("bert", config(num_hidden_layers=1), "encoder.layer.1.output.dense.weight is unknown"),
    ("bert", config(vocab_size=100), r"word_embeddings.weight is \(99, 32\).*asks for \(100, 32\)"),
    ("bert", {"backbone": Path("nowhere")}, "config.json is missing"),
    ("bert", file("backbone", b"{", "config.json"), "config.json is damaged"),
    ("bert", file("backbone", b'{"num_hidden_layers": 2}', "config.json"), "'hidden_size' is missing"),
    ("bert", {"tokenizer": Path("vocab.txt")}, "no tokenizer at"),
    ("bert", file("tokenizer", b"\xff\xfe", "vocab.txt"), "vocab.txt cannot be read as a fast tokenizer"),
    ("bert", file("tokenizer", LARGE, "vocab.txt"), "the tokenizer has 204 ids, the network only 99"),
    ("bert", {"labels": ["a", "b"]}, "3 classes"), ("bert", {"labels": ["a", "b", "b"]}, "3 classes"),
    ("resnet", {}, "unknown family 'resnet'.*bert, vit")])  # fmt: skip
def test_what_does_not_fit_is_named(family, change, message, tmp_path, capsys) -> None:
    with pytest.raises(RekdError, match=message):
        golden_import(family, tmp_path, **(change(tmp_path) if callable(change) else change))
    assert capsys.readouterr().out == "", "no code ran"
