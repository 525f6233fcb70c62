"""Every writer of ours replaces a file as a whole, and never a device, a pipe, a link or a directory."""

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import pmf
from pmf.atomic_files import require_writable, write_atomically
from pmf.images import save_png
from pmf.metrics import Statistics
from pmf.train.export import save_loss_curve
from tests.networks import TINY

ROOT = Path(__file__).parents[2]
WRITERS = {
    "picture": lambda path: save_png(path, np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype=np.uint8)),
    "statistics": lambda path: Statistics.of(torch.randn(9, 70)).save(path),
    "network": lambda path: pmf.save_model(path, TINY, pmf.create_model(TINY).state_dict()),
    "curve": lambda path: save_loss_curve(path, [1, 2], {"loss": [1.0, 2.0]}),
    "tensors": lambda path: write_atomically(path, lambda file: torch.save(torch.randn(9999), file)),
    "text": lambda path: write_atomically(path, lambda file: file.write_text("x" * 99999)),
}
writers = pytest.mark.parametrize("writer", WRITERS)


@writers
def test_a_device_stays_a_device(writer):
    before = os.stat("/dev/null")
    WRITERS[writer](Path("/dev/null"))
    assert (os.stat("/dev/null").st_mode, os.stat("/dev/null").st_ino) == (before.st_mode, before.st_ino)


@writers
def test_a_full_device_is_named_with_its_reason(writer):
    with pytest.raises(pmf.InputError, match=r"^path: cannot write /dev/full: No space left on device$"):
        WRITERS[writer](Path("/dev/full"))


@writers
def test_a_pipe_receives_the_bytes(writer, tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    torch.manual_seed(0)
    WRITERS[writer](pipe)
    reader.join()
    assert pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"] and len(found[0]) > 400


@writers
def test_a_pipe_that_nobody_reads_is_not_waited_for(writer, tmp_path, monkeypatch):
    monkeypatch.setattr("pmf.atomic_files.PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(pmf.InputError, match=r"^path: cannot write .*pipe: it is a pipe that nobody reads$"):
        WRITERS[writer](tmp_path / "pipe")


@writers
def test_a_link_stays_and_what_it_points_to_is_replaced(writer, tmp_path):
    (tmp_path / "there").mkdir()
    link, file = tmp_path / "link", tmp_path / "there" / "file"
    link.symlink_to("there/file")
    WRITERS[writer](link)  # dangling
    first = file.read_bytes()
    file.write_bytes(b"old")
    file.chmod(0o640)
    WRITERS[writer](link)
    assert link.is_symlink() and len(file.read_bytes()) == len(first) and os.listdir(tmp_path / "there") == ["file"]
    assert file.stat().st_mode & 0o777 == 0o640


@writers
def test_directories_and_read_only_files_are_refused(writer, tmp_path):
    with pytest.raises(pmf.InputError, match=r"path: cannot write .*: it is a directory, expected the name of a file"):
        WRITERS[writer](tmp_path)
    file = tmp_path / "file"
    file.write_text("precious")
    file.chmod(0o444)
    with pytest.raises(pmf.InputError, match=r"path: cannot write .*/file: it is read-only"):
        WRITERS[writer](file)
    assert file.read_text() == "precious" and os.listdir(tmp_path) == ["file"]


def test_what_can_be_written_is_known_before(tmp_path):
    file, link = tmp_path / "above" / "file", tmp_path / "link"
    require_writable(file, "out")
    assert os.listdir(file.parent) == []
    file.write_text("precious")
    link.symlink_to(file)
    require_writable(link, "out")
    require_writable("/dev/null", "out")
    file.chmod(0o444)
    for place, why in ((link, "it is read-only"), (file / "more", "Not a directory"), (tmp_path, "it is a directory")):
        with pytest.raises(pmf.InputError, match=rf"^out: cannot write {place}: {why}"):
            require_writable(place, "out")
    assert file.read_text() == "precious" and os.listdir(file.parent) == ["file"]


# Python 3.10's ZipFile, which NumPy leaves open when a write fails, tells so once more when it is collected.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function ZipFile.__del__:pytest.PytestUnraisableExceptionWarning"
)
@writers
def test_a_write_that_breaks_off_says_why_and_keeps_the_old_file(writer, tmp_path):
    """A limit on the size of files stands for a full disk: it too fails in the middle."""
    file = tmp_path / "file"
    file.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(pmf.InputError, match=r"^path: cannot write .*/file: File too large"):
            WRITERS[writer](file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["x" * 300, "n\u00e9\u4e2d" * 80, "no\0thing"])
def test_impossible_names_are_one_line(name, tmp_path):
    with pytest.raises(pmf.InputError, match="path: cannot write ") as error:
        WRITERS["text"](tmp_path / name)
    assert "\n" not in str(error.value)


def test_long_names_and_names_that_are_not_text_are_written(tmp_path):
    for name in ("x" * 255, os.fsdecode(b"caf\xe9.png"), "\u4e2d" * 85):
        WRITERS["text"](tmp_path / name)
        assert (tmp_path / name).stat().st_size == 99999


def test_standard_output_receives_the_bytes(tmp_path):
    code = "from pathlib import Path; from pmf.atomic_files import write_atomically as w; "
    code += "w('/dev/stdout', lambda f: f.write_bytes(b'content'))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout == b"content"
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == b"content"
