"""Which module may import which (see CONTRIBUTING.md), and the cost of `import pmf`."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# For each folder or file: which of our modules it may import.
RULES = {
    "kernels": r"pmf\.kernels.*|pmf\.(pair|errors|private)",
    "pmf/private.py": r"nothing",
    "pmf/autocast.py": r"pmf\.private",
    "pmf/wide.py": r"pmf\.(autocast|private)",
    "pmf/pair.py": r"pmf\.errors",
    "pmf/reference": r"pmf\.(reference.*|pair|private|recompute)",
    "pmf/dispatch.py": r"pmf\.(reference|errors|private)",
    "pmf/errors.py": r"pmf\.private",
    "pmf/unrecorded.py": r"pmf\.(pair|private)",
    "pmf/tangents": r"pmf\.(tangents.*|ops|dispatch|pair|autocast|errors|private)",
    "pmf/inputs.py": r"pmf\.(dispatch|pair|errors|private|reference|tangents\.carriers|unrecorded)",
    "pmf/ops": r"pmf\.(ops.*|autocast|dispatch|pair|errors|fields|inputs|reference(\.tangent)?)",
    "pmf/packing.py": r"pmf\.(autocast|private)",
    "pmf/dual.py": r"pmf\.(errors|fields|pair|private|recompute|tangents\.(call|carriers))",
    "pmf/layers": r"pmf\.(layers.*|ops(\.heads)?|dual|pair|errors|fields|packing|private|recompute|"
    r"tangents\.carriers|wide)",
    "pmf/blocks.py": r"pmf\.(layers|config|dual|pair)",
    "pmf/fields.py": r"pmf\.errors",
    "pmf/config.py": r"pmf\.(errors|fields)",
    "pmf/atomic_files.py": r"pmf\.errors",
    "pmf/jax_files.py": r"pmf\.(errors|sizes)",
    "pmf/sizes.py": r"pmf\.errors",
    "pmf/hub.py": r"pmf\.(errors|jax_files|sizes)",
    "pmf/published_weights.py": r"pmf\.(reference(\.embedding)?|config|errors|fields)",
    "pmf/jax_states.py": r"pmf\.(config|errors|hub|jax_files|published_weights)",
    "pmf/weights.py": r"pmf\.(atomic_files|config|errors|fields|hub|jax_files|jax_states|published_weights|sizes)",
    "pmf/compiling.py": r"pmf\.(blocks|pair|layers|private)",
    "pmf/recompute.py": r"pmf\.(autocast|pair|private)",
    "pmf/model.py": r"pmf\.(ops|autocast|dispatch|blocks|compiling|config|pair|errors|fields|layers|packing|recompute|"
    r"weights|tangents\.carriers)",
    "pmf/draws.py": r"pmf\.(config|errors|fields)",
    "pmf/step_plan.py": r"pmf\.(config|draws|pair|errors)",
    "pmf/loss.py": r"pmf\.(ops|config|draws|pair|errors|step_plan)",
    "pmf/cuda_graphs.py": r"pmf\.(autocast|config|draws|errors|fields|loss|step_plan)",
    "pmf/sampling.py": r"pmf\.(config|pair|errors|fields|noise)",
    "pmf/noise.py": r"pmf\.errors",
    "pmf/crops.py": r"pmf\.(autocast|errors)",
    "pmf/perceptual.py": r"pmf\.(autocast|crops|errors|fields|sizes)",
    "pmf/data": r"pmf\.(data.*|atomic_files|draws|errors|fields|images|pictures|private)",
    "pmf/pictures.py": r"pmf\.errors",
    "pmf/images.py": r"pmf\.(atomic_files|errors|fields|pictures)",
    "pmf/features.py": r"pmf\.(atomic_files|errors|fields|metrics|pictures)",
    "pmf/sharded.py": r"nothing",
    "pmf/optim": r"pmf\.(optim.*|errors|fields|jax_states|private|published_weights|sharded)",
    "pmf/fine_tuning.py": r"pmf\.(errors|fields|model|published_weights)",
    "pmf/parallel.py": r"pmf\.(blocks|config|draws|errors|fields|loss|model|sampling|sharded)",
    "pmf/metrics.py": r"pmf\.(atomic_files|errors|fields|sizes)",
    "pmf/feature_networks.py": r"pmf\.(autocast|errors|fields|images|metrics|sizes|weights)",
    "pmf/frechet.py": r"pmf\.(errors|fields|metrics)",
    "pmf/post_training.py": r"pmf\.(draws|errors|feature_networks|fields|frechet)",
    "pmf": r"pmf(?!\.(train|benchmarks|kernels)).*",
    "train": r"pmf(?!\.(benchmarks|kernels)).*",
    "benchmarks": r"pmf(?!\.train).*",
}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "pmf/reference": {"torch", "einops", "jax"},
}


def import_statements(file):
    """Every import statement in a file, also inside functions, except those under TYPE_CHECKING."""
    pending = [ast.parse(file.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            pending += ast.iter_child_nodes(node)


def imported(file):
    """Dotted names that a file imports; `from pmf import ops` counts as pmf.ops."""
    for node in import_statements(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
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


def test_only_its_own_modules_import_the_jax_reference():
    for room in ("pmf", "train"):
        for file in files(room):
            names = set(imported(file)) & {"jax", "pmf.reference.jax_loss", "pmf.reference.jax_network"}
            assert not names or file.name.startswith("jax_"), f"{file.relative_to(ROOT)} imports {names}"


def modules():
    """Dotted name -> file of each of our modules."""
    found = {}
    for room in ("pmf", "kernels", "train", "benchmarks"):
        for file in files(room):
            path = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[path if room == "pmf" else f"pmf.{path}"] = file
    return found


def test_no_import_circle():
    """Imports inside functions count too."""
    known = modules()
    graph = {}
    for name, file in known.items():
        reached = {alias.name for node in import_statements(file) for alias in node.names}
        for node in import_statements(file):
            if isinstance(node, ast.ImportFrom):
                reached |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[name] = (reached & known.keys()) - {"pmf"}  # pmf/__init__.py imports lazily
    graphlib.TopologicalSorter(graph).prepare()


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")


def without(packages, code):
    """Run code in a process where these packages do not import."""
    return python(f"import sys; sys.modules.update(dict.fromkeys({sorted(packages)})); {code}")


def optional_packages():
    """Whatever our files import beyond the standard library and the core's dependencies; PyTorch brings fsspec."""
    core = {"pmf", "torch", "triton", "numpy", "einops", "safetensors", "fsspec"} | sys.stdlib_module_names
    return {name.split(".")[0] for file in modules().values() for name in imported(file)} - core


@pytest.mark.parametrize("hidden", (set(), {"triton"}))
def test_the_core_needs_no_extra_and_no_triton(hidden):
    packages = optional_packages()
    assert packages > {"PIL", "matplotlib", "sklearn", "tqdm", "tyro"}
    result = without(packages | hidden, f"import runpy; runpy.run_path({str(ROOT / 'tests/core_alone.py')!r})")
    assert result.returncode == 0 and "the core works" in result.stdout, result.stderr


@pytest.mark.parametrize("missing", ("PIL", "matplotlib", "sklearn", "tqdm", "tyro"))
def test_the_command_line_without_its_extra_is_one_line(missing):
    result = without({missing}, "sys.argv[1:] = ['--help']; from pmf.train.cli import main; main()")
    assert result.returncode == 2 and result.stdout == ""
    needs = "pmf: the command line needs pip install 'pixel-meanflow[train]'"
    assert result.stderr == f"{needs}: No module named '{missing}'\n"


@pytest.mark.parametrize(("module", "name"), (("pmf.train", "pmf"), ("pmf.benchmarks", "pmf.benchmarks")))
def test_programs_without_the_extra_are_one_line(module, name):
    run = f"import runpy; sys.argv = ['x', '--help']; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    result = without(optional_packages(), run)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(rf"{name}: the command line needs pip install 'pixel-meanflow\[train\]': .*\n", result.stderr)


def test_import_takes_under_two_seconds_beyond_torch():
    code = "import torch, time; s = time.process_time(); import pmf; pmf.create_model; print(time.process_time() - s)"
    assert float(python(code).stdout) < 2


def test_every_public_name_resolves():
    import pmf

    for name in pmf.__all__:
        assert getattr(pmf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pmf.nothing


@pytest.mark.parametrize(
    "name", ("config.PUBLISHED", "draws.step_seed", "fine_tuning.copy_weights", "memory.largest", "sharded.whole")
)
def test_every_module_is_there_after_importing_the_package(name):
    """As the documentation names them."""
    result = python(f"import pmf; pmf.{name}")
    assert result.returncode == 0, result.stderr


def test_editors_see_the_public_names():
    """The imports in pmf/__init__.py for type checkers are exactly the names that load at run time."""
    import pmf

    (block,) = (node for node in ast.parse(Path(pmf.__file__).read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    loaded = {name: module for module, names in pmf._HOMES.items() for name in names}
    assert seen == loaded | dict.fromkeys(("dual", "layers", "ops", "optim"), "pmf")
    assert sorted(pmf.__all__) == sorted([*seen, "__version__"])
    assert (Path(pmf.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "statement", ("import kernels; kernels.norm", "from kernels import norm", "import kernels.norm")
)
def test_kernels_refuse_another_name(statement):
    result = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "kernels" in result.stderr.splitlines()[-1]


def test_kernels_are_empty_under_another_name():
    """As Hugging Face's libraries find them, which look for a package of that name and its version."""
    code = "import kernels; assert getattr(kernels, '__version__', 'N/A') == 'N/A' and kernels.__file__"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
