"""A run's directory: full disks, links, removals, and what killed processes leave."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys

import pytest

import pmf
from pmf.train import run_directory
from pmf.train.demo import digits
from pmf.train.loop import Trainer
from tests.train.test_killed import complete
from tests.train.test_loop import config, train

KILLED = """
import os, signal, sys
from pmf.atomic_files import write_atomically

def write(files):
    if not files:
        os.kill(os.getpid(), signal.SIGKILL)
    write_atomically(files[0], lambda temporary: write(files[1:]))

write(sys.argv[1:])
"""


def killed_while_writing(*files):
    """A process that is killed while it writes all of these files: it leaves its temporary files behind."""
    assert subprocess.run([sys.executable, "-c", KILLED, *map(str, files)]).returncode == -signal.SIGKILL


def hidden(out):
    return [path for path in (*out.glob(".*"), *out.glob("checkpoints/.*")) if path.name != ".lock"]


@pytest.mark.parametrize("writer", ["write_config", "write_data_identity", "keep_metrics_until"])
def test_a_disk_that_fills_at_the_start_does_not_make_the_directory_unusable(tmp_path, monkeypatch, writer):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, writer, full)
        with pytest.raises(pmf.InputError, match="No space left on device"):
            Trainer(config(tmp_path / "run"), digits()[0])
    assert complete(train(config(tmp_path / "run", steps=3))) == [3]


def test_overwriting_keeps_what_links_point_to(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    (out / "checkpoints").rename(tmp_path / "elsewhere")
    (out / "checkpoints").symlink_to(tmp_path / "elsewhere")
    train(config(out, steps=2, overwrite=True))
    assert complete(out) == [2] and (tmp_path / "elsewhere" / "step-00000003").exists()


@pytest.mark.parametrize("first", ["save", "export"])
def test_a_directory_that_is_renamed_ends_the_run_and_is_not_made_anew(tmp_path, first):
    often = dict(save_every=3, sample_every=6) if first == "save" else dict(save_every=6, sample_every=3)
    trainer = Trainer(config(tmp_path / "run", **often), digits()[0])
    gradients = trainer._gradients

    def renaming(*batch):
        if trainer.step == 1:
            (tmp_path / "run").rename(tmp_path / "renamed")
        return gradients(*batch)

    trainer._gradients = renaming
    with pytest.raises(pmf.InputError, match=r"out: .*run was removed or renamed, expected it to stay"):
        trainer.run()
    assert not (tmp_path / "run").exists() and (tmp_path / "renamed" / "config.json").exists()


def test_what_a_killed_run_left_is_removed_when_it_resumes(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    files = [path for path in out.iterdir() if path.is_file() and path.name != ".lock"]
    killed_while_writing(*files)
    (out / "checkpoints" / ".step-00000002").mkdir()
    assert len(hidden(out)) == len(files) + 1
    train(config(out, steps=3, resume=out))
    assert not hidden(out)


def test_a_run_killed_while_it_stored_its_configuration_can_start_again(tmp_path):
    killed_while_writing(tmp_path / "config.json")
    assert len(hidden(tmp_path)) == 1
    train(config(tmp_path, steps=2))
    assert not hidden(tmp_path)


@pytest.mark.parametrize("place", ["nowhere", "a file"])
def test_checkpoints_that_cannot_be_written_are_noticed_before_the_first_step(tmp_path, place, monkeypatch):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make_room = run_directory.make_room

    def with_link(*args):
        make_room(*args)
        (out / "checkpoints").symlink_to(elsewhere)

    monkeypatch.setattr(run_directory, "make_room", with_link)
    if place == "a file":
        elsewhere.write_text("a file")
    with pytest.raises(pmf.InputError, match=r"^out: cannot use .*checkpoints: "):
        Trainer(config(out), digits()[0])


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    (out / "checkpoints").rename(tmp_path / "kept")
    (out / "checkpoints").symlink_to(out / "checkpoints")  # a loop, which the system cannot follow
    with pytest.raises(pmf.InputError, match=r"resume: cannot read .*checkpoints: Too many levels"):
        Trainer(config(out, steps=5, resume=out), digits()[0])
    with pytest.raises(pmf.InputError, match=r"out: cannot use .*checkpoints: Too many levels"):
        Trainer(config(out, steps=5), digits()[0])
    assert (out / "model.safetensors").exists()


def test_a_directory_of_something_else_loses_nothing(tmp_path):
    files = [tmp_path / name for name in (".samples.png.original.png", ".metrics.jsonl.kept2025.jsonl", "notes.txt")]
    for file in files:
        file.write_text("mine")
    with pytest.raises(pmf.InputError, match="is not empty and holds no run"):
        Trainer(config(tmp_path), digits()[0])
    assert all(file.exists() for file in files)
