"""Whole training steps and one-step sampling: ours against what a script would otherwise do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import pmf
from pmf.benchmarks.baselines import flow_matching_draws, flow_matching_loss, joint_jvp_loss, two_pass_loss
from pmf.benchmarks.cases import BACKENDS, Case, Run
from pmf.benchmarks.jax_step import available, jax_step
from pmf.config import LOSSES, MODELS
from pmf.counting import row_operations
from pmf.memory import training_memory

STEP_TEST = "test_loss.py"
CAPTURED_TEST = {"captured": "test_cuda_graphs.py"}
"""What more must pass before a provider with that word in its name."""
SAMPLING_TEST = "test_sampling.py"


def _inputs(size: str, batch: int, device: torch.device) -> tuple[Tensor, Tensor, pmf.Draws]:
    """x, y and draws with the published laws."""
    shape = MODELS[size].image_shape
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *shape, device=device) * 2 - 1
    y = torch.randint(MODELS[size].num_classes, (batch,), generator=generator).to(device)
    return x, y, _draws(size, batch, shape, device)


def _draws(size: str, batch: int, shape: tuple[int, int, int], device: torch.device) -> pmf.Draws:
    """The draws that are measured; those that are counted have other images, but the same rows."""
    return pmf.sample_draws(batch, shape, LOSSES[size], torch.Generator().manual_seed(0), device)


_counted = functools.cache(row_operations)


def lean_loss(model, x, y, draws, config) -> Tensor:
    """The library's own loss."""
    return pmf.pmf_loss(model, x, y, draws, config).loss


def training_step(
    loss: Callable, size: str, batch: int, device: torch.device, compiled: bool = False, **options
) -> Run:
    """Forward and backward of one batch, under bfloat16 autocast on CUDA; gradients are dropped after."""
    model = pmf.create_model(size, device=device, **options)
    x, y, draws = _inputs(size, batch, device)
    if compiled and loss is lean_loss:
        model.compile_blocks()
    elif compiled:  # as a whole: around a compiled network, `torch.func.jvp` would run it uncompiled
        loss = torch.compile(loss, fullgraph=True)

    def run() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            value = loss(model, x, y, draws, LOSSES[size])
        value.backward()
        model.zero_grad()

    return run


def _as_drawn(draws: pmf.Draws) -> pmf.Draws:
    return draws


class CapturedRun:
    """A step by `pmf.CapturedStep`, on CUDA two graphs.

    A replay allocates nothing: its memory lies in the graphs' pool. So the peak is that of the first call, from
    before the warm-up to behind the capture.
    """

    peak_from = "warm-up and capture"

    def __init__(
        self, rows: Callable, size: str, batch: int, device: torch.device, compiled: bool = False, backend: str = ""
    ) -> None:
        """`rows`: makes the draws that are computed of those that were drawn. `backend`: attention's value by this."""
        self.backend = backend
        self.model = pmf.create_model(size, device=device)
        x, y, draws = _inputs(size, batch, device)
        self.inputs, self.device = (x, y, rows(draws)), device
        if compiled:
            self.model.compile_blocks()
        self._peak = self._allocated = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._allocated = torch.cuda.memory_allocated(device)
        self.step = pmf.CapturedStep(self.model, LOSSES[size])

    def __call__(self) -> None:
        """One step; gradients are dropped after."""
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")
        with autocast, pmf.ops.use_attention_backend(self.backend) if self.backend else contextlib.nullcontext():
            self.step(*self.inputs)
        self.model.zero_grad()
        if self._peak is None and self._allocated is not None:
            self._peak = torch.cuda.max_memory_allocated(self.device) - self._allocated

    def peak_bytes(self) -> int | None:
        """Of the allocator, above the weights and the inputs; None without a GPU."""
        return self._peak


def step_providers(size: str, batch: int, device: torch.device) -> dict[str, Callable[[], Run]]:
    """The steps that are compared; flow matching first, the measure of memory; compilers last."""

    def plain(loss: Callable, compiled: bool = False, **options) -> Callable[[], Run]:
        return functools.partial(training_step, loss, size, batch, device, compiled, **options)

    def captured(rows: Callable = _as_drawn, **options) -> Callable[[], Run]:
        return functools.partial(CapturedRun, rows, size, batch, device, **options)

    reference = dict(impl="reference")
    providers = {
        "flow matching": plain(flow_matching_loss),
        "lean": plain(lean_loss),
        "lean, captured": captured(),
        "flow matching, captured": captured(flow_matching_draws),
        "joint jvp": plain(joint_jvp_loss, **reference),
        "jvp without gradient, second forward": plain(two_pass_loss, **reference),
        "lean, checkpointed": plain(lean_loss, checkpointing="block"),
    }
    if device.type == "cuda":
        providers |= {f"lean, captured, {name}": captured(backend=name) for name in BACKENDS}
    providers |= {
        "lean, compiled": plain(lean_loss, True),
        "lean, captured, compiled": captured(compiled=True),
        "joint jvp, compiled": plain(joint_jvp_loss, True, **reference),
        "jvp without gradient, second forward, compiled": plain(two_pass_loss, True, **reference),
    }
    if available():
        providers["JAX"] = functools.partial(_jax_provider, size, batch, device)
    return providers


def _jax_provider(size: str, batch: int, device: torch.device) -> Run:
    """The JAX step on the same parameters and draws, handed over through the CPU."""
    x, y, draws = _inputs(size, batch, torch.device("cpu"))
    return jax_step(lambda: pmf.create_model(size, device="cpu"), x, y, draws, LOSSES[size], device)


COUNTED = {"lean": "none", "lean, checkpointed": "block"}
"""Steps whose memory is counted, and their checkpointing."""


def counted_bytes(size: str, batch: int, provider: str, device: torch.device) -> dict[str, int]:
    """What a step keeps for backward, low-precision copies of the weights with it: its peak is at least that.

    Nothing for steps that are not counted.
    """
    if provider not in COUNTED:
        return {}
    impl = "triton" if device.type == "cuda" else "reference"
    memory = training_memory(size, COUNTED[provider], impl, device=device.type)
    return {"counted_bytes": memory.copies + batch * memory.per_row}


def group_of(provider: str) -> str:
    """backends: ours on one named attention; compiled: what a compiler may take minutes for; else eager."""
    if provider.rpartition(", ")[2] in BACKENDS:
        return "backends"
    return "compiled" if provider.endswith("compiled") or provider == "JAX" else "eager"


def step_name(size: str, batch: int) -> str:
    """The name of a step's case."""
    return f"step {size.removeprefix('pMF-')} batch {batch}"


def step_case(size: str, batch: int) -> Case:
    """The pMF step of one preset. Operations are those of the lean plan, whatever a provider of this loss spends."""
    draws = _draws(size, batch, (1, 1, 1), torch.device("cpu"))
    counted = _counted(MODELS[size])
    providers = functools.partial(step_providers, size, batch)
    floor = counted.flow_matching(draws)
    other = {"flow matching": floor, "flow matching, captured": floor}
    return Case(step_name(size, batch), 0, counted.lean(draws), providers, STEP_TEST, other, CAPTURED_TEST)


def sampling_case(size: str, batch: int) -> Case:
    """One-step sampling of one preset: the u head alone, bfloat16.

    Eager is `pmf.generate`; the others are `pmf.Sampler`, a CUDA graph on CUDA, as it is and on compiled blocks.
    """

    def sampler(device: torch.device, graph: bool, compiled: bool) -> Run:
        model = pmf.create_model(size, aux_head=False, device=device, dtype=torch.bfloat16)
        noise = torch.randn(batch, *model.config.image_shape, device=device)
        labels = torch.zeros(batch, dtype=torch.int64)
        if compiled:
            model.compile_blocks()
        if graph:
            sample = pmf.Sampler(model, batch)
            return lambda: sample(labels, noise=noise)
        return lambda: pmf.generate(model, labels, noise=noise, batch_size=batch)

    def providers(device: torch.device) -> dict[str, Callable[[], Run]]:
        ways = {"eager": (False, False), "sampler": (True, False), "sampler, compiled": (True, True)}
        return {name: functools.partial(sampler, device, *way) for name, way in ways.items()}

    # The guidance pass runs as many blocks as sampling does: the shared ones and one head.
    operations = batch * _counted(MODELS[size]).guidance
    return Case(f"sampling {size.removeprefix('pMF-')} batch {batch}", 0, operations, providers, SAMPLING_TEST)
