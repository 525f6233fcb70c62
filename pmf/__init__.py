"""pixel MeanFlow (pMF): one-step generation directly in pixels, trained at the memory of flow matching."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; at run time, names load on first use to keep the import fast
    from pmf import dual, layers, ops, optim
    from pmf.config import LOSSES, MODELS, SAMPLING, LossConfig, ModelConfig
    from pmf.cuda_graphs import CapturedStep
    from pmf.draws import Draws, sample_draws
    from pmf.errors import InputError
    from pmf.loss import LossOutput, pmf_loss
    from pmf.model import PMFDiT, create_model
    from pmf.pair import Dual
    from pmf.perceptual import PerceptualLoss
    from pmf.published_weights import convert_official_state_dict, export_official_state_dict, infer_config
    from pmf.recompute import checkpoint_values
    from pmf.sampling import Sampler, generate
    from pmf.tangents.call import jvp
    from pmf.weights import save_model

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "MODELS",
    "SAMPLING",
    "CapturedStep",
    "Draws",
    "Dual",
    "InputError",
    "LossConfig",
    "LossOutput",
    "ModelConfig",
    "PMFDiT",
    "PerceptualLoss",
    "Sampler",
    "__version__",
    "checkpoint_values",
    "convert_official_state_dict",
    "create_model",
    "dual",
    "export_official_state_dict",
    "generate",
    "infer_config",
    "jvp",
    "layers",
    "ops",
    "optim",
    "pmf_loss",
    "sample_draws",
    "save_model",
]

_HOMES = {
    "pmf.config": ("LOSSES", "MODELS", "SAMPLING", "LossConfig", "ModelConfig"),
    "pmf.cuda_graphs": ("CapturedStep",),
    "pmf.draws": ("Draws", "sample_draws"),
    "pmf.pair": ("Dual",),
    "pmf.errors": ("InputError",),
    "pmf.loss": ("LossOutput", "pmf_loss"),
    "pmf.model": ("PMFDiT", "create_model"),
    "pmf.perceptual": ("PerceptualLoss",),
    "pmf.published_weights": ("convert_official_state_dict", "export_official_state_dict", "infer_config"),
    "pmf.recompute": ("checkpoint_values",),
    "pmf.sampling": ("Sampler", "generate"),
    "pmf.tangents.call": ("jvp",),
    "pmf.weights": ("save_model",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"pmf.{name}") is not None:
        return importlib.import_module(f"pmf.{name}")
    raise AttributeError(f"module 'pmf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
