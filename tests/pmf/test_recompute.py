import dataclasses

import pytest
import torch

import pmf
from pmf.counting import operations, saved_bytes
from tests.networks import TINY, random_model, relative_error
from tests.pmf.test_loss import LOSS, gradients, step_inputs


@pytest.mark.parametrize("conditioning", ["in_context", "adaln"])
def test_gradients_are_those_without_checkpointing(conditioning):
    config = dataclasses.replace(TINY, conditioning=conditioning)
    x, y, draws = step_inputs(6)
    plain, expected = gradients(random_model(config), x, y, draws, LOSS)
    out, grads = gradients(random_model(config, checkpointing="block"), x, y, draws, LOSS)
    assert out.loss.item() == plain.loss.item()
    for name, grad in grads.items():
        assert relative_error(grad, expected[name]) < 1e-12, name


def test_only_the_inputs_of_blocks_are_kept():
    config = dataclasses.replace(TINY, depth=8, aux_head_depth=2)
    x, y, draws = step_inputs(6)
    saved = {}
    for mode in ("none", "block"):
        model = random_model(config, checkpointing=mode)
        saved[mode] = saved_bytes(lambda m=model: pmf.pmf_loss(m, x, y, draws, LOSS), model.parameters())
    assert saved["block"] < 0.3 * saved["none"]


def test_backward_recomputes_values_and_no_tangent():
    """Checkpointing adds at most one plain forward pass of the four blocks to the step."""
    x, y, draws = step_inputs(6)
    count = {}
    for mode in ("none", "block"):
        model = random_model(checkpointing=mode)
        count[mode] = operations(lambda m=model: pmf.pmf_loss(m, x, y, draws, LOSS).loss.backward())
    tokens = torch.randn(6, TINY.sequence_length, TINY.hidden_size, dtype=torch.float64)
    blocks = 4 * operations(lambda: model.shared_blocks[0](tokens, (model.rope_cos.double(), model.rope_sin.double())))
    assert 0.7 * blocks < count["block"] - count["none"] <= blocks


def test_unknown_modes_are_refused():
    with pytest.raises(pmf.InputError, match=r"checkpointing: expected one of .*, got 'layer'"):
        pmf.create_model(TINY, checkpointing="layer")
