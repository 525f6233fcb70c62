"""Starting from a checkpoint: fine-tuning, on the same classes or on others; or going on with a run of the authors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import pmf
from pmf.errors import require
from pmf.jax_states import TrainState
from pmf.train.moments import begin
from pmf.train.optim import EMA

CLASSES = "conditioning.classes.weight"
Give = Callable[[Tensor, Tensor | None], None]


@torch.no_grad()
def start_from(model: pmf.PMFDiT, source: str, weights: str | None = None) -> list[str]:
    """Copy the weights of a checkpoint (ours, a published one, a hub id) into a network; say what was not copied.

    `weights` is as in `from_pretrained`.

    A checkpoint without v head, as the published ones are, starts the v head as a copy of the u head: at h = 0
    both fields are the instantaneous velocity. A class table of another size stays freshly drawn. Errors:
    `InputError` on any other weight that is missing, left over or of another shape; the network is then as it was.
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
        shapes = list(parameter.shape), list(state[name].shape)
        require(shapes[0] == shapes[1], f"init: expected {name!r} of shape {shapes[0]}, got {shapes[1]}")
    for name, parameter in wanted.items():
        parameter.copy_(state[name])
    return notes


def check_fits(state: TrainState, model: nn.Module, averages: Mapping[str, EMA], optimizers: Mapping) -> None:
    """Errors: `InputError` where a run of this network, averages and optimizers cannot go on from that state."""
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = {name: list(p.shape) for name, p in model.named_parameters()}
    for name in sorted(wanted.keys() | state.model.keys()):
        shapes = wanted.get(name), list(state.model[name].shape) if name in state.model else None
        require(shapes[0] == shapes[1], f"init: expected {name!r} of shape {shapes[0]}, got {shapes[1]}")
    missing = [name for name in averages if name not in state.averages]
    require(not missing, f"ema_half_lives: init holds {', '.join(state.averages)}, got {', '.join(missing)}")
    for kind, held in (("muon", state.muon), ("adam", state.adam)):
        own = {names[id(p)] for group in optimizers[kind].param_groups for p in group["params"]}
        other = sorted(own ^ held.keys())
        require(not other, f"init: {kind} of one run holds {next(iter(other), '')!r}, that of the other does not")


@torch.no_grad()
def go_on_from(
    state: TrainState | None, count: int, model: nn.Module, averages: Mapping[str, EMA], optimizers: Mapping, give: Give
) -> None:
    """Fill a run with a train state: weights, averages, moments, and `count`, the updates that the moments have seen.

    `give(target, value)` copies the main process's value into a tensor that every process holds, whole or in part;
    the other processes have no state.
    """
    of_muon = {id(p) for group in optimizers["muon"].param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        give(p, state and state.model[name])
        for kind, average in averages.items():
            give(average.average[name], state and state.averages[kind][name])
        if id(p) in of_muon:
            part, moments = optimizers["muon"].state[p], {"momentum_buffer": state and state.muon[name]}
        else:
            first, second = state.adam[name] if state else (None, None)
            part, moments = optimizers["adam"].state[p], {"exp_avg": first, "exp_avg_sq": second}
        begin(part, p, tuple(moments))
        part["step"].fill_(count)
        for key, value in moments.items():
            give(part[key], value)
