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
from tests.networks import random_model

EXAMPLES = Path(__file__).parents[2] / "examples"
MEANFLOW = ["meanflow", "meanflow_fused", "meanflow_explicit"]
NEEDS_DIFFUSERS = pytest.mark.skipif(find_spec("diffusers") is None, reason="could not import 'diffusers'")


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


@NEEDS_DIFFUSERS
@pytest.mark.extras
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


@NEEDS_DIFFUSERS
@pytest.mark.extras
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("away_from_the_checkout")
def test_all_three_steps_compute_what_torch_func_jvp_does(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from meanflow import DiT, joint_jvp, meanflow_errors
    from meanflow_explicit import ExplicitDiT, explicit_jvp
    from meanflow_fused import fused

    networks = [DiT(), DiT(), fused(DiT()), ExplicitDiT()]
    for parameter in networks[0].parameters():
        nn.init.normal_(parameter, std=0.1)
    for network in networks:
        network.load_state_dict(networks[0].state_dict())
        network.double()
    (expected, wanted), *others = [
        step(network, lambda *given, jvp=jvp: meanflow_errors(*given, jvp=jvp))
        for network, jvp in zip(networks, (joint_jvp, pmf.jvp, pmf.jvp, explicit_jvp), strict=True)
    ]
    for errors, gradients in others:
        torch.testing.assert_close(errors, expected, rtol=1e-10, atol=0)
        assert (gradients - wanted).norm() < 1e-9 * wanted.norm()


def test_the_page_shows_the_code_of_the_scripts():
    scripts = "\n".join(file.read_text() for file in EXAMPLES.glob("*.py"))
    page = (EXAMPLES.parent / "docs" / "your-script.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        assert block in scripts
