"""Rules of sums, products and quotients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.pair import total
from pmf.private import grouped_mm
from pmf.tangents.handlers import ruled
from pmf.tangents.rules import HANDLERS, Rule, argument, bilinear, is_dual, named, plain

PRODUCTS = {
    "mul multiply __mul__ __rmul__ matmul __matmul__ inner kron cross": "other",
    "mm bmm": "mat2",
    "mv": "vec",
    "outer ger": "vec2",
    "dot": "tensor",
}
"""Bilinear functions, by the name of their second argument."""
WEIGHTED = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3} | {f"conv_transpose{n}d": n for n in (1, 2, 3)}
"""Bilinear functions with a bias, and the number of their spatial dimensions."""

for _names, _second in PRODUCTS.items():
    for _function in named(*_names.split()):
        HANDLERS[_function] = ruled(bilinear(_function, _second))
for _name, _spatial in WEIGHTED.items():
    for _function in named(_name):
        HANDLERS[_function] = ruled(bilinear(_function, "weight", bias=True, spatial=_spatial))
ADDED: dict[str, Callable] = {"addmm": torch.mm, "baddbmm": torch.bmm, "addmv": torch.mv, "addr": torch.outer}
"""Sums beta x + alpha product(a, b), and their product."""
HANDLERS[grouped_mm] = ruled(bilinear(grouped_mm, "mat2"))


def _sparse(function: Callable) -> Rule:
    """The product rule, unless the product takes largest or smallest terms instead of sums."""
    product = bilinear(function, "mat2")

    def rule(out, *args, **kwargs):
        reduced = argument(args, kwargs, (2, "reduce"))
        return product(out, *args, **kwargs) if reduced in (None, "sum", "mean") else NotImplemented

    return rule


HANDLERS[torch.sparse.mm] = ruled(_sparse(torch.sparse.mm))


def _scaled(dot: Tensor, alpha: Any) -> Tensor:
    """alpha dot."""
    return dot if type(alpha) in (int, float) and alpha == 1 else dot * alpha


def _added(product: Callable) -> Rule:
    """beta x_dot + alpha (a_dot b + a b_dot)."""

    def rule(out, x, a, b, *, beta=1, alpha=1):
        terms = [x.dot.expand(out.shape) * beta] if is_dual(x) and beta != 0 else []
        if is_dual(a):
            terms.append(_scaled(product(a.dot, plain(b)), alpha))
        if is_dual(b):
            terms.append(_scaled(product(plain(a), b.dot), alpha))
        return sum(terms[1:], terms[0]) if terms else torch.zeros_like(out)

    return rule


def _sum(sign: int, reverse: bool = False) -> Rule:
    """The rule of a + alpha b or a - alpha b, or with a and b exchanged."""

    def rule(out, a, b=None, *, alpha=1, other=None, input=None):
        a, b = (input if a is None else a), (other if b is None else b)
        if reverse:
            a, b = b, a
        one, two = a.dot if is_dual(a) else None, _scaled(b.dot, alpha) if is_dual(b) else None
        if one is None:
            return -two if sign < 0 else two.clone() if two is b.dot else two
        if two is None:
            # The output is new memory, so its tangent must be: in-place functions write to both.
            return one.clone()
        return one + two if sign > 0 else one - two

    return rule


def _quotient(reverse: bool = False) -> Rule:
    """(a_dot - q b_dot) / b for q = a / b."""

    def rule(out, a, b=None, *, rounding_mode=None, other=None):
        b = other if b is None else b
        if rounding_mode is not None:
            return NotImplemented
        if reverse:
            a, b = b, a
        if not is_dual(b):
            return a.dot / b
        numerator = -out * b.dot
        return (numerator if not is_dual(a) else a.dot + numerator) / plain(b)

    return rule


for _names, _rule in (
    ("add __add__ __radd__", _sum(1)),
    ("sub subtract __sub__", _sum(-1)),
    ("rsub __rsub__", _sum(-1, reverse=True)),
    ("div divide true_divide __truediv__ __div__", _quotient()),
    ("__rtruediv__ __rdiv__", _quotient(reverse=True)),
):
    for _function in named(*_names.split()):
        HANDLERS[_function] = ruled(_rule)


for _name, _product in ADDED.items():
    for _function in named(_name):
        HANDLERS[_function] = ruled(_added(_product))


def _einsum(function: Callable) -> Rule:
    """The product rule over the operands."""

    def rule(out, equation, *given, **kwargs):
        listed = len(given) == 1 and isinstance(given[0], list | tuple) and not is_dual(given[0])
        operands = list(given[0] if listed else given)
        if not isinstance(equation, str):
            return NotImplemented
        values = [plain(x) for x in operands]
        dot = None
        for i, x in enumerate(operands):
            if is_dual(x):
                one = [*values[:i], x.dot, *values[i + 1 :]]
                term = function(equation, one, **kwargs) if listed else function(equation, *one, **kwargs)
                dot = total(dot, term)
        return dot

    return rule


for _function in (torch.einsum, *named("einsum")):
    HANDLERS[_function] = ruled(_einsum(_function))
