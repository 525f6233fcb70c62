"""Arguments of the public functions: each wrong one is named in one line, before any work."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pmf
from pmf.data import ImageSet, Loader
from pmf.draws import step_seed
from pmf.features import Chunks, find_images
from pmf.frechet import FrechetLoss, MovingAverage
from pmf.images import centre_crop, save_grid, save_png, to_bytes
from pmf.metrics import Statistics, frechet_distance, inception_score, precision_recall
from pmf.optim import EMA, Averages, Muon, NesterovAdam, OptimizerConfig, build_optimizers, learning_rate
from pmf.parallel import LossModule
from pmf.perceptual import PerceptualLoss
from pmf.timing import comparison
from tests.networks import TINY, random_model

MODEL = random_model(dtype=torch.float32)
LOSS = pmf.LossConfig()
X, Y = torch.zeros(4, *TINY.image_shape), torch.zeros(4, dtype=torch.int64)
DATA, GREY, RGB = ImageSet(X, Y), X[:, :1], torch.zeros(4, 3, 8, 8)
DRAWS = pmf.sample_draws(4, TINY.image_shape, LOSS)
GUIDANCE = dict(omega=1.0, t_min=0.0, t_max=1.0)
FEATURES = torch.rand(20, 4)
BAD = torch.full((20, 4), torch.nan)
WEIGHT = torch.nn.Parameter(torch.ones(2, 2))


def loader(data=DATA, batch_size=2, **changes):
    Loader(data, batch_size, **{"seed": 0, **changes}).close()


def loss(model=MODEL, draws=DRAWS, config=LOSS, perceptual=None, x=X):
    pmf.pmf_loss(model, x, Y, draws, config, perceptual)


def draws(batch=4, shape=TINY.image_shape, config=LOSS, generator=None, device=None):
    pmf.sample_draws(batch, shape, config, generator, device)


def perceptual(terms=None, rows_at_once=32):
    return PerceptualLoss({"lpips": torch.nn.Identity()} if terms is None else terms, rows_at_once=rows_at_once)


CASES = [
    *(("seed", lambda v=v: loader(seed=v)) for v in (None, 1.5, "a", True)),
    *(("rank", lambda v=v: loader(rank=v)) for v in (None, "0", 0.5)),
    *(("world", lambda v=v: loader(world=v)) for v in (None, "2", 0)),
    *(("workers", lambda v=v: loader(workers=v)) for v in (None, "2", 1.5, 10**9)),
    *(("first_step", lambda v=v: loader(first_step=v)) for v in (None, "a")),
    *(("max_corrupt", lambda v=v: loader(max_corrupt=v)) for v in (None, "a")),
    *(("batch_size", lambda v=v: loader(batch_size=v)) for v in (None, "4", 2.5)),
    *(("device", lambda v=v: loader(device=v)) for v in ("nope", 3.5)),
    ("flip", lambda: loader(flip="no")),
    *(("images", lambda v=v: ImageSet(v, Y)) for v in (None, np.zeros((4, 1, 8, 8)), X[0], X.long(), X.half())),
    ("images", lambda: ImageSet(X * torch.nan, Y)),
    *(("rows_at_once", lambda v=v: perceptual(rows_at_once=v)) for v in (None, 0, 1.5, "a")),
    *(("terms", lambda v=v: perceptual(terms=v)) for v in (3, {}, {"lpips": 3}, [MODEL])),
    *(("seed", lambda v=v: perceptual().for_step(v)) for v in (None, 1.5, "a", True, 2**64)),
    *(("x", lambda v=v: perceptual()(RGB, v)) for v in (None, RGB.numpy(), RGB.byte(), RGB * 1j, GREY)),
    *(("x_hat", lambda v=v: perceptual()(v, RGB)) for v in (None, RGB.numpy(), RGB.byte(), RGB[:1])),
    *(("dtype", lambda v=v: PerceptualLoss.load(None, None, dtype=v)) for v in (None, "float32", torch.int32)),
    *(("labels", lambda v=v: ImageSet(X, v)) for v in (None, [0] * 4, Y[:3], Y.float(), Y[:, None], Y.bool())),
    *(("model", lambda v=v: pmf.generate(v, [0], **GUIDANCE)) for v in (None, "pMF-B/16", TINY, torch.nn.ReLU())),
    *(("model", lambda v=v: pmf.Sampler(v, **GUIDANCE)) for v in (None, "pMF-B/16", TINY)),
    *(("model", lambda v=v: pmf.CapturedStep(v, LOSS)) for v in (None, torch.nn.Linear(2, 2))),
    ("scale", lambda: pmf.CapturedStep(MODEL, LOSS, scale=None)),
    *(("model", lambda v=v: loss(model=v)) for v in (None, "pMF-B/16", torch.nn.ReLU())),
    *(("loss_config", lambda v=v: loss(config=v)) for v in (None, TINY, {})),
    *(("draws", lambda v=v: loss(draws=v)) for v in (None, {}, (1, 2))),
    *((f"draws.{f.name}", lambda n=f.name: loss(draws=dataclasses.replace(DRAWS, **{n: [0]}))) for f in
      dataclasses.fields(DRAWS)),
    *(("perceptual", lambda v=v: loss(perceptual=v)) for v in (3, lambda a, b: None, lambda a, b: {"lpips": 3})),
    ("x", lambda: loss(x=X.to_sparse())),
    *(("batch", lambda v=v: draws(batch=v)) for v in (None, "4", 2.5, True)),
    *(("image_shape", lambda v=v: draws(shape=v)) for v in (None, 8, (1, 8), (1, 8, 8.5), (-1, 8, 8))),
    *(("loss_config", lambda v=v: draws(config=v)) for v in (None, TINY)),
    *(("generator", lambda v=v: draws(generator=v)) for v in (3, np.random.default_rng())),
    *(("device", lambda v=v: draws(device=v)) for v in ("nope", 3.5)),
    *(("model", lambda v=v: pmf.create_model(v)) for v in ({}, None, LOSS)),
    *(("device", lambda v=v: pmf.create_model(TINY, device=v)) for v in ("nope", 3.5, -1)),
    *(("dtype", lambda v=v: pmf.create_model(TINY, dtype=v)) for v in ("float32", 3, torch.int32, np.float32)),
    ("aux_head", lambda: pmf.create_model(TINY, aux_head="no")),
    *(("weights", lambda v=v: pmf.PMFDiT.from_pretrained("/", weights=v)) for v in (3, ["model"], "", b"x")),
    *(("config", lambda v=v: pmf.save_model("/dev/null", v, {})) for v in (None, {}, LOSS)),
    *(("state dict", lambda v=v: pmf.save_model("/dev/null", TINY, v)) for v in (None, 3, MODEL, [1], {1: X})),
    ("a", lambda: pmf.save_model("/dev/null", TINY, {"a": 3})),
    *(("metadata", lambda v=v: pmf.save_model("/dev/null", TINY, {}, note=v)) for v in (X, {1}, b"x", float("nan"))),
    *(("state dict", lambda v=v: pmf.infer_config(v)) for v in (None, 3, MODEL, {1: X})),
    ("a", lambda: pmf.infer_config({"a": 3})),
    ("config", lambda: pmf.export_official_state_dict({}, None)),
    *(("images", lambda v=v: save_grid("/dev/null", v, columns=2)) for v in
      (None, GREY.numpy(), GREY[0], GREY.repeat(1, 2, 1, 1), GREY[:0], GREY.byte(), GREY * torch.nan)),
    *(("columns", lambda v=v: save_grid("/dev/null", GREY, columns=v)) for v in (None, 0, -1, 1.5, "2", 10**9)),
    *(("min_side", lambda v=v: save_grid("/dev/null", GREY, columns=2, min_side=v)) for v in (None, 0, "a", 10**9)),
    *(("pixels", lambda v=v: save_png("/dev/null", v)) for v in
      (None, np.zeros((8, 8)), np.zeros((8, 8, 2), np.uint8), torch.zeros(8, 8, 3).byte())),
    *(("reference", lambda v=v: Statistics.load(v)) for v in (None, 3, b"a.npz", ["a.npz"])),
    *(("path", lambda v=v: Statistics.of(FEATURES).save(v)) for v in (None, 3, b"a.npz")),
    *(("features", lambda v=v: Statistics.of(v)) for v in (None, np.zeros((4, 4)), [[1.0]])),
    *(("statistics", lambda v=v: frechet_distance(Statistics.of(FEATURES), v)) for v in (None, 3, FEATURES)),
    ("mu", lambda: Statistics(None, np.eye(2))),
    *(("statistics", lambda v=v: Statistics(np.zeros(2).astype(v), np.eye(2).astype(v))) for v in (complex, str, bool)),
    *(("features", lambda v=v: Statistics(np.zeros(2), np.eye(2), 3, v)) for v in
      (np.zeros((3, 7)), np.zeros(3), np.array(1.0))),
    ("statistics", lambda: Statistics(np.zeros(2), np.eye(2), 3, np.zeros((3, 2), np.int64))),
    *(("statistics", lambda v=v: Statistics(*v)) for v in
      ((np.zeros(3), np.eye(4)), (np.zeros(2), np.eye(2) * np.nan), (np.zeros((2, 1)), np.eye(2)))),
    *(("count", lambda v=v: Statistics(np.zeros(2), np.eye(2), v)) for v in (0, -5, "9")),
    *(("logits", lambda v=v: inception_score(v)) for v in (None, FEATURES[0], FEATURES[:, :0], FEATURES.numpy(), BAD)),
    *(("splits", lambda v=v: inception_score(FEATURES, splits=v)) for v in (None, 1.5, "a")),
    *(("real", lambda v=v: precision_recall(FEATURES, v)) for v in (None, FEATURES[0], FEATURES.numpy(), BAD)),
    *(("block", lambda v=v: precision_recall(FEATURES, FEATURES, block=v)) for v in (None, 0, -1, 1.5)),
    *(("half_life_kimg", lambda v=v: EMA(MODEL, v)) for v in (None, 0, -1, "a", float("nan"))),
    ("model", lambda: EMA(None, 500)),
    *(("every", lambda v=v: EMA(MODEL, 500, every=v)) for v in (None, 0, -1, 1.5)),
    ("device", lambda: EMA(MODEL, 500, device="warp")),
    ("half_life_kimg", lambda: Averages(MODEL, (500, 0))),
    *(("images_seen", lambda v=v: EMA(MODEL, 500).update(MODEL, *v)) for v in ((0, 4), (4, 0), (4, None))),
    *(("lr", lambda v=v: Muon([WEIGHT], lr=v)) for v in (None, -1, float("nan"))),
    *(("lr", lambda v=v: NesterovAdam([WEIGHT], lr=v)) for v in (None, -1, float("inf"))),
    ("betas", lambda: NesterovAdam([WEIGHT], lr=1, betas=(0.5,))),
    ("config", lambda: build_optimizers(MODEL, None)),
    ("model", lambda: build_optimizers(None, OptimizerConfig())),
    *(("seed", lambda v=v: step_seed(*v, "epoch")) for v in ((-1, 0), (0, -1), ("0", 0))),
    ("seed", lambda: loader(seed=-1)),
    ("labels", lambda: ImageSet(X, Y - 3)),
    *(("path", lambda v=v: save_grid(v, GREY, columns=2)) for v in ("a.jpg", "a.GIF", Path("a.webp"), 3)),
    *(("path", lambda v=v: pmf.save_model(v, TINY, {"a": X})) for v in ("a.pt", "a.json", Path("a.zip"), None, 3)),
    *(("images", lambda v=v: to_bytes(v)) for v in (None, GREY.numpy(), GREY.byte(), Y)),
    *(("picture", lambda v=v: centre_crop(v, 8)) for v in (None, GREY)),
    *(("size", lambda v=v: centre_crop(Image.new("RGB", (8, 8)), v)) for v in (0, -1, "8")),
    *(("runs", lambda v=v: comparison(v, "cpu")) for v in ({}, None)),
    ("device", lambda: comparison({"a": lambda: None}, "nope")),
    ("folder", lambda: find_images("pictures")),
    ("folder", lambda: find_images(Path(__file__))),
    *(("count", lambda v=v: Chunks(Path("a"), *v)) for v in ((-1, 4), (4, 0))),
    ("count", lambda: Chunks(Path("a"), 0, 4).statistics(keep=False)),
    ("directory", lambda: Chunks("a", 4, 4)),
    *(("loss_config", lambda v=v: pmf.CapturedStep(MODEL, v)) for v in (None, TINY)),
    ("model", lambda: LossModule(None, LOSS)),
    ("config", lambda: LossModule(MODEL, TINY)),
    ("population", lambda: FrechetLoss({"a": Statistics.of(FEATURES)}, MovingAverage(4, 0.9))),
    ("pmf.jvp.rule", lambda: pmf.jvp.rule(3)),
    *(("step", lambda v=v: learning_rate(OptimizerConfig(), *v)) for v in ((-1, 10), (0, 0), (None, 10))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "call"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_a_wrong_argument_is_named_in_one_line(name, call):
    with pytest.raises(pmf.InputError, match=rf"^({name}\b|model: unknown preset)") as error:
        call()
    assert "\n" not in str(error.value) and re.search("expected|cannot use", str(error.value))


def test_arguments_of_every_accepted_kind_are_taken():
    loader(batch_size=np.int64(2), seed=0, device=torch.device("cpu"))
    draws(shape=torch.Size(TINY.image_shape), generator=torch.Generator(), device="cpu")
    EMA(MODEL, np.float64(500)).update(MODEL, 4, 4)
    assert ImageSet(X[:0], Y[:0]).num_classes == 0
    for seed in (2**64 - 1, -(2**63), np.int64(3)):
        assert callable(perceptual(torch.nn.ModuleDict({"lpips": MODEL})).for_step(seed))
    Muon([WEIGHT], lr=1)
    Statistics(np.zeros(2), np.eye(2), np.int64(3), None, "tf1")


def test_past_its_end_a_decay_stays():
    config = OptimizerConfig(learning_rate=1.0, decay_share=0.5, decay_to=0.25, warmup_steps=2)
    assert learning_rate(config, 30, 10) == learning_rate(config, 10, 10) == 0.25
    assert learning_rate(config, 5, 2) == 0.25
