"""Continue a run of the authors: load their train state's weights, averages and moments into a run of ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pmf.errors import require
from pmf.jax_states import TrainState
from pmf.optim.ema import EMA
from pmf.optim.moments import initialise_state
from pmf.sharded import give

Copies = Mapping[str, EMA]
"""The averages of a run, by name."""
Optimizers = Mapping[str, torch.optim.Optimizer]


def check_fits(state: TrainState, model: nn.Module, averages: Copies, optimizers: Optimizers) -> None:
    """Raise `InputError` if a run of this network, averages and optimizers cannot resume from that state.

    `averages` are by name, {"ema_500": EMA, ...}; `optimizers` are as from `build_optimizers`.
    """
    missing = [name for name in averages if name not in state.averages]
    require(not missing, f"ema_half_lives: init holds {', '.join(state.averages)}, got {', '.join(missing)}")
    wanted, held = _run_tensors(model, averages, optimizers), _state_tensors(state, averages)
    for name in {**wanted, **held}:
        _require_shape(name, wanted.get(name), held.get(name))


@torch.no_grad()
def fill_run(state: TrainState | None, count: int, model: nn.Module, averages: Copies, optimizers: Optimizers) -> None:
    """Fill a run from a train state: weights, averages, moments, and `count`, the updates that the moments include.

    Every rank must call it. Only rank 0 needs the state; the others receive theirs from it, whole or in shards.
    """
    held = _state_tensors(state, averages) if state else {}
    for name, tensor in _run_tensors(model, averages, optimizers).items():
        give(tensor, held.get(name))
    for part in optimizers.values():
        for values in part.state.values():
            values["step"].fill_(count)


def _run_tensors(model: nn.Module, averages: Copies, optimizers: Optimizers) -> dict[str, Tensor]:
    """The tensors of a run that a train state fills, by name and kind. Creates missing moments as zeros."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {name: p.detach() for p, name in names.items()}
    for kind, average in averages.items():
        tensors |= {f"{name} of {kind}": value for name, value in average.average.items()}
    for part, moments in (("muon", ("momentum_buffer",)), ("adam", ("exp_avg", "exp_avg_sq"))):
        shard_over = getattr(optimizers[part], "shard_over", None)
        for p in optimizers[part].param_groups[0]["params"]:
            state = optimizers[part].state[p]
            initialise_state(state, p, moments, shard_over)
            tensors |= {f"{names[p]} of {moment}": state[moment] for moment in moments}
    return tensors


def _state_tensors(state: TrainState, averages: Copies) -> dict[str, Tensor]:
    """The tensors of a train state, named as in `_run_tensors`."""
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
