"""Networks whose feature spaces compare sets of images: Inception, SigLIP, MAE, ConvNeXt, DINOv2, CLIP, and the pixels.

f = network((resize(x / 2 + 1/2) - mean) / std)     resized bicubically with antialiasing, neither clamped nor rounded

Images are resized by two matrix products, since PyTorch's own backward of it adds in no fixed order on CUDA. They run
without autocast, in TF32 only where the user allows it for all products (`torch.set_float32_matmul_precision`).

Sizes and pooling are those of FD-loss (arXiv 2604.28190), so that its published distances apply. It keeps 256 pixels
for patches of 14 pixels: normalised images get zeros at the right and bottom, up to 266. Position embeddings are
interpolated to that grid. Inception resizes as TensorFlow 1 did, as for FID (see `pmf.metrics.inception`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pmf.autocast import no_autocast
from pmf.errors import InputError, extra, first_line, require
from pmf.fields import check_values
from pmf.images import to_float
from pmf.metrics import INCEPTION_FEATURES, INCEPTION_SIZE, Inception, Resize, exact_convolutions, inception
from pmf.sizes import check_is_file
from pmf.weights import weights_digest

RANDOM = "random"
MOST_PIXELS = 2**14
"""Values of an image, 3 H W, of which `pixels` makes features: their covariance takes 2 GB in float64."""


@dataclass(frozen=True)
class _Source:
    """A network of timm: identifier, size of its input, width of its features, number of weights, classes if any."""

    identifier: str
    size: int
    width: int
    weights: int
    classes: int = 0


_TIMM = {
    "siglip": _Source("vit_so400m_patch16_siglip_256.v2_webli", 224, 1152, 427_888_064),
    "mae": _Source("vit_large_patch16_224.mae", 224, 1024, 303_301_632),
    "convnext": _Source("convnextv2_base.fcmae_ft_in22k_in1k", 224, 1024, 88_717_800, 1000),
    "dinov2": _Source("vit_large_patch14_dinov2.lvd142m", 256, 1024, 304_367_616),
    "clip": _Source("vit_large_patch14_clip_224.openai", 256, 1024, 303_179_776),
}
NETWORKS = ("inception", *_TIMM, "pixels")
"""The names that `feature_network` knows."""
WEIGHTS = {"inception": 23_850_960, "pixels": 0} | {name: source.weights for name, source in _TIMM.items()}
"""How many weights each has."""


class FeatureNetwork(nn.Module):
    """A frozen network, always in evaluation mode: images [B, c, H, W] in about [-1, 1] -> features [B, width].

    It runs in its own dtype even under autocast; resizing and features are in float32 at least. On a GPU convolutions
    of float32 may be in TF32, by PyTorch's default; `SpaceExtractor` excludes it. Images of one channel count as grey.
    Attributes: name; width (None for pixels: all values); space, which identifies the feature space in one line
    (network, input, digest of the weights, whatever the dtype); classes of `logits`, or None.
    """

    _place: Tensor

    def __init__(self, name: str, trunk: nn.Module, *, width: int | None, space: str, dtype: torch.dtype) -> None:
        """Args: trunk, a module from images [B, 3, H, W] in float32 at least to features, which runs in `dtype` itself;
        it may have a `classifier`, a module from features to logits, and `classes`, their number.
        """
        super().__init__()
        self.name, self.width, self.space, self.dtype = name, width, space, dtype
        self.trunk = trunk
        self.register_buffer("_place", torch.empty(0), persistent=False)
        self.classes: int | None = getattr(trunk, "classes", None)
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._place.device

    @property
    def wide(self) -> torch.dtype:
        """The dtype of inputs and features."""
        return torch.promote_types(self.dtype, torch.float32)

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stay in evaluation mode, whatever mode a parent module is set to."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, width], differentiable in the images. Errors: `InputError` on bytes and on bad shapes."""
        shape = list(images.shape)
        fits = images.is_floating_point() and len(shape) == 4 and shape[1] in (1, 3) and min(shape[2:]) > 0
        require(fits, lambda: f"images: expected floats [B, 1 or 3, H, W], got {images.dtype} {shape}")
        with no_autocast(images.device):
            # A class token is a view, which would keep the tokens of all patches for as long as the features are held.
            return self.trunk(images.to(self.wide)).to(self.wide).contiguous()

    def logits(self, features: Tensor) -> Tensor:
        """Logits [B, classes] of features, in the order of ImageNet. Errors: `InputError` without a classifier."""
        if self.classes is None:
            raise InputError(f"features: {self.name} has no classifier of ImageNet, expected convnext")
        with no_autocast(features.device):
            return self.trunk.classifier(features.to(self.wide))  # type: ignore[operator]


class SpaceExtractor(nn.Module):
    """A feature network as an extractor of `pmf.features`: bytes [n, 3, H, W] -> features and logits of no classes."""

    resize: Resize = "tf1"

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network, self.space = network, network.space

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, width] and logits [n, 0], without TF32 convolutions nor algorithms chosen by timing."""
        with exact_convolutions():
            features = self.network(to_float(images.to(self.network.device)))
        return features, features[:, :0]


class _TimmTrunk(nn.Module):
    """A network of timm up to its pooled features: a ViT's class token or attention pool, a ConvNeXt's spatial mean.

    The final norm of a ConvNeXt belongs to its classifier, which is in float32 at least.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.size, self.dtype = network.to(dtype), size, dtype
        wide = torch.promote_types(dtype, torch.float32)
        for name in ("mean", "std"):
            values = torch.tensor(network.pretrained_cfg[name], dtype=wide).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        if hasattr(network, "stages"):
            head, self.classes = network.head.to(wide), network.num_classes
            self.classifier = nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), head.norm, nn.Flatten(), head.fc)

    def forward(self, images: Tensor) -> Tensor:
        x, size = images.expand(-1, 3, -1, -1) / 2 + 0.5, (self.size, self.size)
        if x.shape[2:] != size:
            x = _resized(x, size, _bicubic_weights)
        x = self.network.forward_features(((x - self.mean) / self.std).to(self.dtype))
        if x.ndim == 4:
            return x.to(images.dtype).mean((2, 3))
        return self.network.forward_head(x, pre_logits=True)


def _resized(images: Tensor, size: tuple[int, int], weights: Callable[[int, int, Tensor], Tensor]) -> Tensor:
    """Images [..., H, W] resized to [..., *size]; weights(n, wanted, images): the matrix [wanted, n] of a dimension."""
    rows, columns = (weights(n, wanted, images) for n, wanted in zip(images.shape[-2:], size, strict=True))
    return rows @ images @ columns.T


def _bicubic_weights(size: int, wanted: int, like: Tensor) -> Tensor:
    """The bicubic, antialiased `interpolate` as a matrix [wanted, size]: it resizes the columns of the identity."""
    one = torch.eye(size, dtype=like.dtype, device=like.device)[None, None]
    return interpolate(one, (wanted, size), mode="bicubic", align_corners=False, antialias=True)[0, 0]


class _InceptionTrunk(nn.Module):
    """Inception up to its pool of 2048 features."""

    def __init__(self, network: Inception, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images.expand(-1, 3, -1, -1) + 1) / 2 * 255
        resized = _resized(pixels, (INCEPTION_SIZE, INCEPTION_SIZE), _tf1_weights)
        return self.network.layers(((resized - 128) / 128).to(self.dtype))[0]


def _tf1_weights(size: int, wanted: int, like: Tensor) -> Tensor:
    """The bilinear resize of TensorFlow 1 as a matrix [wanted, size]: output i reads i size / wanted, in float32."""
    place = torch.arange(wanted, dtype=torch.float32, device=like.device) * (size / wanted)
    low = place.long()
    share = (place - low).to(like)[:, None]
    one = torch.eye(size, dtype=like.dtype, device=like.device)
    return (1 - share) * one[low] + share * one[(low + 1).clamp(max=size - 1)]


def network_name(spec: str) -> str:
    """The name in NAME, NAME:PATH or NAME:random."""
    return spec.partition(":")[0]


def feature_network(
    spec: str, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> FeatureNetwork:
    """The network that `spec` names; needs the extra `posttrain`, except for pixels.

    spec: a name of `NETWORKS` (published weights, which timm or torch-fidelity downloads); NAME:PATH, a file of the
    state dict of that network in timm (.safetensors, .pth) or torch-fidelity; or NAME:random, weights that are a
    function of `seed`, for trial runs. Errors: `InputError` on another name, if a package or file is missing, or if
    weights do not fit.
    """
    check_values(str, spec=spec)
    require(dtype.is_floating_point, f"dtype: expected a floating dtype, got {dtype}")
    name, weights = network_name(spec), spec.partition(":")[2]
    require(name in NETWORKS, f"features: expected one of {', '.join(NETWORKS)}, with :PATH or :random, got {spec!r}")
    require(bool(weights) == (":" in spec), f"features: expected a path or random after the colon, got {spec!r}")
    require(name != "pixels" or not weights, f"features: pixels have no weights, expected pixels, got {spec!r}")
    if name == "pixels":
        return FeatureNetwork(name, _Pixels(), width=None, space=name, dtype=dtype).to(device)
    if weights not in ("", RANDOM):
        check_is_file("features", weights)
        require(Path(weights).is_file(), f"features: {weights} does not exist, expected a file of {name}'s weights")
    with _loading(spec), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # that of the CPU alone
        network: Any = _inception(weights) if name == "inception" else _timm(name, weights)
        if weights == RANDOM:
            _randomise(network)
    digest = weights_digest(network)  # before it is rounded to its dtype
    if name == "inception":
        space = f"inception tf1 {INCEPTION_SIZE} {digest}"
        trunk: nn.Module = _InceptionTrunk(network, dtype)
        return FeatureNetwork(name, trunk, width=INCEPTION_FEATURES, space=space, dtype=dtype).to(device)
    source = _TIMM[name]
    trunk, space = _TimmTrunk(network, source.size, dtype), f"{source.identifier} bicubic {source.size} {digest}"
    return FeatureNetwork(name, trunk, width=source.width, space=space, dtype=dtype).to(device)


class _Pixels(nn.Module):
    """The values of an image themselves."""

    def forward(self, images: Tensor) -> Tensor:
        width = images[0].numel()
        require(width <= MOST_PIXELS, f"features: pixels expected at most {MOST_PIXELS} values an image, got {width}")
        return images.flatten(1)


@contextmanager
def _loading(spec: str) -> Iterator[None]:
    """Turn any failure to load a network into a one-line `InputError`."""
    try:
        with extra("posttrain", f"features: {spec} needs"):
            yield
    except InputError:
        raise
    except Exception as error:  # a download, or reading a corrupt file, can raise anything
        raise InputError(f"features: cannot load {spec}: {first_line(error)}") from error


def _inception(weights: str) -> Inception:
    if weights != RANDOM:
        return inception(weights or None)
    from torch_fidelity import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            """Keep the initial weights: the constructor would download others."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Inception(Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing))


def _timm(name: str, weights: str) -> nn.Module:
    source = _TIMM[name]
    import timm

    any_size = dict(dynamic_img_size=True, dynamic_img_pad=True) if source.identifier.startswith("vit_") else {}
    network = timm.create_model(source.identifier, pretrained=not weights, num_classes=source.classes, **any_size)
    if weights not in ("", RANDOM):
        _load(network, Path(weights), name)
    return network


def _load(network: nn.Module, file: Path, name: str) -> None:
    """Load timm's state dict; the head of a network that is used without one is left out."""
    loaded = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    wanted = network.state_dict()
    require(isinstance(loaded, dict), f"features: expected a state dict in {file}, got {type(loaded).__name__}")
    state = {key: value for key, value in loaded.items() if key in wanted or not str(key).startswith("head.")}
    for key in sorted({*wanted, *map(str, state)}):
        shapes = [list(x[key].shape) if isinstance(x.get(key), Tensor) else "no such weight" for x in (wanted, state)]
        require(shapes[0] == shapes[1], f"features: {file}: {name} expects {key} of {shapes[0]}, got {shapes[1]}")
    network.load_state_dict(state)


@torch.no_grad()
def _randomise(module: nn.Module) -> None:
    """Draw all weights such that features depend on the images: initial layer scales of 1e-5, say, would hide them."""
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim > 1:  # a first dimension of 1: a token or position embedding
            variance = 4e-4 if len(parameter) == 1 else 2 * len(parameter) / parameter.numel()
            nn.init.normal_(parameter, std=variance**0.5)
        else:
            nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.1)
