"""Whole training steps and one-step sampling: ours against what a script would otherwise do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

import pmf
from pmf.benchmarks.baselines import flow_matching_draws, flow_matching_loss, joint_jvp_loss, two_pass_loss
from pmf.benchmarks.cases import Case, Providers, Run
from pmf.benchmarks.jax_step import available, jax_step
from pmf.benchmarks.op_cases import BACKENDS
from pmf.config import LOSSES, MODELS
from pmf.counting import row_operations
from pmf.memory import training_memory

CPU = torch.device("cpu")
COUNTED: dict[str, Literal["none", "block"]] = {"lean": "none", "lean, checkpointed": "block"}
"""Steps whose memory is counted, and their checkpointing."""
_counted = cache(row_operations)


def step_draws(size: str, batch: int, shape: tuple[int, int, int] = (1, 1, 1), device: torch.device = CPU) -> pmf.Draws:
    """The draws of a step, with the published laws; for images of another shape they name the same rows."""
    return pmf.sample_draws(batch, shape, LOSSES[size], torch.Generator().manual_seed(0), device)


def step_inputs(size: str, batch: int, device: torch.device) -> tuple[Tensor, Tensor, pmf.Draws]:
    """x, y and draws."""
    shape = MODELS[size].image_shape
    y = torch.randint(MODELS[size].num_classes, (batch,), generator=torch.Generator().manual_seed(0))
    return torch.rand(batch, *shape, device=device) * 2 - 1, y.to(device), step_draws(size, batch, shape, device)


def lean_loss(model, x, y, draws, config) -> Tensor:
    """The library's own loss."""
    return pmf.pmf_loss(model, x, y, draws, config).loss


def training_step(
    loss: Callable[..., Tensor],
    size: str,
    batch: int,
    device: torch.device,
    *,
    compiled: bool = False,
    captured: bool = False,
    backend: str | None = None,
    impl: str | None = None,
    checkpointing: Literal["none", "block"] = "none",
) -> Run:
    """Forward and backward of one batch, under bfloat16 autocast on CUDA; the gradients are dropped.

    `captured`: by `pmf.CapturedStep`, on CUDA two graphs. `backend`: computes attention's value; None: the usual.
    """
    model = pmf.create_model(size, device=device, impl=impl, checkpointing=checkpointing)
    x, y, draws = step_inputs(size, batch, device)
    if captured and loss is flow_matching_loss:
        draws = flow_matching_draws(draws)
    if compiled and loss is lean_loss:
        model.compile_blocks()
    elif compiled:  # as a whole: around a compiled network, `torch.func.jvp` would run it uncompiled
        loss = torch.compile(loss, fullgraph=True)
    step = pmf.CapturedStep(model, LOSSES[size]) if captured else None

    def run() -> None:
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
        with autocast, pmf.ops.use_attention_backend(backend):
            value = None if step else loss(model, x, y, draws, LOSSES[size])
            if step:
                step(x, y, draws)
        if value is not None:
            value.backward()
        model.zero_grad()

    return run


def jax_rival(size: str, batch: int, device: torch.device) -> Run:
    """The JAX step on the same parameters and draws, handed over through the CPU."""
    return jax_step(partial(pmf.create_model, size, device=CPU), *step_inputs(size, batch, CPU), LOSSES[size], device)


def step_providers(size: str, batch: int, device: torch.device) -> Providers:
    """The steps that are compared; flow matching first, the measure of memory; compilers last."""

    def step(loss: Callable[..., Tensor], **options) -> partial[Run]:
        return partial(training_step, loss, size, batch, device, **options)

    joint, two_pass = step(joint_jvp_loss, impl="reference"), step(two_pass_loss, impl="reference")
    backends = BACKENDS if device.type == "cuda" else ()
    providers: dict[str, Callable[[], Run]] = {
        "flow matching": step(flow_matching_loss),
        "lean": step(lean_loss),
        "lean, captured": step(lean_loss, captured=True),
        "flow matching, captured": step(flow_matching_loss, captured=True),
        "joint jvp": joint,
        "jvp without gradient, second forward": two_pass,
        "lean, checkpointed": step(lean_loss, checkpointing="block"),
        **{f"lean, captured, {name}": step(lean_loss, captured=True, backend=name) for name in backends},
        "lean, compiled": step(lean_loss, compiled=True),
        "lean, captured, compiled": step(lean_loss, captured=True, compiled=True),
        "joint jvp, compiled": partial(joint, compiled=True),
        "jvp without gradient, second forward, compiled": partial(two_pass, compiled=True),
    }
    return providers | ({"JAX": partial(jax_rival, size, batch, device)} if available() else {})


def group_of(provider: str) -> str:
    """backends: ours on one named attention; compiled: what a compiler may take minutes for; else eager."""
    if provider.rpartition(", ")[2] in BACKENDS:
        return "backends"
    return "compiled" if provider.endswith("compiled") or provider == "JAX" else "eager"


def counted_bytes(size: str, batch: int, provider: str, device: torch.device) -> int:
    """What a step in `COUNTED` keeps for backward and as low-precision weights: a lower bound of its peak."""
    impl = "triton" if device.type == "cuda" else "reference"
    memory = training_memory(size, COUNTED[provider], impl, device=device.type)
    return memory.copies + batch * memory.per_row


def step_case(size: str, batch: int, device: torch.device) -> Case:
    """The pMF step of one preset. Operations are those of the lean plan, whatever a provider of this loss spends."""
    draws, counted = step_draws(size, batch), _counted(MODELS[size])
    operations = {"": counted.lean(draws), "flow matching": counted.flow_matching(draws)}
    tests = {"": "pmf/test_loss.py", "captured": "pmf/test_cuda_graphs.py"}
    name = f"step {size.removeprefix('pMF-')} batch {batch}"
    return Case(name, step_providers(size, batch, device), tests, operations=operations)


def sampler(size: str, batch: int, device: torch.device, graph: bool = False, compiled: bool = False) -> Run:
    """One-step sampling, bfloat16, the u head alone: `pmf.generate`, or `pmf.Sampler`, on CUDA a graph."""
    model = pmf.create_model(size, aux_head=False, device=device, dtype=torch.bfloat16)
    noise = torch.randn(batch, *model.config.image_shape, device=device)
    labels = torch.zeros(batch, dtype=torch.int64)
    if compiled:
        model.compile_blocks()
    if graph:
        return partial(pmf.Sampler(model, batch), labels, noise=noise)
    return partial(pmf.generate, model, labels, noise=noise, batch_size=batch)


def sampling_case(size: str, batch: int, device: torch.device) -> Case:
    """Sampling of one preset: eager, as a graph, and as a graph of compiled blocks."""
    eager = partial(sampler, size, batch, device)
    graph = partial(eager, graph=True)
    providers = {"eager": eager, "sampler": graph, "sampler, compiled": partial(graph, compiled=True)}
    # The guidance pass runs as many blocks as sampling does: the shared ones and one head.
    operations = {"": batch * _counted(MODELS[size]).guidance}
    name = f"sampling {size.removeprefix('pMF-')} batch {batch}"
    return Case(name, providers, {"": "pmf/test_sampling.py"}, operations=operations)
