"""Twenty steps of the authors' training, in JAX with optax, and twenty of ours give the same weights and averages.

A step is the network, the loss with perceptual terms, the crops, the optimizer and the averages; both sides get the
same images, labels and random numbers. In float64 any difference beyond rounding is a disagreement.
"""

from dataclasses import replace

import pytest
import torch

import pmf
from pmf.crops import draw_crops
from pmf.data import ImageSet
from pmf.draws import step_seed
from pmf.optim import OptimizerConfig
from pmf.perceptual import PerceptualLoss
from pmf.train.config import RunConfig
from pmf.train.loop import Trainer
from pmf.weights import save_model
from tests.networks import golden, relative_error

pytestmark = pytest.mark.extras

STEPS, BATCH, SEED = 20, 8, 3
# Published settings, except that draws must reach every branch within few rows: t below its clip, dropped classes.
LOSS = replace(pmf.LOSSES["pMF-B/16"], p_mean=-1.5, p_std=2.0, tr_uniform=True, class_dropout=0.4)
NETWORK = replace(golden().config, noise_scale=2.0)
HALF_LIVES = (0.002, 0.005, 500.0)  # thousands of images: the ramp reaches the first two only


@pytest.fixture(scope="module")
def authors():
    """The module of the authors' side; skips the test without JAX and optax."""
    pytest.importorskip("optax", reason="JAX and optax are not installed")
    from tests.train import authors_training

    return authors_training


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    """The dtype that both sides compute in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def images_and_labels():
    generator = torch.Generator().manual_seed(SEED)
    images = torch.rand(STEPS, BATCH, *NETWORK.image_shape, generator=generator) * 2 - 1
    return images, torch.randint(NETWORK.num_classes, (STEPS, BATCH), generator=generator)


def trainer_of(out, distances):
    """Our trainer for the golden network, as `pmf train` sets it up, with small perceptual networks."""
    save_model(out / "golden.safetensors", NETWORK, golden().model().state_dict())
    config = RunConfig(
        out=out / "run",
        init=str(out / "golden.safetensors"),
        steps=STEPS,
        batch_size=BATCH,
        seed=SEED,
        device="cpu",
        ema_half_lives=HALF_LIVES,
        sampling_weights="model",
        model=NETWORK,
        loss=LOSS,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    images, labels = images_and_labels()
    trainer = Trainer(config, ImageSet(images[0], labels[0]))
    trainer.perceptual = PerceptualLoss(distances)
    return trainer


def drawn(step):
    """The draws and boxes of a step of the trainer; rows without perceptual terms have the whole image as box."""
    draws, crops = (torch.Generator().manual_seed(step_seed(SEED, step, f"{what} 0")) for what in ("draws", "crops"))
    _, height, width = shape = NETWORK.image_shape
    draws = pmf.sample_draws(BATCH, shape, LOSS, draws)
    boxes = torch.tensor([0.0, 0.0, height, width]).repeat(BATCH, 1)
    seen = draws.t < LOSS.perceptual_max_t
    boxes[seen] = draw_crops(int(seen.sum()), height, width, crops).to(boxes.dtype)
    return draws, boxes


def test_draws_reach_every_branch(dtype):
    """A branch that no row takes would not be tested."""
    steps = [drawn(step)[0] for step in range(STEPS)]
    t, t_min, t_max, fm, dropped = (
        torch.cat([getattr(draws, name) for draws in steps]) for name in ("t", "t_min", "t_max", "fm_mask", "drop_mask")
    )
    outside = (t < t_min) | (t > t_max)
    for rows in (t < NETWORK.t_clip, t < LOSS.perceptual_max_t, dropped):
        for kind in (fm, ~fm):
            assert 0 < rows[kind].sum() < kind.sum()
    for rows in (dropped, ~dropped):
        assert 0 < outside[rows & ~fm].sum() < (rows & ~fm).sum()


def ours(trainer):
    averages = {name: ema.state_dict() for name, ema in trainer.emas.items()}
    return {"model": {name: p.detach() for name, p in trainer.model.named_parameters()}} | averages


def test_twenty_steps_give_the_weights_and_averages_of_the_authors(authors, dtype, tmp_path):
    """In float32 the weights agree to 1e-5; in float64 their changes agree to 1e-9."""
    distances = {name: authors.SmallDistance(seed, dtype) for seed, name in enumerate(("lpips", "convnext"))}
    trainer = trainer_of(tmp_path, distances)
    with authors.precision(dtype):
        theirs = authors.AuthorsTraining(trainer.model, LOSS, distances, HALF_LIVES, learning_rate=1e-3)
        for step, (x, y) in enumerate(zip(*images_and_labels(), strict=True)):
            loss = theirs.step(x, y, *drawn(step))
            record = trainer.train_step(x, y)
            assert record["loss"] == pytest.approx(loss, rel=1e-6), step
            assert record["lpips"] > 0 and record["convnext"] > 0
        expected = theirs.weights()
    got = ours(trainer)
    assert expected.keys() == got.keys() == {"model", *(f"ema_{k:g}" for k in HALF_LIVES)}
    for kind, weights in expected.items():
        assert weights.keys() == got[kind].keys() == golden().model().state_dict().keys()
        for name, start in golden().model().state_dict().items():
            assert weights[name].dtype == got[kind][name].dtype == dtype
            moved = weights[name] - start
            assert moved.norm() > 1e-3 * start.norm(), (kind, name)
            if dtype == torch.float64:
                assert relative_error(got[kind][name] - start, moved) < 1e-9, (kind, name)
            else:
                assert relative_error(got[kind][name], weights[name]) < 1e-5, (kind, name)
