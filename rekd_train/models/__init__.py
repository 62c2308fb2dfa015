"""Neural-model families, the selector and predictor over them, and the pair of both."""

from rekd_train.models.families import FAMILIES, Family, build_backbone
from rekd_train.models.rationalizer import Rationalizer, Selection

__all__ = ["FAMILIES", "Family", "Rationalizer", "Selection", "build_backbone"]
