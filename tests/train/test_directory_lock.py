"""A directory is locked while a process writes to it, and by no one else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

import pmf
from pmf.train.demo import digits
from pmf.train.directory_lock import LOCK_FILE, locked
from pmf.train.loop import Trainer
from tests.train.test_loop import config

HOLDER = """
import sys, time
from pathlib import Path
from pmf.train.directory_lock import locked
with locked(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    job = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "held\n"
    yield job
    job.kill()
    job.wait()


def test_the_owner_is_named_and_its_death_releases_the_lock(tmp_path, holder):
    for attempt in (
        lambda: Trainer(config(tmp_path / "run", overwrite=True), digits()[0]),
        locked(tmp_path / "run", "out").__enter__,
    ):
        with pytest.raises(pmf.InputError, match=rf"out: .*run is in use by process {holder.pid} on .*, since 20"):
            attempt()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    trainer.run()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_run_locks_its_directory_to_its_end(tmp_path):
    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    tried = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path / "run")], capture_output=True, text=True)
    assert f"in use by process {os.getpid()} on" in tried.stderr
    trainer.run()
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path / "run")], capture_output=True, timeout=15)


def test_a_forked_worker_neither_holds_nor_releases_it(tmp_path):
    with locked(tmp_path, "out"):
        worker = multiprocessing.get_context("fork").Process(target=int)
        worker.start()
        worker.join()
        tried = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True)
        assert "in use by process" in tried.stderr
        with locked(tmp_path, "out"):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "mine")
    with pytest.raises(pmf.InputError, match=r"out: cannot write .*run/\.lock: Too many levels of symbolic links"):
        locked(tmp_path / "run", "out").__enter__()
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("now", ["another's lock", "a file"])
def test_its_end_leaves_what_has_replaced_the_directory(tmp_path, now):
    run = tmp_path / "run"
    with locked(run, "out"):
        run.rename(tmp_path / "before")
        if now == "a file":
            run.touch()
        else:
            run.mkdir()
            (run / LOCK_FILE).touch()
    assert run.is_file() or (run / LOCK_FILE).exists()
