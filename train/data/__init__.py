"""The data room: one interface for training data, the loader, embedded sets, and prepared shards."""

from pmf.train.data.embedded import ImageSet, digits
from pmf.train.data.interface import CorruptImageError, TrainingData, to_float
from pmf.train.data.loader import Loader, Throughput
from pmf.train.data.order import order, step_seed

__all__ = [
    "CorruptImageError",
    "ImageSet",
    "Loader",
    "Throughput",
    "TrainingData",
    "digits",
    "order",
    "step_seed",
    "to_float",
]
