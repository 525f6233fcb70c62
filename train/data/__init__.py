"""The data room: one interface for training data, the loader, embedded sets, and prepared shards."""

from pmf.train.data.embedded import ImageSet, digits
from pmf.train.data.interface import CorruptImageError, TrainingData, to_float
from pmf.train.data.loader import Loader, Throughput
from pmf.train.data.opening import open_data
from pmf.train.data.order import order, step_seed
from pmf.train.data.photographs import photographs
from pmf.train.data.shards import PreparedShards
from pmf.train.data.sources import open_source

__all__ = [
    "CorruptImageError",
    "ImageSet",
    "Loader",
    "PreparedShards",
    "Throughput",
    "TrainingData",
    "digits",
    "open_data",
    "open_source",
    "order",
    "photographs",
    "step_seed",
    "to_float",
]
