import contextlib
import dataclasses
import math

import pytest
import torch

import pmf
from pmf.counting import saved_bytes
from pmf.reference import loss as reference
from pmf.step_plan import StepPlan
from tests.networks import TINY, every_row_in_full, golden, random_model, relative_error

LOSS = pmf.LossConfig()


def step_inputs(batch, loss_config=LOSS, seed=0, dtype=torch.float64):
    """x, y and draws of one step of the tiny network."""
    torch.manual_seed(seed)
    draws = pmf.sample_draws(batch, TINY.image_shape, loss_config)
    floats = {f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)}
    floats = {n: v.to(dtype) if v.is_floating_point() else v for n, v in floats.items()}
    x = torch.rand(batch, *TINY.image_shape, dtype=dtype) * 2 - 1
    return x, torch.randint(TINY.num_classes, (batch,)), pmf.Draws(**floats)


def gradients(model, *arguments, **options):
    model.zero_grad()
    out = pmf.pmf_loss(model, *arguments, **options)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def oracle(model, *arguments, **options):
    """The loss as the paper writes it, and its gradients."""
    model.zero_grad()
    loss = reference.pmf_loss(model, *arguments, **options)
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


PLANS = {"lean": contextlib.nullcontext, "every row": every_row_in_full}


def check_golden_gradients(grads):
    for name, grad in pmf.export_official_state_dict(grads, golden().config).items():
        if name != "net.rope_freqs":
            assert relative_error(grad, golden()[f"grad/{name}"]) < 5e-6, name


@pytest.mark.parametrize("plan", PLANS)
def test_golden_loss_fields_and_gradients(plan):
    g = golden()
    with PLANS[plan]():
        out, grads = gradients(g.model(), g["in/x"], g["in/y"], g.draws, LOSS, return_fields=True)
    read = ~g.draws.fm_mask if plan == "lean" else slice(None)
    not_null = ~(g.draws.fm_mask & g.draws.drop_mask) if plan == "lean" else slice(None)
    rows = {"du_dt": read, "v_c": not_null}
    for name, field in out.fields.items():
        which = rows.get(name, slice(None))
        assert relative_error(field[which], g[f"out/{name}"][which]) < 5e-6, name
    assert out.loss.item() == pytest.approx(g["out/loss"].item(), rel=1e-6)
    for name in ("loss_u", "loss_v"):
        assert out.terms[name].item() == pytest.approx(g[f"out/{name}"].item(), rel=1e-5)
    check_golden_gradients(grads)


@pytest.mark.parametrize("differentiate", [reference.model_jvp, pmf.PMFDiT.forward_dual])
def test_the_oracle_gives_the_golden_numbers(differentiate):
    g = golden()
    fields = reference.pmf_fields(g.model(), g["in/x"], g["in/y"], g.draws, differentiate)
    for name in ("z_t", "v_c", "v_g", "u", "du_dt", "v"):
        assert relative_error(getattr(fields, name), g[f"out/{name}"]) < 5e-6, name
    loss, grads = oracle(g.model(), g["in/x"], g["in/y"], g.draws, LOSS, differentiate)
    assert loss.item() == pytest.approx(g["out/loss"].item(), rel=1e-6)
    for name, errors in zip(("loss_u", "loss_v"), reference.squared_errors(fields), strict=True):
        assert errors.mean().item() / g["in/x"][0].numel() == pytest.approx(g[f"out/{name}"].item(), rel=1e-5)
    check_golden_gradients(grads)


@pytest.mark.parametrize("plan", PLANS)
def test_loss_equals_the_reference_loss(plan):
    """pmf_loss against the equations of the method with torch.func.jvp."""
    config = dataclasses.replace(LOSS, class_dropout=0.4, norm_p=0.7)
    x, y, d = step_inputs(8, config, seed=3)
    assert d.drop_mask.any() and (~d.fm_mask).any()
    model = random_model(dataclasses.replace(TINY, noise_scale=2.0))
    loss, expected = oracle(model, x, y, d, config)
    loss_u, _ = reference.squared_errors(reference.pmf_fields(model, x, y, d))
    with PLANS[plan]():
        out, grads = gradients(model, x, y, d, config)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert out.terms["loss_u"].item() == pytest.approx(loss_u.mean().item() / x[0].numel(), rel=1e-11)
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) < 1e-9, name


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "change",
    [{}, dict(data_proportion=0.0), dict(data_proportion=1.0), dict(class_dropout=1.0)],
    ids=["published", "no fm rows", "only fm rows", "all dropped"],
)
def test_the_lean_loss_is_the_oracle(batch, change):
    config = dataclasses.replace(LOSS, **change)
    x, y, draws = step_inputs(batch, config, seed=batch)
    model = random_model()
    loss, expected = oracle(model, x, y, draws, config)
    lean, grads = gradients(model, x, y, draws, config)
    assert lean.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-9 * expected[name].norm(), name


def test_the_lean_loss_is_the_oracle_outside_every_interval_and_in_float32():
    x, y, draws = step_inputs(6, seed=4)
    outside = step_inputs(6, dataclasses.replace(LOSS, data_proportion=0.0), seed=4)[2]
    outside = dataclasses.replace(outside, t_min=torch.ones_like(draws.t), t_max=torch.ones_like(draws.t))
    assert StepPlan.of(outside).null_rows.numel() == 0
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = random_model().to(dtype)
        for given in (draws, outside):
            floats = {n: v.to(dtype) if v.is_floating_point() else v for n, v in vars(given).items()}
            arguments = (x.to(dtype), y, pmf.Draws(**floats), LOSS)
            _, expected = oracle(model, *arguments)
            fields = reference.pmf_fields(model, *arguments[:3])
            lean, grads = gradients(model, *arguments, return_fields=True)
            for name, grad in grads.items():
                assert relative_error(grad, expected[name]) < bound, name
            for name in ("z_t", "v_g", "u", "v"):
                assert relative_error(lean.fields[name], getattr(fields, name)) < bound, name
            read = ~given.fm_mask
            assert relative_error(lean.fields["du_dt"][read], fields.du_dt[read]) < bound


def test_rows_may_come_in_any_order():
    x, y, draws = step_inputs(6)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    model = random_model()
    sorted_out = pmf.pmf_loss(model, x, y, draws, LOSS, return_fields=True)
    mixed = pmf.pmf_loss(model, x[order], y[order], draws.rows(order), LOSS, return_fields=True)
    assert mixed.loss.item() == pytest.approx(sorted_out.loss.item(), rel=1e-12)
    for name, field in mixed.fields.items():
        assert relative_error(field, sorted_out.fields[name][order]) < 1e-12, name


def test_plan_gives_each_row_what_the_table_says():
    rows = dict(
        #                 fm    fm dropped  inside  outside  dropped
        fm_mask=torch.tensor([True, True, False, False, False]),
        drop_mask=torch.tensor([False, True, False, False, True]),
        t=torch.tensor([0.5, 0.5, 0.5, 0.9, 0.5]),
        t_min=torch.tensor([0.0, 0.0, 0.2, 0.2, 0.2]),
        t_max=torch.tensor([1.0, 1.0, 0.7, 0.7, 0.7]),
        omega=torch.full((5,), 4.0),
        r=torch.zeros(5),
        noise=torch.zeros(5, 1),
    )
    plan = StepPlan.of(pmf.Draws(**rows))
    assert plan.tangent_rows == 3
    assert plan.null_rows.tolist() == [0, 2]
    assert plan.guidance.tolist() == [0.75, 0, 0.75, 0, 0]
    assert plan.null_index().tolist() == [0, -1, 1, -1, -1]


def test_main_pass_saves_what_forward_saves():
    """A training step saves the same bytes with tangents as without."""
    x, y, draws = step_inputs(6)
    model = random_model()
    whole = dict(t_min=torch.zeros_like(draws.t), t_max=torch.ones_like(draws.t))
    none = dataclasses.replace(draws, r=draws.t, fm_mask=torch.ones(6, dtype=torch.bool), **whole)
    with_tangent = saved_bytes(lambda: pmf.pmf_loss(model, x, y, draws, LOSS), model.parameters())
    without = saved_bytes(lambda: pmf.pmf_loss(model, x, y, none, LOSS), model.parameters())
    assert with_tangent == without


def test_perceptual_terms_see_early_rows_and_are_weighted():
    x, y, draws = step_inputs(8)
    model, seen = random_model(), []

    def perceptual(x_hat, target):
        seen.append((x_hat, target))
        distance = (x_hat - target).square().mean((1, 2, 3))
        return {"lpips": distance, "convnext": 2 * distance}

    plain = pmf.pmf_loss(model, x, y, draws, LOSS, return_fields=True)
    out, _ = gradients(model, x, y, draws, LOSS, perceptual=perceptual)
    early = draws.t < LOSS.perceptual_max_t
    x_hat, target = seen[0]
    t = draws.t[early][:, None, None, None]
    assert torch.equal(target, x[early])
    assert relative_error(x_hat, plain.fields["z_t"][early] - t * plain.fields["u"][early]) < 1e-12
    d = (x_hat - target).square().mean((1, 2, 3)).float()
    extra = (0.4 * d / (d + 0.01) + 0.1 * 2 * d / (2 * d + 0.01)).sum() / 8
    assert (out.loss - plain.loss).item() == pytest.approx(extra.item(), rel=1e-5)
    assert out.terms["lpips"].item() == pytest.approx(d.sum().item() / 8, rel=1e-6)
    assert x_hat.requires_grad
    expected, _ = oracle(model, x, y, draws, LOSS, perceptual=perceptual)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_draws_follow_their_laws():
    n = 40_000
    config = pmf.LossConfig(p_mean=0.3, p_std=0.5, cfg_beta=2.0, class_dropout=0.2)
    d = pmf.sample_draws(n, (1, 1, 1), config, torch.Generator().manual_seed(0))
    fm = d.fm_mask
    assert fm.sum() == n // 2 and fm[: n // 2].all() and torch.equal(d.t[fm], d.r[fm])
    logit = torch.logit(d.t[fm])
    assert logit.mean().item() == pytest.approx(0.3, abs=0.02)
    assert logit.std().item() == pytest.approx(0.5, abs=0.02)
    assert (d.t >= d.r).all()
    both = torch.logit(torch.cat([d.t[~fm], d.r[~fm]]))
    assert both.mean().item() == pytest.approx(0.3, abs=0.02)
    # Density w^-2 on [1, 8]: P(w < 2) = (1 - 1/2) / (1 - 1/8).
    assert (d.omega < 2).float().mean().item() == pytest.approx(0.5 / 0.875, abs=0.01)
    assert d.omega.min() >= 1 and d.omega.max() <= 8
    assert (d.t_min[fm] == 0).all() and (d.t_max[fm] == 1).all()
    assert d.t_min[~fm].mean().item() == pytest.approx(0.25, abs=0.01)
    assert d.t_max[~fm].mean().item() == pytest.approx(0.75, abs=0.01)
    dropped = int(d.drop_mask.sum())
    assert d.drop_mask[:dropped].all() and abs(dropped - 0.2 * n) < 5 * math.sqrt(n * 0.16)
    assert d.noise.std().item() == pytest.approx(1, abs=0.02)


def test_beta_one_is_log_uniform_and_tr_uniform_widens_the_times():
    d = pmf.sample_draws(40_000, (1, 1, 1), LOSS, torch.Generator().manual_seed(0))
    assert d.omega.log().mean().item() == pytest.approx(math.log(8) / 2, abs=0.02)
    wide = dataclasses.replace(LOSS, tr_uniform=True)
    u = pmf.sample_draws(40_000, (1, 1, 1), wide, torch.Generator().manual_seed(0))
    low = lambda draws: (draws.t[draws.fm_mask] < 0.1).float().mean().item()  # noqa: E731
    assert low(d) < 0.001 and low(u) == pytest.approx(0.01, abs=0.003)


def test_draws_repeat_with_their_generator():
    first, second = (pmf.sample_draws(5, (1, 2, 2), LOSS, torch.Generator().manual_seed(7)) for _ in range(2))
    for f in dataclasses.fields(first):
        assert torch.equal(getattr(first, f.name), getattr(second, f.name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(4, 2, 8, 7)), r"x: expected shape \[B, 2, 8, 8\] with B > 0, got \[4, 2, 8, 7\]"),
        (dict(x=torch.full((4, 2, 8, 8), torch.inf)), "x: expected finite images, got NaN or infinity"),
        (dict(y=torch.tensor([0, 1, 2, 5])), r"y: expected labels in \[0, 4\], got 0 to 5"),
        (dict(y=torch.zeros(3, dtype=torch.long)), r"y: expected shape \[4\], got \[3\]"),
        (dict(y=torch.zeros(4)), "y: expected int64 class labels, got torch.float32"),
        (dict(draw=dict(t_min=torch.full((4,), 0.2))), r"draws: expected the interval \[0, 1\] where fm_mask is set"),
        (dict(draw=dict(omega=torch.zeros(4))), "draws: expected omega >= 1 in every row"),
        (dict(draw=dict(omega=torch.full((4,), torch.nan))), "draws: expected omega >= 1 in every row"),
        (dict(draw=dict(omega=torch.full((4,), torch.inf))), "draws: expected omega >= 1 in every row, and finite"),
        (dict(draw=dict(t_min=torch.full((4,), -5.0))), "draws: expected 0 <= t_min <= t_max <= 1 in every row"),
        (dict(draw=dict(t_max=torch.full((4,), 9.0))), "draws: expected 0 <= t_min <= t_max <= 1 in every row"),
        (dict(draw=dict(t=torch.ones(4, dtype=torch.int64))), "draws.t: expected a floating dtype, got torch.int64"),
        (dict(draw=dict(noise=torch.full((4, 2, 8, 8), torch.nan))), "draws.noise: expected finite values"),
        (dict(perceptual=lambda a, b: {"vgg": a.sum((1, 2, 3))}), r"perceptual: expected terms .*, got 'vgg'"),
        (dict(perceptual=lambda a, b: {"lpips": a.sum()}), r"perceptual: expected lpips of shape \[\d\], got \[\]"),
        (dict(draw=dict(fm_mask=torch.tensor([1, 1, 0, 0]))), "draws.fm_mask: expected bool, got torch.int64"),
        (dict(draw=dict(drop_mask=torch.zeros(4))), "draws.drop_mask: expected bool, got torch.float32"),
        (dict(y=torch.zeros(4, dtype=torch.int64, device="meta")), "y: expected on cpu, as x is, got meta"),
        (dict(draw=dict(r=torch.ones(4, dtype=torch.float64))), "draws: expected r <= t in every row"),
        (dict(draw=dict(noise=torch.zeros(4, 2, 8, 9))), r"draws.noise: expected shape \[4, 2, 8, 8\]"),
        (
            dict(draw=dict(fm_mask=torch.ones(4, dtype=torch.bool))),
            "draws: expected r = t where fm_mask is set",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(change, message):
    x, y, draws = step_inputs(4)
    draws = dataclasses.replace(draws, **change.get("draw", {}))
    arguments = dict(x=x, y=y) | {k: v for k, v in change.items() if k != "draw"}
    with pytest.raises(pmf.InputError, match=message) as error:
        pmf.pmf_loss(random_model(), draws=draws, loss_config=LOSS, **arguments)
    assert "\n" not in str(error.value)


def test_draws_need_a_row():
    with pytest.raises(pmf.InputError, match="batch: expected at least 1 row, got 0"):
        pmf.sample_draws(0, (1, 2, 2), LOSS)


def test_autocast_gives_every_parameter_its_gradient():
    x, y, draws = step_inputs(6, dtype=torch.float32)
    model = random_model(dtype=torch.float32)
    _, expected = gradients(model, x, y, draws, LOSS)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pmf.pmf_loss(model, x, y, draws, LOSS).loss
    loss.backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected[name]) < 0.1, name


def test_training_needs_the_v_head():
    x, y, draws = step_inputs(2)
    with pytest.raises(pmf.InputError, match="training needs the v head"):
        pmf.pmf_loss(random_model(aux_head=False), x, y, draws, LOSS)
