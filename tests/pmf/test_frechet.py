"""The Fréchet distance as a loss: SciPy, autograd of plain code, two processes."""

import math
import os

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

import pmf
from pmf.frechet import FrechetLoss, MovingAverage, Queue, Target
from pmf.metrics import Statistics, frechet_distance
from tests.pmf.frechet_checks import EXACT, D, Last, Weighted, by_eigenvalues, by_singular_values, features, of, randn
from tests.train.test_distributed import free_port

REGULAR = [(width, dict(count=3 * width + 2), dict(count=4 * width + 3)) for width in (1, 2, 17, 64)]
SINGULAR = [
    (17, dict(count=60, constant=3), dict(count=70)),
    (17, dict(count=60), dict(count=70, constant=3)),
    (17, dict(count=60, constant=3), dict(count=70, constant=5)),
    (17, dict(count=8), dict(count=70)),
    (17, dict(count=70), dict(count=8)),
    (17, dict(count=8), dict(count=9)),
    (64, dict(count=300, rank=20), dict(count=300, rank=50)),
]


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
@pytest.mark.parametrize(("width", "one", "other"), REGULAR + SINGULAR)
def test_the_distance_is_scipys_and_exact_where_covariances_are_singular(width, one, other):
    x, y = features(width=width, seed=0, **one), features(width=width, seed=10, **other)
    a, b = Statistics.of(x), Statistics.of(y)
    mu, sigma = of(a)
    distance = Target(b)(mu, sigma)[0].item()
    trace = np.trace(scipy.linalg.sqrtm(a.sigma @ b.sigma)).real
    scipys = np.square(a.mu - b.mu).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace
    # Both take the roots of singular covariances' zeros, which are rounding of |A| |B|.
    zeros = width - min(np.linalg.matrix_rank(x.sigma) for x in (a, b))
    bound = 2 * zeros * math.sqrt(np.finfo(float).eps * np.linalg.norm(a.sigma) * np.linalg.norm(b.sigma))
    for other_distance in (scipys, frechet_distance(a, b)):
        assert distance == pytest.approx(other_distance, rel=0, abs=1e-8 * distance + bound)
    assert distance == pytest.approx(by_singular_values(x, y).item(), rel=1e-12)


@pytest.mark.parametrize("width", [1, 2, 17, 64])
def test_the_gradient_in_mean_and_covariance_is_that_of_autograd_and_of_differences(width):
    reference = Statistics.of(features(4 * width + 3, width, 10))
    mu, sigma = (x.requires_grad_() for x in of(Statistics.of(features(3 * width + 2, width, 0))))
    _, d_mu, d_sigma = Target(reference)(mu.detach(), sigma.detach())
    expected = torch.autograd.grad(by_eigenvalues(mu, sigma, *of(reference)), (mu, sigma))
    scale = expected[1].abs().max().item()
    assert_close(d_mu, expected[0], rtol=1e-12, atol=1e-12)
    assert_close(d_sigma, (expected[1] + expected[1].T) / 2, rtol=0, atol=1e-9 * scale)
    for seed in range(3):
        move_mu, move = randn(width, seed=seed), randn(width, width, seed=seed + 9)
        move = (move + move.T) / 2
        h = 1e-5 * torch.linalg.eigvalsh(sigma.detach())[0] / torch.linalg.matrix_norm(move)  # sigma stays positive
        ends = [Target(reference)(mu.detach() + s * move_mu, sigma.detach() + s * move)[0] for s in (h, -h)]
        slope = (d_mu * move_mu).sum() + (d_sigma * move).sum()
        size = (d_mu * move_mu).abs().sum() + (d_sigma * move).abs().sum()
        rounding = 1e-14 * (sigma.trace() + ends[0]).item() / h
        assert abs((ends[0] - ends[1]) / (2 * h) - slope) < 1e-7 * size + rounding


@pytest.mark.parametrize(("width", "one", "other"), SINGULAR[:-1])  # float32 rounds the last to full rank
def test_directions_without_variance_have_finite_gradients(width, one, other):
    """A queue of one batch: its features' gradient is that of the distance by singular values."""
    x, y = features(width=width, seed=0, **one).float().double(), features(width=width, seed=10, **other)
    x.requires_grad_()
    loss = FrechetLoss({"a": Statistics.of(y)}, lambda width: Queue(width, len(x)), eps=1.0)
    output = loss({"a": x})
    (gradient,) = torch.autograd.grad(output.loss, x)
    distance = by_singular_values(x, y)
    (expected,) = torch.autograd.grad(distance, x)
    assert_close(output.distances["a"], distance.detach(), rtol=1e-12, atol=0)
    assert_close(gradient, expected / (1 + distance.detach()), rtol=1e-6, atol=1e-7 * expected.abs().max().item())


def test_populations_that_share_no_direction_have_no_gradient_of_the_root_term():
    turn = torch.linalg.qr(randn(10, 10)).Q
    one, other = turn[:, :5] @ turn[:, :5].T, turn[:, 5:] @ turn[:, 5:].T
    distance, _, d_sigma = Target(Statistics(np.zeros(10), other.numpy()))(torch.zeros(10).double(), one)
    assert distance == pytest.approx(10, rel=1e-14)
    assert_close(d_sigma, torch.eye(10).double(), **EXACT)


def test_the_distance_of_equal_populations_is_not_negative():
    """It would be by rounding; a distance of -eps would make the loss infinite."""
    for seed in range(20):
        own = Statistics.of(1e5 * features(40, 8, seed))
        distance = Target(own)(*of(own))[0]
        assert 0 <= distance <= 1e-12 * np.trace(own.sigma)


POPULATIONS = [
    *((lambda d, b=b: MovingAverage(d, b), Weighted(b), lambda n, b=b: 1 - b) for b in (0.0, 0.5, 0.999)),
    *((lambda d, s=s: Queue(d, s), Last(s), lambda n, s=s: n / s) for s in (12, 30, 100)),
]


@pytest.mark.parametrize(("population", "plain", "share"), POPULATIONS)
def test_the_loss_and_its_gradient_are_those_of_plain_code(population, plain, share):
    """With the batch's share of the population undone; twice, with the features of the first batch in the second."""
    references = {"a": Statistics.of(features(50, D, 10)), "b": Statistics.of(2 * features(50, D, 20))}
    weights, eps = {"a": 1.0, "b": 0.3}, 0.05
    loss = FrechetLoss(references, population, weights={"b": 0.3}, eps=eps)
    filled = features(100, D, 30).float().double()
    loss.fill({"a": filled, "b": filled})
    plains = {name: type(plain)(getattr(plain, "decay", None) or getattr(plain, "size", 0)) for name in "ab"}
    for p in plains.values():
        p.fill(filled)
    for step in range(2):
        rows = {name: features(12, D, 40 + step).float().double().requires_grad_() for name in "ab"}
        output = loss(rows)
        gradients = torch.autograd.grad(output.loss, list(rows.values()))
        loss.add(output.features)
        total = 0
        for name, p in plains.items():
            p.add(rows[name])
            distance = by_eigenvalues(*p.covariance(), *of(references[name]))
            p.x = p.x.detach()
            assert output.distances[name].item() == pytest.approx(distance.item(), rel=1e-10)
            total = total + weights[name] * distance / (distance.detach() + eps)
        assert output.loss.dtype == torch.float64 and output.loss.item() == pytest.approx(total.item(), rel=1e-10)
        for gradient, expected in zip(gradients, torch.autograd.grad(total, list(rows.values())), strict=True):
            expected = expected / share(12)
            assert_close(gradient, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_the_loss_is_the_sum_of_the_terms_of_its_networks():
    references = {name: Statistics.of(features(50, D, seed)) for name, seed in (("a", 10), ("b", 20))}
    loss = FrechetLoss(references, lambda d: MovingAverage(d, 0.9), weights={"b": 0.3})
    rows = {name: features(12, D, seed).requires_grad_() for name, seed in (("a", 40), ("b", 41))}
    whole, parts = loss(rows), {name: loss.term(name, rows[name]) for name in "ab"}
    assert torch.equal(whole.loss, parts["a"].loss + parts["b"].loss)
    for name, part in parts.items():
        assert part.distances == {name: whole.distances[name]} and part.features.keys() == {name}
        assert torch.equal(part.features[name], rows[name]) and not part.features[name].requires_grad
        (gradient,), (expected,) = (torch.autograd.grad(out.loss, rows[name]) for out in (part, whole))
        assert torch.equal(gradient, expected)
        whole = loss(rows)


def test_the_size_of_the_gradient_does_not_depend_on_that_of_the_population():
    """Populations of copies of the batch: all have its mean and, a queue up to N / (N - 1), its covariance."""
    x, reference = features(128, D, 0).float().double(), Statistics.of(features(50, D, 10))
    found = []
    for population in (*(lambda d, b=b: MovingAverage(d, b) for b in (0, 0.9, 0.9999)), *(
        lambda d, s=s: Queue(d, s) for s in (128, 1024, 12800)
    )):  # fmt: skip
        loss = FrechetLoss({"a": reference}, population)
        for _ in range(100):
            loss.fill({"a": x})
        rows = x.clone().requires_grad_()
        loss({"a": rows}).loss.backward()
        found.append(rows.grad)
    scale = found[0].abs().max().item()
    for gradient, bound in zip(found, (0, 1e-9, 1e-9, 2 / 127, 2 / 1023, 2 / 12799), strict=True):
        assert_close(gradient, found[0], rtol=0, atol=2 * bound * scale)


def moving(reference=None, **options):
    return FrechetLoss(
        {"a": reference or Statistics.of(features(50, D, 10))}, lambda d: MovingAverage(d, 0.9), **options
    )


def queue(size=16):
    return FrechetLoss({"a": Statistics.of(features(50, D, 10))}, lambda d: Queue(d, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("new", [moving, queue])
def test_the_gradient_is_rounded_once_to_the_features_dtype(new, dtype):
    loss, x = new(), features(8, D, 0).to(dtype)
    loss.fill({"a": features(16, D, 5)})
    rows, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    for value in (rows, exact):
        output = loss({"a": value})
        (output.loss * 2.0**20 / 3).backward()  # a loss scale, which in float16 makes up for small gradients
    assert rows.grad.dtype == dtype and output.features["a"].dtype == torch.float64
    assert torch.equal(rows.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("new", [moving, queue])
def test_features_that_are_not_finite_give_nan_and_do_not_enter(new, bad):
    loss, x = new(), features(8, D, 0)
    loss.fill({"a": features(16, D, 5)})
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    rows = x.clone()
    rows[3, 1] = bad
    rows.requires_grad_()
    output = loss({"a": rows})
    output.loss.backward()
    assert output.loss.isnan() and output.distances["a"].isnan() and rows.grad.isnan().any()
    loss.add(output.features)
    with pytest.raises(pmf.InputError, match="features: expected finite values of a, got NaN or infinity"):
        loss.fill(output.features)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    assert loss({"a": x}).loss.isfinite()


def test_eigenvalues_that_are_not_found_give_nan(monkeypatch):
    loss, x = moving(), features(8, D, 0).requires_grad_()

    def fails(*_):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    output = loss({"a": x})
    output.loss.backward()
    assert output.loss.isnan() and x.grad.isnan().all()


@pytest.mark.filterwarnings("error")
def test_a_reference_may_be_read_only_or_reversed_and_stays_as_it_is():
    plain = Statistics.of(features(50, D, 10))
    mu, sigma = plain.mu[::-1].copy()[::-1], plain.sigma[::-1, ::-1].copy()[::-1, ::-1]
    mu.flags.writeable = sigma.flags.writeable = False
    loss, x = moving(Statistics(mu, sigma)), features(8, D, 0)
    expected = moving(plain)({"a": x}).loss
    assert torch.equal(loss({"a": x}).loss, expected)
    loss, held = moving(plain), plain.mu.copy()
    loss.targets["a"].mu.add_(1)
    assert np.array_equal(plain.mu, held)


def test_the_state_is_the_populations_alone():
    loss, x = queue(), features(8, D, 0)
    loss.fill({"a": features(16, D, 5)})
    loss.add({"a": x})
    assert all(name.startswith("populations.a.") for name in loss.state_dict())
    again = queue()
    again.load_state_dict(loss.state_dict())
    for _ in range(3):
        assert torch.equal(loss({"a": x}).loss, again({"a": x}).loss)
        loss.add({"a": x})
        again.add({"a": x})


RANKS, ROWS = 2, 6


def two_steps(rows_of, average):
    """Losses, distances and gradients of a small network over two steps, and what the populations hold."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, D)).double()
    references = {"a": Statistics.of(features(50, D, 10)), "b": Statistics.of(features(50, D, 20))}
    populations = iter([MovingAverage(D, 0.9), Queue(D, 20)])
    loss, found = FrechetLoss(references, lambda d: next(populations)), []
    with torch.no_grad():
        first = network(rows_of(randn(RANKS * ROWS, 4, seed=7)))
        loss.fill(loss.gathered({"a": first, "b": first.square()}))
    for seed in range(2):
        x = network(rows_of(randn(RANKS * ROWS, 4, seed=seed)))
        output = loss({"a": x, "b": x.square()})
        network.zero_grad()
        output.loss.backward()
        loss.add(output.features)
        gradients = [average(p.grad.clone()) for p in network.parameters()]
        found.append([output.loss.detach(), *output.distances.values(), *gradients])
    return found, loss.state_dict()


def average_of_ranks(value):
    dist.all_reduce(value)
    return value / RANKS


def worker(rank, port, path):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    torch.save(two_steps(lambda x: x[own], average_of_ranks), f"{path}/{rank}.pt")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        whole = randn(D, RANKS * 3, dtype=dtype).T  # its rows are not contiguous
        assert torch.equal(moving().gathered({"a": whole[rank * 3 : rank * 3 + 3]})["a"], whole)
    alone = [dist.new_group([i]) for i in range(RANKS)]
    x = {"a": features(8, D, rank)}
    assert torch.equal(moving(group=alone[rank]).gathered(x)["a"], x["a"])
    with pytest.raises(pmf.InputError, match="group: expected ProcessGroup"):  # one without this rank
        moving(group=alone[1 - rank])
    dist.barrier()
    os._exit(0)  # for the reason given in train/__main__.py


def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    mp.spawn(worker, (free_port(), str(tmp_path)), nprocs=RANKS)
    expected, held = two_steps(lambda x: x, lambda x: x)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    for found, state in ranks:
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert_close(state, held, rtol=1e-12, atol=1e-12)


X = features(8, D, 0)
REFERENCE = Statistics.of(features(50, D, 10))


def built(references=None, population=lambda d: MovingAverage(d, 0.9), **options):
    return FrechetLoss({"a": REFERENCE} if references is None else references, population, **options)


BAD = [
    *(("references", lambda v=v: built(v)) for v in ({}, 3, REFERENCE, {"": REFERENCE}, {"a.b": REFERENCE})),
    *(("references", lambda v=v: built(v)) for v in ({"keys": REFERENCE}, {3: REFERENCE})),
    (r"references\['a'\]", lambda: built({"a": X})),
    *(("population", lambda v=v: built(population=v)) for v in (None, 3, lambda d: None, lambda d: Queue(d + 1, 9))),
    *(("eps", lambda v=v: built(eps=v)) for v in (0, -1.0, math.nan, None, "1")),
    *(("weights", lambda v=v: built(weights=v)) for v in (3, {"b": 1.0}, {"a": 0.0}, {"a": -1}, {"a": None}, {3: 1.0})),
    ("group", lambda: built(group=3)),
    *(("width", lambda v=v: MovingAverage(v, 0.9)) for v in (0, -1, 2.5, None)),
    *(("decay", lambda v=v: MovingAverage(3, v)) for v in (1, -0.1, math.nan, None)),
    *(("width", lambda v=v: Queue(v, 9)) for v in (0, None)),
    *(("size", lambda v=v: Queue(3, v)) for v in (1, 0, 2.5, None)),
    ("size", lambda: built(population=lambda d: Queue(d, 7))({"a": X})),
    ("size", lambda: Queue(D, 7).add(X)),
]  # fmt: skip
WRONG = [None, X, {}, {"b": X}, {"a": X, "b": X}, *({"a": v} for v in (
    None, [1.0], X[0], X[:0], X[:, :1], X[None], X.long(), X.to("meta")
))]  # fmt: skip
BAD += [("name", lambda v=v: built().term(v, X)) for v in (None, "b", 3, ["a"])]
BAD += [(r"features\['a'\]", lambda v=v["a"]: built().term("a", v)) for v in WRONG[5:]]
BAD += [
    ("features", lambda v=v, name=name: getattr(built(), name)(v))
    for v in WRONG
    for name in ("forward", "gathered", "fill", "add")
]
BAD += [
    ("features", lambda v=v, name=name, new=new: getattr(new(), name)(v))
    for v in (None, X[0], X[:0], X[:, :1], X.long())
    for name in ("moved", "fill", "add")
    for new in (lambda: MovingAverage(D, 0.9), lambda: Queue(D, 9))
]


@pytest.mark.parametrize(("name", "call"), BAD)
def test_a_wrong_argument_is_named_in_one_line(name, call):
    with pytest.raises(pmf.InputError, match=rf"^{name}\b.*: expected|^{name}: expected") as error:
        call()
    assert "\n" not in str(error.value)
