"""The authors' PyTorch checkpoints: names and shapes of their weights, and conversion in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pmf.config import MODELS, PREFIX_TOKENS, ModelConfig
from pmf.errors import require
from pmf.fields import check_values
from pmf.reference import rope_tables
from pmf.reference.embedding import FEATURES

ROPE = "net.rope_freqs"
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that wrappers add wherever they wrap a module."""
OUTER = {"model", "ema", "ema_model", "model_ema", "network"}
"""Names of the whole network in the modules of training scripts, such as `pmf.parallel.LossModule`."""
BATCHED = ("conditioning.tokens", "patch_embed.positions")
"""Parameters that have a leading dimension of one in the published files."""
Shape = tuple[int, ...]


def _parameters(config: ModelConfig, heads: tuple[str, ...]) -> Iterator[tuple[str, str, Shape]]:
    """(our name, the published name, the published shape) of every parameter."""
    width, patch = config.hidden_size, config.patch_size
    for ours, theirs in PREFIX_TOKENS.items():
        yield f"conditioning.tokens.{ours}", f"net.{theirs}_tokens", (1, getattr(config, f"{theirs}_tokens"), width)
    yield "patch_embed.positions", "net.pos_embed", (1, config.sequence_length, width)
    first = (config.bottleneck, config.in_channels, patch, patch)
    yield from _affine("patch_embed.proj1", "net.x_embedder.proj1", first)
    yield from _affine("patch_embed.proj2", "net.x_embedder.proj2", (width, config.bottleneck, 1, 1))
    for ours, theirs in {"h": "h", "omega": "omega", "t_min": "cfg_t_start", "t_max": "cfg_t_end"}.items():
        for layer, index, inputs in (("fc1", 0, FEATURES), ("fc2", 2, width)):
            names = f"conditioning.embedders.{ours}.{layer}", f"net.{theirs}_embedder.mlp.{index}._flax_linear"
            yield from _affine(*names, (width, inputs))
    classes = "net.y_embedder.embedding_table._flax_embedding.weight"
    yield "conditioning.classes.weight", classes, (config.num_classes + 1, width)
    stacks = [("shared_blocks", "shared_blocks", config.depth - config.aux_head_depth)]
    stacks += [(f"head_blocks.{head}", f"{head}_heads", config.aux_head_depth) for head in heads]
    for ours, theirs, depth in stacks:
        for i in range(depth):
            for name, published, shape in _block_parameters(config):
                yield f"{ours}.{i}.{name}", f"net.{theirs}.{i}.{published}", shape
    for head in heads:
        yield f"final_layers.{head}.norm.weight", f"net.{head}_final_layer.norm.weight", (width,)
        names = f"final_layers.{head}.linear", f"net.{head}_final_layer.linear._flax_linear"
        yield from _affine(*names, (config.patch_values, width))


def _affine(ours: str, theirs: str, shape: Shape) -> Iterator[tuple[str, str, Shape]]:
    """Weight and bias."""
    yield f"{ours}.weight", f"{theirs}.weight", shape
    yield f"{ours}.bias", f"{theirs}.bias", shape[:1]


def _block_parameters(config: ModelConfig) -> Iterator[tuple[str, str, Shape]]:
    """The parameters of one block: vectors have the same name in both formats, Linear weights do not."""
    width, mlp, head = config.hidden_size, config.mlp_width, config.head_dim
    vectors = {"attn_scale": width, "mlp_scale": width, "norm1.weight": width, "norm2.weight": width}
    vectors |= {"attn.q_norm.weight": head, "attn.k_norm.weight": head}
    for name, size in vectors.items():
        yield name, name, (size,)
    matrices = {f"attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    matrices |= {"mlp.w1": (mlp, width), "mlp.w3": (mlp, width), "mlp.w2": (width, mlp)}
    for name, shape in matrices.items():
        yield f"{name}.weight", f"{name}._flax_linear.weight", shape


def published_names(config: ModelConfig, heads: tuple[str, ...]) -> dict[str, str]:
    """Our name -> the published name of every parameter."""
    return {ours: theirs for ours, theirs, _ in _parameters(config, heads)}


def _rope_freqs(config: ModelConfig) -> Tensor:
    """The complex buffer cos + i sin, which the published files also hold."""
    return torch.complex(*rope_tables(config.grid_size, config.head_dim))


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without what wrappers add to its names, in any nesting: DDP, FSDP, torch.compile, averages.

    Errors: `InputError` on values that are no tensors, and if two weights get the same name.
    """
    plain: dict[str, Tensor] = {}
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    require(named, lambda: f"state dict: expected tensors by name, got {type(state).__name__}")
    for name, value in state.items():
        require(isinstance(value, Tensor), f"{name}: expected a tensor, got {type(value).__name__}")
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        require(short not in plain, f"state dict: {name!r} names {short!r}, as another key does")
        plain[short] = value
    plain.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    outer = {name.partition(".")[0] for name in plain}
    whole = len(outer) == 1 and outer <= OUTER
    return {name.partition(".")[2]: value for name, value in plain.items()} if whole else plain


def _prefixed(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Prefix every key with "net.", as in the state dict of the authors' whole module, if none has the prefix."""
    state = unwrapped(state)
    bare = [key for key in state if not key.startswith("net.")]
    if not bare:
        return state
    require(
        len(bare) == len(state),
        f'state dict: expected the prefix "net." on every key or on none, got {bare[0]!r} without it',
    )
    return {f"net.{key}": value for key, value in state.items()}


def infer_config(state: Mapping[str, Tensor]) -> ModelConfig:
    """Infer the network's configuration from the shapes in a published state dict.

    noise_scale is not a weight: it comes from the preset with the same shapes, else it is 1.
    Errors: `InputError` if a key needed for this is missing, or if only some keys start with "net.".
    """
    state = _prefixed(state)

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        require(key in state, f"state dict: key {key!r} is missing, expected a published pMF checkpoint")
        got = tuple(state[key].shape)
        require(len(got) == ndim and all(got), f"state dict: {key!r} must have {ndim} dimensions, got {list(got)}")
        return got

    def depth(stack: str) -> int:
        found = [re.match(rf"net\.{stack}\.(\d+)\.", key) for key in state]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    counts: dict[str, Any] = {f"{name}_tokens": shape(f"net.{name}_tokens", 3)[1] for name in PREFIX_TOKENS.values()}
    bottleneck, channels, patch, _ = shape("net.x_embedder.proj1.weight", 4)
    _, length, width = shape("net.pos_embed", 3)
    head_depth = depth("u_heads")
    require(head_depth > 0, "state dict: key 'net.u_heads.0.attn_scale' is missing, expected a u head")
    read = ModelConfig(
        image_size=patch * math.isqrt(max(length - sum(counts.values()), 0)),
        patch_size=patch,
        hidden_size=width,
        depth=depth("shared_blocks") + head_depth,
        num_heads=width // shape("net.u_heads.0.attn.q_norm.weight", 1)[0],
        aux_head_depth=head_depth,
        num_classes=shape("net.y_embedder.embedding_table._flax_embedding.weight", 2)[0] - 1,
        in_channels=channels,
        bottleneck=bottleneck,
        **counts,
    )
    same = (c for c in MODELS.values() if replace(c, noise_scale=read.noise_scale) == read)
    return next(same, read)


def convert_official_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names; it strict-loads into `create_model(...)`.

    All keys must start with "net.", or none. Inference checkpoints (no v head) load with `aux_head=False`. The
    derived buffer `net.rope_freqs` is checked against our tables and dropped. Errors: `InputError` names the
    first key that is missing, unexpected or of wrong shape.
    """
    state = _prefixed(state)
    config = infer_config(state)
    heads = ("u", "v") if any(key.startswith("net.v_") for key in state) else ("u",)
    names = {}
    for ours, theirs, shape in _parameters(config, heads):
        _check_shape(state, theirs, shape)
        names[ours] = theirs
    _check_surplus(state, {*names.values(), ROPE})
    if ROPE in state:
        _check_rope(state[ROPE], _rope_freqs(config))
    return {ours: state[theirs][0] if ours.startswith(BATCHED) else state[theirs] for ours, theirs in names.items()}


def _check_shape(state: Mapping[str, Tensor], key: str, shape: Shape) -> None:
    require(key in state, f"state dict: key {key!r} is missing")
    got = list(state[key].shape)
    require(got == list(shape), f"state dict: {key!r} must have shape {list(shape)}, got {got}")
    floating = state[key].is_floating_point()
    require(floating, lambda: f"state dict: {key!r} must have floating values, got {state[key].dtype}")


def _check_surplus(state: Mapping[str, Tensor], known: Set[str]) -> None:
    surplus = sorted(set(state) - known)
    require(not surplus, lambda: f"state dict: unexpected key {surplus[0]!r}")


def _check_rope(got: Tensor, wanted: Tensor) -> None:
    require(
        got.shape == wanted.shape,
        f"state dict: {ROPE!r} must have shape {list(wanted.shape)}, got {list(got.shape)}",
    )
    if got.device.type != "meta":
        close = torch.allclose(got.to("cpu", wanted.dtype), wanted, atol=1e-4)
        require(close, f"state dict: {ROPE!r} holds other rotary angles than this network's")


def export_official_state_dict(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under the published names, with `net.rope_freqs`; the inverse of `convert_official_state_dict`.

    Errors: `InputError` on an adaln network (the published format has none), and on the first key that is missing,
    unexpected or of another shape than the configuration's.
    """
    check_values(ModelConfig, config=config)
    require(
        config.conditioning == "in_context",
        f'conditioning: the published format needs "in_context", got {config.conditioning!r}',
    )
    state = unwrapped(state)
    names = check_names(state, config)
    batched = {ours: state[ours][None] if ours.startswith(BATCHED) else state[ours] for ours in names}
    return {ROPE: _rope_freqs(config)} | {theirs: batched[ours] for ours, theirs in names.items()}


def check_names(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, str]:
    """Our name -> the published name of every weight of an in-context network's state dict, which may lack the v head.

    Errors: `InputError` on the first key that is missing, unexpected, or not of floating values of its shape.
    """
    heads = ("u", "v") if any(key.startswith(("final_layers.v", "head_blocks.v")) for key in state) else ("u",)
    names = {}
    for ours, theirs, shape in _parameters(config, heads):
        _check_shape(state, ours, shape[ours.startswith(BATCHED) :])
        names[ours] = theirs
    _check_surplus(state, names.keys())
    return names
