"""Two processes of one run, of which one is hurt: the other one ends too, soon and with one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.train.small_runs import ENVIRONMENT
from tests.train.test_distributed import free_port
from tests.train.test_endings import FLAGS, wait_for_steps
from tests.train.test_killed import complete, lines

RANK = """
import os, sys
from pmf.train import snapshots
from pmf.train.__main__ import run
from pmf.train.learner import Learner

def when(step, act, step_of=Learner.train_step):
    def train_step(self, *inputs):
        if self.step == step:
            act()
        return step_of(self, *inputs)
    Learner.train_step = train_step

def fails(*_, **__):
    raise OSError(5, "Input/output error")

HURT
sys.argv[1:1] = ["digits", "--save-every", "3"]
sys.exit(run())
"""
CASES = {
    "killed": (1, "when(5, lambda: os.kill(os.getpid(), 9))", "another process of this command ended, and this one wi"),
    "rename": (
        0,
        "snapshots._synchronise = fails",
        "path: cannot write RUN/checkpoints/step-00000003: Input/output error",
    ),
    "copy": (1, "snapshots.dcp.async_save = fails", "path: cannot write RUN/checkpoints/step-00000003: Input/output "),
}


@pytest.mark.parametrize("case", CASES)
def test_one_process_that_fails_ends_all(tmp_path, case):
    run, (hurt, code, told) = tmp_path / "run", CASES[case]
    common = ENVIRONMENT | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.replace("HURT", code * (rank == hurt)), "--out", str(run), *FLAGS],
            env=common | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [job.communicate(timeout=120)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert not any("Traceback" in text for text in errors), errors
    assert f"pmf: {told.replace('RUN', str(run))}" in errors[hurt if case != "killed" else 0]
    assert [job.returncode for job in jobs] == ([2, -9] if case == "killed" else [2, 2])
    assert complete(run) in ([[], [3]] if case == "killed" else [[]])  # the other's part of step 3 may be lost with it


def test_a_run_whose_torchrun_is_killed_saves_and_ends(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pmf.train", "digits", "--out", str(tmp_path / "run"), "--steps", "100000", *FLAGS]
    job = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "run", 3, job)
    job.kill()
    told, errors = job.communicate(timeout=20)  # it waits for all that hold the pipes
    assert "SIGTERM: the run saves" in errors and "Traceback" not in errors
    assert f"the run is saved at step {lines(tmp_path / 'run')}" in told
