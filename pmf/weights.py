"""Weights on disk: one safetensors file with the network's configuration inside; published files are read too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pmf.atomic_files import write_atomically
from pmf.config import ModelConfig
from pmf.errors import InputError, first_line, require
from pmf.hub import locate
from pmf.jax_files import is_state
from pmf.jax_states import load_weights
from pmf.published_weights import convert_official_state_dict, infer_config


def save_model(path: str | Path, config: ModelConfig, state: Mapping[str, Tensor], **metadata: object) -> None:
    """Write a state dict with its configuration (and JSON metadata) as one safetensors file, atomically.

    Errors: `InputError` if `path` cannot be written; no partial file is left behind.
    """
    info = {"pmf_config": json.dumps(asdict(config)), "pmf_metadata": json.dumps(metadata)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=info))


def read_weights(source: str | Path, weights: str | None = None) -> tuple[Path, ModelConfig, dict[str, Tensor]]:
    """The file that `source` and `weights` name, its configuration, and its state dict under our names.

    Arguments and errors: see `PMFDiT.from_pretrained`.
    """
    file, average = locate(str(source), weights)
    return file, *(load_weights(file, average) if is_state(file) else _read(file))


def matching_weights(file: Path, state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights of `state` that match `wanted` by name and shape; a v head that is not wanted is left out.

    Errors: `InputError` on a weight that is missing, of another shape, or unknown.
    """
    for name, shape in wanted.items():
        require(name in state, f"source: {file} lacks the weight {name!r}")
        got = list(state[name].shape)
        require(got == list(shape), f"source: {name!r} must have shape {list(shape)}, got {got}")
    surplus = [n for n in state if n not in wanted and not n.startswith(("head_blocks.v", "final_layers.v"))]
    require(not surplus, f"source: {file} holds the unexpected weight {surplus[0] if surplus else ''!r}")
    return {name: state[name] for name in wanted}


def _read(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    metadata, content = _content(file)
    for wrapper in ("model", "state_dict"):  # as training scripts often save them
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if "pmf_config" in metadata:
        try:
            return ModelConfig(**json.loads(metadata["pmf_config"])), content
        except (TypeError, ValueError) as error:
            raise InputError(f"source: {file} holds no readable configuration: {first_line(error)}") from error
    tensors = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    require(tensors, f"source: {file} is not a readable checkpoint: expected a state dict of tensors")
    return infer_config(content), convert_official_state_dict(content)


def _content(file: Path) -> tuple[dict[str, str], dict]:
    """The metadata of a checkpoint file, and its contents."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as reader:
                return reader.metadata() or {}, {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        return {}, torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # reading a corrupt file can raise anything
        raise InputError(f"source: {file} is not a readable checkpoint: {first_line(error)}") from error
