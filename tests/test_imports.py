"""Who imports whom (CONTRIBUTING.md), and what `import pmf` costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# For each room: what its files may import of ours.
RULES = {
    "kernels": r"pmf\.kernels.*|pmf\.(dual|errors|private)",
    "pmf/private.py": r"nothing",
    "pmf/autocast.py": r"pmf\.private",
    "pmf/dual.py": r"nothing",
    "pmf/reference": r"pmf\.(reference.*|dual|private)",
    "pmf/dispatch.py": r"pmf\.reference|pmf\.kernels.*|pmf\.(errors|private)",
    "pmf/errors.py": r"pmf\.private",
    "pmf/inputs.py": r"pmf\.(dispatch|dual|errors|private|reference)",
    "pmf/ops.py": r"pmf\.(autocast|dispatch|dual|errors|inputs|reference)",
    "pmf/packing.py": r"pmf\.(autocast|private)",
    "pmf/layers.py": r"pmf\.(ops|autocast|config|dual|errors|packing|wide)",
    "pmf/model.py": r"pmf\.(ops|dispatch|config|dual|errors|layers|packing|private|checkpoint|checkpointing)",
    "pmf/loss.py": r"pmf\.(ops|config|dual|errors|layers)",
    "pmf/sampling.py": r"pmf\.(config|dual|errors|noise)",
    "pmf/noise.py": r"pmf\.errors",
    "pmf": r"pmf(?!\.(train|benchmarks|kernels)).*",
    "train": r"pmf(?!\.(benchmarks|kernels)).*",
    "benchmarks": r"pmf(?!\.train).*",
}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "pmf/reference": {"torch", "einops"},
}


def imported(file):
    """Dotted names that a file imports; `from pmf import ops` counts as pmf.ops."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module == "pmf":
                yield from (f"pmf.{alias.name}" for alias in node.names)
            else:
                yield node.module


def files(room):
    return [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", RULES)
def test_rooms_import_only_what_they_may(room):
    assert files(room)
    for file in files(room):
        for name in imported(file):
            if name.split(".")[0] == "pmf":
                assert re.fullmatch(RULES[room], name), f"{file.relative_to(ROOT)} imports {name}"
            elif room in THIRD_PARTY:
                top = name.split(".")[0]
                allowed = top in THIRD_PARTY[room] or top in sys.stdlib_module_names
                assert allowed, f"{file.relative_to(ROOT)} imports {name}"
            assert name.split(".")[0] not in ("kernels", "train", "benchmarks", "tests")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")


def test_import_needs_neither_triton_nor_the_training_stack():
    hidden = "import sys; sys.modules['triton'] = None; import pmf, torch; "
    use = "m = pmf.create_model('pMF-digits', impl='reference'); pmf.generate(m, [1]); "
    names = "assert not {'matplotlib', 'sklearn', 'tyro', 'pmf.train'} & set(sys.modules)"
    result = python(hidden + use + names)
    assert result.returncode == 0, result.stderr


def test_import_takes_under_two_seconds_beyond_torch():
    code = "import torch, time; s = time.process_time(); import pmf; pmf.create_model; print(time.process_time() - s)"
    assert float(python(code).stdout) < 2


def test_every_public_name_resolves():
    import pmf

    for name in pmf.__all__:
        assert getattr(pmf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pmf.nothing


def test_kernels_refuse_another_name():
    result = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=ROOT)
    assert "import these kernels as pmf.kernels" in result.stderr
