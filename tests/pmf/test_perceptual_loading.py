"""Perceptual networks from files, from the packages, and with random weights."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import pmf
from pmf.perceptual import ConvNextDistance, LPIPSDistance, PerceptualLoss
from tests.pmf.test_perceptual import convnext_network, lpips_network, needs_extras, package


def same_weights(one, other):
    other = other.state_dict()
    return all(torch.equal(weight, other[name]) for name, weight in one.state_dict().items())


@needs_extras
@pytest.mark.parametrize("write", [torch.save, save_file])
def test_lpips_trunk_loads_from_torchvisions_state_dict(tmp_path, write):
    network = lpips_network().float()
    published = {"features." + n.split(".", 1)[1]: w for n, w in network.net.state_dict().items()}
    published["classifier.0.weight"] = torch.zeros(1)
    file = tmp_path / ("vgg16.pth" if write is torch.save else "vgg16.safetensors")
    write(published, file)
    loaded = PerceptualLoss.load(file, None, dtype=torch.float32)
    assert same_weights(loaded.terms["lpips"], LPIPSDistance(network, torch.float32))


@needs_extras
def test_a_trunk_that_does_not_fit_is_refused(tmp_path):
    package("lpips")
    file = tmp_path / "vgg16.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, file)
    with pytest.raises(
        pmf.InputError, match=r"^lpips: expected features.0.weight of shape \[64, 3, 3, 3\] in .*, got \[3\]$"
    ):
        PerceptualLoss.load(file, None)
    with pytest.raises(pmf.InputError, match=r"^lpips: cannot load '.*no such file.pth': [^\n]*$"):
        PerceptualLoss.load(tmp_path / "no such file.pth", None)


@needs_extras
def test_convnext_loads_from_a_directory_with_its_classifier(tmp_path):
    transformers = package("transformers")
    network = convnext_network().float()
    whole = transformers.ConvNextV2ForImageClassification(network.config)
    whole.convnextv2.load_state_dict(network.state_dict())
    whole.save_pretrained(tmp_path)
    loaded = PerceptualLoss.load(None, tmp_path, dtype=torch.float32)
    assert same_weights(loaded.terms["convnext"], ConvNextDistance(network, torch.float32))
    assert "kernels" not in sys.modules  # transformers mistook this repository's folder for that package

    del whole.convnextv2.layernorm
    whole.save_pretrained(tmp_path)
    with pytest.raises(pmf.InputError, match=r"^convnext: .* lacks the weight 'layernorm.bias'"):
        PerceptualLoss.load(None, tmp_path)
    with pytest.raises(pmf.InputError, match=r"^convnext: cannot load '.*nothing here': [^\n]*$"):
        PerceptualLoss.load(None, tmp_path / "nothing here")


@needs_extras
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_random_weights_train_from_the_black_image_of_a_new_network(dtype):
    package("transformers")
    loss = PerceptualLoss.load(None, "random", dtype=dtype)
    black = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance = loss(black, torch.rand(1, 3, 32, 32) * 2 - 1, torch.Generator().manual_seed(0))["convnext"]
    (gradient,) = torch.autograd.grad(distance.sum(), black)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


def test_random_weights_are_a_function_of_the_seed():
    package("lpips")
    state = torch.get_rng_state()
    first, again, other = (PerceptualLoss.load("random", None, seed=seed).terms["lpips"].trunk for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert same_weights(first, again) and not same_weights(first, other)


@pytest.mark.parametrize(("name", "arguments"), [("lpips", ("random", None)), ("transformers", (None, "random"))])
def test_a_missing_package_names_the_extra(monkeypatch, name, arguments):
    monkeypatch.setitem(sys.modules, name, None)
    argument = {"lpips": "lpips", "transformers": "convnext"}[name]
    with pytest.raises(
        pmf.InputError, match=rf"^{argument}: needs pip install 'pixel-meanflow\[perceptual\]': [^\n]*$"
    ):
        PerceptualLoss.load(*arguments)


def test_a_package_that_fails_without_a_word_is_one_line_too(monkeypatch, tmp_path):
    (tmp_path / "lpips.py").write_text("raise ImportError")
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pmf.InputError, match=r"^lpips: needs pip install '.*': ImportError$"):
        PerceptualLoss.load("random", None)


def test_packages_load_on_first_use():
    code = "import sys, pmf.perceptual; assert not {'lpips', 'transformers', 'torchvision'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
