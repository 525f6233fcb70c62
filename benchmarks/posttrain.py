"""Count a step of post-training, from images to update: operations, live tensors, features between processes.

Nothing is computed: operations are counted on meta tensors, live tensors on fake ones, for one of 8 processes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from pmf import create_model
from pmf.benchmarks.figures import markdown
from pmf.benchmarks.step_cases import counted_on
from pmf.config import LOSSES, MODELS, SAMPLING, published_guidance
from pmf.counting import LiveBytes, computing_operators, live_bytes, operations
from pmf.errors import require
from pmf.feature_networks import FeatureNetwork, feature_network
from pmf.frechet import FrechetLoss, MovingAverage
from pmf.memory import Precision
from pmf.metrics import Statistics
from pmf.model import Checkpointing
from pmf.optim import Averages, OptimizerConfig, build_optimizers
from pmf.parallel import GeneratorModule
from pmf.post_training import FrechetStep, Latents
from pmf.private import FakeTensor, FakeTensorMode

BATCH, PROCESSES = 1024, 8
SHARE = BATCH // PROCESSES
"""Images of a process in a step."""
BUDGET = 0.9 * 80e9
ROWS: tuple[tuple[str, ...], ...] = (
    (),
    ("inception",),
    ("siglip",),
    ("mae",),
    ("convnext",),
    ("dinov2",),
    ("inception", "siglip", "mae"),
)
"""The feature networks of a step; none is the generator alone."""
CHECKPOINTINGS: tuple[Checkpointing, ...] = ("none", "block")
EIGH = 9
"""d^3 operations of eigenvalues and eigenvectors: Golub and Van Loan, Matrix Computations, symmetric QR algorithm."""


@dataclass(frozen=True)
class Setting:
    """What decides the memory of a step, besides the device batch."""

    size: str
    networks: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    """That of the feature networks; the generator runs under bfloat16 autocast."""
    checkpointing: Checkpointing = "none"
    """Of the generator: feature networks keep all that backward reads."""


@cache
def meta_network(name: str, dtype: torch.dtype = torch.float32) -> FeatureNetwork:
    """A feature network without values. It is built with values first: timm reads some of them."""
    return feature_network(f"{name}:random", dtype=dtype).to("meta")


def filled(network: FeatureNetwork) -> FeatureNetwork:
    """The network on undefined CPU tensors, fake in `FakeTensorMode`."""
    for module in network.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network


class OneOfMany(FrechetLoss):
    """The loss in one of several processes, which all have the same features."""

    def of_all_ranks(self, rows: Tensor) -> Tensor:
        """Features of `BATCH` images."""
        return rows.detach()[torch.arange(BATCH) % len(rows)]


def frechet_loss(widths: Mapping[str, int]) -> FrechetLoss:
    """A loss with references and populations of these widths."""
    references = {name: Statistics(np.zeros(width), np.eye(width)) for name, width in widths.items()}
    return OneOfMany(references, partial(MovingAverage, decay=0.999))


# Operations.


def image_operations(setting: Setting, device_batch: int = SHARE) -> int:
    """Products of an image in generator and networks: forward, backward, and the features before it if not recorded."""
    how: dict = dict(impl="reference", checkpointing=setting.checkpointing, aux_head=False, device="meta")
    generate = GeneratorModule(
        create_model(setting.size, **how), LOSSES[setting.size], published_guidance(setting.size)
    )
    networks = [meta_network(name) for name in setting.networks]
    noise = torch.empty(1, *MODELS[setting.size].image_shape, device="meta")

    def passed() -> list[Tensor]:
        images = generate(noise, torch.zeros(1, dtype=torch.int64, device="meta"))
        return [network(images).sum() for network in networks] or [images.sum()]

    with torch.no_grad():
        unrecorded = operations(passed) if device_batch < SHARE else 0
    return unrecorded + operations(lambda: torch.autograd.backward(passed()))


def frechet_operations(width: int) -> int:
    """float64 operations of one network's part of a step, in every process.

    Of the batch, E[f f^T] twice (for the loss and to enter the population) and the gradient in a process's own rows; of
    [d, d], R S R, the eigenvectors, the gradient in S from them. Products of vectors are left out.
    """
    rows = 2 * BATCH + SHARE
    return 2 * rows * width**2 + (4 * 2 + EIGH) * width**3


def gathered_bytes(width: int) -> int:
    """Bytes of the float32 features of all images, which every process receives."""
    return 4 * BATCH * width


# Memory.


def train(setting: Setting, device_batch: int, network: Callable[[str], FeatureNetwork]) -> object:
    """Take a step with moments, average and gradients in place; return what is held between steps, gradients too."""
    return prepared(setting, device_batch, network)()


def prepared(setting: Setting, device_batch: int, network: Callable[[str], FeatureNetwork]) -> Callable[[], object]:
    """What takes a step, see `train`, once all that is held between steps is in place.

    `network` gives those of the setting. A process that has more images than a device batch takes two of these: more
    would add their features alone.
    """
    impl, precision = counted_on("lean", torch.device("cpu")), Precision("cpu")
    model = create_model(setting.size, impl=impl, checkpointing=setting.checkpointing, aux_head=False)
    generator = GeneratorModule(model, LOSSES[setting.size], published_guidance(setting.size))
    optimizers = build_optimizers(model, OptimizerConfig(name="adamw"))
    averages = Averages(model, (1,))
    networks = {name: network(name) for name in setting.networks}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # held at all times, by DDP's buckets

    def generate(noise: Tensor, labels: Tensor) -> Tensor:
        with precision.autocast():
            return generator(noise, labels)

    def update() -> None:
        for part in optimizers.values():
            part.step()
        averages.update(model, BATCH, BATCH)

    update()
    widths = {name: made.width or 0 for name, made in networks.items()}
    loss = frechet_loss(widths) if networks else None

    def step() -> object:
        batches = [_latents(setting.size, device_batch) for _ in range(1 if device_batch >= SHARE else 2)]
        if loss is None:
            generate(batches[0].noise, batches[0].labels).sum().backward()
            update()
            return model, optimizers, averages
        out = FrechetStep(generate, networks, loss)(batches)
        update()
        loss.add(out.features)
        del batches
        gc.collect()
        return model, optimizers, averages, networks, loss, out

    return step


def _latents(size: str, rows: int) -> Latents:
    return Latents(torch.randn(rows, *MODELS[size].image_shape), torch.zeros(rows, dtype=torch.int64))


def step_bytes(setting: Setting, device_batch: int) -> LiveBytes:
    """Bytes of a process: at the peak of a whole step, and between steps, with gradients.

    Counted on fake CPU tensors. What an operator allocates and frees inside, such as eigh, is not counted.
    """
    with _fake_networks(setting) as network:
        return live_bytes(lambda: train(setting, device_batch, network))


def step_operators(setting: Setting, device_batch: int) -> int:
    """Operators of a step that compute, see `computing_operators`; a fused op of ours counts as one."""
    with _fake_networks(setting) as network:
        return computing_operators(prepared(setting, device_batch, network))


@contextmanager
def _fake_networks(setting: Setting) -> Iterator[Callable[[str], FeatureNetwork]]:
    """A context in which every tensor is fake, and the networks of the setting in it."""
    networks = {name: deepcopy(meta_network(name, setting.dtype)) for name in setting.networks}
    # The optimizer reads the number of its step, and the loss whether features are finite: no fake tensor knows.
    read = patch.multiple(FakeTensor, item=lambda number: 1.0, __bool__=lambda value: True)
    with FakeTensorMode(), read:
        yield lambda name: filled(networks[name])


def largest_batch(peak: Callable[[int], int], budget: float) -> int:
    """Largest device batch whose peak is within the budget, 0 if none.

    The peak is a line in the device batch, one below a process's share of a step and one from there.
    """
    few = SHARE if peak(SHARE) <= budget else SHARE // 4
    base, row = peak(few), (peak(2 * few) - peak(few)) / few
    return max(0, int(few + (budget - base) // row))


# The command.


def posttrain(size: str = "pMF-B/16", device_batch: int = SHARE) -> None:
    """Count a step of post-training with AdamW, one average and 1024 images over 8 processes, on any machine.

    Args:
        size: Preset of the network.
        device_batch: Images of a process at a time.
    """
    known = sorted(LOSSES.keys() & SAMPLING.keys())
    require(size in known, f"size: expected one of {', '.join(known)}, got {size!r}")
    require(device_batch > 0, f"device_batch: expected a positive number, got {device_batch}")
    columns = ["", "weights, M", "GFLOP of an image", "blocks checkpointed", "float64 GFLOP of a step", "MB gathered"]
    columns.append("operators of a step")
    start = f"{size}, {BATCH} images over {PROCESSES} processes, device batch {device_batch}"
    print(start, markdown(columns, [counts(size, names, device_batch) for names in ROWS]), sep="\n\n")
    choices = [(dtype, way) for way in CHECKPOINTINGS for dtype in (torch.float32, torch.bfloat16)]
    headers = [f"{str(dtype).removeprefix('torch.')}, checkpointing {way}" for dtype, way in choices]
    rows = [[label(names), *(memory(Setting(size, names, *c), device_batch) for c in choices)] for names in ROWS]
    print("GB at the peak; largest device batch on 90 % of 80 GB; by dtype of the feature networks\n")
    print(markdown(["", *headers], rows))


def label(networks: tuple[str, ...]) -> str:
    """The name of a row."""
    return " + ".join(networks) or "generator alone"


def counts(size: str, networks: tuple[str, ...], device_batch: int) -> list[str]:
    """A row of operations and bytes."""
    modules: list[nn.Module] = [meta_network(name) for name in networks] or [
        create_model(size, aux_head=False, device="meta")
    ]
    values = sum(p.numel() for module in modules for p in module.parameters())
    widths = [module.width or 0 for module in modules if isinstance(module, FeatureNetwork)]
    images = [image_operations(Setting(size, networks, checkpointing=way), device_batch) for way in CHECKPOINTINGS]
    exact, sent = sum(map(frechet_operations, widths)), sum(map(gathered_bytes, widths))
    return [
        label(networks),
        f"{values / 1e6:.0f}",
        *(f"{value / 1e9:.0f}" for value in images),
        f"{exact / 1e9:.0f}",
        f"{sent / 1e6:.1f}",
        f"{step_operators(Setting(size, networks), device_batch):,}",
    ]


def memory(setting: Setting, device_batch: int) -> str:
    """The peak at the device batch, and the largest device batch."""
    peak = cache(lambda rows: step_bytes(setting, rows).peak)
    return f"{peak(device_batch) / 1e9:.1f}; {largest_batch(peak, BUDGET)}"
