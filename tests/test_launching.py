"""The keys that compiled kernels are kept under tell apart all that Triton compiles apart."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import native_specialize_impl  # noqa: E402

from pmf.kernels.launching import KNOWN, taken_apart  # noqa: E402

STORAGE = torch.zeros(64)
ARGUMENTS = (
    None,
    *(0, 1, 2, 8, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**32, 2**40 + 1, 2**63),
    *(True, False, 0.0, 1.0, 16.0, 1e-6),
    *(STORAGE, STORAGE[1:], STORAGE[2:], STORAGE[4:], STORAGE[:0], torch.zeros(64)),
    *(STORAGE.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool)),
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


def test_launchers_are_given_addresses():
    _, plain = taken_apart((STORAGE, None, 3, (STORAGE[1:], 1.5)))
    assert plain == [STORAGE.data_ptr(), None, 3, (STORAGE.data_ptr() + 4, 1.5)]
