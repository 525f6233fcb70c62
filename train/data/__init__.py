"""Training data: what it is, how it opens by name, and the loader. Preparing lies in `prepare`, `shards`, `sources`."""

from pmf.train.data.by_name import open_data
from pmf.train.data.loader import Loader, epoch_order
from pmf.train.data.training_data import CorruptImageError, ImageSet, TrainingData

__all__ = [
    "CorruptImageError",
    "ImageSet",
    "Loader",
    "TrainingData",
    "epoch_order",
    "open_data",
]
