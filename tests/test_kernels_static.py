"""What the compilers make of the kernels on A100, H100 and B200, read off the machine code."""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

FAMILIES = ("norm", "rotary", "swiglu")
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def compiled(family: str) -> list[dict]:
    """One entry for every shipped configuration; a process of its own, outside the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.static_checks", family]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_machine_code(family):
    """No spills, room for 16 warps' registers, 16-byte accesses wherever a row is read or written."""
    entries = compiled(family)
    assert {entry["capability"] for entry in entries} == {80, 90, 100}
    for entry in entries:
        assert entry["stack"] == entry["local"] == 0, entry
        assert entry["shared"] <= SHARED_LIMIT[entry["capability"]], entry
        assert entry["registers"] * 32 * 16 <= 65536, entry
        assert entry["LDG.128"] and entry["STG.128"], entry
        # Statistics are single floats: one access for each a tile. So are sums over tokens, three a
        # program, where a row has fewer values than the program has threads.
        sums = 3 if "digits" in entry["label"] and entry["kernel"] == "_backward" else 0
        assert entry.get("LDG.32", 0) <= 2 and entry.get("STG.32", 0) <= 2 + sums, entry
        narrow = {f"{access}.{width}" for access in ("LDG", "STG") for width in ("64", "U16", "S16", "U8")}
        assert not narrow & entry.keys(), entry
