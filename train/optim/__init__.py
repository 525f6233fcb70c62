"""The published optimizer: Muon on Linear weights, Nesterov Adam on the rest, and moving averages of the weights."""

from pmf.train.optim.ema import EMA
from pmf.train.optim.optimizers import OptimizerConfig, build_optimizers, split_parameters
from pmf.train.optim.schedule import learning_rate

__all__ = ["EMA", "OptimizerConfig", "build_optimizers", "learning_rate", "split_parameters"]
