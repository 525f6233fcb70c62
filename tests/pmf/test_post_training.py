"""The step of post-training: device batches, the label term, and what it asks of its parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import pmf
from pmf.counting import live_bytes
from pmf.feature_networks import FeatureNetwork, feature_network
from pmf.frechet import FrechetLoss, MovingAverage, Queue
from pmf.metrics import Statistics
from pmf.parallel import GeneratorModule
from pmf.post_training import FrechetStep, Latents
from tests.networks import TINY, random_model

GREY = dataclasses.replace(TINY, in_channels=1)
GUIDANCE = pmf.config.Guidance(omega=2.0, t_min=0.1, t_max=0.9)
PIXELS = GREY.in_channels * GREY.image_size**2


class Hidden(nn.Module):
    """A feature network with a classifier."""

    classes = GREY.num_classes

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 6, dtype=torch.float64), nn.Tanh())
        self.classifier = nn.Linear(6, self.classes, dtype=torch.float64)

    def forward(self, images):
        return self.layers(images)


def networks():
    torch.manual_seed(3)
    hidden = FeatureNetwork("hidden", Hidden(), width=6, space="hidden", dtype=torch.float64)
    return {"pixels": feature_network("pixels", dtype=torch.float64), "hidden": hidden}


def latents(count, seed):
    drawn = Latents.drawn(count, GREY.image_shape, GREY.num_classes, seed, "cpu")
    return Latents(drawn.noise.double(), drawn.labels)


def step(population=lambda width: MovingAverage(width, 0.9), label_weight=0.0, **options):
    """(network, step) with filled populations; the reference is that of random images."""
    model, judges = random_model(GREY, impl="reference", **options), networks()
    real = torch.rand(300, *GREY.image_shape, dtype=torch.float64) * 2 - 1
    loss = FrechetLoss({name: Statistics.of(judge(real)) for name, judge in judges.items()}, population)
    taken = FrechetStep(GeneratorModule(model, pmf.LossConfig(), GUIDANCE), judges, loss, label_weight=label_weight)
    for seed in range(100, 110):
        loss.fill(taken.features(latents(20, seed)))
    return model, taken


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def joined(batches):
    return Latents(torch.cat([b.noise for b in batches]), torch.cat([b.labels for b in batches]))


@pytest.mark.parametrize("label_weight", [0.0, 0.7])
def test_device_batches_give_the_gradients_of_one_batch(label_weight):
    """To 1e-10 of their norm in float64: the products of a batch of another size sum in another order."""
    model, taken = step(label_weight=label_weight)
    batches = [latents(count, seed) for seed, count in enumerate((5, 3, 4))]
    whole, expected = taken([joined(batches)]), gradients(model)
    synchronised = []
    split, got = taken(batches, synchronised.append), gradients(model)
    assert synchronised == [False, False, True]
    assert got.keys() == expected.keys() and len(got) > 20
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 1e-10 * value.norm() + 1e-14, name
    for name, value in whole.terms.items():
        torch.testing.assert_close(split.terms[name], value, rtol=1e-12, atol=0)
    for name, value in whole.features.items():
        torch.testing.assert_close(split.features[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(7,), (4, 3)])
@pytest.mark.parametrize("label_weight", [0.0, 0.7])
def test_networks_in_turn_give_the_terms_and_gradients_of_one_graph(label_weight, sizes):
    """Through the generator, all networks, the whole `FrechetLoss` and the label term, to 1e-12."""
    model, taken = step(label_weight=label_weight)
    batches = [latents(count, seed) for seed, count in enumerate(sizes)]
    out, got = taken(batches), gradients(model)
    images = [taken.generate(b.noise, b.labels) for b in batches]
    features = {name: torch.cat([judge(x) for x in images]) for name, judge in taken.networks.items()}
    expected = taken.loss(features)
    logits = taken.networks["hidden"].logits(features["hidden"])
    label = torch.nn.functional.cross_entropy(logits, joined(batches).labels)
    total = expected.loss + label_weight * label
    total.backward()
    terms = {"loss": total} | {f"fd/{name}": value for name, value in expected.distances.items()}
    terms |= {"label": label} if label_weight else {}
    assert out.terms.keys() == terms.keys() and out.features.keys() == features.keys()
    for name, value in terms.items():
        assert out.terms[name].dtype == torch.float64 and not out.terms[name].requires_grad
        torch.testing.assert_close(out.terms[name], value.detach(), rtol=1e-12, atol=0)
    for name, value in expected.features.items():
        torch.testing.assert_close(out.features[name], value, rtol=1e-12, atol=1e-14)
    graphs = gradients(model)
    assert got.keys() == graphs.keys()
    for name, value in graphs.items():
        assert (got[name] - value).norm() <= 1e-12 * value.norm() + 1e-15, name


def network_of(name, trunk, width, dtype=torch.float64):
    return FeatureNetwork(name, trunk.to(dtype), width=width, space=name, dtype=dtype)


def step_of(judges, generate, dtype=torch.float64):
    """A step of these networks, whose references are of random images of the generator's form."""
    real = torch.rand(50, *GREY.image_shape, dtype=dtype) * 2 - 1
    loss = FrechetLoss(
        {name: Statistics.of(judge(real)) for name, judge in judges.items()}, lambda d: MovingAverage(d, 0.9)
    )
    return FrechetStep(generate, judges, loss)


@pytest.mark.parametrize("device_batches", [1, 2])
def test_the_memory_is_that_of_the_largest_network(device_batches):
    """Not of all: its activations are freed before the next network makes its own."""

    def deep(width):
        inner = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.Tanh())]
        return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, width), *inner, nn.Linear(width, 3))

    torch.manual_seed(0)
    made = {name: network_of(name, deep(width), 3) for name, width in (("large", 500), ("small", 400))}
    weight = torch.ones(PIXELS, dtype=torch.float64, requires_grad=True)
    batches = [latents(96, seed) for seed in range(device_batches)]

    def peak(*names):
        taken = step_of({name: made[name] for name in names}, lambda z, y: z * weight.view(z.shape[1:]))
        return live_bytes(lambda: taken(batches)).peak

    small, large, activations = peak("small"), peak("large"), 8 * 96 * 8 * 500
    assert activations < large < 1.5 * activations and small > 0.7 * large
    assert peak("large", "small") <= 1.02 * large and peak("small", "large") <= 1.02 * large


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_all_networks_are_rounded_to_the_images_dtype_once(dtype):
    torch.manual_seed(0)
    linear = {name: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 4), nn.Tanh()) for name in "abc"}
    judges = {name: network_of(name, trunk, 4, torch.float32) for name, trunk in linear.items()}
    weight, batch, seen = torch.ones((), requires_grad=True), latents(8, 0), []

    def generate(noise, labels):
        images = (noise.float() * weight).to(dtype)
        images.register_hook(seen.append)
        return images

    taken = step_of(judges, generate, torch.float32)
    taken([batch])
    leaf = generate(batch.noise, batch.labels).detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    for name in "abc":
        taken.loss.term(name, judges[name](leaf)).loss.backward()
    assert seen[0].dtype == dtype and torch.equal(seen[0], leaf.grad.to(dtype)) and seen[0].abs().sum() > 0


class Constant(nn.Module):
    """Features that do not depend on the images."""

    def forward(self, images):
        return torch.linspace(0, 1, 2 * len(images), dtype=images.dtype).view(-1, 2).sin()


@pytest.mark.parametrize("device_batches", [1, 2])
def test_a_network_that_does_not_depend_on_the_images_has_no_share(device_batches):
    model = random_model(GREY, impl="reference")
    generate, batches = (
        GeneratorModule(model, pmf.LossConfig(), GUIDANCE),
        [latents(4, i) for i in range(device_batches)],
    )
    constant, pixels = network_of("constant", Constant(), 2), networks()["pixels"]
    out = step_of({"constant": constant}, generate)(batches)
    assert out.terms["loss"] > 0 and not any(value.any() for value in gradients(model).values())
    torch.manual_seed(0)
    step_of({"pixels": pixels}, generate)(batches)
    expected = gradients(model)
    torch.manual_seed(0)
    step_of({"constant": constant, "pixels": pixels}, generate)(batches)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-15)


def test_the_gradient_in_the_weights_is_that_of_a_plain_script():
    """A script that generates, takes features, and lets autograd differentiate the whole loss, with B / N undone."""
    model, taken = step(population=lambda width: Queue(width, 200), label_weight=0.5)
    batch, past = latents(8, 1), {n: q.features.double().clone() for n, q in taken.loss.populations.items()}
    taken([batch])
    got = gradients(model)
    one = torch.ones(8, dtype=torch.float64)
    where = (one, one, one * GUIDANCE.omega, one * GUIDANCE.t_min, one * GUIDANCE.t_max, batch.labels)
    z = GREY.noise_scale * batch.noise
    images = model.to_images(model.predict_dual(pmf.Dual(z), pmf.Dual(where[1]), *where[2:], heads=("u",))["u"].value)
    total = torch.zeros((), dtype=torch.float64)
    for name, judge in taken.networks.items():
        f, target = judge(images), taken.loss.targets[name]
        # The rows enter as 200 / 8 times themselves: values stay, gradients grow by what the step undoes.
        f = f.detach() + (f - f.detach()) * (200 / 8)
        every = torch.cat([f, past[name][8:]])
        mu, sigma = every.mean(0), every.T.cov()
        values = torch.linalg.eigvalsh(target.root @ sigma @ target.root)
        root = values.clamp(min=1e-12 * float(values.max())).sqrt().sum()
        distance = (mu - target.mu).square().sum() + sigma.trace() + target.sigma.trace() - 2 * root
        total = total + distance / (distance.detach() + 0.01)
    logits = taken.networks["hidden"].logits(taken.networks["hidden"](images))
    (total + 0.5 * torch.nn.functional.cross_entropy(logits, batch.labels)).backward()
    for name, value in gradients(model).items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm() + 1e-12, name  # past features are kept in float32


def test_latents_are_a_function_of_their_seed():
    a, b, c = latents(6, 1), latents(6, 1), latents(6, 2)
    assert torch.equal(a.noise, b.noise) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.noise, c.noise)
    many = Latents.drawn(20_000, (1, 1, 1), 4, 0, "cpu")
    assert abs(float(many.noise.mean())) < 0.03 and abs(float(many.noise.std()) - 1) < 0.02
    assert (many.labels.bincount(minlength=4) / 5000 - 1).abs().max() < 0.05


def test_only_the_u_head_gets_gradients():
    model, taken = step()
    taken([latents(4, 0)])
    heads = {name.split(".")[1] for name in gradients(model) if name.startswith(("head_blocks", "final_layers"))}
    assert heads == {"u"}


def test_bad_parts_are_named():
    model, taken = step()
    module = GeneratorModule(model, pmf.LossConfig(), GUIDANCE)
    pixels = {"pixels": taken.networks["pixels"]}
    with pytest.raises(pmf.InputError, match=r"networks: expected \['hidden', 'pixels'\], got \['pixels'\]"):
        FrechetStep(module, pixels, taken.loss)
    alone = FrechetLoss({"pixels": Statistics.of(torch.randn(9, PIXELS))}, lambda width: MovingAverage(width, 0.9))
    with pytest.raises(pmf.InputError, match="label_weight: expected a network with a classifier"):
        FrechetStep(module, pixels, alone, label_weight=1.0)
