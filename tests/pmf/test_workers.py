"""Whatever ends or sticks in a worker of the loader is one error within seconds, and nothing waits for it."""

import contextlib
import errno
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import pytest
import torch

from pmf import data as data_room
from pmf.data import CorruptImageError, Loader, workers
from pmf.errors import InputError

BAD = 17


@dataclass(frozen=True)
class Faulty:
    """Reading image 17 of 40 does `fault`."""

    fault: object
    image_shape = (1, 1, 4)
    num_classes = 7

    def __len__(self):
        return 40

    def read(self, index):
        image = torch.full((1, 1, 4), index, dtype=torch.uint8)
        return self.fault(image) if index == BAD else (image, index % 7)


def raises(error):
    def fault(image):
        raise error

    return fault


def local_error(image):
    class HiddenError(Exception):  # it can be neither pickled nor made anew from its message
        def __init__(self, one, two):
            super().__init__(one)

    raise HiddenError("deep\nand deeper", 2)


def local_corrupt(image):
    class HiddenError(CorruptImageError):
        pass

    raise HiddenError("shard", "torn")


def signals(number):
    return lambda image: (os.kill(os.getpid(), number), time.sleep(5))


def children():
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return set(file.read().split())


def read_all(fault, count, steps=10):
    """Read two epochs; give the loader."""
    loader = Loader(Faulty(fault), 8, seed=0, workers=count)
    for _ in range(steps):
        next(loader)
    return loader


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (raises(ValueError("deep\nand deeper")), "data: image 17 cannot be read: ValueError: deep"),
        (raises(FileNotFoundError(errno.ENOENT, "No such file", "/gone")), "data: image 17 .*FileNotFoundError.*/gone"),
        (raises(MemoryError()), "data: image 17 cannot be read: MemoryError"),
        (raises(StopIteration()), "data: image 17 cannot be read: StopIteration"),
        (local_error, "data: image 17 cannot be read: HiddenError: deep"),
        (lambda image: None, r"data: image 17: expected read\(\) to give \(image, label\), got NoneType"),
        (
            lambda image: (None, 1),
            r"data: image 17: expected a tensor uint8, float32 or float64 \[1, 1, 4\].*, got NoneType",
        ),
        (lambda image: (image.numpy(), 1), r"data: image 17: expected a tensor .*, got ndarray"),
        (lambda image: (image.view(1, 4, 1), 1), r"data: image 17: expected .*, got torch.uint8 \[1, 4, 1\]"),
        (lambda image: (image.int(), 1), r"data: image 17: expected .*, got torch.int32 \[1, 1, 4\]"),
        (lambda image: (image.float(), 1), "data: image .*: expected one dtype in a batch"),
        (lambda image: (image, "3"), r"data: label of image 17: expected an integer in \[0, 7\), got '3'"),
        (lambda image: (image, 3.0), r"data: label of image 17: expected an integer in \[0, 7\), got 3.0"),
        (lambda image: (image, None), r"data: label of image 17: expected an integer in \[0, 7\), got None"),
        (lambda image: (image, -1), r"data: label of image 17: expected an integer in \[0, 7\), got -1"),
        (lambda image: (image, 7), r"data: label of image 17: expected an integer in \[0, 7\), got 7"),
    ],
)
def test_what_a_read_raises_or_gives_is_one_line_and_ends_the_loader(fault, message, count):
    before = children()
    loader = Loader(Faulty(fault), 8, seed=0, workers=count)
    with pytest.raises(InputError, match=f"^{message}[^\n]*$") as error:
        for _ in range(10):
            next(loader)
    assert error.value.__cause__ is not None
    assert children() <= before and list(loader) == []


@pytest.mark.parametrize("count", [0, 2])
def test_integers_of_any_type_are_labels_and_any_corrupt_image_is_replaced(count):
    for fault in (lambda image: (image, torch.tensor(3)), lambda image: (image.as_subclass(torch.nn.Buffer), True)):
        read_all(fault, count).close()
    read_all(local_corrupt, count).close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda image: os._exit(0), "ended with exit status 0"),
        (lambda image: os._exit(3), "ended with exit status 3: .*--workers 0 shows where"),
        (signals(signal.SIGKILL), r"was killed \(SIGKILL\), .*memory runs out: use fewer --workers"),
        (signals(signal.SIGBUS), "was ended by SIGBUS: shared memory ran out, .*--shm-size=8g or --ipc=host"),
        (signals(signal.SIGSEGV), "was ended by SIGSEGV: .*--workers 0 shows where"),
        (raises(SystemExit("bye")), "SystemExit: bye"),
        (raises(KeyboardInterrupt()), "KeyboardInterrupt"),
    ],
)
def test_a_worker_that_dies_is_one_line_and_ends_the_others(fault, message):
    before, began = children(), time.monotonic()
    with pytest.raises(InputError, match=rf"^data: (worker \d )?{message}[^\n]*$") as error:
        read_all(fault, 2)
    assert error.value.__cause__ is not None and children() <= before and time.monotonic() - began < 15


def test_a_batch_that_cannot_be_sent_is_an_error(monkeypatch):
    class Hidden(list):
        pass

    monkeypatch.setattr(data_room.reading, "default_collate", lambda images: Hidden())
    with pytest.raises(
        InputError, match=r"data: worker \d could not send a batch: shared memory or open files ran out"
    ):
        read_all(lambda image: (image, 1), 2)


def test_a_worker_that_dies_between_two_batches_does_not_disturb_what_runs_then():
    loader = Loader(Faulty(lambda image: (image, 1)), 8, seed=0, workers=2)
    next(loader)
    for pid in children():
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.5)  # PyTorch's own handler would raise here
    with pytest.raises(InputError, match="was killed"):
        for _ in range(20):
            next(loader)


def test_a_stuck_worker_is_warned_of_then_an_error_and_the_end_is_quick(monkeypatch, caplog):
    monkeypatch.setattr(workers, "STUCK", 3)
    monkeypatch.setattr(workers, "REMIND", 1)
    before, began = children(), time.monotonic()
    with pytest.raises(InputError, match=r"data: no batch came for 3 s: a worker is stuck in a read, .*--workers"):
        read_all(signals(signal.SIGSTOP), 2)
    assert children() <= before and time.monotonic() - began < 3 + 15
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "no batch came for" in r.getMessage()]


def test_a_slow_batch_is_waited_for():
    def slow(image):
        time.sleep(2.5)
        return image, 1

    loader = Loader(Faulty(slow), 40, seed=0, workers=1)
    assert len(next(loader)[0]) == 40


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from PyTorch's half-made iterator
def test_workers_that_cannot_start_are_an_error_and_those_that_did_are_ended(monkeypatch):
    start, before, started = multiprocessing.Process.start, children(), []

    def second_fails(process):
        if started:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", second_fails)
    with pytest.raises(
        InputError, match=r"data: cannot start 2 workers: .*Cannot allocate memory; use fewer --workers"
    ):
        Loader(Faulty(None), 8, seed=0, workers=2)
    started[0].join(5)
    assert children() <= before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(__len__=raises(OSError("gone"))), r"data: len\(data\) raises OSError: gone"),
        (dict(__len__=lambda data: 2.5), r"data: len\(data\) raises TypeError"),
        (dict(image_shape=None), "data: image_shape raises TypeError"),
        (dict(num_classes=property(raises(KeyError("label")))), "data: num_classes raises KeyError"),
    ],
)
def test_data_that_do_not_say_what_they_hold_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Loader(type("Other", (Faulty,), change)(None), 8, seed=0)


PROGRAM = """
import os, signal, sys, time, torch
from pmf.data import Loader

class Data:
    image_shape, num_classes = (1, 1, 4), 7
    def __len__(self):
        return 40
    def read(self, index):
        if index == 17:
            FAULT
        return torch.zeros(1, 1, 4, dtype=torch.uint8), 0

loader = Loader(Data(), 8, seed=0, workers=2)
next(loader)
here = os.getpid()
print(*open(f"/proc/{here}/task/{here}/children").read().split(), flush=True)
END
"""


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        ("raise ValueError('bad')", "[next(loader) for _ in range(10)]"),  # the traceback keeps the loader
        ("time.sleep(10**6)", "kept = loader; raise SystemExit"),
        ("time.sleep(10**6)", "os.kill(here, signal.SIGKILL)"),
        ("time.sleep(10**6)", "del loader"),
        ("time.sleep(10**6)", "os._exit(1)"),
    ],
)
def test_the_process_ends_within_seconds_and_its_workers_with_it(fault, end):
    code = PROGRAM.replace("FAULT", fault).replace("END", end)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = process.stdout.readline().split()
    assert len(pids) == 2
    process.wait(timeout=15)
    deadline = time.monotonic() + 10
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, pids))


@pytest.mark.parametrize("length", [workers.SOCKETS_FOLDER, workers.SOCKETS_FOLDER + 1])
def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_named(length):
    code = PROGRAM.replace("FAULT", "pass").replace("END", "loader.close()")
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = f"{short}/{'a' * (length - len(short) - 1)}"
        os.mkdir(folder)
        ended = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | dict(TMPDIR=folder), capture_output=True, text=True
        )
    said = ended.stderr.splitlines()[-1:]
    told = f"TMPDIR: expected a path of at most {workers.SOCKETS_FOLDER} bytes, for sockets, got {folder}"
    if length > workers.SOCKETS_FOLDER:
        message = rf"pmf.errors.InputError: data: worker \d could not send a batch: {re.escape(told)}"
        assert re.fullmatch(message, said[0])
    else:
        assert ended.returncode == 0 and not said


def test_workers_ignore_the_signals_that_stop_a_run():
    loader = Loader(Faulty(lambda image: (image, 1)), 8, seed=0, workers=1)
    next(loader)
    for pid in children():
        for number in workers.STOP_SIGNALS:
            os.kill(int(pid), number)
    for _ in range(12):
        next(loader)


def test_a_wait_that_a_signal_ends_leaves_no_traceback_of_the_worker(capfd, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    loader = Loader(Faulty(lambda image: (image, 0)), 8, seed=0, workers=1)
    monkeypatch.setattr("multiprocessing.connection.answer_challenge", interrupted)  # while it fetches a batch
    with contextlib.suppress(KeyboardInterrupt):
        next(loader)
    time.sleep(1)  # the worker notices
    loader.close()
    assert capfd.readouterr().err == ""


def test_batches_that_are_gone_leave_nothing_in_memory():
    """What PyTorch keeps of each would split the place of the next one: a run of large batches grew by gigabytes."""
    loader = Loader(Faulty(lambda image: (image, 0)), 8, seed=0, workers=2)
    for _ in range(20):
        next(loader)
    kept = torch.multiprocessing.reductions.shared_cache.values()
    assert sum(reference.expired() for reference in kept) <= 4  # images and labels of one batch, or of two
    loader.close()
