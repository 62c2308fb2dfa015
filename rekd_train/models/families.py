"""The registry of neural-model families: what training, export and serving know about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError
from rekd_train.models.base import Backbone
from rekd_train.models.bert import BertBackbone
from rekd_train.models.bilstm import BilstmBackbone


@dataclass(frozen=True)
class Family:
    """One family of backbones."""

    backbone: Callable[[BackboneConfig, dict[str, int]], Backbone]
    """Builds a backbone from its settings and the special token ids."""
    modality: str
    """'text' or 'image': which preprocessing its inputs come from."""
    soft_masks: bool
    """Whether ``attended`` takes float masks and passes them a gradient."""


def _vit(settings: BackboneConfig, special_ids: dict[str, int]) -> Backbone:
    from rekd_train.models.vit import VitBackbone  # timm takes seconds to import, text models do not need it

    return VitBackbone(settings, special_ids)


FAMILIES: dict[str, Family] = {
    "bert": Family(backbone=BertBackbone, modality="text", soft_masks=True),
    "bilstm": Family(backbone=BilstmBackbone, modality="text", soft_masks=False),
    "vit": Family(backbone=_vit, modality="image", soft_masks=True),
}


def build_backbone(settings: BackboneConfig, special_ids: dict[str, int]) -> Backbone:
    """A randomly initialised backbone.

    Raises:
        ConfigError: the family is not registered.
    """
    if settings.family not in FAMILIES:
        raise ConfigError(f"unknown family '{settings.family}'; families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[settings.family].backbone(settings, special_ids)
