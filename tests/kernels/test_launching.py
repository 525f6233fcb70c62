"""The keys of the cache of compiled kernels differ wherever Triton compiles different code."""

import importlib
import itertools
import pkgutil
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import native_specialize_impl  # noqa: E402

import pmf  # noqa: E402
from pmf import kernels  # noqa: E402
from pmf.kernels import registration  # noqa: E402
from pmf.kernels.launching import KNOWN, taken_apart  # noqa: E402
from tests.kernels.checks import DEVICE  # noqa: E402
from tests.networks import TINY, model_inputs  # noqa: E402

ROOT = Path(pmf.__file__).parent.parent
STORAGE = torch.zeros(64)


class Steps(NamedTuple):
    token: int
    head: int


class Others(NamedTuple):
    row: int
    column: int


ARGUMENTS = (
    None,
    *(0, 1, 2, 8, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**32, 2**40 + 1, 2**63),
    *(True, False, 0.0, 1.0, 16.0, 1e-6),
    *(STORAGE, STORAGE[1:], STORAGE[2:], STORAGE[4:], STORAGE[:0], torch.zeros(64)),
    *(STORAGE.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)),
    *(Steps(1, 16), Steps(16, 16), Others(16, 16), (Steps(1, 16), 16), (Steps(3, 16), 16)),
    *((), (0,), (1,), (16, 17), (16, 16), (1.0,), (True,), (STORAGE, STORAGE[1:]), (STORAGE, STORAGE), (None, 16)),
)


def key_of(*arguments):
    return tuple(taken_apart(arguments)[0])


def specialised(argument):
    return native_specialize_impl(CUDABackend, argument, False, True, True)


@pytest.mark.skipif(not KNOWN, reason="kernels of this Triton are launched as usual")
def test_equal_keys_mean_one_compiled_kernel():
    alike = 0
    for a, b in itertools.combinations(ARGUMENTS, 2):
        if key_of(a) == key_of(b):
            assert specialised(a) == specialised(b), (a, b)
            alike += 1
    assert alike > 0


def test_keys_tell_equal_numbers_of_other_types_apart():
    assert len({key_of(x) for x in (1, 1.0, True)}) == 3
    assert len({key_of((x,)) for x in (1, 1.0, True)}) == 3
    assert len({key_of(*x) for x in ((1, 2), ((1, 2),), ((1,), 2))}) == 3


def test_keys_tell_named_tuples_apart():
    """A kernel that reads a field by name compiles to different code for another type with the same values."""
    assert len({key_of(x) for x in ((16, 16), Steps(16, 16), Others(16, 16), Steps(16, 17))}) == 4


def test_launchers_are_given_addresses():
    _, plain = taken_apart((STORAGE, None, 3, (STORAGE[1:], 1.5), Steps(1, 2)))
    assert plain == [STORAGE.data_ptr(), None, 3, (STORAGE.data_ptr() + 4, 1.5), (1, 2)]


@pytest.mark.parametrize(("grad", "bound"), [(True, 13), (False, 12)])
def test_few_frames_lie_between_the_network_and_the_first_norm_s_launch(monkeypatch, grad, bound):
    """Counts our own frames, both ends included; from the op on, five with gradients and four without."""
    stacks, launch = [], registration.launch

    def recorded(kernel, *arguments, **options):
        stacks.append((kernel.fn.__module__, traceback.extract_stack()[:-1]))
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(registration, "launch", recorded)
    model = pmf.create_model(TINY, impl="triton", device=DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in model_inputs(TINY, 2, dtype=torch.float32).items()}
    with torch.set_grad_enabled(grad):
        model(**inputs)
    stack = next(stack for module, stack in stacks if module == "pmf.kernels.norm")
    files = [Path(frame.filename) for frame in stack]
    ours = [file.is_relative_to(ROOT) and "site-packages" not in file.parts for file in files]
    names = [frame.name for frame, our in zip(stack, ours, strict=True) if our]
    own = [*names[names.index("forward_dual") - 1 :], "launch"]
    assert own[0] == "forward" and own[1] == "forward_dual", own
    assert len(own) <= bound, own
    assert len(own) - own.index("norm_modulate") - 1 <= (5 if grad else 4), own


def test_no_kernel_takes_more_than_twenty_parameters():
    names = [f"pmf.kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    found = {
        f"{name}.{key}": len(value.arg_names)
        for name in names
        for key, value in vars(importlib.import_module(name)).items()
        if hasattr(value, "arg_names")
    }
    assert len(found) > 30
    assert max(found.values()) <= 20, found
