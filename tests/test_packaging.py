import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


ROOMS = ("pmf", "kernels", "train", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would pack what an earlier build left there
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (file,) = folder.glob("pixel_meanflow-*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_holds_every_module_under_pmf_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "pmf").rglob("*.py")}
    for room in ROOMS[1:]:
        expected |= {f"pmf/{file.relative_to(ROOT)}" for file in (ROOT / room).rglob("*.py")}
    assert held == expected | {"pmf/py.typed"}


def test_the_wheel_requires_the_core_alone(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = Parser().parsestr(wheel.read(name).decode()).get_all("Requires-Dist")
    required = {line.split(">=")[0]: line.partition(";")[2] for line in requirements if "extra ==" not in line}
    assert required.keys() == {"torch", "triton", "numpy", "einops", "safetensors"}
    assert {name for name, where in required.items() if where} == {"triton"} and "Linux" in required["triton"]


def test_the_version_is_the_same_everywhere():
    import pmf

    assert f"\nversion: {pmf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {pmf.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
