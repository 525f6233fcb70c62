"""What autograd.Function and checkpoints are told of carriers: private names of PyTorch, as of torch 2.11 to 2.14."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pmf.private import tree_leaves


@contextmanager
def intercepted_by(kinds: tuple[type, ...], apply: Callable, plain: Callable, again: Callable) -> Iterator[None]:
    """Call `apply(function, function.apply, args, kwargs)` for every autograd.Function that is applied to `kinds`.

    Checkpoints (without reentry) see `plain` arguments, so that they keep and recompute those; `again(function, args)`
    recomputes in place of a function in which compiled code ran. Compilers cannot trace an `apply` that is not
    PyTorch's own, so this lasts as long as the context of any thread.
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


class _CompiledRuns(threading.local):
    """How often code that records for backward and was compiled in such a context has run in this thread."""

    count = 0


_compiled_runs = _CompiledRuns()
_PATCHING = threading.Lock()
_patches: list[Any] = []
"""One entry for each context that is open; the first takes the patch back."""


def _patch(kinds: tuple[type, ...], apply: Callable, plain: Callable, again: Callable) -> Callable[[], None]:
    """Patch PyTorch; give a function that takes it back."""
    import torch.utils.checkpoint

    function: Any = torch.autograd.Function
    module = torch.utils.checkpoint
    own = vars(function).get("apply")  # in Python until torch 2.13, inherited from C++ since
    names = "_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl"
    generators = {name: getattr(module, name) for name in names if hasattr(module, name)}  # the second since 2.14

    def intercepted_apply(cls, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():  # somebody has kept an `apply` that was looked up meanwhile
            return cls.apply(*args, **kwargs)
        _compiled_runs.count += cls.__name__ == "CompiledFunction"
        original = super(function, cls).apply if own is None else own.__get__(None, cls)
        for x in (*args, *kwargs.values()):
            if type(x) in kinds or (type(x) in (list, tuple, dict) and _holds(x, kinds)):
                return apply(cls, original, args, kwargs)
        return original(*args, **kwargs)

    def of_plain(checkpoint):
        def steps(run, *args, **kwargs):
            recompute, before = [run], _compiled_runs.count
            yield from checkpoint(lambda *x, **named: recompute[0](*x, **named), *plain(args), **plain(kwargs))
            if _compiled_runs.count != before:
                recompute[0] = again(run, (args, kwargs))

        return steps

    def unpatch():
        if own is None:
            del function.apply
        else:
            function.apply = own
        for name, generator in generators.items():
            setattr(module, name, generator)

    function.apply = classmethod(intercepted_apply)
    for name, generator in generators.items():
        setattr(module, name, of_plain(generator))
    return unpatch


def _holds(x: Any, kinds: tuple[type, ...]) -> bool:
    """Whether one of `kinds` is in x, a list, tuple or dict."""
    return any(type(leaf) in kinds for leaf in tree_leaves(x))
