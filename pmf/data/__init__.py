"""Training data: its protocol, a loader that resumes exactly, and prepared shards (`pmf.data.shards`)."""

from pmf.data.loader import Loader, epoch_order
from pmf.data.training_data import CorruptImageError, ImageSet, TrainingData

__all__ = ["CorruptImageError", "ImageSet", "Loader", "TrainingData", "epoch_order"]
