import subprocess
import sys
import warnings

import pytest
import torch

from pmf.data import ImageSet, Loader
from pmf.draws import step_seed
from pmf.train.demo import digits


def test_digits_are_split_by_class_and_scaled():
    train, held_out = digits()
    assert len(train) == 1500 and len(held_out) == 297
    assert train.images.shape == (1500, 1, 8, 8)
    assert train.images.min() == -1 and train.images.max() == 1
    shares = [torch.bincount(part.labels) / len(part) for part in (train, held_out)]
    assert (shares[0] - shares[1]).abs().max() < 0.005
    assert torch.equal(digits()[0].images, train.images)


def test_an_epoch_shows_every_image_once_across_batch_borders():
    data = ImageSet(torch.linspace(-1, 1, 10)[:, None, None, None], torch.arange(10))
    loader = Loader(data, 4, seed=1)
    seen = torch.cat([next(loader)[1] for _ in range(5)])
    for epoch in (seen[:10], seen[10:]):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])
    assert not torch.equal(next(Loader(data, 10, seed=1))[1], next(Loader(data, 10, seed=2))[1])


@pytest.mark.parametrize(
    ("images", "seen"),
    [
        (lambda x: (x + 1) * 127.5, r"look like \[0, 255\], expected images / 127.5 - 1"),
        (lambda x: (x + 1) / 2, r"look like \[0, 1\], expected 2 \* images - 1"),
        (lambda x: ((x + 1) / 2 - 0.45) / 0.226, r"reach from -1\.99 to 2\.43"),
    ],
)
def test_images_of_another_scale_are_warned_of(images, seen):
    x, y = torch.linspace(-1, 1, 48).view(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.warns(UserWarning, match=rf"^images: expected images in \[-1, 1\]; these {seen}$") as told:
        ImageSet(images(x), y)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for good in (x, x * 1.2, (x * 127).byte(), x[:0], x.repeat(1, 2, 1, 1) * 4):  # the last are latents
            ImageSet(good, y[: len(good)])


def test_seeds_differ_by_run_step_and_purpose():
    seeds = {step_seed(s, i, p) for s in range(3) for i in range(3) for p in ("epoch", "draws")}
    assert len(seeds) == 18


@pytest.mark.parametrize("package", ["pyarrow", "xxhash"])
def test_prepared_data_name_their_extra_and_demo_data_do_not_need_it(package, tmp_path):
    (tmp_path / "shard-000000.arrow").write_bytes(b"")
    code = f"""
import sys
from pmf.train.cli import main
from pmf.train.data.by_name import open_data
assert len(open_data("digits", 8)) == 1500 and len(open_data("photographs", 32)) == 5400
assert not {{"pmf.data.shards", "xxhash", "datasets", "webdataset"}} & set(sys.modules)
sys.modules[{package!r}] = None
for arguments in (["data", "verify", {str(tmp_path)!r}], ["train", "digits", "--data", {str(tmp_path)!r}]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 2
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("pmf: data: prepared images need pip install 'pixel-meanflow[data]'") == 2


def test_a_fingerprint_of_data_in_memory_tells_images_labels_and_classes():
    images, labels = torch.arange(16.0).view(4, 1, 2, 2), torch.arange(4)
    same = ImageSet(images.clone(), labels.int(), ("a",))
    other = [ImageSet(images + 1, labels, ("a",)), ImageSet(images, labels.flip(0), ("a",)), ImageSet(images, labels)]
    other += [ImageSet(images.view(4, 1, 4, 1), labels, ("a",)), ImageSet(images.to(torch.uint8), labels, ("a",))]
    digests = {data.fingerprint for data in (ImageSet(images, labels, ("a",)), same, *other)}
    assert len(digests) == 6 and ImageSet(images.mT, labels).fingerprint not in digests
