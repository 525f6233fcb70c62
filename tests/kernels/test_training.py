"""Training on the kernels follows the curve of the reference."""

import dataclasses

import torch
from sklearn.datasets import load_digits

import pmf
from tests.kernels.checks import DEVICE, tf32x3, within_budget

STEPS, BATCH = 24, 4
TINY_DIGITS = pmf.ModelConfig(
    image_size=8,
    patch_size=4,
    hidden_size=16,
    depth=2,
    num_heads=1,
    aux_head_depth=1,
    num_classes=10,
    in_channels=1,
    bottleneck=8,
    class_tokens=1,
    omega_tokens=1,
    t_min_tokens=1,
    t_max_tokens=1,
    time_tokens=1,
)


def losses(impl: str, dtype: torch.dtype) -> torch.Tensor:
    """The loss of every step of a short run, with the same weights, images and draws in every precision."""
    torch.manual_seed(0)
    model = pmf.create_model(TINY_DIGITS, impl=impl).to(DEVICE, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    config = pmf.LossConfig()
    curve = []
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)
        draws = pmf.sample_draws(BATCH, (1, 8, 8), config, torch.Generator().manual_seed(step))
        floats = {f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)}
        draws = pmf.Draws(**{n: v.to(dtype) if v.is_floating_point() else v for n, v in floats.items()})
        x, y = images[rows].to(DEVICE, dtype), torch.from_numpy(data.target)[rows].long().to(DEVICE)
        out = pmf.pmf_loss(model, x, y, draws, config)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        curve.append(out.terms["loss_u"] + out.terms["loss_v"])
    return torch.stack(curve)


def test_training_follows_the_reference():
    """Both curves drift from float64 only by rounding, the kernels' by at most twice as much as the reference's."""
    truth = losses("reference", torch.float64)
    kernel, reference = (losses(impl, torch.float32) for impl in ("triton", "reference"))
    within_budget("losses", kernel, reference, truth, steps=tf32x3(2))
    assert truth[-8:].mean() < 0.9 * truth[:8].mean()
