"""Starting a network from a checkpoint: fine-tuning, on the same classes or on others."""

from __future__ import annotations

import torch

import pmf
from pmf.errors import require

CLASSES = "conditioning.classes.weight"


@torch.no_grad()
def start_from(model: pmf.PMFDiT, source: str) -> list[str]:
    """Copy the weights of a checkpoint (ours, a published one, a hub id) into a network; say what was not copied.

    A checkpoint without v head, as the published ones are, starts the v head as a copy of the u head: at h = 0
    both fields are the instantaneous velocity. A class table of another size stays freshly drawn. Errors:
    `InputError` on any other weight that is missing, left over or of another shape; the network is then as it was.
    """
    state = pmf.PMFDiT.from_pretrained(source).state_dict()
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
