"""Perceptual distances of the pMF loss: LPIPS and ConvNeXt-V2 between paired random crops.

Both images of a row are cropped by the same random box and resized to 224 x 224 (pmf/crops.py).
LPIPS    = sum over five VGG-16 layers of mean over pixels of sum_c w_c (f_c / |f| - g_c / |g|)^2
ConvNeXt = |n(f) - n(g)|^2, f and g pooled features of ConvNeXt-V2, n its final LayerNorm (eps 1e-6);
images are not rescaled: they stay in [-1, 1].

The networks are frozen, and a row's distance depends only on that row. So the gradient is computed together
with the distance, a few rows at a time: activations exist only for those rows, and the backward pass keeps one
image per row and term.
"""

from __future__ import annotations

import importlib.util
import numbers
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pmf.autocast import no_autocast
from pmf.crops import draw_crops, resize_crops
from pmf.errors import InputError, extra, first_line, require
from pmf.fields import check_values
from pmf.sizes import check_is_file

CROP_SIZE = 224
CONVNEXT = "facebook/convnextv2-base-22k-224"
CONVNEXT_BASE = dict(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024])
NORM_EPS = 1e-6
VECTOR_EPS = 1e-10


class LPIPSDistance(nn.Module):
    """LPIPS per row, of images in [-1, 1], from a `lpips.LPIPS` network (version 0.1, VGG trunk).

    Takes ownership of the network. Its trunk runs in `dtype`; scaling the input and comparing features use at least
    float32. Values equal the package's; a feature vector of zeros gets a zero gradient, where the package gives NaN.
    """

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.scaling = network.scaling_layer.to(wide)
        self.trunk = network.net.to(dtype)
        self.weights = nn.ParameterList(lin.model[-1].weight.detach().flatten().to(wide) for lin in network.lins)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of the images a and b [B, 3, H, W]; only a's features are recorded."""
        with torch.no_grad():
            targets = self.trunk(self.scaling(b).to(self.dtype))
        layers = zip(self.trunk(self.scaling(a).to(self.dtype)), targets, self.weights, strict=True)
        return torch.stack([self._layer(f, g, weight) for f, g, weight in layers]).sum(0)

    @staticmethod
    def _layer(f: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        difference = _unit(f.to(weight.dtype)) - _unit(g.to(weight.dtype))
        return difference.square().mean((2, 3)) @ weight


def _unit(features: Tensor) -> Tensor:
    """Features divided by their length over channels."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + VECTOR_EPS)


class ConvNextDistance(nn.Module):
    """Squared distance per row of the pooled, normalised features of a `transformers.ConvNextV2Model`.

    Takes ownership of the network, which runs in `dtype`; pooling, the final LayerNorm (eps 1e-6) and the distance
    are in float32 at least.
    """

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.norm = nn.LayerNorm(network.layernorm.normalized_shape, eps=NORM_EPS, dtype=wide)
        self.norm.load_state_dict(network.layernorm.state_dict())
        self.network = network.to(dtype)

    def features(self, images: Tensor) -> Tensor:
        """Pooled and normalised features [B, C] of images [B, 3, H, W] in [-1, 1]."""
        last = self.network(images.to(self.dtype)).last_hidden_state
        return self.norm(last.to(self.norm.weight.dtype).mean((2, 3)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [B] of the images a and b [B, 3, H, W]; only a's features are recorded."""
        with torch.no_grad():
            targets = self.features(b)
        return (self.features(a) - targets).square().sum(1)


class _RowDistance(torch.autograd.Function):
    """distance(a, b) [B] of independent rows, with its gradient with respect to `a` computed in the same pass."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, distance: Callable[[Tensor, Tensor], Tensor], rows_at_once: int) -> Tensor:
        values, gradients = [], []
        record = ctx.needs_input_grad[0]
        for rows, targets in zip(a.split(rows_at_once), b.split(rows_at_once), strict=True):
            with torch.set_grad_enabled(record):
                rows = rows.detach().requires_grad_(record)
                value = distance(rows, targets)
                if record:
                    gradients += torch.autograd.grad(value.sum(), rows)
            values.append(value.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_distance: Tensor):
        (gradient,) = ctx.saved_tensors
        return d_distance[:, None, None, None] * gradient, None, None, None


class PerceptualLoss(nn.Module):
    """The perceptual function of `pmf_loss`: distances {"lpips": [B], "convnext": [B]} between x_hat and x.

    `pmf_loss(..., perceptual=loss.for_step(seed))` makes a step's crops depend only on that seed.
    Frozen and always in evaluation mode; gradients reach x_hat only. `PerceptualLoss.load` finds the weights.
    """

    def __init__(self, terms: Mapping[str, nn.Module], *, rows_at_once: int = 32) -> None:
        """Args: `terms` maps a name to a module that gives distances [B] of images a and b [B, 3, 224, 224], each
        row independently (`LPIPSDistance` as "lpips", `ConvNextDistance` as "convnext"); `rows_at_once` is the number
        of rows whose activations are kept at one time.
        """
        super().__init__()
        check_values(int, rows_at_once=rows_at_once)
        require(rows_at_once >= 1, f"rows_at_once: expected at least 1, got {rows_at_once}")
        named = isinstance(terms, (Mapping, nn.ModuleDict)) and all(isinstance(x, nn.Module) for x in terms.values())
        require(named, lambda: f"terms: expected modules by name, got {type(terms).__name__}")
        require(len(terms) > 0, "terms: expected at least one, got none")
        self.rows_at_once = rows_at_once
        self.terms = nn.ModuleDict(terms)
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def load(
        cls,
        lpips: str | Path | None = "hub",
        convnext: str | Path | None = "hub",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        rows_at_once: int = 32,
        seed: int = 0,
    ) -> PerceptualLoss:
        """The published networks, or others from disk; needs the extra `perceptual`.

        lpips: "hub" (torchvision's VGG-16 weights, downloaded once), the path of torchvision's vgg16 state dict
        (.pth or .safetensors), "random", or None to omit the term; the layer weights w are the package's own.
        convnext: "hub" (facebook/convnextv2-base-22k-224), another hub id, a directory that holds such a network,
        "random" (ConvNeXt-V2 Base), or None. "random" weights are a function of `seed`.
        Errors: `InputError` names what is not installed, not found or of wrong shape.
        """
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        require(floating, lambda: f"dtype: expected a floating dtype, got {dtype!r}")
        seed, terms = _checked_seed(seed), dict[str, nn.Module]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if lpips is not None:
                terms["lpips"] = LPIPSDistance(_load_lpips(str(lpips)), dtype)
            if convnext is not None:
                terms["convnext"] = ConvNextDistance(_load_convnext(str(convnext)), dtype)
        return cls(terms, rows_at_once=rows_at_once).to(device)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in evaluation mode, whatever mode a parent module is set to."""
        return super().train(False)

    def for_step(self, seed: int) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        """A function of (x_hat, x) that draws its crops from `seed` (its low 32 bits), the same on every call."""
        seed = _checked_seed(seed)
        return lambda x_hat, x: self(x_hat, x, torch.Generator().manual_seed(seed))

    def forward(self, x_hat: Tensor, x: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Distances per row, float32 [B] (float64 for float64 networks), of images [B, 3, H, W] in [-1, 1].

        Crops are drawn on the CPU from `generator` (None: the default one), without waiting for a device. Even under
        autocast, crops are made in float32 and networks run in their own dtype. Errors: `InputError` on other tensors.
        """
        for name, images in (("x", x), ("x_hat", x_hat)):
            if not (isinstance(images, Tensor) and images.is_floating_point()):
                got = getattr(images, "dtype", type(images).__name__)
                raise InputError(f"{name}: expected floating images, got {got}")
        require(
            x.ndim == 4 and x.shape[1] == 3,
            f"x: expected shape [B, 3, H, W] (perceptual networks read 3 channels), got {list(x.shape)}",
        )
        require(x_hat.shape == x.shape, f"x_hat: expected the shape of x, {list(x.shape)}, got {list(x_hat.shape)}")
        return self.distances(x_hat, x, draw_crops(len(x), x.shape[2], x.shape[3], generator))

    def distances(self, x_hat: Tensor, x: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """`forward` with given boxes (top, left, height, width) [B, 4]."""
        if len(x) == 0:
            return {name: x_hat.sum((1, 2, 3)) for name in self.terms}
        a, b = (resize_crops(images, boxes, CROP_SIZE) for images in (x_hat, x.detach()))
        with no_autocast(x.device):
            return {name: _RowDistance.apply(a, b, term, self.rows_at_once) for name, term in self.terms.items()}


def _checked_seed(seed: int) -> int:
    good = isinstance(seed, numbers.Integral) and not isinstance(seed, bool) and -(2**63) <= seed < 2**64
    require(good, lambda: f"seed: expected an integer of 64 bits, got {seed!r:.80}")
    return int(seed)


@contextmanager
def _loading(argument: str, source: str) -> Iterator[None]:
    """Turn any failure to load `argument` into a one-line `InputError`."""
    try:
        with extra("perceptual", f"{argument}: needs"):
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{argument}: cannot load {source!r}: {first_line(error)}") from error


@contextmanager
def _own_kernels_hidden() -> Iterator[None]:
    """Hide a clone's folder `kernels` from transformers, which would take it for Hugging Face's package `kernels`."""
    found, own = (importlib.util.find_spec(name) for name in ("kernels", "pmf.kernels"))
    files = [spec.origin for spec in (found, own) if spec is not None and spec.origin is not None]
    shadowed = len(files) == 2 and os.path.samefile(*files)  # in a clone, pmf/kernels is a symlink to it
    if shadowed:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if shadowed:
            del sys.modules["kernels"]


def _load_lpips(source: str) -> Any:
    """LPIPS with the package's layer weights and the trunk that `source` names."""
    with _loading("lpips", source):
        from lpips import LPIPS

        network = LPIPS(net="vgg", pnet_rand=source != "hub", verbose=False)
        state = {} if source in ("hub", "random") else _read_state_dict(Path(source))
    if state:
        _load_trunk(network.net, state, source)
    return network


def _load_trunk(trunk: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Fill the trunk from torchvision's names: its slice1.0.weight is their features.0.weight."""
    for name, weight in trunk.state_dict().items():
        published = "features." + name.split(".", 1)[1]
        got = list(state[published].shape) if published in state else "no such weight"
        wanted = list(weight.shape)
        require(got == wanted, f"lpips: expected {published} of shape {wanted} in {source}, got {got}")
        weight.copy_(state[published])


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    check_is_file("lpips", file)
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _with_biases(network: Any) -> Any:
    """Give the network random biases: without them, an image of zeros (an untrained model's prediction) stays zero in
    every block, and the gradient of the block's norm overflows.
    """
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return network


def _load_convnext(source: str) -> Any:
    """ConvNeXt-V2 without its classifier."""
    name = CONVNEXT if source == "hub" else source
    with _loading("convnext", name), _own_kernels_hidden():
        from transformers import ConvNextV2Config, ConvNextV2Model

        if source == "random":
            return _with_biases(ConvNextV2Model(ConvNextV2Config(**CONVNEXT_BASE)))
        network, info = ConvNextV2Model.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    require(not missing, f"convnext: {name} lacks the weight {missing[0] if missing else None!r}")
    return network
