"""The authors' checkpoints -> ours.

Their code saves two pickled state dictionaries, a generator (our selector) and an encoder (our
predictor), both over the same ``transformers`` backbone, whose config.json holds what weights do not
tell: heads, LayerNorm epsilon, activation. Import is strict: every key is used, known as not read by
their forward pass, or named in the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rekd_train.checkpoints.checkpoint import check_output, save
from rekd_train.checkpoints.description import in_one_line
from rekd_train.checkpoints.official_files import (
    StateReader,
    bert_weights,
    pickled_state,
    transformer_config,
    transformer_sizes,
    vit_weights,
)
from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.errors import CheckpointError, ConfigError
from rekd_train.files import sha256
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import PAPER_POLICY
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models.base import Predictor, Selector
from rekd_train.models.families import build_backbone, tokenizer_json
from rekd_train.models.rationalizer import Rationalizer

OfficialFamily = Literal["bert", "vit"]

_FAMILIES = {"bert": "transformers", "vit": "timm"}
_HEAD_DROPOUT = {"bert": 0.5, "vit": 0.1}
"""What the authors' runs used; matters only if the import is trained further."""
_CIFAR_SIDE = 32
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Red, green and blue of its images, in 0..1."""


def import_official(
    family: OfficialFamily,
    selector: str | Path,
    predictor: str | Path,
    backbone: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    labels: Sequence[str] | None = None,
    max_length: int = 256,
    image_side: int = _CIFAR_SIDE,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that answers as the authors' pair does without its noise.

    The decision rule is the paper's (argmax, every position, no limit) and the operator 'zero'.

    Args:
        family: 'bert' or 'vit'.
        selector: their generator's file ("g_...").
        predictor: their encoder's file ("f_...").
        backbone: directory of the pretrained model both started from; its config.json is read.
        output: the checkpoint's directory.
        tokenizer: tokenizer.json or vocab.txt (BERT); None: the backbone directory's.
        labels: class names in the order of the logits; None: "0", "1", ...
        max_length: tokens a text is cut to (BERT), at most the backbone's positions.
        image_side: height and width of the images as they come (ViT); CIFAR's 32 unless said otherwise.
        overwrite: replace a checkpoint at the output.

    Returns:
        ``output``.

    Raises:
        CheckpointError: a file is missing, damaged, unsafe, or does not fit; the message names every key.
        ConfigError: labels, tokenizer or sizes that do not fit the weights.
    """
    check_output(output, overwrite)
    if family not in get_args(OfficialFamily):
        families = ", ".join(get_args(OfficialFamily))
        raise ConfigError(f"unknown family '{family}'; the authors' checkpoints are of: {families}")
    config = transformer_config(Path(backbone), family)
    try:
        settings = _settings(family, config, image_side)
    except (KeyError, TypeError, ValueError) as error:
        path = Path(backbone) / "config.json"
        raise CheckpointError(f"{path} does not fit the family '{family}': {in_one_line(error)}") from None
    states = {
        role: StateReader(Path(path), pickled_state(Path(path)), family, role)
        for role, path in (("selector", selector), ("predictor", predictor))
    }
    preprocessor = (
        ImagePreprocessor(ImageSettings.of(settings))
        if family == "vit"
        else _text_preprocessor(Path(tokenizer or backbone), min(max_length, settings.positions))
    )
    rationalizer = _pair(family, settings, preprocessor, states, labels)
    origins = [
        f"{role} {Path(path).name} (SHA-256 {sha256(Path(path))}), made with the authors' code"
        for role, path in (("selector", selector), ("predictor", predictor))
    ]
    unread = {role: state.unread for role, state in states.items()}
    training = {"name": Path(output).name, "stage": "imported", "origins": origins, "unread_keys": unread}
    return save(rationalizer, output, training=training)


def _pair(
    family: OfficialFamily,
    settings: BackboneConfig,
    preprocessor: Preprocessor,
    states: dict[str, StateReader],
    labels: Sequence[str] | None,
) -> Rationalizer:
    selector_head, predictor_head = {"bert": ("feature_proj", "fc"), "vit": (None, "classifier")}[family]
    head_width = states["selector"].rows(selector_head) if selector_head else 0
    classes = states["predictor"].rows(predictor_head)
    selector_settings = settings.model_copy(update={"head_width": head_width})
    predictor_settings = settings.model_copy(update={"final_norm": family != "vit"})
    selector = Selector(build_backbone(selector_settings, preprocessor.special_ids))
    predictor = Predictor(build_backbone(predictor_settings, preprocessor.special_ids), classes, operator="zero")
    weights = bert_weights if family == "bert" else vit_weights
    selector_state = weights(states["selector"], selector.backbone)
    predictor_state = weights(states["predictor"], predictor.backbone)
    if family == "bert":
        selector_state |= states["selector"].linear("feature_proj", selector.head[0], "head.0")
    selector_state |= states["selector"].linear("fc", selector.head[-1], f"head.{len(selector.head) - 1}")
    predictor_state |= states["predictor"].linear(predictor_head, predictor.head[-1], "head.1")
    misfits = [found for state in states.values() if (found := state.misfits())]
    if misfits:
        raise CheckpointError("; ".join(misfits))
    names = [str(index) for index in range(classes)] if labels is None else [str(label) for label in labels]
    if len(names) != classes or len(set(names)) != classes:
        raise ConfigError(f"labels {names} do not fit: the predictor has {classes} classes, each needs its own name")
    for module, state in ((selector, selector_state), (predictor, predictor_state)):
        module.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return Rationalizer(selector, predictor, PAPER_POLICY, preprocessor, names).eval()


def _settings(family: OfficialFamily, config: dict[str, Any], image_side: int) -> BackboneConfig:
    sizes = transformer_sizes(config, family) | {"family": _FAMILIES[family]} | {"head_dropout": _HEAD_DROPOUT[family]}
    if family == "vit":
        side, channels = config["image_size"], config.get("num_channels", 3)
        native = min(image_side, side)
        sizes["image"] = ImageConfig(
            height=native, width=native, channels=channels, upscale_to=None if native == side else side,
            patch=config["patch_size"], **(_IMAGENET if channels == 3 else {}),
        )  # fmt: skip
    return BackboneConfig(**sizes)


def _text_preprocessor(path: Path, max_length: int) -> TextPreprocessor:
    if (content := tokenizer_json(path)) is None:
        raise ConfigError(f"no tokenizer at {path}; fix: --tokenizer with tokenizer.json, vocab.txt or their directory")
    return TextPreprocessor(content, TextSettings(max_length))
