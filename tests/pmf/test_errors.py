"""Messages of errors cost nothing, and cannot fail, where nothing is wrong."""

import ast
from pathlib import Path

import pytest
import torch

import pmf
from pmf.errors import extent, require
from tests.networks import TINY, random_model

ROOT = Path(__file__).parents[2]
CHEAP = {"printable", "bool", "getattr", "len", "list", "map", "sorted", "tuple", "type", "join"}
"""Calls of names and shapes at hand."""


def eager_messages():
    """(place, message) of every `require` whose message is built before its condition is looked at."""
    for room in ("kernels", "pmf", "train"):
        for file in sorted((ROOT / room).rglob("*.py")):
            if file.relative_to(ROOT).parts[:2] not in {("pmf", name) for name in ("kernels", "train", "benchmarks")}:
                for node in ast.walk(ast.parse(file.read_text())):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
                        message = node.args[1]
                        if not isinstance(message, ast.Lambda):
                            yield f"{file.relative_to(ROOT)}:{node.lineno}", message


def test_a_message_that_computes_is_a_function():
    found = dict(eager_messages())
    assert len(found) > 150
    for place, message in found.items():
        calls = [node.func for node in ast.walk(message) if isinstance(node, ast.Call)]
        names = {getattr(call, "id", None) or getattr(call, "attr", None) for call in calls}
        assert names <= CHEAP, f"{place}: {ast.unparse(message)}"


def test_a_message_is_built_only_on_failure():
    require(True, lambda: pytest.fail("built"))
    with pytest.raises(pmf.InputError, match=r"^once$"):
        require(False, lambda: "once")


def test_ranges_of_nothing_have_a_name():
    assert extent(torch.tensor([3, -1])) == "-1 to 3" and extent(torch.empty(0)) == "none"


def test_an_empty_batch_passes_through_the_network():
    model, none = random_model(dtype=torch.float32), torch.empty(0)
    u, v = model(torch.empty(0, *TINY.image_shape), none, none, none, none, none, none.long())
    assert u.shape == v.shape == (0, *TINY.image_shape)
