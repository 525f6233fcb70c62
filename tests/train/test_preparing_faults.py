"""What goes wrong while pictures are prepared: odd names, failing machines, lost colours, interruptions."""

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from subprocess import PIPE

import pytest
from PIL import Image

from pmf.errors import InputError

datasets = pytest.importorskip("datasets")
from pmf import pictures  # noqa: E402
from pmf.data.shards import PreparedShards, lost_of, open_shard  # noqa: E402
from pmf.train.cli import main  # noqa: E402
from pmf.train.data import prepare as room  # noqa: E402
from tests.train.preparing import encoded, fill, run  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "in", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)))


def test_what_pictures_lost_is_counted_over_interruptions(tmp_path, capsys):
    for number in range(9):
        name = tmp_path / f"in/a/{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.new("LA", (9, 9), (0, 10 * number)).save(buffer, "PNG")
        name.write_bytes(buffer.getvalue())
    for _ in range(2):
        data = run(f"folder:{tmp_path}/in", tmp_path / "out")
        assert f"9 pictures {pictures.TRANSPARENCY}\n" in capsys.readouterr().out
        (tmp_path / "out/shard-000001.arrow").unlink()
    assert data.read(0)[0].min() == 255
    assert lost_of(open_shard(tmp_path / "out/shard-000002.arrow")) == {pictures.TRANSPARENCY: 3}


def test_a_jpg_that_is_kept_obeys_the_same_rules(tmp_path, capsys):
    (tmp_path / "in/a").mkdir(parents=True)
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    Image.new("RGB", (8, 8), "red").save(tmp_path / "in/a/0.jpg", exif=exif)
    Image.new("CMYK", (8, 8)).save(tmp_path / "in/a/1.jpg")
    data = run(f"folder:{tmp_path}/in", tmp_path / "out", encoding="jpg")
    assert bytes(data.stored(0)[0]) == (tmp_path / "in/a/0.jpg").read_bytes()
    said = capsys.readouterr().out
    assert f"1 pictures {pictures.ROTATION}" in said and f"1 pictures {pictures.COLOURS}" in said


def test_a_shard_over_the_budget_is_not_written(folder, tmp_path):
    for i in range(3):
        (folder / f"dog/{i}.png").write_bytes(b"torn")
    with pytest.raises(InputError, match="at most 1 unusable pictures"):
        run(f"folder:{folder}", tmp_path / "out", max_corrupt=1)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["shard-000000.arrow"]


def failing(monkeypatch, error, after=4):
    read, calls = pictures.read_file, []

    def fails(path):
        calls.append(path)
        if len(calls) > after:
            raise error
        return read(path)

    monkeypatch.setattr("pmf.train.data.samples.read_file", fails)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), MemoryError(), OSError(errno.EMFILE, "files")]
)
def test_a_failing_machine_leaves_no_picture_out(folder, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch:
        failing(patch, error)
        with pytest.raises(InputError, match=r"source: .*png cannot be read now: .*; run the same command again"):
            run(f"folder:{folder}", tmp_path / "out")
    assert len(run(f"folder:{folder}", tmp_path / "out", max_corrupt=0)) == 8


def test_a_source_that_vanishes_is_said(folder, tmp_path, monkeypatch):
    def gone(path):
        shutil.rmtree(folder, ignore_errors=True)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr("pmf.train.data.samples.read_file", gone)
    with pytest.raises(InputError, match="has vanished; mount it and run the same command again"):
        run(f"folder:{folder}", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_odd_names_are_one_line_each(tmp_path, caplog):
    root = os.fsencode(tmp_path / "in")
    os.makedirs(root + b"/a")
    for name in (b"caf\xe9.png", b"new\nline.png", b"good.png"):
        with open(root + b"/a/" + name, "wb") as file:
            file.write(encoded(1) if name == b"good.png" else b"torn")
    data = run(f"folder:{tmp_path}/in", tmp_path / "out")
    assert len(data) == 1
    said = [text for text in caplog.messages if "left out" in text]
    assert [line.split("left out ")[1].split(":")[0] for line in said] == [r"a/caf\udce9.png", r"a/new\nline.png"]
    for name in (b"caf\xe9", b"two\nlines"):
        os.makedirs(root + b"/" + name)
        with pytest.raises(InputError, match=r"^source: class 2 is called '[^\n]*', expected one line of UTF-8$"):
            run(f"folder:{tmp_path}/in", tmp_path / "out2")
        os.rmdir(root + b"/" + name)


def test_pipes_and_devices_are_left_out(folder, tmp_path):
    os.mkfifo(folder / "cat/9.png")
    (folder / "dog/9.png").symlink_to("/dev/zero")
    (folder / "dog/x.png").symlink_to("nowhere")
    (folder / "dog/y.png").symlink_to("y.png")
    assert len(run(f"folder:{folder}", tmp_path / "out", max_corrupt=4)) == 8


def test_an_out_that_cannot_be_is_refused_before_work(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(
            InputError, match=r"^out: cannot write .*: (it is a file, expected a directory|Not a directory)$"
        ):
            run(f"folder:{folder}", out)
    with pytest.raises(InputError, match="size: expected at most 16384, got 1000000"):
        run(f"folder:{folder}", tmp_path / "out", size=10**6)


@pytest.mark.parametrize("out", ["in", "in/prepared", "in/cat/prepared", "in/../in/prepared", "link", "in/link"])
def test_an_out_inside_the_source_is_refused_before_work(folder, tmp_path, out):
    """The next run would count it as a class: a source that has changed."""
    (tmp_path / "link").symlink_to(folder / "prepared", target_is_directory=True)
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    before = sorted(tmp_path.rglob("*"))
    message = f"^out: {tmp_path}/{re.escape(out)} lies inside the source {folder}: expected a folder outside of it$"
    with pytest.raises(InputError, match=message):
        run(f"folder:{folder}", tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_out_above_the_source_or_beside_it_under_a_longer_name_is_outside(folder, tmp_path):
    assert len(run(f"folder:{folder}", tmp_path / "in-prepared")) == 8
    (tmp_path / "above").mkdir()
    folder.rename(tmp_path / "above/in")
    with pytest.raises(InputError, match="is not empty and holds no prepared shards"):
        run(f"folder:{tmp_path}/above/in", tmp_path / "above/in/..")


HOLDER = """
import sys
from pathlib import Path
from pmf.train.directory_lock import acquire
lock = acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


def test_what_killed_preparations_were_writing_is_removed_by_the_next_one_that_has_the_lock(
    folder, tmp_path, monkeypatch
):
    out, torn, written, replace = tmp_path / "out", [], [], os.replace

    def killed(source, target):
        if target.name != written[-1]:
            return replace(source, target)
        torn.append(source.name)
        raise SystemExit

    for name in ("shard-000001.arrow", "classes.txt"):  # each is being written when the process ends
        written.append(name)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr("pathlib.Path.unlink", lambda path, **_: None)
            with pytest.raises(SystemExit):
                run(f"folder:{folder}", out)
        assert (out / torn[-1]).exists()
    (out / ".classes.txt.mine").touch()
    (out / torn[0]).touch()
    with pytest.raises(InputError, match=r"^size: .* was begun with 8, got 9"):  # another preparation's
        run(f"folder:{folder}", out, size=9)
    with subprocess.Popen([sys.executable, "-c", HOLDER, out / ".lock"], stdin=PIPE, stdout=PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"^out: .* is in use by process"):
            run(f"folder:{folder}", out)
        holder.communicate()
    assert all((out / name).exists() for name in torn)
    run(f"folder:{folder}", out)
    found = sorted(file.name for file in out.iterdir())
    assert found == [".classes.txt.mine", "classes.txt", *(f"shard-{i:06d}.arrow" for i in range(3))]


def test_directories_of_the_present_format_only_are_continued(folder, tmp_path, monkeypatch):
    """Those of an earlier version open for training."""
    monkeypatch.setattr(room._Preparation, "__init__", before_fingerprints(room._Preparation.__init__))
    run(f"folder:{folder}", tmp_path / "out")
    monkeypatch.undo()
    assert len(PreparedShards(tmp_path / "out")) == 8
    with pytest.raises(InputError, match="was begun by an earlier version: it can be trained on if it is complete"):
        run(f"folder:{folder}", tmp_path / "out")


def before_fingerprints(initialise):
    def init(self, *arguments):
        initialise(self, *arguments)
        object.__setattr__(self.settings, "fingerprint", "0" * 64)

    return init


SLOW = """
import sys, time
from pmf.train.data import samples
read = samples.read_file
def stuck(path):
    if path.name == "3.png":
        print("reading", file=sys.stderr, flush=True)
        time.sleep(10**6)
    return read(path)
samples.read_file = stuck
from pmf.train.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_preparation_with_a_stuck_read_ends_at_once(folder, tmp_path, number):
    arguments = ["data", "prepare", f"folder:{folder}", "--out", str(tmp_path / "out"), "--size", "8", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], stderr=subprocess.PIPE, text=True)
    while "reading" not in process.stderr.readline():
        pass
    process.send_signal(number)
    began = time.monotonic()
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 5 and process.returncode in (130, -signal.SIGTERM)
    if number == signal.SIGINT:
        assert said.splitlines()[-1] == "pmf: interrupted; run the same command again to go on"
        assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("shard-*"))


def test_the_command_line_says_one_line(folder, tmp_path, capsys):
    for arguments in (
        ["prepare", f"folder:{tmp_path}/none", "--out", str(tmp_path / "out")],
        ["prepare", f"folder:{folder}", "--out", str(folder / "cat/0.png")],
        ["prepare", f"folder:{folder}", "--out", str(tmp_path / "out"), "--classes", str(tmp_path / "none")],
        ["verify", str(tmp_path / "none")],
    ):
        with pytest.raises(SystemExit) as end:
            main(["data", *arguments])
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "8", "--size", "9"], "size: expected one value, got it twice, as '8' and '9'"),
        (["--size", str(10**30)], "size: expected an integer below 2^63"),
        (["--shard-images", str(10**30)], "shard_images: expected an integer below 2^63"),
        (["--workers", str(10**9)], "workers: expected at most 1024, got 1000000000"),
    ],
)
def test_impossible_options_are_refused_before_work(folder, tmp_path, options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        room.command(["prepare", f"folder:{folder}", "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()
