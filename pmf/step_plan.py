"""Plan which rows of a batch need which computation, on the host, before anything runs on the device.

| rows                            | tangent | v_c                      | v_u |
|---------------------------------|---------|--------------------------|-----|
| flow-matching, not dropped      | no      | the main pass's own v    | yes |
| flow-matching, dropped          | no      | no                       | no  |
| t > r, inside the interval      | yes     | yes                      | yes |
| t > r, outside the interval     | yes     | yes, w' = 1              | no  |
| t > r, dropped                  | yes     | yes, the original class  | no  |

Flow-matching rows have t = r: du/dt has the weight t - r = 0, and the main pass itself evaluates v at h = 0 on [0, 1].
Where w' = 1 or the class is dropped, v_u has the weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf.config import LossConfig
from pmf.draws import Draws, check_batch, to_device
from pmf.errors import check_network, require
from pmf.pair import tail

if TYPE_CHECKING:
    from pmf.model import PMFDiT


@dataclass(frozen=True)
class StepPlan:
    """The table above for one step's draws, flow-matching rows first. Row indices and w' are on the CPU."""

    tangent_rows: int
    """B_dot: the last rows, whose du/dt the loss reads."""
    null_rows: Tensor
    """The rows that need v_u."""
    guidance: Tensor
    """1 - 1/w' per row: zero outside the interval and on dropped rows."""

    @classmethod
    def of(cls, draws: Draws) -> StepPlan:
        """The plan of draws whose flow-matching rows come first."""
        guided = _inside(draws) & ~draws.drop_mask
        guidance = torch.where(guided, 1 - 1 / draws.omega, 0.0)
        return cls(int((~draws.fm_mask).sum()), guided.nonzero()[:, 0], guidance)

    def padded_null_rows(self) -> Tensor:
        """`null_rows`, padded with row 0 to a multiple of B / 16, so that few sizes are compiled."""
        granule = max(1, len(self.guidance) // 16)
        return F.pad(self.null_rows, (0, -len(self.null_rows) % granule))

    def null_index(self) -> Tensor:
        """Per row, its place among `null_rows`; -1 for none."""
        index = torch.full((len(self.guidance),), -1)
        index[self.null_rows] = torch.arange(len(self.null_rows))
        return index


@dataclass(frozen=True)
class PlannedStep:
    """One step's tensors on the model's device, flow-matching rows first."""

    x: Tensor
    y: Tensor
    z: Tensor
    """z_t = (1 - t) x + t e."""
    t: Tensor
    h: Tensor
    """t - r."""
    omega: Tensor
    t_min: Tensor
    t_max: Tensor
    inside_omega: Tensor
    """w' per row: omega where t lies in [t_min, t_max], else 1."""
    guidance: Tensor
    """See `StepPlan`, also for `null_index` and, padded, `null_rows`."""
    null_index: Tensor
    null_rows: Tensor
    early_rows: Tensor
    """Rows with perceptual terms: t < perceptual_max_t."""
    dropped: Tensor
    order: Tensor | None
    """The original index of each row; None if the rows were already in this order."""
    tangent_rows: int

    def last(self, value: Tensor) -> Tensor:
        """The rows that carry a tangent."""
        return tail(value, self.tangent_rows)


def plan_step(model: PMFDiT, x: Tensor, y: Tensor, draws: Draws, config: LossConfig) -> PlannedStep:
    """Check a batch, plan its step on the host, and move the plan to the device in three copies.

    Errors: `InputError` on a model without v head, bad shapes, labels, draws or NaN images.
    """
    check_network(model)
    known = isinstance(config, LossConfig)
    require(known, lambda: f"loss_config: expected a LossConfig, got {type(config).__name__}")
    require("v" in model.heads, "model: training needs the v head, got one built with aux_head=False")
    check_batch(x, y, draws, model.config)
    order = torch.argsort(draws.fm_mask.int(), descending=True, stable=True)
    in_order = torch.equal(order, torch.arange(len(order)))
    d = replace(draws, **{name: value[order] for name, value in draws.scalars().items()})
    plan = StepPlan.of(d)
    inside_omega = torch.where(_inside(d), d.omega, 1.0)
    early = (d.t < config.perceptual_max_t).nonzero()[:, 0]

    device = x.device
    floats = (d.t, d.t - d.r, d.omega, d.t_min, d.t_max, inside_omega, plan.guidance)
    t, h, omega, t_min, t_max, inside_omega, guidance = to_device(device, *floats)
    order, null_index, dropped = to_device(device, order, plan.null_index(), d.drop_mask.long())
    null_rows, early_rows = to_device(device, plan.padded_null_rows(), early)

    noise = draws.noise.to(device)
    if not in_order:
        x, y, noise = x[order], y[order], noise[order]
    t_image = t[:, None, None, None]
    return PlannedStep(
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
        order=None if in_order else order,
        tangent_rows=plan.tangent_rows,
    )


def _inside(draws: Draws) -> Tensor:
    """Where guidance acts: t in [t_min, t_max]."""
    return (draws.t_min <= draws.t) & (draws.t <= draws.t_max)
