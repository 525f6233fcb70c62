"""Features, and the Fréchet distance and its populations in plain code, for the tests of `pmf.frechet`."""

import math

import torch

EXACT = dict(rtol=1e-10, atol=1e-10)
D = 5


def randn(*shape, seed=0, dtype=torch.float64):
    """Values that float32 holds exactly, as queues do."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def features(count, width, seed, rank=None, constant=0):
    """Correlated features of a rank, some of which are constant."""
    rank = rank or width
    turn = torch.linalg.qr(randn(width, width, seed=seed + 1)).Q
    x = randn(count, rank, seed=seed) * torch.linspace(0.5, 2, rank, dtype=torch.float64)
    x = x @ turn[:rank] + randn(width, seed=seed + 2)
    x[:, :constant] = 1.5
    return x


def covariance(x, weights=None):
    """Mean and covariance of features by their weights (None: equal, and unbiased)."""
    unbiased = len(x) / (len(x) - 1) if weights is None else 1
    weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype) if weights is None else weights
    mu = weights @ x
    return mu, (x - mu).T @ ((x - mu) * weights[:, None]) * unbiased


def root(sigma):
    values, vectors = torch.linalg.eigh(sigma)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def by_eigenvalues(mu, sigma, mu_r, sigma_r):
    """FD as its equation says, for autograd; the covariances are regular."""
    trace = torch.linalg.eigvalsh(root(sigma_r) @ sigma @ root(sigma_r)).sqrt().sum()
    return (mu - mu_r).square().sum() + sigma.trace() + sigma_r.trace() - 2 * trace


def by_singular_values(x, y):
    """FD of two sets of features: the root term is the nuclear norm of X Y^T, which takes the root of no rounding."""
    (mu, sigma), (mu_r, sigma_r) = covariance(x), covariance(y)
    product = (x - mu) @ (y - mu_r).T / math.sqrt((len(x) - 1) * (len(y) - 1))
    values = torch.linalg.svdvals(product)
    nuclear = values[: int((values > 1e-10 * values[0]).sum())].sum()
    return (mu - mu_r).square().sum() + sigma.trace() + sigma_r.trace() - 2 * nuclear


def of(x):
    return torch.from_numpy(x.mu), torch.from_numpy(x.sigma)


class Weighted:
    """A moving average by brute force: every feature ever added, and its weight."""

    def __init__(self, decay):
        self.decay, self.x, self.weights = decay, torch.zeros(0, D).double(), torch.zeros(0).double()

    def fill(self, x):
        """All n features added so far have n / (n + new) of the weight together."""
        self._enter(x, len(x) / (len(self.x) + len(x)))

    def add(self, x):
        """The batch has 1 - decay of the weight, or all of it."""
        self._enter(x, 1 - self.decay if len(self.x) else 1)

    def _enter(self, x, share):
        new = torch.full((len(x),), share / len(x), dtype=torch.float64)
        self.x, self.weights = torch.cat([self.x, x]), torch.cat([self.weights * (1 - share), new])

    def covariance(self):
        return covariance(self.x, self.weights)


class Last:
    """A queue by brute force: the list of the last features."""

    def __init__(self, size):
        self.size, self.x = size, torch.zeros(0, D).double()

    def add(self, x):
        rounding = (x.float().double() - x).detach()  # float32, but not its gradient
        self.x = torch.cat([self.x, x + rounding])[-self.size :]

    fill = add

    def covariance(self):
        return covariance(self.x)
