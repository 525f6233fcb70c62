"""Prepared shards that are exchanged, written by others, or cut while they are read, and their fingerprint."""

import os
import pickle
import shutil
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
from pmf.data import CorruptImageError, Loader  # noqa: E402
from pmf.data.shards import PreparedShards, checksum, open_shard, read_classes  # noqa: E402
from pmf.errors import InputError  # noqa: E402
from pmf.train.data.prepare import prepare  # noqa: E402
from tests.train.preparing import config, contents, encoded, holds_all  # noqa: E402


@pytest.mark.parametrize("encoding", ["npy", "png"])
def test_a_fingerprint_tells_images_labels_and_classes_but_neither_place_nor_history(folder, tmp_path, encoding):
    first = prepare(config(folder, tmp_path / "a", encoding=encoding))
    made_again = tmp_path / "b"
    shutil.copytree(tmp_path / "a", made_again)
    (made_again / "shard-000002.arrow").unlink()
    assert prepare(config(folder, made_again, encoding=encoding)).fingerprint == first.fingerprint
    other_shards = prepare(config(folder, tmp_path / "c", encoding=encoding, shard_images=7))
    assert other_shards.fingerprint == first.fingerprint == pickle.loads(pickle.dumps(first)).fingerprint
    names = tmp_path / "names.txt"
    names.write_text("x\ny\nz\n")
    others = [prepare(config(folder, tmp_path / "d", encoding=encoding, classes=names))]
    others += [prepare(config(folder, tmp_path / "e", encoding=encoding, size=9))]
    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in/bee/3.png").write_bytes(encoded(99))
    others += [prepare(config(tmp_path / "in", tmp_path / "f", encoding=encoding))]
    os.replace(tmp_path / "in/bee/3.png", tmp_path / "in/cat/0.png")
    others += [prepare(config(tmp_path / "in", tmp_path / "g", encoding=encoding))]
    assert len({data.fingerprint for data in (first, *others)}) == 5


def test_exchanged_shards_are_noticed(folder, prepared, tmp_path):
    """All of their rows are whole, only in another place."""
    prepare(config(folder, tmp_path))
    a, b = (tmp_path / f"shard-00000{number}.arrow" for number in (0, 1))
    a.rename(tmp_path / "third")
    b.rename(a)
    (tmp_path / "third").rename(b)
    with pytest.raises(
        InputError, match=r"shard-000000.arrow was written as shard-000001.arrow: shards were exchanged"
    ):
        PreparedShards(tmp_path)
    prepare(config(folder, tmp_path))
    assert contents(tmp_path) == contents(prepared)


def test_shards_of_different_preparations_are_noticed(folder, tmp_path):
    for name, size in (("a", 8), ("b", 9)):
        prepare(config(folder, tmp_path / name, size=size))
    shutil.copy(tmp_path / "b/shard-000001.arrow", tmp_path / "a")
    with pytest.raises(InputError, match=r"shard-000001.arrow was prepared otherwise than the shards before it"):
        PreparedShards(tmp_path / "a")


def test_a_directory_that_lacks_most_of_its_shards_is_one_short_line(folder, tmp_path):
    prepare(config(folder, tmp_path))
    (tmp_path / "shard-000001.arrow").rename(tmp_path / "shard-900000.arrow")
    with pytest.raises(
        InputError, match=r"shard-000001.arrow is missing or torn: there is no such file; .* and \d+ more"
    ) as e:
        PreparedShards(tmp_path)
    assert len(str(e.value)) < 5000


def rewritten(file, change, metadata=lambda kept: kept):
    """Write a shard again with other metadata, and rows changed by a function of them."""
    table = open_shard(file)
    kept = metadata(dict(table.schema.metadata))
    table = pa.Table.from_pylist(change(table.to_pylist()), table.schema).replace_schema_metadata(kept)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def without_number(kept):
    return {name: value for name, value in kept.items() if name not in (b"number", b"lost")}


def huge(kept):
    return kept | {b"settings": kept[b"settings"].replace(b'"size": 8', b'"size": 1000000')}


def test_shards_without_a_number_open_as_before_and_others_must_fit_their_settings(folder, tmp_path):
    prepare(config(folder, tmp_path))
    for file in sorted(tmp_path.glob("*.arrow")):
        rewritten(file, lambda rows: rows, without_number)
    holds_all(PreparedShards(tmp_path))
    file = tmp_path / "shard-000001.arrow"
    whole = file.read_bytes()
    for change, metadata in (
        (lambda rows: rows, huge),
        (lambda rows: [row | {"image": row["image"][:-1]} for row in rows], dict),
        (lambda rows: [row | {"label": -3} for row in rows], dict),
        (lambda rows: [row | {"image": None} for row in rows], dict),
    ):
        file.write_bytes(whole)
        rewritten(file, change, metadata)
        with pytest.raises(InputError, match=r"shard-000001.arrow is (missing or )?torn"):
            PreparedShards(tmp_path)
    file.write_bytes(whole)
    rewritten(file, lambda rows: [row | {"label": 10**9} for row in rows])
    with pytest.raises(InputError, match=r"expected names of 1000000001 classes in classes.txt, got 3"):
        PreparedShards(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"^data: .*classes.txt cannot be read: 'utf-8' codec"):
        PreparedShards(tmp_path)


@pytest.mark.parametrize("directory", [None, 3, b"data"])
def test_a_directory_is_a_path(directory):
    with pytest.raises(InputError, match=r"^directory: expected the name of a directory, got "):
        PreparedShards(directory)


def test_class_names_behind_a_long_path_are_named_without_a_number():
    with pytest.raises(InputError, match=r"^classes: /x+ cannot be read: File name too long$"):
        read_classes(Path("/" + 300 * "x"), "classes")


def test_a_prepared_picture_of_another_size_or_kind_is_corrupt(folder, tmp_path):
    """Its checksum may be right: shards may come from anyone."""
    prepare(config(folder, tmp_path, encoding="png", shard_images=21))
    stored = [encoded(0, side=30), encoded(0, "EPS"), b"none"]

    def change(rows):
        new = [
            row | {"image": data, "checksum": checksum(data, row["label"])}
            for row, data in zip(rows[: len(stored)], stored, strict=True)
        ]
        return new + rows[len(stored) :]

    rewritten(tmp_path / "shard-000000.arrow", change)
    data = PreparedShards(tmp_path)
    for index, reason in enumerate(("it has \\(34, 30\\) pixels", "it is not a picture", "it is not a picture")):
        with pytest.raises(CorruptImageError, match=rf"shard-000000.arrow: ant/{index}.png: {reason}"):
            data.read(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(folder, tmp_path, workers):
    data = prepare(config(folder, tmp_path, size=64))
    os.truncate(tmp_path / "shard-000001.arrow", 4096)
    with pytest.raises(InputError, match=r"shard-000001.arrow became shorter while it was in use"):
        next(Loader(data, 21, seed=0, workers=workers))
