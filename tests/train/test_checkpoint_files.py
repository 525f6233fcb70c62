"""Checkpoints are checked before they are used, and reading one runs nothing that it names."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

import pmf
from pmf.train.checkpoint_files import CheckedPlanner, CheckedReader, CheckedWriter, read_metadata
from pmf.train.config import load_run_config
from pmf.train.demo import digits
from pmf.train.loop import Trainer
from tests.train.test_killed import complete
from tests.train.test_loop import config, losses, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(config(tmp_path_factory.mktemp("run") / "whole"))


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resumed(run: Path, **changes) -> Trainer:
    return Trainer(dataclasses.replace(load_run_config(run), resume=run, **changes), digits()[0])


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << (position % 8)
    file.write_bytes(content)


def test_any_flipped_bit_is_found_and_the_run_goes_on_from_the_checkpoint_before(run, finished, capsys):
    newest = run / "checkpoints" / "step-00000006"
    sizes = {file.name: file.stat().st_size for file in newest.iterdir()}
    chosen = random.Random(0)
    for name in sorted(sizes):
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(finished / "checkpoints" / newest.name, newest)
        flip(newest / name, chosen.randrange(sizes[name]))
        assert resumed(run).step == 3, name
        assert f"resume: {newest} is damaged: " in (told := capsys.readouterr().out) and "Going back to step 3" in told
        assert complete(run) == [3] and (newest.parent / "damaged-step-00000006").exists()
    resumed(run).run()
    assert complete(run) == [3, 6] and losses(run) == losses(finished)


@pytest.mark.parametrize("change", ["missing", "torn", "empty"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_file_that_is_not_whole_is_found(run, change, name):
    file = run / "checkpoints" / "step-00000006" / name
    if change == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1 if change == "torn" else 0)
    assert resumed(run).step == 3


def test_checkpoints_without_checksums_are_read_as_before(run):
    for beside in run.glob("checkpoints/*/*.crc32"):
        beside.unlink()
    for beside in run.glob("checkpoints/*/.*.crc32"):
        beside.unlink()
    assert resumed(run).step == 6


@pytest.mark.parametrize("name", ["__0_0.distcp.crc32", ".metadata.crc32"])
def test_a_lost_checksum_beside_others_is_found(run, name, capsys):
    (run / "checkpoints" / "step-00000006" / name).unlink()
    assert resumed(run).step == 3
    assert f"is damaged: {name} is missing" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "__0_0.distcp.crc32"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_would_never_end_is_not_read(run, name, kind, capsys):
    file = run / "checkpoints" / "step-00000006" / name
    file.unlink()
    os.mkfifo(file) if kind == "pipe" else file.symlink_to("/dev/zero")
    assert resumed(run).step == 3
    assert f"is damaged: {name} is a pipe or a device, expected a file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "final_layers.u.linear.weight"), 3, r"expected a tensor of torch.float32, got no tensor"),
        (("model", "final_layers.u.linear.weight"), torch.bfloat16, r"got torch.bfloat16"),
        (("emas", "ema_500", "final_layers.u.linear.weight"), torch.float64, r"got torch.float64"),
        (("ema_pending", "ema_500", "beta"), None, r"ema_pending.ema_500.beta: expected a number, got None"),
        (("ema_pending", "ema_500", "updates"), "x", r"ema_pending.ema_500.updates: expected a number, got 'x'"),
        (("step",), "6", r"step: expected a number, got '6'"),
    ],
)
def test_values_of_another_kind_are_refused(run, place, value, message):
    folder, trainer = run / "checkpoints" / "step-00000006", resumed(run)
    state = trainer.state()
    part = state
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = part[place[-1]].to(value) if isinstance(value, torch.dtype) else value
    shutil.rmtree(folder)
    dcp.save(state, storage_writer=CheckedWriter(folder), no_dist=True)
    with pytest.raises(pmf.InputError, match=f"cannot continue from {folder}: .*{message}"):
        resumed(run)


class Runs:
    """A value whose unpickling creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def without_checksums(folder: Path) -> None:
    for beside in folder.glob("*.crc32"):
        beside.unlink()
    for beside in folder.glob(".*.crc32"):
        beside.unlink()


@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_data"])
def test_metadata_from_a_stranger_run_nothing(run, tmp_path, place):
    folder, proof = run / "checkpoints" / "step-00000006", tmp_path / "proof"
    metadata = read_metadata(folder)
    if place == "whole":
        metadata = Runs(proof)
    else:
        setattr(metadata, place, {"x": Runs(proof)})
    without_checksums(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert resumed(run).step == 3 and not proof.exists()


def test_values_from_a_stranger_run_nothing(tmp_path):
    """A value that is not a tensor is a pickle inside the file of values."""
    proof = tmp_path / "proof"
    dcp.save({"step": Runs(proof), "w": torch.ones(3)}, storage_writer=CheckedWriter(tmp_path / "c"), no_dist=True)
    proof.unlink(missing_ok=True)
    state = {"step": 0, "w": torch.zeros(3)}
    with pytest.raises(BaseException, match=r"Weights only load failed|Unsupported"):
        dcp.load(state, storage_reader=CheckedReader(tmp_path / "c"), planner=CheckedPlanner(), no_dist=True)
    assert not proof.exists()


def test_a_checkpoint_refers_to_no_file_outside_of_it(run, tmp_path):
    folder = run / "checkpoints" / "step-00000006"
    metadata = read_metadata(folder)
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = dataclasses.replace(info, relative_path=f"../step-00000003/{info.relative_path}")
    without_checksums(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert resumed(run).step == 3


def test_when_all_are_damaged_each_is_named(run):
    for step in (3, 6):
        flip(run / "checkpoints" / f"step-{step:08d}" / "__0_0.distcp", 1000)
    with pytest.raises(pmf.InputError, match=r"is damaged: step-00000006: __0_0.distcp does not .*; step-00000003: "):
        resumed(run)
    assert complete(run) == [3, 6]


PICKLED = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata"
CHANGES = {
    "class": PICKLED + b"\x8c\x08Metadata\x93N}\x8c\x0a__module__\x8c\x02oss\x86b.",
    "member": PICKLED + b"\x8c\x14_MEM_FORMAT_ENCODING\x93K\x00\x85R}\x8c\x07_value_K\x07sb.",
}


@pytest.mark.parametrize("target", CHANGES)
def test_metadata_from_a_stranger_change_no_class(tmp_path, target):
    """A class with another `__module__` would import it when the next checkpoint is pickled."""
    (tmp_path / ".metadata").write_bytes(CHANGES[target])
    with pytest.raises(pmf.InputError, match=r"\.metadata changes .*, which no checkpoint of ours does"):
        read_metadata(tmp_path)
    assert Metadata.__module__ == "torch.distributed.checkpoint.metadata"


def test_metadata_from_a_stranger_reserve_no_memory(tmp_path):
    """Five bytes of a pickle can name an entry of the memo, and the unpickler in C makes room for all before it."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x03.")
    code = "import sys, pathlib; from pmf.train.checkpoint_files import read_metadata\n"
    code += "try: read_metadata(pathlib.Path(sys.argv[1]))\n"
    code += "except Exception: print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert int(result.stdout) < 1_000_000, result  # kB


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run):
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "checkpoints" / "step-00000003").rename(run / "checkpoints" / "step-00000006")
    with pytest.raises(pmf.InputError, match=r"the checkpoint of step 6 in .* holds step 3, expected 6"):
        resumed(run)


def test_folders_with_other_names_are_no_checkpoints(run):
    (run / "checkpoints" / "step-7").mkdir()
    assert resumed(run).step == 6


def test_a_checkpoint_that_is_a_link_is_removed_without_what_it_points_to(run, tmp_path):
    (run / "checkpoints" / "step-00000003").rename(tmp_path / "kept")
    (run / "checkpoints" / "step-00000003").symlink_to(tmp_path / "kept")
    resumed(run, steps=12).run()
    assert complete(run) == [9, 12] and (tmp_path / "kept" / ".metadata").exists()


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(run, monkeypatch):
    def busy(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    resumed(run, steps=12).run()
    assert complete(run) == [9, 12]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(run, name):
    """The system's errors say nothing of what a file holds: here its name leads in a circle."""
    newest = max((run / "checkpoints").glob("step-*"))
    (newest / name).rename(newest / "kept")
    (newest / name).symlink_to(newest / name)
    with pytest.raises(pmf.InputError, match=rf"resume: cannot read .*{name}: Too many levels .*; nothing was changed"):
        resumed(run)
    (newest / "kept").replace(newest / name)
    assert not list(run.glob("checkpoints/damaged-*"))
    assert resumed(run).step == int(newest.name[5:])
