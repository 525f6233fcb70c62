"""Quality of samples: Fréchet distance, Inception score, precision and recall.

The metrics take features and logits from any extractor; `inception` is the usual one.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, first_line, require
from pmf.fields import check_values
from pmf.sizes import check_declared, check_is_file

Resize = Literal["tf1", "half_pixel"]
"""How an image is resized to Inception's 299 pixels, bilinearly and without antialiasing: output pixel i reads position
i s (tf1, as in the original graph) or (i + 1/2) s - 1/2 (half_pixel, align_corners=False), with s = size / 299."""
NAMES: dict[Resize, tuple[str, str]] = {"tf1": ("mu", "sigma"), "half_pixel": ("ref_mu", "ref_sigma")}
"""The array names of published statistics made with each resize: tf1 by ADM and JiT, half_pixel by pMF's authors."""
INCEPTION_SIZE, INCEPTION_FEATURES = 299, 2048
NEIGHBOURS = 3
"""Of each feature, for precision and recall: sets need more images than that."""
SCORE_SEED = 2020
DETAILS = ("count", "features", "space", "image_size")
"""What an npz of statistics may hold beside mean and covariance."""
LONGEST = 1000


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of features: all that a Fréchet distance reads.

    mu float64 [d]; sigma float64 [d, d], unbiased (zero for one image); count, the number of images,
    if known; features float32 [count, d], if kept (precision and recall need them);
    resize, the convention that Inception features were made with (None: unknown or irrelevant); space, the identity of
    the feature space (`pmf.feature_networks`), and image_size, the side of the images, if known.
    Errors: `InputError` on other types and shapes, on values that are not finite, and if sigma is no covariance.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    features: np.ndarray | None = None
    resize: Resize | None = None
    space: str | None = None
    image_size: int | None = None

    def __post_init__(self) -> None:
        check_values(np.ndarray, mu=self.mu, sigma=self.sigma)
        shapes = list(self.mu.shape), list(self.sigma.shape)
        fits = len(shapes[0]) == 1 and shapes[0][0] > 0 and shapes[1] == 2 * shapes[0]
        require(fits, f"statistics: expected mu [d] and sigma [d, d], got {shapes}")
        check_values(int | None, count=self.count, image_size=self.image_size)
        check_values(str | None, space=self.space)
        space, size = self.space, self.image_size
        named = space is None or (0 < len(space) <= LONGEST and space.isprintable())
        require(named, lambda: f"space: expected one line of at most {LONGEST} characters, got {space!r:.80}")
        require(size is None or size >= 1, f"image_size: expected at least 1, got {size}")
        check_values(Resize | None, resize=self.resize)
        check_values(np.ndarray | None, features=self.features)
        require(self.count is None or self.count >= 1, f"count: expected at least 1, got {self.count}")
        held = [self.mu, self.sigma, *([] if self.features is None else [self.features])]
        kinds = [x.dtype for x in held]
        real = all(kind.kind in "fiu" for kind in kinds) and (self.features is None or kinds[2].kind == "f")
        require(real, lambda: f"statistics: expected real numbers, and floating features, got {kinds}")
        if self.features is not None:
            wanted, got = list(self.mu.shape), list(self.features.shape)
            require(len(got) == 2 and got[1:] == wanted, f"features: expected [n, {wanted[0]}], got {got}")
        require(all(np.isfinite(x).all() for x in held), "statistics: expected finite values, it holds NaN or infinity")
        largest = np.abs(self.sigma).max()
        symmetric = np.abs(self.sigma - self.sigma.T).max() <= 1e-3 * largest and self.sigma.diagonal().min() >= 0
        require(bool(symmetric), "sigma is no covariance, expected a symmetric matrix of variances")
        deviations = np.sqrt(self.sigma.diagonal())
        beyond = np.abs(self.sigma) - np.outer(deviations, deviations)
        require(beyond.max() <= 1e-3 * largest, "sigma is no covariance, expected correlations within [-1, 1]")

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Statistics of features [n, d], accumulated in float64. The features are not kept."""
        check_values(Tensor, features=features)
        _check_features("features", features)
        require(len(features) > 0, f"features: expected shape [n, d] with n > 0, got {list(features.shape)}")
        x = features.detach().double().cpu()
        mu = x.mean(0)
        x = x - mu
        return cls(mu.numpy(), (x.T @ x / max(len(x) - 1, 1)).numpy(), len(x))

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of both sets of images together, equal to those of one pass over all of them.

        With n = n_a + n_b and d = mu_b - mu_a: mu = mu_a + d n_b / n, and the sums of squares add up
        with d d^T n_a n_b / n. Neither set's features are kept. Errors: `InputError` if a count is unknown,
        or if the resizes, spaces or image sizes differ.
        """
        _check_comparable(self, other)
        if self.count is None or other.count is None:
            raise InputError("count: expected statistics of known counts, got None")
        count, difference = self.count + other.count, other.mu - self.mu
        squares = self.sigma * (self.count - 1) + other.sigma * (other.count - 1)
        squares += np.outer(difference, difference) * (self.count * other.count / count)
        mu, sigma = self.mu + difference * (other.count / count), squares / (count - 1)
        space, size = self.space or other.space, self.image_size or other.image_size
        return Statistics(mu, sigma, count, resize=self.resize or other.resize, space=space, image_size=size)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read an npz archive: `mu` and `sigma` (made with the tf1 resize), or `ref_mu` and `ref_sigma` (half_pixel);
        also `count`, `features`, `space` and `image_size` if present.

        Errors: `InputError` if the file cannot be read, lacks both pairs or holds both, or has arrays of wrong shape.
        """
        shapes, resize = cls._checked_shapes(path)
        with _reading(path), np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in shapes}
        mu, sigma = (_float64(name, arrays[name]) for name in NAMES[resize])
        features = arrays.get("features")
        real = features is None or features.dtype.kind == "f"
        require(real, f"reference: expected features of floats, got {features is not None and features.dtype}")
        count, size = (_whole(name, arrays.get(name), path) for name in ("count", "image_size"))
        space = arrays.get("space")
        if space is not None and (space.dtype.kind != "U" or space.ndim > 0):
            raise InputError(f"reference: {path}: expected a text in space, got {space.dtype} {list(space.shape)}")
        try:
            return cls(mu, sigma, count, features, resize, None if space is None else str(space), size)
        except InputError as error:
            raise InputError(f"reference: {path}: {error}") from None

    @staticmethod
    def _checked_shapes(path: str | Path) -> tuple[dict[str, tuple[int, ...]], Resize]:
        """The shapes of the arrays that `load` reads, checked before any is read, and the resize that names tell."""
        check_is_file("reference", path)
        with _reading(path):
            shapes, others = _npz_shapes(path, {*DETAILS, *(n for pair in NAMES.values() for n in pair)})
        named = {name for pair in NAMES.values() for name in pair if name in shapes}
        resize = next((resize for resize, pair in NAMES.items() if named == set(pair)), None)
        if resize is None:
            got = sorted({*shapes, *others})
            raise InputError(f"reference: expected mu and sigma, or ref_mu and ref_sigma, got {got}"[:300])
        mu, sigma = (shapes[name] for name in NAMES[resize])
        fits = len(mu) == 1 and sigma == (*mu, *mu) and mu[0] > 0
        require(fits, f"reference: expected mu [d] and sigma [d, d], got {list(mu)} and {list(sigma)}")
        features = shapes.get("features", (0, *mu))
        fits = len(features) == 2 and features[1:] == mu
        require(fits, f"reference: expected features [n, {', '.join(map(str, mu))}], got {features}")
        return shapes, resize

    def save(self, path: str | Path) -> None:
        """Write an npz archive that `load` reads, atomically; its names encode the resize (tf1 if unknown)."""
        mu, sigma = NAMES[self.resize or "tf1"]
        values = {mu: self.mu, sigma: self.sigma} | {name: getattr(self, name) for name in DETAILS}
        arrays = {name: value for name, value in values.items() if value is not None}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]

        write_atomically(path, write)


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"reference: {path} does not exist, expected an npz archive") from None
    except Exception as error:  # a file that is no archive can raise anything
        raise InputError(f"reference: {path} is not a readable npz archive: {first_line(error)}") from error


def _npz_shapes(path: str | Path, wanted: set[str]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The shapes of the wanted arrays of an archive, by their headers alone, and the names of its other entries.

    Errors: `InputError` if an entry does not have the size that its header declares, or an implausible one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    with zipfile.ZipFile(path) as archive:
        entries = {entry.removesuffix(".npy"): archive.getinfo(entry) for entry in archive.namelist()}
        declared = sum(entry.file_size for name, entry in entries.items() if name in wanted)
        check_declared("it", declared, Path(path).stat().st_size)
        for name in sorted(wanted & set(entries)):
            with archive.open(entries[name]) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                size = entries[name].file_size - file.tell()
                fits = math.prod(shape) * dtype.itemsize == size
                require(fits, f"{name} declares {dtype} {list(shape)} in {size} bytes")
            shapes[name] = shape
    return shapes, sorted(set(entries) - wanted)


def _float64(name: str, values: np.ndarray) -> np.ndarray:
    real = values.size > 0 and values.dtype.kind in "fiu"
    require(real, f"reference: expected real numbers in {name}, got {values.dtype} {list(values.shape)}")
    return values.astype(np.float64)


def _whole(name: str, values: np.ndarray | None, path: str | Path) -> int | None:
    """The first of these values, as an integer."""
    if values is None:
        return None
    value = _float64(name, values).reshape(-1)[0]
    require(bool(np.isfinite(value)), f"reference: {path}: its {name} holds NaN or infinity")
    require(value == int(value), f"reference: {path}: expected a whole number in {name}, got {value}")
    return int(value)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) in float64, A and B being the covariances.

    On Inception features this is FID; on flattened images, FID in pixel space.
    Errors: `InputError` on different numbers of features, resizes, spaces or image sizes, and on numbers so large that
    the distance is infinite.
    """
    _check_comparable(a, b)
    with np.errstate(over="ignore", invalid="ignore"):
        distance = _distance(a, b)
    require(np.isfinite(distance), "statistics: expected numbers of which float64 holds the squares, got larger ones")
    return distance


def _distance(a: Statistics, b: Statistics) -> float:
    difference = a.mu - b.mu
    values, vectors = np.linalg.eigh(a.sigma)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), which stays exact when A is singular.
    root_trace = np.sqrt(np.linalg.eigvalsh(root_a @ b.sigma @ root_a).clip(0)).sum()
    return float(difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * root_trace)


def _check_comparable(a: Statistics, b: Statistics) -> None:
    check_values(Statistics, statistics=a)
    check_values(Statistics, statistics=b)
    widths, resizes = (len(a.mu), len(b.mu)), (a.resize, b.resize)
    require(widths[0] == widths[1], f"statistics: expected as many features in both, got {widths[0]} and {widths[1]}")
    kinds: dict[str, tuple[Any, Any]] = {"made with one resize": resizes, "of one space": (a.space, b.space)}
    kinds["of images of one size"] = (a.image_size, b.image_size)
    for kind, (first, second) in kinds.items():
        same = first is None or second is None or first == second
        require(same, f"statistics: expected features {kind}, got {first} and {second}")


def _check_features(name: str, values: Tensor) -> None:
    check_values(Tensor, **{name: values})
    good = values.ndim == 2 and values.shape[1] > 0
    require(good, f"{name}: expected shape [n, d] with d > 0, got {list(values.shape)}")
    real = not values.is_complex() and values.dtype != torch.bool
    require(real, f"{name}: expected real numbers, got {values.dtype}")
    require(bool(torch.isfinite(values).all()), f"{name}: expected finite values, got NaN or infinity")


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL(p(y|x) || p(y)) of each split, as (mean, standard deviation) over the splits; float64.

    logits [n, classes], without the bias of the last layer. Images are shuffled into the splits in
    torch-fidelity's default order, so that both give the same score, and images sorted by class do not
    end up in splits of few classes. Errors: `InputError` on fewer images than splits.
    """
    _check_features("logits", logits)
    check_values(int, splits=splits)
    require(1 <= splits <= len(logits), f"splits: expected 1 to {len(logits)}, one image each, got {splits}")
    order = torch.from_numpy(np.random.RandomState(SCORE_SEED).permutation(len(logits)))
    scores = []
    for i in range(splits):
        part = logits[order[i * len(logits) // splits : (i + 1) * len(logits) // splits].to(logits.device)]
        log_p = part.double().log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    generated: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS, block: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): how much of each set lies in the other's support.

    The support of a set is the union of balls around its features, each as wide as the distance to the
    `neighbours`-th nearest other feature. Precision is the share of generated features in the support of
    the real ones, recall the share of real ones in that of the generated. Both are [n, d] on one device;
    distances are in float64, and `block` rows of them are held at a time. Errors: `InputError` on
    features of different widths, or if a set has too few features for that many neighbours.
    """
    _check_features("generated", generated)
    _check_features("real", real)
    check_values(int, neighbours=neighbours, block=block)
    require(block > 0, f"block: expected a positive number, got {block}")
    shapes = list(generated.shape), list(real.shape)
    require(shapes[0][1] == shapes[1][1], f"features: expected [n, d] and [m, d], got {shapes[0]} and {shapes[1]}")
    few = min(len(generated), len(real))
    require(1 <= neighbours < few, f"neighbours: expected at least 1 and fewer than {few} images, got {neighbours}")
    generated, real = generated.double(), real.double()
    radii_generated, radii_real = (_radii(x, neighbours, block) for x in (generated, real))
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radii in zip(generated.split(block), radii_generated.split(block), strict=True):
        distances = torch.cdist(rows, real)
        precise += int((distances <= radii_real).any(1).sum())
        recalled |= (distances <= radii[:, None]).any(0)
    return precise / len(generated), recalled.double().mean().item()


def _radii(features: Tensor, neighbours: int, block: int) -> Tensor:
    """Distance of each feature to its `neighbours`-th nearest other one (the nearest of all is itself)."""
    rows = features.split(block)
    return torch.cat([torch.cdist(r, features).topk(neighbours + 1, largest=False).values[:, -1] for r in rows])


def exact_convolutions() -> contextlib.AbstractContextManager:
    """A context of convolutions without TF32, none of whose algorithms is chosen by timing."""
    flags = dict(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    return torch.backends.cudnn.flags(**flags)  # type: ignore[arg-type]


class Inception(torch.nn.Module):
    """Images uint8 [n, 3, H, W] -> features float32 [n, 2048] and logits float32 [n, 1008], without the last bias."""

    def __init__(self, network: torch.nn.Module, resize: Resize = "tf1") -> None:
        super().__init__()
        self.network, self.resize = network, resize

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits on the network's device, bitwise reproducible."""
        images = images.to(next(self.network.parameters()).device)
        with exact_convolutions():
            if self.resize == "tf1":
                return self.network(images)
            return self.layers((half_pixel(images) - 128) / 128)

    def layers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run torch-fidelity's network after its own resize and scaling, differentiably.

        Every layer in turn, the last without its bias; the pool and what follows are in float32 at least.
        """
        *layers, pool, last = self.network.children()
        for layer in layers:
            x = layer(x)
        features = pool(x.to(torch.promote_types(x.dtype, torch.float32))).flatten(1)
        return features, features @ last.get_parameter("weight").to(features.dtype).T


def half_pixel(images: Tensor) -> Tensor:
    """Images uint8 [n, 3, H, W] -> float32 [n, 3, 299, 299] in [0, 255], bilinear on pixel centres, not antialiased.

    Computed in float64: in float32, positions are off by up to 1e-5 of a pixel and edges by a few 1e-3 grey levels.
    """
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return interpolate(images.double(), size, mode="bilinear", align_corners=False, antialias=False).float()


def inception(
    weights: str | Path | None = None, *, resize: Resize = "tf1", device: torch.device | str | None = None
) -> Inception:
    """torch-fidelity's port of the Inception-v3 of 2015-12-05, with which published FIDs are measured.

    It resizes images of any size to 299 px by `resize`: as the original did (tf1), or as the network of pMF's JAX
    release does (half_pixel); otherwise the two networks are identical. `weights` is the file of its state dict;
    by default torch-fidelity downloads it. Features and logits are those that torch-fidelity takes from
    this extractor: "2048" for FID, precision and recall, "logits_unbiased" for the Inception score.
    (By default, torch-fidelity measures precision and recall on VGG-16 instead.)
    Errors: `InputError` on another resize, if torch-fidelity cannot be imported, or if the weights are
    missing or do not fit.
    """
    require(resize in NAMES, f"resize: expected one of {', '.join(NAMES)}, got {resize!r}")
    check_is_file("inception", weights or "")
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except Exception as error:  # with a torchvision built for another PyTorch, it can raise anything
        message = "inception: torch-fidelity does not import, expected pip install 'pixel-meanflow[eval]'"
        raise InputError(f"{message}: {first_line(error)}") from error
    try:
        if weights is not None:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights, verbose=False
        )
    except Exception as error:  # reading a corrupt file, or a download, can raise anything
        source = "the download" if weights is None else weights
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"inception: cannot take the weights from {source}: {why}") from error
    return Inception(network, resize).to(device)
