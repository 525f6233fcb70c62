"""What a new run starts from: a checkpoint's weights (fine-tuning), or a whole training state of the authors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import pmf
from pmf.errors import require
from pmf.jax_states import TrainState, find_train_state
from pmf.train.config import RunConfig
from pmf.train.distributed import World
from pmf.train.optim import EMA
from pmf.train.optim.moments import initialise_state

CLASSES = "conditioning.classes.weight"
Averages = Mapping[str, EMA]
Optimizers = Mapping[str, torch.optim.Optimizer]


@torch.no_grad()
def start_from_weights(model: pmf.PMFDiT, config: RunConfig, world: World) -> None:
    """Copy the weights that config.init names: the main process reads them and gives them to the others."""
    for note in world.main_first(lambda: copy_weights(model, config.init, config.init_weights)):
        if world.main:
            print(note)
    for p in model.parameters():
        world.give(p, p)


@torch.no_grad()
def copy_weights(model: pmf.PMFDiT, source: str, weights: str | None = None) -> list[str]:
    """Copy the weights of a checkpoint (ours, a published one, a hub id) into a network; notes on what was not copied.

    `weights` is as in `from_pretrained`. If the checkpoint has no v head, as most published ones, the v head starts as
    a copy of the u head: at h = 0 both fields are the instantaneous velocity. A class table of another size keeps its
    random initial values. Errors: `InputError` on any other weight that is missing, left over or of another shape; the
    network is then unchanged.
    """
    state = pmf.PMFDiT.from_pretrained(source, weights=weights).state_dict()
    notes = []
    if not any(".v." in name for name in state):
        state |= {name.replace(".u.", ".v."): value for name, value in state.items() if ".u." in name}
        notes.append("the v head starts as a copy of the u head")
    wanted = dict(model.named_parameters())
    surplus = sorted(set(state) - set(wanted))
    require(not surplus, f"init: {source} holds {next(iter(surplus), '')!r}, which this network has no place for")
    if CLASSES in state and len(state[CLASSES]) != len(wanted[CLASSES]):
        got, fresh = len(state.pop(CLASSES)) - 1, len(wanted.pop(CLASSES)) - 1
        notes.append(f"the table of {fresh} classes starts afresh: {source} has {got}")
    for name, parameter in wanted.items():
        require(name in state, f"init: {source} lacks the weight {name!r}")
        _require_shape(name, parameter, state[name])
    for name, parameter in wanted.items():
        parameter.copy_(state[name])
    return notes


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
    fill_run(state, count, model, averages, optimizers, world)
    if world.main:
        print(f"goes on from step {step} of {config.init}")
    return step


def check_fits(state: TrainState, model: nn.Module, averages: Averages, optimizers: Optimizers) -> None:
    """Errors: `InputError` where a run of this network, averages and optimizers cannot go on from that state."""
    missing = [name for name in averages if name not in state.averages]
    require(not missing, f"ema_half_lives: init holds {', '.join(state.averages)}, got {', '.join(missing)}")
    wanted, held = _run_tensors(model, averages, optimizers), _state_tensors(state, averages)
    for name in {**wanted, **held}:
        _require_shape(name, wanted.get(name), held.get(name))


@torch.no_grad()
def fill_run(
    state: TrainState | None,
    count: int,
    model: nn.Module,
    averages: Averages,
    optimizers: Optimizers,
    world: World,
) -> None:
    """Fill a run with a training state: weights, averages, moments, and `count`, the updates the moments have seen.

    Only the main process needs the state; the others receive their parts from it.
    """
    held = _state_tensors(state, averages) if state else {}
    for name, tensor in _run_tensors(model, averages, optimizers).items():
        world.give(tensor, held.get(name))
    for part in optimizers.values():
        for values in part.state.values():
            values["step"].fill_(count)


def _run_tensors(model: nn.Module, averages: Averages, optimizers: Optimizers) -> dict[str, Tensor]:
    """The tensors of a run that a training state fills, by name and kind. Moments that are not there begin at zero."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {name: p.detach() for p, name in names.items()}
    for kind, average in averages.items():
        tensors |= {f"{name} of {kind}": value for name, value in average.average.items()}
    for part, moments in (("muon", ("momentum_buffer",)), ("adam", ("exp_avg", "exp_avg_sq"))):
        for p in optimizers[part].param_groups[0]["params"]:
            state = optimizers[part].state[p]
            initialise_state(state, p, moments)
            tensors |= {f"{names[p]} of {moment}": state[moment] for moment in moments}
    return tensors


def _state_tensors(state: TrainState, averages: Averages) -> dict[str, Tensor]:
    """The tensors of a training state as `_run_tensors` names them."""
    tensors = dict(state.model)
    for kind in averages:
        tensors |= {f"{name} of {kind}": value for name, value in state.averages[kind].items()}
    tensors |= {f"{name} of momentum_buffer": value for name, value in state.muon.items()}
    for name, (first, second) in state.adam.items():
        tensors |= {f"{name} of exp_avg": first, f"{name} of exp_avg_sq": second}
    return tensors


def _require_shape(name: str, wanted: Tensor | None, got: Tensor | None) -> None:
    shapes = [None if tensor is None else list(tensor.shape) for tensor in (wanted, got)]
    require(shapes[0] == shapes[1], f"init: expected {name!r} of shape {shapes[0]}, got {shapes[1]}")
