import dataclasses
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import pmf.metrics
from pmf.errors import InputError
from pmf.features import Chunks, compute, find_images, images_of
from pmf.metrics import Statistics, frechet_distance, inception, inception_score, precision_recall

EPS = {dtype: np.finfo(dtype).eps for dtype in (np.float32, np.float64)}


def frechet(a, b):
    return frechet_distance(Statistics.of(a), Statistics.of(b))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_of_shifted_and_scaled_gaussians():
    x = normal(2000, 3)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 2) == pytest.approx(12, rel=1e-9)
    spread = x.var(0).sum().item()
    assert frechet(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * spread, rel=1e-9)


def test_frechet_distance_bears_singular_covariances():
    x = normal(100, 4)
    x[:, 3] = -1
    y = x.clone()
    y[:, 3] = 1
    assert frechet(x, y) == pytest.approx(4, rel=1e-6)


def test_statistics_are_mean_and_unbiased_covariance():
    x = normal(50, 4)
    statistics = Statistics.of(x)
    assert statistics.count == 50 and statistics.mu.dtype == statistics.sigma.dtype == np.float64
    np.testing.assert_allclose(statistics.mu, x.numpy().mean(0), rtol=0, atol=50 * EPS[np.float64])
    np.testing.assert_allclose(statistics.sigma, np.cov(x.numpy(), rowvar=False), rtol=0, atol=500 * EPS[np.float64])


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="features: expected finite values, got NaN or infinity"):
        Statistics.of(torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]))


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (25, 25), (7, 1, 30, 12), (1,) * 50])
def test_streaming_equals_whole_whatever_the_chunks(sizes):
    x = 100 + normal(50, 4)  # far from zero, where sums of squares would lose six digits
    total = None
    for part in x.float().split(list(sizes)):
        total = Statistics.of(part) if total is None else total.merge(Statistics.of(part))
    whole = Statistics.of(x.float())
    assert total.count == 50
    # A running mean of values near 100 carries their rounding; the covariance, of order 1, reads it through the means.
    bound = 50 * 110 * EPS[np.float64]
    np.testing.assert_allclose(total.mu, whole.mu, rtol=0, atol=bound)
    np.testing.assert_allclose(total.sigma, whole.sigma, rtol=0, atol=10 * bound)


@pytest.mark.parametrize(
    ("names", "resize"), [(("mu", "sigma"), "tf1"), (("ref_mu", "ref_sigma"), "half_pixel")], ids=["mu", "ref_mu"]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_statistics_say_their_resize_by_their_names(tmp_path, names, resize, dtype):
    known = Statistics.of(normal(20, 3))
    arrays = {names[0]: known.mu.astype(dtype), names[1]: known.sigma.astype(dtype)}
    np.savez(tmp_path / "published.npz", **arrays, another=np.zeros(2))
    read = Statistics.load(tmp_path / "published.npz")
    assert np.array_equal(read.mu, arrays[names[0]]) and np.array_equal(read.sigma, arrays[names[1]])
    assert read.mu.dtype == read.sigma.dtype == np.float64 and read.count is None and read.features is None
    assert read.resize == resize
    read.save(tmp_path / "ours.npz")
    assert Statistics.load(tmp_path / "ours.npz").resize == resize
    with np.load(tmp_path / "ours.npz") as archive:
        assert set(archive.files) == set(names)


def test_statistics_of_different_resizes_are_never_compared_or_merged():
    known = Statistics.of(normal(9, 3))
    tf1, half = (dataclasses.replace(known, resize=resize) for resize in ("tf1", "half_pixel"))
    message = "statistics: expected features made with one resize, got tf1 and half_pixel"
    for compare in (frechet_distance, Statistics.merge):
        with pytest.raises(InputError, match=message):
            compare(tf1, half)
    assert frechet_distance(known, half) == frechet_distance(tf1, tf1)
    assert known.merge(half).resize == half.merge(known).resize == "half_pixel"


def test_statistics_are_written_whole(tmp_path):
    features = normal(20, 3).float()
    known = Statistics.of(features)
    known = Statistics(known.mu, known.sigma, known.count, features.numpy())
    known.save(tmp_path / "ref.npz")
    read = Statistics.load(tmp_path / "ref.npz")
    assert read.count == 20
    for name in ("mu", "sigma", "features"):
        assert np.array_equal(getattr(read, name), getattr(known, name))
    known.merge(known).save(tmp_path / "ref.npz")
    assert Statistics.load(tmp_path / "ref.npz").features is None


def test_statistics_name_their_space_and_the_size_of_the_images(tmp_path):
    plain = Statistics.of(normal(20, 3))
    known = replace(plain, space="mae 224", image_size=256)
    known.save(tmp_path / "ref.npz")
    read = Statistics.load(tmp_path / "ref.npz")
    assert (read.space, read.image_size) == ("mae 224", 256)
    merged = plain.merge(known)
    assert (merged.space, merged.image_size) == ("mae 224", 256) and frechet_distance(known, plain) < 1e-9
    plain.save(tmp_path / "ref.npz")
    assert Statistics.load(tmp_path / "ref.npz").space is Statistics.load(tmp_path / "ref.npz").image_size is None
    for change, message in (
        (dict(space="clip 256"), "statistics: expected features of one space, got mae 224 and clip 256"),
        (dict(image_size=64), "statistics: expected features of images of one size, got 256 and 64"),
    ):
        for compare in (frechet_distance, Statistics.merge):
            with pytest.raises(InputError, match=message):
                compare(known, replace(known, **change))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (dict(mu=np.zeros(3)), r"expected mu and sigma, or ref_mu and ref_sigma, got \['mu'\]"),
        (
            dict(mu=np.zeros(2), sigma=np.eye(2), ref_mu=np.zeros(2), ref_sigma=np.eye(2)),
            r"expected mu and sigma, or ref_mu and ref_sigma, got \['mu', 'ref_mu', 'ref_sigma', 'sigma'\]",
        ),
        (dict(ref_mu=np.zeros(2), sigma=np.eye(2)), r"or ref_mu and ref_sigma, got \['ref_mu', 'sigma'\]"),
        (dict(mu=np.array(["a", "b"]), sigma=np.eye(2)), r"expected real numbers in mu, got <U1 \[2\]"),
        (dict(mu=np.zeros(0), sigma=np.eye(2)), r"expected mu \[d\] and sigma \[d, d\], got \[0\]"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), count=np.array("x")), r"expected real numbers in count, got <U1 \[\]"),
        (dict(mu=np.zeros(3), sigma=np.eye(2)), r"expected mu \[d\] and sigma \[d, d\], got \[3\] and \[2, 2\]"),
        (dict(mu=np.full(2, np.nan), sigma=np.eye(2)), "holds NaN or infinity"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), count=np.nan), "holds NaN or infinity"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), count=np.inf), "holds NaN or infinity"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), count=2.7), "expected a whole number in count, got 2.7"),
        (
            dict(mu=np.zeros(2), sigma=5 - 4 * np.eye(2)),
            r"sigma is no covariance, expected correlations within \[-1, 1",
        ),
        (dict(mu=np.zeros(2), sigma=np.eye(2), space=np.zeros(2)), r"expected a text in space, got float64 \[2\]"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), space=np.array(["a"])), r"expected a text in space, got <U1 \[1\]"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), space=np.array("a\nb")), "space: expected one line of at most 1000"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), space=np.array(9999 * "a")), "space: expected one line of at most 1000"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), image_size=np.array("x")), "expected real numbers in image_size, got"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), image_size=np.nan), "its image_size holds NaN or infinity"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), image_size=0), "image_size: expected at least 1, got 0"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), features=np.full((5, 2), np.nan)), "holds NaN or infinity"),
        (dict(mu=np.zeros(2), sigma=np.eye(2), features=np.zeros((5, 3))), r"expected features \[n, 2\], got \(5, 3\)"),
    ],
)
def test_unfit_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(InputError, match=message):
        Statistics.load(tmp_path / "ref.npz")


def test_what_cannot_be_measured_is_named(tmp_path):
    (tmp_path / "ref.npz").write_bytes(b"PK torn")
    with pytest.raises(InputError, match=r"reference: .*ref.npz is not a readable npz archive"):
        Statistics.load(tmp_path / "ref.npz")
    with pytest.raises(InputError, match=r"features: expected shape \[n, d\] with n > 0, got \[0, 3\]"):
        Statistics.of(torch.zeros(0, 3))
    known = Statistics.of(normal(9, 3))
    with pytest.raises(InputError, match="count: expected statistics of known counts, got None"):
        known.merge(Statistics(known.mu, known.sigma))
    with pytest.raises(InputError, match="statistics: expected as many features in both, got 3 and 2"):
        frechet(normal(9, 3), normal(9, 2))
    with pytest.raises(InputError, match="statistics: expected numbers of which float64 holds the squares, got larger"):
        frechet_distance(known, Statistics(np.full(3, 1e200), known.sigma))
    with pytest.raises(InputError, match="splits: expected 1 to 9, one image each, got 10"):
        inception_score(normal(9, 3))
    with pytest.raises(InputError, match="neighbours: expected at least 1 and fewer than 3 images, got 3"):
        precision_recall(normal(9, 3), normal(3, 3))
    with pytest.raises(InputError, match=r"features: expected \[n, d\] and \[m, d\], got \[9, 3\] and \[9, 2\]"):
        precision_recall(normal(9, 3), normal(9, 2))


def test_inception_score_of_certain_and_of_clueless_logits():
    certain = 1000 * torch.eye(7, dtype=torch.float64).repeat(10, 1)
    assert inception_score(certain, splits=1) == pytest.approx((7, 0))
    assert inception_score(torch.zeros(70, 7)) == pytest.approx((1, 0))
    # Ten splits of images sorted by class would each hold one class or two; shuffled, they hold all seven.
    by_class = certain[:7].repeat_interleave(200, 0)
    mean, deviation = inception_score(by_class)
    assert 6.5 < mean < 7 and 0 < deviation < 0.2


def test_inception_score_is_its_definition():
    logits = 3 * normal(60, 5)
    p = torch.softmax(logits, 1).numpy()
    divergence = (p * np.log(p / p.mean(0))).sum(1).mean()
    assert inception_score(logits, splits=1)[0] == pytest.approx(np.exp(divergence), rel=60 * EPS[np.float64])


def brute_precision(a, b, k):
    """Share of a within the k-nearest-neighbour balls of b, one distance at a time."""
    radii = [sorted(np.linalg.norm(x - y) for y in b)[k] for x in b]
    return np.mean([any(np.linalg.norm(x - y) <= r for y, r in zip(b, radii, strict=True)) for x in a])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_their_definition(k):
    generated, real = 0.5 * normal(40, 6, seed=1) + 0.5, normal(30, 6, seed=2)
    got = precision_recall(generated, real, neighbours=k, block=7)
    a, b = generated.numpy(), real.numpy()
    assert got == pytest.approx((brute_precision(a, b, k), brute_precision(b, a, k)))
    assert got == precision_recall(generated, real, neighbours=k) and 0 < got[1] < got[0] <= 1


def test_precision_and_recall_at_their_ends():
    x = normal(30, 6)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    one_of_two_modes = precision_recall(x, torch.cat([x, x + 100]))
    assert one_of_two_modes == (1, 0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 8 crops of scikit-learn's two photographs, 96 px, at different places."""
    made = []
    for seed in (0, 1):
        draw = np.random.default_rng(seed)
        folder = tmp_path_factory.mktemp("crops")
        for i in range(8):
            photograph = load_sample_images().images[i % 2]
            top, left = (draw.integers(0, side - 96) for side in photograph.shape[:2])
            Image.fromarray(photograph[top : top + 96, left : left + 96]).save(folder / f"{i:02}.png")
        made.append(folder)
    return made


def uncertain_share(a, b, k, error):
    """Share of a whose membership in the balls of b an error in squared distances can change."""
    distances = torch.cdist(a.double(), b.double())
    radii = torch.cdist(b.double(), b.double()).topk(k + 1, largest=False).values[:, -1]
    sure = (distances**2 <= radii**2 - 2 * error).any(1) | (distances**2 > radii**2 + 2 * error).all(1)
    return (~sure).double().mean().item()


def frechet_bound(a, b):
    """Upper bound on the difference between torch-fidelity's distance of these statistics and ours."""
    # It averages features in float32: n roundings of each mean, which enter |mu_a - mu_b|^2.
    rounding = 2 * EPS[np.float32] * np.linalg.norm([s.count * np.abs(s.features).mean(0) for s in (a, b)])
    means = 2 * np.linalg.norm(a.mu - b.mu) * rounding + rounding**2
    # Eigenvalues of A B have an error of d eps |A| |B|; the root of one near zero has the root of that error.
    error = len(a.mu) * EPS[np.float64] * np.linalg.norm(a.sigma, 2) * np.linalg.norm(b.sigma, 2)
    least = np.linalg.eigvals(a.sigma @ b.sigma).real.min() if a.count > len(a.mu) else 0
    return means + 2 * len(a.mu) * (error / np.sqrt(least) if least > error else np.sqrt(error))


def with_features(features):
    return dataclasses.replace(Statistics.of(features), features=features.numpy())


@pytest.mark.extras
def test_metrics_of_features_agree_with_torch_fidelity(fidelity):
    from torch_fidelity import metric_fid, metric_isc, metric_prc

    a, b = normal(400, 24, seed=1).float() + 1, 1.2 * normal(300, 24, seed=2).float()
    ours = [with_features(x) for x in (a, b)]
    theirs = [metric_fid.fid_features_to_statistics(x) for x in (a, b)]
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.mu, other["mu"], rtol=0, atol=400 * 3 * EPS[np.float32])
        np.testing.assert_allclose(mine.sigma, other["sigma"], rtol=0, atol=400 * 9 * EPS[np.float64])
    (distance,) = metric_fid.fid_statistics_to_metric(*theirs, verbose=False).values()
    bound = frechet_bound(*ours)
    assert abs(frechet_distance(*ours) - distance) <= bound < 1e-3 * distance

    score = metric_isc.isc_features_to_metric(a)
    assert inception_score(a) == pytest.approx(tuple(score.values()), rel=400 * 24 * EPS[np.float64])

    found = metric_prc.prc_features_to_metric(a, b, verbose=False)
    check_precision_recall(precision_recall(a, b), found, a, b, least=0.01)


def check_precision_recall(ours, theirs, generated, real, *, least):
    """Assert equality, except for images that torch-fidelity's rounding can move across the edge of a ball."""
    norm = max((x.double() ** 2).sum(1).max().item() for x in (generated, real))
    error = generated.shape[1] * EPS[np.float32] * 4 * norm  # of a squared distance in float32, whatever the formula
    for value, name, pair in zip(ours, ("precision", "recall"), ((generated, real), (real, generated)), strict=True):
        uncertain = uncertain_share(*pair, 3, error)
        assert abs(value - theirs[name]) <= uncertain + EPS[np.float32]
        assert least < value <= 1 and uncertain < 0.1


@pytest.mark.extras
def test_metrics_of_folders_agree_with_torch_fidelity(fidelity, inception_weights, folders, tmp_path):
    theirs = fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        **dict(isc=True, fid=True, prc=True, isc_splits=2, feature_extractor="inception-v3-compat"),
        feature_extractor_weights_path=str(inception_weights),
        **dict(cuda=False, batch_size=4, save_cpu_ram=True, verbose=False, cache=False),
    )
    extractor = inception(inception_weights)
    chunks = [Chunks(tmp_path / str(i), 8, 4) for i in range(2)]
    for part, folder in zip(chunks, folders, strict=True):
        compute([(part, extractor)], part.spans(), images_of(find_images(folder)), batch_size=4)
    generated, real = (part.statistics(keep=True) for part in chunks)

    distance = theirs["frechet_inception_distance"]
    bound = frechet_bound(generated, real)
    assert abs(frechet_distance(generated, real) - distance) <= bound < 0.1 * distance

    logits = torch.cat(list(chunks[0].read("logits")))
    score = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(logits, splits=2) == pytest.approx(score, rel=8 * 1008 * EPS[np.float64])
    assert score[0] > 1.01

    features = [torch.from_numpy(x.features) for x in (generated, real)]
    check_precision_recall(precision_recall(*features), theirs, *features, least=-1)


@pytest.mark.extras
def test_inception_resizes_images_of_any_size_and_repeats_exactly(inception_weights):
    extractor = inception(str(inception_weights))
    images = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = extractor(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and features.dtype == torch.float32
    assert torch.equal(extractor(images)[0], features) and not features.requires_grad


@pytest.mark.extras
def test_weights_that_do_not_fit_are_named(fidelity, tmp_path):
    file = tmp_path / "inception.pth"
    torch.save({"fc.weight": torch.zeros(3)}, file)
    with pytest.raises(
        InputError, match=r"inception: cannot take the weights from .*inception.pth: Error.*Missing key"
    ):
        inception(file)
    file.write_bytes(b"torn")
    with pytest.raises(InputError, match=r"inception: cannot take the weights from .*inception.pth"):
        inception(file)


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"inception: .* expected pip install 'pixel-meanflow\[eval\]'"):
        pmf.metrics.inception()
