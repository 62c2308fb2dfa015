"""Configuration of the data: which examples, from where, in which splits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rekd_train.config.section import Section

DataName = Literal[
    "imdb", "aclimdb", "rotten_tomatoes", "table", "cifar10", "cifar100_coarse", "cifar100_fine", "fashion_mnist",
    "mosaic", "digits", "image_folder",
]  # fmt: skip
TEXT_DATA = ("imdb", "aclimdb", "rotten_tomatoes", "table")


class DataConfig(Section):
    """Which examples."""

    name: DataName = Field(
        "imdb", description="data set; 'table' is a file of your own, 'image_folder' a folder of your own"
    )
    path: str = Field("", description="file or folder of the data; empty: where the package that carries them is")
    text_column: str = Field("text", min_length=1, description="column of the texts (table)")
    label_column: str = Field("label", min_length=1, description="column of the labels (table)")
    rationale_column: str = Field("", description="column of human rationales, lists of [start, end] (table)")
    split_column: str = Field("", description="column that says train, dev or test (table); empty: split by seed")
    labels: tuple[str, ...] = Field((), description="class names in the order of the logits (own data); empty: sorted")
    train_examples: int | None = Field(None, ge=2, description="only the first N training examples; none: all")
    dev_examples: int | None = Field(None, ge=1, description="only the first N dev examples; none: all")
    test_examples: int | None = Field(None, ge=1, description="only the first N test examples; none: all")
    dev_share: float = Field(
        0.1, gt=0, lt=1, description="share of the training examples that becomes dev where the data bring none"
    )
    test_share: float = Field(
        0.1, gt=0, lt=1, description="share of the training examples that becomes test where the data bring none"
    )
    max_length: int = Field(160, ge=3, description="tokens after which a text is cut, special tokens included")
    lengths: tuple[int, ...] = Field(
        (), description="lengths that batches are padded to; empty: multiples of 32, and max_length"
    )
    augmentation: Literal["none", "crop", "flip", "crop_flip"] = Field(
        "none", description="random changes of training images: shifts by up to 4 pixels, mirroring, both"
    )
    tiles: Literal[2, 3] = Field(2, description="tiles in a row and a column of a mosaic")
    other_tiles: Literal["shuffled", "blank"] = Field("shuffled", description="what the other tiles of a mosaic hold")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="of the cross-entropy: 'balanced': every class counts alike, however few its examples are"
    )
    seed: int = Field(2026, description="seed of the splits; the same for every model that is compared")

    @field_validator("path")
    @classmethod
    def _home_is_a_folder(cls, path: str) -> str:
        # no shell does it in a TOML file or after --set
        return str(Path.home() / path.removeprefix("~/")) if path.startswith("~/") else path

    @property
    def modality(self) -> Literal["text", "image"]:
        """What the examples are."""
        return "text" if self.name in TEXT_DATA else "image"

    @model_validator(mode="after")
    def _lengths_within_maximum(self) -> DataConfig:
        if any(not 3 <= length <= self.max_length for length in self.lengths):
            raise ValueError(f"lengths {self.lengths} must lie within 3..max_length ({self.max_length})")
        return self

    @model_validator(mode="after")
    def _labels_are_names(self) -> DataConfig:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels {list(self.labels)} must be different from one another")
        if self.labels and self.name not in ("table", "image_folder"):
            raise ValueError(f"data '{self.name}' name their own classes; labels are for a table or an image_folder")
        return self

    @model_validator(mode="after")
    def _shares_leave_something(self) -> DataConfig:
        if self.dev_share + self.test_share >= 1:
            raise ValueError(f"dev_share ({self.dev_share}) + test_share ({self.test_share}) leave nothing to train on")
        return self

    @model_validator(mode="after")
    def _path_and_augmentation_fit_the_data(self) -> DataConfig:
        if self.name in ("table", "image_folder") and not self.path:
            raise ValueError(f"path is needed for the data '{self.name}'; fix: --set data.path=PATH")
        others = {"imdb": "aclimdb", "rotten_tomatoes": "table", "digits": "image_folder"}
        if self.name in others and self.path:
            raise ValueError(
                f"the data '{self.name}' come with a package and have no path (got '{self.path}'); "
                f"fix for files of your own: --set data.name={others[self.name]}"
            )
        if self.augmentation != "none" and self.modality == "text":
            raise ValueError(f"augmentation '{self.augmentation}' is for images; the data '{self.name}' are texts")
        return self
