import dataclasses

import pytest
import torch

import pmf
from pmf.checkpoint import save_model
from pmf.train.initial import start_from
from tests.networks import TINY, random_model


@pytest.fixture
def published(tmp_path):
    """A checkpoint as the published ones are: their names, no v head."""
    state = random_model(dtype=torch.float32).state_dict()
    state = {name: value for name, value in state.items() if ".v." not in name}
    torch.save(pmf.export_official_state_dict(state, TINY), tmp_path / "published.pt")
    return tmp_path / "published.pt", state


def test_a_published_checkpoint_gives_both_heads(published):
    file, state = published
    model = pmf.create_model(pmf.infer_config(torch.load(file)))
    notes = start_from(model, str(file))
    assert notes == ["the v head starts as a copy of the u head"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name.replace(".v.", ".u.")]), name


def test_another_number_of_classes_starts_its_table_afresh(tmp_path):
    source = random_model(dtype=torch.float32)
    save_model(tmp_path / "model.safetensors", TINY, source.state_dict())
    model = pmf.create_model(dataclasses.replace(TINY, num_classes=3))
    table = model.conditioning.classes.weight.clone()
    (note,) = start_from(model, str(tmp_path / "model.safetensors"))
    assert "3 classes starts afresh" in note and torch.equal(model.conditioning.classes.weight, table)
    assert torch.equal(model.final_layers["v"].linear.weight, source.final_layers["v"].linear.weight)


def test_another_network_is_refused_and_nothing_changes(tmp_path):
    save_model(tmp_path / "model.safetensors", TINY, random_model(dtype=torch.float32).state_dict())
    model = pmf.create_model(dataclasses.replace(TINY, depth=4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(pmf.InputError, match=r"init: .* lacks the weight 'shared_blocks.2"):
        start_from(model, str(tmp_path / "model.safetensors"))
    with pytest.raises(pmf.InputError, match=r"init: expected 'conditioning.classes.weight' of shape"):
        start_from(pmf.create_model(dataclasses.replace(TINY, hidden_size=48)), str(tmp_path / "model.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
