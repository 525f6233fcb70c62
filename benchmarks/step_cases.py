"""Training steps, their largest batches, and one-step sampling: ours against the alternatives."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import pmf
from pmf.benchmarks.cases import Case
from pmf.benchmarks.op_cases import BACKENDS
from pmf.config import LOSSES, MODELS, LossConfig
from pmf.counting import row_operations
from pmf.errors import require
from pmf.memory import TrainingMemory, joint_pass, main_pass, measured_largest_batch, optimizer_bytes, training_memory
from pmf.model import Checkpointing
from pmf.reference.jvp import two_pass_jvp
from pmf.reference.loss import pmf_loss as joint_jvp_loss
from pmf.timing import Providers, Record, Run

CPU = torch.device("cpu")
JOINT = "joint jvp"
CHECKPOINTED: dict[str, Checkpointing] = {
    "lean": "none",
    "lean, light": "light",
    "lean, checkpointed": "block",
    JOINT: "none",
}
"""The steps whose memory is counted, and their activation checkpointing."""
BUDGETS_GB = (40, 80, 141)
_counted = cache(row_operations)
two_pass_loss = partial(joint_jvp_loss, differentiate=two_pass_jvp)
"""The pMF loss by a jvp without gradient and a second, recorded forward pass."""


def lean_loss(model: pmf.PMFDiT, x: Tensor, y: Tensor, draws: pmf.Draws, config: LossConfig) -> Tensor:
    """The library's own loss."""
    return pmf.pmf_loss(model, x, y, draws, config).loss


def step_draws(size: str, batch: int, shape: tuple[int, int, int] = (1, 1, 1), device: torch.device = CPU) -> pmf.Draws:
    """The draws of a step by the published laws; they choose the same rows for images of any shape."""
    return pmf.sample_draws(batch, shape, LOSSES[size], torch.Generator().manual_seed(0), device)


def step_inputs(size: str, batch: int, device: torch.device) -> tuple[Tensor, Tensor, pmf.Draws]:
    """x, y and draws."""
    shape = MODELS[size].image_shape
    y = torch.randint(MODELS[size].num_classes, (batch,), generator=torch.Generator().manual_seed(0))
    return torch.rand(batch, *shape, device=device) * 2 - 1, y.to(device), step_draws(size, batch, shape, device)


def training_step(
    loss: Callable[..., Tensor],
    size: str,
    batch: int,
    device: torch.device,
    *,
    flow_matching: bool = False,
    compiled: bool = False,
    captured: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Run:
    """Forward and backward of one batch, under bfloat16 autocast on CUDA; the gradients are dropped.

    `flow_matching`: plain flow matching of the same network, the lower bound on time and memory.
    `captured`: by `pmf.CapturedStep` (two graphs on CUDA). `backend`: of attention's value; None is the default.
    `options`: for the network.
    """
    model = pmf.create_model(size, device=device, **options)
    x, y, draws = step_inputs(size, batch, device)
    draws = draws.flow_matching() if flow_matching else draws
    if compiled and loss is lean_loss:
        model.compile_blocks()
    elif compiled:  # the whole loss: `torch.func.jvp` of a compiled network would run it uncompiled
        loss = torch.compile(loss, fullgraph=True)
    step = pmf.CapturedStep(model, LOSSES[size]) if captured else None

    def run() -> None:
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
        with autocast, pmf.ops.use_attention_backend(backend):
            output = step(x, y, draws) if step else loss(model, x, y, draws, LOSSES[size])
        if isinstance(output, Tensor):
            output.backward()
        model.zero_grad()

    return run


def jax_step(size: str, batch: int, device: torch.device) -> Run:
    """The step in JAX with the same parameters and draws, in bfloat16 on a GPU."""
    from jax import default_backend

    from pmf.benchmarks.jax_step import JaxStep

    on_gpu = device.type == "cuda"
    require(not on_gpu or default_backend() == "gpu", "jax: installed without support for this GPU")
    model, inputs = pmf.create_model(size, device=CPU), step_inputs(size, batch, CPU)
    return JaxStep(model, inputs, LOSSES[size], "bfloat16" if on_gpu else "float32")


def step_providers(size: str, batch: int, device: torch.device) -> Providers:
    """The steps to compare: flow matching first, as the measure of memory; compiled ones last."""

    def step(loss: Callable[..., Tensor], **options) -> partial[Run]:
        return partial(training_step, loss, size, batch, device, **options)

    joint, two_pass = (partial(step, loss, impl="reference") for loss in (joint_jvp_loss, two_pass_loss))
    backends = BACKENDS if device.type == "cuda" else ()
    providers: dict[str, Callable[[], Run]] = {
        "flow matching": step(lean_loss, flow_matching=True),
        "lean": step(lean_loss),
        "lean, captured": step(lean_loss, captured=True),
        "flow matching, captured": step(lean_loss, flow_matching=True, captured=True),
        JOINT: joint(),
        "jvp without gradient, second forward": two_pass(),
        "lean, light": step(lean_loss, checkpointing="light"),
        "lean, checkpointed": step(lean_loss, checkpointing="block"),
        **{f"lean, captured, {name}": step(lean_loss, captured=True, backend=name) for name in backends},
        "lean, compiled": step(lean_loss, compiled=True),
        "lean, captured, compiled": step(lean_loss, captured=True, compiled=True),
        "joint jvp, compiled": joint(compiled=True),
        "jvp without gradient, second forward, compiled": two_pass(compiled=True),
    }
    if importlib.util.find_spec("jax"):
        providers["JAX"] = partial(jax_step, size, batch, device)
    return providers


def group_of(provider: str) -> str:
    """backends: ours on a named attention backend; compiled: may compile for minutes; else eager."""
    if provider.rpartition(", ")[2] in BACKENDS:
        return "backends"
    return "compiled" if provider.endswith("compiled") or provider == "JAX" else "eager"


def step_case(size: str, batch: int, device: torch.device) -> Case:
    """The pMF step of one preset. Every provider of this loss is rated by the operations of the lean plan."""
    draws, counted = step_draws(size, batch), _counted(MODELS[size])
    operations = {"": counted.lean(draws), "flow matching": counted.flow_matching(draws)}
    tests = {"": "pmf/test_loss.py", "captured": "pmf/test_cuda_graphs.py"}
    name = f"step {size.removeprefix('pMF-')} batch {batch}"
    return Case(name, step_providers(size, batch, device), tests, operations=operations)


def counted_on(step: str, device: torch.device) -> str:
    """The implementation to count a step on: Triton where it runs (a GPU, or TRITON_INTERPRET=1)."""
    triton = step != JOINT and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    return "triton" if triton else "reference"


@cache
def counted_memory(size: str, step: str, device: torch.device) -> TrainingMemory:
    """The memory of a step in `CHECKPOINTED`."""
    forward, impl = joint_pass if step == JOINT else main_pass, counted_on(step, device)
    return training_memory(size, CHECKPOINTED[step], impl, device=device.type, forward=forward)


def step_beside_optimizer(size: str, step: str, device: torch.device, batch: int) -> None:
    """Run a step beside an allocation as large as optimizer and averages, as `training_memory` counts it."""
    kept = torch.empty(optimizer_bytes(pmf.create_model(size, device="meta")), dtype=torch.int8, device=device)
    step_providers(size, batch, device)[step]()()
    del kept


def largest_batch(size: str, step: str, budget_gb: int, device: torch.device) -> Record:
    """The computed largest batch; on a GPU with enough memory also the measured one."""
    memory = counted_memory(size, step, device)
    computed, measured = memory.largest_batch(budget_gb * 1e9), None
    # A card of 80 GB has a little less, or more, than 80e9 bytes.
    if device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory / 1e9 > 0.95 * budget_gb:
        run = partial(step_beside_optimizer, size, step, device)
        measured = measured_largest_batch(run, budget_gb * 1e9, computed * 3 // 4, device)
    found = {"status": "measured", "computed_batch": computed, "measured_batch": measured}
    counted = {"impl": counted_on(step, device), "bytes_per_image": memory.saved_per_row}
    return {"step": step, "budget_gb": budget_gb, **counted, **found}


def largest_batch_case(size: str, batch: int, device: torch.device) -> Case:
    """The largest batches of a preset: a provider, whose run returns a record, per step and budget."""
    asked = itertools.product(CHECKPOINTED, BUDGETS_GB)
    found = {f"{step}, {gb} GB": partial(partial, largest_batch, size, step, gb, device) for step, gb in asked}
    return Case(f"largest batch {size.removeprefix('pMF-')}", found, {})


def sampler(size: str, batch: int, device: torch.device, graph: bool = False, compiled: bool = False) -> Run:
    """One-step sampling in bfloat16 with only the u head: `pmf.generate`, or `pmf.Sampler` (a graph on CUDA)."""
    model = pmf.create_model(size, aux_head=False, device=device, dtype=torch.bfloat16)
    noise = torch.randn(batch, *model.config.image_shape, device=device)
    labels = torch.zeros(batch, dtype=torch.int64)
    if compiled:
        model.compile_blocks()
    if graph:
        return partial(pmf.Sampler(model, batch), labels, noise=noise)
    return partial(pmf.generate, model, labels, noise=noise, batch_size=batch)


def sampling_case(size: str, batch: int, device: torch.device) -> Case:
    """Sampling of one preset: eager, as a graph, as a graph of compiled blocks."""
    eager = partial(sampler, size, batch, device)
    graph = partial(eager, graph=True)
    providers = {"eager": eager, "sampler": graph, "sampler, compiled": partial(graph, compiled=True)}
    # Sampling runs the same blocks as the guidance pass: the shared ones and one head.
    operations = {"": batch * _counted(MODELS[size]).guidance}
    name = f"sampling {size.removeprefix('pMF-')} batch {batch}"
    return Case(name, providers, {"": "pmf/test_sampling.py"}, operations=operations)
