"""The vision family: selector and predictor backbones over timm's ``VisionTransformer``."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate, linear

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError, InputError
from rekd_train.models.base import Backbone, Inputs


class VitBackbone(Backbone):
    """Patches through a vision transformer.

    Inputs: ``pixels``, uint8 (B, height, width, C), resized and normalised in here; or ``pixel_values``,
    float (B, C, H, W), already resized and normalised. Features are the patches, row by row; [CLS] is
    none. Kept patches keep their position embeddings. With the operator 'compact' the predictor sees
    [CLS] and the kept patches and nothing else.

    Args:
        settings: sizes; ``settings.image`` is required.
        special_ids: not used; images have no tokens.

    Raises:
        ConfigError: no image section.
    """

    def __init__(self, settings: BackboneConfig, special_ids: dict[str, int]) -> None:
        super().__init__()
        if settings.image is None:
            raise ConfigError("family 'vit' needs the section 'image' (height, width, channels, patch)")
        self.settings = settings
        self.image = settings.image
        self.vit = VisionTransformer(
            img_size=self.image.size,
            patch_size=self.image.patch,
            in_chans=self.image.channels,
            num_classes=0,
            embed_dim=settings.width,
            depth=settings.layers,
            num_heads=settings.heads,
            mlp_ratio=(settings.feedforward + 0.5) / settings.width,  # timm rounds the product down
            pos_drop_rate=settings.dropout,
            proj_drop_rate=settings.dropout,
            attn_drop_rate=settings.attention_dropout,
            norm_layer=partial(nn.LayerNorm, eps=settings.layer_norm_eps),
            final_norm=settings.final_norm,
            fc_norm=False,
            weight_init="jax",  # Xavier: timm's own default of 0.02 is far too small for narrow networks
        )
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.image, name), dtype=torch.float32)
            self.register_buffer(name, values.view(1, -1, 1, 1), persistent=False)

    def real(self, inputs: Inputs) -> Tensor:
        images = inputs["pixel_values"] if "pixel_values" in inputs else inputs["pixels"]
        rows, columns = self.image.grid
        return torch.ones((images.shape[0], rows * columns), dtype=torch.bool, device=images.device)

    def selectable(self, inputs: Inputs) -> Tensor:
        return self.real(inputs)

    def states(self, inputs: Inputs) -> Tensor:
        return self._encode(self._content(self._patches(inputs)), self.vit.pos_embed[:, 1:])[:, 1:]

    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        content = self._content(self._patches(inputs)) * keep.unsqueeze(-1)
        return self._encode(content, self.vit.pos_embed[:, 1:])[:, 0]

    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        return self._encode(self._content(self._patches(inputs)), self.vit.pos_embed[:, 1:], keep)[:, 0]

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        patches = self._patches(inputs)
        chosen = patches.gather(1, positions.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        places = embedding(positions, self.vit.pos_embed[0, 1:])
        return self._encode(self._content(chosen), places, kept)[:, 0]

    def _images(self, inputs: Inputs) -> Tensor:
        """(B, C, H, W) float, normalised, in the size that is cut into patches."""
        if "pixel_values" in inputs:
            images = inputs["pixel_values"]
        else:
            images = inputs["pixels"].permute(0, 3, 1, 2).to(self.mean.dtype) / 255
            images = (images - self.mean) / self.std
            if self.image.upscale_to and tuple(images.shape[2:]) != self.image.size:
                images = interpolate(images, size=self.image.size, mode="bilinear", align_corners=False)
        expected = (self.image.channels, *self.image.size)
        if tuple(images.shape[1:]) != expected:
            raise InputError(f"images are {tuple(images.shape[1:])} (channels, height, width); expected {expected}")
        return images

    def _patches(self, inputs: Inputs) -> Tensor:
        """(B, N, C * patch * patch) pixels, ordered as the projection's weights."""
        images = self._images(inputs)
        (rows, columns), side = self.image.grid, self.image.patch
        cut = images.reshape(-1, self.image.channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(-1, rows * columns, self.image.channels * side * side)

    def _content(self, patches: Tensor) -> Tensor:
        """(B, M, H): the patch convolution as a product, so that it runs on kept patches alone."""
        projection = self.vit.patch_embed.proj
        return linear(patches, projection.weight.flatten(1), projection.bias)

    def _encode(self, content: Tensor, places: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, 1 + M, H): [CLS] before the patches, all blocks, the final norm if there is one.

        Args:
            content: (B, M, H).
            places: (1 or B, M, H) position embeddings.
            visible: (B, M) bool, the patches that may be attended; None: all.
        """
        first = self.vit.cls_token + self.vit.pos_embed[:, :1]
        hidden = torch.cat([first.expand(content.shape[0], -1, -1), content + places], dim=1)
        hidden = self.vit.pos_drop(hidden)
        mask = None
        if visible is not None:
            seen = torch.cat([torch.ones_like(visible[:, :1]), visible], dim=1)
            # added to the scores: a mask of bool would export with tests for rows that see nothing
            mask = torch.where(seen[:, None, None, :], 0.0, torch.finfo(hidden.dtype).min)
        for block in self.vit.blocks:
            hidden = block(hidden, attn_mask=mask)
        return self.vit.norm(hidden)
