"""`pmf.timing`: runs in turn, their memory, profiles; a GPU is stood in for by a log of calls."""

import contextlib
import math
import time
import types

import pytest
import torch
from torch.autograd import DeviceType

from pmf import timing
from pmf.timing import ceilings, comparison, details, measure

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def measured(runs, repeats=30, seconds=math.inf, **options):
    """Provider -> record of its times."""
    providers = {name: lambda run=run: run for name, run in runs.items()}
    return {r["provider"]: r for r in measure(providers, CPU, repeats, seconds, **options)}


def test_a_comparison_shows_time_and_live_memory_as_ratios_to_the_first():
    a = torch.randn(1000)

    def broken():
        raise ValueError("no such thing")

    lines = comparison({"one": lambda: a + 1, "two": lambda: ((a + 1) * 2).sum(), "none": broken}, CPU).splitlines()
    assert (
        lines[:2] == ["| | ms | peak MB |", "|---|---|---|"] and lines[4] == "| none | ValueError: no such thing |  |"
    )
    assert lines[2].startswith("| one | ") and lines[2].endswith(" (1.00) | 0.004 (1.00) |")
    assert lines[3].endswith(" | 0.008 (2.00) |")


def test_measure_takes_turns_and_gives_quartiles():
    order = []
    result = measured({name: lambda name=name: order.append(name) for name in "ab"}, repeats=4)
    assert "".join(order) == "aaabbb" + "ab" * 4
    assert result["a"]["quartiles_us"][0] <= result["a"]["median_us"] <= result["a"]["quartiles_us"][1]
    assert result["a"]["repeats"] == 4


class FakeGPU:
    """Stands in for `torch` in timing.py as if on a GPU: logs calls in order; every run takes a millisecond."""

    int8 = torch.int8

    def __init__(self):
        self.cuda, self.log, self.allocated, self.peak, self.capturing = self, [], 100, 0, False

    def get_device_properties(self, device):
        return types.SimpleNamespace(L2_cache_size=10)

    def empty(self, size, dtype, device):
        return types.SimpleNamespace(zero_=lambda: self.log.append(f"flush {size}"))

    def Event(self, enable_timing):  # noqa: N802
        return types.SimpleNamespace(record=lambda: self.log.append("event"), elapsed_time=lambda end: 1.0)

    def CUDAGraph(self):  # noqa: N802
        return types.SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.capturing = True
        yield
        self.capturing = False

    def run(self, name, fails_in_capture=False):
        if self.capturing and fails_in_capture:
            self.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append(name)
        self.peak = self.allocated + (50 if self.log.count(name) == 1 else 5)

    def memory_allocated(self, device):
        return self.allocated

    def max_memory_allocated(self, device):
        return self.peak

    def memory_reserved(self, device):
        return 1000

    def reset_peak_memory_stats(self, device):
        pass

    def current_stream(self):
        pass

    def synchronize(self, device=None):
        pass


def test_on_a_gpu_l2_is_cold_and_providers_take_turns(monkeypatch):
    gpu = FakeGPU()
    monkeypatch.setattr(timing, "torch", gpu)
    runs = {"a": lambda: gpu.run("a"), "b": lambda: gpu.run("b", True), "captured": lambda: gpu.run("captured")}
    found = list(measure({name: lambda run=run: run for name, run in runs.items()}, GPU, 4, replaying=["captured"]))
    warming = ["a"] * 4 + ["b"] * 3 + ["captured"] * 4  # three times, then once in capture if that works
    turn = [x for ran in ("replay", "b", "replay") for x in ("flush 40", "event", ran, "event")]
    assert gpu.log == warming + turn * 4
    kept = ("provider", "captured", "peak_bytes", "peak_from", "reserved_bytes", "median_us", "repeats")
    assert [tuple(r[field] for field in kept) for r in found] == [
        ("a", True, 5, "a warm run", 1000, 1000.0, 4),
        ("b", False, 5, "a warm run", 1000, 1000.0, 4),
        ("captured", True, 50, "warm-up and capture", 1000, 1000.0, 4),
    ]


def test_a_measurement_says_what_its_peak_is_of():
    class Counted:
        def __call__(self):
            pass

        def peak_bytes(self):
            return 7

    runs = {"counted": Counted(), "captured": lambda: None, "plain": lambda: None}
    found = measured(runs, repeats=3, replaying=["captured"])
    memory = {name: (r["peak_bytes"], r["peak_from"], r["reserved_bytes"]) for name, r in found.items()}
    assert memory == {
        "counted": (7, "its own count", None),
        "captured": (None, "warm-up and capture", None),
        "plain": (None, "a warm run", None),
    }


def test_repeats_shrink_to_the_time_there_is(monkeypatch):
    monkeypatch.setattr(timing, "warm_up", lambda *a: ({}, 1.0))
    assert measured({"slow": lambda: None}, repeats=30, seconds=10.0)["slow"]["repeats"] == 10
    assert measured({"slow": lambda: None}, repeats=30, seconds=0.5)["slow"]["repeats"] == 3


def test_one_provider_that_fails_loses_no_other():
    def broken():
        raise RuntimeError("first line\nsecond line")

    providers = {"broken": broken, "fails when run": lambda: broken, "works": lambda: lambda: None}
    records = list(measure(providers, CPU, 3))
    assert [r["status"] for r in records] == ["failed", "failed", "measured"]
    assert records[0]["error"] == "RuntimeError: first line" and records[0]["provider"] == "broken"


def test_a_figure_is_kept_if_its_details_fail(monkeypatch):
    monkeypatch.setattr(timing, "details", lambda *a: 1 / 0)
    (record,) = measure({"lean": lambda: lambda: None}, CPU, 3, detailed=True)
    assert record["status"] == "measured" and record["note"] == "ZeroDivisionError: division by zero"


def test_a_profile_names_what_takes_the_time():
    a, b = torch.randn(400, 400), torch.randn(4)
    found = details(lambda: (a @ a, a @ a, b + b), CPU)
    name, share, calls = found["profile"][0]
    assert name == "aten::mm" and calls == 2 and 0.3 < share <= 1
    assert [share for _, share, _ in found["profile"]] == sorted((s for _, s, _ in found["profile"]), reverse=True)
    assert "aten::mm" in found["table"] and "aten::add" in found["table"]
    assert found["busy_us"] is None and found["launches"] is None


def test_kernels_are_named_by_the_operator_that_launched_them(monkeypatch):
    """Our kernels' names are too alike. On a GPU an operator's time is that of the kernels it launched itself."""

    class Rows(list):
        def table(self, **options):
            return str(options["sort_by"])

    def row(key, took, count, device=DeviceType.CPU, marked=False):
        return types.SimpleNamespace(
            key=key, self_device_time_total=took, count=count, device_type=device, is_user_annotation=marked
        )

    rows = [row("pmf::norm", 10.0, 1), row("aten::mm", 60.0, 2), row("_forward", 30.0, 3, DeviceType.CUDA)]
    rows += [row("gemm", 60.0, 2, DeviceType.CUDA), row("region", 90.0, 1, DeviceType.CUDA, marked=True)]
    recorded = types.SimpleNamespace(key_averages=lambda: Rows([*rows, row("pmf::swiglu", 20.0, 2)]))
    monkeypatch.setattr(timing, "profile", lambda: contextlib.nullcontext(recorded))
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    found = details(lambda: None, GPU)
    assert found.pop("host_us") > 0
    names = [("aten::mm", 60 / 90, 2), ("pmf::swiglu", 20 / 90, 2), ("pmf::norm", 10 / 90, 1)]
    assert found == {"busy_us": 90.0, "launches": 5, "profile": names, "table": "self_device_time_total"}


def test_host_time_is_that_of_the_call():
    assert details(lambda: time.sleep(0.01), CPU, 3)["host_us"] == pytest.approx(1e4, rel=0.5)


def test_ceilings_are_positive():
    assert all(value > 0 for value in ceilings(CPU).values())
