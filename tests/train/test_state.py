"""Where the state of a run is: sharded over processes, on the host, and carried from one way to another."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import pmf
from pmf.optim import EMA, Averages
from pmf.sharded import full, local
from pmf.train import learner
from pmf.train.config import load_run_config
from pmf.train.demo import digits
from pmf.train.loop import Trainer
from tests.train.test_distributed import config, data, free_port
from tests.train.test_killed import flatten
from tests.train.test_loop import break_steps, losses, train
from tests.train.test_loop import config as small_config

CHAIN = (("ddp", 1, 1), ("zero1", 4, 2), ("fsdp", 2, 3), ("zero1", 2, 4), ("ddp", 2, 5))
"""(sharding, processes, step at its end) of a run that goes on in another way each time."""
LAST = CHAIN[-1][-1]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor of the state by name, this process's part."""
    return {name: local(value) for name, value in flatten(trainer.state()).items()}


def run(out: Path, sharding: str, steps: int, rank: int = 0) -> None:
    """Go on with the run in `out` to that step; the state is in float64. Store the state, in shards and whole."""
    torch.set_default_dtype(torch.float64)
    change = dict(steps=steps, sharding=sharding, impl="reference", ema_every=3)
    begun = (out / "config.json").exists()
    trainer = Trainer(config(out, **change, **(dict(resume=out) if begun else {})), data())
    trainer.run()
    held = state_of(trainer)
    whole = {name: full(value).clone() for name, value in flatten(trainer.state()).items()}
    pending = {name: dict(ema.pending) for name, ema in trainer.emas.items()}
    torch.save((held, whole, pending), out / f"{sharding}-{trainer.world.size}-{rank}.pt")


def worker(rank: int, size: int, port: int, out: str, sharding: str, steps: int) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    learner.Averages = partial(Averages, background=True)
    run(Path(out), sharding, steps, rank)
    torch.distributed.destroy_process_group()
    os._exit(0)  # for the reason given in train/__main__.py


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The directory of a run that changed its way, and that of the same run in one process."""
    whole, parts = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("parts") / "run"
    try:
        run(whole, "ddp", LAST)
        for sharding, size, steps in CHAIN:
            if size == 1:
                run(parts, sharding, steps)
            else:
                mp.spawn(worker, (size, free_port(), str(parts), sharding, steps), nprocs=size)
    finally:
        torch.set_default_dtype(torch.float32)
    return whole, parts


def test_a_run_goes_on_with_another_sharding_on_other_numbers_of_processes(chain):
    """Steps 3 and 6 would move the averages: two steps are pending when the first zero1 run hands over to fsdp."""
    (_, expected, pending), (_, result, left) = (
        torch.load(f) for f in (chain[0] / "ddp-1-0.pt", chain[1] / "ddp-2-0.pt")
    )
    assert expected.keys() == result.keys() and len(expected) > 100
    for name, value in expected.items():
        assert (result[name] - value).abs().max() <= 1e-12, name
    assert pending == left and {p["updates"] for p in left.values()} == {2}


@pytest.mark.parametrize(("sharding", "size"), [("zero1", 4), ("zero1", 2)])
def test_each_process_holds_its_share_of_the_state(chain, sharding, size):
    """Of every moment and average with a row for each process: its rows. The others are small."""
    total, small, shares = 0, 0, []
    for rank in range(size):
        held, whole, _ = torch.load(chain[1] / f"{sharding}-{size}-{rank}.pt")
        state = [name for name in whole if name.startswith((".emas", ".optimizers"))]
        assert all(torch.equal(held[name], whole[name]) for name in whole.keys() - state)  # the network is replicated
        rows = {name: -(-len(whole[name]) // size) for name in state if whole[name].ndim and len(whole[name]) >= size}
        for name in state:
            value = whole[name]
            mine = value[rank * rows[name] :][: rows[name]] if name in rows else value
            assert torch.equal(held[name], mine), name
            assert held[name].untyped_storage().nbytes() == mine.nbytes, name
        total = sum(whole[name].nbytes for name in state)
        small = sum(whole[name].nbytes for name in state if name not in rows)
        shares.append(sum(held[name].nbytes for name in state))
    assert small < 0.05 * total and sum(shares) == total - small + size * small
    assert max(shares) < 1.1 * total / size


@pytest.fixture
def beside(monkeypatch):
    """Averages that move on a thread even where the network is on the CPU too."""
    monkeypatch.setattr(learner, "Averages", partial(Averages, background=True))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with averages of every third step, where the network is."""
    return train(small_config(tmp_path_factory.mktemp("plain") / "run", ema_every=3, steps=8))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    names = ("model", "ema_500", "ema_1000", "ema_2000")
    models = {name: pmf.PMFDiT.from_pretrained(directory, weights=name) for name in names}
    return {f"{name} {key}": value for name, model in models.items() for key, value in model.state_dict().items()}


def same_run(a: Path, b: Path) -> bool:
    pictures = (a / "samples.png").read_bytes() == (b / "samples.png").read_bytes()
    pair = weights(a), weights(b)
    return (
        pictures and losses(a) == losses(b) and all(torch.equal(value, pair[1][key]) for key, value in pair[0].items())
    )


@pytest.mark.parametrize("stop", [4, 5, 6])
def test_averages_on_a_thread_are_those_of_the_run_without_one(plain, tmp_path, beside, stop):
    """The run stops between updates of the averages, resumes, saves and samples."""
    part = train(small_config(tmp_path / "run", ema_every=3, ema_device="cpu", steps=stop, sample_every=2))
    train(dataclasses.replace(load_run_config(part), resume=part, steps=8))
    assert same_run(part, plain)


def test_averages_that_have_not_moved_are_told_apart(tmp_path, caplog):
    train(small_config(tmp_path / "run", ema_every=3, steps=4, sample_every=1))
    late = "ema_every: averages first move in step 3; until then they are what the run started from"
    assert caplog.messages.count(late) == 2  # steps 1 and 2


def test_averages_on_a_thread_are_evaluated(tmp_path, monkeypatch):
    """The weights that are measured are those of the run without a thread, between updates and after one."""
    found = []
    for background in (False, True):
        monkeypatch.setattr(learner, "Averages", partial(Averages, background=background))
        out = train(small_config(tmp_path / str(background), ema_every=2, steps=3, eval_every=1))
        lines = [json.loads(line) for line in (out / "eval/results.jsonl").read_text().splitlines()]
        found.append([{k: v for k, v in line.items() if k != "source"} for line in lines])
    assert len(found[0]) == 3 and found[0] == found[1]


def test_averages_on_a_thread_may_be_left_for_others(plain, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(learner, "Averages", partial(Averages, background=True))
        part = train(small_config(tmp_path / "run", ema_every=3, ema_device="cpu", steps=4))
    train(dataclasses.replace(load_run_config(part), resume=part, steps=8, ema_device="auto"))
    assert same_run(part, plain)


def test_a_checkpoint_without_pending_updates_resumes(tmp_path):
    """As earlier versions wrote them, which updated averages in every step."""
    trainer = Trainer(small_config(tmp_path / "run", steps=2, save_every=7), digits()[0])
    batches = trainer._loader()
    for _ in range(2):
        trainer.train_step(*next(batches))
    state = trainer.state()
    assert state.pop("ema_pending")["ema_500"] == {"beta": 1.0, "updates": 0}
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer.snapshots.save(2, state)
    trainer.snapshots.publish(wait=True)
    trainer.lock.close()
    resumed = Trainer(small_config(tmp_path / "run", resume=tmp_path / "run", steps=4, ema_every=3), digits()[0])
    averages = zip(trainer.emas.values(), resumed.emas.values(), strict=True)
    assert resumed.step == 2 and all(
        torch.equal(value, new.average[name]) for old, new in averages for name, value in old.average.items()
    )
    resumed.run()
    assert {ema.pending["updates"] for ema in resumed.emas.values()} == {2}


def test_an_error_of_the_thread_stops_the_run_and_saves_nothing_half_done(tmp_path, beside, monkeypatch):
    """The snapshot that is being written then is finished."""
    trainer, moved, move = Trainer(small_config(tmp_path / "run", save_every=2), digits()[0]), [], EMA.move
    publish = trainer.snapshots.publish
    monkeypatch.setattr(trainer.snapshots, "publish", lambda wait: publish(wait) if wait else None)

    def fail(*arguments):
        moved.append(1)
        if len(moved) == 3 * 2 + 2:  # the second average of the third step
            raise MemoryError("no room")
        move(*arguments)

    monkeypatch.setattr(EMA, "move", fail)
    with pytest.raises(MemoryError, match="no room"):
        trainer.run()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000002"]
    whole = train(small_config(tmp_path / "whole"))
    train(small_config(tmp_path / "run", resume=tmp_path / "run"))
    assert same_run(tmp_path / "run", whole)


def test_skipped_steps_do_not_count(tmp_path):
    """Neither as an update nor in the product of the betas."""
    trainer = Trainer(small_config(tmp_path / "run", ema_every=2, ema_half_lives=(500.0,)), digits()[0])
    batches = trainer._loader()
    trainer.train_step(*next(batches))
    before = dict(trainer.emas["ema_500"].pending)
    x, y = next(batches)
    break_steps(trainer, (1,))
    trainer.train_step(x, y)
    assert trainer.skipped == 1 and trainer.emas["ema_500"].pending == before and before["updates"] == 1
    trainer.train_step(x, y)
    assert trainer.emas["ema_500"].pending["updates"] == 0
