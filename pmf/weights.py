"""Weights on disk: one safetensors file with the network's configuration inside; published files are read too."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pmf.atomic_files import write_atomically
from pmf.config import PREFIX_TOKENS, ModelConfig
from pmf.errors import InputError, check_path, first_line, require
from pmf.fields import check_values, from_json
from pmf.hub import SUFFIXES, locate
from pmf.jax_files import is_state
from pmf.jax_states import load_weights
from pmf.published_weights import check_names, convert_official_state_dict, infer_config, unwrapped
from pmf.sizes import check_declared

SETS = ("model", "state_dict", "model_state_dict", "ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")
"""Names under which training scripts save state dicts."""


def save_model(path: str | Path, config: ModelConfig, state: Mapping[str, Tensor], **metadata: object) -> None:
    """Write a state dict with its configuration (and JSON metadata) as one safetensors file, atomically.

    Prefixes of DDP and torch.compile are left out of the names. Errors: `InputError` if `path` ends as
    a file of another kind or cannot be written, and if the weights are not those of the configuration, with which they
    could not be read (of adaln networks, sizes are compared); an earlier file stays, and no partial one is left behind.
    """
    check_values(ModelConfig, config=config)
    check_path("path", path)
    require(_is_json(metadata), lambda: f"metadata: expected values of JSON, got {metadata!r:.200}")
    plain = unwrapped(state)
    info = {"pmf_config": json.dumps(asdict(config)), "pmf_metadata": json.dumps(metadata)}
    good = Path(path).suffix in ("", SUFFIXES[0])  # by which `from_pretrained` knows the kind of a file
    require(good, lambda: f"path: expected a name that ends in .safetensors, got {path}")
    if config.conditioning == "in_context":
        check_names(plain, config)
    else:
        _check_sizes("state dict", config, plain)
    for name, value in plain.items():
        require(value.is_floating_point(), f"state dict: {name!r} must have floating values, got {value.dtype}")
        require(value.device.type != "meta", f"state dict: {name!r} has no values, expected it on another device")
    tensors = {name: value.detach().cpu().contiguous() for name, value in plain.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=info))


def _is_json(value: object) -> bool:
    try:
        return isinstance(json.dumps(value, allow_nan=False), str)
    except (TypeError, ValueError, RecursionError):
        return False


def read_metadata(file: Path) -> dict[str, Any]:
    """The metadata that `save_model` wrote into a file; empty for a file of another kind."""
    try:
        with safe_open(file, "pt") as reader:
            found = json.loads((reader.metadata() or {}).get("pmf_metadata", "{}"))
    except Exception:  # of a file that is none of ours, anything
        return {}
    return found if isinstance(found, dict) else {}


def read_weights(source: str | Path, weights: str | None = None) -> tuple[Path, ModelConfig, dict[str, Tensor]]:
    """The file that `source` and `weights` name, its configuration, and its state dict under our names.

    Arguments and errors: see `PMFDiT.from_pretrained`.
    """
    file, part = locate(str(source), weights)
    return file, *(load_weights(file, part) if is_state(file) else _read(file, part))


def matching_weights(file: Path, state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The weights of `state` that match `wanted` by name and shape; a v head that is not wanted is left out.

    Errors: `InputError` on a weight that is missing, of another shape or not of floating values, or unknown.
    """
    for name, shape in wanted.items():
        _check_weight(f"source: {file}", state, name, list(shape))
    surplus = [n for n in state if n not in wanted and not n.startswith(("head_blocks.v", "final_layers.v"))]
    require(not surplus, f"source: {file} holds the unexpected weight {surplus[0] if surplus else ''!r}")
    return {name: state[name] for name in wanted}


def _check_weight(what: str, state: Mapping[str, Tensor], name: str, shape: list[int]) -> None:
    require(name in state, f"{what} lacks the weight {name!r}")
    got, dtype = list(state[name].shape), state[name].dtype
    require(got == shape, f"{what}: {name!r} must have shape {shape}, got {got}")
    require(dtype.is_floating_point, f"{what}: {name!r} must have floating values, got {dtype}")


def _read(file: Path, part: str | None) -> tuple[ModelConfig, dict[str, Tensor]]:
    metadata, content = _content(file)
    state = unwrapped(_state_of(file, content, part))
    if "pmf_config" not in metadata:
        try:
            return infer_config(state), convert_official_state_dict(state)
        except InputError as error:
            raise InputError(f"source: {file}: {error}") from error
    try:
        config = from_json(ModelConfig, json.loads(metadata["pmf_config"]))
    except (InputError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"source: {file} holds no readable configuration: {first_line(error)}") from error
    _check_sizes(f"source: {file}", config, state)
    return config, state


def _check_sizes(what: str, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Compare the sizes that a configuration declares with the weights beside it, before a network is built of them."""
    width, patch = config.hidden_size, config.patch_size
    _check_weight(what, state, "patch_embed.positions", [config.sequence_length, width])
    _check_weight(what, state, "patch_embed.proj1.weight", [config.bottleneck, config.in_channels, patch, patch])
    _check_weight(what, state, "conditioning.classes.weight", [config.num_classes + 1, width])
    for ours, theirs in PREFIX_TOKENS.items() if config.conditioning == "in_context" else ():
        _check_weight(what, state, f"conditioning.tokens.{ours}", [getattr(config, f"{theirs}_tokens"), width])
    drawn = any(name.startswith("final_layers.u.") for name in state)
    require(drawn, f"{what} has no u head, which draws the images")
    shared = config.depth - config.aux_head_depth
    for stack, depth in (("shared_blocks", shared), ("head_blocks.u", config.aux_head_depth)):
        matches = (re.match(rf"{stack}\.(\d+)\.", name) for name in state)
        got = len({match[1] for match in matches if match})
        require(got == depth, f"{what}: expected weights of {depth} blocks in {stack}, got {got}")
    values, least = sum(value.numel() for value in state.values()), config.depth * 4 * width**2
    require(values >= least, f"{what}: expected a network of at least {least} values, got {values}")


def _state_of(file: Path, content: Any, part: str | None) -> Mapping[str, Tensor]:
    """The state dict in a file's content: the set of that name, the only one, or the content itself."""
    sets = [name for name in content if name in SETS and isinstance(content[name], dict)] if _is_dict(content) else []
    if part is not None:
        held = f"holds {', '.join(sets)}" if sets else "holds one network"
        require(part in sets, f"weights: {file} {held}, got {part!r} of it")
    require(
        part is not None or len(sets) < 2,
        f"weights: {file} holds several networks, expected one of {', '.join(sets)}",
    )
    if sets:
        inner = next(name for name in sets if part in (None, name))
        return _state_of(file, content[inner], None)
    tensors = _is_dict(content) and all(isinstance(value, Tensor) for value in content.values())
    require(tensors, f"source: {file} is not a readable checkpoint: expected a state dict of tensors")
    for name, value in content.items():
        # A small file can declare any shape by repeating values (strides of zero), or without values.
        real = value.layout == torch.strided and value.device.type == "cpu"
        real = real and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        require(real, f"source: {file} does not hold the values of {name!r}")
    return content


def _is_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(name, str) for name in content)


def _content(file: Path) -> tuple[dict[str, str], Any]:
    """The metadata of a checkpoint file, and its contents."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as reader:
                return reader.metadata() or {}, {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                declared = sum(entry.file_size for entry in archive.infolist())
            check_declared("it", declared, file.stat().st_size)
        return {}, torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        objects = "global" in str(error).lower() or "class" in str(error)
        reason = f"expected {'tensors alone, not Python objects' if objects else 'a file of torch.save'}"
        raise InputError(f"source: {file} is not a readable checkpoint: {reason}") from error
    except Exception as error:  # reading a corrupt file can raise anything, an index without a word about it
        worded = isinstance(error, OSError | RuntimeError | InputError | MemoryError) or file.suffix == SUFFIXES[0]
        reason = first_line(error) if worded else "expected a file of torch.save"
        raise InputError(f"source: {file} is not a readable checkpoint: {reason}") from error


def weights_digest(module: Any) -> str:
    """Digest of all weights and buffers of a network, 32 hexadecimal digits."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]
