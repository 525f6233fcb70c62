import dataclasses

import pytest

from pmf.memory import TrainingMemory
from pmf.train.config import RunConfig
from pmf.train.diagnosis import (
    HEADROOM,
    data_advice,
    duration,
    gigabytes,
    largest_device_batch,
    memory_advice,
    precision_advice,
    worker_advice,
)

GB = 10**9
RUN = RunConfig(batch_size=1024, device_batch=128)


def count(checkpointing):
    """10 GB of state; a row keeps 0.5 GB, or a tenth of it under checkpointing."""
    return TrainingMemory(9 * GB, 1 * GB, GB // 20 if checkpointing == "block" else GB // 2)


@pytest.mark.parametrize(
    ("free", "change"),
    [
        (83, None),
        (79, "set --checkpointing block or --device-batch 64"),
        (15, "set --device-batch 4"),
        (11.8, "set --checkpointing block --device-batch 8"),
        (11, "more GPUs with --sharding fsdp, larger ones, or a smaller network"),
    ],
)
def test_too_little_memory_names_the_least_change(free, change):
    advice = memory_advice(RUN, 1, 128, free * GB, count)
    assert advice == (change and f"memory: 74.0 GB expected, {gigabytes(free * GB)} free: {change}")


def test_sharding_is_advised_where_the_state_alone_does_not_fit():
    advice = memory_advice(RUN, 8, 128, 6 * GB, count)
    assert advice.endswith("set --sharding fsdp --checkpointing block --device-batch 64")
    sharded = dataclasses.replace(RUN, sharding="fsdp")
    advice = memory_advice(sharded, 8, 64, 6 * GB, lambda way: count(way).sharded(8))
    assert advice.endswith("free: set --checkpointing block or --device-batch 4")


@pytest.mark.parametrize("free", [12, 20, 30, 60, 79])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_advice_on_memory_fits_and_satisfies_itself(free, checkpointing):
    run = dataclasses.replace(RUN, checkpointing=checkpointing)
    advice = memory_advice(run, 1, 128, free * GB, count)
    if advice is None:
        assert count(checkpointing).expected(128) <= HEADROOM * free * GB
        return
    words = advice.split(": set ")[1].split(" or ")[-1].split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    rows = int(flags.get("--device-batch", 128))
    changed = dataclasses.replace(run, checkpointing=flags.get("--checkpointing", checkpointing), device_batch=rows)
    assert memory_advice(changed, 1, rows, free * GB, count) is None


def test_device_batches_divide_every_process_share():
    assert largest_device_batch(1024, 8, 1000) == 128
    assert largest_device_batch(1024, 8, 127) == 64
    assert largest_device_batch(96, 3, 100) == 32
    assert largest_device_batch(15, 1, 15) == largest_device_batch(64, 1, 1) == largest_device_batch(64, 1, 0) == 0


def test_slow_data_ask_for_workers_while_there_are_cores():
    assert data_advice(1500, 1400, workers=8, cores=16) is None
    assert data_advice(900, 1400, workers=8, cores=16) == (
        "data: 900 images/s with 8 workers, the step takes 1,400: set --workers 15"
    )
    assert data_advice(900, 1400, 8, cores=12).endswith("set --workers 12, all cores of this process, and read faster")
    assert "a faster disk, more cores" in data_advice(900, 1400, 8, 8)


def test_without_workers_data_must_be_many_times_as_fast():
    assert data_advice(20_000, 1000, workers=0, cores=4) is None
    assert data_advice(10_000, 1000, workers=0, cores=4).endswith("set --workers 1")


def test_workers_fit_the_cores():
    assert worker_advice(8, 8, 96) is None and worker_advice(1, 1, 1) is None and worker_advice(0, 8, 4) is None
    assert worker_advice(8, 8, 32) == "workers: 8 x 8 workers on 32 cores: set --workers 4"
    assert worker_advice(4, 1, 2) == "workers: 4 workers on 2 cores: set --workers 2"


def test_precision_follows_what_the_device_can_do():
    assert precision_advice(half=True, able=True, device="cuda") is None
    assert precision_advice(half=False, able=True, device="cpu") is None
    assert "--precision float32" in precision_advice(half=True, able=False, device="cuda")
    assert "--precision bfloat16" in precision_advice(half=False, able=True, device="cuda")
    assert precision_advice(half=False, able=False, device="cuda") is None


def test_units():
    assert [gigabytes(x) for x in (1_361_000, 99e6, 3.34e9)] == ["1.36 MB", "99 MB", "3.3 GB"]
    assert [duration(s) for s in (90, 7200, 86400 * 3)] == ["1.5 minutes", "2.0 hours", "3.0 days"]
