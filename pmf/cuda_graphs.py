"""A training step as CUDA graphs: the host launches two graphs, the forward and the backward of `pmf_loss`."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pmf.autocast import autocast_dtype
from pmf.config import LossConfig
from pmf.draws import Draws
from pmf.errors import check_network, require
from pmf.fields import check_values
from pmf.loss import LossOutput, PerceptualFunction, perceptual_rows, squared_errors
from pmf.step_plan import PlannedStep, plan_step

if TYPE_CHECKING:
    from pmf.model import PMFDiT

INPUTS = (
    *("x", "y", "z", "t", "h", "omega", "t_min", "t_max", "inside_omega"),
    *("guidance", "null_index", "null_rows", "dropped"),
)
"""The fields of a `PlannedStep` that the network and the objective read."""


@dataclass(frozen=True)
class _Outputs:
    """The results of the forward half."""

    loss: Tensor
    """Without perceptual terms."""
    terms: dict[str, Tensor]
    net_u: Tensor
    """The u head's tokens, which the perceptual terms read."""


@dataclass(frozen=True)
class _Halves:
    """Forward and backward for steps of one size."""

    forward: Callable[..., _Outputs]
    backward: Callable[[_Outputs, Tensor | None], None]
    """Takes the forward half's outputs and the gradient of the perceptual terms with respect to net_u."""


class CapturedStep:
    """`pmf_loss(model, ...).loss.backward()` without launch overhead: on CUDA, each half is one CUDA graph.

    A step of pMF-B/16 launches some thousand kernels, and Python issues them more slowly than an H100 runs them. This
    class captures them once per step size and replays them. The size of a step is its number of rows, of rows with a
    tangent and of padded null-class rows. The graphs share their memory. Other devices run the code without graphs.

        step = pmf.CapturedStep(model, loss_config)
        with torch.autocast("cuda", torch.bfloat16):
            out = step(x, y, draws)  # gradients are added to .grad, as backward() does

    Each call uses the autocast state it is called in. Weights may change in place between calls; all gradients are
    views of one fixed buffer. Perceptual terms, whose number of rows varies, run uncaptured between the two halves.
    Other threads may sample from the network meanwhile, but not train it: a capture replaces its parameters by aliases.
    On several GPUs each process captures its own steps. `all_reduce_gradients` replaces DDP; the weights must be equal
    at first.
    Errors: `InputError` as in `pmf_loss`, on sharded weights (FSDP), on a call during another, and if the model's
    parameters have been replaced since construction.
    """

    def __init__(self, model: PMFDiT, loss_config: LossConfig, *, scale: float = 1.0) -> None:
        """`scale` multiplies the gradients (not the loss): pass 1 / n to average over n batches, of all processes."""
        check_network(model)
        check_values(float, scale=scale)
        check_values(LossConfig, loss_config=loss_config)
        self.model, self.config, self.scale = model, loss_config, scale
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        require(bool(self._parameters), "model: expected parameters to train, got none that requires a gradient")
        whole = not any(hasattr(p, "to_local") for p in self._parameters)
        require(whole, "model: expected whole parameters, got sharded ones (FSDP); use pmf_loss there")
        self.device = self._parameters[0].device
        self._places = self._parameter_places()
        self._gradients = _Gradients(self._parameters)
        self._turn = threading.Lock()
        self._halves: dict[tuple, _Halves] = {}
        self._buffers: dict[tuple, Tensor] = {}
        self._graphs = _Graphs(self.device) if self.device.type == "cuda" else None

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        draws: Draws,
        perceptual: PerceptualFunction | None = None,
    ) -> LossOutput:
        """Add the gradients to `.grad`; return the loss and its terms, detached. Arguments: see `pmf_loss`."""
        require(torch.is_grad_enabled(), "CapturedStep: expected recorded gradients, got a call under torch.no_grad")
        require(self._turn.acquire(blocking=False), "CapturedStep: expected one call at a time, got two")
        try:
            return self._step(x, y, draws, perceptual)
        finally:
            self._turn.release()

    def all_reduce_gradients(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the `.grad`s of all ranks of the group (None: all ranks), in one all-reduce of their buffer.

        Call it on every rank after the last batch of a step, before anything reads the gradients.
        """
        self._gradients.adopt()
        dist.all_reduce(self._gradients.buffer, group=group)

    def _step(self, x: Tensor, y: Tensor, draws: Draws, perceptual: PerceptualFunction | None) -> LossOutput:
        step = plan_step(self.model, x, y, draws, self.config)
        message = "model: its parameters were replaced, expected those the step was built on"
        require(self._parameter_places() == self._places, message)
        self._gradients.adopt()
        for name in INPUTS:
            value = getattr(step, name)
            self._buffer(name, value).copy_(value)
        halves = self._halves_of(step, perceptual is not None)
        outputs = halves.forward()
        loss = outputs.loss.detach().clone()
        terms = {name: term.clone() for name, term in outputs.terms.items()}
        dnet_u = None
        if perceptual is not None:
            more, distances, dnet_u = self._perceptual(perceptual, step, outputs.net_u)
            loss, terms = loss + more, terms | distances
        halves.backward(outputs, dnet_u)
        return LossOutput(loss, terms)

    def _perceptual(
        self, perceptual: PerceptualFunction, step: PlannedStep, net_u: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The perceptual terms' part of the loss, their mean distances, and their scaled gradient in net_u."""
        net_u = net_u.detach().requires_grad_()
        rows, terms = perceptual_rows(perceptual, self.model, step, net_u, self.config)
        loss = rows.mean()
        if not loss.requires_grad:  # no row or no term had a distance
            return loss, terms, torch.zeros_like(net_u)
        (gradient,) = torch.autograd.grad(loss * self.scale, net_u)
        return loss.detach(), terms, gradient

    def _parameter_places(self) -> list[int]:
        return [p.data_ptr() for p in self._parameters]

    def _halves_of(self, step: PlannedStep, perceptual: bool) -> _Halves:
        """The halves for steps of this size, captured on first use."""
        dtype = autocast_dtype(self.device.type)
        dtypes = [getattr(step, name).dtype for name in INPUTS]
        key = (len(step.x), step.tangent_rows, len(step.null_rows), *dtypes, dtype, perceptual)
        if key not in self._halves:
            buffers: dict[str, Any] = {name: self._buffer(name, getattr(step, name)) for name in INPUTS}
            static = replace(step, **buffers)
            halves = _Halves(functools.partial(self._forward, static, dtype), self._backward)
            self._halves[key] = halves if self._graphs is None else self._graphs.captured(halves, perceptual)
        return self._halves[key]

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """The fixed buffer for an input of that shape and dtype, shared by steps of all sizes."""
        key = (name, like.shape, like.dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(like)
        return self._buffers[key]

    def _forward(self, step: PlannedStep, dtype: torch.dtype | None, accumulate: bool = True) -> _Outputs:
        with self._gradients.collected(self.model, accumulate), _own_autocast(self.device.type, dtype):
            errors = squared_errors(self.model, step, self.config)
            return _Outputs(errors.rows.mean(), errors.terms, errors.net_u)

    def _backward(self, outputs: _Outputs, dnet_u: Tensor | None) -> None:
        ends, gradients = [outputs.loss], [torch.full_like(outputs.loss, self.scale)]
        if dnet_u is not None:
            ends, gradients = [*ends, outputs.net_u], [*gradients, dnet_u]
        torch.autograd.backward(ends, gradients)


class _Graphs:
    """Captures steps of several sizes in one shared memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool, self.stream = device, torch.cuda.MemPool(), torch.cuda.Stream(device)

    def captured(self, halves: _Halves, perceptual: bool) -> _Halves:
        """Capture both halves as CUDA graphs."""
        with torch.cuda.device(self.device):
            self._warm_up(halves, perceptual)
            return self._capture(halves, perceptual)

    def _warm_up(self, halves: _Halves, perceptual: bool) -> None:
        """Run both halves once so that compilers and libraries initialise; discard the gradients.

        Use the graphs' stream and pool, so that the graphs reuse the memory: PyTorch caches it per stream and pool.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            outputs = halves.forward(accumulate=False)
            halves.backward(outputs, torch.zeros_like(outputs.net_u) if perceptual else None)
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.empty_cache()  # the backward thread allocates outside the pool

    def _capture(self, halves: _Halves, perceptual: bool) -> _Halves:
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool: Any = self.pool.id
        # thread_local: other threads, such as a loader's pinning thread, may call CUDA during the capture.
        capture = functools.partial(torch.cuda.graph, pool=pool, stream=self.stream, capture_error_mode="thread_local")
        with capture(first):
            outputs = halves.forward()
        buffer = torch.zeros_like(outputs.net_u) if perceptual else None
        with capture(second):
            halves.backward(outputs, buffer)
        left = replace(outputs, loss=outputs.loss.detach(), net_u=outputs.net_u.detach())

        def forward() -> _Outputs:
            first.replay()
            return left

        def backward(_: _Outputs, dnet_u: Tensor | None) -> None:
            if buffer is not None and dnet_u is not None:
                buffer.copy_(dnet_u)
            second.replay()

        return _Halves(forward, backward)


class _Gradients:
    """One buffer for the gradients of all parameters, at fixed addresses as CUDA graphs require."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        dtypes = {p.dtype for p in parameters}
        require(len(dtypes) == 1, f"model: expected parameters of one dtype, got {sorted(map(str, dtypes))}")
        self.buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=dtypes.pop(), device=parameters[0].device)
        parts = self.buffer.split([p.numel() for p in parameters])
        self.places = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def adopt(self) -> None:
        """Make every `.grad` a view of the buffer, keeping its value; None counts as zero."""
        fresh = all(p.grad is None for p in self.parameters)
        if fresh:
            self.buffer.zero_()
        for p, place in zip(self.parameters, self.places, strict=True):
            if p.grad is None and not fresh:
                place.zero_()
            elif p.grad is not None and p.grad is not place:
                place.copy_(p.grad)
            p.grad = place

    @contextlib.contextmanager
    def collected(self, model: nn.Module, accumulate: bool) -> Iterator[None]:
        """Inside the context, replace the parameters by aliases: the same memory, but separate autograd leaves.

        With `accumulate`, backward adds to the buffer's views on the stream that is current inside the context. For
        the parameters themselves, autograd would add on the stream of any earlier step whose loss is still alive;
        that cannot be captured.
        """
        leaves = {p: nn.Parameter(p.detach()) for p in self.parameters}
        for leaf, place in zip(leaves.values(), self.places, strict=True):
            leaf.grad = place if accumulate else None
        homes = [(m, name, p) for m in model.modules() for name, p in m.named_parameters(recurse=False) if p in leaves]
        try:
            for module, name, p in homes:
                setattr(module, name, leaves[p])
            yield
        finally:
            for module, name, p in homes:
                setattr(module, name, p)


@contextlib.contextmanager
def _own_autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast with an empty cast cache: a graph must cast the weights itself, so that replays see their new values."""
    if dtype is None:
        yield
        return
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device_type, dtype):
            yield
    finally:
        torch.clear_autocast_cache()
