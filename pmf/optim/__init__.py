"""The published optimizer: Muon on Linear weights, Nesterov Adam on the rest, and moving averages of the weights.

All of them work on plain parameters, with DDP, and on the DTensors of FSDP2; `shard_over` shards their state under DDP.
"""

from pmf.optim.ema import EMA, Averages
from pmf.optim.muon import Muon
from pmf.optim.nesterov_adam import NesterovAdam
from pmf.optim.optimizers import OptimizerConfig, build_optimizers, learning_rate, split_parameters

__all__ = [
    "EMA",
    "Averages",
    "Muon",
    "NesterovAdam",
    "OptimizerConfig",
    "build_optimizers",
    "learning_rate",
    "split_parameters",
]
