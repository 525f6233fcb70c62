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

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pmf.errors import InputError, require
from pmf.fields import check_values
from pmf.metrics import Statistics

EPS = 0.01
ROUNDING = 16
"""Eigenvalues of M are known to so many units of rounding of the product of the norms of S_r and S; fewer than 1 was
seen, up to width 1024."""
BLOCK = 4096
"""So many features of a queue are float64 at a time."""


class Target(nn.Module):
    """The distance to one set of statistics, in float64, with its gradient in closed form."""

    mu: Tensor
    sigma: Tensor
    root: Tensor
    largest: Tensor

    def __init__(self, reference: Statistics) -> None:
        super().__init__()
        mu, sigma = (torch.from_numpy(np.array(x, np.float64, order="C")) for x in (reference.mu, reference.sigma))
        sigma = (sigma + sigma.T) / 2
        values, vectors = torch.linalg.eigh(sigma)
        self.register_buffer("mu", mu, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)
        self.register_buffer("root", (vectors * values.clamp(min=0).sqrt()) @ vectors.T, persistent=False)
        self.register_buffer("largest", values[-1].clone(), persistent=False)

    def forward(self, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(FD, dFD/dmu [d], dFD/dS [d, d]) of a mean [d] and a covariance [d, d], both float64.

        Eigenvalues of M within rounding of zero count as zero, and their directions have no gradient of the root term:
        it would be as large as the rounding is small. NaN if values are not finite or their eigenvalues are not found.
        """
        values, vectors = _eigh(self.root @ sigma @ self.root)
        # Not relative to the largest of M: M is all rounding where two populations share no direction.
        floor = ROUNDING * torch.finfo(values.dtype).eps * self.largest * torch.linalg.matrix_norm(sigma)
        values = torch.where(values <= floor, 0, values)  # keeps NaN
        inverse = torch.where(values == 0, 0, values.rsqrt())
        turned = self.root @ vectors
        d_sigma = (turned * -inverse) @ turned.T
        d_sigma.diagonal().add_(1)
        difference = mu - self.mu
        distance = difference.square().sum() + sigma.trace() + self.sigma.trace() - 2 * values.sqrt().sum()
        return distance.clamp(min=0), 2 * difference, d_sigma


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix; NaN if it is not finite, or if the algorithm fails."""
    if bool(torch.isfinite(matrix).all()):
        with contextlib.suppress(torch.linalg.LinAlgError):
            return torch.linalg.eigh((matrix + matrix.T) / 2)
    return torch.full_like(matrix[0], torch.nan), torch.full_like(matrix, torch.nan)


def _mixed(mu: Tensor, sigma: Tensor, features: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a population of which features [n, d], float64, take a share.

    Covariances are about their own means: E[f f^T] - mu mu^T would lose the digits that mu^2 has before S.
    """
    mean = features.mean(0)
    centred, difference = features - mean, mean - mu
    mixed = torch.addmm(sigma, centred.T, centred, beta=1 - share, alpha=share / len(features))
    return mu + share * difference, mixed.addr_(difference, difference, alpha=share * (1 - share))


class Population(nn.Module):
    """Past features by their mean and covariance, float64: `MovingAverage` or `Queue`. It starts empty.

    A batch that would make it infinite or NaN does not enter: no later one could mend it.
    """

    mu: Tensor
    sigma: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        check_values(int, width=width)
        require(width > 0, f"width: expected a positive number, got {width}")
        self.register_buffer("mu", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("sigma", torch.zeros(width, width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def seen(self) -> int:
        """How many features have entered."""
        return int(self.count.item())

    def moved(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance (divided by n) once a batch [B, d] has entered; the population itself stays."""
        raise NotImplementedError

    def unbiased(self, batch: int) -> float:
        """The factor of the covariance once so many features have entered."""
        return 1.0

    def fill(self, features: Tensor) -> None:
        """Add features [n, d] with equal weights: what the population is before the first step."""
        raise NotImplementedError

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Let a batch [B, d] enter."""
        self._enter(features, *self.moved(features))

    def _enter(self, features: Tensor, mu: Tensor, sigma: Tensor) -> bool:
        if not torch.isfinite(sigma).all():
            return False
        self.mu.copy_(mu)
        self.sigma.copy_(sigma)
        self.count.add_(len(features))
        return True


class MovingAverage(Population):
    """A population in which every batch has a share of 1 - decay when it enters.

    The weight of a batch decays by `decay` with every later one, so its window is 1 / (1 - decay) batches. Mean and
    covariance are those of all features by their weights; the first batch of an empty population is all of it.
    """

    def __init__(self, width: int, decay: float) -> None:
        super().__init__(width)
        check_values(float, decay=decay)
        require(0 <= decay < 1, f"decay: expected a number in [0, 1), got {decay}")
        self.decay = decay

    def moved(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance once a batch [B, d] has entered; the population itself stays."""
        _check_rows("features", features, self.mu)
        return _mixed(self.mu, self.sigma, features.double(), 1 - self.decay if self.seen else 1.0)

    @torch.no_grad()
    def fill(self, features: Tensor) -> None:
        """Add features [n, d], so that all so far weigh the same: what the population is before the first step."""
        _check_rows("features", features, self.mu)
        share = len(features) / (self.seen + len(features))
        self._enter(features, *_mixed(self.mu, self.sigma, features.double(), share))


class Queue(Population):
    """A population of the last `size` features, float32, or of all so far if they are fewer.

    Its window is size / B batches; its covariance is unbiased. A batch takes the places of the oldest features. Mean
    and covariance move with every batch, and are computed anew from all features whenever the places start over: the
    rounding that a large feature leaves behind does not stay.
    """

    features: Tensor

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width)
        check_values(int, size=size)
        require(size > 1, f"size: expected more than 1 feature, got {size}")
        self.size = size
        self.register_buffer("features", torch.zeros(size, width, dtype=torch.float32))

    def unbiased(self, batch: int) -> float:
        """The factor of the covariance once so many features have entered."""
        n = min(self.seen + batch, self.size)
        return n / max(n - 1, 1)

    def moved(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance (divided by n) once a batch [B, d] has entered; the population itself stays."""
        _check_rows("features", features, self.mu)
        batch, count = len(features), self.seen
        require(batch <= self.size, f"size: expected a queue of at least a batch, {batch} features, got {self.size}")
        before, after = min(count, self.size), min(count + batch, self.size)
        new, old = features.float().double(), self.features[self._places(batch)[after - before :]].double()
        # About the mean before, which loses no digits.
        centre = self.mu if before else new.mean(0)
        new, old = new - centre, old - centre
        shift = (new.sum(0) - old.sum(0)) / after
        sigma = torch.addmm(self.sigma, new.T, new, beta=before / after, alpha=1 / after)
        sigma.addmm_(old.T, old, alpha=-1 / after).addr_(shift, shift, alpha=-1)
        return centre + shift, sigma

    def _places(self, batch: int) -> Tensor:
        return (self.count + torch.arange(batch, device=self.features.device)) % self.size

    def _enter(self, features: Tensor, mu: Tensor, sigma: Tensor) -> bool:
        places, starts_over = self._places(len(features)), self.seen % self.size + len(features) >= self.size
        finite = super()._enter(features, mu, sigma)
        if finite:
            self.features[places] = features.float()
        if finite and starts_over:
            self._compute_anew()
        return finite

    def _compute_anew(self) -> None:
        """Take mean and covariance from the features, of which there are `size`."""
        mu, sigma, done = torch.zeros_like(self.mu), torch.zeros_like(self.sigma), 0
        for rows in self.features.split(BLOCK):
            done += len(rows)
            mu, sigma = _mixed(mu, sigma, rows.double(), len(rows) / done)
        self.mu.copy_(mu)
        self.sigma.copy_(sigma)

    @torch.no_grad()
    def fill(self, features: Tensor) -> None:
        """Add features [n, d], any number: what the population is before the first step."""
        _check_rows("features", features, self.mu)
        for rows in features.split(min(self.size, BLOCK)):
            self.add(rows)


class _Distance(torch.autograd.Function):
    """FD of the population with a batch of all ranks in it; its gradient in the rows of this rank is known at once."""

    @staticmethod
    def forward(ctx, rows: Tensor, every: Tensor, target: Target, population: Population) -> Tensor:
        mu, sigma = population.moved(every)
        unbiased = population.unbiased(len(every))
        distance, d_mu, d_sigma = target(mu, sigma * unbiased)
        # Ranks average their gradients, of which each has only those of its own rows: divide by these.
        ctx.save_for_backward((d_mu + 2 * unbiased * (rows.double() - mu) @ d_sigma) / len(rows))
        ctx.dtype = rows.dtype
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx, d_distance: Tensor):
        (gradient,) = ctx.saved_tensors
        return (d_distance * gradient).to(ctx.dtype), None, None, None


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
        check_values(Mapping, references=references)
        check_values(Mapping | None, weights=weights)
        check_values(Callable, population=population)
        require(not isinstance(population, Population), "population: expected a function of a width, got a population")
        check_values(dist.ProcessGroup | None, group=group)
        require(len(references) > 0, "references: expected at least one network, got none")
        require(eps > 0, f"eps: expected a positive number, got {eps}")
        weights = dict.fromkeys(references, 1.0) | dict(weights or {})
        unknown = [name for name in weights if name not in references]
        require(not unknown, f"weights: expected networks of {list(references)}, got {unknown}")
        for name, weight in weights.items():
            check_values(float, **{f"weights[{name!r}]": weight})
            require(weight > 0, f"weights: expected positive numbers, got {weight} for {name}")
        self.weights, self.eps, self.group = weights, eps, group
        self.targets, self.populations = nn.ModuleDict(), nn.ModuleDict()  # type: ignore[assignment]
        for name, reference in references.items():
            self._add_network(name, reference, population)

    def _add_network(self, name: str, reference: Statistics, population: Callable[[int], Population]) -> None:
        check_values(Statistics, **{f"references[{name!r}]": reference})
        width = len(reference.mu)
        held = population(width)
        fits = isinstance(held, Population) and len(held.mu) == width
        require(fits, lambda: f"population: expected a MovingAverage or Queue of width {width}, got {held!r:.80}")
        try:
            self.targets[name], self.populations[name] = Target(reference), held
        except (KeyError, TypeError) as error:
            raise InputError(f"references: expected names that modules can have, got {name!r}: {error}") from None

    def forward(self, features: Mapping[str, Tensor]) -> FrechetOutput:
        """The loss of this rank's features {network: [B, d]}; the populations stay as they are.

        It is NaN where features are not finite, and where eigenvalues are not found.
        """
        self._check(features)
        parts = [self.term(name, features[name]) for name in self.targets]
        distances = {name: value for part in parts for name, value in part.distances.items()}
        every = {name: rows for part in parts for name, rows in part.features.items()}
        return FrechetOutput(torch.stack([part.loss for part in parts]).sum(), distances, every)

    def term(self, name: str, rows: Tensor) -> FrechetOutput:
        """The part of the loss that network `name` has with this rank's features [B, d]; the loss is the sum of these.

        By this a step can take networks one after another. Every rank must call with the same network.
        Errors: `InputError` on another name, or features of another width, dtype or device.
        """
        check_values(str, name=name)
        require(name in self.targets, lambda: f"name: expected one of {list(self.targets)}, got {name!r}")
        _check_rows(f"features[{name!r}]", rows, self.targets[name].mu)
        every = self.of_all_ranks(rows)
        distance = _Distance.apply(rows, every, self.targets[name], self.populations[name])
        value = distance.detach()
        return FrechetOutput(self.weights[name] * distance / (value + self.eps), {name: value}, {name: every})

    def gathered(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features of all ranks in order of rank, without gradient. Every rank must call."""
        self._check(features)
        return {name: self.of_all_ranks(features[name]) for name in self.targets}

    def of_all_ranks(self, rows: Tensor) -> Tensor:
        """The rows [B, d] of all ranks in order of rank, without gradient. Every rank must call."""
        rows, ranks = rows.detach(), dist.get_world_size(self.group) if dist.is_initialized() else 1
        if ranks == 1:
            return rows
        every = rows.new_empty(ranks * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(every, rows.contiguous(), group=self.group)
        return every

    @torch.no_grad()
    def fill(self, every: Mapping[str, Tensor]) -> None:
        """Add features of all ranks, from `gathered`, to the populations before the first step, with equal weights.

        Errors: `InputError` on features that are not finite.
        """
        self._check(every)
        for name in self.targets:
            finite = bool(torch.isfinite(every[name].float()).all())
            require(finite, f"features: expected finite values of {name}, got NaN or infinity")
        for name, population in self.populations.items():
            population.fill(every[name])

    @torch.no_grad()
    def add(self, every: Mapping[str, Tensor]) -> None:
        """Let the features of a batch, `FrechetOutput.features`, enter the populations, unless they are not finite."""
        self._check(every)
        for name, population in self.populations.items():
            population.add(every[name])

    def _check(self, features: Mapping[str, Tensor]) -> None:
        check_values(Mapping, features=features)
        same = set(features) == set(self.targets)
        require(same, lambda: f"features: expected those of {list(self.targets)}, got {list(features)}")
        for name, value in features.items():
            _check_rows(f"features[{name!r}]", value, self.targets[name].mu)


def _check_rows(name: str, value: Tensor, mu: Tensor) -> None:
    """Raise `InputError` unless these are features of the width and on the device of a mean."""
    check_values(Tensor, **{name: value})
    shape, wanted = list(value.shape), f"floats [B, {len(mu)}] on {mu.device}"
    fits = value.is_floating_point() and len(shape) == 2 and shape[0] > 0 and shape[1] == len(mu)
    fits = fits and value.device == mu.device
    require(fits, lambda: f"{name}: expected {wanted}, got {value.dtype} {shape} on {value.device}")
