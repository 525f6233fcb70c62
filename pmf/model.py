"""PMFDiT: the transformer that predicts the clean image, with a head for u and one for v."""

from __future__ import annotations

import contextlib
import functools
import math
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from pmf import dispatch, ops
from pmf.autocast import product_dtype
from pmf.blocks import Block, FinalLayer
from pmf.compiling import CompiledBlocks
from pmf.config import PREFIX_TOKENS, ModelConfig, model_config
from pmf.errors import InputError, checked_device, extent, readable, require
from pmf.fields import check_values
from pmf.layers import PatchEmbed, Residual, Rope, ScalarEmbedders, keep_less
from pmf.packing import Held, held_weights, joined_weights
from pmf.pair import ABSENT, Dual, tail, tangent_rows, total
from pmf.recompute import checkpoint_values
from pmf.tangents.carriers import as_dual, carrier_of, moves
from pmf.weights import matching_weights, read_weights

HEADS = ("u", "v")
Checkpointing = Literal["none", "light", "block"]
CHECKPOINTING: tuple[Checkpointing, ...] = get_args(Checkpointing)
Stream = Literal["float32", "bfloat16"]
STREAMS: tuple[Stream, ...] = get_args(Stream)
SCALARS = ("h", "omega", "t_min", "t_max")


class Conditioning(nn.Module):
    """Embeds the class and the scalars as prefix tokens (in_context) or as one vector (adaln).

    The network sees h = t - r, the guidance scale as 1 - 1 / omega, the interval [t_min, t_max] and
    the class y. Only h has a tangent.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.in_context = config.conditioning == "in_context"
        self.classes = nn.Embedding(config.num_classes + 1, width)
        nn.init.normal_(self.classes.weight, std=1 / math.sqrt(width))
        self.embedders = ScalarEmbedders(SCALARS, width)
        if self.in_context:
            self.tokens = nn.ParameterDict(
                {
                    name: torch.randn(getattr(config, f"{source}_tokens"), width) / math.sqrt(width)
                    for name, source in PREFIX_TOKENS.items()
                }
            )

    def forward_dual(self, h: Dual, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor) -> Dual:
        """The prefix [B, P, C] (in_context), or silu of the summed embeddings [B, C] (adaln)."""
        scalars = self.embedders.forward_dual(h, Dual(1 - 1 / omega), Dual(t_min), Dual(t_max))
        embedded = dict(zip(SCALARS, scalars, strict=True))
        embedded["y"] = Dual(self.classes(y))
        if not self.in_context:
            vector = Dual(functools.reduce(torch.add, (e.value for e in embedded.values())), embedded["h"].dot)
            return ops.silu(vector)
        groups = [self.tokens[name] + embedded[name].value[:, None] for name in PREFIX_TOKENS]
        prefix = torch.cat(groups, 1)
        return Dual(prefix, self._prefix_dot(embedded["h"].dot, prefix))

    def _prefix_dot(self, h_dot: Tensor | None, prefix: Tensor) -> Tensor | None:
        """The tangent of the prefix: `h_dot`, that of h's embedding, on the time tokens at its end, else zero."""
        if h_dot is None:
            return None
        prefix_dot = torch.zeros_like(tail(prefix, h_dot.shape[0]))
        prefix_dot[:, -self.tokens["h"].shape[0] :] = h_dot[:, None]
        return prefix_dot


class PMFDiT(nn.Module):
    """The pMF network (arXiv 2601.22158): maps images z_t and conditions to the velocities u and v.

    It predicts the clean image, net, in pixels; the velocities are (z - net) / clip(t, t_clip, 1).
    Build one with `create_model`. Inputs of `forward`: z [B, c, H, W]; t in [0, 1], h = t - r in
    [0, t], omega >= 1, t_min and t_max in [0, 1], all float [B]; y int64 [B], where num_classes is the
    null class.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        impl: str | None = None,
        aux_head: bool = True,
        checkpointing: Checkpointing = "none",
        stream: Stream = "float32",
    ) -> None:
        super().__init__()
        require(stream in STREAMS, f"stream: expected one of {STREAMS}, got {stream!r}")
        self.config, self.impl, self.stream = config, impl, stream
        shared = config.depth - config.aux_head_depth
        self.conditioning = Conditioning(config)
        self.patch_embed = PatchEmbed(
            config.image_size, config.patch_size, config.in_channels, config.hidden_size, bottleneck=config.bottleneck,
            positions=True, prefix_length=config.prefix_length, impl=impl,
        )  # fmt: skip
        self.shared_blocks = nn.ModuleList(Block(config, impl) for _ in range(shared))
        self.head_blocks = nn.ModuleDict()
        self.final_layers = nn.ModuleDict()
        for head in HEADS if aux_head else ("u",):
            self.head_blocks[head] = nn.ModuleList(Block(config, impl) for _ in range(config.aux_head_depth))
            self.final_layers[head] = FinalLayer(config, impl)
        cos, sin = ops.rope_tables(config.grid_size, config.head_dim)
        self._compiled: CompiledBlocks | None = None
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.checkpointing = checkpointing

    def _apply(self, fn, recurse=True):
        """Keep the rotary tables in float32 whatever the network's dtype is."""
        result = super()._apply(fn, recurse)
        tables = ops.rope_tables(self.config.grid_size, self.config.head_dim, device=self.rope_cos.device)
        self.rope_cos, self.rope_sin = tables
        return result

    @property
    def checkpointing(self) -> Checkpointing:
        """What backward makes again; see `create_model`."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, kind: Checkpointing) -> None:
        require(kind in CHECKPOINTING, f"checkpointing: expected one of {CHECKPOINTING}, got {kind!r}")
        self._checkpointing: Checkpointing = kind
        keep_less(self, kind == "light")

    @property
    def heads(self) -> tuple[str, ...]:
        """("u", "v"), or ("u",) without the auxiliary head."""
        return tuple(self.final_layers)

    def predict_dual(
        self, z: Dual, h: Dual, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor, *, heads=HEADS, tangents=("u",)
    ) -> dict[str, Dual]:
        """The heads' clean-image predictions as tokens [B, N, p * p * c], with the tangents of those in `tangents`.

        Runs the shared blocks and the requested heads. The loss never needs v's tangent.
        """
        _check_heads("heads", heads, self.heads)
        _check_heads("tangents", tangents, HEADS)
        condition = self.conditioning.forward_dual(h, omega, t_min, t_max, y)
        prefix, vector = (condition, ABSENT) if self.conditioning.in_context else (ABSENT, condition)
        stream = Residual(self._begun(self.patch_embed.forward_dual(z, prefix)))
        for block in self.shared_blocks:
            stream = self._block(cast(Block, block), stream, vector)
        return {head: self._head(head, stream, vector, head in tangents) for head in heads}

    def _begun(self, x: Dual) -> Dual:
        """The stream's first value in the stream's dtype, which every later value and tangent takes from it.

        A bfloat16 stream saves memory for backward and needs bfloat16 products. Passes that record nothing with wider
        products, such as float32 samples of a network in training, keep the stream in the network's own dtype.
        """
        if self.stream == "float32":
            return x
        products = product_dtype(x.value)
        if products == torch.bfloat16:
            return x.map(lambda part: part.to(torch.bfloat16))
        unrecorded = not torch.is_grad_enabled()
        require(unrecorded, lambda: f"stream: bfloat16 needs autocast to bfloat16 to record, got {products}")
        return x

    @property
    def _rope(self) -> Rope:
        return Rope(self.rope_cos, self.rope_sin)

    def _block(self, block: Block, stream: Residual, vector: Dual) -> Residual:
        """Run one block; with "block" checkpointing, backward recomputes its values, never its tangents."""
        compiled = None if torch.compiler.is_compiling() else self._compiled
        run = block.forward_residual if compiled is None else functools.partial(compiled, block)
        if self.checkpointing != "block" or not torch.is_grad_enabled():
            return run(stream, self._rope, vector)
        return checkpoint_values(
            run, stream, self._rope, vector, preserve_rng_state=False, compiled=compiled is not None
        )

    def compile_blocks(self, **options: Any) -> None:
        """Compile the blocks as a few graphs that all blocks share; pass `options` to `torch.compile`.

        Passes that record for backward and passes that do not (guidance, sampling) are compiled separately. Recorded
        ones are compiled for the first batch size, and for any size once a second one occurs; the others are compiled
        for any size from the start. A lean step needs five graphs, whatever its draws: with and without pending
        branch, with and without tangents. Size 1 is compiled separately. Call it again to change the options.
        """
        self._compiled = CompiledBlocks(**options)

    def _head(self, head: str, stream: Residual, vector: Dual, tangent: bool) -> Dual:
        if not tangent:
            branch, gate = (None if part is None else Dual(part.value) for part in stream[1:])
            stream, vector = Residual(Dual(stream.x.value), branch, gate), Dual(vector.value)
        for block in self.head_blocks[head].children():
            stream = self._block(cast(Block, block), stream, vector)
        return cast(FinalLayer, self.final_layers[head]).forward_residual(stream, vector)

    def forward(
        self, z: Tensor, t: Tensor, h: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """u and v [B, c, H, W]; v is None without the auxiliary head. Arguments: see the class.

        Inside `pmf.jvp`, z, t and h may move, and so do u and v. `forward_dual` computes no tangent of v.
        """
        if moves((z, t, h)):
            return self._moving(as_dual(z), as_dual(t), as_dual(h), omega, t_min, t_max, y)
        return self.forward_dual(z, t, h, omega, t_min, t_max, y)[:2]

    def _moving(
        self, z: Dual, t: Dual, h: Dual, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` inside `pmf.jvp`."""
        self.check_inputs(z.value, t.value, h.value, omega, t_min, t_max, y)
        nets = self.predict_dual(z, h, omega, t_min, t_max, y, heads=self.heads, tangents=self.heads)
        u, *v = [carrier_of(self._velocity(z, t, net.map(self.to_images))) for net in nets.values()]
        return u, v[0] if v else None

    def forward_dual(
        self,
        z: Tensor,
        t: Tensor,
        h: Tensor,
        omega: Tensor,
        t_min: Tensor,
        t_max: Tensor,
        y: Tensor,
        z_dot: Tensor | None = None,
        t_dot: Tensor | None = None,
        h_dot: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """u, v and u_dot, the derivative of u along (z_dot, t_dot, h_dot).

        Tangents [B_dot, ...] cover the last B_dot rows; None is zero. u_dot [B_dot, c, H, W] never
        carries a gradient, and is None if there are no tangents.
        """
        self.check_inputs(z, t, h, omega, t_min, t_max, y)
        dots = dict(z_dot=z_dot, t_dot=t_dot, h_dot=h_dot)
        _check_tensors(**{name: dot for name, dot in dots.items() if dot is not None})
        rows = tangent_rows(dots.values()) or 0
        for (name, dot), primal in zip(dots.items(), (z, t, h), strict=True):
            if dot is not None:
                wanted = [rows, *primal.shape[1:]]
                require(
                    list(dot.shape) == wanted and rows <= primal.shape[0],
                    f"forward_dual: {name} must have shape {wanted} with at most {primal.shape[0]} rows, "
                    f"got {list(dot.shape)}",
                )
        nets = self.predict_dual(Dual(z, z_dot), Dual(h, h_dot), omega, t_min, t_max, y, heads=self.heads)
        images = {head: net.map(self.to_images) for head, net in nets.items()}
        u = self._velocity(Dual(z, z_dot), Dual(t, t_dot), images["u"])
        v = self._velocity(Dual(z), Dual(t), images["v"]).value if "v" in images else None
        return u.value, v, u.dot

    def held_weights(self, weights: list[Held] | None = None) -> contextlib.AbstractContextManager[None]:
        """Join the blocks' weights once for all passes inside the context, or use those of `joined_weights`."""
        return held_weights(self, self.rope_cos.device.type, weights)

    def joined_weights(self) -> list[Held]:
        """The blocks' weights, joined for fewer, larger products."""
        return joined_weights(self, self.rope_cos.device.type)

    def to_images(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, p * p * c] as images [B, c, H, W]."""
        return ops.unpatchify(tokens, self.config.patch_size, self.config.in_channels)

    def _velocity(self, z: Dual, t: Dual, net: Dual) -> Dual:
        """(z - net) / c with c = clip(t, t_clip, 1), and (z_dot - net_dot - u c_dot) / c, the quotient rule."""
        t_clip = self.config.t_clip
        c = t.value.clamp(t_clip, 1)[:, None, None, None]
        u = (z.value - net.value) / c
        with torch.no_grad():
            terms = [z.dot, None if net.dot is None else -net.dot]
            if t.dot is not None:
                rows = len(t.dot)
                c_dot = torch.where(tail(t.value, rows) > t_clip, t.dot, 0)[:, None, None, None]
                terms.append(-tail(u, rows) * c_dot)
            numerator = total(*terms)
            return Dual(u, None if numerator is None else numerator / tail(c, len(numerator)))

    def check_inputs(
        self, z: Tensor, t: Tensor, h: Tensor, omega: Tensor, t_min: Tensor, t_max: Tensor, y: Tensor
    ) -> None:
        """Check shapes always, and values if they are `readable`: on the CPU, in code that is not being compiled."""
        scalars = dict(t=t, h=h, omega=omega, t_min=t_min, t_max=t_max)
        _check_tensors(z=z, **scalars, y=y)
        shape = list(self.config.image_shape)
        require(
            z.ndim == 4 and list(z.shape[1:]) == shape,
            lambda: f"z: expected shape [B, {', '.join(map(str, shape))}], got {list(z.shape)}",
        )
        for name, value in (*scalars.items(), ("y", y)):
            require(
                list(value.shape) == [z.shape[0]],
                f"{name}: expected shape [{z.shape[0]}], got {list(value.shape)}",
            )
        require(y.dtype == torch.int64, f"y: expected int64 class labels, got {y.dtype}")
        if not readable(z, y, *scalars.values()):
            return
        classes = self.config.num_classes
        require(bool(torch.isfinite(z).all()), "z: expected finite images, got NaN or infinity")
        require(
            bool(((y >= 0) & (y <= classes)).all()),
            lambda: f"y: expected labels in [0, {classes}], got {extent(y)}",
        )
        require(bool(((t >= 0) & (t <= 1)).all()), "t: expected times in [0, 1]")
        require(bool(((h >= 0) & (h <= t)).all()), "h: expected h = t - r in [0, t]")
        require(bool((omega >= 1).all()), lambda: f"omega: expected guidance scales >= 1, got {omega.min():g}")
        for name, value in (("t_min", t_min), ("t_max", t_max)):
            require(bool(((value >= 0) & (value <= 1)).all()), f"{name}: expected times in [0, 1]")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        weights: str | None = None,
        aux_head: bool | None = None,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PMFDiT:
        """Load a network from a run directory, a checkpoint file, or a Hugging Face hub id ("owner/name").

        `weights` names a file of a directory or hub repository, with or without its suffix: "ema_500" for an average
        of a run, "pMF-B-16" (or "pMF-B/16") for pMF-B-16.pt. From a hub repository, no other weights are downloaded.
        The default is the run's own choice for sampling, else model.safetensors, else the only file.

        Files are ours (.safetensors), published state dicts (.safetensors, .pt, .pth, .bin), or train states of the
        authors' JAX code (.zip, or the folder or file in it; they need the extra jax-checkpoints). A train state
        holds several sets of weights: "pMF-B-16-full:ema_1000" names one of them ("model": the trained weights); if
        `source` is the state itself, "ema_1000" is enough. The default is the average that the published settings
        sample from. `aux_head` defaults to whether the file has a v head; for the rest, see `create_model`.

        Errors: `InputError` names what is missing, corrupt or of wrong shape, or lists the choices for `weights`.
        """
        file, config, state = read_weights(source, weights)
        if aux_head is None:
            aux_head = any(name.startswith("final_layers.v") for name in state)
        model = create_model(config, aux_head=aux_head, impl=impl, device=device, dtype=dtype)
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        model.load_state_dict(matching_weights(file, state, wanted))
        return model


def _check_heads(name: str, given: Any, known: tuple[str, ...]) -> None:
    """Errors: `InputError` on heads that are not there."""
    if not (hasattr(given, "__iter__") and all(head in known for head in given)):
        raise InputError(f"{name}: expected some of {known}, got {given!r:.80}")


def _check_tensors(**given: Any) -> None:
    """Errors: `InputError` on an argument that is no tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(value).__name__}")


def create_model(
    name_or_config: str | ModelConfig,
    *,
    impl: str | None = None,
    aux_head: bool = True,
    checkpointing: Checkpointing = "none",
    stream: Stream = "float32",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PMFDiT:
    """Create a freshly initialised network from a preset's name in `pmf.MODELS` or from a `ModelConfig`.

    `impl` chooses the ops' implementation (see `pmf.ops`; None reads PMF_IMPL, default "auto").
    `aux_head=False` leaves out the v head, which only training needs. `checkpointing="light"` makes again in
    backward what kernels can make from what is kept anyway; "block" keeps only the blocks' inputs and recomputes the
    rest. `stream="bfloat16"` rounds the residual stream and its tangent to bfloat16 in passes with bfloat16 products;
    "float32" keeps them in the network's own dtype, also under autocast.
    Errors: an unknown preset, impl, checkpointing or stream; a bfloat16 stream with a dtype other than float32 or
    bfloat16.
    """
    config = model_config(name_or_config)
    dispatch.checked_impl(impl)
    check_values(bool, aux_head=aux_head)
    floating = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    require(floating, lambda: f"dtype: expected a floating dtype such as torch.bfloat16, got {dtype!r}")
    roundable = stream == "float32" or dtype in (None, torch.float32, torch.bfloat16)
    require(roundable, lambda: f"stream: bfloat16 needs dtype float32 or bfloat16, got {dtype}")
    with torch.get_default_device() if device is None else checked_device(device):
        model = PMFDiT(config, impl=impl, aux_head=aux_head, checkpointing=checkpointing, stream=stream)
    return model if dtype is None else model.to(dtype)
