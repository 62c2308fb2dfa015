"""Data sets: from a name in the configuration to labelled examples in fixed splits, and to batches of tensors."""

from rekd_train.data.batches import bucketed_batches
from rekd_train.data.examples import SPLITS, DataSet, LabelledImages, LabelledTexts
from rekd_train.data.partition import stratified_split
from rekd_train.data.sources import is_unsplit, load_data, load_whole
from rekd_train.data.splits import ImageSplit, Split, TokenizedTexts, encode, encode_splits, tokenize
from rekd_train.data.summary import summarise

__all__ = [
    "SPLITS", "DataSet", "ImageSplit", "LabelledImages", "LabelledTexts", "Split", "TokenizedTexts", "bucketed_batches",
    "encode", "encode_splits", "is_unsplit", "load_data", "load_whole", "stratified_split", "summarise",
    "tokenize",
]  # fmt: skip
