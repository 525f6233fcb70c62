"""Every end of a run but SIGKILL saves it, and no output can stop it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch

import pmf
from pmf.data import CorruptImageError, Loader
from pmf.train.config import load_run_config
from pmf.train.demo import digits
from pmf.train.loop import Trainer
from pmf.train.progress import Progress
from pmf.train.stop_signals import Stopped, never
from tests.train.small_runs import ENVIRONMENT, SMALL_MODEL
from tests.train.test_distributed import free_port
from tests.train.test_killed import complete, lines
from tests.train.test_loop import break_steps, config, losses, train

FLAGS = ["--batch-size", "8", "--device", "cpu", *SMALL_MODEL]


def start(out: Path, *flags: str, **options) -> subprocess.Popen:
    """Start a small run of the command line."""
    command = [sys.executable, "-m", "pmf.train", "digits", "--out", str(out), *FLAGS, *flags]
    return subprocess.Popen(command, env=ENVIRONMENT, **options)


def wait_for_steps(run: Path, count: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while lines(run) < count:
        assert job.poll() is None and time.monotonic() < deadline, "the run does not go on"
        time.sleep(0.02)


def test_the_first_signal_says_that_the_run_saves_and_further_ones_change_nothing(tmp_path, capsys):
    trainer = Trainer(config(tmp_path / "run", save_every=100), digits()[0])
    gradients = trainer._gradients

    def interrupted(*batch):
        if trainer.step == 1:
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
                os.kill(os.getpid(), number)
        return gradients(*batch)

    trainer._gradients = interrupted
    trainer.run()
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if line.startswith("SIG")]
    assert told[0].startswith("SIGINT: the run saves and stops after the step it is in (kill -9 ")
    assert len(told) == 4 and all("is still about to save" in line for line in told[1:])
    assert "stopped at step 2; the run is saved at step 2; continue with --resume" in captured.out
    assert complete(tmp_path / "run") == [2]


class Unreadable:
    """Digits of which those after the first `readable` reads cannot be read."""

    def __init__(self, readable: int) -> None:
        self.data, self.left = digits()[0], readable

    def __getattr__(self, name):
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index):
        self.left -= 1
        if self.left < 0:
            raise CorruptImageError(f"image {index}", "gone")
        return self.data.read(index)


class Stuck(Unreadable):
    """Digits whose reading does not end, after the first ones."""

    def read(self, index):
        self.left -= 1
        if self.left < 0:
            time.sleep(600)
        return self.data.read(index)


@pytest.mark.parametrize("workers", (0, 1))
def test_a_stop_signal_ends_the_wait_for_images(tmp_path, workers):
    trainer = Trainer(config(tmp_path / "run", workers=workers), Stuck(20))
    timer = threading.Timer(8, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    trainer.run()
    assert time.monotonic() - began < 20 and complete(tmp_path / "run") == [2]


def test_a_stop_signal_ends_the_computation_of_a_reference(tmp_path, capsys):
    class Preparing:
        def prepare(self, stopping=never):
            os.kill(os.getpid(), signal.SIGINT)
            if stopping():
                raise Stopped

    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    trainer.evaluation = Preparing()
    trainer.run()
    captured = capsys.readouterr()
    assert captured.err.startswith("\nSIGINT: the run saves and stops") and trainer.step == 0
    assert captured.out == "stopped at step 0; the run is not saved\n"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGQUIT"])
def test_a_signal_that_is_ignored_on_entry_stays_ignored(tmp_path, name):
    """A hangup under nohup; Ctrl-C in the background of a script, where it is meant for others."""
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        trainer = Trainer(config(tmp_path / "run"), digits()[0])
        gradients = trainer._gradients
        trainer._gradients = lambda *batch: (os.kill(os.getpid(), number), gradients(*batch))[1]
        trainer.run()
        assert trainer.step == 6 and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_saves_the_run(tmp_path):
    """The kernel sends SIGHUP to the terminal's session, and every later write to it fails."""
    ours, theirs = os.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    job = start(
        tmp_path / "run",
        "--steps",
        "100000",
        "--workers",
        "1",
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        wait_for_steps(tmp_path / "run", 3, job)
    finally:
        os.close(ours)
    assert job.wait(timeout=20) == 0
    assert complete(tmp_path / "run")[-1] == lines(tmp_path / "run") < 100000


@pytest.mark.parametrize("closed", ["reader", "descriptor"])
def test_a_dead_reader_of_the_output_stops_nothing(tmp_path, closed):
    ours, theirs = os.pipe()
    job = start(
        tmp_path / "run",
        "--steps",
        "6",
        stdout=theirs,
        stderr=theirs,
        preexec_fn=(lambda: (os.close(1), os.close(2))) if closed == "descriptor" else None,
    )
    os.close(theirs)
    os.close(ours)
    assert job.wait(timeout=120) == 0 and complete(tmp_path / "run") == [6]
    assert (tmp_path / "run" / "samples.png").exists()


def failing(trainer: Trainer, step: int, name: str, error: BaseException) -> None:
    method = getattr(trainer, name)

    def fails(*inputs):
        result = method(*inputs)
        if trainer.step == step:
            raise error
        return result

    setattr(trainer, name, fails)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), KeyboardInterrupt()])
def test_a_step_that_fails_is_saved_as_it_was_before(tmp_path, error, capsys):
    whole = train(config(tmp_path / "whole"))
    trainer = Trainer(config(tmp_path / "run", save_every=100), digits()[0])
    failing(trainer, 4, "_gradients", error)
    with pytest.raises(type(error)):
        trainer.run()
    assert complete(tmp_path / "run") == [4]
    assert "failed after step 4; the run is saved at step 4; continue with --resume" in capsys.readouterr().out
    train(dataclasses.replace(load_run_config(tmp_path / "run"), resume=tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(whole)


def test_half_an_update_is_not_saved(tmp_path):
    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    failing(trainer, 4, "_update", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.run()
    assert complete(tmp_path / "run") == [3]


def test_data_that_cannot_be_read_any_more_save_the_run(tmp_path):
    trainer = Trainer(config(tmp_path / "run", save_every=100, max_corrupt=2), Unreadable(30))
    with pytest.raises(pmf.InputError, match=r"expected at most 2 unreadable images, the last one is image .*: gone"):
        trainer.run()
    assert complete(tmp_path / "run") == [3] and lines(tmp_path / "run") == 3


RANK = """
import sys
from pathlib import Path
from pmf.train.cli import main
from pmf.train import loop
from tests.train.test_endings import Unreadable, digits
loop.open_data = lambda *_: Unreadable(30) if sys.argv[1] == "1" else digits()[0]
main(["digits", "--out", sys.argv[2], "--max-corrupt", "2", *sys.argv[3:]])
"""


def test_one_process_whose_data_cannot_be_read_saves_and_ends_all(tmp_path):
    common = ENVIRONMENT | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2")
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "run"), *FLAGS],
            env=common | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    said = [line for text in errors for line in text.splitlines() if line.startswith("pmf: ")]
    told = [line for line in said if not line.startswith("pmf: warning: unreadable image ")]
    assert [job.returncode for job in jobs] == [2, 2]
    assert len(told) == 1 and "expected at most 2 unreadable images" in told[0], errors
    assert complete(tmp_path / "run") == [7]  # four images a step


def test_nothing_is_saved_while_steps_are_skipped_and_then_as_soon_as_one_is_taken(tmp_path, caplog):
    trainer = Trainer(config(tmp_path / "run", steps=8, keep_checkpoints=10, sample_every=4), digits()[0])
    export, exported = trainer._export, []
    trainer._export = lambda: exported.append((trainer.step, export(), trainer.unexported))
    break_steps(trainer, (2, 3, 4))
    trainer.run()
    assert complete(tmp_path / "run") == [6, 8]
    assert exported == [(4, None, True), (6, None, False), (8, None, False)]
    assert "step 3 is not saved: the last 1 steps were skipped" in caplog.messages


def test_a_run_whose_every_step_was_skipped_does_not_end_as_if_it_had_trained(tmp_path):
    trainer = Trainer(config(tmp_path / "run", steps=3), digits()[0])
    break_steps(trainer, (0, 1, 2))
    with pytest.raises(pmf.InputError, match="steps: nothing is saved: the last 3 steps were skipped"):
        trainer.run()
    assert not list((tmp_path / "run").glob("*.safetensors")) and not (tmp_path / "run" / "samples.png").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, caplog):
    trainer = Trainer(config(tmp_path / "run", max_skipped=2), digits()[0])
    update = trainer._update

    def poisoned(record):
        update(record)
        if trainer.step == 2:
            trainer.model.get_parameter("shared_blocks.0.attn.out_proj.weight").data[0, 0] = float("inf")

    trainer._update = poisoned
    with pytest.raises(pmf.InputError, match="loss: not finite at step 6 and 2 before it"):
        trainer.run()
    assert complete(tmp_path / "run") == []
    assert any(
        "step 3 is not saved: model.shared_blocks.0.attn.out_proj.weight is not finite" in m for m in caplog.messages
    )
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_pictures_that_cannot_be_drawn_stop_nothing(tmp_path, caplog):
    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    for name in ("samples.png", "loss.png"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "mine").touch()
    trainer.run()
    assert complete(tmp_path / "run")[-1] == 6 and (tmp_path / "run" / "model.safetensors").exists()
    assert sum("failed, and the run goes on without it" in message for message in caplog.messages) == 2


def test_metrics_that_the_disk_does_not_take_are_written_later(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.symlink_to("/dev/full")
    record = dict(loss_u=1.0, images_per_second=2.0)
    with Progress(tmp_path, None, 0, 3, "loss_u") as progress:
        progress.add({"step": 1, **record})
        progress.add({"step": 2, **record})
        file.unlink()
        progress.add({"step": 3, **record})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "No space left on device" in warnings[0].getMessage()


def test_odd_lines_in_the_metrics_are_left_out(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n7\nnull\n{"loss": 1}\n{"step": "4"}\n\xff\xfe\n\n{"step": 3, "loss_u": "x", "loss_v": 1}\n')
    train(dataclasses.replace(load_run_config(out), resume=out, steps=4))
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 3, 4]


def test_a_wrong_step_in_the_metrics_costs_that_line_alone(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    file = out / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 2,', '"step": 92,'))
    train(dataclasses.replace(load_run_config(out), resume=out, steps=4))
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3, 4]


def test_a_run_does_not_go_on_with_data_that_have_changed(tmp_path, capsys):
    class Named(type(digits()[0])):
        fingerprint = "a"

    data = Named(digits()[0].images, digits()[0].labels)
    run = config(tmp_path / "run", steps=3)
    Trainer(run, data).run()
    resumed = dataclasses.replace(load_run_config(run.out), resume=run.out, steps=4)
    more = Named(torch.cat([data.images, data.images[:1]]), torch.cat([data.labels, data.labels[:1]]))
    for changed, told in ((more, "images 1500 then, 1501 now"), (data, "fingerprint a then, b now")):
        Named.fingerprint = "b" if changed is data else "a"
        with pytest.raises(pmf.InputError, match=rf"data: digits is not what .* was trained on \({told}\)"):
            Trainer(resumed, changed)
    Trainer(dataclasses.replace(resumed, data="others"), more).run()


def test_a_run_that_no_longer_tells_its_data_warns_and_goes_on(tmp_path, caplog):
    out = train(config(tmp_path / "run", steps=2))
    known = (out / "data.json").read_text()
    resumed = dataclasses.replace(load_run_config(out), resume=out)
    for steps, damaged in enumerate((None, "", known[:-5], "[]", "{}"), 3):
        (out / "data.json").write_text(damaged) if damaged is not None else (out / "data.json").unlink()
        caplog.clear()
        train(dataclasses.replace(resumed, steps=steps))
        warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == 1 and warned[0].startswith(f"resume: {out / 'data.json'} is missing or damaged")
        assert (out / "data.json").read_text() == known


def test_an_interruption_is_one_line_in_every_command():
    command = [sys.executable, "-u", "-m", "pmf.train", "doctor", "--seconds", "1000", "--device", "cpu", *FLAGS[:2]]
    job = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "step" not in job.stdout.readline():
        assert job.poll() is None
    deadline = time.monotonic() + 20
    while job.poll() is None:  # a package that is being imported may swallow the first one
        assert time.monotonic() < deadline
        job.send_signal(signal.SIGINT)
        time.sleep(2)
    # Python ends itself by the signal if it came while a string was executed.
    assert job.returncode in (130, -signal.SIGINT) and job.communicate()[1].split() == ["pmf:", "interrupted"]


def test_a_reader_that_does_not_read_does_not_keep_the_run_from_stopping(tmp_path):
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 8192)
    job = start(tmp_path / "run", "--steps", "100000", stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        wait_for_steps(tmp_path / "run", 3, job)
        before = 0
        while before < lines(tmp_path / "run"):  # until it waits for the reader
            before = lines(tmp_path / "run")
            time.sleep(2)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=20) == 0 and complete(tmp_path / "run")[-1] == lines(tmp_path / "run")
    finally:
        job.kill()
        os.close(ours)


def test_signals_while_the_workers_end_change_nothing(tmp_path, monkeypatch, capsys):
    close = Loader.close
    monkeypatch.setattr(Loader, "close", lambda self: (os.kill(os.getpid(), signal.SIGINT), close(self)))
    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    gradients = trainer._gradients
    trainer._gradients = lambda *b: (trainer.step == 2 and os.kill(os.getpid(), signal.SIGINT), gradients(*b))[1]
    trainer.run()
    assert "stopped at step 3; the run is saved at step 3" in capsys.readouterr().out
