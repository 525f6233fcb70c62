"""Networks on disk: one safetensors file with its configuration inside, written atomically."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pmf.config import ModelConfig
from pmf.errors import InputError, first_line, require
from pmf.jax_files import is_state
from pmf.jax_states import load_weights
from pmf.model import PMFDiT, create_model
from pmf.official import convert_official_state_dict, export_official_state_dict, infer_config
from pmf.sources import locate

__all__ = [
    "convert_official_state_dict",
    "export_official_state_dict",
    "infer_config",
    "load_model",
    "save_model",
    "write_atomically",
]


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` make the file, then put it in place: whole, or not at all.

    Errors: `InputError` when `path` cannot be written (no directory, no permission, a full disk).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"path: cannot write {path}: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"path: cannot write {path}: {first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path: str | Path, config: ModelConfig, state: Mapping[str, Tensor], **metadata: object) -> None:
    """Write a state dict with its configuration (and JSON metadata) as one safetensors file, atomically.

    Errors: `InputError` when `path` cannot be written; nothing half-written is left behind.
    """
    info = {"pmf_config": json.dumps(asdict(config)), "pmf_metadata": json.dumps(metadata)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=info))


def load_model(
    source: str | Path,
    *,
    weights: str | None = None,
    aux_head: bool | None = None,
    impl: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PMFDiT:
    """A network from a run directory, a checkpoint file, or a Hugging Face hub id ("owner/name").

    `weights` names a file of a directory or hub repository, with or without its suffix: "ema_500" for an average of
    a run, "pMF-B-16" (or "pMF-B/16") for pMF-B-16.pt. Of a hub repository that file alone is downloaded. By default
    it is the run's own choice for sampling, else model.safetensors, else the only one.

    Files are ours (.safetensors), published state dicts (.safetensors, .pt, .pth, .bin), or train states of the
    authors' JAX code (.zip, or the folder or file in it; they need the extra jax-checkpoints). A train state holds
    several sets of weights: "pMF-B-16-full:ema_1000" names one of them ("model" the trained weights), and
    "ema_1000" does where `source` is the state itself; by default it is the average that the published settings
    sample from. `aux_head` is as in the file unless False is asked for.

    Errors: `InputError` names what is missing, torn or misshapen, or lists what `weights` can be.
    """
    file, average = locate(str(source), weights)
    config, state = load_weights(file, average) if is_state(file) else _read(file)
    if aux_head is None:
        aux_head = any(name.startswith("final_layers.v") for name in state)
    model = create_model(config, impl=impl, aux_head=aux_head, device=device, dtype=dtype)
    wanted = model.state_dict()
    for name, value in wanted.items():
        require(name in state, f"source: {file} lacks the weight {name!r}")
        got = list(state[name].shape)
        require(got == list(value.shape), f"source: {name!r} must have shape {list(value.shape)}, got {got}")
    surplus = [n for n in state if n not in wanted and not n.startswith(("head_blocks.v", "final_layers.v"))]
    require(not surplus, f"source: {file} holds the unexpected weight {surplus[0] if surplus else ''!r}")
    model.load_state_dict({name: state[name] for name in wanted})
    return model


def _read(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and the state dict, under our names, of a checkpoint file."""
    metadata: dict[str, str] = {}
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as reader:
                metadata = reader.metadata() or {}
                state = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file can make its reader fail in any way
        raise InputError(f"source: {file} is not a readable checkpoint: {first_line(error)}") from error
    for wrapper in ("model", "state_dict"):  # as training scripts often save them
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if "pmf_config" in metadata:
        try:
            return ModelConfig(**json.loads(metadata["pmf_config"])), state
        except (TypeError, ValueError) as error:
            raise InputError(f"source: {file} holds no readable configuration: {first_line(error)}") from error
    tensors = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
    require(tensors, f"source: {file} is not a readable checkpoint: expected a state dict of tensors")
    return infer_config(state), convert_official_state_dict(state)
