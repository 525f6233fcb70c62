"""Starting a network from a checkpoint: fine-tuning, on the same classes or on others."""

from __future__ import annotations

import torch
from torch import Tensor

import pmf
from pmf.errors import require

CLASSES = "conditioning.classes.weight"


@torch.no_grad()
def start_from(model: pmf.PMFDiT, source: str) -> list[str]:
    """Copy the weights of a checkpoint (ours, a published one, a hub id) into a network; say what was not copied.

    A checkpoint without v head, as the published ones are, starts the v head as a copy of the u head: at h = 0
    both fields are the instantaneous velocity. A class table of another size stays freshly drawn. Errors:
    `InputError` on any other weight that is missing or of another shape.
    """
    state = pmf.PMFDiT.from_pretrained(source).state_dict()
    notes = []
    if not any(".v." in name for name in state):
        state |= {name.replace(".u.", ".v."): value for name, value in state.items() if ".u." in name}
        notes.append("the v head starts as a copy of the u head")
    surplus = sorted(set(state) - set(model.state_dict()))
    require(not surplus, f"init: {source} holds {next(iter(surplus), '')!r}, which this network has no place for")
    for name, parameter in model.named_parameters():
        require(name in state, f"init: {source} lacks the weight {name!r}")
        if name == CLASSES and state[name].shape != parameter.shape:
            notes.append(
                f"the table of {len(parameter) - 1} classes starts afresh, {source} has {len(state[name]) - 1}"
            )
            continue
        _copy(parameter, state[name], name)
    return notes


def _copy(parameter: Tensor, value: Tensor, name: str) -> None:
    got, wanted = list(value.shape), list(parameter.shape)
    require(got == wanted, f"init: expected {name!r} of shape {wanted}, got {got}")
    parameter.copy_(value)
