"""A residual stream in bfloat16: what it saves, what its rounding costs, and where it is refused."""

import dataclasses
import math

import pytest
import torch

import pmf
from pmf.blocks import Block
from pmf.counting import saved_bytes
from pmf.pair import Dual
from tests.kernels.checks import DEVICE, within_budget
from tests.networks import TINY, model_inputs, random_model, relative_error
from tests.pmf.test_compile import fresh_compiler  # noqa: F401

BATCH, ROWS = 4, 2
CONFIGS = {c: dataclasses.replace(TINY, conditioning=c) for c in ("in_context", "adaln")}
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
STREAMS = ("float32", "bfloat16")
ROUNDING = torch.finfo(BF16).eps / 2
"""The largest relative error of a rounding to the nearest bfloat16."""


def network(config=TINY, dtype=F32, **options):
    """The same random float32 parameters in every dtype."""
    return random_model(config, dtype=F32, **options).to(DEVICE, dtype)


def dual_inputs(dtype=F32):
    """Inputs of `forward_dual`; the last rows have a tangent."""
    inputs = model_inputs(TINY, BATCH, dtype=F32)
    torch.manual_seed(2)
    inputs |= {f"{name}_dot": torch.randn_like(inputs[name][-ROWS:]) for name in ("z", "t", "h")}
    return {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in inputs.items()}


def outcome(model, dtype=F32):
    """u, v, u_dot, and the gradients of all parameters as one vector."""
    with torch.autocast(DEVICE, BF16, enabled=dtype == F32):
        u, v, u_dot = model.forward_dual(**dual_inputs(dtype))
    (u.square().mean() + v.square().mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"u": u.detach(), "v": v.detach(), "u_dot": u_dot, "gradient": gradient}


def kept_by(model):
    """The tensors of the stream's shape, and the bytes, that a pass under autocast saves for backward."""
    shape, kept = (BATCH, model.config.sequence_length, TINY.hidden_size), []
    inputs = {name: value.to(DEVICE) for name, value in model_inputs(TINY, BATCH, dtype=F32).items()}

    def keep(tensor):
        if tensor.shape == shape:
            kept.append(tensor.dtype)
        return tensor

    def run():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return model(**inputs)

    with torch.autocast(DEVICE, BF16):
        run()
        total = saved_bytes(lambda: model(**inputs), model.parameters())
    return kept, total


@pytest.mark.parametrize("conditioning", CONFIGS)
def test_the_saved_stream_takes_half_the_bytes(conditioning):
    """Every norm saves a value of the stream: the two of a block the same one, in four blocks, and one in each head."""
    kept, total = {}, {}
    for stream in STREAMS:
        kept[stream], total[stream] = kept_by(network(CONFIGS[conditioning], impl="triton", stream=stream))
    norms, different, values = 10, 6, BATCH * CONFIGS[conditioning].sequence_length * TINY.hidden_size
    assert kept["float32"].count(F32) == norms and F32 not in kept["bfloat16"]
    assert total["float32"] - total["bfloat16"] == different * values * 2


def test_block_checkpointing_keeps_the_inputs_of_blocks_in_bfloat16():
    kept, _ = kept_by(network(impl="triton", checkpointing="block", stream="bfloat16"))
    assert kept.count(BF16) > 0 and F32 not in kept


@pytest.mark.parametrize("conditioning", CONFIGS)
def test_errors_are_those_of_independent_roundings(conditioning):
    """Each of the n values of the stream is rounded once, its tangent and its gradient too: sqrt(n) times one error.

    The error of bfloat16 products, which is the reference's own with a float32 stream, comes on top.
    """
    config = CONFIGS[conditioning]
    true = outcome(network(config, F64), F64)
    rounded = outcome(network(config, stream="bfloat16"))
    own = outcome(network(config))
    values = 2 * TINY.depth + 1
    for name, value in rounded.items():
        roundings = 2 * values if name == "gradient" else values
        own_error = relative_error(own[name].double(), true[name])
        assert own_error < 0.1, "the truth has other parameters or inputs"
        assert relative_error(value.double(), true[name]) < own_error + math.sqrt(roundings) * ROUNDING, name


@pytest.mark.parametrize("stream", STREAMS)
def test_the_default_is_a_float32_stream(stream):
    model = network(stream=stream)
    found = outcome(model)
    expected = outcome(network())
    assert all(torch.equal(found[name], expected[name]) for name in found) == (stream == "float32")


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_block_checkpointing_changes_no_value_tangent_or_gradient(impl):
    plain, checkpointed = (
        outcome(network(impl=impl, stream="bfloat16", checkpointing=checkpointing))
        for checkpointing in ("none", "block")
    )
    for name, value in checkpointed.items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_compiled_blocks_are_as_exact(checkpointing):
    """Compilers derive their own gradients, so rounding differs: the budget of a kernel beside the eager network's."""
    plain, compiled = (network(stream="bfloat16", checkpointing=checkpointing) for _ in range(2))
    compiled.compile_blocks(backend="aot_eager")
    true = outcome(network(dtype=F64), F64)
    expected = outcome(plain)
    for name, value in outcome(compiled).items():
        assert relative_error(expected[name].double(), true[name]) < 0.1, "the truth has other parameters or inputs"
        within_budget(name, value, expected[name], true[name], peak=False)


@pytest.mark.parametrize("conditioning", CONFIGS)
def test_every_value_and_tangent_of_the_stream_is_bfloat16(conditioning, monkeypatch):
    found, run = [], Block.forward_residual

    def watched(self, residual, *others):
        result = run(self, residual, *others)
        found.extend(part.dtype for x in (residual.x, result.x) for part in x if part is not None)
        return result

    monkeypatch.setattr(Block, "forward_residual", watched)
    with torch.autocast(DEVICE, BF16):
        network(CONFIGS[conditioning], stream="bfloat16").forward_dual(**dual_inputs())
    assert found == [BF16] * (4 * 3 + 2)  # with tangents in the three blocks up to u, without in v's


def test_pmf_jvp_gives_the_same_tangent():
    model, inputs = network(stream="bfloat16"), dual_inputs()
    moving, fixed = ("z", "t", "h"), ("omega", "t_min", "t_max", "y")
    tail = {name: inputs[name][-ROWS:] for name in (*moving, *fixed)}
    with torch.autocast(DEVICE, BF16):
        expected = model.forward_dual(**tail, **{f"{name}_dot": inputs[f"{name}_dot"] for name in moving})

        def u(*given):
            return model(*given, *(tail[name] for name in fixed))[0]

        value, dot = pmf.jvp(u, tuple(tail[n] for n in moving), tuple(inputs[f"{n}_dot"] for n in moving))
    assert torch.equal(value, expected[0]) and torch.equal(dot, expected[2])


def test_a_bfloat16_network_has_one_stream():
    inputs = {k: v.to(BF16) if v.is_floating_point() else v for k, v in model_inputs(TINY, BATCH).items()}
    images = [random_model(dtype=BF16, stream=stream)(**inputs)[0] for stream in STREAMS]
    assert torch.equal(*images)


def test_samples_without_autocast_are_those_of_a_float32_stream():
    models = [random_model(dtype=F32, stream=stream) for stream in STREAMS]
    images = [pmf.generate(model, [0, 3], omega=2.0, t_min=0.1, t_max=0.9) for model in models]
    assert torch.equal(*images)


@pytest.mark.parametrize(("dtype", "autocast"), [(F32, None), (F64, None), (F32, torch.float16)])
def test_a_recorded_pass_with_other_products_is_refused(dtype, autocast):
    model, inputs = random_model(dtype=dtype, stream="bfloat16"), model_inputs(TINY, BATCH, dtype=dtype)
    with (
        pytest.raises(pmf.InputError, match="stream: bfloat16 needs autocast to bfloat16 to record") as error,
        torch.autocast("cpu", autocast, enabled=autocast is not None),
    ):
        model(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stream="float16"), "stream: expected one of .*, got 'float16'"),
        (dict(stream="bfloat16", dtype=F64), "stream: bfloat16 needs dtype float32 or bfloat16, got torch.float64"),
        (dict(stream="bfloat16", dtype=torch.float16), "stream: bfloat16 needs dtype .*, got torch.float16"),
    ],
)
def test_impossible_streams_are_refused(options, message):
    with pytest.raises(pmf.InputError, match=message) as error:
        pmf.create_model(TINY, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_dual_pass_compiles_as_one_graph(impl):
    model = network(dataclasses.replace(TINY, depth=2), impl=impl, stream="bfloat16")
    inputs = dual_inputs()
    z, h = (Dual(inputs[name], inputs[f"{name}_dot"]) for name in ("z", "h"))
    arguments = (z, h, *(inputs[name] for name in ("omega", "t_min", "t_max", "y")))
    with torch.autocast(DEVICE, BF16):
        plain = model.predict_dual(*arguments)
        compiled = torch.compile(model.predict_dual, fullgraph=True, backend="aot_eager")(*arguments)
    for head in plain:
        assert relative_error(compiled[head].value, plain[head].value) < 1e-6
    assert relative_error(compiled["u"].dot, plain["u"].dot) < 1e-6
