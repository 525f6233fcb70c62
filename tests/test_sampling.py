import pytest
import torch

import pmf
from pmf.sampling import seeded_noise
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


def test_presets_sample_with_their_published_setting():
    model = pmf.create_model("pMF-digits", aux_head=False)
    preset = pmf.SAMPLING["pMF-digits"]
    assert torch.equal(pmf.generate(model, [3]), pmf.generate(model, [3], **preset))
    with pytest.raises(pmf.InputError, match="omega: this network is no preset, so omega must be given"):
        pmf.generate(random_model(), [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=[0, 6]), r"labels: expected classes in \[0, 5\], got 0 to 6"),
        (dict(labels=[]), "labels: expected a non-empty list of integers"),
        (dict(steps=0), "steps: expected at least 1, got 0"),
        (dict(omega=0.0), "omega: expected a guidance scale >= 1, got 0.0"),
        (dict(t_min=0.9, t_max=0.1), "t_min: expected 0 <= t_min <= t_max <= 1, got 0.9 and 0.1"),
        (dict(seeds=[1]), "seeds: expected 2 of them, got 1"),
        (
            dict(noise=torch.zeros(2, 2, 8, 8), seeds=[1, 2]),
            "noise: expected either noise or seeds, got both",
        ),
        (dict(noise=torch.zeros(2, 2, 8, 9)), r"noise: expected shape \[2, 2, 8, 8\], got \[2, 2, 8, 9\]"),
        (dict(noise=torch.full((2, 2, 8, 8), torch.nan)), "noise: expected finite values"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(change, message):
    with pytest.raises(pmf.InputError, match=message):
        pmf.generate(random_model(dtype=torch.float32), **(dict(labels=[0, 1]) | SETTING | change))
