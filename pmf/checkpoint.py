"""Networks on disk: one safetensors file with its configuration inside, written atomically."""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pmf.config import ModelConfig
from pmf.errors import InputError, require
from pmf.model import PMFDiT, create_model
from pmf.official import convert_official_state_dict, export_official_state_dict, infer_config

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

    Errors: `InputError` when the directory cannot be written; whatever `write` raises.
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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

    `weights` names the file of a directory or hub repository: "model" for the trained weights, "ema_500"
    and the like for an average; by default the run's own choice for sampling. Files are ours
    (.safetensors) or published state dicts (.safetensors, .pt, .pth, .bin). `aux_head` is as in the
    file unless False is asked for. Errors: `InputError` names what is missing, torn or misshapen.
    """
    file = _locate(str(source), weights)
    config, state = _read(file)
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


def _locate(source: str, weights: str | None) -> Path:
    """The checkpoint file that `source` and `weights` name."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        name = weights or _default_weights(path)
        file = path / f"{name}.safetensors"
        found = sorted(f.stem for f in path.glob("*.safetensors"))
        require(
            file.is_file(),
            f"source: {path} has no {file.name}, expected one of {found or 'any .safetensors'}",
        )
        return file
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not re.search(r"\.(safetensors|pt|pth|bin)$", source)
    require(
        bool(is_hub_id) and not path.parent.is_dir(),
        f"source: {source} does not exist, expected a run directory, a checkpoint file or a hub id",
    )
    return _download(source, weights)


def _default_weights(directory: Path) -> str:
    """What the run's configuration names for sampling, else the trained weights."""
    config = directory / "config.json"
    return json.loads(config.read_text()).get("sampling_weights", "model") if config.is_file() else "model"


def _download(hub_id: str, weights: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"source: {hub_id} is no local path; hub ids need pip install 'pixel-meanflow[hub]'") from None
    try:
        directory = snapshot_download(hub_id, allow_patterns=["*.safetensors", "config.json"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"source: {hub_id} is no local path and the hub did not serve it: {reason}") from error
    return _locate(directory, weights)


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
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"source: {file} is not a readable checkpoint: {reason}") from error
    if "pmf_config" in metadata:
        return ModelConfig(**json.loads(metadata["pmf_config"])), state
    require(isinstance(state, dict), f"source: {file} holds a {type(state).__name__}, expected a state dict")
    return infer_config(state), convert_official_state_dict(state)
