"""`pmf eval`: FID, Inception score, precision and recall over a grid of settings; digits have numbers of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import tyro
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import pmf
from pmf.atomic_files import write_atomically
from pmf.config import MODELS, ModelConfig
from pmf.errors import InputError, require
from pmf.metrics import Resize, Statistics, frechet_distance, inception
from pmf.train.config import CONFIG_FILE, SamplingConfig, load_run_config, published_guidance
from pmf.train.data import digits
from pmf.train.features import (
    Extractor,
    Ranks,
    Source,
    all_ranks,
    digest,
    folder_statistics,
    pictures,
    weights_digest,
)
from pmf.train.images import to_bytes
from pmf.train.measurement import Measurement, check_count

PER_CLASS = 50
DIGITS_SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class EvalConfig:
    """Measure a checkpoint: FID, Inception score, precision and recall against a reference, over a grid of settings.

    Images, features and metrics do not depend on how many processes torchrun starts. Every finished grid
    point is a line of results.jsonl in `out`; an interrupted evaluation continues when it is called again.
    `pmf eval statistics FOLDER` computes reference statistics. A network of digits or photographs without
    a reference is measured by 500 samples, its own way.
    """

    source: tyro.conf.Positional[str]
    """Run directory, checkpoint file or Hugging Face hub id."""
    reference: Path | None = None
    """Folder of real images, or npz of statistics (mu and sigma, or ref_mu and ref_sigma). Precision and recall
    need a folder, or an npz that holds features too."""
    resize: Resize | None = None
    """How images come to Inception's 299 pixels (default: as the reference's statistics say by their names, half_pixel
    for ref_mu and ref_sigma; tf1 for a folder)."""
    weights: tuple[str, ...] = ()
    """Which weights of a run to measure: model, ema_500, ... (default: the run's choice)."""
    omega: tuple[float, ...] = ()
    """Guidance scales to measure (default: the setting of the run or of the published preset)."""
    interval: tuple[str, ...] = ()
    """Guidance intervals to measure, each as t_min,t_max: 0.1,0.7 (default as for omega)."""
    guidance: tuple[str, ...] = ()
    """Published settings to measure by name, in place of omega and interval: pMF-B/16, pMF-B/16-torch, ..."""
    steps: tuple[int, ...] = ()
    """Numbers of network evaluations per image to measure (default: 1; for digits and photographs 1 and 2)."""
    per_class: int = PER_CLASS
    """Images per class (without a reference: always 50)."""
    seed: int = 0
    """Seed of the first image; image i has seed + i (without a reference: sample i has 500 seed + i)."""
    out: Path | None = None
    """Directory of the results and of what is unfinished (default: `eval` in the run directory, else eval/NAME)."""
    images: Path | None = None
    """Directory in which to keep the generated images, a folder of PNGs per grid point."""
    inception: Path | None = None
    """State dict of torch-fidelity's Inception-v3 (default: torch-fidelity downloads it)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's matrix products."""
    batch_size: int = 64
    """Images at a time, on each device."""
    chunk: int = 1000
    """Images between saves: what an interruption can cost."""
    device: str = "auto"
    """Device: auto (each process its own GPU), cpu, cuda, ..."""

    def __post_init__(self) -> None:
        for name in ("per_class", "batch_size", "chunk"):
            require(getattr(self, name) > 0, f"{name}: expected a positive number, got {getattr(self, name)}")
        _settings(self, SamplingConfig())  # a setting that cannot be is refused before anything is loaded


@dataclass(frozen=True)
class StatisticsConfig:
    """Compute the reference statistics of a folder of images, searched through to the bottom.

    Images are decoded to RGB bytes and enter the extractor at their own size: crop and scale them first to
    the size of the samples that they will be compared with. An interrupted call continues when repeated.
    """

    folder: tyro.conf.Positional[Path]
    """The folder."""
    out: Path
    """The npz to write: mu, sigma, count; with --resize half_pixel ref_mu, ref_sigma, count."""
    resize: Resize = "tf1"
    """How images come to Inception's 299 pixels: tf1, as published statistics have it, or half_pixel, as those of
    pMF's JAX release do."""
    features: bool = False
    """Keep the features too (8 KB per image): precision and recall need them."""
    inception: Path | None = None
    """State dict of torch-fidelity's Inception-v3 (default: torch-fidelity downloads it)."""
    batch_size: int = 64
    """Images at a time, on each device."""
    chunk: int = 1000
    """Images between saves."""
    device: str = "auto"
    """Device: auto (each process its own GPU), cpu, cuda, ..."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk"):
            require(getattr(self, name) > 0, f"{name}: expected a positive number, got {getattr(self, name)}")


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    weights: str
    sampling: SamplingConfig
    steps: int

    @property
    def settings(self) -> dict:
        """What `pmf.generate` takes."""
        return {"steps": self.steps, **asdict(self.sampling)}

    @property
    def name(self) -> str:
        """The point as part of a path."""
        s, weights = self.sampling, self.weights.replace("/", "-").replace(":", "-")
        return f"{weights}-omega{s.omega:g}-{s.t_min:g}-{s.t_max:g}-steps{self.steps}"


def command(arguments: list[str]) -> None:
    """Print one JSON line per grid point and, of several points with an FID, the best."""
    if arguments[:1] == ["statistics"]:
        _statistics_command(arguments[1:])
        return
    config = tyro.cli(EvalConfig, prog="pmf eval", args=arguments)
    if config.reference is None:
        measure_embedded(config)
        return
    with all_ranks() as ranks:
        device = _device(config.device, ranks)
        extractor_of = partial(_inception, config.inception, device)
        lines = Evaluation(config, extractor_of, ranks, device).run()
        if ranks.rank == 0 and len(lines) > 1:
            print(json.dumps({"best": min(lines, key=lambda line: line["fid"])}))


def _statistics_command(arguments: list[str]) -> None:
    config = tyro.cli(StatisticsConfig, prog="pmf eval statistics", args=arguments)
    files = pictures(config.folder)
    with all_ranks() as ranks:
        extractor = _inception(config.inception, _device(config.device, ranks), config.resize)
        options = dict(batch_size=config.batch_size, chunk=config.chunk, keep=config.features)
        folder_statistics(files, config.out, extractor, ranks, **options)
        if ranks.rank == 0:
            print(f"wrote {config.out}: statistics of {len(files)} images, {config.resize} resize")


def _inception(weights: Path | None, device: torch.device, resize: Resize) -> Extractor:
    return inception(weights, resize=resize, device=device)


def _device(name: str, ranks: Ranks) -> torch.device:
    """The device by name; of several GPUs, the process's own. Triton launches on the current one."""
    from pmf.train.distributed import pick_device

    own = name in ("auto", "cuda") and torch.cuda.is_available()
    device = pick_device(f"cuda:{ranks.local}" if own else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def grid(config: EvalConfig, weights: str | None, model: ModelConfig, steps: tuple[int, ...] = (1,)) -> list[Point]:
    """Every point that the flags span for one choice of weights; `steps` is the default of that flag.

    Guidance that no flag names is the run's, else that of the published preset. Errors: there is neither.
    """
    run = Path(config.source)
    stored = load_run_config(run) if (run / CONFIG_FILE).is_file() else None
    preset = next((published_guidance(name) for name, c in MODELS.items() if c == model), None)
    settings = _settings(config, stored.sampling if stored else preset)
    weights = weights or (stored.sampling_weights if stored else run.stem)
    return [Point(weights, sampling, n) for sampling, n in product(settings, config.steps or steps)]


def _settings(config: EvalConfig, default: SamplingConfig | None) -> list[SamplingConfig]:
    """The settings of guidance: those named, else every omega in every interval."""
    if config.guidance:
        both = bool(config.omega or config.interval)
        require(not both, "guidance: expected no omega and no interval beside it, got both")
        return [published_guidance(name) for name in config.guidance]
    for flag in ("omega", "interval"):
        known = getattr(config, flag) or default
        require(bool(known), f"{flag}: this network is no preset, so {flag} must be given")
    omegas = config.omega or (default.omega,)
    intervals = [_interval(text) for text in config.interval] or [(default.t_min, default.t_max)]
    return [SamplingConfig(*map(float, (omega, *interval))) for interval, omega in product(intervals, omegas)]


def _interval(text: str) -> tuple[float, float]:
    try:
        t_min, t_max = map(float, text.split(","))
    except ValueError:
        raise InputError(f"interval: expected t_min,t_max such as 0.1,0.7, got {text!r}") from None
    return t_min, t_max


class Evaluation:
    """FID and its kin over a grid: `run` measures every point that is not in the results file yet.

    `extractor_of(resize)` makes the extractor.
    """

    def __init__(
        self, config: EvalConfig, extractor_of: Callable[[Resize], Extractor], ranks: Ranks, device: torch.device
    ) -> None:
        self.config, self.ranks, self.device = config, ranks, device
        run = Path(config.source)
        out = config.out or (run / "eval" if run.is_dir() else Path("eval") / run.stem)
        options = dict(resize=config.resize, batch_size=config.batch_size, chunk=config.chunk)
        self.measurement = Measurement(config.reference, extractor_of, out, ranks, device, **options)

    def run(self) -> list[dict]:
        """The result of every grid point, in order; each is printed and written as soon as it is known."""
        lines = []
        for weights in self.config.weights or (None,):
            model = pmf.PMFDiT.from_pretrained(
                self.config.source, weights=weights, aux_head=False, device=self.device
            ).eval()
            channels = model.config.in_channels
            require(channels in (1, 3), f"source: expected images of 1 or 3 channels, got {channels}")
            network = digest(asdict(model.config), weights_digest(model))
            for point in grid(self.config, weights, model.config):
                lines.append(self._measure(model, network, point))
                if self.ranks.rank == 0:
                    print(json.dumps(lines[-1]), flush=True)
        return lines

    def _measure(self, model: pmf.PMFDiT, network: str, point: Point) -> dict:
        config, count = self.config, self.config.per_class * model.config.num_classes
        check_count(count)
        key = self.measurement.key(network, point.settings, config.per_class, config.seed, config.dtype)
        folder = config.images / f"{point.name}-{key[:8]}" if config.images else None

        def kept(span: range) -> bool:
            return folder is None or all(_png(folder, i).is_file() for i in span)

        head = {"source": config.source, "weights": point.weights, **point.settings}
        head |= {"images": count, "seed": config.seed, "dtype": config.dtype}
        line = self.measurement.measure(key, count, self._generated(model, point, folder), head, kept)
        return line | head  # weights that equal others have their line, under another name

    def _generated(self, model: pmf.PMFDiT, point: Point, folder: Path | None) -> Source:
        """Image i shows class i // per_class and has seed `seed` + i."""
        lowered = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

        def generate(batch: range) -> Iterator[Tensor]:
            labels = [i // self.config.per_class for i in batch]
            seeds = [self.config.seed + i for i in batch]
            with lowered:
                images = pmf.generate(model, labels, seeds=seeds, batch_size=len(batch), **point.settings)
            pixels = to_bytes(images.float()).expand(-1, 3, -1, -1)
            if folder is not None:
                for i, image in zip(batch, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                    _save_png(_png(folder, i), Image.fromarray(image))
            yield pixels

        return generate


def _png(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _save_png(file: Path, picture: Image.Image) -> None:
    write_atomically(file, lambda temporary: picture.save(temporary, format="PNG"))


def measure_embedded(config: EvalConfig) -> None:
    """Print one JSON line per grid point of a network of digits or photographs, measured by numbers of their own.

    Errors: another network, which needs a reference.
    """
    device = _device(config.device, Ranks())
    for weights in config.weights or (None,):
        model = pmf.PMFDiT.from_pretrained(config.source, weights=weights, aux_head=False, device=device)
        measure = own_measure(model.config)
        for point in grid(config, weights, model.config, steps=(1, 2)):
            result = measure(model, seed=config.seed, **point.settings)
            numbers = {name: round(value, 4) for name, value in result.items()}
            print(json.dumps({"weights": point.weights, **point.settings, **numbers}), flush=True)


def own_measure(model: ModelConfig) -> Callable[..., dict[str, float]]:
    """How an embedded data set is measured, by the shape of its images and its ten classes."""
    if model.num_classes == 10 and model.image_shape == DIGITS_SHAPE:
        return evaluate_digits
    colour = model.num_classes == 10 and model.in_channels == 3 and model.image_size <= 64
    require(colour, "reference: expected a folder of images or an npz of statistics, got none")
    from pmf.train.judge import evaluate_photographs  # scikit-image is an extra

    return evaluate_photographs


def evaluate_digits(
    model, *, steps: int = 1, omega: float, t_min: float, t_max: float, seed: int = 0
) -> dict[str, float]:
    """Fréchet distance and accuracy of 500 samples, 50 per class.

    The distance is to the 297 held-out real digits (images in [-1, 1], 64 dimensions). The accuracy is
    that of a logistic regression, trained on the 1,500 real training digits, in naming the samples'
    classes. For scale: real training digits are at 0.46, the ten class means at 7.2, noise at 62.
    """
    train, held_out = digits()
    shape, wanted = model.config.image_shape, tuple(train.images.shape[1:])
    fits = shape == wanted and model.config.num_classes == 10
    require(fits, f"source: expected a network for {list(wanted)} images of 10 classes, got {list(shape)}")
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    seeds = range(seed * len(labels), (seed + 1) * len(labels))
    samples = pmf.generate(
        model, labels, seeds=seeds, steps=steps, omega=omega, t_min=t_min, t_max=t_max, batch_size=500
    ).cpu()
    judge = LogisticRegression(max_iter=2000).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    named = judge.predict(samples.flatten(1).numpy())
    both = (Statistics.of(images.flatten(1)) for images in (samples, held_out.images))
    return {"frechet_distance": frechet_distance(*both), "accuracy": float((named == labels.numpy()).mean())}
