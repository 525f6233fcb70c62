"""Presets, and the launch scripts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pmf
from pmf.train.config import RunConfig
from pmf.train.presets import PRESETS, run_preset

LAUNCH = Path(__file__).parents[2] / "train" / "launch"


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("pMF-")])
def test_published_presets_are_the_published_settings(name):
    run = PRESETS[name]
    assert run.model == pmf.MODELS[name] and run.loss == pmf.LOSSES[name]
    assert (run.batch_size, run.steps) == (1024, 400_364)  # 320 epochs of 1,281,167 images
    assert run.optimizer.learning_rate == 1e-3 and run.optimizer.decay_share == run.optimizer.clip_norm == 0
    assert run.ema_half_lives == (500, 1000, 2000) and run.perceptual.enabled
    sampling = pmf.SAMPLING[name]
    assert (run.sampling.omega, run.sampling.t_min, run.sampling.t_max) == tuple(sampling.values())


def test_eight_processes_share_the_published_batch_evenly():
    for name, run in PRESETS.items():
        assert run.device_batch is None or run.batch_size % (8 * run.device_batch) == 0, name


def test_an_unknown_preset_names_the_known_ones():
    assert run_preset("digits") == RunConfig()
    with pytest.raises(pmf.InputError, match=r"preset: expected one of digits, .*, got 'pMF-X'"):
        run_preset("pMF-X")


def launch(script: str, *arguments: str, **environment: str) -> str:
    python = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_torchrun_script_trains_and_continues(tmp_path):
    out = str(tmp_path / "run")
    launch("torchrun.sh", "digits", out, "--steps", "1", "--device", "cpu", "--batch-size", "8", GPUS="2")
    assert launch("torchrun.sh", "digits", out, "--steps", "2", GPUS="1").count("run: ") == 1
    assert (
        os.listdir(tmp_path / "run" / "checkpoints")
        and len((tmp_path / "run/metrics.jsonl").read_text().split("\n")) == 3
    )


def slurm(folder: Path, **programs: str) -> subprocess.Popen:
    """Start slurm.sh on one node with two processes, with stand-ins for these programs."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sh"), "digits", "runs/x", "--steps", "2"],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(
            PATH=f"{folder}:{os.environ['PATH']}",
            SLURM_JOB_NODELIST="node[7]",
            SLURM_NTASKS="2",
            SLURM_NTASKS_PER_NODE="2",
            SLURM_CPUS_PER_TASK="12",
            SLURM_JOB_ID="1",
        ),
    )


def test_slurm_script_gives_every_process_its_ranks(tmp_path):
    """The second process runs."""
    job = slurm(
        tmp_path,
        scontrol="echo node7",
        srun='shift 2\nSLURM_PROCID=1 SLURM_LOCALID=1 exec "$@"',
        python='echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR "$@"',
    )
    told = job.communicate()[0]
    assert (
        told.split("\n")[0] == "1 1 2 2 node7 -m pmf.train train digits --out runs/x --steps 2" and not job.returncode
    )


@pytest.mark.parametrize(("end", "status"), [("exit 0", 0), ("exit 2", 2), ("trap - USR1; kill -USR1 $$", 138)])
def test_slurm_script_requeues_the_job_however_the_run_ends(tmp_path, end, status):
    """A signal that comes while the run starts ends it before it can save."""
    job = slurm(tmp_path, scontrol='echo "$@"', srun=f"trap '{end}' USR1; echo begun; sleep 30 & wait")
    assert job.stdout.readline() == "begun\n"
    job.send_signal(signal.SIGUSR1)
    assert job.stdout.readline() == "requeue 1\n" and job.wait() == status
