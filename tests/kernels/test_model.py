"""The whole network and its loss on the kernels against the reference and the authors' numbers."""

import dataclasses
import re

import pytest
import torch
from torch import Tensor

import pmf
from pmf import dispatch
from pmf.counting import saved_bytes
from tests.kernels.checks import DEVICE, tf32x3, within_budget
from tests.networks import every_row_in_full, golden, model_inputs, random_model, relative_error

DIGITS = pmf.MODELS["pMF-digits"]


ADALN = dataclasses.replace(DIGITS, conditioning="adaln")
CONDITIONINGS = pytest.mark.parametrize("config", (DIGITS, ADALN), ids=("in_context", "adaln"))
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


def on_device(values: dict) -> dict:
    return {name: value.to(DEVICE) for name, value in values.items()}


def network(impl: str, config=DIGITS, rounded=F32, dtype=None, **options):
    """A network whose parameters are all random, gates and heads too; drawn in `rounded`, then cast to `dtype`."""
    return random_model(config, dtype=rounded, impl=impl, **options).to(DEVICE, dtype)


def cast(values: dict, rounded, dtype) -> dict:
    """Floating values rounded to one dtype and kept in another."""
    return {k: v.to(rounded).to(dtype or rounded) if v.is_floating_point() else v for k, v in values.items()}


def dual_inputs(config=DIGITS, rounded=F32, dtype=None, batch=3, rows=2) -> dict:
    """Inputs of `forward_dual` with a tangent for the last rows; the same values in every `dtype`."""
    inputs = model_inputs(config, batch, dtype=F32)
    torch.manual_seed(2)
    inputs["z_dot"] = torch.randn(rows, *config.image_shape)
    inputs["t_dot"], inputs["h_dot"] = torch.ones(rows), torch.ones(rows)
    return on_device(cast(inputs, rounded, dtype))


def gradients(model) -> dict:
    """The gradient of every parameter; fails if one has none."""
    assert all(p.grad is not None for p in model.parameters())
    return {name: p.grad for name, p in model.named_parameters()}


def evenly(*outputs) -> Tensor:
    """A loss whose gradient is of one size for every sample, as the MeanFlow loss's adaptive weight makes it.

    A head divides by its time; in a plain square the sample of the smallest time is all of the gradient.
    """
    return sum(x.double().square().flatten(1).mean(1).log().sum() for x in outputs)


def outcome(impl: str, config=DIGITS, rounded=F32, dtype=None, autocast=None, **options) -> dict:
    """u, v, u_dot and the gradient of every parameter."""
    model = network(impl, config, rounded, dtype, **options)
    with torch.autocast(DEVICE, autocast or BF16, enabled=autocast is not None):
        u, v, u_dot = model.forward_dual(**dual_inputs(config, rounded, dtype))
    assert not u_dot.requires_grad
    evenly(u, v).backward()
    return {"u": u.detach(), "v": v.detach(), "u_dot": u_dot, **gradients(model)}


def by_kind(values: dict) -> dict:
    """Join the gradients of one kind of parameter, over all blocks and both heads, into one vector.

    Rounding errors pass through the whole network, so the reference's error in one entry or one small parameter
    is a matter of chance. Its mean over a kind is not, and a wrong kernel is wrong in every block.
    """
    kinds: dict[str, list] = {}
    for name, value in values.items():
        kind = re.sub(r"^(shared_blocks|head_blocks\.[uv])\.\d+", "block", name)
        kinds.setdefault(re.sub(r"^final_layers\.[uv]", "final", kind), []).append(value.flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


def compare(kernel: dict, reference: dict, truth: dict, steps: int = 1) -> None:
    """Check every value and every kind of gradient against the budget of a single op with `steps` rounding steps."""
    assert kernel.keys() == reference.keys() == truth.keys()
    kernel, reference, truth = (by_kind(values) for values in (kernel, reference, truth))
    for name in kernel:
        # Guards against a truth computed from other parameters or inputs, which would allow any error.
        assert relative_error(reference[name].double(), truth[name]) < 0.1, name
        within_budget(name, kernel[name], reference[name], truth[name], peak=False, steps=steps)


@CONDITIONINGS
@pytest.mark.parametrize(
    ("rounded", "autocast"), ((F32, None), (F32, BF16), (BF16, None)), ids=("float32", "autocast", "bfloat16")
)
def test_network(config, rounded, autocast):
    """Values, the tangent and every parameter's gradient: in float32, under autocast, and cast as a whole."""
    kernel, reference = (outcome(impl, config, rounded, None, autocast) for impl in ("triton", "reference"))
    steps = tf32x3(2) if rounded == F32 else 1  # attention's
    compare(kernel, reference, outcome("reference", config, rounded, F64), steps)


@CONDITIONINGS
def test_network_with_a_bfloat16_stream(config):
    """The kernels round each value of the stream, its tangent and its gradient no more often than the reference."""
    kernel, reference = (outcome(impl, config, F32, None, BF16, stream="bfloat16") for impl in ("triton", "reference"))
    compare(kernel, reference, outcome("reference", config, F32, F64), tf32x3(2))


def loss_gradients(impl: str, config, dtype, autocast: bool, prepare=lambda model: None, **options) -> dict:
    """The loss of one step on the same images and draws, and the gradient of every parameter."""
    model = network(impl, config, F32, dtype, **options)
    prepare(model)
    torch.manual_seed(3)
    draws = pmf.sample_draws(4, config.image_shape, pmf.LossConfig())
    draws = pmf.Draws(**cast(vars(draws), F32, dtype))
    x = (torch.rand(4, *config.image_shape) * 2 - 1).to(DEVICE, dtype)
    y = torch.randint(config.num_classes, (4,), device=DEVICE)
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        loss = pmf.pmf_loss(model, x, y, draws, pmf.LossConfig()).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@CONDITIONINGS
def test_loss_under_autocast(config):
    """The whole loss under bfloat16 autocast: its value and every parameter's gradient."""
    kernel, reference = (loss_gradients(impl, config, F32, True) for impl in ("triton", "reference"))
    compare(kernel, reference, loss_gradients("reference", config, F64, False))


@pytest.fixture(scope="module")
def golden_step():
    """The golden loss on the kernels, with gradients and fields of every row."""
    numbers = golden()
    model = numbers.model(impl="triton").to(DEVICE)
    inputs = (numbers["in/x"].to(DEVICE), numbers["in/y"].to(DEVICE))
    with every_row_in_full():
        output = pmf.pmf_loss(model, *inputs, numbers.draws, pmf.LossConfig(), return_fields=True)
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


def kept(impl: str, dual: bool) -> int:
    """Bytes that a pass under bfloat16 autocast saves for backward, without parameters."""
    model, inputs = network(impl), dual_inputs()
    if not dual:
        inputs = {k: v for k, v in inputs.items() if not k.endswith("_dot")}
    with torch.autocast(DEVICE, BF16):
        return saved_bytes(lambda: model.forward_dual(**inputs), (*model.parameters(), *model.buffers()))


def test_saved_bytes():
    """A tangent saves nothing, and the kernels save less than the reference."""
    kernel, kernel_dual = kept("triton", False), kept("triton", True)
    assert kernel_dual <= kernel
    assert kernel < kept("reference", False)
    assert kernel_dual < kept("reference", True)


def test_every_op_says_once_what_it_runs_on(caplog):
    dispatch.forget_choices()
    with caplog.at_level("INFO", logger="pmf"):
        for _ in range(2):
            network("triton")(**on_device(model_inputs(DIGITS, 1, dtype=torch.float32)))
    for op in ("patch_embed", "norm_modulate", "residual_norm_modulate", "qk_norm_rope", "attention", "swiglu"):
        assert caplog.messages.count(f"{op} runs on triton: requested") == 1


def test_double_precision_is_refused():
    with pytest.raises(pmf.errors.InputError, match="dtype must be float32, bfloat16 or float16"):
        network("triton", dtype=F64)(**on_device(model_inputs(DIGITS, 1)))
