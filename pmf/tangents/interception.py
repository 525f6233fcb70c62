"""What autograd.Function, TorchScript, checkpoints and `x.data` are told of carriers: names of PyTorch 2.11 to 2.14."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from pmf.private import (
    as_scripted,
    scripted_body,
    set_recording,
    tree_leaves,
    without_selective_checkpoint,
)


@contextmanager
def intercepted_by(kinds: tuple[type, ...], apply: Callable, plain: Callable, again: Callable) -> Iterator[None]:
    """Call `apply(function, function.apply, args, kwargs)` for every autograd.Function that is applied to `kinds`.

    Scripted functions run as the Python they were made of. Checkpoints (without reentry) see `plain` arguments, so that
    they keep and recompute those; `again(function, args)` recomputes in place of one in which compiled or scripted code
    ran. Compilers cannot trace an `apply` that is not PyTorch's own, so this lasts as long as the context of any
    thread.
    """
    with _PATCHING:
        _patches.append(None)
        if len(_patches) == 1:
            _patches[0] = _patch(kinds, apply, plain, again)
    try:
        yield
    finally:
        with _PATCHING:
            if len(_patches) == 1:
                _patches[0]()
                _patches.clear()
            else:
                _patches.pop()


def watch_data(kinds: tuple[type, ...], assign: Callable) -> None:
    """From now on let `assign(write, x, y)` do `x.data = y` for every y of `kinds`."""
    tensor: Any = torch.Tensor
    if "data" not in vars(tensor):  # but inherited
        tensor.data = _Data(tensor.data, kinds, assign)


class _Data:
    """`x.data` in place of PyTorch's own, which in `x.data = y` takes the memory of a carrier y, but that has none.

    As an attribute of the class it is PyTorch's own, by which functions of tensors know it. It stays where the first
    call has put it: when a class changes, Python looks up its attributes anew, and 3.13 does for good after 1000 times.
    """

    def __init__(self, own: Any, kinds: tuple[type, ...], assign: Callable) -> None:
        self.own, self.kinds, self.assign = own, kinds, assign

    def __get__(self, x: Any, kind: type | None = None) -> Any:
        return self.own if x is None else self.own.__get__(x, kind)

    def __set__(self, x: Any, y: Any) -> None:
        if type(y) in self.kinds:
            self.assign(self.own.__set__, x, y)
        else:
            self.own.__set__(x, y)


class _Runs(threading.local):
    """How often code has run in this thread that records otherwise for carriers than for tensors.

    That is scripted code, and code that was compiled in such a context and records for backward.
    """

    count = 0


_runs = _Runs()
_PATCHING = threading.Lock()
_patches: list[Any] = []
"""One entry for each context that is open; the first takes the patch back."""


def _patch(kinds: tuple[type, ...], apply: Callable, plain: Callable, again: Callable) -> Callable[[], None]:
    """Patch PyTorch; give a function that takes it back."""
    import torch.utils.checkpoint

    function: Any = torch.autograd.Function
    script: Any = torch.jit.ScriptFunction
    script_call = vars(script)["__call__"]
    module = torch.utils.checkpoint
    own = vars(function).get("apply")  # in Python until torch 2.13, inherited from C++ since
    names = "_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"
    generators = {name: getattr(module, name) for name in names if hasattr(module, name)}  # the second since 2.14

    def intercepted_apply(cls, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():  # somebody has kept an `apply` that was looked up meanwhile
            return cls.apply(*args, **kwargs)
        _runs.count += cls.__name__ == "CompiledFunction"
        original = super(function, cls).apply if own is None else own.__get__(None, cls)
        return apply(cls, original, args, kwargs) if _hold(args, kwargs, kinds) else original(*args, **kwargs)

    def intercepted_script(self, *args, **kwargs):
        body = scripted_body(self)
        if body is None or not _hold(args, kwargs, kinds):
            return script_call.__get__(self)(*args, **kwargs)
        _runs.count += 1
        return as_scripted(self, body, args, kwargs)

    def of_plain(checkpoint):
        def steps(run, *args, **kwargs):
            recompute, before = [run], _runs.count
            yield from checkpoint(lambda *x, **named: recompute[0](*x, **named), *plain(args), **plain(kwargs))
            if _runs.count != before:
                recompute[0] = again(run, (args, kwargs))

        return steps

    def unpatch():
        if own is None:
            del function.apply
        else:
            function.apply = own
        script.__call__ = script_call
        for name, generator in generators.items():
            setattr(module, name, generator)

    script.__call__ = intercepted_script
    function.apply = classmethod(intercepted_apply)
    for name, generator in generators.items():
        setattr(module, name, of_plain(generator))
    return unpatch


def _hold(args: tuple, kwargs: dict, kinds: tuple[type, ...]) -> bool:
    """Whether one of `kinds` is among the arguments, or in a list, tuple or dict among them."""
    for x in (*args, *kwargs.values()):
        if type(x) in kinds:
            return True
        if isinstance(x, list | tuple | dict) and any(type(leaf) in kinds for leaf in tree_leaves(x)):
            return True
    return False


def unrecorded() -> AbstractContextManager:
    """A context without gradients, unseen by selective checkpoints: their second run must meet the same operators."""
    if torch.compiler.is_compiling():
        return torch.no_grad()
    unseen = without_selective_checkpoint()
    return _Unrecorded() if unseen is None else _unseen(unseen)


class _Unrecorded:
    """`torch.no_grad`, but cheaper to make and to enter: every function of a network that moves does so."""

    def __enter__(self) -> None:
        self.recorded = torch.is_grad_enabled()
        set_recording(False)

    def __exit__(self, *error: object) -> None:
        set_recording(self.recorded)


@contextmanager
def _unseen(by_modes: AbstractContextManager) -> Iterator[None]:
    with torch.no_grad(), by_modes:
        yield
