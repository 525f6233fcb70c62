"""What the core does without any extra: import every module, train, save, load, sample; name the extra otherwise.

`make wheel` runs it in an environment that has the wheel alone, test_imports.py with the other packages hidden.
"""

import importlib
import importlib.util
import pkgutil
import tempfile
from pathlib import Path

import torch

import pmf
from pmf.data import ImageSet, Loader
from pmf.images import save_grid
from pmf.optim import EMA, OptimizerConfig, build_optimizers

NEED_EXTRAS = {"pmf.data.shards", "pmf.reference.jax_loss", "pmf.reference.jax_network"}


def import_everything():
    programs = ("pmf.train", "pmf.benchmarks") if importlib.util.find_spec("triton") else ("pmf.t", "pmf.b", "pmf.k")
    for module in pkgutil.walk_packages(pmf.__path__, "pmf."):
        if not module.name.startswith(programs) and module.name not in NEED_EXTRAS:
            importlib.import_module(module.name)


def trained():
    """A tiny network after two steps, and the loss of each."""
    torch.manual_seed(0)
    shape = dict(image_size=8, patch_size=4, in_channels=1, hidden_size=16, num_heads=2, bottleneck=8)
    model = pmf.create_model(pmf.ModelConfig(**shape, depth=2, aux_head_depth=1, num_classes=3), impl="reference")
    data, config, losses = ImageSet(torch.rand(8, 1, 8, 8) * 2 - 1, torch.arange(8) % 3), pmf.LossConfig(), []
    optimizers, average = build_optimizers(model, OptimizerConfig()), EMA(model, half_life_kimg=1)
    for step, (x, y) in zip(range(2), Loader(data, 4, seed=0), strict=False):
        out = pmf.pmf_loss(model, x, y, pmf.sample_draws(4, x.shape[1:], config), config)
        out.loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        average.update(model, batch=4, images_seen=4 * (step + 1))
        losses.append(out.loss)
    return model, torch.stack(losses)


def refused(extra, use):
    try:
        use()
    except pmf.InputError as error:
        assert f"pip install 'pixel-meanflow[{extra}]'" in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"expected an error that names the extra {extra}")


import_everything()
model, losses = trained()
assert losses.isfinite().all()
guidance = dict(omega=2.0, t_min=0.1, t_max=0.7)
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "tiny.safetensors"
    pmf.save_model(file, model.config, model.state_dict())
    images = pmf.generate(pmf.PMFDiT.from_pretrained(file), [0, 1, 2], **guidance)
assert torch.equal(images, pmf.generate(model, [0, 1, 2], **guidance)) and images.isfinite().all()
assert pmf.Sampler(model, 2, **guidance)([0, 1, 2]).shape == (3, 1, 8, 8)
assert pmf.jvp(torch.nn.Linear(2, 2), (torch.ones(1, 2),), (1,))[1].shape == (1, 2)

refused("train", lambda: pmf.generate(model, [0], progress=True, **guidance))
refused("train", lambda: save_grid("samples.png", images, columns=3))
refused("data", lambda: importlib.import_module("pmf.data.shards"))
refused("hub", lambda: pmf.PMFDiT.from_pretrained("someone/pmf-tiny"))
refused("perceptual", lambda: pmf.PerceptualLoss.load("random", None))
print(f"the core works without extras: losses {losses.tolist()}, images {list(images.shape)}")
