"""The Fréchet distance as a loss (FD-loss, arXiv 2604.28190): features of generated images match those of real ones.

FD   = |mu - mu_r|^2 + tr S + tr S_r - 2 tr (S_r^1/2 S S_r^1/2)^1/2         mean mu and covariance S of a population
loss = sum_k w_k FD_k / (stopgrad(FD_k) + eps)                              over feature networks k

The population holds many past batches, of which only the current one has gradients. With M = S_r^1/2 S S_r^1/2,

dFD/dmu = 2 (mu - mu_r),   dFD/dS = I - S_r^1/2 M^-1/2 S_r^1/2,
dFD/df_i = (dFD/dmu + 2 dFD/dS (f_i - mu)) / B                              for each feature f_i of a batch of B

The last line leaves out the batch's share of the population (1 - decay, or B / N): the gradient is that of a batch that
moved the whole population, so its size does not depend on the population's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pmf.errors import require
from pmf.fields import check_values
from pmf.metrics import Statistics

EPS = 0.01


class Target(nn.Module):
    """The distance to one set of statistics, in float64, with its gradient in closed form."""

    mu: Tensor
    sigma: Tensor
    root: Tensor

    def __init__(self, reference: Statistics) -> None:
        super().__init__()
        check_values(Statistics, reference=reference)
        sigma = torch.from_numpy(reference.sigma).double()
        sigma = (sigma + sigma.T) / 2
        values, vectors = torch.linalg.eigh(sigma)
        self.register_buffer("mu", torch.from_numpy(reference.mu).double(), persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        self.register_buffer("root", (vectors * values.clamp(min=0).sqrt()) @ vectors.T, persistent=False)

    def forward(self, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(FD, dFD/dmu [d], dFD/dS [d, d]) of a mean [d] and a covariance [d, d], both float64.

        Eigenvalues of M within rounding of zero count as zero, and their directions have no gradient of the root term:
        it would be as large as the rounding is small. Values that are not finite give NaN.
        """
        between = self.root @ sigma @ self.root
        difference = mu - self.mu
        if not bool(torch.isfinite(between).all()):
            return between.new_tensor(torch.nan), torch.full_like(mu, torch.nan), torch.full_like(sigma, torch.nan)
        values, vectors = torch.linalg.eigh((between + between.T) / 2)
        known = values > len(mu) * torch.finfo(values.dtype).eps * values[-1]
        inverse = torch.where(known, values, 1).rsqrt() * known
        turned = self.root @ vectors
        d_sigma = torch.eye(len(mu), dtype=mu.dtype, device=mu.device) - (turned * inverse) @ turned.T
        root_trace = values.clamp(min=0).sqrt().sum()
        distance = difference.square().sum() + sigma.trace() + self.sigma.trace() - 2 * root_trace
        return distance, 2 * difference, d_sigma


class MovingAverage(nn.Module):
    """A population as exponential averages of E[f] and E[f f^T], float64.

    E' = decay E + (1 - decay) mean over the batch. Its window is 1 / (1 - decay) batches. The covariance is
    E[f f^T] - mu mu^T. It starts empty; features that are added before `begin` count equally.
    """

    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(self, width: int, decay: float) -> None:
        super().__init__()
        check_values(int, width=width)
        check_values(float, decay=decay)
        require(width > 0, f"width: expected a positive number, got {width}")
        require(0 <= decay < 1, f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("first", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("second", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def unbiased(self) -> float:
        """The factor of the covariance."""
        return 1.0

    def moved(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """E[f] and E[f f^T] once a batch [B, d] has entered; the population itself stays."""
        f = features.double()
        return torch.lerp(f.mean(0), self.first, self.decay), torch.lerp(f.T @ f / len(f), self.second, self.decay)

    def fill(self, features: Tensor) -> None:
        """Add features [n, d] with equal weights: what the population is before the first step."""
        f, count = features.double(), self.count + len(features)
        self.first.add_((f.sum(0) - len(f) * self.first) / count)
        self.second.add_((f.T @ f - len(f) * self.second) / count)
        self.count.copy_(count)

    def add(self, features: Tensor) -> None:
        """Let a batch [B, d] enter."""
        first, second = self.moved(features)
        self.first.copy_(first)
        self.second.copy_(second)
        self.count.add_(len(features))

    def check_batch(self, batch: int) -> None:
        """Any batch fits."""


class Queue(nn.Module):
    """A population of the last `size` features, float32, with running sums of f and f f^T, float64.

    Its window is size / B batches; its covariance is unbiased. A batch takes the places of the oldest features.
    """

    features: Tensor
    first: Tensor
    second: Tensor
    count: Tensor

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        check_values(int, width=width, size=size)
        require(width > 0 and size > 1, f"width, size: expected > 0 and > 1, got {width} and {size}")
        self.size = size
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("first", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("second", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def unbiased(self) -> float:
        """The factor of the covariance."""
        return self.size / (self.size - 1)

    def moved(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """E[f] and E[f f^T] once a batch [B, d] has entered; the population itself stays."""
        first, second = self._sums(features)
        return first / self.size, second / self.size

    def _sums(self, features: Tensor) -> tuple[Tensor, Tensor]:
        new, old = features.float().double(), self.features[self._places(len(features))].double()
        return self.first + new.sum(0) - old.sum(0), self.second + new.T @ new - old.T @ old

    def _places(self, count: int) -> Tensor:
        return (self.count + torch.arange(count, device=self.features.device)) % self.size

    def add(self, features: Tensor) -> None:
        """Let a batch [B, d] enter."""
        self.check_batch(len(features))
        first, second = self._sums(features)
        self.first.copy_(first)
        self.second.copy_(second)
        self.features[self._places(len(features))] = features.float()
        self.count.add_(len(features))

    fill = add

    def check_batch(self, batch: int) -> None:
        """Raise `InputError` on a batch that is larger than the queue."""
        require(batch <= self.size, f"queue: expected at least a batch, {batch} features, got {self.size}")


Population = MovingAverage | Queue


class _Distance(torch.autograd.Function):
    """FD of the population with a batch of all ranks in it; its gradient in the rows of this rank is known at once."""

    @staticmethod
    def forward(ctx, rows: Tensor, every: Tensor, target: Target, population: Population) -> Tensor:
        first, second = population.moved(every)
        sigma = (second - first.outer(first)) * population.unbiased
        distance, d_mu, d_sigma = target(first, sigma)
        # Ranks average their gradients, of which each has only those of its own rows: divide by these.
        gradient = (d_mu + 2 * population.unbiased * (rows.double() - first) @ d_sigma) / len(rows)
        ctx.save_for_backward(gradient.to(rows.dtype))
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx, d_distance: Tensor):
        (gradient,) = ctx.saved_tensors
        return d_distance.to(gradient.dtype) * gradient, None, None, None


@dataclass(frozen=True)
class FrechetOutput:
    """The result of `FrechetLoss`."""

    loss: Tensor
    """The scalar to differentiate, float64; equal on every rank."""
    distances: dict[str, Tensor]
    """FD of each network, of the population with this batch in it; detached, float64."""
    features: dict[str, Tensor]
    """The features of all ranks, detached, which `FrechetLoss.add` takes."""


class FrechetLoss(nn.Module):
    """sum_k w_k FD_k / (stopgrad(FD_k) + eps) over feature networks, each with a population of past features.

    Equal relative pushes need no scales: every term is about w_k. Fill the populations before the first step (`fill`),
    and let the features of a batch enter once its step is taken (`add`). The buffers are the populations, so the state
    dict is what a run must save; references are not in it.

    With several ranks each gives its own rows, as many as any other, and the gradient is such that its mean over ranks,
    as DDP and FSDP take it, is that of the loss of all rows. Everything runs in float64, on the buffers' device.

    Args: references, the statistics of real images by network; population, width -> `MovingAverage` or `Queue`; weights
    by network (default 1); eps; group, the ranks' process group (None: this process alone, or the default group if
    there is one). Errors: `InputError` on features of other networks, widths or numbers than these.
    """

    targets: dict[str, Target]
    populations: dict[str, Population]

    def __init__(
        self,
        references: Mapping[str, Statistics],
        population: Callable[[int], Population],
        *,
        weights: Mapping[str, float] | None = None,
        eps: float = EPS,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_values(float, eps=eps)
        require(len(references) > 0, "references: expected at least one network, got none")
        require(eps > 0, f"eps: expected a positive number, got {eps}")
        weights = dict.fromkeys(references, 1.0) | dict(weights or {})
        unknown = sorted(set(weights) - set(references))
        require(not unknown, f"weights: expected networks of {sorted(references)}, got {unknown}")
        for name, weight in weights.items():
            check_values(float, **{f"weights[{name!r}]": weight})
            require(weight > 0, f"weights: expected positive numbers, got {weight} for {name}")
        self.weights, self.eps, self.group = weights, eps, group
        targets = {name: Target(value) for name, value in references.items()}
        populations = {name: population(len(value.mu)) for name, value in references.items()}
        self.targets = nn.ModuleDict(targets)  # type: ignore[assignment]
        self.populations = nn.ModuleDict(populations)  # type: ignore[assignment]

    def forward(self, features: Mapping[str, Tensor]) -> FrechetOutput:
        """The loss of this rank's features {network: [B, d]}; the populations stay as they are."""
        every = self.gathered(features)
        total: Tensor = torch.zeros((), dtype=torch.float64)
        distances = {}
        for name, target in self.targets.items():
            population = self.populations[name]
            population.check_batch(len(every[name]))
            distance = _Distance.apply(features[name], every[name], target, population)
            distances[name] = distance.detach()
            total = total.to(distance) + self.weights[name] * distance / (distances[name] + self.eps)
        return FrechetOutput(total, distances, every)

    def gathered(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features of all ranks in order of rank, without gradient. Every rank must call."""
        self._check(features)
        ranks = dist.get_world_size(self.group) if dist.is_initialized() else 1
        return {name: _all_rows(features[name].detach(), ranks, self.group) for name in self.targets}

    @torch.no_grad()
    def fill(self, every: Mapping[str, Tensor]) -> None:
        """Add features of all ranks, from `gathered`, to the populations before the first step, with equal weights."""
        for name, population in self.populations.items():
            population.fill(every[name])

    @torch.no_grad()
    def add(self, every: Mapping[str, Tensor]) -> None:
        """Let the features of a batch, `FrechetOutput.features`, enter the populations."""
        for name, population in self.populations.items():
            population.add(every[name])

    def _check(self, features: Mapping[str, Tensor]) -> None:
        same = set(features) == set(self.targets)
        require(same, lambda: f"features: expected those of {sorted(self.targets)}, got {sorted(features)}")
        for name, value in features.items():
            width, shape = len(self.targets[name].mu), list(value.shape)
            fits = len(shape) == 2 and shape[0] > 0 and shape[1] == width
            require(fits, lambda: f"features: expected {name} of shape [B, {width}], got {shape}")  # noqa: B023


def _all_rows(rows: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    if ranks == 1:
        return rows
    every = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(every, rows.contiguous(), group=group)
    return every
