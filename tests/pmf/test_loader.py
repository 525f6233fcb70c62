import logging
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from pmf.data import CorruptImageError, ImageSet, Loader, epoch_order
from pmf.data.loader import STOP_SIGNALS
from pmf.errors import InputError
from pmf.images import to_float
from pmf.train.demo import digits


@dataclass(frozen=True)
class Numbered:
    """Image i holds the bytes of i and has label i % 7; those in `corrupt` cannot be read."""

    length: int
    corrupt: frozenset = frozenset()
    image_shape = (1, 1, 4)
    num_classes = 7

    def __len__(self):
        return self.length

    def read(self, index):
        if index in self.corrupt:
            raise CorruptImageError(f"shard-{index}", "torn")
        return torch.tensor([index], dtype=torch.int32).view(torch.uint8).view(1, 1, 4), index % 7


def numbers(loader, steps):
    """The image indices of `steps` batches."""
    pairs = [next(loader) for _ in range(steps)]
    raw = torch.cat([((x + 1) * 127.5).round().to(torch.uint8) for x, _ in pairs])
    index = raw.flatten(1).view(torch.int32)[:, 0]
    assert torch.equal(torch.cat([y for _, y in pairs]), index.long() % 7)
    return index.view(steps, -1)


def test_each_index_comes_once_an_epoch_over_ranks_workers_and_interruptions():
    """10,000 images on 3 ranks with 2 workers, stopped twice; the last part runs on one rank without workers."""
    data, batch, epochs = Numbered(10_000), 60, 2
    stops = [(0, 70, 3, 2), (70, 201, 3, 2), (201, 334, 1, 0)]
    seen = []
    for first, last, world, workers in stops:
        ranks = []
        for rank in range(world):
            loader = Loader(data, batch, seed=4, rank=rank, world=world, workers=workers, first_step=first)
            ranks.append(numbers(loader, last - first))
            loader.close()
        seen.append(torch.cat(ranks, dim=1).flatten())
    seen = torch.cat(seen)
    for epoch in range(epochs):
        part = seen[epoch * 10_000 : (epoch + 1) * 10_000]
        assert torch.equal(part.long(), epoch_order(10_000, 4, epoch))
        assert torch.equal(part.sort().values, torch.arange(10_000, dtype=torch.int32))


def test_digits_come_as_they_always_did():
    """The batches of steps, written out: consecutive parts of the epochs' permutations, without a gap."""
    train, _ = digits()
    loader = Loader(train, 64, seed=3, first_step=20)
    both = torch.cat([epoch_order(1500, 3, 0), epoch_order(1500, 3, 1)])
    for step in range(20, 30):  # step 23 crosses the epochs
        x, y = next(loader)
        index = both[step * 64 : (step + 1) * 64]
        assert torch.equal(x, train.images[index]) and torch.equal(y, train.labels[index])
        assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert loader.step == 30


def test_a_batch_may_be_larger_than_the_data():
    loader = Loader(Numbered(3), 8, seed=0)
    assert torch.equal(numbers(loader, 3).flatten(), torch.cat([epoch_order(3, 0, e) for e in range(8)]).int())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generator_stays_where_it_was(workers):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(Loader(Numbered(100), 10, seed=0, workers=workers))
    assert torch.equal(torch.rand(3), expected)


def test_bytes_become_floats_and_floats_stay():
    assert torch.equal(to_float(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-1.0, 1.0]))
    images = torch.rand(2, 1, 2, 2)
    assert to_float(images) is images


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_once_and_replaced_by_the_next(caplog, workers):
    data, sound = Numbered(50, frozenset({7, 8, 30})), Numbered(50)
    loader = Loader(data, 10, seed=1, workers=workers, max_corrupt=3)
    got, plain = numbers(loader, 10), numbers(Loader(sound, 10, seed=1), 10)
    replaced = torch.tensor([{7: 9, 8: 9, 30: 31}.get(i, i) for i in plain.flatten().tolist()])
    assert torch.equal(got.flatten().long(), replaced)
    resumed = Loader(data, 10, seed=1, first_step=6)
    assert torch.equal(numbers(resumed, 4), got[6:])
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING][:3]
    assert sorted(w.split(";")[0] for w in warnings) == [f"unreadable image shard-{i}: torn" for i in (30, 7, 8)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("corrupt", "message"), [({3, 9, 30}, "at most 2 unreadable"), (range(50), "at most 2 ")])
def test_too_many_corrupt_images_are_an_error_that_names_the_last(workers, corrupt, message):
    loader = Loader(Numbered(50, frozenset(corrupt)), 10, seed=1, workers=workers, max_corrupt=2)
    with pytest.raises(InputError, match=rf"data: expected {message}.*, the last one is shard-\d+: torn"):
        for _ in range(6):
            next(loader)


def test_data_without_a_readable_image_is_an_error():
    with pytest.raises(InputError, match="data: no readable image follows shard-"):
        next(Loader(Numbered(4, frozenset(range(4))), 2, seed=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=10, world=4), "batch_size: expected a positive multiple of the 4 ranks, got 10"),
        (dict(batch_size=0), "batch_size: expected a positive multiple"),
        (dict(rank=2, world=2), r"rank: expected a number in \[0, 2\), got 2"),
        (dict(first_step=-1), "first_step: expected a number >= 0, got -1"),
        (dict(workers=-1), "workers: expected a number >= 0, got -1"),
        (dict(data=Numbered(0)), "data: expected at least one image"),
    ],
)
def test_impossible_loaders_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Loader(**(dict(data=Numbered(10), batch_size=2, seed=0) | change))


SIGNALLED = """
import os, signal, torch
from pmf.data import ImageSet, Loader
from pmf.data.workers import STOP_SIGNALS
for number in STOP_SIGNALS:
    signal.signal(number, lambda *_: print("asked to stop", flush=True))
data = ImageSet(torch.zeros(64, 1, 2, 2), torch.arange(64))
kept = []
def run(loader):
    kept.append(loader)
    os.killpg(0, NUMBER)  # workers may still be starting
    for _ in range(40):
        next(loader)
run(Loader(data, 8, seed=0, workers=2))
print("done", flush=True)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_workers_outlive_the_signal_that_stops_the_run_and_end_with_it(number):
    code = SIGNALLED.replace("NUMBER", str(int(number)))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert result.returncode == 0 and result.stdout == "asked to stop\ndone\n", result.stderr


def test_a_closed_loader_has_ended_its_workers():
    loader = Loader(ImageSet(torch.zeros(8, 1, 2, 2), torch.arange(8)), 4, seed=0, workers=2)
    next(loader)
    children = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    with open(children) as file:
        before = file.read().split()
    loader.close()
    with open(children) as file:
        assert len(set(before) - set(file.read().split())) == 2
    assert list(loader) == []


def test_half_of_the_images_are_flipped_on_any_ranks_and_workers():
    """A function of (seed, step) and the place in the global batch; `flip` changes nothing else."""
    images = torch.arange(400 * 6, dtype=torch.float32).view(400, 1, 2, 3)
    data, batch = ImageSet(images, torch.arange(400) % 7), 40

    def seen(flip, world=1, workers=0, first=0):
        loaders = [
            Loader(data, batch, seed=3, rank=r, world=world, workers=workers, first_step=first, flip=flip)
            for r in range(world)
        ]
        return torch.stack([torch.cat([next(loader)[0] for loader in loaders]) for _ in range(first, 20)])

    plain, flipped = seen(False), seen(True)
    mirrored = (flipped != plain).flatten(2).any(2)
    expected = torch.where(mirrored[:, :, None, None, None], plain.flip(-1), plain)
    assert torch.equal(flipped, expected)
    assert abs(mirrored.float().mean() - 0.5) < 4 * 0.5 / 800**0.5
    assert not torch.equal(mirrored[:10], mirrored[10:])  # the second epoch is mirrored anew
    for options in (dict(world=4), dict(workers=2), dict(first=7)):
        assert torch.equal(seen(True, **options), flipped[options.get("first", 0) :])
