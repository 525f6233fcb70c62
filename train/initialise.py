"""What a new run starts from: a checkpoint's weights (fine-tuning), or a whole training state of the authors.

The main process alone reads files; the others receive their parts from it.
"""

from __future__ import annotations

from torch import nn

import pmf
from pmf.errors import require
from pmf.fine_tuning import copy_weights
from pmf.jax_states import TrainState, find_train_state
from pmf.optim.authors_state import Averages, Optimizers, check_fits, fill_run
from pmf.sharded import give
from pmf.train.config import RunConfig
from pmf.train.distributed import World


def start_from_weights(model: pmf.PMFDiT, config: RunConfig, world: World) -> None:
    """Copy the weights that config.init names."""
    for note in world.main_first(lambda: copy_weights(model, config.init, config.init_weights)):
        if world.main:
            print(note)
    for p in model.parameters():
        give(p, p)


def continue_authors_run(
    model: nn.Module, averages: Averages, optimizers: Optimizers, config: RunConfig, world: World
) -> int:
    """Fill a run with the authors' training state that config.init names; the step it is at."""
    state: TrainState | None = None

    def read() -> tuple[int, int]:
        nonlocal state
        state = find_train_state(config.init, config.init_weights)
        message = f"steps: init is at step {state.step}, expected at least that, got {config.steps}"
        require(state.step <= config.steps, message)
        check_fits(state, model, averages, optimizers)
        return state.step, state.count

    step, count = world.main_first(read)
    fill_run(state, count, model, averages, optimizers)
    if world.main:
        print(f"goes on from step {step} of {config.init}")
    return step
