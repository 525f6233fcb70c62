"""Fine-tuning: initialise a network from the weights of another."""

from __future__ import annotations

from pathlib import Path

import torch

from pmf.errors import require
from pmf.fields import check_values
from pmf.model import PMFDiT
from pmf.published_weights import unwrapped

CLASSES = "conditioning.classes.weight"


@torch.no_grad()
def copy_weights(model: PMFDiT, source: str | Path, weights: str | None = None) -> list[str]:
    """Copy a checkpoint's weights into a network that may have other classes; return notes on what was not copied.

    The network may be wrapped, by DDP or torch.compile.
    `source` and `weights` are as in `PMFDiT.from_pretrained`: our checkpoints, published ones, hub ids. If the
    checkpoint has no v head, as most published ones, the v head starts as a copy of the u head: at h = 0 both fields
    are the instantaneous velocity; a network without a v head leaves that of the checkpoint.
    A class table of another size keeps its random initial values. Errors: `InputError`
    on any other weight that is missing, unexpected or of another shape; the network is then unchanged.
    """
    check_values(torch.nn.Module, model=model)
    state = PMFDiT.from_pretrained(source, weights=weights).state_dict()
    notes = []
    if not any(".v." in name for name in state):
        state |= {name.replace(".u.", ".v."): value for name, value in state.items() if ".u." in name}
        notes.append("the v head starts as a copy of the u head")
    wanted = unwrapped(dict(model.named_parameters()))
    if not any(".v." in name for name in wanted):
        state = {name: value for name, value in state.items() if ".v." not in name}
    surplus = sorted(set(state) - set(wanted))
    require(not surplus, f"source: {source} holds {', '.join(surplus[:1])!r}, which this network does not have")
    if CLASSES in state and len(state[CLASSES]) != len(wanted[CLASSES]):
        theirs, ours = len(state.pop(CLASSES)) - 1, len(wanted.pop(CLASSES)) - 1
        notes.append(f"the table of {ours} classes is initialised at random: {source} has {theirs}")
    for name, parameter in wanted.items():
        require(name in state, f"source: {source} lacks the weight {name!r}")
        got, shape = list(state[name].shape), list(parameter.shape)
        require(got == shape, f"source: expected {name!r} of shape {shape}, got {got}")
    for name, parameter in wanted.items():
        parameter.copy_(state[name])
    return notes
