"""Functions that only ask about a tensor, and functions that would lose its tangent."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from pmf.tangents.handlers import refused, still
from pmf.tangents.rules import HANDLERS, named, setter

ASKING = """
__bool__ __complex__ __contains__ __float__ __format__ __index__ __int__ __len__ __repr__ allclose dense_dim dim
dim_order element_size equal get_device has_names is_complex is_conj is_contiguous is_distributed is_floating_point
is_inference is_neg is_nonzero is_pinned is_same_size is_set_to is_shared is_signed item ndimension nelement numel
register_hook register_post_accumulate_grad_hook result_type retain_grad size storage_offset stride tolist
"""
"""Answered by the value: its shape, its numbers, the hooks of its gradient."""

COMPARING = """
__eq__ __ge__ __gt__ __le__ __lt__ __ne__ eq ge greater greater_equal gt isfinite isinf isnan isneginf isposinf le less
less_equal logical_and logical_not logical_or logical_xor lt ne not_equal signbit
"""
"""Their results are true or false."""

LOSING = """
__array__ __array_wrap__ __deepcopy__ __dlpack__ __reduce_ex__ backward data_ptr module_load
numpy resize resize_as share_memory_ storage storage_type to_dense to_mkldnn to_sparse untyped_storage
"""
"""They hand the numbers to code that knows no tangents."""

NOT_DIFFERENTIABLE = """
airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v
chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p
modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1 scaled_modified_bessel_k0
scaled_modified_bessel_k1 shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v
shifted_chebyshev_polynomial_w spherical_bessel_j0
"""
"""Functions of torch.special."""

# Dynamo cannot hash what reads a Python property, so those have no entry; `unknown` refuses them.
for _name, _member in inspect.getmembers(Tensor, inspect.isgetsetdescriptor):
    _getter, _setter = getattr(_member, "__get__", None), getattr(_member, "__set__", None)
    HANDLERS.setdefault(_getter, still)
    HANDLERS.setdefault(_setter, refused("expected an attribute that is read"))
HANDLERS[setter("requires_grad")] = still
HANDLERS[setter("data")] = refused("its tangent would be lost; expected x.data = y.detach() for an x that stands still")

for _function in named(*ASKING.split(), *COMPARING.split()):
    HANDLERS[_function] = still
for _name in LOSING.split():
    if hasattr(Tensor, _name):
        HANDLERS[getattr(Tensor, _name)] = refused("its tangent would be lost; expected torch functions")
for _name in NOT_DIFFERENTIABLE.split():
    HANDLERS[getattr(torch.special, _name)] = refused("PyTorch does not differentiate it, and would give zeros")
HANDLERS[torch.autograd.grad] = HANDLERS[torch.autograd.backward] = refused("expected no backward pass in the network")
