"""All private names of PyTorch that we use, as of torch 2.11 to 2.14, but those of two rooms in `pmf.tangents`.

`interception` and `tracing` there say what PyTorch and its compiler are told of values that move. Triton's names are
in `pmf.kernels.launching`. test_private.py fails on private names anywhere else.
"""

from __future__ import annotations

import inspect
import multiprocessing.queues
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.multiprocessing.reductions
from torch import Tensor, nn

# Without public equivalents: torch.utils.pytree takes no is_leaf, fake tensors are private as a whole.
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import _broadcast_to_and_flatten as tree_broadcast  # noqa: F401
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten

# One launch for a list of tensors; torch.optim uses them too.
foreach_add_ = torch._foreach_add_
foreach_addcdiv_ = torch._foreach_addcdiv_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_sqrt = torch._foreach_sqrt
foreach_sub_ = torch._foreach_sub_
foreach_zero_ = torch._foreach_zero_

_ATEN = torch.ops.aten
SCALED_DOT_PRODUCT = {
    "flash": _ATEN._scaled_dot_product_flash_attention.default,
    "cudnn": _ATEN._scaled_dot_product_cudnn_attention.default,
    "efficient": _ATEN._scaled_dot_product_efficient_attention.default,
    "cpu": _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Attention that also returns the log-sum-exp; the public function does not."""


def constant(function: Callable) -> Callable:
    """Make compilers call `function` once, while tracing, and treat its result as a constant.

    `torch.compiler.assume_constant_result` sets the same mark, but importing the compiler takes a second.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


def open_batch(x: Tensor) -> None:
    """Let compilers treat the batch size of x as dynamic; the public function fails if it turns out static."""
    torch._dynamo.maybe_mark_dynamic(x, 0)


def reread_buffers() -> None:
    """Make compiled functions keep their buffers after backward, so that it can run again."""
    import torch._functorch.config  # importing the compiler takes a second

    torch._functorch.config.donated_buffer = False


def storage_id(x: Tensor) -> int:
    """An identifier of x's storage, even if that has no memory (fake and meta tensors), or transforms wrap x."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage()._cdata


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active; reads a variable, because Dynamo cannot trace such a query."""
    return forward_ad._current_level >= 0


def apply_without_transforms(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply`, without its checks for transforms and for dead wrappers left by finished ones."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply


def transforming() -> bool:
    """Whether torch.func transforms or forward-mode differentiation are active."""
    return torch._C._are_functorch_transforms_active() or forward_mode()


def intercepted() -> bool:
    """Whether anything but a compiler intercepts operator calls.

    That is: transforms, tracers, and modes (fake tensors, operation counters, selective checkpoints, default devices).
    """
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return bool(transforming() or modes or torch.jit.is_tracing())


def traced_by_fx() -> bool:
    """Whether make_fx traces, for `torch.func.linearize` too: it raises where a value is read."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


batched_by_autograd = torch._C._functorch.is_legacy_batchedtensor
"""Whether x is a batch of `torch.autograd.functional`, or of gradients with is_grads_batched."""


def is_vmapped(x: Tensor) -> bool:
    """Whether `torch.vmap` maps over x, so that its values cannot be read."""
    while _is_wrapped(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def is_dual_tensor(x: Tensor) -> bool:
    """Whether x has a tangent of `torch.func.jvp` or `torch.autograd.forward_ad`, at any level of transforms."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    if not is_vmapped(x) and forward_ad.unpack_dual(x).tangent is not None:
        return True
    # PyTorch shows tangents only to the innermost transform; a jvp around it has wrapped what depends on its primals.
    around = (torch._C._functorch.get_interpreter_stack() or [])[:-1]
    levels = {i.level() for i in around if i.key() == torch._C._functorch.TransformType.Jvp}
    while _is_wrapped(x):
        if torch._C._functorch.maybe_get_level(x) in levels:
            return True
        x = torch._C._functorch.get_unwrapped(x)
    with temporarily_clear_interpreter_stack():
        return forward_ad.unpack_dual(x).tangent is not None


def recorded_levels(x: Tensor) -> set[int]:
    """The nesting levels of torch.func transforms at which x requires a gradient; 0 is outside of all transforms."""
    levels = set()
    while _is_wrapped(x):
        if x.requires_grad:
            levels.add(torch._C._functorch.maybe_get_level(x))
        x = torch._C._functorch.get_unwrapped(x)
    return levels | {0} if x.requires_grad else levels


_PLAIN = frozenset((type(None), bool, int, float, torch.dtype, list))


def ordinary(arguments: Iterable[Any]) -> bool:
    """Whether all tensors among the arguments are plain: no subclass, no wrapper of torch.func, no lazy negation."""
    tensors = []
    for x in arguments:
        kind = type(x)
        if kind is Tensor or kind is nn.Parameter:
            tensors.append(x)
        elif kind not in _PLAIN and isinstance(x, Tensor):
            return False
    return not (any(map(Tensor.is_neg, tensors)) or any(map(_is_wrapped, tensors)))


FUNCTION_NAMESPACES: tuple[Any, ...] = (
    torch,
    torch.Tensor,
    torch._C._nn,
    torch._C._VariableFunctions,
    torch.linalg,
    torch.fft,
    torch.special,
)
"""Where PyTorch keeps the builtin functions that dispatch to `__torch_function__`."""

grouped_mm = torch._grouped_mm
"""What `torch.nn.functional.grouped_mm` calls."""

PASSES_INPUTS_ON = {
    "torch.nn.modules._functions.BackwardHookFunction",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.RegisterPostBackwardFunction",
    "torch.nn.parallel.distributed._DDPSink",
}
"""The autograd.Functions of backward hooks, FSDP2 and DDP that return their inputs, which are their last arguments."""
UNUSED_PARAMETERS = "torch.nn.parallel.distributed._DDPSink"
REENTRANT_CHECKPOINT = "torch.utils.checkpoint.CheckpointFunction"


def make_shell(kind: type, like: Tensor) -> Any:
    """A tensor of a subclass shaped and placed like another, without storage: asking for memory to write to raises."""
    made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        kind, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device, layout=like.layout
    )
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made


def alone(x: Tensor) -> bool:
    """Whether nothing shares x's memory but what x is a view of, if anything: no tensor, array or storage object."""
    storage = x.untyped_storage()
    held = torch._C._storage_Use_Count(storage._cdata) != 2 + x._is_view()  # x and this storage object
    return not held and storage.resizable() and sys.getrefcount(storage) <= 3


def viewed(x: Tensor) -> Tensor | None:
    """The tensor that x is a view of."""
    return x._base


def exchange(a: Tensor, b: Tensor) -> None:
    """Let whoever holds one of two tensors in Python hold the other; what PyTorch holds, as of views, stays.

    `torch.utils.swap_tensors` does the same, but for tensors with views.
    """
    with torch._C.DisableTorchFunctionSubclass():
        torch._C._swap_tensor_impl(a, b)
    for name in ("__class__", "__dict__"):
        of_a = getattr(a, name)
        setattr(a, name, getattr(b, name))
        setattr(b, name, of_a)


assume = torch._check
"""Raise unless true; compilers take it for true, of sizes that they do not know."""


def scripted_body(function: Any) -> Callable | None:
    """The Python function that `torch.jit.script` made this one of, and that compilers trace; None if there is none.

    A traced function has one too, but may have recorded what that does no longer.
    """
    traced = vars(function).get("__name__") != "ScriptFunction"
    return None if traced else getattr(function, "_torchdynamo_inline", None)


def as_scripted(function: Any, body: Callable, args: tuple, kwargs: dict) -> Any:
    """`body`, the Python of a scripted function, with what TorchScript passes: copies of lists and dicts, and floats
    for integers where the signature says float.
    """
    args, kwargs = tree_map(lambda x: x, (args, kwargs))
    given = inspect.signature(body).bind(*args, **kwargs)
    given.apply_defaults()
    for argument in function.schema.arguments:
        if "float" in str(argument.type) and type(given.arguments[argument.name]) is int:
            given.arguments[argument.name] = float(given.arguments[argument.name])
    return body(*given.args, **given.kwargs)


def is_zero_tensor(x: Tensor) -> bool:
    """Whether x is a zero without memory, as forward mode makes for what does not move."""
    return x._is_zerotensor()


transform_level = torch._C._functorch.maybe_current_level
"""The depth of torch.func transforms around; None outside of any."""


def inside_function() -> bool:
    """Whether the forward of an autograd.Function runs, which alone turns forward mode off outside inference mode."""
    return not torch._C._is_fwd_grad_enabled()


set_recording = torch._C._set_grad_enabled
"""Record functions for backward from now on, or not."""


def without_selective_checkpoint() -> AbstractContextManager | None:
    """A context in which the selective checkpoint around sees no operator; None if nothing around sees operators."""
    if not torch._C._len_torch_dispatch_stack():
        return None
    from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

    selective = isinstance(_get_current_dispatch_mode(), torch.utils.checkpoint._CachingTorchDispatchMode)
    return _disable_current_modes() if selective else nullcontext()


def version(x: Tensor) -> int:
    """How often x has been written to."""
    return x._version


def saved_tensor_hooks() -> tuple[Callable, Callable] | None:
    """The innermost active hooks of `torch.autograd.graph.saved_tensors_hooks`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def hooked(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(kinds)


def operators_of(function: Any) -> tuple:
    """What stands for a function in `__torch_function__`: all overloads of an operator, else the function itself."""
    if isinstance(function, torch.library.CustomOpDef):
        function = function._opoverload._overloadpacket
    if isinstance(function, torch._ops.OpOverloadPacket):
        return function, *(getattr(function, name) for name in function.overloads())
    return (function,)


def schema(function: Any) -> tuple[str, list[str], bool]:
    """The name of an operator, those of its arguments, and whether it returns a view; else the name is ""."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        function = getattr(function, function.overloads()[0])
    if not isinstance(function, torch._ops.OpOverload):
        return "", [], False
    return function._schema.name, [x.name for x in function._schema.arguments], function.is_view


@constant
def number_places(name: str) -> tuple[int | str, ...]:
    """Where PyTorch's operators of this name take numbers, in none of their forms tensors: positions and names."""
    operator = getattr(_ATEN, name, None)
    taken: dict[bool, set[int | str]] = {True: set(), False: set()}
    for form in () if operator is None else operator.overloads():
        for i, x in enumerate(getattr(operator, form)._schema.arguments):
            taken["Tensor" in str(x.type)].update([x.name] if x.kwarg_only else [i, x.name])
    return tuple(taken[False] - taken[True])


def worker_processes(batches: Any) -> list[multiprocessing.Process]:
    """The workers of a DataLoader's iterator."""
    return list(getattr(batches, "_workers", ()))


def forget_workers(batches: Any) -> None:
    """Raise nothing when a worker of this DataLoader's iterator dies, except where the next batch is asked for."""
    if getattr(batches, "_worker_pids_set", False):
        torch._C._remove_worker_pids(id(batches))
        batches._worker_pids_set = False


def timed_out(error: Exception) -> bool:
    """Whether a DataLoader's iterator says that no batch came within its timeout; it can be asked again."""
    return str(error).startswith("DataLoader timed out after ")


def forget_received() -> None:
    """Drop what PyTorch keeps of tensors that processes sent and that are gone: it splits the memory they leave."""
    cache = torch.multiprocessing.reductions.shared_cache
    with cache.lock:
        cache.free_dead_references()


def on_unsendable(act: Callable[[Exception, object], None]) -> None:
    """Call `act` when a process cannot send what it has put into a queue: the receiver would wait for ever."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(act)  # type: ignore[attr-defined]


def ask_workers_to_end(batches: Any) -> bool:
    """Tell the workers of a DataLoader's iterator to end, unless one is dead: it may hold the locks of their queues.

    The iterator's own way waits for one after another, and at last sends a signal that ours ignore.
    """
    batches._shutdown = True
    healthy = all(worker.is_alive() for worker in batches._workers)
    if healthy:
        batches._workers_done_event.set()
        for queue in batches._index_queues:
            queue.put(None)
    if hasattr(batches, "_pin_memory_thread"):
        batches._pin_memory_thread_done_event.set()
        batches._worker_result_queue.cancel_join_thread()
        batches._worker_result_queue.put((None, None))
        batches._pin_memory_thread.join(1)
    return healthy


FLEX_ATTENTION = torch.ops.higher_order.flex_attention
"""What `torch.nn.attention.flex_attention.flex_attention` calls."""


def for_each_score(function: Callable, of_scores: bool) -> Callable:
    """A function of one score (or none) and its sample, head, query and key, as one of whole tensors of them."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.nn.attention.flex_attention import _vmap_for_bhqkv

    whole = _vmap_for_bhqkv(function, prefix=(0,) if of_scores else ())

    def run(*args: Any) -> Any:
        with TransformGetItemToIndex():
            return whole(*args)

    return run


def is_plain_attention(score_mod: Callable, block_mask: tuple) -> bool:
    """Whether FlexAttention was called without them."""
    from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE, _identity, noop_mask

    *_, rows, columns, mask_mod = block_mask
    whole = rows == _LARGE_SPARSE_BLOCK_SIZE == columns
    return score_mod is _identity and whole and (mask_mod is None or mask_mod is noop_mask)
