"""Tests that need a GPU, skipped elsewhere: run `pytest -m gpu` first on a machine with one.

They cover every op at the sizes of the published networks, every attention library that runs here, whole steps, the
Sampler's graph, memory, and a short training run. tests/kernels covers the other sizes and options.
"""

import contextlib
import dataclasses
import json
import math

import pytest
import torch

import pmf
from pmf import noise, ops
from pmf.kernels import flash
from pmf.memory import training_memory
from pmf.noise import seeded_noise
from pmf.wide import wide_linear
from tests.kernels import test_attention as attention
from tests.kernels import test_masked_attention as masked_attention
from tests.kernels import test_model as networks
from tests.kernels import test_norm as norm
from tests.kernels import test_objective as objective
from tests.kernels import test_patch as patch
from tests.kernels import test_pointwise as pointwise
from tests.kernels import test_rotary as rotary
from tests.kernels.checks import DEVICE, check, evaluate, tf32x3, within_budget
from tests.networks import every_row_in_full, golden, random_model, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")]

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
DTYPES = pytest.mark.parametrize("dtype", (F32, BF16), ids=("float32", "bfloat16"))
BLOCKS = pytest.mark.parametrize(("width", "head_dim"), ((768, 64), (1280, 80)), ids=("B", "H"))
TOKENS, PREFIX = 276, 20

NARROW = dataclasses.replace(
    pmf.MODELS["pMF-H/16"], hidden_size=160, num_heads=2, depth=2, aux_head_depth=1, num_classes=10, bottleneck=64
)
"""A network with the published sequence length and head width, few narrow blocks, and an MLP width to pad."""
SHALLOW = dataclasses.replace(networks.DIGITS, depth=2, aux_head_depth=1)
SETTING = dict(omega=2.0, t_min=0.1, t_max=0.9)


@contextlib.contextmanager
def as_users_run():
    """Undo the tests' deterministic mode: no NaN in allocations, and PyTorch's default choice of operators."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


# Every op: value, tangent and gradients against the reference in float64.


@pytest.mark.parametrize(
    "dtypes", ((F32, F32, F32), (F32, BF16, F32), (BF16, BF16, BF16)), ids=("f32", "mixed", "bf16")
)
@pytest.mark.parametrize("layout", ("channel", "sample", "token"))
@BLOCKS
def test_norms(width, head_dim, layout, dtypes):
    """Of the published block, of adaLN, per token; mixed: a float32 stream under bfloat16 autocast."""
    modulation = "absent" if layout == "channel" else layout
    autocast = BF16 if dtypes[:2] == (F32, BF16) else None
    for residual, mode in ((True, "partial"), (False, "full"), (True, "none")):
        layouts = (layout, "channel", modulation, modulation)
        primals, tangents = norm.inputs(residual, 2, TOKENS, width, layouts, mode, dtypes, 0)
        check(norm.op_of(residual), primals, tangents, autocast=autocast)
        if mode == "partial":  # a tangent of the branch only
            check(norm.op_of(True), primals, (None, tangents[1], *[None] * 4), autocast=autocast)


@pytest.mark.parametrize(("width", "values"), ((768, 768), (1280, 3072)), ids=("B/16", "H/32"))
def test_products_that_give_float32(width, values):
    """The final Linear under autocast: bfloat16 operands, float32 sums and result; gradients rounded once."""
    torch.manual_seed(0)
    x = torch.randn(3, 256, width, device=DEVICE, dtype=BF16, requires_grad=True)
    weight = (torch.randn(values, width, device=DEVICE) / width**0.5).requires_grad_()
    dy = torch.randn(3, 256, values, device=DEVICE)
    with torch.autocast("cuda", BF16):
        y = wide_linear(x, weight)
    y.backward(dy)
    low, w, d = x.detach().double(), weight.detach().to(BF16).double(), dy.to(BF16).double().flatten(0, 1)
    assert y.dtype == F32 and relative_error(y.double(), low @ w.T) < 1e-6
    assert relative_error(x.grad.double().flatten(0, 1), d @ w) < 2**-8
    assert relative_error(weight.grad.double(), d.T @ low.flatten(0, 1)) < 2**-8


@DTYPES
@pytest.mark.parametrize("width", (2048, 2730, 3416))
def test_swiglu_and_gelu(width, dtype):
    for rows in (0, 2, 3):
        check("swiglu", *pointwise.inputs(3, TOKENS, width, rows, dtype))
        for approximate in ("none", "tanh"):
            check("gelu", *pointwise.inputs(3, TOKENS, width, rows, dtype), approximate=approximate)


@DTYPES
@BLOCKS
def test_qk_norm_rope(width, head_dim, dtype):
    for rows in (0, 1, 2):
        case = rotary.inputs(2, TOKENS, width // head_dim, head_dim, rows, (dtype, F32), PREFIX)
        check("qk_norm_rope", *case, prefix_length=PREFIX, fixed=rotary.TABLES)


@DTYPES
@pytest.mark.parametrize(
    ("size", "side", "bottleneck", "width"), ((16, 256, 128, 768), (16, 256, 256, 1280), (32, 512, 256, 1280))
)
def test_patch_embed(size, side, bottleneck, width, dtype):
    options = dict(bottleneck=bottleneck, width=width, prefix=PREFIX)
    primals, tangents = patch.inputs(2, size, (side, side), rows=1, dtype=dtype, **options)
    for moving in (tangents, (None,) * 7):
        check("patch_embed", primals, moving, products=(patch.SECOND_WEIGHT,))


@DTYPES
@pytest.mark.parametrize(("size", "side"), ((16, 256), (32, 512)))
def test_objective(size, side, dtype):
    for rows, guided in ((2, 1), (0, 2), (None, None)):
        objective.check(objective.inputs(4, rows, guided, size, side, nets=dtype), size)


# Attention: every library for its value that runs here.


def heads(head_dim, dtype, rows=1, length=TOKENS):
    return attention.inputs(2, length, length, head_dim, rows, dtype)


@pytest.fixture(params=flash.BACKENDS)
def backend(request, head_dim):
    """Every known backend that can run here."""
    major, minor = torch.cuda.get_device_capability()
    reason = flash.obstacle(request.param, "cuda", "torch.bfloat16", 10 * major + minor, head_dim)
    if reason is not None:
        pytest.skip(f"{request.param} {reason}")
    with ops.use_attention_backend(request.param):
        yield request.param


@pytest.mark.parametrize("head_dim", (64, 80))
def test_every_attention_library(backend, head_dim):
    """Value, tangent and gradients; with some, none and single tangents; lengths below and above one tile."""
    primals, tangents = heads(head_dim, BF16)
    check("attention", primals, tangents)
    check("attention", primals, (None, tangents[1], None))
    check("attention", *heads(head_dim, BF16, rows=None, length=1030))
    check("attention", *attention.inputs(2, 70, 33, head_dim, 2, torch.float16))
    for kind in masked_attention.KINDS:
        if "lengths" not in kind or backend == "efficient":
            *parts, options = masked_attention.problem(kind, 3, TOKENS, 33, (6, 2), head_dim, 2, BF16)
            check("attention", *parts, **options)


@pytest.mark.parametrize("head_dim", (64, 80))
def test_the_log_sum_exp_of_every_attention_library(backend, head_dim):
    """Its error becomes a relative error of the tangent's probabilities: it must be far below their rounding."""
    q, k, v = heads(head_dim, BF16)[0]
    for causal in (False, True):
        lse = flash.attention(q, k, v, 0.1, causal)[1]
        scores = 0.1 * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double())
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        truth = torch.logsumexp(scores.masked_fill(later, -torch.inf) if causal else scores, -1)
        assert lse.dtype == F32 and lse.shape == truth.shape
        assert (lse - truth).abs().max() < torch.finfo(BF16).eps / 64


@pytest.mark.parametrize("head_dim", (64, 80))
def test_attention_in_float32(head_dim):
    """Its own budget: PyTorch's memory-efficient attention computes a product as three TF32 products.

    The value takes two products. The tangent also reads the log-sum-exp, a third. A gradient takes three, and is the
    difference of two sums.
    """
    primals, tangents = heads(head_dim, F32)
    run = [evaluate("attention", primals, tangents, None, impl=impl) for impl in ("triton", "reference")]
    run.append(evaluate("attention", primals, tangents, run[0][3], impl="reference", dtype=F64))
    for what, products, *results in zip(("value", "tangent", "gradient"), (2, 3, 6), *run, strict=False):
        for parts in zip(*results, strict=True):
            errors = [relative_error(part.double(), parts[2].double()) for part in parts[:2]]
            print(f"{what}: relative error {errors[0]:.2e}, the reference's {errors[1]:.2e}")
            within_budget(what, *parts, steps=tf32x3(products))


# Whole networks.


@pytest.mark.parametrize("conditioning", ("in_context", "adaln"))
@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "autocast"))
def test_loss(conditioning, autocast):
    """Loss and every gradient on both implementations: under autocast within the budget, in float32 to 1e-4."""
    config = dataclasses.replace(NARROW, conditioning=conditioning)
    kernel, reference = (networks.loss_gradients(impl, config, F32, autocast) for impl in ("triton", "reference"))
    truth = networks.loss_gradients("reference", config, F64, False)
    if autocast:
        return networks.compare(kernel, reference, truth)
    kernel, reference, truth = (networks.by_kind(values) for values in (kernel, reference, truth))
    for name in truth:
        assert relative_error(kernel[name].double(), truth[name]) < 1e-4, name
        assert relative_error(reference[name].double(), truth[name]) < 1e-4, name


@pytest.mark.parametrize("impl", ("triton", "reference"))
def test_golden_numbers(impl):
    """The authors' loss, fields, gradients and samples."""
    numbers = golden()
    model = numbers.model(impl=impl).to(DEVICE)
    x, y = numbers["in/x"].to(DEVICE), numbers["in/y"].to(DEVICE)
    with every_row_in_full():
        out = pmf.pmf_loss(model, x, y, numbers.draws, pmf.LossConfig(), return_fields=True)
    out.loss.backward()
    for name, value in {"loss": out.loss.detach(), **out.fields}.items():
        assert relative_error(value.cpu(), numbers[f"out/{name}"]) < 1e-5, name
    expected = {k.removeprefix("grad/"): numbers[k] for k in numbers.arrays if k.startswith("grad/")}
    for name, gradient in pmf.convert_official_state_dict(expected).items():
        assert relative_error(model.get_parameter(name).grad.cpu(), gradient) < 1e-4, name
    setting = {name: numbers.sampling[name] for name in SETTING}
    for steps in (1, 2):
        images = pmf.generate(model, y, noise=numbers["in/noise"], steps=steps, **setting)
        assert relative_error(images.cpu(), numbers[f"out/sample_{steps}nfe"]) < 1e-5


def same_step(prepare, **options):
    """Check that a step is as accurate with `prepare` and options as without, in float32 against float64."""
    plain = networks.loss_gradients("triton", SHALLOW, F32, False)
    truth = networks.loss_gradients("reference", SHALLOW, F64, False)
    networks.compare(networks.loss_gradients("triton", SHALLOW, F32, False, prepare, **options), plain, truth)


def test_compiled_blocks():
    same_step(lambda model: model.compile_blocks())


def test_block_checkpointing():
    same_step(lambda model: None, checkpointing="block")


@pytest.mark.parametrize(("shape", "at_once"), (((3, 256, 256), 2**24), ((3, 5, 7), 2**10)))
def test_seeded_noise_has_the_bits_of_the_cpu(shape, at_once, monkeypatch):
    monkeypatch.setattr(noise, "_AT_ONCE", at_once)
    seeds = [0, 7, 2**32 - 1] * 30  # more than one chunk
    seeded_noise(seeds, shape, DEVICE)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = seeded_noise(seeds, shape, DEVICE)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(made.cpu(), seeded_noise(seeds, shape))
    assert torch.equal(seeded_noise(seeds, shape, out=torch.empty_like(made)), made)


@pytest.mark.parametrize("steps", (1, 2))
@pytest.mark.parametrize(("dtype", "bound"), ((F32, 1e-5), (BF16, 2e-2)), ids=("float32", "bfloat16"))
def test_the_samplers_graph_draws_the_images_of_generate(dtype, bound, steps):
    """Also for several batches, one of them not full, with changed weights and next to another sampler."""
    model = random_model(SHALLOW, dtype=dtype, aux_head=False).to(DEVICE)
    samplers = [pmf.Sampler(model, size, steps=steps, **SETTING) for size in (3, 4)]
    labels, seeds = [3, 1, 4, 1, 5, 9, 2], range(10, 17)
    for _ in range(2):
        expected = pmf.generate(model, labels, seeds=seeds, steps=steps, **SETTING)
        for sampler in (*samplers, samplers[0]):
            assert relative_error(sampler(labels, seeds=seeds), expected.float()) < bound
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)


def judge(x_hat, x):
    """A perceptual term: any function of the images."""
    return {"lpips": (x_hat - x).square().mean((1, 2, 3))}


@pytest.mark.parametrize("perceptual", (None, judge), ids=("alone", "perceptual"))
def test_captured_steps_are_the_plain_ones(perceptual):
    """Loss and gradients in float32, for several step sizes in turn and weights changed between calls."""
    model, config = random_model(SHALLOW, dtype=F32).to(DEVICE), pmf.LOSSES["pMF-digits"]
    captured = pmf.CapturedStep(model, config)
    generator = torch.Generator().manual_seed(0)
    for batch in (24, 24, 16, 24, 24, 16):
        x = torch.rand(batch, *model.config.image_shape, generator=generator).to(DEVICE)
        y = torch.randint(10, (batch,), generator=generator).to(DEVICE)
        draws = pmf.sample_draws(batch, x.shape[1:], config, generator, DEVICE)
        model.zero_grad()
        out = captured(x, y, draws, perceptual)
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        plain = pmf.pmf_loss(model, x, y, draws, config, perceptual)
        plain.loss.backward()
        assert relative_error(out.loss, plain.loss.detach()) < 1e-5
        expected = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert relative_error(torch.cat([g.flatten() for g in found]), expected) < 1e-4
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.95)
    assert len(captured._halves) > 2


def test_captured_steps_of_all_sizes_share_their_memory():
    """After captures of two step sizes, the reserved memory is at most 1.1 times that of a plain step."""
    with as_users_run():
        model, config = pmf.create_model("pMF-B/16", device=DEVICE), pmf.LOSSES["pMF-B/16"]

        def reserved(step, seeds):
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            for seed in seeds:
                generator = torch.Generator().manual_seed(seed)
                x = torch.zeros(32, *model.config.image_shape, device=DEVICE)
                y = torch.zeros(32, dtype=torch.int64, device=DEVICE)
                with torch.autocast(DEVICE, BF16):
                    step(x, y, pmf.sample_draws(32, x.shape[1:], config, generator, DEVICE))
                model.zero_grad()
            return torch.cuda.memory_reserved() - before

        plain = reserved(lambda *inputs: pmf.pmf_loss(model, *inputs, config).loss.backward(), range(4))
        captured = pmf.CapturedStep(model, config)
        taken = reserved(captured, range(4))
    assert len(captured._halves) > 1
    print(f"reserved: {plain / 1e9:.2f} GB plain, {taken / 1e9:.2f} GB captured")
    assert taken <= 1.1 * plain


# Cost of a step, and a short training run.


def ready_step(size, batch, **options):
    """A function that runs one training step of a network under autocast, on images that are on the GPU already."""
    model, config = pmf.create_model(size, device=DEVICE, **options), pmf.LOSSES[size]
    x = torch.rand(batch, *model.config.image_shape, device=DEVICE) * 2 - 1
    y = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    generator = torch.Generator().manual_seed(0)

    def step():
        draws = pmf.sample_draws(batch, model.config.image_shape, config, generator, DEVICE)
        with torch.autocast(DEVICE, BF16):
            loss = pmf.pmf_loss(model, x, y, draws, config).loss
        loss.backward()
        model.zero_grad(set_to_none=False)
        return loss.detach()

    return step


def test_no_step_waits_for_the_gpu():
    with as_users_run():
        step = ready_step("pMF-digits", 8)
        for _ in range(3):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = [step() for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(math.isfinite(loss) for loss in losses)


def peak(size, batch, **options):
    """Peak bytes allocated by a warm step."""
    step = ready_step(size, batch, **options)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("checkpointing", ["none", "light"])
def test_a_step_takes_the_memory_that_was_counted(checkpointing):
    """Buffers inside of operators are at most a twentieth of the memory that grows with the batch."""
    with as_users_run():
        few, many = (peak("pMF-B/16", batch, checkpointing=checkpointing) for batch in (16, 64))
    counted = training_memory("pMF-B/16", checkpointing, device="cuda")
    live, saved = 48 * counted.per_row, 48 * counted.saved_per_row
    print(f"48 more rows: {(many - few) / 1e9:.3f} GB, live {live / 1e9:.3f} GB, saved {saved / 1e9:.3f} GB")
    assert saved <= many - few <= 1.05 * live


def test_a_run_on_digits_learns(tmp_path):
    """100 steps of the preset in bfloat16: nothing is skipped, and the loss falls by a third."""
    from pmf.train.config import RunConfig
    from pmf.train.demo import digits
    from pmf.train.loop import Trainer

    with as_users_run():
        out = tmp_path / "run"
        model, loss = networks.DIGITS, pmf.LOSSES["pMF-digits"]
        config = RunConfig(out=out, model=model, loss=loss, steps=100, batch_size=64, device=DEVICE)
        trainer = Trainer(config, digits()[0])
        trainer.run()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = torch.tensor([line["loss_u"] + line["loss_v"] for line in lines])
    assert len(losses) == 100 and losses.isfinite().all() and trainer.skipped == 0
    assert losses[-20:].mean() < 0.67 * losses[:20].mean()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
