"""pixel MeanFlow (pMF): one-step generation directly in pixels, trained at the memory of flow matching."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "pmf.config": ("LOSSES", "MODELS", "SAMPLING", "LossConfig", "ModelConfig"),
    "pmf.captured": ("CapturedStep",),
    "pmf.checkpoint": (
        "convert_official_state_dict",
        "export_official_state_dict",
        "infer_config",
        "load_model",
        "save_model",
    ),
    "pmf.dual": ("Dual",),
    "pmf.errors": ("InputError",),
    "pmf.loss": ("Draws", "LossOutput", "pmf_loss", "sample_draws"),
    "pmf.model": ("PMFDiT", "create_model"),
    "pmf.sampling": ("Sampler", "generate"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_SUBMODULES = ("layers", "ops")

__all__ = ["__version__", *_HOME_OF, *_SUBMODULES]


def __getattr__(name: str):
    """Public names load on first use, so that `import pmf` is quick."""
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"pmf.{name}")
    raise AttributeError(f"module 'pmf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
