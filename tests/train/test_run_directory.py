"""A run's directory when the disk is full, and with links in it."""

from __future__ import annotations

import errno

import pytest

import pmf
from pmf.train import run_directory
from pmf.train.demo import digits
from pmf.train.loop import Trainer
from tests.train.test_killed import complete
from tests.train.test_loop import config, train


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


def test_a_directory_that_is_removed_ends_the_run_and_stays_removed(tmp_path):
    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    gradients = trainer._gradients

    def removing(*batch):
        if trainer.step == 1:
            (tmp_path / "run").rename(tmp_path / "removed")
        return gradients(*batch)

    trainer._gradients = removing
    with pytest.raises(pmf.InputError, match="No such file or directory"):
        trainer.run()
    assert not (tmp_path / "run").exists()
