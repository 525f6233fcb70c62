"""Layers with `keep_less`: the same numbers with fewer bytes, under whatever runs a layer."""

import copy
import functools
import gc
import threading
import weakref

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import pmf
from pmf import layers
from pmf.counting import live_bytes, operations, saved_bytes
from pmf.dual import Dual
from pmf.layers import keep_less
from pmf.recompute import made_again
from tests.kernels.checks import DEVICE
from tests.pmf.test_compile import fresh_compiler  # noqa: F401
from tests.pmf.test_light import BF16, F32, F64, IMPLS, close, equal

WIDTH, LENGTH, SAMPLES = 32, 7, 3


def drawn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(DEVICE, dtype)


@functools.cache
def tables(rows=LENGTH):
    return {"rope": layers.Rope(*(drawn(rows, WIDTH // 8, seed=i, dtype=F32) for i in (1, 2)))}


LAYERS = {  # the layer, and what else is given to it with tokens x
    "attention": (lambda **o: layers.Attention(WIDTH, 4, qk_norm="rms", rope="adjacent", **o), lambda x: tables()),
    "grouped": (
        lambda **o: layers.Attention(
            WIDTH, 4, num_kv_heads=2, qk_norm="layer", rope="half", prefix_length=2, causal=True, **o
        ),
        lambda x: tables(LENGTH - 2),
    ),
    "across heads": (
        lambda **o: layers.Attention(WIDTH, 4, qk_norm="rms", norm_across_heads=True, rope="half", **o),
        lambda x: tables() | {"key_lengths": torch.tensor([3, 7, 5], device=DEVICE)},
    ),
    "separate": (
        lambda **o: layers.SeparateAttention(WIDTH, 4, qk_norm="rms", rope="adjacent", **o),
        lambda x: tables(),
    ),
    "bare": (lambda **o: layers.Attention(WIDTH, 4, **o), lambda x: {}),
    "gelu": (lambda **o: layers.Mlp(WIDTH, 48, act="gelu", **o), lambda x: {}),
    "swiglu": (lambda **o: layers.Mlp(WIDTH, 44, act="swiglu", bias=False, **o), lambda x: {}),
    "DiT": (
        lambda **o: layers.DiTBlock(WIDTH, 4, qk_norm="rms", rope="adjacent", **o),
        lambda x: tables() | {"c": x.mean(1)},
    ),
    "ViT": (
        lambda **o: layers.ViTBlock(WIDTH, 4, qk_norm=True, init_values=0.5, rope="half", **o),
        lambda x: tables(),
    ),
}
EVERY = pytest.mark.parametrize("name", LAYERS)
SOME = pytest.mark.parametrize("name", ["attention", "gelu", "ViT"])


def pair(name, dtype=F64, **options):
    """The layer, its light copy, and how to call them."""
    make, more = LAYERS[name]
    torch.manual_seed(0)
    plain = make(**options).to(DEVICE, dtype)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    light = copy.deepcopy(plain)
    keep_less(light)
    return plain, light, lambda layer, x: layer(x, **more(x))


def tokens(dtype=F64, seed=3):
    return drawn(SAMPLES, LENGTH, WIDTH, seed=seed, dtype=dtype).requires_grad_()


def gradients(layer, call, x, run=lambda function, x: function(x)):
    """Value, and the gradients of x and all parameters, of `run(layer, x)`."""
    y = run(functools.partial(call, layer), x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def same(impl, found, expected):
    """The reference to the bit, kernels to rounding of float32."""
    if impl == "reference":
        assert equal(found, expected)
    else:
        close(found, expected, 1e-6)


def offloaded(function, x):
    with save_on_cpu():
        return function(x)


def copied(function, x):
    """Hooks that keep something else than what they are given."""
    with saved_tensors_hooks(torch.clone, lambda t: t):
        return function(x)


RUNS = {
    "alone": lambda function, x: function(x),
    "checkpoint": lambda function, x: checkpoint(function, x, use_reentrant=False),
    "two checkpoints": lambda function, x: checkpoint(
        lambda x: checkpoint(function, x, use_reentrant=False), x, use_reentrant=False
    ),
    "save_on_cpu": offloaded,
    "hooks": copied,
    "checkpoint of offloaded": lambda function, x: checkpoint(offloaded, function, x, use_reentrant=False),
}


@IMPLS
@pytest.mark.parametrize("run", RUNS)
@EVERY
def test_layers_under_checkpoints_and_hooks(name, run, impl):
    plain, light, call = pair(name, F64 if impl == "reference" else F32, impl=impl)
    x = tokens(F64 if impl == "reference" else F32)
    same(impl, gradients(light, call, x, RUNS[run]), gradients(plain, call, x))


@IMPLS
@EVERY
def test_reentrant_checkpoints_and_repeated_backward(name, impl):
    """`backward` alone works in the former; the latter twice adds the same gradient."""
    dtype = F64 if impl == "reference" else F32
    plain, light, call = pair(name, dtype, impl=impl)
    expected = gradients(plain, call, tokens(dtype))[1:]
    for backwards, use_reentrant in ((1, True), (2, False)):
        light.zero_grad()
        x = tokens(dtype)
        y = checkpoint(functools.partial(call, light), x, use_reentrant=True) if use_reentrant else call(light, x)
        for _ in range(backwards):
            y.square().sum().backward(retain_graph=True)
        found = [x.grad, *(p.grad for p in light.parameters())]
        same(impl, [f / backwards for f in found], expected)


@IMPLS
@EVERY
def test_gradients_of_some_inputs_and_frozen_parameters(name, impl):
    dtype = F64 if impl == "reference" else F32
    plain, light, call = pair(name, dtype, impl=impl)
    x, names = tokens(dtype), [n for n, _ in plain.named_parameters()]
    for wanted in (names[0], names[-1]):
        found, expected = (
            torch.autograd.grad(call(m, x).square().sum(), m.get_parameter(wanted)) for m in (light, plain)
        )
        same(impl, found, expected)
    for only in ("x", names[0], names[-1]):
        results = []
        for layer in (light, plain):
            layer.requires_grad_(False)
            given = x if only == "x" else x.detach()
            of = given if only == "x" else layer.get_parameter(only).requires_grad_()
            results.append(torch.autograd.grad(call(layer, given).square().sum(), of))
        same(impl, *results)


@EVERY
def test_forward_mode_and_transforms(name):
    plain, light, call = pair(name, impl="reference")
    x, dot = tokens().detach(), drawn(SAMPLES, LENGTH, WIDTH, seed=5)
    found, expected = (pmf.jvp(functools.partial(call, m), (x,), (dot,)) for m in (light, plain))
    assert equal(found, expected)
    found, expected = (torch.func.jvp(functools.partial(call, m), (x,), (dot,)) for m in (light, plain))
    assert equal(found, expected)
    found, expected = (torch.func.vjp(functools.partial(call, m), x)[1](dot) for m in (light, plain))
    assert equal(found, expected)

    def loss(layer, parameters, x):
        return functional_call(layer, parameters, (x,), LAYERS[name][1](x)).square().sum()

    parameters = dict(light.named_parameters())
    found, expected = (torch.func.grad(functools.partial(loss, m))(parameters, x) for m in (light, plain))
    assert equal(list(found.values()), list(expected.values()))


@IMPLS
@EVERY
def test_tangents_and_gradients_of_duals(name, impl):
    """pmf.jvp of a light layer with recorded values: tangents as before, and gradients."""
    dtype = F64 if impl == "reference" else F32
    plain, light, call = pair(name, dtype, impl=impl)
    x, dot = tokens(dtype), drawn(SAMPLES, LENGTH, WIDTH, seed=5, dtype=dtype)
    results = []
    for layer in (light, plain):
        y, y_dot = pmf.jvp(functools.partial(call, layer), (x,), (dot,))
        assert not y_dot.requires_grad
        results.append([y.detach(), y_dot, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert equal(results[0][:2], results[1][:2])
    same(impl, *results)


@EVERY
def test_second_derivatives(name):
    plain, light, call = pair(name, impl="reference")
    results = []
    for layer in (light, plain):
        x = tokens()
        (dx,) = torch.autograd.grad(call(layer, x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()], allow_unused=True))
    assert [f is None for f in results[0]] == [e is None for e in results[1]]
    found, expected = ([g for g in each if g is not None] for each in results)
    close(found, expected, 1e-13)


@EVERY
def test_backward_uses_the_parameters_of_the_forward_pass(name):
    """A layer may have others when backward runs, as after `functional_call`."""
    plain, light, _ = pair(name, F32, impl="triton")
    x, results = tokens(F32), []
    for layer in (light, plain):
        others = {n: (2 * p).detach().requires_grad_() for n, p in layer.named_parameters()}
        y = functional_call(layer, others, (x,), LAYERS[name][1](x))
        results.append(torch.autograd.grad(y.square().sum(), [x, *others.values()]))
    close(*results, 1e-6)


@IMPLS
@pytest.mark.parametrize(("name", "changed"), [("gelu", "fc2.weight"), ("gelu", "fc1.bias")])
def test_a_weight_changed_in_place_is_noticed(name, changed, impl):
    """As it is by a plain layer, which keeps the weights of products and no first bias."""
    _, light, call = pair(name, F32, impl=impl)
    x = tokens(F32)
    y = call(light, x).square().sum()
    with torch.no_grad():
        light.get_parameter(changed).mul_(2)
    if changed == "fc1.bias":
        torch.autograd.grad(y, x)
        return
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed in place"):
        torch.autograd.grad(y, x)


def test_what_is_kept_and_changed_in_place_is_noticed():
    """q, k and v, also where they had been written to before the forward pass."""
    _, light, _ = pair("attention", F32, impl="triton")
    packed = drawn(SAMPLES, LENGTH, 3 * WIDTH, dtype=F32).requires_grad_()
    for changed in (False, True):
        given = (packed * 1).mul_(1)
        y = light.mix(Dual(given), light.weights()[1], **tables()).value.sum()
        if not changed:
            torch.autograd.grad(y, packed)
            continue
        with torch.no_grad():
            given[:, :, -1] = 0
        with pytest.raises(RuntimeError, match=r"in ?place"):
            torch.autograd.grad(y, packed)


@pytest.mark.parametrize(
    ("name", "saved"), [("attention", 2 * WIDTH), ("separate", 2 * WIDTH), ("gelu", 48), ("swiglu", 48)]
)
def test_what_is_made_again_is_not_kept(name, saved):
    """For each token queries and keys, or what the last product of an MLP reads (44 padded to 48)."""
    plain, light, call = pair(name, F32, impl="triton")
    x = tokens(F32)
    kept = [saved_bytes(lambda m=m: call(m, x), m.parameters()) for m in (plain, light)]
    assert kept[0] - kept[1] == SAMPLES * LENGTH * saved * 4


@IMPLS
@EVERY
def test_no_more_is_kept_than_by_a_plain_layer(name, impl):
    plain, light, call = pair(name, F32, impl=impl)
    with torch.autocast(DEVICE, BF16):
        kept = [live_bytes(lambda m=m: call(m, tokens(F32))).end for m in (plain, light)]
    assert kept[1] <= kept[0]


@IMPLS
@EVERY
def test_no_product_is_added_where_little_is_trained(name, impl):
    plain, light, call = pair(name, F32, impl=impl)
    weights = [n for n, p in plain.named_parameters() if p.ndim == 2]
    for trained in weights:
        counts = []
        for layer in (plain, light):
            layer.requires_grad_(False).get_parameter(trained).requires_grad_()
            counts.append(operations(lambda m=layer: call(m, tokens(F32).detach()).sum().backward()))
        assert counts[1] == counts[0], trained


def test_hooks_around_keep_what_queries_and_keys_are_made_of():
    """The hooks get the source of q, k and v once: `save_on_cpu` moves it, and nothing else keeps it."""
    _, light, call = pair("attention", F32, impl="triton")
    packed_shape, given = torch.Size((SAMPLES, LENGTH, 3 * WIDTH)), []

    def pack(x):
        given.append(x)
        return x.clone()

    with saved_tensors_hooks(pack, lambda x: x):
        y = call(light, tokens(F32))
    sources = [x.untyped_storage() for x in given if x.untyped_storage().nbytes() == 4 * packed_shape.numel()]
    assert sources
    del given[:]
    left = [weakref.ref(source) for source in sources]
    del sources
    gc.collect()  # Triton's interpreter leaves cycles
    assert y.requires_grad and not any(ref() for ref in left)


@IMPLS
@EVERY
def test_passes_that_record_nothing(name, impl):
    plain, light, call = pair(name, F32, impl=impl)
    expected, x = call(plain, tokens(F32)), tokens(F32)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(call(light, x), expected)
    kept = [live_bytes(lambda m=m: call(m.requires_grad_(False), x.detach())).end for m in (plain, light)]
    assert kept[1] <= kept[0]


def test_keep_less_is_taken_back():
    plain, light, call = pair("ViT", F32, impl="triton")
    keep_less(light, False)
    kept = [saved_bytes(lambda m=m: call(m, tokens(F32)), m.parameters()) for m in (plain, light)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["ViT", "attention"])
def test_batched_gradients(name):
    """is_grads_batched over a recorded pass, and torch.vmap, where no checkpoint runs: ops choose otherwise in it."""
    plain, light, call = pair(name, impl="reference")
    x, cotangents = tokens(), drawn(4, SAMPLES, LENGTH, WIDTH, seed=8)
    results = []
    for layer in (light, plain):
        y = call(layer, x)
        found = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
        if name == "attention":
            found += (torch.vmap(lambda c, y=y: torch.autograd.grad(y, x, c, retain_graph=True)[0])(cotangents),)
        results.append([*found])
    close(*results, 1e-13)


def test_backward_of_one_graph_in_several_threads():
    """What one of them has made again, the others may have read and dropped."""

    def make(x):
        return Dual(x.value.sin()), Dual(x.value.cos()), Dual(x.value.exp())

    def use(a, b, c):
        return a.value * b.value + a.value * c.value + b.value * c.value

    x = drawn(64, 64).requires_grad_()
    y, expected = made_again(make, use, Dual(x)).sum(), torch.autograd.grad(use(*make(Dual(x))).sum(), x)
    found = []

    def work():
        found.extend(equal(torch.autograd.grad(y, x, retain_graph=True), expected) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200 and all(found)


def test_backward_makes_again_under_the_autocast_of_the_forward_pass():
    weight, x = drawn(8, 8, dtype=F32), drawn(8, 8, seed=1, dtype=F32).requires_grad_()

    def make(x):
        return (Dual(x.value @ weight),)

    results = []
    for way in (lambda: made_again(make, lambda a: a.value.square(), Dual(x)), lambda: make(Dual(x))[0].value.square()):
        with torch.autocast(DEVICE, BF16):
            y = way().sum()
        results.append(torch.autograd.grad(y, x))
    assert equal(*results)
