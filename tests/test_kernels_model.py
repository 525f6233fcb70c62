"""The whole network and its loss on the kernels, against the reference and the authors' numbers."""

import pytest
import torch

import pmf
from pmf import ops
from tests.kernel_checks import DEVICE, within_budget
from tests.networks import golden, model_inputs, random_model, relative_error

DIGITS = pmf.MODELS["pMF-digits"]


def on_device(values: dict) -> dict:
    return {name: value.to(DEVICE) for name, value in values.items()}


def digits(impl: str, dtype=torch.float32):
    """pMF-digits with random gates and heads; few blocks keep the interpreter quick."""
    return random_model(DIGITS, dtype=dtype, impl=impl).to(DEVICE)


def dual_inputs(dtype=torch.float32, batch=3, rows=2) -> dict:
    """Inputs of `forward_dual` with a tangent for the last rows; the same values in every dtype."""
    inputs = model_inputs(DIGITS, batch, dtype=torch.float32)
    torch.manual_seed(2)
    inputs["z_dot"] = torch.randn(rows, *DIGITS.image_shape)
    inputs["t_dot"], inputs["h_dot"] = torch.ones(rows), torch.ones(rows)
    return on_device({k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})


def outcome(impl: str, dtype, autocast=None):
    """u, v, u_dot and the gradient of every parameter."""
    model = digits(impl, dtype)
    with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
        u, v, u_dot = model.forward_dual(**dual_inputs(dtype))
    assert not u_dot.requires_grad
    (u.square().mean() + v.square().mean()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"u": u.detach(), "v": v.detach(), "u_dot": u_dot, **gradients}


@pytest.mark.parametrize("autocast", (None, torch.bfloat16), ids=("float32", "bfloat16"))
def test_digits(autocast):
    """Values, the tangent and every parameter's gradient within the budget of a single op."""
    kernel, reference = outcome("triton", torch.float32, autocast), outcome("reference", torch.float32, autocast)
    truth = outcome("reference", torch.float64)
    assert kernel.keys() == reference.keys() == truth.keys()
    for name in kernel:
        within_budget(name, kernel[name], reference[name], truth[name])


@pytest.fixture(scope="module")
def golden_step():
    """The golden loss on the kernels, with gradients and fields; the naive plan fills every row."""
    numbers = golden()
    model = numbers.model(impl="triton").to(DEVICE)
    inputs = (numbers["in/x"].to(DEVICE), numbers["in/y"].to(DEVICE))
    output = pmf.pmf_loss(model, *inputs, numbers.draws, pmf.LossConfig(), plan="naive", return_fields=True)
    output.loss.backward()
    return numbers, model, output


def test_golden_loss(golden_step):
    numbers, _, output = golden_step
    assert relative_error(output.loss.detach().cpu(), numbers["out/loss"]) < 1e-5
    for name, field in output.fields.items():
        assert relative_error(field.cpu(), numbers[f"out/{name}"]) < 1e-5, name


def test_golden_gradients(golden_step):
    numbers, model, _ = golden_step
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
    expected = {k.removeprefix("grad/"): numbers[k] for k in numbers.arrays if k.startswith("grad/")}
    for name, gradient in pmf.convert_official_state_dict(expected).items():
        assert relative_error(gradients[name], gradient) < 1e-4, name


def saved_bytes(impl: str, dual: bool) -> int:
    """Bytes kept for backward, parameters aside; a storage counts once."""
    model, inputs = digits(impl), dual_inputs()
    if not dual:
        inputs = {k: v for k, v in inputs.items() if not k.endswith("_dot")}
    ours = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    # The tensors are held, so that no address is used twice.
    storages, held = {}, []

    def pack(tensor):
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autocast(DEVICE, torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        results = model.forward_dual(**inputs)
    del results
    return sum(storages.values())


def test_saved_bytes():
    """A tangent saves nothing, and the kernels save less than the reference."""
    kernel, kernel_dual = saved_bytes("triton", False), saved_bytes("triton", True)
    assert kernel_dual <= kernel
    assert kernel < saved_bytes("reference", False)
    assert kernel_dual < saved_bytes("reference", True)


def test_ops_without_a_kernel_say_so(caplog):
    """impl="triton" runs ops that have no kernel on the reference, and says so once."""
    ops._report.cache_clear()
    with caplog.at_level("INFO", logger="pmf"):
        for _ in range(2):
            digits("triton")(**on_device(model_inputs(DIGITS, 1, dtype=torch.float32)))
    lines = caplog.messages
    assert "norm_modulate runs on triton: requested" in lines
    for op in ("patch_embed", "attention"):
        if f"{op}_dual" not in ops.KERNEL_MODULES:
            assert lines.count(f"{op} runs on reference: this op has no Triton kernel yet") == 1


def test_double_precision_is_refused():
    with pytest.raises(pmf.errors.InputError, match="dtype must be float32, bfloat16 or float16"):
        digits("triton", torch.float64)(**on_device(model_inputs(DIGITS, 1)))
