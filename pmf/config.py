"""Configuration of a pMF network and its loss: frozen dataclasses, and one entry per published model.

Source: arXiv 2601.22158 and the configurations its authors published.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pmf.errors import require
from pmf.fields import check_fields

PREFIX_TOKENS = {"y": "class", "omega": "omega", "t_min": "t_min", "t_max": "t_max", "h": "time"}
"""The groups of prefix tokens, in order: the input that each carries, and its name in `ModelConfig` (class_tokens)."""


@dataclass(frozen=True)
class ModelConfig:
    """A pMF network: everything needed to build it, and to sample it."""

    image_size: int = 256
    """Height and width of the images, in pixels."""
    patch_size: int = 16
    """Side of the square patch that becomes one token, in pixels."""
    hidden_size: int = 768
    """Width C of the residual stream."""
    depth: int = 16
    """Blocks on the path to one head: `depth - aux_head_depth` shared ones, then `aux_head_depth` of its own."""
    num_heads: int = 12
    """Attention heads; the head width is hidden_size / num_heads."""
    aux_head_depth: int = 8
    """Blocks of each of the two heads, u and v."""
    num_classes: int = 1000
    """Classes; the null class of guidance is index num_classes."""
    in_channels: int = 3
    """Channels of the images."""
    bottleneck: int = 128
    """Width between the two projections of the patch embedding."""
    noise_scale: float = 1.0
    """Standard deviation of the noise e in z_t = (1 - t) x + t e."""
    t_clip: float = 0.05
    """Lower bound of t in the conversion of predicted images to velocities: u = (z - net) / clip(t, t_clip, 1)."""
    conditioning: Literal["in_context", "adaln"] = "in_context"
    """in_context: prefix tokens, as published. adaln: shift, scale and gate in every block."""
    class_tokens: int = 8
    """Prefix tokens that carry the class (in_context)."""
    omega_tokens: int = 4
    """Prefix tokens that carry the guidance scale (in_context)."""
    t_min_tokens: int = 2
    """Prefix tokens that carry the start of the guidance interval (in_context)."""
    t_max_tokens: int = 2
    """Prefix tokens that carry the end of the guidance interval (in_context)."""
    time_tokens: int = 4
    """Prefix tokens that carry h = t - r (in_context)."""

    def __post_init__(self) -> None:
        check_fields(self, "ModelConfig: ")
        positive = (
            "image_size patch_size hidden_size depth num_heads aux_head_depth num_classes in_channels "
            "bottleneck noise_scale t_clip class_tokens omega_tokens t_min_tokens t_max_tokens time_tokens"
        )
        for name in positive.split():
            value = getattr(self, name)
            require(value > 0, f"ModelConfig: {name} must be positive, got {value}")
        require(
            self.image_size % self.patch_size == 0,
            f"ModelConfig: patch_size must divide image_size {self.image_size}, got {self.patch_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"ModelConfig: num_heads must divide hidden_size {self.hidden_size}, got {self.num_heads}",
        )
        require(
            self.head_dim % 4 == 0,
            f"ModelConfig: head_dim must be a multiple of 4 (2-D rotary pairs), got {self.head_dim}",
        )
        require(
            self.t_clip <= 1,
            f"ModelConfig: t_clip must be at most 1, beyond which it changes nothing, got {self.t_clip}",
        )
        require(
            self.aux_head_depth < self.depth,
            f"ModelConfig: aux_head_depth must be below depth {self.depth}, got {self.aux_head_depth}",
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return (self.in_channels, self.image_size, self.image_size)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patch tokens N."""
        return self.grid_size**2

    @property
    def prefix_length(self) -> int:
        """Tokens in front of the patches (0 under adaln)."""
        if self.conditioning == "adaln":
            return 0
        scalars = self.omega_tokens + self.t_min_tokens + self.t_max_tokens + self.time_tokens
        return self.class_tokens + scalars

    @property
    def sequence_length(self) -> int:
        """Tokens S: prefix and patches."""
        return self.prefix_length + self.num_patches

    @property
    def patch_values(self) -> int:
        """Values a head predicts per token: p * p * channels."""
        return self.patch_size**2 * self.in_channels

    @property
    def mlp_width(self) -> int:
        """Hidden width of SwiGLU: int(C * 8 / 3), rounded up to a multiple of 8 when C > 1024."""
        width = self.hidden_size * 8 // 3
        return width if self.hidden_size <= 1024 else -(-width // 8) * 8


@dataclass(frozen=True)
class LossConfig:
    """Random draws, guidance and weights of the pMF loss."""

    p_mean: float = 0.8
    """Mean of the logit-normal that t and r are drawn from."""
    p_std: float = 0.8
    """Standard deviation of that logit-normal."""
    tr_uniform: bool = False
    """With probability 0.1 per row, draw t and r uniformly from [0, 1] instead."""
    data_proportion: float = 0.5
    """Share of flow-matching rows (r = t), the first int(B * data_proportion) of a batch."""
    cfg_max: float = 7.0
    """The guidance scale omega is drawn from [1, 1 + cfg_max]."""
    cfg_beta: float = 1.0
    """The density of omega is proportional to omega^-cfg_beta."""
    class_dropout: float = 0.1
    """Probability that a row is trained on the null class."""
    norm_p: float = 1.0
    """Exponent of the adaptive weight 1 / (L + norm_eps)^norm_p."""
    norm_eps: float = 0.01
    """Offset of the adaptive weight."""
    perceptual_max_t: float = 0.8
    """Perceptual terms are computed only on rows with t below this."""
    lpips_weight: float = 0.4
    """Weight of the LPIPS term."""
    convnext_weight: float = 0.1
    """Weight of the ConvNeXt term."""

    def __post_init__(self) -> None:
        check_fields(self, "LossConfig: ")
        for name in ("data_proportion", "class_dropout"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"LossConfig: {name} must lie in [0, 1], got {value}")
        for name in ("p_std", "norm_eps"):
            value = getattr(self, name)
            require(value > 0, f"LossConfig: {name} must be positive, got {value}")
        for name in ("cfg_max", "lpips_weight", "convnext_weight"):
            value = getattr(self, name)
            require(value >= 0, f"LossConfig: {name} must not be negative, got {value}")
        exponent = (1 - self.cfg_beta) * math.log1p(self.cfg_max)  # its exponential must be finite in float32
        require(
            exponent < 88,
            lambda: f"LossConfig: cfg_beta is too small for cfg_max {self.cfg_max:g}, got {self.cfg_beta:g}",
        )


@dataclass(frozen=True)
class Guidance:
    """Guidance settings for sampling."""

    omega: float
    """Guidance scale, at least 1; 1 means no guidance."""
    t_min: float = 0.0
    """Start of the guidance interval: guidance acts for t in [t_min, t_max]."""
    t_max: float = 1.0
    """End of the guidance interval."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.omega >= 1, f"omega: expected a guidance scale >= 1, got {self.omega}")
        ordered = 0 <= self.t_min <= self.t_max <= 1
        require(ordered, f"t_min: expected 0 <= t_min <= t_max <= 1, got {self.t_min} and {self.t_max}")


@dataclass(frozen=True)
class ModelSettings:
    """All settings of one named model."""

    network: ModelConfig
    loss: LossConfig
    guidance: Guidance
    """Guidance for one-step sampling."""
    ema_half_life: float | None = None
    """Half-life of the weight average used for sampling, in thousands of images."""
    guidance_torch: Guidance | None = None
    """Guidance of the authors' PyTorch command, if it differs from that of their JAX command."""


_BASE: dict[str, Any] = dict(hidden_size=768, depth=16, num_heads=12)
_LARGE: dict[str, Any] = dict(hidden_size=1024, depth=32, num_heads=16)
_HUGE: dict[str, Any] = dict(hidden_size=1280, depth=48, num_heads=16, bottleneck=256)
_512_PIXELS: dict[str, Any] = dict(image_size=512, patch_size=32)

PUBLISHED: dict[str, ModelSettings] = {
    "pMF-B/16": ModelSettings(
        network=ModelConfig(**_BASE),
        loss=LossConfig(),
        guidance=Guidance(omega=8.5, t_min=0.1, t_max=0.7),
        ema_half_life=2000,
        guidance_torch=Guidance(omega=7.5, t_min=0.1, t_max=0.8),
    ),
    "pMF-B/32": ModelSettings(
        network=ModelConfig(**_BASE, **_512_PIXELS, noise_scale=2.0),
        loss=LossConfig(),
        guidance=Guidance(omega=6.5, t_min=0.1, t_max=0.7),
        ema_half_life=2000,
    ),
    "pMF-L/16": ModelSettings(
        network=ModelConfig(**_LARGE),
        loss=LossConfig(cfg_beta=2.0),
        guidance=Guidance(omega=7.0, t_min=0.2, t_max=0.7),
        ema_half_life=1000,
    ),
    "pMF-L/32": ModelSettings(
        network=ModelConfig(**_LARGE, **_512_PIXELS, noise_scale=4.0),
        loss=LossConfig(p_mean=0.0, perceptual_max_t=0.6),
        guidance=Guidance(omega=7.5, t_min=0.2, t_max=0.6),
        ema_half_life=2000,
    ),
    "pMF-H/16": ModelSettings(
        network=ModelConfig(**_HUGE, noise_scale=2.0),
        loss=LossConfig(p_mean=0.0, perceptual_max_t=0.6, tr_uniform=True),
        guidance=Guidance(omega=7.0, t_min=0.2, t_max=0.6),
        ema_half_life=1000,
    ),
    "pMF-H/32": ModelSettings(
        network=ModelConfig(**_HUGE, **_512_PIXELS, noise_scale=4.0),
        loss=LossConfig(p_mean=0.0, perceptual_max_t=0.6, tr_uniform=True),
        guidance=Guidance(omega=5.5, t_min=0.1, t_max=0.6),
        ema_half_life=500,
    ),
}
"""The authors' six models, as in their published configurations."""

DIGITS = ModelSettings(
    network=ModelConfig(
        image_size=8,
        patch_size=2,
        hidden_size=64,
        depth=6,
        num_heads=4,
        aux_head_depth=2,
        num_classes=10,
        in_channels=1,
        bottleneck=32,
        class_tokens=2,
        omega_tokens=1,
        t_min_tokens=1,
        t_max_tokens=1,
        time_tokens=1,
    ),
    loss=LossConfig(p_std=1.2, tr_uniform=True, norm_p=0.5),
    guidance=Guidance(omega=1.1, t_min=0.0, t_max=1.0),
)
"""Our own model of handwritten digits, small enough for a CPU."""

_NAMED = {**PUBLISHED, "pMF-digits": DIGITS}

MODELS: dict[str, ModelConfig] = {name: settings.network for name, settings in _NAMED.items()}
"""The networks by name."""
LOSSES: dict[str, LossConfig] = {name: settings.loss for name, settings in _NAMED.items()}
"""Their losses."""
SAMPLING: dict[str, dict[str, float]] = {
    f"{name}{suffix}": asdict(guidance)
    for name, settings in _NAMED.items()
    for suffix, guidance in (("", settings.guidance), ("-torch", settings.guidance_torch))
    if guidance is not None
}
"""omega, t_min and t_max by model name; "pMF-B/16-torch" holds those of the authors' PyTorch command."""


def published_guidance(name: str) -> Guidance:
    """Return the entry of `SAMPLING` with that name. Errors: `InputError` on an unknown name."""
    require(name in SAMPLING, f"guidance: expected one of {', '.join(SAMPLING)}, got {name!r}")
    return Guidance(**SAMPLING[name])


def model_config(name_or_config: str | ModelConfig) -> ModelConfig:
    """Return the preset of that name, or the given configuration itself.

    Errors: `InputError` on an unknown name.
    """
    if isinstance(name_or_config, ModelConfig):
        return name_or_config
    require(
        isinstance(name_or_config, str) and name_or_config in MODELS,
        f"model: unknown preset {name_or_config!r}, expected one of {', '.join(MODELS)}",
    )
    return MODELS[name_or_config]
