"""Networks, inputs and golden numbers that tests share."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pmf
from pmf.step_plan import StepPlan

DATA = Path(__file__).parent / "data"


def extras(test):
    """Mark a test that needs the networks of the extra `posttrain`, which the core's tests do without."""
    missing = [name for name in ("timm", "torch_fidelity") if find_spec(name) is None]
    return pytest.mark.extras(pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")(test))


TINY = pmf.ModelConfig(
    image_size=8,
    patch_size=4,
    hidden_size=32,
    depth=3,
    num_heads=2,
    aux_head_depth=1,
    num_classes=5,
    in_channels=2,
    bottleneck=12,
    class_tokens=2,
    omega_tokens=1,
    t_min_tokens=1,
    t_max_tokens=1,
    time_tokens=2,
)


def random_model(config: pmf.ModelConfig = TINY, *, seed: int = 0, dtype=torch.float64, **options):
    """A network whose every parameter is random: gates and final layers do not start at zero."""
    torch.manual_seed(seed)
    model = pmf.create_model(config, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * spread)
    return model


def model_inputs(config: pmf.ModelConfig, batch: int, *, seed: int = 1, dtype=torch.float64) -> dict[str, Tensor]:
    """z, t, h, omega, t_min, t_max and y; the first t is below the clip at 0.05."""
    torch.manual_seed(seed)
    t = torch.rand(batch, dtype=dtype)
    t[0] = 0.03
    return dict(
        z=torch.randn(batch, *config.image_shape, dtype=dtype),
        t=t,
        h=t * torch.rand(batch, dtype=dtype),
        omega=1 + 6 * torch.rand(batch, dtype=dtype),
        t_min=torch.rand(batch, dtype=dtype) / 2,
        t_max=(1 + torch.rand(batch, dtype=dtype)) / 2,
        y=torch.randint(config.num_classes + 1, (batch,)),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference divided by the norm of `expected`."""
    return ((actual - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def every_row_in_full() -> Iterator[None]:
    """Make `pmf_loss` evaluate everything on every row, as its oracle does, through the same ops."""
    lean = StepPlan.of

    def full(draws: pmf.Draws) -> StepPlan:
        batch = len(draws.t)
        return StepPlan(batch, torch.arange(batch), lean(draws).guidance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepPlan, "of", full)
        yield


def meta_step(config: pmf.ModelConfig, draws: pmf.Draws, loss: Callable) -> Callable[[], None]:
    """A whole step, forward and backward, on meta tensors: for counting without computing."""
    model = pmf.create_model(config, device="meta", impl="reference")
    x = torch.empty(len(draws.t), *config.image_shape, device="meta")
    y = torch.zeros(len(draws.t), dtype=torch.int64, device="meta")
    draws = dataclasses.replace(draws, noise=torch.empty_like(x))
    return lambda: loss(model, x, y, draws, pmf.LossConfig()).backward()


class Golden:
    """One training loss of the authors' JAX code on a tiny random network, float32."""

    def __init__(self) -> None:
        self.arrays = dict(np.load(DATA / "golden_tiny_in_context.npz"))
        self.sampling = json.loads(str(self.arrays["config"]))["sample"]
        self.state = {k.removeprefix("param/"): self[k] for k in self.arrays if k.startswith("param/")}
        self.config = pmf.infer_config(self.state)
        names = "t r fm_mask omega t_min t_max drop_mask"
        scalars = {name: self[f"draw/{name}"] for name in names.split()}
        self.draws = pmf.Draws(**scalars, noise=self["in/noise"])

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key].copy())

    def model(self, **options) -> pmf.PMFDiT:
        """The tiny network with the golden parameters."""
        model = pmf.create_model(self.config, **options)
        model.load_state_dict(pmf.convert_official_state_dict(self.state))
        return model


@cache
def golden() -> Golden:
    """The golden numbers, cached."""
    return Golden()


def official_shapes() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of the published training state dicts, by size."""
    return json.loads((DATA / "official_state_dicts.json").read_text())
