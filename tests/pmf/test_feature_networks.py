"""Feature networks against timm's and torch-fidelity's own, with random weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import interpolate

from pmf import feature_networks
from pmf.errors import InputError
from pmf.feature_networks import NETWORKS, WEIGHTS, FeatureNetwork, feature_network
from pmf.images import to_float
from pmf.metrics import inception
from tests.networks import extras, relative_error

ROOT = Path(__file__).parents[2]
SIZES = {"siglip": 224, "mae": 224, "convnext": 224, "dinov2": 256, "clip": 256}
WIDTHS = {"siglip": 1152, "mae": 1024, "convnext": 1024, "dinov2": 1024, "clip": 1024, "inception": 2048}


def images(count=2, size=64, channels=3, dtype=torch.float32):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)).to(dtype) * 2.2 - 1.1


@pytest.fixture
def small(monkeypatch):
    """A tiny ViT as mae and a tiny ConvNeXt as convnext."""
    vit = feature_networks._Source("vit_tiny_patch16_224.augreg_in21k", 224, 192, 0)
    convnext = feature_networks._Source("convnextv2_atto.fcmae_ft_in1k", 224, 320, 0, 1000)
    monkeypatch.setitem(feature_networks._TIMM, "mae", vit)
    monkeypatch.setitem(feature_networks._TIMM, "convnext", convnext)


def prepared(x, network, size):
    """As the module's formula says, with timm's constants."""
    mean, std = (torch.tensor(network.pretrained_cfg[name], dtype=x.dtype)[:, None, None] for name in ("mean", "std"))
    x = interpolate(x * 0.5 + 0.5, (size, size), mode="bicubic", align_corners=False, antialias=True)
    return (x - mean) / std


@extras
@pytest.mark.parametrize("name", SIZES)
def test_features_are_those_of_timm(name):
    network, x = feature_network(f"{name}:random"), images()
    theirs = network.trunk.network
    with torch.no_grad():
        features, ready = network(x), prepared(x, theirs, SIZES[name])
        expected = theirs.forward_features(ready).mean((2, 3)) if name == "convnext" else theirs(ready)
    assert features.shape == (2, WIDTHS[name]) and network.width == WIDTHS[name] and network.name == name
    assert relative_error(features, expected) <= 1e-5
    assert relative_error(features[0], features[1]) > 0.01  # they depend on the image
    if name == "convnext":
        assert relative_error(network.logits(features), theirs(ready)) <= 1e-5 and network.classes == 1000
    else:
        assert network.classes is None
    assert network.space.split()[1:3] == ["bicubic", str(SIZES[name])]
    assert sum(p.numel() for p in network.parameters()) == WEIGHTS[name]


RESIZES = [
    ((256, 256), (224, 224)),
    ((32, 32), (224, 224)),
    ((300, 200), (256, 256)),
    ((64, 501), (224, 256)),
    ((1, 7), (5, 3)),
    ((224, 37), (224, 224)),
]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("size", "wanted"), RESIZES)
def test_the_resize_and_its_gradient_are_those_of_interpolate(size, wanted, dtype, bound):
    """Two products, also in the gradient: none of PyTorch's resize, which adds in no fixed order on CUDA."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator).to(dtype).requires_grad_()
    weights = torch.randn(2, 3, *wanted, generator=generator).to(dtype)
    resized = feature_networks._resized(x, wanted, feature_networks._bicubic_weights)
    expected = interpolate(x, wanted, mode="bicubic", align_corners=False, antialias=True)
    assert resized.dtype == dtype and resized.shape == expected.shape
    assert relative_error(resized, expected) <= bound
    gradient, differentiated = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (resized, expected))
    assert relative_error(gradient, differentiated) <= bound


class Stub(torch.nn.Module):
    """What `_TimmTrunk` needs of a network of timm; its features are its input."""

    pretrained_cfg = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def forward_features(self, x):
        return x.flatten(1)

    def forward_head(self, x, pre_logits):
        return x


def test_images_of_the_size_of_the_network_are_not_resized():
    trunk, x = feature_networks._TimmTrunk(Stub(), 16, torch.float32), images(2, 16)
    assert torch.equal(trunk(x), (x / 2 + 0.5).flatten(1))
    larger = images(2, 32)
    expected = interpolate(larger / 2 + 0.5, (16, 16), mode="bicubic", align_corners=False, antialias=True)
    assert relative_error(trunk(larger), expected.flatten(1)) <= 1e-6


@pytest.mark.parametrize("autocast", [False, True])
def test_the_resize_records_products_alone_and_ignores_autocast(autocast):
    trunk, x = feature_networks._TimmTrunk(Stub(), 16, torch.float32), images(2, 32).requires_grad_()
    network = FeatureNetwork("stub", trunk, width=3 * 16 * 16, space="stub", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = network(x)
    pending, names = [features.grad_fn], set()
    while pending:
        node = pending.pop()
        names.add(node.name())
        pending += [source for source, _ in node.next_functions if source is not None]
    assert not any("Upsample" in name for name in names) and names & {"MmBackward0", "BmmBackward0"}
    assert features.dtype == torch.float32 and relative_error(features, trunk(x)) <= 1e-6


@extras
def test_patches_of_14_pixels_get_zeros_at_the_edges():
    """256 pixels are 18.3 patches; the position embeddings are interpolated to the grid of 19."""
    network, x = feature_network("dinov2:random"), images(1)
    ready = torch.nn.functional.pad(prepared(x, network.trunk.network, 256), (0, 10, 0, 10))
    assert relative_error(network(x), network.trunk.network(ready)) <= 1e-5


@extras
@pytest.mark.parametrize("size", [(256, 256), (64, 64), (37, 501), (299, 299)])
def test_inception_is_that_of_fid_on_bytes(inception_weights, size):
    bytes_ = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = feature_network(f"inception:{inception_weights}")
    expected, _ = inception(inception_weights)(bytes_)
    assert relative_error(network(to_float(bytes_)), expected) <= 1e-5
    assert network.width == 2048 and network.classes is None and network.space.startswith("inception tf1 299 ")


def derivative_error(network, x, step):
    """The derivative along a random direction, against central differences; both in float64."""
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(network(x).shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad((network(x) * weights).sum(), x)
    with torch.no_grad():
        ends = [(network(x + sign * step * direction) * weights).sum() for sign in (1, -1)]
    found, expected = (gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step)
    return ((found - expected) / expected).abs().item()


@extras
@pytest.mark.parametrize("spec", ["mae:random", "convnext:random", "inception:random", "pixels"])
def test_gradients_are_those_of_differences(small, spec):
    network = feature_network(spec, dtype=torch.float64)
    x = images(1, 32, dtype=torch.float64)
    # Inception's rectifiers have kinks: only a step that crosses few of them gives its derivative.
    step, bound = (1e-8, 1e-4) if spec.startswith("inception") else (1e-5, 1e-6)
    assert derivative_error(network, x, step) <= bound
    assert all(not p.requires_grad for p in network.parameters())


@extras
@pytest.mark.parametrize("name", ["mae", "convnext", "inception"])
def test_bfloat16_is_near_float32_and_autocast_changes_nothing(small, name):
    x = images()
    wide, low = (feature_network(f"{name}:random", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    expected = wide(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(x), expected)
    got = low(x)
    assert got.dtype == torch.float32 and 1e-6 < relative_error(got, expected) <= 0.03
    assert wide.space == low.space
    assert torch.equal(low(x.bfloat16()), low(x.bfloat16().float()))
    if name == "convnext":
        assert low.logits(got).dtype == torch.float32


@extras
def test_random_weights_are_a_function_of_the_seed(small):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other = (feature_network("mae:random", seed=seed) for seed in (0, 0, 1))
    assert first.space == same.space != other.space and torch.equal(first(images()), same(images()))
    assert torch.equal(torch.get_rng_state(), state)


@extras
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_file(small, tmp_path, suffix):
    source, file = feature_network("mae:random"), tmp_path / f"weights{suffix}"
    state = source.trunk.network.state_dict() | {"head.weight": torch.zeros(3, 192)}
    torch.save(state, file) if suffix == ".pth" else save_file(state, file)
    loaded = feature_network(f"mae:{file}", seed=3)
    assert loaded.space == source.space and torch.equal(loaded(images()), source(images()))


@extras
def test_what_does_not_fit_is_one_line(small, tmp_path):
    state, file = feature_network("mae:random").trunk.network.state_dict(), tmp_path / "weights.pth"
    cases = [
        ({k: v for k, v in state.items() if k != "norm.weight"}, r"mae expects norm.weight of \[192\], got no such"),
        (state | {"pos_embed": torch.zeros(1, 3, 192)}, r"mae expects pos_embed of \[1, 197, 192\], got \[1, 3, 192\]"),
        (state | {"extra": torch.zeros(1)}, r"mae expects extra of no such weight, got \[1\]"),
        ([1], "expected a state dict in .*, got list"),
    ]
    for content, message in cases:
        torch.save(content, file)
        with pytest.raises(InputError, match=message) as error:
            feature_network(f"mae:{file}")
        assert "\n" not in str(error.value)
    for name in ("mae", "inception", "convnext"):
        file.write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"^(features|inception): cannot (load|take) ") as error:
            feature_network(f"{name}:{file}")
        assert "\n" not in str(error.value)


def test_features_keep_nothing_else_in_memory():
    """A class token is a view of all tokens."""

    class FirstColumn(torch.nn.Module):
        def forward(self, images):
            return images.flatten(2).transpose(1, 2)[:, 0]

    network = FeatureNetwork("token", FirstColumn(), width=3, space="token", dtype=torch.float32)
    features = network(images())
    assert torch.equal(features, images()[:, :, 0, 0]) and features.untyped_storage().nbytes() == features.nbytes


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_images_flattened(channels):
    network, x = feature_network("pixels"), images(3, 8, channels=channels)
    assert torch.equal(network(x), x.flatten(1))
    assert (network.name, network.width, network.space, network.classes) == ("pixels", None, "pixels", None)
    assert not torch.nn.Sequential(network).train()[0].training
    with pytest.raises(InputError, match="features: pixels has no classifier"):
        network.logits(network(x))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vgg", r"features: expected one of inception, siglip, .*, pixels, with :PATH or :random, got 'vgg'"),
        ("mae:", "features: expected a path or random after the colon, got 'mae:'"),
        ("pixels:random", "features: pixels have no weights, expected pixels, got 'pixels:random'"),
        ("mae:/nowhere", "features: /nowhere does not exist, expected a file of mae's weights"),
        (3, "spec: expected a text, got 3"),
    ],
)
def test_bad_names_are_one_line(spec, message):
    with pytest.raises(InputError, match=message):
        feature_network(spec)


@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 2, 8, 8), torch.zeros(3, 8, 8)]
)
def test_bad_images_are_one_line(bad):
    with pytest.raises(InputError, match=r"images: expected floats \[B, 1 or 3, H, W\], got torch"):
        feature_network("pixels")(bad)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("pixels", "inception")])
def test_a_missing_package_is_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=rf"features: {name} needs pip install 'pixel-meanflow\[posttrain\]'"):
        feature_network(name)


@extras
def test_networks_load_inside_a_clone():
    """A clone's folder `kernels` has the name of a package that Hugging Face's libraries look for."""
    code = (
        "from pmf.feature_networks import _timm; import timm; print(timm.create_model('vit_tiny_patch16_224') is None)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
