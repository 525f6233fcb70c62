"""`pmf eval` measures a checkpoint over a grid of settings; `pmf eval statistics` computes reference statistics."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

import pmf
from pmf.config import MODELS, Guidance, ModelConfig, published_guidance
from pmf.errors import InputError, reading, require
from pmf.hub import locate
from pmf.metrics import INCEPTION_FEATURES, Resize, inception
from pmf.train.config import ExtractionConfig, MeasurementConfig, find_run_around, find_run_config
from pmf.train.distributed import World, join, leave, own_rank, pick_device
from pmf.train.evaluation.measurement import MakeExtractor, Measurement, demo_score, measure
from pmf.train.evaluation.reference import open_pictures, warn_of_few, write_folder_statistics
from pmf.train.evaluation.spaces import SpacesMeasurement, write_statistics
from pmf.train.options import EVAL_NEEDS, Need, parse, refuse_ignored
from pmf.train.sample import finite
from pmf.weights import read_metadata

STATISTICS_NEEDS = (Need(("resize", "inception"), "with --networks", lambda c: not c.networks),)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(MeasurementConfig):
    """Measure a checkpoint: FID, Inception score, precision and recall against a reference, over a grid of settings.

    Images, features and metrics do not depend on how many processes torchrun starts. Every finished grid
    point is a line of results.jsonl in `out`; run an interrupted evaluation again to resume it.
    `pmf eval statistics FOLDER` computes reference statistics. Without a reference, networks of digits or
    photographs are scored on 500 samples by a Fréchet distance and a classifier's accuracy.
    """

    source: tyro.conf.Positional[str]
    """Run directory, checkpoint file or Hugging Face hub id."""
    omega: tuple[float, ...] = ()
    """Guidance scales to measure (default: that of the run or of the published preset)."""
    interval: tuple[str, ...] = ()
    """Guidance intervals to measure, each as t_min,t_max, such as 0.1,0.7 (default: as for omega)."""
    guidance: tuple[str, ...] = ()
    """Published settings to measure, by name, instead of omega and interval: pMF-B/16, pMF-B/16-torch, ..."""
    steps: tuple[int, ...] = ()
    """Numbers of sampling steps to measure, each a network evaluation per image
    (default: 1; without a reference 1 and 2)."""
    seed: int = 0
    """Seed of the first image; image i has seed + i (without a reference: 500 * seed + i)."""
    out: Path | None = None
    """Directory for results and unfinished features (default: `eval` in the run directory, else eval/NAME)."""
    images: Path | None = None
    """Directory for the generated images, a folder of PNGs per grid point (default: they are not kept)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's matrix products."""
    device: str = "auto"
    """Device: auto (each process its own GPU), cpu, cuda, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _settings(self, Guidance(1.0))  # refuse impossible settings before anything is loaded
        require(all(n >= 1 for n in self.steps), f"steps: expected positive numbers, got {self.steps}")
        with reading("images", self.images):
            folder = self.images is None or self.images.is_dir() or not self.images.exists()
        require(folder, f"images: {self.images} is a file, expected a directory")


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig(ExtractionConfig):
    """Compute the reference statistics of a folder of images, including its subfolders.

    Images are decoded to RGB bytes and enter the extractor at their own size: first crop and scale them to
    the size of the samples to compare. Run an interrupted command again to resume it.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of images, or a directory that `pmf data prepare` filled."""
    out: Path
    """The npz to write: mu, sigma, count; with --resize half_pixel ref_mu, ref_sigma, count; or a directory."""
    resize: Resize | None = None
    """Resize to Inception's 299 pixels: tf1 (the default) or half_pixel (for pMF's ref_mu, ref_sigma)."""
    features: bool = False
    """Store the features too (8 KB per image): precision and recall need them."""
    networks: tuple[str, ...] = ()
    """Feature networks, each as NAME (published weights), NAME:PATH or NAME:random: inception, siglip, mae, convnext,
    dinov2, clip, pixels. Then `out` is a directory, which gets NAME.npz of each."""
    device: str = "auto"
    """Device: auto (each process its own GPU), cpu, cuda, ..."""


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    weights: str
    sampling: Guidance
    steps: int

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling arguments of `pmf.generate`."""
        return {"steps": self.steps, **asdict(self.sampling)}

    @property
    def name(self) -> str:
        """The point as part of a path."""
        s, weights = self.sampling, self.weights.replace("/", "-").replace(":", "-")
        return f"{weights}-omega{s.omega:g}-{s.t_min:g}-{s.t_max:g}-steps{self.steps}"


def command(arguments: list[str]) -> None:
    """Print one JSON line per grid point, then the point of lowest FID if there are several.

    With statistics of several spaces: one line per space, then one that compares them.
    """
    if arguments[:1] == ["statistics"]:
        statistics_command(arguments[1:])
        return
    config = parse(EvalConfig, "pmf eval", arguments)
    refuse_ignored(config, EvalConfig(source=config.source), EVAL_NEEDS)
    if config.reference is None:
        if own_rank() == 0:
            evaluate_demo(config)
        return
    world = join(config.device)
    if world.main_first(lambda: config.of_spaces):
        evaluate_spaces(config, world)
        leave(world)
        return
    lines = evaluate(config, world)
    if len(lines) > 1:
        world.say(json.dumps({"best": min(lines, key=lambda line: line["fid"])}))
    leave(world)


def statistics_command(arguments: list[str]) -> None:
    """Write the statistics of a folder."""
    config = parse(StatisticsConfig, "pmf eval statistics", arguments)
    refuse_ignored(config, StatisticsConfig(folder=config.folder, out=config.out), STATISTICS_NEEDS)
    pictures, world = open_pictures(config.folder, "folder"), join(config.device)
    if config.networks:
        pictures.warn_of_sizes(world)
        write_statistics(pictures, config.out, config.networks, world, config, keep=config.features)
        leave(world)
        return
    with reading("out", config.out):
        require(not config.out.is_dir(), f"out: {config.out} is a directory, expected the name of a file")
    extractor = inception(config.inception, resize=config.resize or "tf1", device=world.device)
    warn_of_few(world, "folder", pictures.count, INCEPTION_FEATURES)
    pictures.warn_of_sizes(world)
    write_folder_statistics(pictures, config.out, extractor, world, config, keep=config.features)
    world.say(f"wrote {config.out}: statistics of {pictures.count} images, {extractor.resize} resize")
    leave(world)


def evaluate(config: EvalConfig, world: World, make_extractor: MakeExtractor | None = None) -> list[dict[str, Any]]:
    """Measure every grid point and return the results in order; each is printed and stored as soon as it is known."""
    measurement, lines = Measurement(config, _out(config), world, make_extractor), []
    for _, _, (line,) in _measured(config, [measurement], world):
        lines.append(line)
        world.say(json.dumps(line))
    return lines


def evaluate_spaces(config: EvalConfig, world: World) -> None:
    """Print a line per grid point and space, and after each point one with the spaces that the run was trained on."""
    spaces = SpacesMeasurement(config, _out(config), world)
    run = find_run_around(config.source)
    for head, settings, lines in _measured(config, list(spaces), world):
        for line in (*lines, spaces.summary(head | settings, lines, run.spaces if run else ())):
            world.say(json.dumps(line))


def _measured(
    config: EvalConfig, measurements: list[Measurement], world: World
) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """Measure every grid point; yield what was sampled from, with which settings, and the results."""
    for model, point in _grid_points(config, world):
        head = {"source": config.source, "weights": point.weights}
        images = config.images and config.images / point.name
        more: dict[str, Any] = dict(seed=config.seed, dtype=config.dtype, images=images)
        draw = partial(_draw, model, point, config.dtype)
        yield head, point.settings, measure(measurements, model, draw, head, point.settings, **more)


def _out(config: EvalConfig) -> Path:
    run = Path(config.source)
    return config.out or (run / "eval" if run.is_dir() else Path("eval") / run.stem)


def evaluate_demo(config: EvalConfig) -> None:
    """Print one JSON line per grid point of a network of digits or photographs, with the scores of the demos.

    Errors: `InputError` on any other network: it needs a reference.
    """
    world, score = World(pick_device(config.device)), None
    run = find_run_around(config.source)
    spaces = {"trained_on": list(run.spaces)} if run and run.spaces else {}
    for model, point in _grid_points(config, world, steps=(1, 2)):
        score = score or demo_score(model.config, trained_on(config), world)
        result = score(model, seed=config.seed, **point.settings)
        numbers = {name: round(value, 4) for name, value in result.items()}
        print(json.dumps({"weights": point.weights, **point.settings, **numbers, **spaces}), flush=True)


def _draw(model: pmf.PMFDiT, point: Point, dtype: str, labels: list[int], seeds: list[int]) -> Tensor:
    """Draw a batch of images, under autocast for bfloat16."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        images = pmf.generate(model, labels, seeds=seeds, batch_size=len(labels), **point.settings)
        return finite(images, point.weights)


def _grid_points(config: EvalConfig, world: World, steps: tuple[int, ...] = (1,)) -> Iterator[tuple[pmf.PMFDiT, Point]]:
    """Yield every network to measure with each of its grid points."""
    named = tuple(dict.fromkeys(config.weights)) or (None,)
    if len(named) > 1:
        world.main_first(lambda: [locate(config.source, weights) for weights in named])  # before any is measured
    for weights in named:
        model = _load_together(config.source, weights, world).eval()
        for point in grid(config, weights, model.config, steps):
            yield model, point


def _load_together(source: str, weights: str | None, world: World) -> pmf.PMFDiT:
    """Load a network in every process: the main one reads it (and unpacks an archive) and sends it to the others."""
    model: pmf.PMFDiT | None = None

    def read() -> ModelConfig:
        nonlocal model
        model = pmf.PMFDiT.from_pretrained(source, weights=weights, aux_head=False, device=world.device)
        return model.config

    shape = world.main_first(read)
    model = model or pmf.create_model(shape, aux_head=False, device=world.device)
    if world.size > 1:
        for value in model.state_dict().values():
            sent = value.cpu()
            dist.broadcast(sent, 0, group=world.group)
            value.copy_(sent)
    return model


def trained_on(config: EvalConfig) -> str | None:
    """The training data of a checkpoint, by its metadata or by the run that it is in; None if neither tells."""
    source, run = Path(config.source), find_run_around(config.source)
    with contextlib.suppress(InputError):  # metadata may be anything
        return (source.is_file() and read_metadata(source).get("data")) or (run.data if run else None)
    return None


def grid(config: EvalConfig, weights: str | None, model: ModelConfig, steps: tuple[int, ...] = (1,)) -> list[Point]:
    """Return the grid points of one choice of weights; `steps` is the default of that flag.

    Guidance defaults to that of the run, else of the published preset. Errors: `InputError` if there is neither.
    """
    stored, around = find_run_config(config.source), find_run_around(config.source)
    preset = next((published_guidance(name) for name, c in MODELS.items() if c == model), None)
    settings = _settings(config, around.sampling if around else preset)
    weights = weights or (stored.sampling_weights if stored else Path(config.source).stem)
    points = [Point(weights, sampling, n) for sampling, n in product(settings, config.steps or steps)]
    return list(dict.fromkeys(points))


def _settings(config: EvalConfig, default: Guidance | None) -> list[Guidance]:
    """The guidance settings: by name, else every omega in every interval."""
    if config.guidance:
        both = bool(config.omega or config.interval)
        require(not both, "guidance: expected no omega and no interval beside it, got at least one")
        return [published_guidance(name) for name in config.guidance]
    omegas, intervals = list(config.omega), [_interval(text) for text in config.interval]
    if default is not None:
        omegas, intervals = omegas or [default.omega], intervals or [(default.t_min, default.t_max)]
    for flag, known in (("omega", omegas), ("interval", intervals)):
        require(bool(known), f"{flag}: this network is not a preset, so {flag} must be given")
    return [Guidance(float(omega), *interval) for interval, omega in product(intervals, omegas)]


def _interval(text: str) -> tuple[float, float]:
    try:
        t_min, t_max = map(float, text.split(","))
    except ValueError:
        raise InputError(f"interval: expected t_min,t_max such as 0.1,0.7, got {text!r}") from None
    return t_min, t_max
