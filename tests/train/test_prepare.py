import dataclasses
import io
import os
import pickle
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pmf.data import CorruptImageError, Loader
from pmf.errors import InputError
from pmf.images import centre_crop
from pmf.train.data.by_name import open_data

datasets = pytest.importorskip("datasets")
from pmf.data.shards import PreparedShards, open_shard  # noqa: E402
from pmf.train.data.hugging_face import row_samples  # noqa: E402
from pmf.train.data.prepare import _row, command, prepare, verify  # noqa: E402
from pmf.train.data.samples import Sample  # noqa: E402
from pmf.train.data.sources import open_source  # noqa: E402
from tests.train.preparing import CLASSES, config, contents, encoded, expected, holds_all, picture, tar  # noqa: E402


def test_cropping_halves_then_resizes_then_cuts_the_middle():
    ramp = np.repeat(np.arange(80, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    image = np.asarray(centre_crop(Image.fromarray(ramp), 10))
    halved = np.asarray(Image.fromarray(ramp).resize((40, 20), Image.Resampling.BOX).resize((20, 10), 4))
    assert image.shape == (10, 10, 3) and np.array_equal(image, halved[:, 5:15])
    small = Image.fromarray(ramp).convert("L").resize((6, 5))
    assert np.asarray(centre_crop(small, 10)).shape == (10, 10, 3)
    bicubic = small.convert("RGB").resize((12, 10), Image.Resampling.BICUBIC).crop((1, 0, 11, 10))
    assert np.array_equal(np.asarray(centre_crop(small, 10)), np.asarray(bicubic))


def test_a_folder_becomes_shards_that_read_back(prepared, folder):
    data = PreparedShards(prepared)
    holds_all(data)
    holds_all(pickle.loads(pickle.dumps(data)))
    assert data.classes == CLASSES
    assert sorted(contents(prepared)) == ["classes.txt"] + [f"shard-{i:06d}.arrow" for i in range(5)]
    verify(prepared)


@pytest.mark.parametrize(("encoding", "lossless"), [("png", True), ("jpg", False)])
def test_other_encodings(folder, tmp_path, encoding, lossless):
    data = prepare(config(folder, tmp_path / "out", encoding=encoding))
    if lossless:
        holds_all(data)
    verify(tmp_path / "out")
    error = (data.read(3)[0].float() - expected(3).float()).abs().mean()
    assert error == 0 if lossless else 0 < error < 8


def test_the_result_depends_neither_on_workers_nor_on_interruptions(folder, prepared, tmp_path, monkeypatch):
    prepare(config(folder, tmp_path / "workers", workers=2))
    assert contents(tmp_path / "workers") == contents(prepared)

    out, replace, calls = tmp_path / "stopped", os.replace, []

    def stopping(source, target):
        calls.append(target)
        if len(calls) in (3, 5):  # before the third shard, and before the fourth
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare(config(folder, out))
        with pytest.raises(InputError, match="is not complete"):
            PreparedShards(out)
    holds_all(prepare(config(folder, out)))
    assert contents(out) == contents(prepared)
    assert len(calls) == 5 + 2 + 1  # every shard once, two stops, the classes


def test_a_complete_directory_is_left_as_it_is(folder, prepared):
    before = {file: file.stat().st_mtime_ns for file in prepared.glob("shard-*")}
    prepare(config(folder, prepared))
    assert {file: file.stat().st_mtime_ns for file in prepared.glob("shard-*")} == before


def flipped(file, number):
    """Flip one bit of a shard in the middle of this image."""
    data, image = bytearray(file.read_bytes()), expected(number).numpy().tobytes()
    data[data.index(image) + len(image) // 2] ^= 1
    file.write_bytes(data)


def test_torn_shards_are_named_and_made_again(folder, prepared, tmp_path):
    prepare(config(folder, tmp_path))
    for number in (3, 4):
        short = tmp_path / f"shard-{number:06d}.arrow"
        short.write_bytes(short.read_bytes()[:700])
    flipped(tmp_path / "shard-000001.arrow", 5)
    for use in (PreparedShards, verify):
        with pytest.raises(InputError, match=r"000003.arrow is missing or torn: .*000004.arrow is missing or torn: "):
            use(tmp_path)
    prepare(config(folder, tmp_path))
    with pytest.raises(InputError, match=r"torn: shard-000001.arrow: ant/5.png: its checksum.*remove these shards and"):
        command(["verify", str(tmp_path)])
    (tmp_path / "shard-000001.arrow").unlink()
    prepare(config(folder, tmp_path))
    assert contents(tmp_path) == contents(prepared)


@pytest.mark.parametrize("name", ("shard-x.arrow", "shard-0.arrow", "shard-000001 (copy).arrow"))
def test_files_beside_the_shards_are_refused_by_name(folder, prepared, tmp_path, name):
    prepare(config(folder, tmp_path))
    shutil.copy(tmp_path / "shard-000001.arrow", tmp_path / name)
    with pytest.raises(InputError, match=r"^data: .*shard-.*arrow does not have the name of a shard"):
        PreparedShards(tmp_path)


def test_a_missing_last_shard_is_noticed(folder, prepared, tmp_path):
    """Even if all shards are full: then an empty one follows them."""
    prepare(config(folder, tmp_path, shard_images=7))
    assert [len(open_shard(file)) for file in sorted(tmp_path.glob("*.arrow"))] == [7, 7, 7, 0]
    holds_all(PreparedShards(tmp_path))
    (tmp_path / "shard-000003.arrow").unlink()
    for use in (PreparedShards, verify):
        with pytest.raises(InputError, match="lacks its last shard"):
            use(tmp_path)
    holds_all(prepare(config(folder, tmp_path, shard_images=7)))


def test_no_flipped_bit_changes_what_is_read(folder, tmp_path):
    """After a flip of any bit, a shard is refused or reads as before."""
    prepare(config(folder, tmp_path))
    file = tmp_path / "shard-000001.arrow"
    whole = file.read_bytes()
    read = [PreparedShards(tmp_path).read(index) for index in range(5, 10)]
    generator = np.random.default_rng(0)
    refused = 0
    for place in generator.choice(len(whole), 300, replace=False):
        data = bytearray(whole)
        data[place] ^= 1 << generator.integers(8)
        file.write_bytes(data)
        try:
            now = [PreparedShards(tmp_path).read(index) for index in range(5, 10)]
        except (InputError, CorruptImageError):
            refused += 1
        else:
            assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(read, now, strict=True))
    assert refused > 50


def test_a_flipped_bit_is_a_corrupt_image_that_the_loader_replaces(folder, tmp_path):
    prepare(config(folder, tmp_path))
    flipped(tmp_path / "shard-000001.arrow", 5)
    shards = PreparedShards(tmp_path)
    with pytest.raises(CorruptImageError, match=r"shard-000001.arrow: ant/5.png: its checksum"):
        shards.read(5)
    x, _ = next(Loader(shards, 21, seed=0, workers=1))
    assert sum(torch.equal(image, expected(6).float() / 127.5 - 1) for image in x) == 2


def test_unusable_pictures_are_named_up_to_the_budget(folder, tmp_path, capsys, caplog):
    broken = tmp_path / "in"
    for label, name in enumerate(CLASSES):
        (broken / name).mkdir(parents=True)
        for i in range(7):
            data = encoded(7 * label + i)
            cut = {3: data[:200], 12: b""}.get(7 * label + i, data)
            (broken / name / f"{i}.png").write_bytes(cut)
    with pytest.raises(InputError, match=r"at most 1 unusable pictures, the last is bee/5.png: it has no bytes"):
        prepare(config(broken, tmp_path / "out", max_corrupt=1))
    flags = ["--size", "8", "--shard-images", "5", "--workers", "2", "--max-corrupt", "2", "--verify"]
    command(["prepare", f"folder:{broken}", "--out", str(tmp_path / "out"), *flags])
    out = capsys.readouterr().out
    assert "left out ant/3.png: " in caplog.text and "left out bee/5.png: it has no bytes" in caplog.text
    assert "19 images of 3 classes at 8 px; 2 left out" in out and "19 images verified" in out
    holds_all(PreparedShards(tmp_path / "out"), skipped=(3, 12))


def test_another_run_in_the_same_directory_is_refused(folder, prepared, tmp_path):
    with pytest.raises(InputError, match=r"size: .* was begun with 8, got 16; expected another --out"):
        prepare(config(folder, prepared, size=16))
    (tmp_path / "theirs").write_text("")
    with pytest.raises(InputError, match=r"is not empty and holds no prepared shards"):
        prepare(config(folder, tmp_path))
    for name in CLASSES:
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.png").write_bytes(encoded(0))
    prepare(config(tmp_path / "in", tmp_path / "out"))
    (tmp_path / "in/ant/b.png").write_bytes(encoded(1))
    with pytest.raises(InputError, match=r"source: .* has changed since .* was begun"):
        prepare(config(tmp_path / "in", tmp_path / "out"))


def test_the_shards_are_hugging_face_data(folder, prepared, tmp_path):
    files = sorted(map(str, prepared.glob("*.arrow")))
    rows = list(datasets.load_dataset("arrow", data_files=files, split="train", streaming=True))
    assert [row["label"] for row in rows] == [n // 7 for n in range(21)]
    assert all(row["image"] == expected(n).numpy().tobytes() for n, row in enumerate(rows))
    prepare(config(folder, tmp_path / "png", encoding="png", size=20))
    data = prepare(config(None, tmp_path / "out", source=f"hf:{tmp_path}/png"))
    assert torch.equal(data.read(20)[0], recropped(20))


def recropped(number):
    return torch.from_numpy(np.array(centre_crop(centre_crop(picture(number), 20), 8))).permute(2, 0, 1)


def test_webdataset_shards_are_a_source(tmp_path):
    for shard in range(5):
        numbers = range(5 * shard, min(5 * shard + 5, 21))
        label = ("cls", lambda n: str(n // 7).encode()) if shard else ("json", lambda n: b'{"label": %d}' % (n // 7))
        pairs = [[(f"{n:09d}.png", encoded(n)), (f"{n:09d}.{label[0]}", label[1](n))] for n in numbers]
        tar(tmp_path / f"shard-{shard:06d}.tar", [entry for pair in pairs for entry in pair])
    pattern = f"wds:{tmp_path}/shard-{{000000..000004}}.tar"
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(CLASSES))
    data = prepare(config(None, tmp_path / "out", source=pattern, shard_images=8, classes=names))
    assert data.classes == CLASSES
    holds_all(data)
    names.write_text("ant\nbee\n")
    unnamed = config(None, tmp_path / "unnamed", source=pattern)
    with pytest.raises(InputError, match="classes: expected names of 3 classes, got 2"):
        prepare(dataclasses.replace(unnamed, classes=names))
    with pytest.raises(InputError, match=r"classes: .* was begun with other names of classes"):
        prepare(unnamed)
    assert prepare(dataclasses.replace(unnamed, out=tmp_path / "numbers")).classes == ("0", "1", "2")
    assert [s.key for s in open_source(pattern).samples(19)] == ["000000019", "000000020"]
    torn = tmp_path / "shard-000004.tar"
    torn.write_bytes(torn.read_bytes()[:900])
    with pytest.raises(InputError, match=r"source: .*000004.tar is cut or cannot be read: unexpected end"):
        list(open_source(pattern).samples())
    tar(tmp_path / "bare.tar", [("a.png", encoded(0))])
    with pytest.raises(InputError, match="the last is a: it has no label"):
        prepare(config(None, tmp_path / "bare", source=f"wds:{tmp_path}/bare.tar", max_corrupt=0))


@pytest.mark.parametrize("encoding", ["npy", "png", "jpg"])
def test_shards_of_earlier_versions_are_refused_with_the_command_that_converts_them(tmp_path, encoding):
    """Tar shards of npy, png or jpg with a dataset.json; conversion keeps pixels, labels and class names."""
    old, entries = tmp_path / "old", []
    old.mkdir()
    for n in range(6):
        buffer, square = io.BytesIO(), centre_crop(picture(n), 8)
        if encoding == "npy":
            np.save(buffer, np.asarray(square).transpose(2, 0, 1))
        else:
            square.save(buffer, {"png": "PNG", "jpg": "JPEG"}[encoding])
        entries.append((buffer.getvalue(), n % 2))
    for shard, part in enumerate((entries[:4], entries[4:])):
        numbered = [(f"{4 * shard + i:09d}", *entry) for i, entry in enumerate(part)]
        pairs = [[(f"{key}.{encoding}", data), (f"{key}.cls", str(label).encode())] for key, data, label in numbered]
        tar(old / f"shard-{shard:06d}.tar", [entry for pair in pairs for entry in pair])
    (old / "dataset.json").write_text('{"classes": ["ant", "bee"], "size": 8, "format": 1}')
    with pytest.raises(InputError, match="prepared by an earlier version") as error:
        open_data(str(old), 8)
    said = shlex.split(str(error.value).split("`")[1])
    assert said[:3] == ["pmf", "data", "prepare"] and said[-2:] == ["--out", "DIRECTORY"]
    command(["prepare", said[3], "--out", str(tmp_path / "new"), "--size", "8", "--encoding", encoding])
    data = PreparedShards(tmp_path / "new")
    assert data.classes == ("ant", "bee") and len(data) == 6
    for n, (stored, label) in enumerate(entries):
        if encoding == "npy":
            pixels = np.load(io.BytesIO(stored))
        else:
            pixels = np.array(Image.open(io.BytesIO(stored))).transpose(2, 0, 1)
        assert np.array_equal(data.read(n)[0], pixels) and data.read(n)[1] == label


@pytest.mark.parametrize("kind", ["parquet", "disk", "arrow"])
def test_hugging_face_data_sets_are_a_source(folder, tmp_path, kind):
    columns = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))}
    rows = {"picture": [{"bytes": encoded(n), "path": None} for n in range(21)], "kind": [n // 7 for n in range(21)]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    place = tmp_path / "data"
    if kind == "parquet":
        place.mkdir()
        data.to_parquet(place / "train.parquet")
    else:
        data.save_to_disk(place)
        if kind == "arrow":
            (place / "state.json").unlink()
    spec = f"hf:{place}?image=picture&label=kind"
    out = tmp_path / "out"
    holds_all(prepare(config(None, out, source=spec)))
    assert PreparedShards(out).classes == CLASSES
    (last,) = open_source(spec).samples(20)
    assert (last.key, last.picture, last.label) == ("row 20", encoded(20), 2)
    with pytest.raises(InputError, match=r"has no column 'image', its columns are \['kind', 'picture'\]"):
        open_source(f"hf:{place}")
    with pytest.raises(InputError, match="hf options are config, image, label, split, streaming; got 'x=1'"):
        open_source(f"hf:{place}?x=1")


def test_rows_that_only_name_their_files_are_read_too(folder):
    rows = {"image": [str(folder / "bee/2.png"), str(folder / "bee/none.png"), None], "label": [1, 1, 1]}
    columns = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    source = datasets.Dataset.from_dict(rows, features=columns)
    made = [_row(20, "png", sample)[0] for sample in row_samples(source, "image", "label", 0)]
    assert made[0]["image"] == _row(20, "png", Sample("", encoded(9), 1))[0]["image"]
    assert "No such file" in made[1]["reason"] and made[2]["reason"].startswith("it has no bytes")


@pytest.mark.parametrize(("package", "spec"), [("braceexpand", "wds:a.tar"), ("datasets", "hf:owner/name")])
def test_a_missing_package_is_named_by_its_extra(monkeypatch, package, spec):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'pixel-meanflow\[data\]'"):
        open_source(spec)


def test_wrong_sources_are_refused(tmp_path):
    for spec, message in (
        ("zip:a", "source: expected folder:PATH, hf:NAME"),
        (f"folder:{tmp_path}/none", "is not a directory"),
        (f"folder:{tmp_path}", "holds no class directories"),
        (f"wds:{tmp_path}/{{0..1}}.tar", "there is no shard"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(spec)


def test_data_opens_by_name(prepared, folder):
    assert open_data("digits", 8).image_shape == (1, 8, 8)
    assert len(open_data(str(prepared), 8)) == 21
    for spec, size, message in (
        ("digits", 16, "data: digits have 8 pixels a side"),
        (str(prepared), 16, "was prepared at 8 pixels, the network has 16"),
        (f"folder:{folder}", 8, f"run `pmf data prepare 'folder:{folder}' --out DIRECTORY --size 8`"),
        (str(folder), 8, f"run `pmf data prepare 'folder:{folder}'"),
        ("hf:owner/name", 8, "run `pmf data prepare 'hf:owner/name'"),
        ("nothing", 8, "data: expected digits, photographs or a prepared directory, got nothing"),
    ):
        with pytest.raises(InputError, match=message):
            open_data(spec, size)
