"""Machine code of the kernels for A100, H100, B200 and RTX 30, 40 and 50: spills, memory, access widths, units."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.static_checks import CHIPS

triton = pytest.importorskip("triton")

FAMILIES = ("norm", "rotary", "pointwise")
PRODUCTS = ("attention", "patch")
UNITS = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""Instructions of the matrix units."""


def compiled(family: str) -> list[dict]:
    """One entry per shipped configuration, compiled in a separate process outside the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.static_checks", family]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    # Without products, sm_120 launches what sm_86 does.
    assert {entry["capability"] for entry in entries} == CHIPS.keys() - (set() if family in PRODUCTS else {120})
    return entries


def fits(entry: dict) -> bool:
    """No spills, and shared memory within the chip."""
    return entry["stack"] == entry["local"] == 0 and entry["shared"] <= CHIPS[entry["capability"]][1] << 10


def traded(entry: dict) -> bool:
    """Of Triton 3.6 alone: one value on the stack, for which a second program fits on Hopper (128 registers)."""
    one = entry["label"] == "attention tangent D 64 causal H float32" and entry["capability"] == 90
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    return old and one and (entry["stack"], entry["registers"]) == (8, 128)


def check_units(entry: dict) -> None:
    """The chip's matrix units compute the products, except in float32, which no unit computes exactly."""
    found = {unit for unit in ("HMMA", "HGMMA", "UTCHMMA") if entry[unit]}
    assert found == ({UNITS[entry["capability"]]} if "bfloat16" in entry["label"] else set()), entry


@pytest.mark.parametrize("family", FAMILIES)
def test_machine_code(family):
    """No spills, room for 16 warps' registers, 16-byte accesses wherever a row is read or written."""
    entries = compiled(family)
    for entry in entries:
        assert fits(entry), entry
        assert entry["registers"] * 32 * 16 <= 65536, entry
        assert entry.get("LDG.128") or entry["LDGSTS.128"], entry
        if entry["kernel"] == "_add_up":
            # The width of stores depends on the number of threads; they are a thousandth of the bytes read.
            assert entry.get("LDG.32", 0) == 0, entry
            continue
        assert entry["STG.128"], entry
        # Statistics are single floats: one access each per tile. So are sums over tokens, up to four per
        # program, if a row has fewer values than the program has threads.
        few = "digits" in entry["label"] or "half" in entry["label"]
        sums = 4 if few and entry["kernel"] == "_backward" else 0
        assert entry.get("LDG.32", 0) <= 2 and entry.get("STG.32", 0) <= 2 + sums, entry
        narrow = {f"{access}.{width}" for access in ("LDG", "STG") for width in ("64", "U16", "S16", "U8")}
        if family == "rotary" and "float32" in entry["label"]:
            narrow.remove("LDG.64")  # the tables: a thread's 4 values have 2 angles
        if "grouped" in entry["label"] and entry.get("LDG.64", 0) <= 1 and entry.get("STG.64", 0) <= 1:
            narrow -= {"LDG.64", "STG.64"}  # a program's weight and sums: 128 columns of 64 threads
        assert not narrow & entry.keys(), entry
        # Prefetches, unrolled for three tiles: rows 16 bytes at a time, two statistics or tables narrower.
        assert sum(n for name, n in entry.items() if name.startswith("LDGSTS") and name != "LDGSTS.128") <= 6, entry


def test_wide_rows_fit_in_shared_memory():
    for entry in compiled("wide"):
        assert entry["shared"] <= CHIPS[entry["capability"]][1] << 10, entry


def test_machine_code_of_attention():
    """At D 40, 48, 64, 80, 96 and 128 no spills; every product on the matrix units."""
    entries = compiled("attention")
    for entry in entries:
        assert fits(entry) or traded(entry), entry
        assert entry["LDG.128"] and entry["STG.128"], entry
        check_units(entry)


def test_machine_code_of_the_objective():
    """No spills; 16-byte accesses for tokens, images and gradients; few scalars per program."""
    entries = compiled("objective")
    for entry in entries:
        assert fits(entry), entry
        # A thread loads three channels of its pixels; 16 bytes hold 8 bfloat16 or 4 float32. Images are float32.
        assert entry["LDG.128"] == 5 * 3 + 2 * 3 * (2 if "bfloat16" in entry["label"] else 1), entry
        # t, h, guidance, the null index and the two scales.
        assert entry["LDG.32"] + entry["LDG.64"] <= 6, entry
        stores = {"STG.32": 2} if "forward" in entry["label"] else {"STG.128": 2 * 3}
        assert stores == {name: count for name, count in entry.items() if name.startswith("STG")}, entry


def test_machine_code_of_the_patch_embedding():
    """No spills; products on the matrix units; images read and everything written 16 bytes at a time."""
    entries = compiled("patch")
    for entry in entries:
        assert fits(entry), entry
        check_units(entry)
        assert entry["STG.128"], entry
        assert not {"STG.64", "STG.32", "STG.U16"} & entry.keys(), entry
        # Biases are vectors: at most a few narrow loads for them.
        assert entry.get("LDG.U16", 0) <= 1, entry
