"""The host runs ahead of the GPU: no step reads a value back, and every copy to the GPU is asynchronous.

Meta tensors stand in for the GPU's: they have shapes but no values, so that reading one raises.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pmf
from pmf.draws import _pinned
from pmf.optim import EMA, OptimizerConfig, build_optimizers
from tests.kernels.checks import DEVICE
from tests.networks import TINY

ATEN = torch.ops.aten
BATCH = 8
ONLY_FM = dict(data_proportion=1.0)
NO_FM = dict(data_proportion=0.0, class_dropout=0.5)


class Copies(TorchDispatchMode):
    """Records copies from the host to the stand-in: (number of values, whether asynchronous)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        host = args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu"
        if func is ATEN._to_copy.default and host and kwargs.get("device", torch.device("cpu")).type == "meta":
            self.seen.append((args[0].numel(), kwargs.get("non_blocking", False)))
        if func is ATEN.copy_.default and args[0].is_meta and not args[1].is_meta and args[1].ndim > 0:
            self.seen.append((args[1].numel(), len(args) > 2 and args[2]))
        return func(*args, **kwargs)


def perceptual(x_hat, x):
    return {"lpips": (x_hat - x).square().mean((1, 2, 3))}


def step_copies(order=slice(None), law=None, **options):
    """Run two whole training steps on the stand-in; return the copies of the second."""
    config = pmf.LossConfig(**(law or {}))
    x = torch.empty(BATCH, *TINY.image_shape, device="meta")
    y = torch.zeros(BATCH, dtype=torch.int64, device="meta")
    draws = pmf.sample_draws(BATCH, TINY.image_shape, config, torch.Generator().manual_seed(0))
    scalars = {name: value[order] for name, value in vars(draws).items()}
    draws = pmf.Draws(**scalars | {"noise": torch.empty_like(x)})
    model = pmf.create_model(TINY, device="meta", **options)
    optimizers, ema = build_optimizers(model, OptimizerConfig()), EMA(model, 1.0)
    for _ in range(2):
        with Copies() as copies:
            out = pmf.pmf_loss(model, x, y, draws, config, perceptual=perceptual)
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            ema.update(model, BATCH, 100)
    assert norm.is_meta and out.terms["loss_u"].is_meta
    return copies.seen


@pytest.mark.parametrize(
    "read", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.cpu()]
)
def test_the_stand_in_notices_a_read(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.ones((), device="meta"))


def test_the_stand_in_notices_a_copy_that_waits():
    with Copies() as copies:
        torch.ones(2).to("meta")
        torch.ones(3).to("meta", non_blocking=True)
        torch.empty(4, device="meta").copy_(torch.ones(4))
    assert copies.seen == [(2, False), (3, True), (4, False)]


@pytest.mark.parametrize(
    "case",
    [
        {},
        dict(law=ONLY_FM),
        dict(law=NO_FM, checkpointing="block"),
        dict(impl="triton"),
        dict(order=torch.arange(BATCH).flip(0)),
    ],
    ids=["lean", "only fm rows", "no fm rows, checkpointed", "triton", "mixed rows"],
)
def test_a_step_reads_nothing_and_waits_for_no_copy(case, monkeypatch):
    pmf.ops.swiglu(torch.zeros(1, 1, 2, device=DEVICE), impl="triton")  # load the kernels as on this machine
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else meta tensors, not on CUDA, are refused; they launch nothing
    copies = step_copies(**case)
    assert all(asynchronous for _, asynchronous in copies)
    assert [values for values, _ in copies[:2]] == [7 * BATCH, 3 * BATCH] and len(copies) == 3


def test_copies_to_cuda_start_from_pinned_memory():
    class Pinning(FakeTensorMode):
        """Records the tensors to pin, also on a machine that cannot pin."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is ATEN._pin_memory.default:
                pinned.append(args[0].clone())
                return pinned[-1]
            return False if func is ATEN.is_pinned.default else func(*args, **kwargs or {})

    pinned, host = [], torch.arange(3)
    with Pinning():
        assert _pinned(host, torch.device("cuda")) is pinned[0]
        assert _pinned(host, torch.device("cpu")) is host
    assert len(pinned) == 1 and torch.equal(pinned[0], host)


def test_draws_on_a_gpu_are_refused():
    draws = pmf.sample_draws(2, TINY.image_shape, pmf.LossConfig())
    draws = pmf.Draws(**vars(draws) | {"fm_mask": torch.empty(2, dtype=torch.bool, device="meta")})
    x, y = torch.zeros(2, *TINY.image_shape), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(pmf.InputError, match=r"draws.fm_mask: expected a tensor on the CPU, got one on meta"):
        pmf.pmf_loss(pmf.create_model(TINY), x, y, draws, pmf.LossConfig())
