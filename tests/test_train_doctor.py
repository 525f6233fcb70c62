"""Reports of real runs on this machine."""

import re
import sys

import pytest
import torch

from pmf import dispatch
from pmf.train.cli import main
from pmf.train.doctor import DoctorConfig, Report, _ops

SIZES = {"depth": 2, "aux-head-depth": 1, "hidden-size": 16, "num-heads": 2}
TINY = [word for name, size in SIZES.items() for word in (f"--model.{name}", str(size))] + ["--batch-size", "8"]
QUICK = ["--device", "cpu", "--seconds", "0.1", *TINY]


def report(capsys, *arguments, status=0):
    """(the report, what to change)."""
    if status:
        with pytest.raises(SystemExit) as stop:
            main(["doctor", *arguments])
        assert stop.value.code == status
    else:
        main(["doctor", *arguments])
    out = capsys.readouterr().out
    return out.split("\nwhat to change\n")


def value(text, name):
    return re.search(rf"^[ !] {name} +(.*)$", text, re.MULTILINE)[1]


def test_a_healthy_run_needs_no_change(capsys):
    found, changes = report(capsys, "digits", *QUICK)
    assert changes == "  nothing\n" and "\n!" not in found
    assert found.startswith("pixel-meanflow ") and f"torch {torch.__version__}" in found
    assert value(found, "batch") == "1 process x 8 images = 8 a step"
    assert value(found, "kernels") == "reference: no cuda"
    assert re.fullmatch(r"digits: 1,500 images of 10 classes; [\d,]+ images/s with 0 workers", value(found, "data"))
    assert re.fullmatch(r"[\d.e-]+ s for 8 images: takes [\d,]+ images/s a process", value(found, "step"))
    total, fixed, rows, row = re.match(
        r"([\d.]+) MB expected \(([\d.]+) MB \+ (\d+) x ([\d.]+) MB\)", value(found, "memory")
    ).groups()
    assert float(total) == pytest.approx(float(fixed) + int(rows) * float(row), rel=0.02)


def test_a_finished_run_is_examined_by_its_directory_and_left_alone(capsys, tmp_path):
    out = tmp_path / "run"
    main(["digits", "--out", str(out), "--device", "cpu", "--steps", "1", *TINY])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    found, _ = report(capsys, "--resume", str(out), "--seconds", "0.1", "--workers", "1")
    assert f"run {out}, on cpu" in found and "with 1 workers" in found
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_missing_data_are_a_finding(capsys, tmp_path):
    found, changes = report(capsys, *QUICK, "--data", str(tmp_path / "none"), status=1)
    assert value(found, "data") == f"{tmp_path}/none is not there" and "s for 8 images" in value(found, "step")
    prepare = f"`pmf data prepare folder:PICTURES --out {tmp_path}/none --size 8`"
    assert changes == f"  data: {tmp_path}/none is not there: {prepare}, or set --data\n"


def test_data_that_do_not_fit_the_network_are_a_finding(capsys, tmp_path):
    _, changes = report(capsys, *QUICK, "--model.num-classes", "3", status=1)
    assert changes == "  data: model.num_classes: expected at least 10 for these images, got 3\n"
    _, changes = report(capsys, *QUICK, "--data", str(tmp_path), status=1)
    assert f"{tmp_path} is not prepared; run `pmf data prepare" in changes


def test_a_large_network_on_a_cpu_is_counted_and_not_run(capsys):
    device = ("--device", "cpu", "--data", "/nowhere", "--workers", "0")
    found, changes = report(capsys, "pMF-H/16", *device, "--device-batch", "1024", status=1)
    assert "not measured on a CPU; a GPU at 400 TFLOP/s takes" in value(found, "step")
    assert re.search(r"memory: [\d.]+ GB expected, .* GB free: (set --|more GPUs)", changes)
    assert "train on a GPU" in changes
    assert set(re.findall(r"^! (\w+)", found, re.MULTILINE)) >= {"memory", "step", "data"}


def test_processes_share_the_batch_the_state_and_the_cores(capsys):
    quick = (*QUICK, "--batch-size", "16", "--data", "/nowhere")
    alone, _ = report(capsys, *quick, status=1)
    shared, _ = report(capsys, *quick, "--processes", "4", "--sharding", "fsdp", status=1)
    assert value(shared, "batch") == "4 processes x 4 images = 16 a step, fsdp"
    fixed = [float(re.search(r"\(([\d.]+) MB", value(text, "memory"))[1]) for text in (alone, shared)]
    assert fixed[0] == pytest.approx(4 * fixed[1], rel=0.02)
    _, changes = report(capsys, *quick, "--processes", "3", status=1)
    assert "batch: batch_size: expected a multiple of 3 processes x 5 images" in changes


def test_kernels_that_cannot_run_here_are_a_finding(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found, changes = report(capsys, *QUICK, "--impl", "triton", status=1)
    assert changes.startswith('  kernels: norm_modulate: impl="triton" needs cuda tensors, got cpu')
    assert changes.count("\n") == 1 and "memory  " not in found and "step  " not in found


def test_a_device_that_is_not_there_is_a_finding(capsys):
    found, changes = report(capsys, *QUICK, "--device", "cuda:99", status=1)
    assert "device: cannot use 'cuda:99'" in changes and "on cpu" in found


def gpu_lines(capsys, **changes):
    report = Report()
    _ops(report, DoctorConfig(precision="float32", **changes), torch.device("cuda"))
    return capsys.readouterr().out, "\n".join(report.changes)


def test_on_a_gpu_the_choices_are_the_dispatchers_own(capsys, monkeypatch):
    found, changes = gpu_lines(capsys)
    assert value(found, "kernels") == "triton: tensors are on cuda" and "kernels" not in changes
    assert value(found, "attention") == "efficient: FlashAttention takes no float32; the tangent's: triton"
    found, changes = gpu_lines(capsys, impl="reference")
    assert value(found, "kernels") == "reference: requested" and "set --impl auto" in changes
    monkeypatch.setattr(dispatch, "_kernels", {})  # as in a process that has loaded none
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is absent: pip install triton" in gpu_lines(capsys)[1]
    assert 'kernels: norm_modulate: impl="triton" needs the triton package' in gpu_lines(capsys, impl="triton")[1]


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    main(["doctor", "digits"])
    assert capsys.readouterr().out == ""


def test_bad_input_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "paint"])
    assert stop.value.code == 2 and "preset: expected one of digits" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "digits", "--seconds", "0"])
    assert stop.value.code == 2 and "seconds: expected a positive number" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(flag in out for flag in ("--processes", "--seconds", "--device-batch"))
