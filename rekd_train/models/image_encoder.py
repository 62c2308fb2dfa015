"""Any image network of ``timm``, as the backbone of a selector or predictor."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm import create_model
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate, linear

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError, InputError
from rekd_train.models.base import Backbone, Inputs, gated


class ImageEncoder(Backbone):
    """Patches through a network of ``timm``.

    Inputs: ``pixels``, uint8 (B, height, width, C), resized and normalised in here; or ``pixel_values``, float (B, C,
    H, W), already resized and normalised. Features are the patches, row by row; the network's own first tokens ([CLS],
    registers) are none. Where the network's features are patch tokens, kept patches keep their position embeddings, and
    with the operator 'compact' the predictor sees the first tokens and the kept patches and nothing else. Other
    networks (pyramids, convolutions) know the operator 'zero' alone: patches of the image are blanked, at full cost.

    ``settings.image`` is required; ``settings.architecture``: 'name' and 'arguments' of ``timm.create_model``; empty: a
    vision transformer of the sizes given. ``special_ids`` are not used.

    ConfigError: no image section, or a network that timm does not have or that does not fit it.
    """

    modality = "image"

    def __init__(self, settings: BackboneConfig, special_ids: dict[str, int]) -> None:
        super().__init__()
        if settings.image is None:
            raise ConfigError(f"family '{settings.family}' needs the section 'image' (height, width, channels, patch)")
        self.settings = settings
        self.image = settings.image
        self.model = image_network(settings)
        parts = ("_pos_embed", "norm_pre", "blocks", "norm")
        self.is_beit = isinstance(self.model, Beit)
        projection = getattr(getattr(self.model, "patch_embed", None), "proj", None)
        # after any other stem a token knows its neighbours' pixels, and a rationale would be more than it shows
        apart = isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride
        whole = self.is_beit or all(getattr(self.model, name, None) is not None for name in parts)
        self.has_tokens = whole and apart and projection.in_channels == self.image.channels
        if not self.has_tokens:
            self.operators = ("zero",)
        else:
            if self.is_beit:  # its blocks would add the biases of all patches; ``_relative`` gives those of the kept
                self.model.norm_pre = nn.Identity()
                for block in self.model.blocks:
                    block.attn._get_rel_pos_bias = _no_bias
            # drawn in ``_encode`` over all tokens: ``_pos_embed`` is asked for the position embeddings alone
            self.dropout, self.model.pos_drop = self.model.pos_drop, nn.Identity()
            grid = tuple(getattr(self.model.patch_embed, "grid_size", self.image.grid))
            if grid != self.image.grid or projection.kernel_size != (self.image.patch, self.image.patch):
                raise ConfigError(f"the network cuts images into {grid} patches of {projection.kernel_size}, the "
                                  f"section 'image' into {self.image.grid} of {self.image.patch}; fix: image.patch or "
                                  "image.upscale_to")
            for name in ("cls_token", "reg_token", "dist_token"):
                if (token := getattr(self.model, name, None)) is not None:
                    # its gradient is a view into that of all tokens; processes share ones with strides of their own
                    token.register_hook(partial(torch.clone, memory_format=torch.contiguous_format))
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
        if self.has_tokens:
            return self._encode(self.content(inputs))[:, self.model.num_prefix_tokens :]
        features = self.model.forward_features(self._images(inputs))
        if features.dim() == 3:  # tokens after all, but positions that cannot be told apart from the blocks
            return features[:, -self.image.grid[0] * self.image.grid[1] :]
        if features.shape[1] != self.settings.width:  # some have the channels last
            features = features.permute(0, 3, 1, 2)
        features = interpolate(features, size=self.image.grid, mode="bilinear", align_corners=False)
        return features.flatten(2).transpose(1, 2)

    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        if self.has_tokens:
            return self._pooled(self._encode(self.content(inputs) * keep.unsqueeze(-1)))
        rows, columns = self.image.grid
        shown = interpolate(keep.view(-1, 1, rows, columns), scale_factor=float(self.image.patch), mode="nearest")
        return self.model.forward_head(self.model.forward_features(self._images(inputs) * shown), pre_logits=True)

    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        return self._pooled(self._encode(self.content(inputs), visible=keep), keep)

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        content, kept = gated(self.content(inputs, positions), kept)
        return self._pooled(self._encode(content, positions, kept), kept)

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

    def content(self, inputs: Inputs, positions: Tensor | None = None) -> Tensor:
        """(B, M, H): patch embeddings without positions, of all patches or of those at ``positions`` (B, M)."""
        if not self.has_tokens:
            return super().content(inputs)
        # the convolution as a product, so that it runs on kept patches alone
        (rows, columns), side, channels = self.image.grid, self.image.patch, self.image.channels
        cut = self._images(inputs).reshape(-1, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        content = cut.reshape(-1, rows * columns, channels * side * side)
        if positions is not None:
            content = content.gather(1, positions.unsqueeze(-1).expand(-1, -1, content.shape[2]))
        projection = self.model.patch_embed.proj
        return self.model.patch_embed.norm(linear(content, projection.weight.flatten(1), projection.bias))

    def _encode(self, content: Tensor, positions: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """(B, P + M, H) of ``content`` (B, M, H): the network's P first tokens before it, all blocks, the final norm.

        ``positions`` (B, M): which patches these are; ``visible`` (B, M) bool: those that may be attended; None: all.
        """
        first, places, rotations = self._positions(content)
        if positions is not None:
            places = embedding(positions, places[0])
            # (B, 1 or heads, K, D) of rotations (N, D) or (heads, N, D)
            rotations = [embedding(positions, each).unsqueeze(1) if each.dim() == 2
                         else each[:, positions].transpose(0, 1) for each in rotations]
        hidden = torch.cat([first.expand(content.shape[0], -1, -1), content + places], dim=1)
        hidden = self.model.norm_pre(self.dropout(hidden))
        mask = None
        if visible is not None:
            seen = torch.cat([torch.ones_like(visible[:, :1]).expand(-1, first.shape[1]), visible], dim=1)
            mask = _added_mask(seen, hidden.dtype)
        for index, block in enumerate(self.model.blocks):
            if self.is_beit:
                options = {"shared_rel_pos_bias": self._relative(block.attn, positions, mask)}
            else:
                options = {"attn_mask": mask, **({"rope": rotations[index % len(rotations)]} if rotations else {})}
            hidden = block(hidden, **options)
        return self.model.norm(hidden)

    def _relative(self, attention: nn.Module, positions: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """(1 or B, heads, P + M, P + M): what a block of BEiT adds to its scores, the mask included."""
        biases = [] if self.model.rel_pos_bias is None else [self.model.rel_pos_bias()]
        if attention.relative_position_bias_table is not None:
            biases.append(type(attention)._get_rel_pos_bias(attention)[0])
        bias = sum(biases).unsqueeze(0) if biases else None
        if bias is not None and positions is not None:
            count, side = self.model.num_prefix_tokens, bias.shape[-1]
            first = torch.arange(count, device=positions.device).expand(positions.shape[0], -1)
            places = torch.cat([first, positions + count], dim=1)
            pairs = places.unsqueeze(2) * side + places.unsqueeze(1)
            bias = embedding(pairs, bias.flatten(2)[0].t()).permute(0, 3, 1, 2)
        return mask if bias is None else bias if mask is None else bias + mask

    def _positions(self, content: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The first tokens (1, P, H), position embeddings (1, N, H), and rotations by block, one or none for all."""
        rows, columns = self.image.grid
        blank = content.new_zeros(1, rows * columns, content.shape[2])
        if self.is_beit:
            first, places = self.model.cls_token, self.model.pos_embed
            return (first, blank, []) if places is None else (first + places[:, :1], places[:, 1:], [])
        if getattr(self.model, "dynamic_img_size", False):
            blank = blank.view(1, rows, columns, -1)
        found = self.model._pos_embed(blank)
        whole, rotation = found if isinstance(found, tuple) else (found, None)
        rotations = [] if rotation is None else list(rotation) if rotation.dim() > 2 else [rotation]
        count = self.model.num_prefix_tokens
        return whole[:, :count], whole[:, count:], rotations

    def _pooled(self, hidden: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, H): what a predictor reads of the states (B, P + M, H)."""
        count = self.model.num_prefix_tokens
        if self.settings.pooling == "start":
            return hidden[:, 0]
        patches = hidden[:, count:]
        seen = torch.ones_like(patches[..., 0]) if visible is None else visible.to(patches.dtype)
        if self.settings.pooling == "attention":
            pooled = self.model.attn_pool(patches, attn_mask=_added_mask(seen > 0, patches.dtype))
        else:
            pooled = (patches * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
        return getattr(self.model, "fc_norm", nn.Identity())(pooled)


def _added_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, 1, N) to add to scores, from (B, N) bool: a mask of bool exports with tests for rows that see nothing."""
    return torch.where(seen[:, None, None, :], 0.0, torch.finfo(dtype).min)


def _no_bias() -> float:
    return 0.0


def image_network(settings: BackboneConfig) -> nn.Module:
    """A randomly initialised network without a classifier; errors as ``ImageEncoder``."""
    image = settings.image
    if settings.architecture:
        arguments: dict[str, Any] = {"num_classes": 0, **settings.architecture.get("arguments", {})}
        try:
            return create_model(settings.architecture["name"], in_chans=image.channels, **arguments)
        except Exception as error:  # timm and the network each raise what they like
            name, reason = settings.architecture["name"], str(error).strip().partition("\n")[0]
            raise ConfigError(f"timm cannot build '{name}': {reason}") from None
    return VisionTransformer(
        img_size=image.size, patch_size=image.patch, in_chans=image.channels, num_classes=0,
        embed_dim=settings.width, depth=settings.layers, num_heads=settings.heads,
        mlp_ratio=(settings.feedforward + 0.5) / settings.width,  # timm rounds the product down
        pos_drop_rate=settings.dropout, proj_drop_rate=settings.dropout, attn_drop_rate=settings.attention_dropout,
        norm_layer=partial(nn.LayerNorm, eps=settings.layer_norm_eps), final_norm=settings.final_norm, fc_norm=False,
        weight_init="jax",  # Xavier: timm's own default of 0.02 is far too small for narrow networks
    )  # fmt: skip


def timm_names(layers: int) -> dict[str, list[str]]:
    """Weights of timm's vision transformer: those of ViTModel of ``transformers`` that each is made of, in a row."""
    modules = {"norm": ["layernorm"], "patch_embed.proj": ["embeddings.patch_embeddings.projection"]}
    for index in range(layers):
        attention = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        for ours, theirs in {
            "norm1": ["layernorm_before"], "attn.qkv": attention, "attn.proj": ["attention.output.dense"],
            "norm2": ["layernorm_after"], "mlp.fc1": ["intermediate.dense"], "mlp.fc2": ["output.dense"],
        }.items():
            modules[f"blocks.{index}.{ours}"] = [f"encoder.layer.{index}.{name}" for name in theirs]
    names = {"cls_token": ["embeddings.cls_token"], "pos_embed": ["embeddings.position_embeddings"]}
    for ours, theirs in modules.items():
        names |= {f"{ours}.{part}": [f"{name}.{part}" for name in theirs] for part in ("weight", "bias")}
    return names
