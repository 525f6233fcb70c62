"""Compile every shipped kernel configuration without a GPU and read the machine code.

Run as `python -m tests.kernels.static_checks [family ...]`, outside Triton's interpreter; prints one JSON line
per kernel and chip. The launchers run on meta tensors and their launches are recorded, so it compiles
what ships: the same arguments, specialised as Triton's own launcher does.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SIZES = {"digits": (64, 4, 176), "B": (768, 12, 2048), "L": (1024, 16, 2736), "H": (1280, 16, 3416)}
"""Width, heads, (padded) MLP width of pMF-digits and the published networks."""
DTYPES = {"digits": ["float16"], "B": ["bfloat16"], "L": ["bfloat16"], "H": ["bfloat16", "float32"]}
"""Dtypes of the matrix products; the stream is float32. float32 only for the widest, which needs most registers."""
BATCH, LENGTH, PREFIX = 64, 276, 20
CHIPS = {80: (108, 163), 86: (108, 99), 89: (108, 99), 90: (132, 227), 100: (148, 227), 120: (170, 99)}
"""Capability -> (multiprocessors, KB of shared memory per program): A100, A10 and RTX 30, L40 and RTX 40, H100, B200,
RTX 50. sm_86 and sm_89 get A100's number of multiprocessors, so that launches with equal tiles are equal."""
TYPES = {
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.int32": "i32",
    "torch.int64": "i64",
}


def _meta(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm_cases(size: str, stream, low):
    """The residual norm of a published block and of an adaLN block, and the first norm of a network."""
    from pmf.kernels import norm, norm_backward

    width = SIZES[size][0]
    x, y = _meta(BATCH, LENGTH, width, dtype=stream), _meta(BATCH, LENGTH, width, dtype=low)
    x_dot, y_dot = x[: BATCH // 2], y[: BATCH // 2]
    channel = _meta(width, dtype=torch.float32)
    sample = _meta(BATCH, 6 * width, dtype=low)[:, width : 2 * width]
    sample_dot = sample[: BATCH // 2]
    none = (None,) * 5
    published = (x, y, channel, channel, None, None)
    adaln = (x, y, sample, channel, sample, sample)
    first = (x, None, None, channel, None, None)
    options = (False, 1e-6, low)
    yield "forward", lambda: norm.norm_forward.function(*published, *none, *options)
    yield "dual", lambda: norm.norm_forward.function(*published, x_dot, y_dot, None, None, None, *options)
    yield (
        "dual adaln",
        lambda: norm.norm_forward.function(*adaln, x_dot, y_dot, *(sample_dot,) * 3, True, *options[1:]),
    )
    yield "dual alone", lambda: norm.norm_forward.function(*first, x_dot, *none[1:], *options)
    stats = _meta(BATCH, LENGTH, 1, dtype=torch.float32)
    needs = [True, True, False, False]
    backward = (y, x, x, y, channel, channel, None, None, stats, low, False, True, needs)
    for name, add, again in (("", False, False), (" again", False, True), (" of terms again", True, True)):
        run = functools.partial(norm_backward.norm_backward.function, *backward, add, again)
        yield f"backward{name}", run
    if size in ("B", "H"):
        alone = (y, None, x, None, None, channel, None, None, stats, None, False, False, [False, True, False, False])
        alone = (*alone, False, True)
        yield "forward alone", lambda: norm.norm_forward.function(*first, *none, *options)
        yield "backward alone", lambda: norm_backward.norm_backward.function(*alone)
    adaln_stats = _meta(BATCH, LENGTH, 2, dtype=torch.float32)
    backward_adaln = (y, x, x, y, sample, channel, sample, sample, adaln_stats, low, True, True, [True] * 4)
    for name, again in (("", False), (" of terms again", True)):
        run = functools.partial(norm_backward.norm_backward.function, *backward_adaln, again, again)
        yield f"backward adaln{name}", run
    if size in ("digits", "B", "H"):  # digits: several rows a tile
        yield from _token_cases(width, stream, low)


def _token_cases(width: int, stream, low):
    """Modulations per token, slices of wider rows, after a residual without gate's tangent and with it."""
    from pmf.kernels import norm, norm_backward

    x, y = _meta(BATCH, LENGTH, width, dtype=stream), _meta(BATCH, LENGTH, width, dtype=low)
    token = _meta(BATCH, LENGTH, 6 * width, dtype=low)[..., width : 2 * width]
    half, halves = BATCH // 2, (x[: BATCH // 2], y[: BATCH // 2])
    stats = _meta(BATCH, LENGTH, 2, dtype=torch.float32)
    options, inputs = (True, 1e-6, low), (x, y, token, None, token, token)
    dots = (*halves, *(token[:half],) * 3)
    yield "dual token", lambda: norm.norm_forward.function(*inputs, *dots, *options)
    arguments = (y, x, *inputs, stats, low, True, True, [True, False, True, True])
    for name, again in (("", False), (" of terms again", True)):
        yield f"backward token{name}", functools.partial(norm_backward.norm_backward.function, *arguments, again, again)


def wide_cases(size: str, stream, low):
    """Wide rows with modulations per token, per sample and of both kinds: what is prefetched may fill shared memory."""
    from pmf.kernels import norm_backward

    for width, kept in itertools.product((4096, 8192) if size == "H" else (), {stream, low}):
        yield from _token_cases(width, kept, low)
        x, y, token = (_meta(BATCH, LENGTH, width, dtype=dtype) for dtype in (kept, low, torch.float32))
        sample, stats = _meta(BATCH, width, dtype=torch.float32), _meta(BATCH, LENGTH, 2, dtype=torch.float32)
        for name, scale in (("sample", sample), ("both", token)):
            arguments = (y, x, x, y, sample, None, scale, sample, stats, low, True, True, [True, False, True, True])
            yield f"backward {name}", functools.partial(norm_backward.norm_backward.function, *arguments, True, True)


def pointwise_cases(size: str, stream, low):
    """SwiGLU's rows of the padded MLP width, GELU's of four times the network's width."""
    from pmf.kernels import pointwise

    width = SIZES[size][2]
    x, dy = _meta(BATCH, LENGTH, 2 * width, dtype=low), _meta(BATCH, LENGTH, width, dtype=low)
    yield "forward", lambda: pointwise.swiglu_forward.function(x, None)
    yield "dual", lambda: pointwise.swiglu_forward.function(x, x[: BATCH // 2])
    yield "backward", lambda: pointwise.swiglu_backward.function(dy, x, False)
    yield "backward again", lambda: pointwise.swiglu_backward.function(dy, x, True)
    for tanh in (False, True):
        y, name = _meta(BATCH, LENGTH, 4 * SIZES[size][0], dtype=low), "gelu tanh" if tanh else "gelu"
        yield f"forward {name}", lambda y=y, tanh=tanh: pointwise.gelu_forward.function(y, None, tanh)
        yield f"dual {name}", lambda y=y, tanh=tanh: pointwise.gelu_forward.function(y, y[: BATCH // 2], tanh)
        for again in (False, True):
            run = functools.partial(pointwise.gelu_backward.function, y, y, tanh, again)
            yield f"backward {name}{' again' if again else ''}", run


def attention_cases(size: str, stream, low):
    """Heads of 40, 64 and 128 (size B), of 80 (size H); in float32 those of 64, 80 and 128.

    Those of 64, 80 and 128 also causal, in groups of 4 with key lengths, and all of it.
    """
    from pmf.kernels import attention, registration

    wide = (80,) if low == torch.bfloat16 else (64, 80, 128)
    head_dims = {"digits": (), "B": (40, 48, 64, 96, 128), "L": (), "H": wide}[size]
    for head_dim in head_dims:
        heads = 16
        q, k, v = _meta(BATCH, LENGTH, 3, heads, head_dim, dtype=low).unbind(2)
        lse = _meta(BATCH, heads, LENGTH, dtype=torch.float32)
        yield (
            f"tangent D {head_dim}",
            lambda q=q, k=k, v=v, lse=lse: attention.attention_tangent.function(q, k, v, q, k, v, q, lse, 0.1),
        )
        if head_dim in (64, 80, 128):
            few, lengths = _meta(2, BATCH, LENGTH, heads // 4, head_dim, dtype=low), _meta(BATCH, dtype=torch.int32)
            for name, keys, options in (
                ("causal", (k, v), (None, True)),
                ("grouped lengths", few, (lengths, False)),
                ("grouped lengths causal", few, (lengths.long(), True)),
            ):

                def masked(q=q, keys=tuple(keys), lse=lse, options=options):
                    attention.attention_tangent.function(q, *keys, q, *keys, q, lse, 0.1, *options)

                yield f"tangent D {head_dim} {name}", masked
        if head_dim in (64, 80) and low == torch.bfloat16 and registration.chip(q.device).capability == 90:
            for tile in attention.HOPPER_TILES:

                def forced(q=q, k=k, v=v, lse=lse, tile=tile):
                    with attention.tangent_with(tile):
                        attention.attention_tangent.function(q, k, v, q, k, v, q, lse, 0.1)

                yield f"tangent D {head_dim} {tile}", forced


def rotary_cases(size: str, stream, low):
    """Packed q, k, v of a published block, and what other networks do with theirs."""
    width, heads, _ = SIZES[size]
    head_dim = width // heads
    qkv = _meta(BATCH, LENGTH, 3, heads, head_dim, dtype=low)
    weight = _meta(head_dim, dtype=torch.float32)
    table = _meta(LENGTH - PREFIX, head_dim // 2, dtype=torch.float32)
    wide = _meta(width, dtype=torch.float32)
    published = (weight, weight, None, None, table, table)
    forms = {"": (qkv, published, heads, "rms", False, False)}
    if size in ("B", "H"):
        each, grouped = (
            (_meta(BATCH, *table.shape, dtype=torch.float32),) * 2,
            qkv.flatten(2, 3)[:, :, : 3 * heads // 2],
        )
        forms |= {
            " layer half": (qkv, (weight,) * 4 + (table,) * 2, heads, "layer", False, True),
            " grouped": (grouped, published, heads // 4, "rms", False, False),
            " tables per sample": (qkv, (weight, weight, None, None, *each), heads, "rms", False, False),
            " across": (qkv, (wide, wide, None, None, table, table), heads, "rms", True, False),
        }
    for label, (x, inputs, kv_heads, *form) in forms.items():
        yield from _heads_cases(label, x, inputs, kv_heads, (PREFIX, 1e-6, *form))


def _heads_cases(label: str, x, inputs, kv_heads: int, options):
    """Value, value and tangent, and gradients."""
    from pmf.kernels import rotary

    heads = x.shape[3] if x.ndim == 5 else x.shape[2] - 2 * kv_heads
    dq, dk = (_meta(*x.shape[:2], n, x.shape[-1], dtype=x.dtype) for n in (heads, kv_heads))
    d = (dq, dk, dk) if kv_heads else (dq, None, None)
    needs = [p is not None for p in inputs[:4]]
    run, back = rotary.heads_forward.function, rotary.heads_backward.function
    yield f"forward{label}", lambda: run(x, None, *inputs, kv_heads, *options)
    yield f"dual{label}", lambda: run(x, x[: BATCH // 2], *inputs, kv_heads, *options)
    yield f"backward{label}", lambda: back(x, *inputs, *d, kv_heads, *options, needs)


def objective_cases(size: str, stream, low):
    """256 px and patches of 16 (B), 512 px and patches of 32 (H)."""
    from pmf.kernels import objective

    if size in ("digits", "L"):
        return
    side, patch = {"B": (256, 16), "H": (512, 32)}[size]
    net, image = _meta(BATCH, 256, 3 * patch**2, dtype=low), _meta(BATCH, 3, side, side, dtype=torch.float32)
    scalar, index = _meta(BATCH, dtype=torch.float32), _meta(BATCH, dtype=torch.int64)
    half = net[: BATCH // 2]
    inputs = (net, net, half, half, half, image, image, *(scalar,) * 3, index, 0.05, patch)
    yield "forward", lambda: objective.objective_forward.function(*inputs)
    yield "backward", lambda: objective.objective_backward.function(_meta(2, BATCH, dtype=torch.float32), *inputs)


def patch_cases(size: str, stream, low):
    """B with 256 px and patches of 16, H with 512 px and patches of 32."""
    from pmf.kernels import patch

    width, bottleneck = SIZES[size][0], {"digits": 32, "B": 128, "L": 128, "H": 256}[size]
    for side, p in {"digits": (), "B": ((256, 16),), "L": (), "H": ((512, 32),)}[size]:
        images = _meta(BATCH, 3, side, side, dtype=torch.float32)
        weight1, bias1 = _meta(bottleneck, 3, p, p, dtype=low), _meta(bottleneck, dtype=low)
        weight2, bias2 = _meta(width, bottleneck, 1, 1, dtype=low), _meta(width, dtype=low)
        positions, prefix = _meta(LENGTH, width, dtype=stream), _meta(BATCH, PREFIX, width, dtype=stream)
        hidden = _meta(BATCH, 256, bottleneck, dtype=low)
        weights, half = (weight1, bias1, weight2, bias2), BATCH // 2
        dual = (images, images[:half], *weights, positions, prefix, prefix[:half], low, True)
        tokens = _meta(BATCH, LENGTH, width, dtype=stream)
        gradients = (tokens, images, weight1, weight2, hidden, PREFIX, [True] * 5)
        yield f"dual {p}", lambda dual=dual: patch.patch_forward.function(*dual)
        yield f"backward {p}", lambda gradients=gradients: patch.patch_backward.function(*gradients)


FAMILIES = {
    "norm": norm_cases,
    "wide": wide_cases,
    "rotary": rotary_cases,
    "pointwise": pointwise_cases,
    "attention": attention_cases,
    "objective": objective_cases,
    "patch": patch_cases,
}


def recorded_launches(families):
    """(label, capability, kernel's module and name, arguments, options) of every shipped launch."""
    from pmf.kernels import registration

    launches = []
    registration.shapes_only = lambda x: False  # launch on meta tensors too
    for capability, (processors, kilobytes) in CHIPS.items():
        chip = registration.Chip(capability, processors, kilobytes << 10)
        registration.chip = lambda device, _chip=chip: _chip
        for family in families:
            for size in SIZES:
                for low in (getattr(torch, dtype) for dtype in DTYPES[size]):
                    stream = torch.float32
                    for case, run in FAMILIES[family](size, stream, low):
                        label = f"{family} {case} {size} {str(low).removeprefix('torch.')}"
                        calls = []
                        registration.launch = lambda *a, _calls=calls, **o: _calls.append((a, o))
                        run()
                        for (kernel, _, *arguments), options in calls:
                            name = (kernel.fn.__module__, kernel.fn.__name__)
                            launches.append((label, capability, name, _plain(arguments), options))
    return launches


def _plain(arguments):
    """Tensors as their dtype's name: enough to compile, and picklable."""

    def plain(a):
        if isinstance(a, tuple):
            parts = [plain(part) for part in a]
            return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
        return f"*{TYPES[str(a.dtype)]}" if isinstance(a, torch.Tensor) else a

    return [plain(a) for a in arguments]


def compile_one(launch) -> dict:
    """Registers, stack, shared memory and widths of global accesses of one launch's kernel."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    label, capability, (module, name), arguments, options = launch
    kernel = getattr(importlib.import_module(module), name)
    options = dict(options)
    compile_options = {k: options.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in options}
    signature, constants, attributes = {}, {}, {}

    def specialise(value, place: tuple, given=True):
        """The type of an argument; `place`: its index, and its indices in tuples."""
        if not given or value is None or (isinstance(value, int) and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, tuple):
            parts = [specialise(v, (*place, i)) for i, v in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, str) or (isinstance(value, int) and value % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(value, float):
            return "fp32"
        return value if isinstance(value, str) else "i32" if abs(value) < 2**31 else "i64"

    for i, parameter in enumerate(kernel.arg_names):
        given = i < len(arguments)
        value = arguments[i] if given else options[parameter]
        signature[parameter] = specialise(value, (i,), given)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compile_options)
    found = dict(label=label, capability=capability, kernel=name, **compile_options)
    found |= _read(compiled.asm["cubin"])
    # The machine code does not show memory that is allocated at launch.
    return found | dict(shared=max(found["shared"], compiled.metadata.shared))


def _read(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        command = [tool, "-res-usage", "-sass", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", code).group(1)) for key in ("REG", "STACK", "SHARED")}
    accesses = collections.Counter()
    for instruction, modifiers in re.findall(r"\b(LDG|STG|LDGSTS)\.E(\S*)", code):
        width = re.search(r"\.(128|64|U16|S16|U8)\b", modifiers)
        accesses[f"{instruction}.{width.group(1) if width else '32'}"] += 1
    return dict(
        registers=found["REG"],
        stack=found["STACK"],
        shared=found["SHARED"],
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        **{name: len(re.findall(rf"\b{name}\b", code)) for name in ("HMMA", "HGMMA", "UTCHMMA")},
        **dict(sorted(accesses.items())),
    )


def _as_compiled(launch) -> str:
    """A key that is equal for launches that compile to equal code.

    Triton allots shared memory by a chip's generation (sm_86 and sm_89 differ from sm_80 only in float8), so launches
    that sm_80 has too are not compiled again for them.
    """
    _, capability, *rest = launch
    return repr((capability // 10 if capability < 90 else capability, *rest))


def _worth_compiling(launch) -> bool:
    """For sm_120, only kernels with matrix products, which come close to its limit. The others launch as on sm_86.

    (Every configuration took as much shared memory on both, except the 1 KB that chips since sm_90 reserve.)
    """
    return launch[1] != 120 or "num_stages" in launch[4]


def main() -> None:
    """Compile on all cores, in separate processes; identical launches once."""
    families = sys.argv[1:] or list(FAMILIES)
    launches = [launch for launch in recorded_launches(families) if _worth_compiling(launch)]
    distinct = {_as_compiled(launch): launch for launch in reversed(launches)}
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        compiled = dict(zip(distinct, pool.map(compile_one, distinct.values()), strict=True))
    for launch, capability in dict.fromkeys((_as_compiled(launch), launch[1]) for launch in launches):
        print(json.dumps(compiled[launch] | dict(capability=capability)))


if __name__ == "__main__":
    main()
