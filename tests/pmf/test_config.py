import dataclasses
import json

import numpy as np
import pytest
import torch

import pmf
from pmf.config import model_config

PUBLISHED_MILLIONS = {
    "pMF-B/16": (175.47, 118.23),
    "pMF-B/32": (179.31, 120.30),
    "pMF-L/16": (511.79, 410.32),
    "pMF-L/32": (516.81, 412.98),
    "pMF-H/16": (1113.90, 955.51),
    "pMF-H/32": (1120.40, 959.05),
}


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_parameter_counts_are_the_published_ones(name):
    counts = [
        sum(p.numel() for p in pmf.create_model(name, aux_head=aux_head, device="meta").parameters()) / 1e6
        for aux_head in (True, False)
    ]
    assert [round(count, 2) for count in counts] == list(PUBLISHED_MILLIONS[name])


def test_published_sizes_have_276_tokens_and_published_mlp_widths():
    widths = {"B": 2048, "L": 2730, "H": 3416}
    for name in PUBLISHED_MILLIONS:
        assert pmf.MODELS[name].sequence_length == 276
        assert pmf.MODELS[name].mlp_width == widths[name[4]]


def test_every_preset_has_a_loss_and_a_sampling_setting():
    assert set(pmf.MODELS) == set(pmf.LOSSES) == set(pmf.SAMPLING) - {"pMF-B/16-torch"}


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pmf.MODELS["pMF-B/16"].depth = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(patch_size=5), "patch_size must divide image_size 256, got 5"),
        (dict(num_heads=7), "num_heads must divide hidden_size 768, got 7"),
        (dict(aux_head_depth=16), "aux_head_depth must be below depth 16, got 16"),
        (dict(conditioning="film"), "conditioning: expected one of in_context, adaln, got 'film'"),
        (dict(noise_scale=0.0), "noise_scale must be positive, got 0.0"),
        (dict(num_heads=2.5), r"num_heads: expected an integer below 2\^63, got 2.5"),
        (dict(num_heads=384), "head_dim must be a multiple of 4"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(pmf.InputError, match=message):
        pmf.ModelConfig(**change)


@pytest.mark.parametrize(
    "change", [dict(data_proportion=1.5), dict(p_std=0.0), dict(cfg_max=-1.0), dict(p_mean=float("nan"))]
)
def test_impossible_losses_are_refused(change):
    with pytest.raises(pmf.InputError, match=f"LossConfig: {next(iter(change))}(:| must)"):
        pmf.LossConfig(**change)


def test_numbers_of_other_packages_become_pythons():
    config = dataclasses.replace(pmf.MODELS["pMF-digits"], depth=np.int64(6), noise_scale=np.float32(0.5))
    assert type(config.depth) is int and type(config.noise_scale) is float and config.noise_scale == 0.5
    rule = pmf.optim.OptimizerConfig(adam_betas=[np.float32(0.5), torch.tensor(0.25)])
    assert rule.adam_betas == (0.5, 0.25) and json.loads(json.dumps(dataclasses.asdict(rule)))


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(pmf.InputError, match=r"unknown preset 'pMF-XL/16', expected one of pMF-B/16"):
        model_config("pMF-XL/16")
