"""The scripts in examples/ run as printed in their first lines, and their networks compute the same."""

import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import pmf
from pmf.counting import saved_bytes
from tests.networks import random_model
from tests.pmf.jvp_checks import PARTITIONED

EXAMPLES = Path(__file__).parents[2] / "examples"
PORTS = EXAMPLES / "ports"
STEPS = ("before", "jvp", "fused", "explicit")
NETWORKS = {"dit": "DiT", "vit": "ViT"}


def in_extras(test):
    """Mark a test that needs diffusers and timm, which warn of PyTorch's own deprecations."""
    missing = [name for name in ("diffusers", "timm") if find_spec(name) is None]
    there = pytest.mark.skipif(bool(missing), reason=f"could not import {missing}")
    return pytest.mark.filterwarnings("ignore")(pytest.mark.extras(there(test)))


def run(script, folder, *arguments):
    """What a script prints, run in an empty folder; the ratios of its table by name, of time and of memory."""
    done = subprocess.run([sys.executable, script, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([^|]+) \| [\d.e+]+ \(([\d.]+)\) \| [\d.e+]+ \(([\d.]+)\) \|$", done.stdout, re.MULTILINE)
    return done.stdout, {name: (float(time), float(memory)) for name, time, memory in rows}


def errors_in(printed):
    return [float(error) for error in re.findall(r"step \d+: mean squared error ([\d.]+)", printed)]


@in_extras
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("port", NETWORKS)
def test_a_port_learns(port, step, tmp_path):
    printed, _ = run(PORTS / f"{port}_{step}.py", tmp_path, "--out", "drawn.png", "--steps", "60")
    errors = errors_in(printed)
    assert errors[-1] < 0.8 * errors[0] and len(errors) == 10
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@in_extras
@pytest.mark.parametrize("port", NETWORKS)
def test_ports_change_few_lines_and_keep_half_the_memory_of_a_joint_jvp(port, tmp_path):
    _, ratios = run(PORTS / "compare.py", tmp_path, "--port", port)
    names = [re.fullmatch(r"(\w+), (\d+) lines", name).groups() for name in ratios]
    lines = {step: int(count) for step, count in names}
    assert tuple(lines) == STEPS and lines["before"] == 0
    assert 0 < lines["jvp"] <= 5 and lines["fused"] <= 20
    assert all(memory < 0.6 for _, memory in list(ratios.values())[1:])


def test_fine_tuning_learns_negatives(tmp_path):
    config = pmf.MODELS["pMF-digits"]
    pmf.save_model(tmp_path / "weights.safetensors", config, random_model(config).state_dict())
    script, options = EXAMPLES / "fine_tune_pmf.py", ("--weights", "weights.safetensors", "--steps", "100")
    printed, ratios = run(script, tmp_path, "--out", "drawn.png", *options)
    errors = errors_in(printed)
    assert errors[-1] < 0.8 * errors[0] and len(errors) == 10
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert ratios["pmf.pmf_loss"][1] < 0.5


def step_of(network, errors):
    """A step's errors, and the gradient of each parameter by name."""
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8).double()
    value = errors(network, x, torch.arange(6))
    value.mean().backward()
    return value, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.fixture
def scripts(monkeypatch):
    """Import a port's script."""
    monkeypatch.syspath_prepend(PORTS)
    return importlib.import_module


def drawn(make, **sizes):
    """A network in float64, none of whose weights is zero."""
    network = make(**sizes).double()
    for i, (_, parameter) in enumerate(sorted(network.named_parameters())):
        torch.manual_seed(i)
        nn.init.normal_(parameter, std=0.1)
    return network


@in_extras
@pytest.mark.parametrize("port", NETWORKS)
def test_all_four_steps_compute_the_same(port, scripts):
    modules = [scripts(f"{port}_{step}") for step in STEPS]
    found = [step_of(drawn(getattr(module, NETWORKS[port])), module.errors) for module in modules]
    (expected, wanted), *others = found
    for errors, gradients in others:
        torch.testing.assert_close(errors, expected, rtol=1e-10, atol=0)
        assert gradients.keys() == wanted.keys()
        whole = torch.stack([g.norm() for g in wanted.values()]).norm()
        assert all((gradients[name] - wanted[name]).norm() < 1e-9 * whole for name in wanted)


@in_extras
@pytest.mark.parametrize("compiled", ["whole call", "blocks"])
@pytest.mark.parametrize("port", NETWORKS)
def test_the_fused_network_compiles_without_break_at_the_bytes_of_its_compiled_forward_pass(port, compiled, scripts):
    torch._dynamo.reset()
    module = scripts(f"{port}_fused")
    eager, network = (drawn(getattr(module, NETWORKS[port]), width=64, depth=2) for _ in range(2))
    expected, _ = step_of(eager, module.errors)
    z, (t, r), y = torch.randn(6, 1, 8, 8).double(), torch.rand(2, 6).double(), torch.arange(6)
    forward, jvp = network, pmf.jvp
    if compiled == "blocks":
        for block in network.vit.blocks if port == "vit" else network.dit.transformer_blocks:
            block.compile(**PARTITIONED)
    else:
        forward = torch.compile(network, **PARTITIONED)
        eager_jvp = pmf.jvp
        jvp = torch.compile(lambda network, primals, tangents: eager_jvp(network, primals, tangents), **PARTITIONED)
    plain = saved_bytes(lambda: forward(z, t, r, y), network.parameters())
    ours = saved_bytes(lambda: jvp(network, (z, t, r, y), (z, 1, 0, None)), network.parameters())
    assert ours <= 1.02 * plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmf, "jvp", jvp)
        value, _ = step_of(network, module.errors)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_the_page_shows_the_code_of_the_scripts():
    scripts = "\n".join(file.read_text() for file in EXAMPLES.rglob("*.py"))
    page = (EXAMPLES.parent / "docs" / "your-script.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        assert block in scripts
    (lines,) = re.findall(r"^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for signs, step in ((" -", "before"), (" +", "jvp")):
        shown = "".join(line[1:] for line in lines.splitlines(keepends=True) if line[0] in signs)
        assert all(shown in (PORTS / f"{port}_{step}.py").read_text() for port in NETWORKS)
