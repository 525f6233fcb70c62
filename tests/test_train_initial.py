import dataclasses

import pytest
import torch

import pmf
from pmf.checkpoint import save_model
from pmf.train.initial import start_from
from tests.networks import TINY, random_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A network, and its file."""
    model = random_model(dtype=torch.float32)
    file = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_model(file, TINY, model.state_dict())
    return model, str(file)


def test_all_weights_are_copied(source):
    model = pmf.create_model(TINY)
    assert start_from(model, source[1]) == []
    assert all(torch.equal(value, source[0].state_dict()[name]) for name, value in model.state_dict().items())


def test_other_classes_start_afresh(source):
    model = pmf.create_model(dataclasses.replace(TINY, num_classes=7))
    before = model.conditioning.classes.weight.clone()
    (note,) = start_from(model, source[1])
    assert note.startswith("the table of 7 classes starts afresh") and note.endswith("has 5")
    assert torch.equal(model.conditioning.classes.weight, before)
    assert torch.equal(model.patch_embed.positions, source[0].patch_embed.positions)


def test_without_a_v_head_it_starts_as_the_u_head(source, tmp_path):
    file = tmp_path / "u.safetensors"
    save_model(file, TINY, {name: value for name, value in source[0].state_dict().items() if ".v." not in name})
    model = pmf.create_model(TINY)
    assert start_from(model, str(file)) == ["the v head starts as a copy of the u head"]
    state = model.state_dict()
    assert all(torch.equal(value, state[name.replace(".v.", ".u.")]) for name, value in state.items() if ".v." in name)


def test_a_published_checkpoint_gives_both_heads(source, tmp_path):
    state = {name: value for name, value in source[0].state_dict().items() if ".v." not in name}
    torch.save(pmf.export_official_state_dict(state, TINY), tmp_path / "published.pt")
    model = pmf.create_model(TINY)
    assert start_from(model, str(tmp_path / "published.pt")) == ["the v head starts as a copy of the u head"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name.replace(".v.", ".u.")]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depth=2), "init: .* holds 'shared_blocks.1.*', which this network has no place for"),
        (dict(depth=4), "init: .* lacks the weight 'shared_blocks.2"),
        (dict(hidden_size=64), "init: expected '.*' of shape"),
    ],
)
def test_another_network_is_refused(source, change, message):
    model = pmf.create_model(dataclasses.replace(TINY, **change))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(pmf.InputError, match=message):
        start_from(model, source[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
