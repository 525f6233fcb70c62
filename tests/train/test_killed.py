"""Runs killed without warning at random moments resume bit for bit."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from pmf.train.config import load_run_config
from pmf.train.demo import digits
from pmf.train.loop import Trainer
from tests.train.small_runs import ENVIRONMENT, SMALL_MODEL
from tests.train.test_distributed import free_port

STEPS = 60
RUN = f"--steps {STEPS} --batch-size 8 --device-batch 4 --save-every 2 --sample-every 30 --device cpu"
FLAGS = [*RUN.split(), *SMALL_MODEL]


def start(processes: int, arguments: list[str]) -> list[subprocess.Popen]:
    """Start the command line in one process, or in several as torchrun does."""
    command = [sys.executable, "-m", "pmf.train", "train", *arguments]
    if processes == 1:
        return [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)]
    common = ENVIRONMENT | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(processes))
    ranks = [common | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(processes)]
    return [subprocess.Popen(command, env=e, stdout=subprocess.DEVNULL) for e in ranks]


def complete(run: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*"))


def lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_at(jobs: list[subprocess.Popen], run: Path, line: int, delay: float) -> None:
    """Send SIGKILL to all, `delay` seconds after the metrics have `line` lines."""
    deadline = time.monotonic() + 240
    while lines(run) < line and all(job.poll() is None for job in jobs):
        assert time.monotonic() < deadline, "the run does not go on"
        time.sleep(0.002)
    time.sleep(delay)
    for job in jobs:
        job.send_signal(signal.SIGKILL)
    for job in jobs:
        job.wait()


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, by name."""
    trainer = Trainer(dataclasses.replace(load_run_config(run), resume=run), digits()[0])
    assert trainer.step == STEPS
    return flatten(trainer.state())


def flatten(node, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, torch.Tensor):
        return {name: node}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    return {key: value for k, child in items for key, value in flatten(child, f"{name}.{k}").items()}


def survive(folder: Path, kills: int, processes: int, seed: int = 0, flags: list[str] = FLAGS) -> list[int]:
    """Kill and resume a run `kills` times, and compare it with the same run left in peace.

    Return the steps that it resumed from.
    """
    peace, war = folder / "peace", folder / "war"
    assert all(job.wait() == 0 for job in start(processes, ["digits", "--out", str(peace), *flags]))
    moments = random.Random(seed)
    kept: list[int] = []
    for number in range(kills):
        begun = complete(war)
        arguments = ["--resume", str(war)] if begun else ["digits", "--out", str(war), *flags]
        # Up to the last step, and during the export after it.
        line = moments.randint(lines(war), min(STEPS, (number + 1) * STEPS // kills))
        kill_at(start(processes, arguments), war, line, moments.random() * 0.2)
        assert complete(war)[-1:] >= begun[-1:], "a checkpoint was lost"
        kept.append((complete(war) or [0])[-1])
    assert all(job.wait() == 0 for job in start(processes, ["--resume", str(war)] if complete(war) else []))
    expected, got = final_state(peace), final_state(war)
    assert expected.keys() == got.keys() and len(expected) > 100
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert (peace / "samples.png").read_bytes() == (war / "samples.png").read_bytes()
    return kept


SHARDED = ["--sharding", "zero1", "--ema-every", "3"]
HELD = ["--ema-device", "cpu", "--ema-every", "3"]
LESS = ["--checkpointing", "light", "--precision", "bfloat16", "--stream", "bfloat16"]


@pytest.mark.parametrize(
    ("processes", "kills", "more"), [(1, 2, []), (2, 1, []), (2, 1, SHARDED), (1, 1, HELD), (1, 1, LESS)]
)
def test_a_killed_run_resumes_bit_for_bit(tmp_path, processes, kills, more):
    """`python -m tests.train.test_killed` does the same with 20 kills."""
    survive(tmp_path, kills, processes, flags=[*FLAGS, *more])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            resumed = survive(Path(folder) / str(processes), 20, processes)
            print(f"{processes} processes: resumed from {resumed}, bit for bit", flush=True)
