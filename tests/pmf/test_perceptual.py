import copy
import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

import pmf
from pmf.crops import draw_crops, resize_crops
from pmf.perceptual import CONVNEXT_BASE, ConvNextDistance, LPIPSDistance, PerceptualLoss, _own_kernels_hidden
from pmf.reference.loss import adaptive, pmf_fields, squared_errors
from tests.networks import TINY, random_model, relative_error
from tests.pmf.test_crops import resized_written_out

LOSS = pmf.LossConfig()
COLOUR = dataclasses.replace(TINY, in_channels=3)
SMALL = dict(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32])
needs_extras = pytest.mark.extras


def package(name):
    """A package of the extra; skips the test if it cannot be imported (torchvision needs its matching torch)."""
    with _own_kernels_hidden():
        return pytest.importorskip(
            name,
            reason=f"{name} does not import beside torch {torch.__version__}",
            exc_type=(ImportError, RuntimeError),
        )


@functools.cache
def _lpips_network(trunk):
    lpips = package("lpips")
    torch.manual_seed(0)
    return scattered(lpips.LPIPS(net=trunk, pnet_rand=True, verbose=False).double())


@functools.cache
def _convnext_network(**options):
    transformers = package("transformers")
    torch.manual_seed(0)
    with _own_kernels_hidden():
        return scattered(
            transformers.ConvNextV2Model(transformers.ConvNextV2Config(**SMALL, **options)).double().eval()
        )


def scattered(network):
    """The network with random changes to biases, norms and response scales, so that none has its initial value."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 or "grn" in name:
            parameter.data += torch.randn_like(parameter) / 4
    return network


def lpips_network(trunk="vgg"):
    """The package's LPIPS with its layer weights and a random trunk, float64."""
    return copy.deepcopy(_lpips_network(trunk))


def convnext_network(**options):
    """The package's ConvNeXt-V2 with random weights, small, float64; LayerNorm's eps as in the method."""
    return copy.deepcopy(_convnext_network(**{"layer_norm_eps": 1e-6} | options))


def image_pair(rows=2, size=32, dtype=torch.float64):
    torch.manual_seed(1)
    x = torch.rand(rows, 3, size, size, dtype=dtype) * 2 - 1
    return (x + torch.randn_like(x) / 4).requires_grad_(), x


def package_lpips(network, a, b):
    return network(a, b).flatten()


def package_convnext(network, a, b):
    return (network(a).pooler_output - network(b).pooler_output).square().sum(1)


def with_gradient(distance, a, b, weights):
    """Distances per row, then the gradient in a of their weighted sum, both in float64."""
    a = a.detach().requires_grad_()
    value = distance(a, b)
    (gradient,) = torch.autograd.grad(value.double() @ weights, a)
    return value.detach().double(), gradient.double()


TERMS = {
    "lpips": (lpips_network, LPIPSDistance, package_lpips),
    "convnext": (convnext_network, ConvNextDistance, package_convnext),
}


@needs_extras
@pytest.mark.parametrize("term", TERMS)
def test_distance_and_gradient_are_the_packages_own(term):
    """In float64 up to rounding; in lower precision with at most twice the package's error."""
    build, ours, theirs = TERMS[term]
    a, b = image_pair()
    weights = torch.tensor([1.0, -3.0], dtype=torch.float64)
    exact = with_gradient(functools.partial(theirs, build()), a, b, weights)
    for actual, expected in zip(with_gradient(ours(build(), torch.float64), a, b, weights), exact, strict=True):
        assert relative_error(actual, expected) < 1e-12
    for dtype in (torch.float32, torch.bfloat16):
        network = build().to(dtype)
        rough = with_gradient(functools.partial(theirs, network), a.to(dtype), b.to(dtype), weights)
        # Ours takes float32 images also in bfloat16: they are scaled before they are rounded.
        wide = torch.promote_types(dtype, torch.float32)
        fine = with_gradient(ours(build(), dtype), a.to(wide), b.to(wide), weights)
        for actual, packages, expected in zip(fine, rough, exact, strict=True):
            step = torch.finfo(dtype).eps
            assert relative_error(actual, expected) <= 2 * relative_error(packages, expected) + step, dtype


@needs_extras
def test_features_are_pooled_and_normalised_with_the_methods_eps():
    """Even if the stored configuration has another eps: the library's default is 1e-12."""
    _, x = image_pair()
    other = convnext_network(layer_norm_eps=1e-2)
    features = ConvNextDistance(other, torch.float64).features(x)
    assert relative_error(features, convnext_network()(x).pooler_output) < 1e-12
    assert features.shape == (2, SMALL["hidden_sizes"][-1])


@needs_extras
def test_base_has_the_published_size():
    transformers = package("transformers")
    with torch.device("meta"):
        base = transformers.ConvNextV2ForImageClassification(
            transformers.ConvNextV2Config(**CONVNEXT_BASE, num_labels=1000)
        )
    assert base.convnextv2.layernorm.normalized_shape == (1024,)
    assert sum(p.numel() for p in base.parameters()) == 88_717_800  # 88.7 M in the ConvNeXt-V2 paper


def colour_step(times, dtype=torch.float64):
    """x, y and draws of one step on 8 x 8 colour images, at these times."""
    torch.manual_seed(0)
    draws = pmf.sample_draws(len(times), COLOUR.image_shape, LOSS)
    t = torch.tensor(times)
    draws = dataclasses.replace(draws, t=t, r=torch.where(draws.fm_mask, t, t / 2))
    floats = {n: v.to(dtype) if v.is_floating_point() else v for n, v in vars(draws).items()}
    x = torch.rand(len(times), *COLOUR.image_shape, dtype=dtype) * 2 - 1
    return x, torch.randint(COLOUR.num_classes, (len(times),)), pmf.Draws(**floats)


@needs_extras
def test_loss_and_gradients_with_both_terms_equal_a_row_by_row_computation():
    """The expected loss uses explicit crops, the packages' distances and adaptive weights, row by row.

    LPIPS with AlexNet's trunk takes the same code path as with VGG's, in a tenth of the time.
    """
    x, y, draws = colour_step([0.3, 0.9, 0.6])
    model, lpips, convnext = random_model(COLOUR), lpips_network("alex"), convnext_network()

    fields = pmf_fields(model, x, y, draws)
    loss_u, loss_v = squared_errors(fields)
    early = [row for row in range(3) if draws.t[row] < LOSS.perceptual_max_t]
    boxes = draw_crops(len(early), 8, 8, torch.Generator().manual_seed(7)).split(1)
    total, distances = (adaptive(loss_u, LOSS) + adaptive(loss_v, LOSS)).sum(), []
    for row, box in zip(early, boxes, strict=True):
        a, b = (resized_written_out(images[row : row + 1], box, 224) for images in (fields.x_hat, x))
        distances.append((package_lpips(lpips, a, b)[0], package_convnext(convnext, a, b)[0]))
        total = total + 0.4 * adaptive(distances[-1][0], LOSS) + 0.1 * adaptive(distances[-1][1], LOSS)
    expected = torch.autograd.grad(total / 3, list(model.parameters()))

    terms = {"lpips": LPIPSDistance(lpips, torch.float64), "convnext": ConvNextDistance(convnext, torch.float64)}
    perceptual = PerceptualLoss(terms)
    out = pmf.pmf_loss(model, x, y, draws, LOSS, perceptual=perceptual.for_step(7))
    assert out.loss.item() == pytest.approx(total.item() / 3, rel=1e-12)
    for name, per_row in zip(("lpips", "convnext"), zip(*distances, strict=True), strict=True):
        assert out.terms[name].item() == pytest.approx(sum(per_row).item() / 3, rel=1e-10)
    plain = pmf.pmf_loss(model, x, y, draws, LOSS)
    with_terms, without = (torch.autograd.grad(o.loss, list(model.parameters())) for o in (out, plain))
    for (name, _), actual, bare, wanted in zip(model.named_parameters(), with_terms, without, expected, strict=True):
        assert relative_error(actual, wanted) < 1e-9, name
        reached = not name.startswith(("head_blocks.v", "final_norms.v", "final_layers.v"))
        assert torch.equal(actual, bare) != reached, name


class PatchDistance(nn.Module):
    """Distance per row after a fixed random convolution: a term that needs no package."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 8, 8).to(dtype)

    def forward(self, a, b):
        return (self.convolution(a) - self.convolution(b)).square().mean((1, 2, 3))


def patches(rows_at_once=32, dtype=torch.float64):
    return PerceptualLoss({"lpips": PatchDistance(dtype)}, rows_at_once=rows_at_once)


def test_late_rows_contribute_nothing():
    x, y, draws = colour_step([0.85, 0.9, 1.0, 0.8])
    model = random_model(COLOUR)
    out = pmf.pmf_loss(model, x, y, draws, LOSS, perceptual=patches())
    plain = pmf.pmf_loss(model, x, y, draws, LOSS)
    assert torch.equal(out.loss, plain.loss) and out.terms["lpips"] == 0
    both = (torch.autograd.grad(o.loss, list(model.parameters())) for o in (out, plain))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_step_is_a_function_of_its_seed():
    a, x = image_pair(rows=5)
    perceptual = patches()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    step = perceptual.for_step(3)
    first = step(a, x)["lpips"]
    assert torch.equal(first, step(a, x)["lpips"]) and torch.equal(first, perceptual.for_step(3)(a, x)["lpips"])
    assert not torch.equal(first, perceptual.for_step(4)(a, x)["lpips"])
    assert torch.equal(state, torch.get_rng_state())  # the global generator is used only without a seed
    assert not torch.equal(perceptual(a, x)["lpips"], perceptual(a, x)["lpips"])


def test_every_row_gets_a_crop_of_its_own_the_same_in_both_images():
    _, x = image_pair(rows=1)
    seen = []

    class Record(nn.Module):
        def forward(self, a, b):
            seen.extend((a, b))
            return (a - b).sum((1, 2, 3))

    same = x.expand(4, -1, -1, -1)
    PerceptualLoss({"lpips": Record()}).for_step(0)(same, same)
    a, b = seen
    assert torch.equal(a, b) and a.shape == (4, 3, 224, 224)
    assert len(a.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize("rows_at_once", [1, 2, 5, 32])
def test_gradient_taken_on_the_way_is_autograds_for_any_rows_at_once(rows_at_once):
    a, x = image_pair(rows=5)
    boxes, weights = draw_crops(5, 32, 32), torch.randn(5, dtype=torch.float64)
    perceptual = patches(rows_at_once)
    ours = with_gradient(lambda *pair: perceptual.distances(*pair, boxes)["lpips"], a, x, weights)
    cropped = lambda *pair: PatchDistance()(*(resize_crops(i, boxes, 224) for i in pair))  # noqa: E731
    for actual, expected in zip(ours, with_gradient(cropped, a, x, weights), strict=True):
        assert relative_error(actual, expected) < 1e-14
    with torch.no_grad():
        silent = perceptual.distances(a, x, boxes)["lpips"]
    assert relative_error(silent, ours[0]) < 1e-14 and not silent.requires_grad


def test_the_gradient_is_differentiated_once():
    a, x = image_pair(rows=2)
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(patches()(a, x)["lpips"].square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def bytes_kept(run):
    """Bytes that autograd still holds for backward after `run` has returned, each storage once."""
    alive = weakref.WeakSet()

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        result = run()
    gc.collect()
    storages = {kept.tensor.untyped_storage()._cdata: kept.tensor.untyped_storage().nbytes() for kept in alive}
    del result
    return sum(storages.values())


def test_only_an_image_gradient_per_row_and_term_is_kept_for_backward():
    rows, size = 3, 64
    a, x = image_pair(rows, size, dtype=torch.float32)
    perceptual = PerceptualLoss({name: PatchDistance(torch.float32) for name in ("lpips", "convnext")})
    gradients, weights = 2 * rows * 3 * 224**2 * 4, rows * 2 * 224 * size * 4
    assert bytes_kept(lambda: perceptual(a, x)) == gradients + weights


def test_gradients_reach_x_hat_alone_and_networks_stay_frozen():
    a, x = image_pair()
    x.requires_grad_()
    perceptual = patches()
    parent = nn.ModuleList([perceptual, nn.Linear(1, 1)]).train()
    assert parent[1].training and not any(module.training for module in perceptual.modules())
    perceptual(a, x)["lpips"].sum().backward()
    assert x.grad is None and a.grad.norm() > 0
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())


def test_autocast_changes_nothing():
    a, x = image_pair(dtype=torch.float32)
    step = patches(dtype=torch.float32).for_step(0)
    outside = step(a, x)["lpips"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = step(a, x)["lpips"]
    assert torch.equal(inside, outside)
    assert torch.equal(*(torch.autograd.grad(value.sum(), a)[0] for value in (inside, outside)))


def without_reading(perceptual):
    """Compute value and gradient on the meta device, where reading a number (a synchronisation) raises."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(1, device="meta").item()
    x_hat = torch.empty(5, 3, 256, 256, device="meta", requires_grad=True)
    distances = perceptual.to("meta").for_step(0)(x_hat, torch.empty_like(x_hat))
    sum(value.sum() for value in distances.values()).backward()
    assert x_hat.grad.shape == x_hat.shape
    assert all(value.shape == (5,) for value in distances.values())


def test_nothing_is_read_back_from_the_device():
    without_reading(patches(rows_at_once=2, dtype=torch.float32))


@needs_extras
def test_the_networks_read_nothing_back_from_the_device():
    terms = {"lpips": LPIPSDistance(lpips_network(), torch.bfloat16)}
    terms["convnext"] = ConvNextDistance(convnext_network(), torch.bfloat16)
    without_reading(PerceptualLoss(terms))


@needs_extras
def test_networks_hold_their_weights_in_the_dtype_and_channels_last():
    terms = {"lpips": LPIPSDistance(lpips_network(), torch.bfloat16)}
    terms["convnext"] = ConvNextDistance(convnext_network(), torch.bfloat16)
    perceptual = PerceptualLoss(terms)
    convolutions = [m for m in perceptual.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13 + 9  # VGG-16's; a stem, three between stages, one in each of five blocks
    for convolution in convolutions:
        assert convolution.weight.dtype == torch.bfloat16
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert perceptual.terms["convnext"].norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patches()(torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8, 8)), r"x: expected shape \[B, 3, H, W\] .*"),
        (
            lambda: patches()(torch.zeros(2, 3, 8, 9), torch.zeros(2, 3, 8, 8)),
            r"x_hat: expected the shape of x, \[2, 3, 8, 8\], got \[2, 3, 8, 9\]",
        ),
        (lambda: patches(rows_at_once=0), "rows_at_once: expected at least 1, got 0"),
        (lambda: PerceptualLoss({}), "terms: expected at least one, got none"),
        (lambda: PerceptualLoss.load(dtype=torch.int8), "dtype: expected a floating dtype, got torch.int8"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(call, message):
    with pytest.raises(pmf.InputError, match=f"^{message}$"):
        call()
