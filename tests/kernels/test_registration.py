"""Operators called directly and through PyTorch's dispatcher give equal results, and modes see every operator."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pmf import Dual, ops
from tests.kernels.checks import DEVICE

pytest.importorskip("triton")

from pmf.kernels import norm, registration


def rms(x, branch, gate, x_dot=None, branch_dot=None):
    """Two ops in sequence; their value and tangent."""
    _, y = ops.residual_norm_modulate(Dual(x, x_dot), Dual(branch, branch_dot), gate, impl="triton")
    return ops.swiglu(y, impl="triton")


def inputs(**options):
    torch.manual_seed(0)
    return tuple(torch.randn(shape, device=DEVICE, **options) for shape in ((2, 3, 8), (2, 3, 8), (8,)))


class Watcher(TorchDispatchMode):
    """Records the names of our operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pmf":
            self.seen.append(func._schema.name)
        return func(*args, **kwargs or {})


def gradients(x, branch, gate):
    y, _ = rms(x, branch, gate)
    return torch.autograd.grad(y.square().sum(), (x, branch, gate))


def test_modes_see_every_operator():
    x, branch, gate = inputs(requires_grad=True)
    plain, short = rms(x, branch, gate)[0], gradients(x, branch, gate)
    with Watcher() as watcher:
        watched = rms(x, branch, gate, x.detach(), None)[0]
        long = gradients(x, branch, gate)
    forward = ["pmf::norm_forward", "pmf::swiglu_forward"]
    assert watcher.seen == forward * 2 + ["pmf::swiglu_backward", "pmf::norm_backward"]
    assert torch.equal(plain, watched) and all(map(torch.equal, short, long))


def test_arguments_are_examined_once_a_pass(monkeypatch):
    """Once per Function of a forward pass, with or without gradients, and once per operator of a backward."""
    x, branch, gate = inputs(requires_grad=True)
    examined = []
    ordinary = registration.ordinary
    monkeypatch.setattr(registration, "ordinary", lambda arguments: examined.append(arguments) or ordinary(arguments))
    with torch.no_grad():
        rms(x, branch, gate)
    assert len(examined) == 2
    y, _ = rms(x, branch, gate, x.detach(), None)
    assert len(examined) == 4
    y.sum().backward()
    assert len(examined) == 6


@pytest.mark.parametrize("grad", (True, False))
def test_meta_tensors_get_only_shapes(grad, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else meta tensors, not on CUDA, are refused; they launch nothing
    x, branch, gate = (x.detach().to("meta").requires_grad_(grad) for x in inputs())
    y, y_dot = rms(x, branch, gate, x.detach()[1:], None)
    assert y.is_meta and y.shape == (2, 3, 4) and y.requires_grad == grad
    assert y_dot.is_meta and y_dot.shape == (1, 3, 4)


def test_modes_are_checked_again_after_an_error():
    """After an operator has failed, the next one checks for modes again."""
    x, branch, gate = inputs()

    def fails(*arguments, **options):
        raise ValueError("as it should")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="as it should"):
        patch.setattr(registration, "launch", fails)
        rms(x, branch, gate)
    with torch.no_grad(), Watcher() as watcher:
        rms(x, branch, gate)
    assert watcher.seen == ["pmf::norm_forward", "pmf::swiglu_forward"]


def test_outputs_not_asked_for_are_none_and_to_operators_empty_tensors():
    """A function returns None for them; an operator returns empty tensors, each a different one."""
    x, branch, gate = inputs()
    arguments = (x, branch, gate, *(None,) * 8, False, 1e-6, torch.float32)
    with torch.no_grad():
        outputs = norm.norm_forward(*arguments)
        with Watcher():
            watched = norm.norm_forward(*arguments)
    assert outputs[2] is outputs[3] is watched[2] is watched[3] is None
    outputs = torch.ops.pmf.norm_forward(*arguments)
    assert outputs[2] is not outputs[3] and outputs[2].numel() == outputs[3].numel() == 0


def test_values_without_gradients_and_with_are_the_same():
    x, branch, gate = inputs(requires_grad=True)
    recorded = rms(x, branch, gate, x.detach(), branch.detach())
    with torch.no_grad():
        free = rms(x, branch, gate, x, branch)
    with torch.inference_mode():
        inference = rms(x, branch, gate, x, branch)
    assert recorded[0].requires_grad and not recorded[1].requires_grad
    for pair in (free, inference):
        assert all(map(torch.equal, recorded, pair)) and not any(t.requires_grad for t in pair)


def test_fake_and_meta_tensors_take_no_launch():
    with torch.no_grad():
        with FakeTensorMode():
            assert isinstance(rms(*inputs())[0], FakeTensor)
        with FakeTensorMode() as mode:
            fakes = inputs()
        with mode:
            assert isinstance(rms(*fakes)[0], FakeTensor)
        assert isinstance(rms(*fakes)[0], FakeTensor)


def test_tensors_with_a_lazy_sign():
    x, branch, gate = inputs()
    negative = torch._neg_view(x)
    assert negative.is_neg()
    with torch.no_grad():
        assert torch.equal(rms(negative, branch, gate)[0], rms(-x, branch, gate)[0])


def test_subclasses_are_dispatched():
    """The __torch_dispatch__ of a tensor subclass is called."""

    class Answer(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return NotImplemented

    seen = []
    x = torch.Tensor._make_wrapper_subclass(Answer, (2, 3, 8), device=DEVICE)
    with torch.no_grad(), pytest.raises(TypeError):
        ops.swiglu(x, impl="triton")
    assert any("pmf.swiglu_forward" in name for name in seen)


def test_second_derivatives_are_refused():
    x, branch, gate = inputs(requires_grad=True)
    y, _ = rms(x, branch, gate)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm_modulate: kernels have no second derivatives"):
        dx.sum().backward()


def test_forward_mode_of_torch_func():
    x, branch, gate = inputs()
    value, dot = torch.func.jvp(lambda x, branch: rms(x, branch, gate)[0], (x, branch), (branch, x))
    explicit = rms(x, branch, gate, branch, x)
    assert torch.equal(value, explicit[0]) and torch.equal(dot, explicit[1])


def test_wrappers_of_finished_transforms():
    """A wrapper tensor that outlives its transform acts as the tensor inside it."""
    x, branch, gate = inputs()
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(x)
    with torch.no_grad():
        assert torch.equal(rms(left[0], branch, gate)[0], rms(x, branch, gate)[0])
    recorded = rms(left[0].requires_grad_(), branch, gate)[0]
    assert torch.equal(recorded, rms(x, branch, gate)[0])


def test_selective_checkpoints_may_keep_an_operator():
    def policy(context, op, *args, **kwargs):
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "swiglu" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    seen, (x, branch, gate) = [], inputs(requires_grad=True)
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    y = checkpoint(lambda *p: rms(*p)[0], x, branch, gate, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(y.square().sum(), (x, branch, gate))
    assert any("pmf.norm_forward" in name for name in seen)
    assert all(map(torch.equal, gradients(x, branch, gate), found))


def test_a_graph_holds_a_function_by_its_name():
    x, branch, gate = inputs(requires_grad=True)
    assert "SwiGLU" in rms(x, branch, gate)[0].grad_fn.name()
