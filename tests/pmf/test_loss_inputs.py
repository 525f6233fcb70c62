"""What `pmf_loss` and `generate` are given by mistake is named in one line."""

import warnings

import pytest
import torch

import pmf
from pmf.fine_tuning import copy_weights
from pmf.parallel import LossModule
from pmf.sampling import seeds_from
from tests.networks import TINY, random_model

CONFIG = pmf.LossConfig()
X, Y = torch.rand(4, *TINY.image_shape) * 2 - 1, torch.arange(4)


@pytest.fixture(scope="module")
def model():
    return random_model(dtype=torch.float32)


def loss(model, x, y, rows=None):
    draws = pmf.sample_draws(rows or 4, TINY.image_shape, CONFIG, torch.Generator().manual_seed(0))
    return LossModule(model, CONFIG)(x, y, draws)[0]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:0], Y[:0], r"x: expected shape \[B, 2, 8, 8\] with B > 0, got \[0, 2, 8, 8\]"),
        (X, Y.int(), "y: expected int64 class labels, got torch.int32"),
        (X, Y.float(), "y: expected int64 class labels, got torch.float32"),
        (X, Y[:, None], r"y: expected shape \[4\], got \[4, 1\]"),
        (X, [0, 1, 2, 3], "y: expected a tensor, got list"),
        (X.numpy(), Y, "x: expected a tensor, got ndarray"),
        (X, Y - 1, r"y: expected labels in \[0, 4\], got -1 to 2"),
        (X, Y + 5, r"y: expected labels in \[0, 4\], got 5 to 8"),
        ((X * 127).byte(), Y, r"x: expected floating images in \[-1, 1\], got torch.uint8"),
        (X * float("nan"), Y, "x: expected finite images, got NaN or infinity"),
    ],
)
def test_bad_batches_are_one_line(model, x, y, message):
    with pytest.raises(pmf.InputError, match=message) as error:
        loss(model, x, y)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ((X + 1) * 127.5, r"these look like \[0, 255\], expected x / 127.5 - 1"),
        ((X + 1) / 2, r"\[0, 1\], expected 2 \* x"),
    ],
)
def test_images_that_look_unscaled_are_warned_of(model, x, message):
    with pytest.warns(UserWarning, match=r"x: expected images in \[-1, 1\]; .*" + message):
        loss(model, x, Y)


@pytest.mark.parametrize("x", [X, torch.zeros_like(X), torch.ones_like(X), torch.randn_like(X) * 2, X.clamp(0, 0.4)])
def test_other_images_are_not(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model, x, Y)


@pytest.mark.parametrize(
    "seeds",
    [[2**64, 1], [-1, 1], [2**32, 1], [1.0, 2.0], ["1", "2"], [True, False], range(2**63 - 1, 2**63 + 1), [None]],
)
def test_seeds_out_of_range_are_one_line(model, seeds):
    with pytest.raises(pmf.InputError, match=r"^seeds: expected ") as error:
        pmf.generate(model, [0, 1], seeds=seeds, omega=1.0, t_min=0.0, t_max=1.0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("first", [-1, 2**32 - 1, 2**64, 1.0, None, True])
def test_seeds_that_would_leave_their_range_are_refused(first):
    with pytest.raises(pmf.InputError, match="seed: expected an integer from 0 to 4294967294, for 2 images, got"):
        seeds_from(first, 2)
    assert list(seeds_from(2**32 - 2, 2)) == [2**32 - 2, 2**32 - 1]


@pytest.mark.parametrize(
    "labels", [[], [[0]], [0.5], [6], [-1], torch.tensor([2.0]), torch.zeros(0).long(), "abc", None]
)
def test_labels_are_checked(model, labels):
    with pytest.raises(pmf.InputError, match=r"^labels: expected ") as error:
        pmf.generate(model, labels, omega=1.0, t_min=0.0, t_max=1.0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "7", None, 10**400])
@pytest.mark.parametrize("name", ["omega", "t_min", "t_max"])
def test_guidance_is_checked(model, name, value):
    with pytest.raises(pmf.InputError, match=f"{name}: "):
        pmf.generate(model, [0], **dict(omega=1.0, t_min=0.0, t_max=1.0) | {name: value})


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_numbers_that_must_be_mistakes_are_refused(model, name):
    with pytest.raises(pmf.InputError, match=f"{name}: expected at most 1000000, got 1000000000000"):
        pmf.generate(model, [0], omega=1.0, t_min=0.0, t_max=1.0, **{name: 10**12})


def test_every_error_is_one_line():
    assert str(pmf.InputError("source: a\nb does not exist")) == "source: a\\nb does not exist"


def test_a_wrapped_network_takes_weights(model, tmp_path):
    pmf.save_model(tmp_path / "a.safetensors", TINY, model.state_dict())
    fresh = random_model(seed=1, dtype=torch.float32)
    assert copy_weights(torch.compile(fresh), tmp_path / "a.safetensors") == []
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
