"""Populations of features against all features ever added, by brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pmf.frechet import MovingAverage, Queue, Target
from pmf.metrics import Statistics
from tests.pmf.frechet_checks import EXACT, D, Last, Weighted, covariance, randn, root

STEPS = st.lists(st.tuples(st.sampled_from(["fill", "add", "load"]), st.integers(2, 7)), min_size=1, max_size=12)


def check_population(new, plain, steps, seed):
    """Steps of the kinds `fill`, `add` and `load` (into a new object), each after a look ahead."""
    held = new()
    for i, (kind, count) in enumerate(steps):
        if kind == "load":
            state, held = held.state_dict(), new()
            held.load_state_dict(state)
            continue
        x = randn(count, D, seed=seed + i) * (1 + i % 3) + 10 * randn(D, seed=seed)
        before = {name: value.clone() for name, value in held.state_dict().items()}
        mu, sigma = held.moved(x) if kind == "add" else (None, None)
        factor = held.unbiased(count)
        assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())
        getattr(held, kind)(x)
        getattr(plain, kind)(x)
        expected = plain.covariance()
        assert_close((held.mu, held.sigma * held.unbiased(0)), expected, **EXACT)
        if kind == "add":
            assert_close((mu, sigma * factor), expected, **EXACT)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(steps=STEPS, decay=st.sampled_from([0.0, 0.3, 0.9, 0.999]), seed=st.integers(0, 1000))
def test_a_moving_average_is_all_features_by_their_weights(steps, decay, seed):
    check_population(lambda: MovingAverage(D, decay), Weighted(decay), steps, seed)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(steps=STEPS, size=st.integers(7, 16), seed=st.integers(0, 1000))
def test_a_queue_is_its_last_features(steps, size, seed):
    check_population(lambda: Queue(D, size), Last(size), steps, seed)


def test_a_queue_may_be_a_batch_and_be_filled_with_more(monkeypatch):
    monkeypatch.setattr("pmf.frechet.BLOCK", 3)  # its features are taken in several blocks
    check_population(lambda: Queue(D, 7), Last(7), [("fill", 20), ("add", 7), ("add", 7), ("fill", 9), ("add", 3)], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_population_holds_the_same_whatever_the_default_dtype_is(dtype):
    features = randn(9, D).float()
    held = [Queue(D, 7), MovingAverage(D, 0.9)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        held += [Queue(D, 7), MovingAverage(D, 0.9)]
        for population in held:
            population.fill(features)
            population.add(features[:4])
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(held[:2], held[2:], strict=True):
        for name, buffer in one.state_dict().items():
            assert other.state_dict()[name].dtype == buffer.dtype and torch.equal(other.state_dict()[name], buffer)


def test_a_queue_does_not_drift():
    """10,000 steps on features whose mean is 1000 times their deviation."""
    held, plain = Queue(D, 16), Last(16)
    x = 1000 + randn(10_000, 5, D).float().double()
    for batch in x:
        held.add(batch)
    plain.add(x.flatten(0, 1)[-16:])
    assert_close((held.mu, held.sigma * 16 / 15), plain.covariance(), rtol=1e-12, atol=1e-11)


def test_a_queue_forgets_the_rounding_of_large_features():
    held, plain = Queue(D, 16), Last(16)
    for i in range(12):
        x = randn(4, D, seed=i) * (1e7 if i == 5 else 1)
        held.add(x)
        plain.add(x)
    assert_close((held.mu, held.sigma * 16 / 15), plain.covariance(), **EXACT)


@pytest.mark.parametrize("new", [lambda: MovingAverage(D, 0.9), lambda: Queue(D, 64)])
def test_a_mean_far_above_the_deviation_loses_no_digits(new):
    """One feature is constant: E[f f^T] - mu mu^T would give it a variance by rounding, and that a distance."""
    held, y = new(), 1000 + randn(50, D, seed=99)
    batches = 1000 + randn(40, 8, D).float().double()
    batches[..., 0] = torch.tensor(1000.1).double()
    plain = Weighted(0.9) if isinstance(held, MovingAverage) else Last(64)
    for x in batches:
        held.add(x)
        plain.add(x)
        mu, sigma = plain.covariance()
        assert_close((held.mu, held.sigma * held.unbiased(0)), (mu, sigma), rtol=1e-12, atol=1e-11)
        assert held.sigma[0, 0].abs() < 1e-20
    (mu_r, sigma_r), found = covariance(y), held.sigma * held.unbiased(0)
    known = torch.linalg.eigvalsh(root(sigma_r) @ sigma @ root(sigma_r))[1:].sqrt().sum()
    distance = (mu - mu_r).square().sum() + sigma.trace() + sigma_r.trace() - 2 * known
    assert Target(Statistics.of(y))(held.mu, found)[0].item() == pytest.approx(distance.item(), rel=1e-10)
