"""Rules of recurrent networks, whose kernels have no forward mode (oneDNN's LSTM, cuDNN's, the fused cells on CUDA).

The tangent is that of the equations of `torch.nn.LSTM`, `GRU` and `RNN`, written in functions that have one: the values
of all steps are computed once more, unrecorded, in float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf.autocast import no_autocast
from pmf.errors import InputError
from pmf.private import tree_map
from pmf.tangents.fallback import check_eager, tangents_by_torch_func
from pmf.tangents.handlers import drawn, ruled
from pmf.tangents.rules import HANDLERS, Handler, Rule, can_move, is_dual, named, plain

State = tuple[Tensor, ...]
"""h [B, H], and c of an LSTM."""
Cell = Callable[[Tensor, Tensor, State], State]
"""The next state of `cell(W_ih x + b_ih, W_hh h + b_hh, state)`."""


def _lstm(from_input: Tensor, from_state: Tensor, state: State) -> State:
    """c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c')."""
    i, f, g, o = (from_input + from_state).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(from_input: Tensor, from_state: Tensor, state: State) -> State:
    """h' = (1 - sigmoid(z)) n + sigmoid(z) h with n = tanh(n_x + sigmoid(r) n_h)."""
    (r, z, n), (r_state, z_state, n_state) = from_input.chunk(3, -1), from_state.chunk(3, -1)
    n = (n + (r + r_state).sigmoid() * n_state).tanh()
    return (n + (z + z_state).sigmoid() * (state[0] - n),)


def _rnn_tanh(from_input: Tensor, from_state: Tensor, state: State) -> State:
    return ((from_input + from_state).tanh(),)


def _rnn_relu(from_input: Tensor, from_state: Tensor, state: State) -> State:
    return ((from_input + from_state).relu(),)


CELLS: dict[str, Cell] = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu}


def _direction(
    cell: Cell, x: Tensor, sizes: Sequence[int], state: State, weights: Sequence[Tensor], biases: bool, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: x [sum of sizes, I] holds for each step the inputs of the sequences that last."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biases else (None, None)
    projection = rest[-1] if len(rest) % 2 else None  # W_hr of an LSTM with proj_size
    steps = list(F.linear(x, w_ih, b_ih).split(list(sizes)))
    for t in reversed(range(len(sizes))) if backwards else range(len(sizes)):
        before = tuple([part[: sizes[t]] for part in state])
        after = cell(steps[t], F.linear(before[0], w_hh, b_hh), before)
        if projection is not None:
            after = F.linear(after[0], projection), *after[1:]
        steps[t] = after[0]
        state = tuple([torch.cat([new, old[sizes[t] :]]) for new, old in zip(after, state, strict=True)])
    return torch.cat(steps), state


def _layers(
    cell: Cell,
    x: Tensor,
    sizes: Sequence[int],
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    dtype: torch.dtype,
) -> tuple:
    """All layers: outputs as x lies, and the last states [layers x directions, B, H]. Dropout draws in `dtype`."""
    directions = (False, True) if bidirectional else (False,)
    count = len(params) // (num_layers * len(directions))
    states: list[State] = []
    for layer in range(num_layers):
        if layer and dropout:
            kept = torch.dropout(torch.ones(x.shape, dtype=dtype, device=x.device), dropout, True) != 0
            x = x * kept / (1 - dropout) if dropout < 1 else x * 0
        outs = []
        for backwards in directions:
            k = len(states)
            first = tuple([part[k] for part in ((hx,) if isinstance(hx, Tensor) else hx)])
            weights = params[k * count : (k + 1) * count]
            out, state = _direction(cell, x, sizes, first, weights, biases, backwards)
            outs.append(out)
            states.append(state)
        x = torch.cat(outs, -1)
    return x, *[torch.stack(parts) for parts in zip(*states, strict=True)]


def _padded(cell: Cell, dtype: torch.dtype) -> Callable:
    """torch.lstm and others of padded sequences."""

    def network(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        x = input.transpose(0, 1) if batch_first else input
        sizes = [x.shape[1]] * len(x)
        lost = dropout if train else 0
        out, *last = _layers(
            cell, x.flatten(0, 1), sizes, hx, params, has_biases, num_layers, lost, bidirectional, dtype
        )
        out = out.unflatten(0, x.shape[:2])
        return out.transpose(0, 1) if batch_first else out, *last

    return network


def _packed(cell: Cell, dtype: torch.dtype) -> Callable:
    """torch.lstm and others of packed sequences."""

    def network(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
        sizes, lost = batch_sizes.tolist(), dropout if train else 0
        return _layers(cell, data, sizes, hx, params, has_biases, num_layers, lost, bidirectional, dtype)

    return network


def _widened(x: Any) -> Any:
    """x in float32 if it is narrower: rounding errors would add up from step to step."""
    if is_dual(x):
        return x.map(_widened)
    return x.to(torch.promote_types(x.dtype, torch.float32)) if can_move(x) else x


def _tangents(function: Callable, out: Any, args: tuple) -> Any:
    """The tangents of a network by `function`, which writes it out."""
    with no_autocast(plain(args[0]).device):
        return tangents_by_torch_func(function, out, tree_map(_widened, args, is_leaf=is_dual), {})


def _network(function: Callable, cell: Cell) -> Handler:
    """The handler of a recurrent network, whose dropout drops the same elements of the tangent."""

    def rule(out, *args):
        packed = not isinstance(args[3], bool)  # data and batch_sizes in place of input
        num_layers, dropout, train = args[5:8] if packed else args[4:7]
        if num_layers > 1 and dropout and train:
            check_eager(function)
            if torch.backends.cudnn.is_acceptable(plain(args[0])):
                raise InputError(CUDNN_DROPOUT)
        return _tangents((_packed if packed else _padded)(cell, out[0].dtype), out, args)

    def handle(function, args, kwargs):
        return (ruled if torch.compiler.is_compiling() else drawn)(rule)(function, args, kwargs)

    return handle


CUDNN_DROPOUT = (
    "pmf.jvp: dropout between recurrent layers draws numbers on cuDNN that cannot be drawn again; "
    "expected dropout=0 or torch.backends.cudnn.flags(enabled=False)"
)


def _one_step(cell: Cell) -> Rule:
    """The rule of torch.nn.LSTMCell, GRUCell and RNNCell."""

    def step(x, hx, w_ih, w_hh, b_ih=None, b_hh=None):
        state = hx if isinstance(hx, list | tuple) else (hx,)
        after = cell(F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return after if len(after) > 1 else after[0]

    return lambda out, *args: _tangents(step, out, args)


def _pack(function: Callable) -> Rule:
    """Linear in the padded sequences; the batch sizes do not move."""
    return lambda out, x, *args: (function(x.dot, *args)[0], None)


def _pad(function: Callable) -> Rule:
    """Linear in the packed sequences, but for what it pads with; the lengths do not move."""
    return lambda out, x, sizes, batch_first, padding, length: (function(x.dot, sizes, batch_first, 0, length)[0], None)


for _name, _cell in CELLS.items():
    for _function in named(_name):
        HANDLERS[_function] = _network(_function, _cell)
    for _function in named(f"{_name}_cell"):
        HANDLERS[_function] = ruled(_one_step(_cell))
for _function in named("_pack_padded_sequence"):
    HANDLERS[_function] = ruled(_pack(_function))
for _function in named("_pad_packed_sequence"):
    HANDLERS[_function] = ruled(_pad(_function))
