"""The pMF loss (arXiv 2601.22158): random draws, guidance, step plan, objective.

z_t = (1 - t) x + t e                              e = noise_scale N(0, I)
v_g = stopgrad(v_t + (1 - 1/w')(v_c - v_u))        w' = w inside [t_min, t_max], else 1
V   = u + (t - r) stopgrad(du/dt)                  du/dt along (v_c, 1, 0)
L_u = sum (V - v_g)^2,  L_v = sum (v - v_g)^2      per row
loss = mean adp(L_u) + adp(L_v) + perceptual terms,  adp(L) = L / stopgrad(L + eps)^p
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf import ops
from pmf.config import LossConfig
from pmf.dual import Dual, tail
from pmf.errors import readable, require

PLANS = ("lean", "naive")


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step of B rows.

    All but `noise` live on the CPU, so that counting rows waits for no GPU. t >= r in [0, 1], omega,
    t_min and t_max are float32 [B]; fm_mask marks flow-matching rows (t = r), drop_mask rows of the
    null class, bool [B]; noise [B, c, H, W] has unit variance.
    """

    t: Tensor
    r: Tensor
    fm_mask: Tensor
    omega: Tensor
    t_min: Tensor
    t_max: Tensor
    drop_mask: Tensor
    noise: Tensor

    def rows(self, index: Tensor) -> Draws:
        """The same draws with their rows in another order."""
        return Draws(**{f.name: _select(getattr(self, f.name), index) for f in fields(self)})


@dataclass(frozen=True)
class LossOutput:
    """What `pmf_loss` returns."""

    loss: Tensor
    """The scalar to differentiate."""
    terms: dict[str, Tensor]
    """Detached scalars: loss_u and loss_v, mean squared errors over all pixels; perceptual distances."""
    fields: dict[str, Tensor] | None = None
    """z_t, v_c, v_g, u, du_dt and v as images, when asked for."""


def sample_draws(
    batch: int,
    image_shape: tuple[int, int, int],
    loss_config: LossConfig,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Draws:
    """The random draws of one step for a device batch of `batch` rows.

    t and r are logit-normal (tr_uniform: sometimes uniform), r = t on the first flow-matching rows, sorted
    so that t >= r; omega has density proportional to omega^-beta; t_min and t_max are uniform on the lower
    and the upper half of [0, 1], 0 and 1 on flow-matching rows; the first Binomial(B, class_dropout) rows are
    dropped. `generator` is a CPU generator (None: the default one). `noise` is drawn on `device`.
    """
    require(batch >= 1, f"batch: expected at least 1 row, got {batch}")
    c, g = loss_config, generator

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=g)

    def logit_normal() -> Tensor:
        return torch.sigmoid(c.p_mean + c.p_std * torch.randn(batch, generator=g))

    t, r = logit_normal(), logit_normal()
    if c.tr_uniform:
        replaced = uniform() < 0.1
        t, r = torch.where(replaced, uniform(), t), torch.where(replaced, uniform(), r)
    fm_mask = torch.arange(batch) < int(batch * c.data_proportion)
    r = torch.where(fm_mask, t, r)
    t, r = torch.maximum(t, r), torch.minimum(t, r)

    dropped = int((uniform() < c.class_dropout).sum())  # Binomial(batch, class_dropout)
    noise_generator = torch.Generator(device or "cpu")
    noise_generator.manual_seed(int(torch.randint(2**62, (), generator=g)))
    return Draws(
        t=t,
        r=r,
        fm_mask=fm_mask,
        omega=_omega(uniform(), c.cfg_max, c.cfg_beta),
        t_min=torch.where(fm_mask, 0.0, uniform(0.0, 0.5)),
        t_max=torch.where(fm_mask, 1.0, uniform(0.5, 1.0)),
        drop_mask=torch.arange(batch) < dropped,
        noise=torch.randn(batch, *image_shape, generator=noise_generator, device=device),
    )


def _omega(uniform: Tensor, cfg_max: float, beta: float) -> Tensor:
    """The inverse of the distribution with density proportional to omega^-beta on [1, 1 + cfg_max]."""
    span = math.log1p(cfg_max)
    if beta == 1:
        return torch.exp(uniform * span)
    return torch.exp(torch.log1p(uniform * math.expm1((1 - beta) * span)) / (1 - beta))


def _staged(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor where copies to `device` start that nobody waits for: to CUDA, in pinned memory."""
    return host.pin_memory() if device.type == "cuda" else host


def _on_device(device: torch.device, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Host vectors on `device`, by one copy that the host does not wait for."""
    host = _staged(torch.cat(vectors), device)
    return host.to(device, non_blocking=True).split([len(vector) for vector in vectors])


def _select(value: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (on the CPU) of `value`, wherever it lives."""
    (index,) = _on_device(value.device, index)
    return value[index]


@dataclass(frozen=True)
class StepPlan:
    """Which rows need what. Row indices and w' live on the CPU; flow-matching rows come first.

    | rows                            | tangent | v_c                      | v_u |
    |---------------------------------|---------|--------------------------|-----|
    | flow-matching, not dropped      | no      | the main pass's own v    | yes |
    | flow-matching, dropped          | no      | no                       | no  |
    | t > r, inside the interval      | yes     | yes                      | yes |
    | t > r, outside the interval     | yes     | yes, w' = 1              | no  |
    | t > r, dropped                  | yes     | yes, the original class  | no  |
    """

    tangent_rows: int
    """B_dot: the last rows, whose du/dt the loss reads."""
    null_rows: Tensor
    """The rows that need v_u."""
    guidance: Tensor
    """1 - 1/w' per row: zero outside the interval and on dropped rows."""

    @classmethod
    def of(cls, draws: Draws, plan: str) -> StepPlan:
        """The plan of these draws: "lean" as in the table, "naive" everything on every row."""
        inside = (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
        guided = inside & ~draws.drop_mask
        guidance = torch.where(guided, 1 - 1 / draws.omega, 0.0)
        batch = len(draws.t)
        if plan == "naive":
            return cls(batch, torch.arange(batch), guidance)
        return cls(int((~draws.fm_mask).sum()), guided.nonzero()[:, 0], guidance)

    def padded_null_rows(self) -> Tensor:
        """`null_rows`, then row 0 again until their number is a multiple of B / 16: few sizes to compile."""
        granule = max(1, len(self.guidance) // 16)
        return F.pad(self.null_rows, (0, -len(self.null_rows) % granule))

    def null_index(self) -> Tensor:
        """Per row, its place among `null_rows`; -1 for none."""
        index = torch.full((len(self.guidance),), -1)
        index[self.null_rows] = torch.arange(len(self.null_rows))
        return index


@dataclass(frozen=True)
class Step:
    """One step's tensors on the model's device, flow-matching rows first."""

    x: Tensor
    y: Tensor
    z: Tensor
    t: Tensor
    h: Tensor
    omega: Tensor
    t_min: Tensor
    t_max: Tensor
    inside_omega: Tensor
    """w' per row: omega where t lies in [t_min, t_max], else 1."""
    guidance: Tensor
    null_index: Tensor
    null_rows: Tensor
    """Padded; see `StepPlan.padded_null_rows`."""
    early_rows: Tensor
    """Rows that the perceptual terms see."""
    dropped: Tensor
    fm: Tensor
    order: Tensor | None
    """Where each row came from; None where the rows came in this order."""
    tangent_rows: int

    def last(self, value: Tensor) -> Tensor:
        """The rows that carry a tangent."""
        return tail(value, self.tangent_rows)


_SCALARS = tuple(f.name for f in fields(Draws) if f.name != "noise")


def _step(model, x: Tensor, y: Tensor, draws: Draws, config: LossConfig, plan_name: str) -> Step:
    """Plan the step on the host, and carry what it needs to the device in three copies."""
    order = torch.argsort(draws.fm_mask.int(), descending=True, stable=True)
    in_order = torch.equal(order, torch.arange(len(order)))
    d = replace(draws, **{name: getattr(draws, name)[order] for name in _SCALARS})
    plan = StepPlan.of(d, plan_name)
    inside_omega = torch.where((d.t_min <= d.t) & (d.t <= d.t_max), d.omega, 1.0)
    early = (d.t < config.perceptual_max_t).nonzero()[:, 0]

    device = x.device
    floats = (d.t, d.t - d.r, d.omega, d.t_min, d.t_max, inside_omega, plan.guidance)
    t, h, omega, t_min, t_max, inside_omega, guidance = _on_device(device, *floats)
    integers = (order, plan.null_index(), d.drop_mask.long(), d.fm_mask.long())
    order, null_index, dropped, fm = _on_device(device, *integers)
    null_rows, early_rows = _on_device(device, plan.padded_null_rows(), early)

    noise = draws.noise.to(device)
    if not in_order:
        x, y, noise = x[order], y[order], noise[order]
    t_image = t[:, None, None, None]
    return Step(
        x=x,
        y=y,
        z=(1 - t_image) * x + t_image * (model.config.noise_scale * noise),
        t=t,
        h=h,
        omega=omega,
        t_min=t_min,
        t_max=t_max,
        inside_omega=inside_omega,
        guidance=guidance,
        null_index=null_index,
        null_rows=null_rows,
        early_rows=early_rows,
        dropped=dropped.bool(),
        fm=fm.bool(),
        order=None if in_order else order,
        tangent_rows=plan.tangent_rows,
    )


@torch.no_grad()
def _v_tokens(model, z: Tensor, omega: Tensor, y: Tensor) -> Tensor:
    """Guidance's v head: h = 0, the interval [0, 1]; no u head, no tangent."""
    zero, one = torch.zeros_like(omega), torch.ones_like(omega)
    return model.predict_dual(Dual(z), Dual(zero), omega, zero, one, y, heads=("v",))["v"].value


def _lean_guidance(model, step: Step) -> tuple[Tensor | None, Tensor | None]:
    """(net_c, net_n) in one pass: the class as drawn at w' on the last B_dot rows, and the null class at
    w = 1 on `null_rows`, padded so that few batch sizes occur.
    """
    rows, null_rows = step.tangent_rows, step.null_rows
    if rows + len(null_rows) == 0:
        return None, None
    omega = step.last(step.inside_omega)
    one = omega.new_ones(len(null_rows))
    null = torch.full_like(one, model.config.num_classes, dtype=torch.int64)
    z = torch.cat([step.last(step.z), step.z[null_rows]])
    net = _v_tokens(model, z, torch.cat([omega, one]), torch.cat([step.last(step.y), null]))
    return (net[:rows] if rows else None), (net[rows:] if len(null_rows) else None)


def _naive_guidance(model, step: Step) -> tuple[Tensor, Tensor]:
    """(net_c, net_n) as the authors compute them: three passes over every row, at w, at w' and at 1."""
    null = torch.full_like(step.y, model.config.num_classes)
    net_fm = _v_tokens(model, step.z, step.omega, step.y)
    net_c = _v_tokens(model, step.z, step.inside_omega, step.y)
    net_n = _v_tokens(model, step.z, torch.ones_like(step.omega), null)
    return torch.where(step.fm[:, None, None], net_fm, net_c), net_n


def _main_pass(model, step: Step, net_c: Tensor | None) -> dict[str, Dual]:
    """Both heads on every row, with u's tangent along (v_c, 1, 0) on the last rows."""
    y = torch.where(step.dropped, model.config.num_classes, step.y)
    z_dot, h_dot = None, None
    if net_c is not None:
        with torch.no_grad():
            c = step.last(step.t).clamp(model.config.t_clip, 1)[:, None, None, None]
            z_dot = (step.last(step.z) - model.to_images(net_c)) / c
            h_dot = torch.ones_like(step.last(step.h))
    return model.predict_dual(Dual(step.z, z_dot), Dual(step.h, h_dot), step.omega, step.t_min, step.t_max, y)


def _adaptive(loss: Tensor, config: LossConfig) -> Tensor:
    """adp(L) = L / stopgrad(L + norm_eps)^norm_p."""
    return loss / (loss.detach() + config.norm_eps) ** config.norm_p


def perceptual_rows(
    perceptual: Callable, model, step: Step, net_u: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the perceptual terms add to the loss of each row, and their mean distances.

    Distances are between x_hat = z_t - t u and x, zero where t >= perceptual_max_t.
    """
    rows = step.early_rows
    t, z, x = step.t[rows][:, None, None, None], step.z[rows], step.x[rows]
    net = model.to_images(net_u[rows])
    x_hat = z - t / t.clamp(model.config.t_clip, 1) * (z - net)

    def on_every_row(distance: Tensor) -> Tensor:
        dtype = torch.promote_types(distance.dtype, torch.float32)
        return torch.zeros(len(step.x), device=z.device, dtype=dtype).index_put((rows,), distance.to(dtype))

    weights = {"lpips": config.lpips_weight, "convnext": config.convnext_weight}
    total, terms = torch.zeros((), device=z.device), {}
    for name, distance in perceptual(x_hat, x).items():
        require(name in weights, f"perceptual: expected terms {sorted(weights)}, got {name!r}")
        distance = on_every_row(distance)
        total = total + weights[name] * _adaptive(distance, config)
        terms[name] = distance.detach().mean()
    return total, terms


@dataclass(frozen=True)
class Evaluated:
    """The network and the objective on one step."""

    rows: Tensor
    """adp(L_u) + adp(L_v) per row."""
    terms: dict[str, Tensor]
    """loss_u and loss_v, mean squared errors over all pixels."""
    net_u: Tensor
    """The u head's tokens, which the perceptual terms read."""
    fields_of: tuple[Tensor | None, ...]
    """What `ops.pmf_objective_fields` takes."""
    options: dict[str, Any]


def evaluate(model, step: Step, config: LossConfig, plan: str = "lean") -> Evaluated:
    """Guidance, the main pass with its tangent, and both squared errors of a planned step."""
    with model.held_weights():
        net_c, net_n = (_lean_guidance if plan == "lean" else _naive_guidance)(model, step)
        nets = _main_pass(model, step, net_c)
    heads = (nets["u"].value, nets["v"].value, nets["u"].dot, net_c, net_n)
    images, guidance = (step.z, step.x), (step.guidance, step.null_index)
    options: dict[str, Any] = dict(t_clip=model.config.t_clip, patch_size=model.config.patch_size)
    loss_u, loss_v = ops.pmf_objective(*heads, *images, step.t, step.h, *guidance, **options, impl=model.impl)
    pixels = step.x[0].numel()
    terms = {"loss_u": loss_u.detach().mean() / pixels, "loss_v": loss_v.detach().mean() / pixels}
    rows = _adaptive(loss_u, config) + _adaptive(loss_v, config)
    return Evaluated(rows, terms, nets["u"].value, (*heads, *images, step.t, *guidance), options)


def pmf_loss(
    model,
    x: Tensor,
    y: Tensor,
    draws: Draws,
    loss_config: LossConfig,
    perceptual: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None,
    plan: str = "lean",
    return_fields: bool = False,
) -> LossOutput:
    """The pMF training loss of one device batch, exactly as in the equations above.

    Args: model with both heads; x [B, c, H, W] in [-1, 1]; y int64 [B]; draws from `sample_draws`;
    perceptual(x_hat, x) -> {"lpips": [B'], "convnext": [B']}, called on the rows with t below
    perceptual_max_t; plan "lean" evaluates what the loss reads and nothing more, "naive" everything on
    every row as the authors' step does. Errors: `InputError` on bad shapes, labels, draws or NaN images.
    """
    check_step(model, x, y, draws, plan)
    step = _step(model, x, y, draws, loss_config, plan)
    evaluated = evaluate(model, step, loss_config, plan)
    rows, terms = evaluated.rows, evaluated.terms
    if perceptual is not None:
        more, distances = perceptual_rows(perceptual, model, step, evaluated.net_u, loss_config)
        rows, terms = rows + more, terms | distances
    output = LossOutput(rows.mean(), terms)
    if not return_fields:
        return output
    values = {"z_t": step.z} | ops.pmf_objective_fields(*evaluated.fields_of, **evaluated.options)
    if step.order is not None:
        values = {name: value[torch.argsort(step.order)] for name, value in values.items()}
    return replace(output, fields=values)


def check_step(model, x: Tensor, y: Tensor, draws: Draws, plan: str) -> None:
    """Errors: `InputError` on a model without v head, bad shapes, labels, draws, plan or NaN images."""
    require(plan in PLANS, f"plan: expected one of {PLANS}, got {plan!r}")
    require("v" in model.heads, "model: training needs the v head, got one built with aux_head=False")
    shape = list(model.config.image_shape)
    require(
        x.ndim == 4 and list(x.shape[1:]) == shape and len(x) > 0,
        f"x: expected shape [B, {', '.join(map(str, shape))}] with B > 0, got {list(x.shape)}",
    )
    batch = len(x)
    for name, value in (("y", y), *((f.name, getattr(draws, f.name)) for f in fields(draws))):
        wanted = list(x.shape) if name == "noise" else [batch]
        where = name if name == "y" else f"draws.{name}"
        require(list(value.shape) == wanted, f"{where}: expected shape {wanted}, got {list(value.shape)}")
        host = name in ("y", "noise") or value.device.type == "cpu"
        require(host, f"{where}: expected on the CPU, where rows are counted without waiting, got {value.device}")
    require(y.dtype == torch.int64, f"y: expected int64 class labels, got {y.dtype}")
    require(bool((draws.omega >= 1).all()), "draws: expected omega >= 1 in every row")
    require(bool((draws.r <= draws.t).all()), "draws: expected r <= t in every row (h = t - r >= 0)")
    require(bool((draws.r >= 0).all() and (draws.t <= 1).all()), "draws: expected t and r in [0, 1]")
    require(bool((draws.t == draws.r)[draws.fm_mask].all()), "draws: expected r = t where fm_mask is set")
    whole = (draws.t_min == 0) & (draws.t_max == 1)
    require(bool(whole[draws.fm_mask].all()), "draws: expected the interval [0, 1] where fm_mask is set")
    if readable(x, y):
        classes = model.config.num_classes
        require(bool(torch.isfinite(x).all()), "x: expected finite images, got NaN or infinity")
        finite = not readable(draws.noise) or bool(torch.isfinite(draws.noise).all())
        require(finite, "draws.noise: expected finite values, got NaN or infinity")
        require(
            bool(((y >= 0) & (y < classes)).all()),
            f"y: expected labels in [0, {classes - 1}], got {y.min().item()} to {y.max().item()}",
        )
