"""Private names of PyTorch and of Triton are used only in the files that are their homes."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOMES = {"torch": {"pmf/private.py", "pmf/tangents/tracing.py"}, "triton": {"kernels/launching.py"}}
PUBLIC = {"os._exit"}  # documented in spite of its underscore
HIDDEN = r"(.+\.)?_(?!_)\w+(\..+)?|triton\.(runtime|backends|compiler|_C)(\..+)?"
FILES = [
    file.relative_to(ROOT).as_posix()
    for room in ("pmf", "kernels", "train", "benchmarks")
    for file in sorted((ROOT / room).rglob("*.py"))
]


def dotted(node):
    """ "a.b.c" for nested attributes; None if they do not start with a name."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(names)]) if isinstance(node, ast.Name) else None


def names_of(tree):
    """Yield the full dotted name of every import in a file and of every attribute read from one."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Assign) and (value := dotted(node.value)) and value.split(".")[0] in known:
            head, _, rest = value.partition(".")
            for target in node.targets:
                if isinstance(target, ast.Name):
                    known[target.id] = f"{known[head]}.{rest}".rstrip(".")
    for node in ast.walk(tree):
        if name := dotted(node):
            head, _, rest = name.partition(".")
            yield f"{known.get(head, head)}.{rest}".rstrip(".")


def private(text):
    """Private names of torch and triton in a file, and private attributes of objects that are not ours."""
    tree = ast.parse(text)
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and dotted(n) == f"self.{n.attr}"}
    for name in names_of(tree):
        if name.split(".")[0] in HOMES and re.fullmatch(HIDDEN, name):
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_(?!_)", node.attr) and node.attr not in own:
            yield dotted(node) or f"(...).{node.attr}"


@pytest.mark.parametrize("file", FILES)
def test_nothing_private_outside_its_home(file):
    found = set(private((ROOT / file).read_text())) - PUBLIC
    allowed = {name for name in found if file in HOMES["torch"] or (file in HOMES["triton"] and "triton" in name)}
    assert found <= allowed, f"{file} uses {sorted(found - allowed)}"


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._subclasses import fake_tensor",
        "from torch.utils import _pytree as tree",
        "import torch\ntorch._foreach_add_([], [])",
        "import torch\naten = torch.ops.aten\naten._scaled_dot_product_flash_attention",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from triton.runtime import driver",
        "x.untyped_storage()._cdata",
    ],
)
def test_private_names_are_found(line):
    assert list(private(line))


def test_homes_are_needed():
    for homes in HOMES.values():
        for file in homes:
            assert list(private((ROOT / file).read_text()))
