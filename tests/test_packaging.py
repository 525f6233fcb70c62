import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


ROOMS = ("pmf", "kernels", "train", "benchmarks")


def test_the_wheel_holds_every_module_under_pmf_and_nothing_else(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("pixel_meanflow-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "pmf").rglob("*.py")}
    for room in ROOMS[1:]:
        expected |= {f"pmf/{file.relative_to(ROOT)}" for file in (ROOT / room).rglob("*.py")}
    assert held == expected | {"pmf/py.typed"}


def test_the_version_is_the_same_everywhere():
    import pmf

    assert f"\nversion: {pmf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {pmf.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
