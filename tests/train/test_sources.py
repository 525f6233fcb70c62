"""Sources that change, are cut, or are not what they seem: noticed, named in one line, and never silent."""

import json
import logging
import os
import tarfile

import pytest

from pmf.errors import InputError

datasets = pytest.importorskip("datasets")
from pmf.data.shards import PreparedShards  # noqa: E402
from pmf.train.data.samples import Sample  # noqa: E402
from pmf.train.data.sources import open_source  # noqa: E402
from tests.train.preparing import encoded, fill, run, tar, tar_pair  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "in", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)))


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


def test_files_of_no_split_are_named(tmp_path, caplog):
    saved(tmp_path / "d", "parquet", train=3, more=2)
    assert len(list(open_source(f"hf:{tmp_path}/d").samples())) == 3
    assert "1 files belong to no split, first" in caplog.text and "more.parquet" in caplog.text


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


@pytest.mark.parametrize("url", ["reference://a::{}", "zip://a::reference://a::{}"])
def test_templates_are_not_filled_in(tmp_path, url):
    url = url.format(tmp_path / "refs.json")
    with pytest.raises(InputError, match=r"fills in templates, expected the address of a file"):
        open_source(f"wds:{url}")
    with pytest.raises(InputError, match=r"fills in templates, expected the address of a file"):
        Sample("a", url, 0).read()


def test_patterns_of_too_many_shards_are_refused():
    for pattern in ("{0..99999999999}.tar", "{000..999}/{-5..999}/{0..1}.tar"):
        with pytest.raises(InputError, match=r"^source: .* names [\d,]+ shards, expected at most 1,000,000"):
            open_source(f"wds:{pattern}")


@pytest.mark.parametrize("text", ["{", "[]", '{"classes": 3}', '{"classes": [1]}'])
def test_odd_files_beside_tars_are_named(tmp_path, text):
    tar(tmp_path / "0.tar", tar_pair(0))
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=r"^source: .*dataset.json: expected {\"classes\": \[names\]}"):
        open_source(f"wds:{tmp_path}/0.tar")
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "another's"}))
    assert open_source(f"wds:{tmp_path}/0.tar").classes == ()


def test_archives_one_after_another_in_one_file_are_refused(tmp_path):
    first = tar(tmp_path / "a.tar", tar_pair(0)).read_bytes()
    (tmp_path / "a.tar").write_bytes(first + tar(tmp_path / "b.tar", tar_pair(1)).read_bytes())
    with pytest.raises(InputError, match=r"a.tar is cut or cannot be read: something follows its end"):
        list(open_source(f"wds:{tmp_path}/a.tar").samples())


def test_entries_beside_the_pictures_are_not_samples(tmp_path):
    others = [("__MACOSX/._1.png", b"x"), ("._1.png", b"x"), ("README", b"x"), ("__meta__.json", b"{}")]
    tar(tmp_path / "a.tar", [*others, *tar_pair(0), *others, *tar_pair(1)])
    assert [sample.key for sample in open_source(f"wds:{tmp_path}/a.tar").samples()] == ["0", "1"]
    tar(tmp_path / "a.tar", [(f"../{name}", data) for name, data in tar_pair(0)])
    assert [sample.key for sample in open_source(f"wds:{tmp_path}/a.tar").samples()] == ["../0"]
