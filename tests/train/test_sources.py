"""Sources that change, are cut, or are not what they seem: noticed, named in one line, and never silent."""

import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from pmf.errors import InputError

datasets = pytest.importorskip("datasets")
from pmf import pictures  # noqa: E402
from pmf.data.shards import PreparedShards, lost_of, open_shard  # noqa: E402
from pmf.train.cli import main  # noqa: E402
from pmf.train.data import prepare as room  # noqa: E402
from pmf.train.data.prepare import PrepareConfig, prepare  # noqa: E402
from pmf.train.data.sources import open_source  # noqa: E402


def encoded(number, kind="PNG", mode="RGB"):
    buffer = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def fill(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(number))
    return root


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "in", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)))


def run(source, out, **changes):
    return prepare(PrepareConfig(**(dict(source=str(source), out=out, size=8, shard_images=3, workers=1) | changes)))


def tar(file, entries):
    with tarfile.open(file, "w") as archive:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file


def tar_pair(number):
    return [(f"{number}.png", encoded(number)), (f"{number}.cls", b"%d" % (number % 2))]


def saved(place, kind, count=4, labels=None, **splits):
    """A local data set of `count` rows, or of a number of rows a split; gives its options."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})

    def data(count):
        rows = {
            "image": [{"bytes": encoded(n), "path": None} for n in range(count)],
            "label": [n % 2 for n in range(count)],
        }
        return datasets.Dataset.from_dict(rows, features=features)

    place.mkdir(parents=True, exist_ok=True)
    if kind == "disk":
        (datasets.DatasetDict({k: data(n) for k, n in splits.items()}) if splits else data(count)).save_to_disk(place)
    for name, number in splits.items() if kind == "parquet" else ():
        data(number).to_parquet(place / f"{name}.parquet")
    return place


def add_empty_class(root):
    (root / "ant").mkdir()


def grow(root):
    (root / "cat/0.png").write_bytes(encoded(99))


def touch(root):
    os.utime(root / "cat/0.png", (1, 1))


@pytest.mark.parametrize("change", [add_empty_class, grow, touch])
def test_a_folder_that_changed_since_it_was_begun_is_refused(folder, tmp_path, change):
    run(f"folder:{folder}", tmp_path / "out")
    (tmp_path / "out/shard-000002.arrow").unlink()
    change(folder)
    with pytest.raises(InputError, match=r"^source: .* has changed since .* was begun; expected another --out$"):
        run(f"folder:{folder}", tmp_path / "out")


def test_litter_is_neither_class_nor_picture(folder, tmp_path):
    before = run(f"folder:{folder}", tmp_path / "out")
    fill(folder, ".ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png", "@eaDir/1.png", "cat/._0.png", "cat/.DS_Store")
    fill(folder, "cat/Thumbs.db", "dog/@eaDir/0.png")
    (folder / "cat/up").symlink_to("..")
    (folder / "up").symlink_to("../..")
    after = run(f"folder:{folder}", tmp_path / "out", max_corrupt=0)
    assert after.classes == before.classes == ("cat", "dog") and len(after) == len(before) == 8


def test_links_to_elsewhere_are_followed_and_what_is_passed_over_is_said(folder, tmp_path, caplog):
    (folder / "elk").symlink_to(fill(tmp_path / "other", "1.png", "deep/2.png"))
    (folder / "fox").mkdir()
    fill(folder, "loose.png", "cat/notes.txt")
    data = run(f"folder:{folder}", tmp_path / "out")
    assert data.classes == ("cat", "dog", "elk", "fox") and len(data) == 10
    said = " ".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "1 files that do not have names of pictures, first cat/notes.txt" in said
    assert "1 files beside the class directories, first loose.png" in said
    assert "1 classes hold no pictures, first fox" in said


@pytest.mark.parametrize("kind", ["parquet", "disk", "wds"])
def test_other_sources_that_changed_are_refused(tmp_path, kind):
    place = tmp_path / "data"
    if kind == "wds":
        place.mkdir()
        file, spec = tar(place / "0.tar", [x for n in range(5) for x in tar_pair(n)]), f"wds:{place}/0.tar"
    else:
        saved(place, kind, **({"train": 5} if kind == "parquet" else {}))
        file, spec = sorted(place.glob("*.parquet" if kind == "parquet" else "*.arrow"))[0], f"hf:{place}"
    run(spec, tmp_path / "out")
    run(spec, tmp_path / "out")
    os.utime(file, (1, 1))
    with pytest.raises(InputError, match=r"source: .* has changed since"):
        run(spec, tmp_path / "out")


@pytest.mark.parametrize("kind", ["parquet", "disk", "wds", "wds-mid"])
def test_a_cut_file_is_named(tmp_path, kind):
    """Also where the cut lies between two entries, or where nothing that is read lies behind it."""
    place = tmp_path / "data"
    if kind.startswith("wds"):
        place.mkdir()
        file, spec = tar(place / "0.tar", [x for n in range(5) for x in tar_pair(n)]), f"wds:{place}/0.tar"
        with tarfile.open(file) as archive:
            cut = archive.getmembers()[6].offset + (700 if kind == "wds-mid" else 0)
    else:
        saved(place, kind, **({"train": 5} if kind == "parquet" else {}))
        file, spec = sorted(place.glob("*.parquet" if kind == "parquet" else "*.arrow"))[0], f"hf:{place}"
        cut = file.stat().st_size - 20
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match=rf"^source: .*{file.name} is cut[^\n]*$"):
        run(spec, tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"", "classes: expected the names of the classes, one a line, got none"),
        (b"a\na\n", "classes: classes 1 and 2 are both called 'a', expected different names"),
        (b"a\n\nb\n", "classes: class 2 is called '', expected one line"),
        (b"caf\xe9\nb\n", r"classes: .*names.txt cannot be read: 'utf-8' codec"),
        (b"a\n", "classes: expected names of 2 classes, got 1 in .*names.txt"),
    ],
)
def test_class_names_are_checked_before_anything_is_read(folder, tmp_path, names, message):
    (tmp_path / "names.txt").write_bytes(names)
    with pytest.raises(InputError, match=f"^{message}"):
        run(f"folder:{folder}", tmp_path / "out", classes=tmp_path / "names.txt")
    assert not list((tmp_path).glob("out/*"))


def test_a_finished_directory_keeps_its_names(folder, tmp_path):
    run(f"folder:{folder}", tmp_path / "out")
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    with pytest.raises(InputError, match=r"classes: .* was begun with other names of classes"):
        run(f"folder:{folder}", tmp_path / "out", classes=tmp_path / "names.txt")
    (tmp_path / "out/classes.txt").write_text("wolf\ncat\n")
    with pytest.raises(InputError, match=r"classes: .*classes.txt has other names"):
        run(f"folder:{folder}", tmp_path / "out")
    assert PreparedShards(tmp_path / "out").classes == ("wolf", "cat")
    (tmp_path / "out/classes.txt").unlink()
    assert run(f"folder:{folder}", tmp_path / "out").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("split=train&split=test", "the hf option split is given twice"),
        ("split=", "hf options are .*; got 'split='"),
        ("split", "hf options are .*; got 'split'"),
        ("streaming=0", "streaming: expected 1, got '0'"),
        ("config=x", "cannot open .*BuilderConfig 'x' not found|config"),
        ("split=test", "split|Bad split"),
        ("split=train[:1]", "split|Bad split"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "disk", "file"])
def test_options_that_cannot_be_honoured_are_refused(tmp_path, kind, options, message):
    place = saved(tmp_path / "d", "disk" if kind == "disk" else "parquet", **({} if kind == "disk" else {"train": 3}))
    spec = f"hf:{place / 'train.parquet' if kind == 'file' else place}"
    with pytest.raises(InputError, match=rf"^source: .*({message})[^\n]*$"):
        open_source(f"{spec}?{options}")
    assert len(list(open_source(spec).samples())) == (4 if kind == "disk" else 3)


@pytest.mark.parametrize("kind", ["parquet", "disk", "nested"])
def test_the_split_that_is_named_is_read(tmp_path, kind):
    place = tmp_path / "data"
    saved(place / "data" if kind == "nested" else place, "disk" if kind == "disk" else "parquet", train=2, test=3)
    for options, count in (("", 2), ("?split=train", 2), ("?split=test", 3)):
        assert len(list(open_source(f"hf:{place}{options}").samples())) == count


def test_names_that_hide_their_splits_are_refused(tmp_path):
    saved(tmp_path / "a", "parquet", mytrain=2, mytest=3)
    with pytest.raises(InputError, match=r"mytrain.parquet and mytest.parquet would be one split; call them train-\*"):
        open_source(f"hf:{tmp_path}/a")
    one = saved(tmp_path / "b", "parquet", test=3) / "test.parquet"
    assert len(list(open_source(f"hf:{one}?split=test").samples())) == 3
    with pytest.raises(InputError, match="is one file, whose name does not say its split: expected no option split"):
        open_source(f"hf:{one}?split=train")


@pytest.mark.parametrize("streaming", ["streaming", "config"])
def test_saved_data_take_no_options_of_the_hub(tmp_path, streaming):
    with pytest.raises(InputError, match=f"written by save_to_disk: expected no option {streaming}"):
        open_source(f"hf:{saved(tmp_path / 'd', 'disk')}?{streaming}=1")


def test_labels_must_be_whole_numbers(tmp_path):
    rows = {"image": [{"bytes": encoded(0), "path": None}], "label": ["cat"]}
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=columns).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column 'label' holds string, expected integers or ClassLabel"):
        open_source(f"hf:{tmp_path}/a.parquet")
    labels = (b"1", b"-1", b"1000000000", b"9" * 40, b"cat", b"1.5")
    pairs = [[(f"{i}.png", encoded(i)), (f"{i}.cls", label)] for i, label in enumerate(labels)]
    odd = ('{"label": 1.5}', '{"label": null}', "[" * 9999, '{"label": [1]}', '{"label": 1e999}', '{"label": 1}')
    pairs += [[(f"j{i}.png", encoded(i)), (f"j{i}.json", text.encode())] for i, text in enumerate(odd)]
    tar(tmp_path / "a.tar", [entry for pair in pairs for entry in pair])
    assert len(run(f"wds:{tmp_path}/a.tar", tmp_path / "out")) == 2
    with pytest.raises(InputError, match="the last is 2: its label is 1000000000, expected one below 1,000,000"):
        run(f"wds:{tmp_path}/a.tar", tmp_path / "out2", max_corrupt=1)


@pytest.mark.parametrize("url", ["pipe:touch MARK", "pipe:cat a.tar"])
def test_no_command_is_run(tmp_path, url, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^source: pipe:.* would run a command"):
        open_source(f"wds:{url}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": 3}', '{"classes": [1]}'])
def test_odd_files_beside_tars_are_named(tmp_path, text):
    tar(tmp_path / "0.tar", tar_pair(0))
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"^source: .*dataset.json: expected {\"classes\": \[names\]}"):
        open_source(f"wds:{tmp_path}/0.tar")
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "another's"}))
    assert open_source(f"wds:{tmp_path}/0.tar").classes == ()


def test_entries_beside_the_pictures_are_not_samples(tmp_path):
    others = [("__MACOSX/._1.png", b"x"), ("._1.png", b"x"), ("README", b"x"), ("__meta__.json", b"{}")]
    tar(tmp_path / "a.tar", [*others, *tar_pair(0), *others, *tar_pair(1)])
    assert [sample.key for sample in open_source(f"wds:{tmp_path}/a.tar").samples()] == ["0", "1"]


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


def test_odd_names_are_one_line_each(tmp_path, capsys):
    root = os.fsencode(tmp_path / "in")
    os.makedirs(root + b"/a")
    for name in (b"caf\xe9.png", b"new\nline.png", b"good.png"):
        with open(root + b"/a/" + name, "wb") as file:
            file.write(encoded(1) if name == b"good.png" else b"torn")
    data = run(f"folder:{tmp_path}/in", tmp_path / "out")
    assert len(data) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
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
    assert len(run(f"folder:{folder}", tmp_path / "out", max_corrupt=3)) == 8


def test_an_out_that_cannot_be_is_refused_before_work(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match=r"^out: .* cannot be a directory of shards: "):
            run(f"folder:{folder}", out)
    with pytest.raises(InputError, match="size: expected at most 16384, got 1000000"):
        run(f"folder:{folder}", tmp_path / "out", size=10**6)


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
