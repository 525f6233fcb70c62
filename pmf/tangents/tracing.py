"""What Dynamo and einops are told to trace carriers: private names of both, as of torch 2.11 to 2.14, einops 0.8.2."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from pmf.errors import InputError
from pmf.private import constant
from pmf.tangents.bodies import UNLISTED
from pmf.tangents.rules import handler_of

DISPATCHING = UNLISTED | {
    getattr(space, name)
    for space in (torch._C._nn, torch._C._VariableFunctions)
    for name in dir(space)
    if not name.startswith("__")
}
"""Functions that Dynamo has to be told to dispatch to `__torch_function__`."""


@constant
def trace_as_tensors(kinds: tuple[type, ...]) -> None:
    """Let Dynamo and einops take objects of these classes, which have a tensor's methods, for tensors.

    `isinstance(x, Tensor)` and `torch.is_tensor(x)` are true then. `x @ x` works, and `a @ x` of a tensor a is
    `Tensor.__rmatmul__(x, a)`: Dynamo's tables of operators lack @, and it would compute x a. `torch.cat((a, x))` comes
    to `__torch_function__`, for which Dynamo looks in lists and dicts, but not in tuples. An autograd.Function is left
    to its handler: Dynamo would trace its forward and leave out its backward.
    """
    backends: Any = sys.modules.get("einops._backends")
    known = getattr(backends, "_type2backend", None)
    if known is not None:
        for kind in kinds:
            known.setdefault(kind, backends.TorchBackend())
    _tell_dynamo(kinds)


@functools.cache
def trace_once_imported(kinds: tuple[type, ...]) -> None:
    """`trace_as_tensors` as soon as somebody imports Dynamo: what is compiled first may be inside a call."""
    sys.meta_path.insert(0, _Import(kinds))


class _Import:
    """A finder of modules that tells Dynamo of these classes when it is imported."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.kinds = kinds

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module
            loader.exec_module = lambda module: (execute(module), trace_as_tensors(self.kinds))
        return spec


@functools.cache
def _tell_dynamo(kinds: tuple[type, ...]) -> None:
    from torch._dynamo.variables import UserDefinedObjectVariable as Object  # importing the compiler takes a second
    from torch._dynamo.variables import builtin, misc, torch_function
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    def known(x: Any) -> bool:
        return isinstance(x, Object) and x.value_type in kinds

    def multiply(tx, a, b):
        return a.call_method(tx, "__matmul__", [b], {}) if known(a) else None

    builtin.populate_builtin_to_tensor_fn_map()
    pairs = builtin.BuiltinVariable._binop_handlers()
    for operation in (operator.matmul, operator.imatmul):
        builtin.BUILTIN_TO_TENSOR_RFN_MAP.setdefault(operation, Tensor.__rmatmul__)
        pairs.setdefault(operation, []).append(((Object, Object), multiply))
    handlers: Any = TorchInGraphFunctionVariable._get_handlers()
    handlers[torch.is_tensor] = _as_tensor(known, handlers[torch.is_tensor], lambda: Tensor)
    variable: Any = builtin.BuiltinVariable
    variable.call_isinstance = _as_tensor(known, variable.call_isinstance, lambda classes: classes.as_python_constant())
    variable.call_function_handler_cache.clear()  # it holds the former handlers
    torch_function._flatten_vts = _with_tuples(known, torch_function._flatten_vts)
    called: Any = TorchInGraphFunctionVariable
    called.torch_function_override_enabled = _dispatching(kinds, called.torch_function_override_enabled)
    function: Any = misc.AutogradFunctionVariable
    function.call_apply = _by_handlers(known, function.call_apply)
    _leave_own_frames()


RUNNING_NETWORKS = "pmf.tangents.call", "pmf.tangents.wrappers"
"""The modules whose functions call those of users, which may be compiled."""


def _leave_own_frames() -> None:
    """Let Dynamo compile code of this package as part of what calls it, never by itself.

    After a graph break the rest of a network runs in Python, function by function, and Dynamo tries to compile each:
    of ours it would keep the first, and what that does to one torch function, for others too.
    """
    from torch._C._dynamo.eval_frame import set_code_exec_strategy
    from torch._dynamo.types import FrameAction, FrameExecStrategy

    for name, module in list(sys.modules.items()):
        if name.startswith("pmf.tangents.") and hasattr(module, "__file__"):
            called = FrameAction.DEFAULT if name in RUNNING_NETWORKS else FrameAction.SKIP
            for code in _codes(module):
                if code.co_filename == module.__file__ and code.co_name != "jvp":  # torch.compile(pmf.jvp) begins there
                    set_code_exec_strategy(code, FrameExecStrategy(FrameAction.SKIP, called))


def _codes(x: Any) -> Iterator[CodeType]:
    """The code of the functions in a module, in its classes, and in functions."""
    x = getattr(x, "__wrapped__", getattr(x, "__func__", x))
    if isinstance(x, CodeType):
        yield x
    for part in _parts(x):
        yield from _codes(part)


def _parts(x: Any) -> Iterable[Any]:
    """What in a module, class, property, function or code may have code."""
    if isinstance(x, CodeType):
        return x.co_consts
    if isinstance(x, FunctionType):
        return (x.__code__,)
    if isinstance(x, property):
        return x.fget, x.fset
    if isinstance(x, ModuleType) or (isinstance(x, type) and (Tensor in x.__bases__ or x.__module__[:4] == "pmf.")):
        return [part for part in vars(x).values() if not isinstance(part, ModuleType)]
    return ()


def _dispatching(kinds: tuple[type, ...], enabled: Callable) -> Callable:
    """Dynamo's answer whether a function dispatches: yes for more functions where arguments are of these kinds."""
    from torch._dynamo.variables.torch_function import _flatten_vts
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

    dispatching = DISPATCHING | {has_free_unbacked_symbols}  # which FlexAttention asks

    def answer(self, tx, args, kwargs):
        if enabled(self, tx, args, kwargs):
            return True
        if self.get_function() not in dispatching:
            return False
        given = [x.realize() for x in _flatten_vts([*args, *kwargs.values()])]
        return any(getattr(x, "value_type", getattr(x, "class_type", None)) in kinds for x in given)

    return answer


def _by_handlers(known: Callable, apply: Callable) -> Callable:
    """Dynamo's call of an autograd.Function, which leaves it to its handler where an argument is known."""
    from torch._dynamo.variables import (
        ConstantVariable,
        ConstDictVariable,
        GetAttrVariable,
        TupleVariable,
        UserFunctionVariable,
    )
    from torch._dynamo.variables.lists import BaseListVariable

    def holds(x):
        return known(x) or (isinstance(x, BaseListVariable) and any(map(holds, x.items)))

    def call(self, tx, args, kwargs):
        if not any(map(holds, [*args, *kwargs.values()])):
            return apply(self, tx, args, kwargs)
        function, handler = self.fn_cls, handler_of(self.fn_cls)
        if handler is None:
            raise InputError(
                f"pmf.jvp: {function.__name__}, an autograd.Function, has no rule that compiles; expected one "
                "registered by pmf.jvp.rule, or the call outside torch.compile"
            )

        given = (
            TupleVariable(list(args)),
            ConstDictVariable({ConstantVariable.create(name): x for name, x in kwargs.items()}),
        )
        return UserFunctionVariable(handler).call_function(tx, [GetAttrVariable(self, "apply"), *given], {})

    return call


def _with_tuples(known: Callable, flatten: Callable) -> Callable:
    """Dynamo's list of the arguments of a function, with the items of tuples that have known objects."""
    from torch._dynamo.variables import TupleVariable

    def flat(arguments):
        for x in flatten(arguments):
            yield from x.items if isinstance(x, TupleVariable) and any(map(known, x.items)) else (x,)

    return lambda arguments: list(flat(arguments))


def _as_tensor(known: Callable, handler: Callable, asked: Callable) -> Callable:
    """Dynamo's handler of a question for the class of an object, which answers for known ones as for tensors too."""
    from torch._dynamo.variables import ConstantVariable

    def handle(self, tx, x, *classes):
        if known(x) and issubclass(Tensor, asked(*classes)):
            return ConstantVariable.create(True)
        return handler(self, tx, x, *classes)

    return handle
