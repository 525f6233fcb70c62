"""Sampling: z_1 = noise_scale N(0, I); z_r = z_t - (t - r) u(z_t, t, h = t - r, w, t_min, t_max, y)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pmf.config import MODELS, SAMPLING, Guidance, ModelConfig
from pmf.errors import check_network, extent, extra, readable, require
from pmf.fields import check_values, is_integer
from pmf.noise import seeded_noise
from pmf.pair import Dual

if TYPE_CHECKING:
    from pmf.model import PMFDiT
    from pmf.packing import Held

Result = TypeVar("Result")
LARGEST = 10**6
"""Steps of sampling, and images in a batch, beyond which a number must be a mistake."""
SEEDS = 2**32
"""Seeds of images lie in [0, SEEDS)."""


def seeds_from(first: int, count: int) -> range:
    """The seeds of `count` images: `first`, first + 1, ... Errors: `InputError` unless all lie in [0, 2^32)."""
    require(count <= SEEDS, lambda: f"seed: expected at most 2^32 images, one seed each, got {count}")
    good = is_integer(first) and 0 <= first <= SEEDS - count
    require(good, lambda: f"seed: expected an integer from 0 to {SEEDS - count}, for {count} images, got {first!r}")
    return range(first, first + count)


@torch.no_grad()
def generate(
    model: PMFDiT,
    labels: Sequence[int] | Tensor,
    *,
    noise: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    steps: int = 1,
    omega: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Images [n, c, H, W] in about [-1, 1], one per label, on the model's device; float32, or in the noise's dtype.

    With one step, the network's output is the image. More steps divide [0, 1] evenly.

    Args: labels in [0, num_classes], num_classes being the null class; noise [n, c, H, W] of unit
    variance, or seeds, one integer per image (default 0, 1, 2, ...); omega >= 1, the guidance scale,
    and [t_min, t_max], its interval, default to the published setting of the model's preset;
    batch_size images at a time; progress shows a progress bar.
    Errors: `InputError` on labels out of range, both noise and seeds, wrong shapes, NaN, no preset, or a progress bar
    without tqdm.
    """
    check_network(model)
    _check_count("steps", steps)
    _check_count("batch_size", batch_size)
    request = _Request.of(model.config, labels, noise, seeds)
    guidance = _guidance(model.config, omega, t_min, t_max)
    device = next(model.parameters()).device

    images = []
    with model.held_weights():
        for part in request.parts(batch_size, progress):
            z = model.config.noise_scale * request.noise_of(part, device)
            labels = request.labels[part].to(device, non_blocking=True)
            images.append(integrate(model, z, labels, steps, guidance))
    return torch.cat(images)


class Sampler:
    """A faster `generate`: batches of one size, with the blocks' weights joined once per call.

    On CUDA, the constructor captures a batch as one CUDA graph, which avoids the overhead of Python and of launches;
    other devices run the same code without graphs. Blocks may be compiled by `model.compile_blocks()`. Everything
    runs in the model's dtype (autocast is off): on a GPU, use `dtype=torch.bfloat16` and `aux_head=False`. Threads may
    share one; on CUDA, where the batch has fixed buffers, their calls wait for each other and must be on one stream.

    Args: see `generate`. Errors: `InputError` as in `generate`, and if the model's parameters have been replaced
    since construction (changes in place take effect).
    """

    def __init__(
        self,
        model: PMFDiT,
        batch_size: int = 64,
        *,
        steps: int = 1,
        omega: float | None = None,
        t_min: float | None = None,
        t_max: float | None = None,
    ) -> None:
        check_network(model)
        _check_count("steps", steps)
        _check_count("batch_size", batch_size)
        self.model, self.batch_size, self.steps = model, batch_size, steps
        self._guidance = _guidance(model.config, omega, t_min, t_max)
        self.device = next(model.parameters()).device
        self._places = self._parameter_places()
        with self._inference():
            self._fixed, self._turn = self._buffers(), threading.Lock()
            self._join = self._prepared(model.joined_weights)
            self._run = self._prepared(self._batch, *self._fixed, self._join())

    def __call__(
        self,
        labels: Sequence[int] | Tensor,
        *,
        noise: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Images [n, c, H, W] as from `generate`, but always float32; a last batch that is not full is padded."""
        request = _Request.of(self.model.config, labels, noise, seeds)
        message = "model: its parameters were replaced, expected those the Sampler was built on"
        require(self._parameter_places() == self._places, message)
        captured = self.device.type == "cuda"
        with self._turn if captured else contextlib.nullcontext(), self._inference():
            noise, labels = self._fixed if captured else self._buffers()
            images = noise.new_empty(len(request.labels), *noise.shape[1:])
            weights = self._join()
            for part in request.parts(self.batch_size, progress):
                rows = len(request.labels[part])
                request.noise_of(part, out=noise[:rows])
                labels[:rows].copy_(request.labels[part], non_blocking=True)
                images[part] = self._run(noise, labels, weights)[:rows]
        return images

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Noise and labels of one batch."""
        shape = (self.batch_size, *self.model.config.image_shape)
        noise = torch.zeros(shape, device=self.device, dtype=torch.float32)
        return noise, torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        """Disable gradients and autocast, and inference mode too: its tensors could not be written to outside it."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    def _parameter_places(self) -> list[int]:
        return [p.data_ptr() for p in self.model.parameters()]

    def _batch(self, noise: Tensor, labels: Tensor, weights: list[Held]) -> Tensor:
        """The images of one batch."""
        with self.model.held_weights(weights):
            return integrate(self.model, self.model.config.noise_scale * noise, labels, self.steps, self._guidance)

    def _prepared(self, work: Callable[..., Result], *fixed: Any) -> Callable[..., Result]:
        """`work`; on CUDA a graph of `work(*fixed)` with fixed outputs, after runs that initialise compilers."""
        if self.device.type != "cuda":
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    work(*fixed)
            torch.cuda.current_stream().wait_stream(stream)
            # thread_local: other threads, such as a loader's pinning thread, may call CUDA during the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = work(*fixed)

        def replay(*_: Any) -> Result:
            graph.replay()
            return results

        return replay


@dataclass(frozen=True)
class _Request:
    """A checked request: labels, and noise either given or made from seeds."""

    labels: Tensor
    noise: Tensor | None
    seeds: Sequence[int]
    image_shape: tuple[int, int, int]

    @classmethod
    def of(cls, config, labels, noise: Tensor | None, seeds: Sequence[int] | None) -> _Request:
        """Errors: see `generate`."""
        labels, classes, shape = _integers("labels", labels), config.num_classes, config.image_shape
        require(len(labels) > 0, "labels: expected at least one class, got none")
        require(
            bool(((labels >= 0) & (labels <= classes)).all()),
            lambda: f"labels: expected classes in [0, {classes}], got {extent(labels)}",
        )
        require(noise is None or seeds is None, "noise: expected either noise or seeds, got both")
        seeds = range(len(labels)) if seeds is None else _integers("seeds", seeds).tolist()
        require(len(seeds) == len(labels), f"seeds: expected {len(labels)} of them, got {len(seeds)}")
        require(all(0 <= seed < SEEDS for seed in seeds), "seeds: expected integers in [0, 2^32)")
        if noise is not None:
            wanted = [len(labels), *shape]
            require(isinstance(noise, Tensor), lambda: f"noise: expected a tensor, got {type(noise).__name__}")
            require(list(noise.shape) == wanted, f"noise: expected shape {wanted}, got {list(noise.shape)}")
            require(noise.is_floating_point(), f"noise: expected floating values, got {noise.dtype}")
            finite = not readable(noise) or bool(torch.isfinite(noise).all())
            require(finite, "noise: expected finite values, got NaN or infinity")
        return cls(labels, noise, seeds, shape)

    def parts(self, batch_size: int, progress: bool) -> Iterator[slice]:
        """The batches, with a progress bar if requested."""
        starts: Iterable[int] = range(0, len(self.labels), batch_size)
        if progress:
            with extra("train", "progress: a progress bar needs"):
                from tqdm import tqdm
            starts = tqdm(starts, desc="sampling", unit="batch")
        for start in starts:
            yield slice(start, start + batch_size)

    def noise_of(self, part: slice, device: torch.device | None = None, out: Tensor | None = None) -> Tensor:
        """Unit-variance noise of one batch, on `device` or in `out`."""
        if self.noise is None:
            return seeded_noise(self.seeds[part], self.image_shape, device, out=out)
        noise = self.noise[part]
        return noise.to(device, non_blocking=True) if out is None else out.copy_(noise, non_blocking=True)


def _check_count(name: str, value: int) -> None:
    check_values(int, **{name: value})
    require(value >= 1, f"{name}: expected at least 1, got {value}")
    require(value <= LARGEST, f"{name}: expected at most {LARGEST}, got {value}")


def _integers(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """A list of integers as int64 [n]. Errors: `InputError` on anything else."""
    try:
        tensor = torch.as_tensor(values if isinstance(values, Tensor) else list(values) or torch.empty(0).long())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        tensor = torch.empty(())
    whole = tensor.ndim == 1 and not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    require(whole, lambda: f"{name}: expected a list of integers below 2^63, got {values!r}"[:200].partition("\n")[0])
    return tensor.to(torch.int64)


def _guidance(config: ModelConfig, omega: float | None, t_min: float | None, t_max: float | None) -> Guidance:
    """The guidance given, else the published setting of the network's preset."""
    preset = next((SAMPLING[name] for name, c in MODELS.items() if c == config), {})

    def chosen(name: str, given: float | None) -> float:
        require(given is not None or name in preset, f"{name}: this network is not a preset, so {name} must be given")
        return preset[name] if given is None else given

    return Guidance(chosen("omega", omega), chosen("t_min", t_min), chosen("t_max", t_max))


def integrate(model: PMFDiT, z: Tensor, y: Tensor, steps: int, guidance: Guidance) -> Tensor:
    """Integrate from z_1 [n, c, H, W] to z_0, the images of labels y int64 [n], in equal steps; only the u head runs.

    It is recorded where gradients are: post-training differentiates through it.
    """
    conditions = (guidance.omega, guidance.t_min, guidance.t_max)
    omega, t_min, t_max = (z.new_full((len(z),), value, dtype=torch.float32) for value in conditions)
    times = torch.linspace(1, 0, steps + 1, device=z.device)
    for t, r in pairwise(times):
        h = (t - r).expand(len(z))
        net = model.predict_dual(Dual(z), Dual(h), omega, t_min, t_max, y, heads=("u",))["u"].value
        # z - h u with u = (z - net) / c, written so that h = c gives net itself.
        z = torch.lerp(z, model.to_images(net).to(z.dtype), ((t - r) / t.clamp(model.config.t_clip, 1)).to(z.dtype))
    return z
