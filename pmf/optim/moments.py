"""Common to Muon and Adam: running means of gradients with bias correction, on this rank's part of each parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pmf.errors import InputError, first_line, require
from pmf.private import foreach_add_, foreach_copy_, foreach_mul
from pmf.sharded import batched, distributed, divided, full, local, shard

State = dict[str, Tensor]
"""The optimizer state of one parameter."""


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Call `closure`, which recomputes loss and gradients, and return the loss; None without one. See `torch.optim`."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def require_replicated(parameters: Sequence[Tensor], shard_over: DeviceMesh | None) -> None:
    """Raise `InputError` unless the state of these parameters can be sharded over this mesh, if there is one."""
    if shard_over is not None:
        dims = shard_over.ndim
        require(dims == 1, f"shard_over: expected a mesh of one dimension, got {dims}")
        plain = not any(isinstance(p, DTensor) for p in parameters)
        require(plain, "shard_over: expected replicated parameters, got sharded ones, whose state is sharded anyway")


class MomentOptimizer(torch.optim.Optimizer):
    """An optimizer whose state may be sharded over a mesh, and that checks each group of parameters it is given."""

    moments: tuple[str, ...]
    """Names of a parameter's state that is shaped like it."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], defaults: dict[str, Any], shard_over: DeviceMesh | None
    ) -> None:
        self.shard_over = shard_over
        super().__init__(parameters, defaults)

    def __getstate__(self) -> dict[str, object]:
        """The state for copies and pickles; PyTorch's own omits the mesh."""
        return {**super().__getstate__(), "shard_over": self.shard_over}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of any sharding; see `place_state`.

        Errors: `InputError` on a state without this optimizer's options, counts and moments, as of another optimizer,
        and on values that are out of range or of other shapes; the former state stays then.
        """
        before = self.state, self.param_groups
        try:
            super().load_state_dict(state_dict)
            for group in self.param_groups:
                self._check_loaded(group)
        except BaseException as error:
            self.state, self.param_groups = before
            if isinstance(error, (KeyError, TypeError, AttributeError)):  # on what is no state dict of this optimizer
                found = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
                raise InputError(f"state_dict: expected one of {type(self).__name__}, {found}") from error
            raise
        place_state(self.state, self.shard_over)

    def _check_loaded(self, group: dict[str, Any]) -> None:
        own = f"state_dict: expected one of {type(self).__name__}"
        self.check_group(group)
        for p in group["params"]:
            state = self.state.get(p, {})
            shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
            wanted = {"step": torch.Size(), **dict.fromkeys(self.moments, p.shape)} if state else {}
            fits = shapes == wanted and (not state or state["step"] >= 0)
            got = {name: None if shape is None else list(shape) for name, shape in shapes.items()}
            require(fits, f"{own} and a parameter {list(p.shape)}, got {got}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group of parameters with its options. Errors: `InputError`; then it is not taken."""
        super().add_param_group(param_group)
        try:
            require_replicated(self.param_groups[-1]["params"], self.shard_over)
            self.check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise `InputError` unless the optimizer can train these parameters with these options."""
        raise NotImplementedError


def initialise_state(state: State, p: Tensor, names: Sequence[str], shard_over: DeviceMesh | None) -> None:
    """Initialise an empty state with zero moments of these names, sharded over the mesh if any, and no steps counted.

    The count is on the CPU, so that reading it never waits for a GPU, and always in float32: a default dtype of
    bfloat16 could count only to 256.
    """
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state.update({name: torch.zeros_like(shard(p.detach(), shard_over)) for name in names})


def place_state(states: Mapping[Tensor, State], shard_over: DeviceMesh | None) -> None:
    """Shard a loaded state like one of this optimizer's own; without a mesh, every rank gets the whole of it.

    Sharded parameters keep what they have loaded. Every rank must call it.
    """
    for p, state in states.items():
        for name, value in state.items() if not isinstance(p, DTensor) else ():
            if isinstance(value, DTensor) and value.device_mesh != shard_over:
                value = full(value)
            part = shard(value, shard_over)
            state[name] = part if part is value else part.clone()  # a view would keep the whole


def advance(
    states: Mapping[Tensor, State], parameters: Sequence[Tensor], names: Sequence[str], shard_over: DeviceMesh | None
) -> tuple[list[float], list[Tensor], list[list[Tensor]]]:
    """Count one step of each parameter: (step numbers t from 1, local gradients, local moments by name)."""
    chosen = [states[p] for p in parameters]
    for state, p in zip(chosen, parameters, strict=True):
        initialise_state(state, p, names, shard_over)
        state["step"] += 1
    moments = [[local(state[name]) for state in chosen] for name in names]
    return [state["step"].item() for state in chosen], [_gradient(p, shard_over) for p in parameters], moments


def _gradient(p: Tensor, shard_over: DeviceMesh | None) -> Tensor:
    assert p.grad is not None  # optimizers select the parameters that have one
    return local(p.grad, shard_over)


def batches(tensors: Sequence[Tensor], values: int) -> Iterator[list[int]]:
    """Indices of tensors with one shape, at most so many values together."""
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        by_shape[tensor.shape].append(i)
    for shape, places in by_shape.items():
        size = max(1, values // max(1, shape.numel()))
        yield from (places[i : i + size] for i in range(0, len(places), size))


def gather(parameters: Sequence[Tensor], mesh: DeviceMesh, values: int = 2**27) -> None:
    """Give every rank all rows of replicated parameters of which each has updated its own (see `pmf.sharded.shard`).

    Parameters of one shape travel together, at most so many `values` at a time.
    """
    torn = [p for p in parameters if divided(p, mesh)]
    for places in batches(torn, values):
        batch = [torn[i] for i in places]
        rows, first = torch.stack([local(p, mesh) for p in batch]), shard(batch[0], mesh)
        whole = distributed(rows, mesh, batched(first, mesh), torch.Size((len(batch), *first.shape)))
        foreach_copy_(batch, list(whole.full_tensor().unbind()))


def nesterov(means: list[Tensor], gradients: list[Tensor], beta: float, counts: list[float]) -> list[Tensor]:
    """beta m / (1 - beta^(t + 1)) + (1 - beta) g / (1 - beta^t): the mean one step ahead, if g stayed the same.

    m already includes the gradient g of step t. Both terms are corrected for m having started at zero, as in optax.
    """
    ahead = foreach_mul(means, [beta / (1 - beta ** (t + 1)) for t in counts])
    foreach_add_(ahead, foreach_mul(gradients, [(1 - beta) / (1 - beta**t) for t in counts]))
    return list(ahead)
