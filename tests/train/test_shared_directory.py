"""Runs of several processes write one directory, which all must see, and agree on what is saved."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import pmf
from pmf.train import loop
from pmf.train.checkpoint_files import CheckedWriter
from pmf.train.distributed import World, join
from pmf.train.loop import Trainer
from pmf.train.snapshots import Snapshots
from tests.train.test_distributed import config, data, free_port


def enter(rank: int, port: int) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")


def on_two_disks(rank: int, port: int, folder: str) -> None:
    """The same relative path in two working directories, as a path on each machine's own disk is."""
    enter(rank, port)
    place = Path(folder) / f"machine-{rank}"
    place.mkdir()
    os.chdir(place)
    loop.PATIENCE = 0.5
    with pytest.raises(pmf.InputError, match=r"out: process 1 does not see run: expected a directory that all"):
        Trainer(config(Path("run"), sharding="ddp"), data())
    os._exit(0)  # for the reason given in train/__main__.py


def test_a_directory_on_each_machine_s_own_disk_is_refused(tmp_path):
    mp.spawn(on_two_disks, (free_port(), str(tmp_path)), nprocs=2)


def parts_on_two_disks(rank: int, port: int, folder: str) -> None:
    """Only the folder of checkpoints is not shared."""
    enter(rank, port)
    trainer = Trainer(config(Path(folder) / "run", sharding="ddp", steps=2), data())
    if rank == 1:
        trainer.snapshots.folder = Path(folder) / "other"
        (trainer.snapshots.folder / ".step-00000002").mkdir(parents=True)
    expected = "written elsewhere: expected a directory that all machines share; no checkpoint is complete"
    with pytest.raises(pmf.InputError, match=expected):
        trainer.run()
    assert not list((Path(folder) / "run" / "checkpoints").glob("step-*"))
    os._exit(0)


def test_a_checkpoint_whose_parts_are_apart_is_not_published(tmp_path):
    mp.spawn(parts_on_two_disks, (free_port(), str(tmp_path)), nprocs=2)


def one_is_done(rank: int, port: int, folder: str) -> None:
    """A snapshot that is on the disk of one process alone is pending in both; a failure is noticed in the same step."""
    enter(rank, port)
    world = join("cpu", "ddp")
    snapshots = Snapshots(Path(folder), world, 1)
    future: Future = Future()
    snapshots.pending = (1, future, CheckedWriter(folder))
    if rank == 0:
        future.set_exception(OSError(28, "No space left on device"))
    snapshots.publish(wait=False)
    assert snapshots.pending is not None
    world.wait()
    if rank == 1:
        future.set_exception(OSError(28, "No space left on device"))
    with pytest.raises(pmf.InputError, match="No space left on device; no checkpoint is complete"):
        snapshots.publish(wait=False)
    os._exit(0)


def test_processes_notice_together_that_a_checkpoint_failed(tmp_path):
    mp.spawn(one_is_done, (free_port(), str(tmp_path)), nprocs=2)


def test_a_part_that_vanishes_before_it_is_published_is_noticed(tmp_path):
    snapshots = Snapshots(tmp_path, World(torch.device("cpu")), 2)
    snapshots.prepare()
    for step in (1, 2, 3):
        snapshots.save(step, {"weight": torch.ones(3)})
    snapshots.pending[1].result()
    (part,) = (tmp_path / "checkpoints" / ".step-00000003").glob("*.distcp")
    part.unlink()
    with pytest.raises(pmf.InputError, match=f"{part.name} was written elsewhere"):
        snapshots.publish(wait=True)
    assert snapshots.steps() == [1, 2]
