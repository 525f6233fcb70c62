"""The authors' JAX train states under our names: weights, averages and the moments of Muon and Adam.

A train state is flax's, with the fields step, params, ema_params ({half-life in thousands of images: params}) and
opt_state (of optax.contrib.muon). The authors' networks store Linear weights as [in, out] and convolutions as
[height, width, in, out].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmf.config import PUBLISHED, ModelConfig
from pmf.errors import InputError, require
from pmf.hub import locate
from pmf.jax_files import StateFile, is_state, open_state
from pmf.published_weights import convert_official_state_dict, infer_config, published_names

Leaves = dict[tuple[str, ...], Any]
STATE_FIELDS = ("step", "params", "ema_params", "opt_state")
_MUON = ("inner_states", "muon", "inner_state", "0")
_ADAM = ("inner_states", "adam", "inner_state", "0")


@dataclass(frozen=True)
class TrainState:
    """The authors' training run at one step, under our names, on the CPU."""

    step: int
    """Number of updates so far."""
    config: ModelConfig
    """The network."""
    model: dict[str, Tensor]
    """The weights."""
    averages: dict[str, dict[str, Tensor]]
    """The averages: "ema_500" and the like."""
    muon: dict[str, Tensor]
    """Muon's momentum, the running mean of gradients before its bias is corrected."""
    adam: dict[str, tuple[Tensor, Tensor]]
    """Adam's first and second moments, before their biases are corrected."""
    count: int
    """Number of updates that the moments include."""


def load_weights(source: Path, name: str | None = None) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The network, and one set of weights: "model" (the trained ones), or an average such as "ema_1000".

    The default is the average that the published settings sample from, else the only one. From orbax checkpoints,
    nothing else is read. Errors: `InputError` on a state that is unreadable or not of pMF, or an unknown name.
    """
    with open_state(source) as file:
        held = _held(file)
        config = infer_config(published_state_dict(file.tree["params"]))
        listed = ", ".join(held)
        name = name or _default(config, held)
        if name is None:
            raise InputError(f"weights: {source} holds several averages, expected one of {listed}")
        require(name in held, f"weights: {source} has no {name!r}, expected one of {listed}")
        return config, convert_official_state_dict(published_state_dict(file.read(*held[name])))


def load_train_state(source: Path) -> TrainState:
    """A whole train state. Errors: `InputError` on a state that is unreadable, not of pMF or without moments."""
    with open_state(source) as file:
        held = _held(file)
        weights = {
            name: convert_official_state_dict(published_state_dict(file.read(*path))) for name, path in held.items()
        }
        model = weights.pop("model")
        config = infer_config(published_state_dict(file.tree["params"]))
        muon, adam, count = _moments(source, file, config)
        first = muon | {name: moments[0] for name, moments in adam.items()}
        for part in (*weights.values(), first):
            same = {name: value.shape for name, value in part.items()} == {n: v.shape for n, v in model.items()}
            require(same, f"source: {source} holds weights, averages and moments of different networks")
        return TrainState(int(file.read("step")), config, model, weights, muon, adam, count)


def find_train_state(source: str, weights: str | None = None) -> TrainState:
    """The whole train state that `source` and `weights` name, as in `PMFDiT.from_pretrained`.

    Errors: `InputError` as in `load_train_state`, and on weights other than "model".
    """
    file, name = locate(source, weights)
    require(is_state(file), f"source: expected a train state of the authors, got {file}")
    require(name in (None, "model"), f'weights: a run resumes from "model", got {name!r}')
    return load_train_state(file)


def _held(file: StateFile) -> dict[str, tuple[str, ...]]:
    """The sets of weights: our name -> its path in the tree."""
    fields = file.tree if isinstance(file.tree, dict) else {}
    missing = [name for name in STATE_FIELDS if name not in fields]
    require(not missing, f"source: {file.path} is not a train state of pMF: it has no {', '.join(missing)}")
    averages = fields["ema_params"] or {}
    return {"model": ("params",), **{f"ema_{float(k):g}": ("ema_params", k) for k in sorted(averages, key=float)}}


def _default(config: ModelConfig, held: Mapping[str, object]) -> str | None:
    """The average that the preset of this network samples from, else the only one, if any."""
    presets = [f"ema_{p.ema_half_life:g}" for p in PUBLISHED.values() if p.network == config]
    averages = [name for name in held if name != "model"] or ["model"]
    return next((name for name in presets if name in held), averages[0] if len(averages) == 1 else None)


def _moments(
    source: Path, file: StateFile, config: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], int]:
    """(Muon's momentum, Adam's moments, their count). Each optimizer has placeholders for the other's parameters."""
    full = {(*prefix, "count") for prefix in (_MUON, _ADAM)} <= _leaves(file.tree["opt_state"]).keys()
    require(full, f"source: {source} holds no moments of Muon and Adam, expected a full training state")
    moments = _leaves(file.read("opt_state"))

    def part(*prefix: str) -> Leaves:
        return {path[len(prefix) :]: leaf for path, leaf in moments.items() if path[: len(prefix)] == prefix}

    muon, first, second = _named(part(*_MUON, "mu")), _named(part(*_ADAM, "mu")), _named(part(*_ADAM, "nu"))
    counts = {int(moments[(*prefix, "count")]) for prefix in (_MUON, _ADAM)}
    together = len(counts) == 1 and first.keys() == second.keys() and not muon.keys() & first.keys()
    require(together, f"source: {source} holds moments of Muon and Adam that do not belong together")
    first, second = (convert_official_state_dict(muon | adam) for adam in (first, second))  # names and shapes of all
    published = published_names(config, ("u", "v"))
    return (
        {name: value for name, value in first.items() if published[name] in muon},
        {name: (value, second[name]) for name, value in first.items() if published[name] not in muon},
        counts.pop(),
    )


def published_state_dict(params: Any) -> dict[str, Tensor]:
    """Convert parameters of the authors' flax modules to the names and the layout of their PyTorch files."""
    return _named(_leaves(params))


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Leaves:
    """The leaves of nested dicts and lists by path, without empty nodes (None, {})."""
    if tree is None:
        return {}
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {k: v for name, part in tree.items() for k, v in _leaves(part, (*path, str(name))).items()}


def _named(leaves: Leaves) -> dict[str, Tensor]:
    return {_published_name(path): _published_value(path, leaf) for path, leaf in leaves.items()}


def _published_name(path: tuple[str, ...]) -> str:
    name = re.sub(r"\.(shared_blocks|u_heads|v_heads)_(\d+)\.", r".\1.\2.", ".".join(path))
    name = re.sub(r"\.mlp\.layers_(\d+)\.", r".mlp.\1.", name)
    name = re.sub(r"\.embedding$", "._flax_embedding.weight", name)
    return re.sub(r"\.kernel$", ".weight", name)


def _published_value(path: tuple[str, ...], leaf: Any) -> Tensor:
    """The tensor in PyTorch's layout; on the meta device if only the shape is known."""
    name = ".".join(path)
    require(hasattr(leaf, "shape"), f"source: expected an array at {name}, got {type(leaf).__name__}")
    if hasattr(leaf, "__array__"):
        value = torch.from_numpy(np.array(leaf, dtype=np.float32))
    else:
        value = torch.empty(tuple(leaf.shape), device="meta")
    if path[-1] == "kernel" and value.ndim == 2:
        value = value.T
    elif path[-1] == "kernel" and value.ndim == 4:
        value = value.permute(3, 2, 0, 1)
    elif path[-1] == "embedding":
        require(value.ndim == 3, f"source: expected {name} of 3 dimensions, got {list(value.shape)}")
        value = value[0]
    return value.contiguous()
