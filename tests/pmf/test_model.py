import dataclasses

import pytest
import torch

import pmf
from pmf.counting import saved_bytes
from pmf.pair import Dual
from pmf.reference.jvp import model_jvp
from tests.kernels.checks import DEVICE
from tests.networks import TINY, model_inputs, random_model, relative_error

CONFIGS = {c: dataclasses.replace(TINY, conditioning=c) for c in ("in_context", "adaln")}
BATCH = 4


def random_tangents(inputs, rows):
    torch.manual_seed(2)
    return {f"{n}_dot": torch.randn_like(inputs[n][BATCH - rows :]) for n in ("z", "t", "h")}


@pytest.mark.parametrize("conditioning", CONFIGS)
@pytest.mark.parametrize("rows", [BATCH, 2, 1, 0])
def test_forward_dual_is_the_jvp_of_forward(conditioning, rows):
    model, inputs = random_model(CONFIGS[conditioning]), model_inputs(TINY, BATCH)
    tangents = random_tangents(inputs, rows)
    u, v, u_dot = model.forward_dual(**inputs, **tangents)
    expected_u, expected_v, expected_dot = model_jvp(model, *inputs.values(), *tangents.values())
    assert relative_error(u, expected_u) < 1e-12
    assert relative_error(v, expected_v) < 1e-12
    assert u_dot.shape == expected_dot.shape == (rows, *TINY.image_shape)
    if rows:
        assert relative_error(u_dot, expected_dot) < 1e-10


def test_the_quotient_rule_holds_on_both_sides_of_the_clip():
    model, inputs = random_model(), model_inputs(TINY, BATCH)
    assert inputs["t"][0] < model.config.t_clip < inputs["t"][1]
    t_dot = torch.ones(BATCH, dtype=torch.float64)
    u, _, u_dot = model.forward_dual(**inputs, t_dot=t_dot)
    assert u_dot[0].abs().max() == 0
    assert relative_error(u_dot[1:], -u[1:] / inputs["t"][1:, None, None, None]) < 1e-13


def test_no_tangent_costs_and_returns_none():
    u, v, u_dot = random_model().forward_dual(**model_inputs(TINY, BATCH))
    assert u_dot is None and u.requires_grad and v.requires_grad


def test_tangent_never_carries_a_gradient():
    model, inputs = random_model(), model_inputs(TINY, BATCH)
    _, _, u_dot = model.forward_dual(**inputs, **random_tangents(inputs, 2))
    assert not u_dot.requires_grad


@pytest.mark.parametrize("conditioning", CONFIGS)
@pytest.mark.parametrize("rows", [BATCH, 2])
def test_tangent_records_nothing(conditioning, rows):
    model, inputs = random_model(CONFIGS[conditioning]), model_inputs(TINY, BATCH)
    tangents = random_tangents(inputs, rows)
    plain = saved_bytes(lambda: model(**inputs), model.parameters())
    dual = saved_bytes(lambda: model.forward_dual(**inputs, **tangents), model.parameters())
    assert dual == plain > 0


def test_an_untrained_network_predicts_black():
    model, inputs = pmf.create_model(TINY).double(), model_inputs(TINY, BATCH)
    u, _ = model(**inputs)
    assert torch.equal(u, inputs["z"] / inputs["t"].clamp(0.05, 1)[:, None, None, None])


def test_inference_network_has_no_v_head():
    model = random_model(aux_head=False)
    u, v = model(**model_inputs(TINY, BATCH))
    assert v is None and u.shape == (BATCH, *TINY.image_shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(z=torch.zeros(BATCH, 2, 8, 9)), r"z: expected shape \[B, 2, 8, 8\], got \[4, 2, 8, 9\]"),
        (dict(z=torch.full((BATCH, 2, 8, 8), torch.nan)), "z: expected finite images, got NaN or infinity"),
        (dict(y=torch.tensor([0, 1, 6, 2])), r"y: expected labels in \[0, 5\], got 0 to 6"),
        (dict(y=torch.zeros(BATCH)), "y: expected int64 class labels, got torch.float32"),
        (dict(h=torch.full((BATCH,), 2.0)), r"h: expected h = t - r in \[0, t\]"),
        (dict(t=torch.full((BATCH,), 1.5)), r"t: expected times in \[0, 1\]"),
        (dict(omega=torch.full((BATCH,), 0.5)), r"omega: expected guidance scales >= 1, got 0.5"),
        (dict(omega=torch.ones(3)), r"omega: expected shape \[4\], got \[3\]"),
        (dict(t_max=torch.full((BATCH,), -1.0)), r"t_max: expected times in \[0, 1\]"),
        (dict(z_dot=torch.zeros(5, 2, 8, 8)), "z_dot must have shape .* with at most 4 rows"),
        (dict(h_dot=torch.zeros(2, 1)), r"h_dot must have shape \[2\]"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(change, message):
    inputs = model_inputs(TINY, BATCH, dtype=torch.float32)
    with pytest.raises(pmf.InputError, match=message) as error:
        random_model(dtype=torch.float32).forward_dual(**(inputs | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(t=0.5), "t: expected a tensor, got float"),
        (dict(z=[1.0]), "z: expected a tensor, got list"),
        (dict(y=3), "y: expected a tensor, got int"),
    ],
)
def test_inputs_are_tensors(change, message):
    model, inputs = random_model(dtype=torch.float32), model_inputs(TINY, BATCH, dtype=torch.float32) | change
    scale = torch.ones(())
    moving = lambda **given: pmf.jvp(lambda s: model(**given | dict(h=s * given["h"])), (scale,), (scale,))  # noqa: E731
    for run in (model, model.forward_dual, moving):
        with pytest.raises(pmf.InputError, match=f"^{message}$"):
            run(**inputs)
    good = model_inputs(TINY, BATCH, dtype=torch.float32)
    with pytest.raises(pmf.InputError, match=r"^t_dot: expected a tensor, got float$"):
        model.forward_dual(**good, t_dot=1.0)


@pytest.mark.parametrize(("name", "asked"), [("heads", ("w",)), ("heads", None), ("tangents", ("w",))])
def test_heads_are_known(name, asked):
    inputs = model_inputs(TINY, BATCH, dtype=torch.float32)
    given = [inputs[part] for part in ("z", "h", "omega", "t_min", "t_max", "y")]
    with pytest.raises(pmf.InputError, match=rf"^{name}: expected some of \('u', 'v'\), got "):
        random_model(dtype=torch.float32).predict_dual(*given, **{name: asked})
    with pytest.raises(pmf.InputError, match=r"^heads: expected some of \('u',\), got \('u', 'v'\)$"):
        random_model(dtype=torch.float32, aux_head=False).predict_dual(*given)


def test_other_numbers_of_tokens_are_no_images():
    with pytest.raises(pmf.InputError, match=r"^unpatchify: tokens must be as many as a square grid has, got 3$"):
        random_model().to_images(torch.randn(2, 3, 4))


def test_unknown_preset_and_impl_are_refused():
    with pytest.raises(pmf.InputError, match="unknown preset 'pMF-Z'"):
        pmf.create_model("pMF-Z")
    with pytest.raises(pmf.InputError, match="impl: expected one of"):
        pmf.create_model(TINY, impl="fast")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rotary_tables_stay_exact_in_any_dtype(dtype):
    model = pmf.create_model(TINY)
    cos = model.rope_cos.clone()
    assert model.to(dtype).rope_cos.dtype == torch.float32 and torch.equal(model.rope_cos, cos)


def test_bfloat16_autocast_runs_and_agrees_roughly_with_float32():
    model, inputs = random_model(dtype=torch.float32), model_inputs(TINY, BATCH, dtype=torch.float32)
    tangents = random_tangents(inputs, 2)
    exact = model.forward_dual(**inputs, **tangents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model.forward_dual(**inputs, **tangents)
    for low, high in zip(rounded, exact, strict=True):
        assert relative_error(low.float(), high) < 0.05


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_dual_pass_compiles_as_one_graph(impl):
    config = dataclasses.replace(TINY, depth=2)
    model = random_model(config, dtype=torch.float32, impl=impl).to(DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in model_inputs(config, 3, dtype=torch.float32).items()}
    h, z = Dual(inputs["h"], torch.ones(2, device=DEVICE)), Dual(inputs["z"], inputs["z"][1:].flip(0))
    arguments = (z, h, *(inputs[name] for name in ("omega", "t_min", "t_max", "y")))
    plain = model.predict_dual(*arguments)
    compiled = torch.compile(model.predict_dual, fullgraph=True, backend="aot_eager")(*arguments)
    for head in plain:
        assert relative_error(compiled[head].value, plain[head].value) < 1e-6
    assert relative_error(compiled["u"].dot, plain["u"].dot) < 1e-6
    assert compiled["u"].value.requires_grad and not compiled["u"].dot.requires_grad
