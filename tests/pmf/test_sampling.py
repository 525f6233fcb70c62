import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pmf
from pmf.noise import seeded_noise
from tests.networks import TINY, golden, random_model, relative_error

SETTING = dict(omega=2.0, t_min=0.1, t_max=0.9)


@pytest.mark.parametrize("steps", [1, 2])
def test_golden_samples(steps):
    g = golden()
    setting = {name: g.sampling[name] for name in ("omega", "t_min", "t_max")}
    images = pmf.generate(g.model(), g["in/y"], noise=g["in/noise"], steps=steps, **setting)
    assert relative_error(images, g[f"out/sample_{steps}nfe"]) < 1e-5


def test_one_step_is_the_networks_output():
    model = random_model()
    labels = torch.tensor([0, 3])
    noise = torch.randn(2, *TINY.image_shape, dtype=torch.float64)
    one = torch.ones(2, dtype=torch.float64)
    u, _ = model(noise, one, one, 2 * one, 0.1 * one, 0.9 * one, labels)
    images = pmf.generate(model.float(), labels, noise=noise.float(), **SETTING)
    assert relative_error(images.double(), noise - u) < 1e-5


def test_noise_is_scaled():
    config = TINY.__class__(**{**TINY.__dict__, "noise_scale": 3.0})
    noise = seeded_noise([0, 1], TINY.image_shape)
    scaled = pmf.generate(random_model(config, dtype=torch.float32), [0, 1], noise=noise, **SETTING)
    plain = pmf.generate(random_model(dtype=torch.float32), [0, 1], noise=3 * noise, **SETTING)
    assert torch.equal(scaled, plain)


def test_an_image_depends_on_its_seed_and_label_alone():
    model = random_model(dtype=torch.float32)
    seeds, labels = [11, 5, 7, 2, 9], [0, 1, 2, 3, 4]
    whole = pmf.generate(model, labels, seeds=seeds, steps=3, **SETTING)
    for batch_size in (1, 2, 64):
        again = pmf.generate(model, labels, seeds=seeds, steps=3, batch_size=batch_size, **SETTING)
        assert torch.allclose(again, whole, atol=1e-5)
    alone = pmf.generate(model, [2], seeds=[7], steps=3, **SETTING)
    assert torch.allclose(alone, whole[2:3], atol=1e-5)
    assert not torch.allclose(whole[0], whole[1])


def test_any_integers_are_labels():
    model = random_model(dtype=torch.float32)
    whole = pmf.generate(model, [1, 2], **SETTING)
    for labels in (np.array([1, 2], dtype=np.int32), torch.tensor([1, 2], dtype=torch.uint8), range(1, 3)):
        assert torch.equal(pmf.generate(model, labels, **SETTING), whole)


def test_presets_sample_with_their_published_setting():
    model = pmf.create_model("pMF-digits", aux_head=False)
    preset = pmf.SAMPLING["pMF-digits"]
    assert torch.equal(pmf.generate(model, [3]), pmf.generate(model, [3], **preset))
    with pytest.raises(pmf.InputError, match="omega: this network is not a preset, so omega must be given"):
        pmf.generate(random_model(), [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=[0, 6]), r"labels: expected classes in \[0, 5\], got 0 to 6"),
        (dict(labels=[]), "labels: expected at least one class, got none"),
        (dict(labels=["a", "b"]), r"labels: expected a list of integers below 2\^63, got"),
        (dict(seeds=[1.5, 2.0]), r"seeds: expected a list of integers below 2\^63, got"),
        (dict(steps=0), "steps: expected at least 1, got 0"),
        (dict(steps=1.5), "steps: expected an integer below 2\\^63, got 1.5"),
        (dict(batch_size="8"), "batch_size: expected an integer below 2\\^63, got '8'"),
        (dict(omega=0.0), "omega: expected a guidance scale >= 1, got 0.0"),
        (dict(t_min=0.9, t_max=0.1), "t_min: expected 0 <= t_min <= t_max <= 1, got 0.9 and 0.1"),
        (dict(seeds=[1]), "seeds: expected 2 of them, got 1"),
        (
            dict(noise=torch.zeros(2, 2, 8, 8), seeds=[1, 2]),
            "noise: expected either noise or seeds, got both",
        ),
        (dict(noise=torch.zeros(2, 2, 8, 9)), r"noise: expected shape \[2, 2, 8, 8\], got \[2, 2, 8, 9\]"),
        (
            dict(noise=torch.zeros(2, 2, 8, 8, dtype=torch.complex64)),
            "noise: expected floating values, got torch.complex64",
        ),
        (dict(noise=torch.full((2, 2, 8, 8), torch.nan)), "noise: expected finite values"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(change, message):
    with pytest.raises(pmf.InputError, match=message):
        pmf.generate(random_model(dtype=torch.float32), **(dict(labels=[0, 1]) | SETTING | change))


class Joins(TorchDispatchMode):
    """Counts how often weights are joined: all in one pass, or some on their own."""

    def __init__(self):
        super().__init__()
        self.all, self.alone = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += func is torch.ops.aten._foreach_copy_.default
        self.alone += func is torch.ops.aten.cat.default and isinstance(args[0][0], torch.nn.Parameter)
        return func(*args, **kwargs or {})


def test_weights_are_joined_once_for_all_batches_and_steps():
    model = random_model(dtype=torch.float32)
    sampler = pmf.Sampler(model, 1, steps=2, **SETTING)
    for draw in (sampler, lambda labels: pmf.generate(model, labels, steps=2, batch_size=1, **SETTING)):
        with Joins() as joins:
            draw([0, 1, 2])
        assert (joins.all, joins.alone) == (1, 0)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_draws_the_images_of_generate(steps, dtype):
    model, labels = random_model(dtype=dtype), [3, 1, 4, 1, 5, 0]
    sampler = pmf.Sampler(model, 3, steps=steps, **SETTING)
    expected = pmf.generate(model, labels, steps=steps, batch_size=3, **SETTING)
    for _ in range(2):
        assert torch.equal(sampler(labels), expected)
    noise = torch.randn(3, *TINY.image_shape)
    assert torch.equal(
        sampler(labels[:3], noise=noise), pmf.generate(model, labels[:3], noise=noise, steps=steps, **SETTING)
    )


def test_a_sampler_pads_a_last_batch_that_is_not_full():
    model = random_model(dtype=torch.float32)
    sampler = pmf.Sampler(model, 4, **SETTING)
    images = sampler([0, 1, 2, 3, 4], seeds=[9, 8, 7, 6, 5])
    assert images.shape == (5, *TINY.image_shape)
    # The padded batch repeats rows of the previous one.
    padded = pmf.generate(model, [4, 1, 2, 3], seeds=[5, 8, 7, 6], **SETTING)
    assert torch.equal(images[4], padded[0])
    assert torch.allclose(images, pmf.generate(model, [0, 1, 2, 3, 4], seeds=[9, 8, 7, 6, 5], **SETTING), atol=1e-5)


def test_a_sampler_follows_weights_changed_in_place():
    model, other = random_model(dtype=torch.float32), random_model(dtype=torch.float32, seed=5)
    sampler = pmf.Sampler(model, 2, **SETTING)
    before = sampler([0, 1])
    model.load_state_dict(other.state_dict())
    assert torch.equal(sampler([0, 1]), pmf.generate(other, [0, 1], **SETTING))
    assert not torch.equal(sampler([0, 1]), before)
    for parameter in model.parameters():  # does not change the parameter's version counter
        parameter.data.mul_(0.5)
    assert torch.equal(sampler([0, 1]), pmf.generate(model, [0, 1], **SETTING))
    model.double()
    with pytest.raises(pmf.InputError, match="model: its parameters were replaced"):
        sampler([0, 1])


def test_a_sampler_serves_inside_and_outside_inference_mode():
    expected = pmf.generate(random_model(dtype=torch.float32), [0, 1], **SETTING)
    with torch.inference_mode():
        model = random_model(dtype=torch.float32)
        sampler = pmf.Sampler(model, 2, **SETTING)
        assert torch.equal(sampler([0, 1]), expected)
    images = sampler([0, 1])
    assert torch.equal(images, expected) and not images.is_inference()


def test_a_sampler_refuses_what_generate_refuses():
    model = random_model(dtype=torch.float32)
    with pytest.raises(pmf.InputError, match="batch_size: expected at least 1, got 0"):
        pmf.Sampler(model, 0, **SETTING)
    with pytest.raises(pmf.InputError, match=r"labels: expected classes in \[0, 5\], got 6 to 6"):
        pmf.Sampler(model, 1, **SETTING)([6])
