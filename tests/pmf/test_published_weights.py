from dataclasses import replace

import pytest
import torch

import pmf
from pmf.published_weights import ROPE
from tests.networks import golden, official_shapes


@pytest.mark.parametrize("name", official_shapes())
@pytest.mark.parametrize("aux_head", [True, False])
def test_published_names_and_shapes_load_and_convert_back(name, aux_head):
    """On meta tensors, so that the published sizes take no memory."""
    inference = lambda key: aux_head or not key.startswith("net.v_")  # noqa: E731
    shapes = {key: shape for key, shape in official_shapes()[name].items() if inference(key)}
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert pmf.infer_config(state) == pmf.MODELS[name]
    model = pmf.create_model(name, aux_head=aux_head, device="meta")
    converted = pmf.convert_official_state_dict(state)
    model.load_state_dict(converted, strict=True, assign=True)
    back = pmf.export_official_state_dict(converted, model.config)
    assert {key: list(value.shape) for key, value in back.items()} == shapes


def test_values_come_back_unchanged():
    state = golden().state
    back = pmf.export_official_state_dict(pmf.convert_official_state_dict(state), golden().config)
    rope = back.pop(ROPE)
    assert rope.dtype == torch.complex64
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert pmf.convert_official_state_dict(back | {ROPE: rope}).keys() == golden().model().state_dict().keys()


def test_the_prefix_is_on_every_key_or_on_none():
    state = golden().state
    bare = {key.removeprefix("net."): value for key, value in state.items()}
    expected = pmf.convert_official_state_dict(state)
    got = pmf.convert_official_state_dict(bare)
    assert pmf.infer_config(bare) == golden().config and got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    mixed = state | {"pos_embed": state["net.pos_embed"]}
    for read in (pmf.infer_config, pmf.convert_official_state_dict):
        with pytest.raises(
            pmf.InputError, match=r'expected the prefix "net." on every key or on none, got \'pos_embed\''
        ):
            read(mixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("net.pos_embed"), "key 'net.pos_embed' is missing"),
        (lambda s: s.pop("net.u_heads.1.mlp_scale"), "key 'net.u_heads.1.mlp_scale' is missing"),
        (lambda s: s.update({"net.extra": torch.ones(1)}), "unexpected key 'net.extra'"),
        (
            lambda s: s.update({"net.shared_blocks.0.norm1.weight": torch.ones(65)}),
            r"'net.shared_blocks.0.norm1.weight' must have shape \[64\], got \[65\]",
        ),
        (
            lambda s: s.update({ROPE: torch.ones(64, 8, dtype=torch.complex64)}),
            "'net.rope_freqs' holds other rotary angles",
        ),
        (lambda s: s.update({"net.pos_embed": torch.ones(4)}), "'net.pos_embed' must have 3 dimensions, got"),
        (lambda s: s.clear(), "key 'net.class_tokens' is missing, expected a published pMF checkpoint"),
    ],
)
def test_the_first_wrong_key_is_named(change, message):
    state = dict(golden().state)
    change(state)
    with pytest.raises(pmf.InputError, match=message):
        pmf.convert_official_state_dict(state)


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        ({}, dict(hidden_size=128), r"'conditioning.tokens.y' must have shape \[\d+, 128\], got"),
        ({}, dict(num_heads=2), r"'shared_blocks.0.attn.q_norm.weight' must have shape \[\d+\], got"),
        ({"extra": torch.ones(1)}, {}, "unexpected key 'extra'"),
        ({"patch_embed.positions": 3}, {}, "patch_embed.positions: expected a tensor, got int"),
    ],
)
def test_weights_of_another_configuration_are_not_exported(change, sizes, message):
    state = golden().model().state_dict() | change
    with pytest.raises(pmf.InputError, match=message):
        pmf.export_official_state_dict(state, replace(golden().config, **sizes))


def test_adaln_has_no_published_format():
    config = pmf.ModelConfig(**{**golden().config.__dict__, "conditioning": "adaln"})
    with pytest.raises(pmf.InputError, match="needs \"in_context\", got 'adaln'"):
        pmf.export_official_state_dict({}, config)
