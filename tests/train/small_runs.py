"""A small run of the command line, and its environment."""

import os

SMALL_MODEL = [
    "--model.depth",
    "2",
    "--model.aux-head-depth",
    "1",
    "--model.hidden-size",
    "16",
    "--model.num-heads",
    "2",
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""One thread on the CPU."""
