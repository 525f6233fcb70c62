import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import pmf
from pmf.fine_tuning import copy_weights
from pmf.jax_states import TrainState
from pmf.optim import split_parameters
from pmf.optim.authors_state import check_fits, fill_run
from pmf.sharded import full
from pmf.train.loop import Trainer
from pmf.weights import save_model
from tests.networks import TINY, random_model
from tests.train.test_distributed import config, data, free_port


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A network and its file."""
    model = random_model(dtype=torch.float32)
    file = tmp_path_factory.mktemp("source") / "model.safetensors"
    save_model(file, TINY, model.state_dict())
    return model, str(file)


def test_all_weights_are_copied(source):
    model = pmf.create_model(TINY)
    assert copy_weights(model, source[1]) == []
    assert all(torch.equal(value, source[0].state_dict()[name]) for name, value in model.state_dict().items())


def test_other_classes_start_afresh(source):
    model = pmf.create_model(dataclasses.replace(TINY, num_classes=7))
    before = model.conditioning.classes.weight.clone()
    (note,) = copy_weights(model, source[1])
    assert note.startswith("the table of 7 classes is initialised at random") and note.endswith("has 5")
    assert torch.equal(model.conditioning.classes.weight, before)
    assert torch.equal(model.patch_embed.positions, source[0].patch_embed.positions)


def test_without_a_v_head_it_starts_as_the_u_head(source, tmp_path):
    file = tmp_path / "u.safetensors"
    save_model(file, TINY, {name: value for name, value in source[0].state_dict().items() if ".v." not in name})
    model = pmf.create_model(TINY)
    assert copy_weights(model, str(file)) == ["the v head starts as a copy of the u head"]
    state = model.state_dict()
    assert all(torch.equal(value, state[name.replace(".v.", ".u.")]) for name, value in state.items() if ".v." in name)


def test_a_published_checkpoint_gives_both_heads(source, tmp_path):
    state = {name: value for name, value in source[0].state_dict().items() if ".v." not in name}
    torch.save(pmf.export_official_state_dict(state, TINY), tmp_path / "published.pt")
    model = pmf.create_model(TINY)
    assert copy_weights(model, str(tmp_path / "published.pt")) == ["the v head starts as a copy of the u head"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name.replace(".v.", ".u.")]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depth=2), "source: .* holds 'shared_blocks.1.*', which this network does not have"),
        (dict(depth=4), "source: .* lacks the weight 'shared_blocks.2"),
        (dict(hidden_size=64), "source: expected '.*' of shape"),
    ],
)
def test_another_network_is_refused(source, change, message):
    model = pmf.create_model(dataclasses.replace(TINY, **change))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(pmf.InputError, match=message):
        copy_weights(model, source[1])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def train_state(network=TINY) -> TrainState:
    """A state with random values everywhere."""
    model = random_model(network, dtype=torch.float32)
    chosen = {id(p) for p in split_parameters(model)[0]}
    draw = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    muon = {name: draw[name] for name, p in model.named_parameters() if id(p) in chosen}
    adam = {name: (value, value + 1) for name, value in draw.items() if name not in muon}
    averages = {f"ema_{k}": random_model(network, seed=k, dtype=torch.float32).state_dict() for k in (500, 1000, 2000)}
    return TrainState(3, network, model.state_dict(), averages, muon, adam, 2)


def filled(trainer: Trainer, state: TrainState | None) -> dict[str, torch.Tensor]:
    """Give the state to the trainer; return all values that the trainer then holds."""
    fill_run(state, 2, trainer.model, trainer.emas, trainer.optimizers)
    held = {f"model {name}": value for name, value in trainer.model.state_dict().items()}
    held |= {f"{k} {name}": v for k, ema in trainer.emas.items() for name, v in ema.state_dict().items()}
    for name, p in trainer.model.named_parameters():
        moments = trainer.optimizers["muon"].state.get(p) or trainer.optimizers["adam"].state[p]
        held |= {f"{key} {name}": value for key, value in moments.items()}
    return {key: full(value).detach().clone() for key, value in held.items()}


def expected(state: TrainState) -> dict[str, torch.Tensor]:
    """The values that it must hold; of the averages only that of 500, as the run has no other."""
    held = {f"model {name}": value for name, value in state.model.items()}
    held |= {f"ema_500 {name}": value for name, value in state.averages["ema_500"].items()}
    held |= {f"momentum_buffer {name}": value for name, value in state.muon.items()}
    for place, key in enumerate(("exp_avg", "exp_avg_sq")):
        held |= {f"{key} {name}": moments[place] for name, moments in state.adam.items()}
    return held | {f"step {name}": torch.tensor(2.0) for name in state.model}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def test_a_run_takes_everything_of_a_train_state(tmp_path):
    trainer, state = Trainer(config(tmp_path / "run"), data()), train_state()
    check_fits(state, trainer.model, trainer.emas, trainer.optimizers)
    assert same(filled(trainer, state), expected(state))
    with pytest.raises(pmf.InputError, match="ema_half_lives: init holds ema_500, ema_1000, ema_2000, got ema_7"):
        check_fits(state, trainer.model, {"ema_7": None}, trainer.optimizers)
    moved = dataclasses.replace(state, muon={k: v for k, v in state.muon.items() if "w2" not in k})
    with pytest.raises(pmf.InputError, match=r"init: expected 'shared_blocks.0.mlp.w2.weight of momentum_buffer'"):
        check_fits(moved, trainer.model, trainer.emas, trainer.optimizers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depth=2), "init: expected 'shared_blocks.1.*' of shape None, got"),
        (dict(num_classes=7), r"init: expected 'conditioning.classes.weight' of shape \[6, 32\], got \[8, 32\]"),
    ],
)
def test_a_train_state_of_another_network_is_refused(tmp_path, change, message):
    """Also with other classes: averages and moments belong to the classes that they were trained on."""
    small = dataclasses.replace(TINY, **change)
    networks = (TINY, small) if change == dict(num_classes=7) else (small, TINY)
    trainer = Trainer(config(tmp_path / "run", model=networks[0]), data())
    with pytest.raises(pmf.InputError, match=message):
        check_fits(train_state(networks[1]), trainer.model, trainer.emas, trainer.optimizers)


def worker(rank: int, port: int, out: str, source: str) -> None:
    """Only the main process sees the file and the state."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", OMP_NUM_THREADS="1")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for sharding in ("ddp", "zero1", "fsdp"):
        own = source if rank == 0 else "not there"
        trainer = Trainer(config(Path(out) / sharding, sharding=sharding, init=own), data())
        started = {name: full(p).detach().clone() for name, p in trainer.model.named_parameters()}
        held = filled(trainer, train_state() if rank == 0 else None)
        torch.save((started, held), Path(out) / f"{sharding}-{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # for the reason given in train/__main__.py


def test_one_process_reads_for_all(source, tmp_path):
    mp.spawn(worker, (free_port(), str(tmp_path), source[1]), nprocs=2)
    for sharding in ("ddp", "zero1", "fsdp"):
        for rank in range(2):
            started, held = torch.load(tmp_path / f"{sharding}-{rank}.pt")
            assert same(started, source[0].state_dict()) and same(held, expected(train_state()))
