"""What Dynamo and einops are told to trace carriers: private names of both, as of torch 2.11 to 2.14, einops 0.8."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.private import constant

_known: set[type] = set()


@constant
def trace_as_tensor(kind: type) -> None:
    """Let Dynamo and einops take objects of a class, which has a tensor's methods, for tensors.

    `isinstance(x, Tensor)` and `torch.is_tensor(x)` are true then. `x @ x` works, and `a @ x` of a tensor a is
    `Tensor.__rmatmul__(x, a)`: Dynamo's tables of operators lack @, and it would compute x a. `torch.cat((a, x))` comes
    to `__torch_function__`, for which Dynamo looks in lists and dicts, but not in tuples.
    """
    if "einops" in sys.modules:
        backends = sys.modules["einops._backends"]
        backends._type2backend.setdefault(kind, backends.TorchBackend())
    if kind in _known:
        return
    _known.add(kind)
    from torch._dynamo.variables import builtin, torch_function  # importing the compiler takes a second
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    builtin.populate_builtin_to_tensor_fn_map()
    both = builtin.BuiltinVariable._binop_handlers()
    for operation in (operator.matmul, operator.imatmul):
        builtin.BUILTIN_TO_TENSOR_RFN_MAP.setdefault(operation, Tensor.__rmatmul__)
        both.setdefault(operation, []).append(_product(kind))
    handlers: Any = TorchInGraphFunctionVariable._get_handlers()
    handlers[torch.is_tensor] = _as_tensor(kind, handlers[torch.is_tensor], lambda: Tensor)
    variable: Any = builtin.BuiltinVariable
    variable.call_isinstance = _as_tensor(kind, variable.call_isinstance, lambda classes: classes.as_python_constant())
    variable.call_function_handler_cache.clear()  # it holds the former handler
    torch_function._flatten_vts = _with_tuples(kind, torch_function._flatten_vts)


def _product(kind: type) -> tuple[tuple[type, type], Callable]:
    """What Dynamo does for @ of two objects, by their classes."""
    from torch._dynamo.variables import UserDefinedObjectVariable

    def multiply(tx, a, b):
        return a.call_method(tx, "__matmul__", [b], {}) if a.value_type is kind else None

    return (UserDefinedObjectVariable, UserDefinedObjectVariable), multiply


def _with_tuples(kind: type, flatten: Callable) -> Callable:
    """Dynamo's list of the arguments of a function, with the items of tuples that have objects of `kind`."""
    from torch._dynamo.variables import TupleVariable, UserDefinedObjectVariable

    def of_kind(x):
        return isinstance(x, UserDefinedObjectVariable) and x.value_type is kind

    def flat(arguments):
        for x in flatten(arguments):
            yield from x.items if isinstance(x, TupleVariable) and any(map(of_kind, x.items)) else (x,)

    return lambda arguments: list(flat(arguments))


def _as_tensor(kind: type, handler: Callable, asked: Callable) -> Callable:
    """Dynamo's handler of a question for the class of an object, which answers for `kind` as for tensors too."""
    from torch._dynamo.variables import ConstantVariable, UserDefinedObjectVariable

    def handle(self, tx, x, *classes):
        if isinstance(x, UserDefinedObjectVariable) and x.value_type is kind and issubclass(Tensor, asked(*classes)):
            return ConstantVariable.create(True)
        return handler(self, tx, x, *classes)

    return handle
