"""The scripts in examples/ run as printed in their first lines, and their networks compute the same."""

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

EXAMPLES = Path(__file__).parents[2] / "examples"
MEANFLOW = ["meanflow", "meanflow_fused", "meanflow_explicit"]


def in_extras(test):
    """Mark a test that needs diffusers, which warns of PyTorch's own deprecations."""
    there = pytest.mark.skipif(find_spec("diffusers") is None, reason="could not import 'diffusers'")
    return pytest.mark.filterwarnings("ignore")(pytest.mark.extras(there(test)))


def run(script, folder, *arguments):
    """What a script prints, run in an empty folder; the ratios of its table by name, of time and of memory."""
    command = [sys.executable, EXAMPLES / f"{script}.py", "--out", "drawn.png", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([^|]+) \| [\d.e+]+ \(([\d.]+)\) \| [\d.e+]+ \(([\d.]+)\) \|$", done.stdout, re.MULTILINE)
    assert (folder / "drawn.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout, {name: (float(time), float(memory)) for name, time, memory in rows}


def errors_in(printed):
    return [float(error) for error in re.findall(r"step \d+: mean squared error ([\d.]+)", printed)]


@in_extras
@pytest.mark.parametrize("script", MEANFLOW)
def test_meanflow_learns_and_keeps_half_the_memory_of_a_joint_jvp(script, tmp_path):
    printed, ratios = run(script, tmp_path, "--steps", "60")
    errors = errors_in(printed)
    assert errors[-1] < 0.8 * errors[0] and len(errors) == 10
    assert next(iter(ratios)) == "torch.func.jvp" and len(ratios) == 2 + MEANFLOW.index(script)
    assert all(memory < 0.6 for _, memory in list(ratios.values())[1:])


def test_fine_tuning_learns_negatives(tmp_path):
    config = pmf.MODELS["pMF-digits"]
    pmf.save_model(tmp_path / "weights.safetensors", config, random_model(config).state_dict())
    printed, ratios = run("fine_tune_pmf", tmp_path, "--weights", "weights.safetensors", "--steps", "100")
    errors = errors_in(printed)
    assert errors[-1] < 0.8 * errors[0] and len(errors) == 10
    assert ratios["pmf.pmf_loss"][1] < 0.5


def step(network, errors):
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8).double()
    value = errors(network, x, torch.arange(6))
    value.mean().backward()
    return value, nn.utils.parameters_to_vector([p.grad for p in network.parameters() if p.grad is not None])


def random_weights(*networks):
    """The networks in float64 with the same weights, none of them zero."""
    for parameter in networks[0].parameters():
        nn.init.normal_(parameter, std=0.1)
    for network in networks:
        network.load_state_dict(networks[0].state_dict())
        network.double()
    return networks


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the scripts, importable."""
    monkeypatch.syspath_prepend(EXAMPLES)


@in_extras
def test_all_three_steps_compute_what_torch_func_jvp_does(scripts):
    from meanflow import DiT, joint_jvp, meanflow_errors
    from meanflow_explicit import ExplicitDiT, explicit_jvp
    from meanflow_fused import fused

    networks = random_weights(DiT(), DiT(), fused(DiT()), ExplicitDiT())
    (expected, wanted), *others = [
        step(network, lambda *given, jvp=jvp: meanflow_errors(*given, jvp=jvp))
        for network, jvp in zip(networks, (joint_jvp, pmf.jvp, pmf.jvp, explicit_jvp), strict=True)
    ]
    for errors, gradients in others:
        torch.testing.assert_close(errors, expected, rtol=1e-10, atol=0)
        assert (gradients - wanted).norm() < 1e-9 * wanted.norm()


@in_extras
@pytest.mark.parametrize("compiled", ["whole call", "blocks"])
def test_the_fused_network_compiles_without_break_at_the_bytes_of_its_compiled_forward_pass(compiled, scripts):
    from meanflow import DiT, meanflow_errors
    from meanflow_fused import fused

    torch._dynamo.reset()
    eager, network = random_weights(*(fused(DiT(width=64, depth=2)) for _ in range(2)))
    expected = step(eager, meanflow_errors)
    # This backend chooses what to save as inductor does, but generates no code.
    options = dict(fullgraph=True, backend="aot_eager_decomp_partition")
    z, (t, r), y = torch.randn(6, 1, 8, 8).double(), torch.rand(2, 6).double(), torch.arange(6)
    forward, jvp = network, pmf.jvp
    if compiled == "blocks":
        for block in network.dit.transformer_blocks:
            block.compile(**options)
    else:
        forward = torch.compile(network, **options)
        jvp = torch.compile(lambda network, primals, tangents: pmf.jvp(network, primals, tangents), **options)
    plain = saved_bytes(lambda: forward(z, t, r, y), network.parameters())
    ours = saved_bytes(lambda: jvp(network, (z, t, r, y), (z, 1, 0, None)), network.parameters())
    assert ours <= 1.02 * plain
    for got, wanted in zip(step(network, lambda *given: meanflow_errors(*given, jvp=jvp)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_page_shows_the_code_of_the_scripts():
    scripts = "\n".join(file.read_text() for file in EXAMPLES.glob("*.py"))
    page = (EXAMPLES.parent / "docs" / "your-script.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        assert block in scripts
