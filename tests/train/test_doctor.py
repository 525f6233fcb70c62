"""`pmf doctor`: reports on runs on this machine, and advice for other machines."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch

import pmf
from pmf.feature_networks import WEIGHTS
from pmf.memory import TrainingMemory
from pmf.metrics import Statistics
from pmf.model import CHECKPOINTING
from pmf.train import budget
from pmf.train.budget import HEADROOM, counted_memory, shared
from pmf.train.cli import main
from pmf.train.config import EvaluationConfig, RunConfig
from pmf.train.doctor import Doctor, DoctorConfig, data_change, evaluation_bytes, memory_change
from tests.train.small_runs import SMALL_MODEL

TINY = [*SMALL_MODEL, "--batch-size", "8"]
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
    assert value(found, "run") == "runs/digits on cpu: 1 x 8 images at a time, 8 a step, ddp"
    assert value(found, "kernels") == "reference: no cuda; attention reference; products torch.float32"
    assert re.fullmatch(r"digits: 1,500 images of 10 classes; [\d,]+ images/s with 0 workers", value(found, "data"))
    measured = r"[\d.e-]+ s for 8 images: [\d,]+ images/s a process; 1,600 steps take about [\d.]+ hours"
    assert re.fullmatch(measured, value(found, "step"))
    assert re.fullmatch(r"[\d.]+ GB expected, [\d.]+ GB available", value(found, "memory"))


def test_a_finished_run_is_examined_by_its_directory_and_left_alone(capsys, tmp_path):
    out = tmp_path / "run"
    main(["digits", "--out", str(out), "--device", "cpu", "--steps", "1", *TINY])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    found, _ = report(capsys, "--resume", str(out), "--seconds", "0.1", "--workers", "1")
    assert value(found, "run").startswith(f"{out} on cpu") and "with 1 workers" in found
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_run_that_goes_on_with_a_training_state_is_timed_from_any_weights(capsys):
    _, changes = report(capsys, "digits", *QUICK, "--init", "owner/name", "--init-state")
    assert changes == "  nothing\n"


def test_missing_data_are_a_finding(capsys, tmp_path):
    found, changes = report(capsys, *QUICK, "--data", str(tmp_path / "none"), status=1)
    assert changes == f"  data: expected digits, photographs or a prepared directory, got {tmp_path}/none\n"
    assert "s for 8 images" in value(found, "step")


def test_data_that_do_not_fit_the_network_are_a_finding(capsys, tmp_path):
    _, changes = report(capsys, *QUICK, "--model.num-classes", "3", status=1)
    assert changes == "  data: model.num_classes: expected at least 10 for these images, got 3\n"
    _, changes = report(capsys, *QUICK, "--data", str(tmp_path), status=1)
    assert f"{tmp_path} is not prepared; run `pmf data prepare" in changes


def test_a_large_network_on_a_cpu_is_counted_and_not_run(capsys):
    device = ("--device", "cpu", "--data", "/nowhere", "--workers", "0")
    found, changes = report(capsys, "pMF-H/16", *device, "--device-batch", "1024", status=1)
    assert "TFLOP for 1024 images, not timed on a CPU" in value(found, "step")
    assert re.search(r"memory: (set --|more GPUs)", changes)
    assert "step: train on a GPU" in changes
    assert set(re.findall(r"^! (\w+)", found, re.MULTILINE)) >= {"memory", "step", "data"}


def test_processes_share_the_batch_and_the_state(capsys):
    big = ("--device", "cpu", "--data", "/nowhere", "--batch-size", "16")
    big += ("--model.hidden-size", "512", "--model.depth", "2", "--model.aux-head-depth", "1")
    alone, _ = report(capsys, *big, status=1)
    shared, _ = report(capsys, *big, "--processes", "4", "--sharding", "fsdp", status=1)
    assert "on cpu: 4 x 4 images at a time, 16 a step, fsdp" in value(shared, "run")
    expected = [float(value(text, "memory").split()[0]) for text in (alone, shared)]
    assert expected[0] == pytest.approx(4 * expected[1], rel=0.05)
    _, changes = report(capsys, *big, "--processes", "3", status=1)
    assert "batch_size: expected a multiple of 3 processes x 5 images" in changes


def test_kernels_that_cannot_run_here_are_a_finding(capsys, monkeypatch):
    importlib.import_module("pmf.kernels.library")  # with the interpreter: other tests of this process need it
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found, changes = report(capsys, *QUICK, "--impl", "triton", status=1)
    assert changes.startswith('  kernels: attention: impl="triton" needs cuda tensors, got cpu')
    assert changes.count("\n") == 1 and "memory  " not in found and "step  " not in found


def test_a_device_that_is_not_there_is_a_finding(capsys):
    found, changes = report(capsys, *QUICK[2:], "--device", "cuda:99", status=1)
    assert "device: cannot use 'cuda:99'" in changes and "on cpu" in value(found, "run")


def kernels_on_a_gpu(**changes):
    doctor = Doctor(DoctorConfig(precision="float32", **changes))
    doctor.device = torch.device("cuda")
    return doctor.kernels()


def test_on_a_gpu_the_choices_are_the_dispatchers_own():
    found, change = kernels_on_a_gpu()
    assert found == "triton: tensors are on cuda; attention efficient; products torch.float32" and change is None
    found, change = kernels_on_a_gpu(impl="reference")
    assert found.startswith("reference: requested") and "set --impl auto" in change


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
    for card in ("0", "-1", "nan", "inf"):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", "--card", card])
        assert stop.value.code == 2 and "card: expected a" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(flag in out for flag in ("--processes", "--seconds", "--device-batch"))


# Advice on memory.

GB = 10**9
RUN = RunConfig(batch_size=1024, device_batch=128)


def memory(per_row):
    return TrainingMemory(weights=4 * GB, optimizer=5 * GB, copies=1 * GB, per_row=per_row, saved_per_row=per_row)


COUNTED = {"none": memory(GB // 2), "light": memory(GB // 3), "block": memory(GB // 20)}
"""10 GB of state; a row keeps 0.5 GB, two thirds or a tenth of it under checkpointing."""


def change(run, processes, rows, free):
    return memory_change(run, processes, processes, rows, HEADROOM * free * GB, COUNTED)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (83, None),
        (79, "set --checkpointing light"),
        (58, "set --checkpointing block"),
        (15, "set --checkpointing block --device-batch 64"),
        (11.8, "set --checkpointing block --device-batch 8"),
        (11, "more GPUs with --sharding fsdp, larger ones, or a smaller network"),
    ],
)
def test_too_little_memory_names_the_least_change(free, expected):
    assert change(RUN, 1, 128, free) == expected


def test_sharding_is_advised_where_the_state_alone_does_not_fit():
    assert change(RUN, 8, 128, 8) == "set --sharding zero1 --checkpointing block --device-batch 16"
    assert change(RUN, 8, 128, 6) == "set --sharding fsdp --checkpointing block --device-batch 64"
    assert change(dataclasses.replace(RUN, sharding="fsdp"), 8, 64, 6) == "set --checkpointing block"


def test_device_batches_divide_every_process_share():
    whole = RunConfig(batch_size=96)
    assert change(whole, 3, 32, 17) == "set --checkpointing block"
    assert change(whole, 3, 32, 23) == "set --checkpointing light"
    assert change(dataclasses.replace(whole, checkpointing="block"), 3, 32, 12.5) == "set --device-batch 16"


@pytest.mark.parametrize("free", [12, 20, 30, 60, 79])
@pytest.mark.parametrize("checkpointing", ["none", "light", "block"])
def test_advice_on_memory_fits_and_satisfies_itself(free, checkpointing):
    run = dataclasses.replace(RUN, checkpointing=checkpointing)
    advice = change(run, 1, 128, free)
    if advice is None:
        assert COUNTED[checkpointing].expected(128) <= HEADROOM * free * GB
        return
    words = advice.split()[1:]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    rows = int(flags.get("--device-batch", 128))
    changed = dataclasses.replace(run, checkpointing=flags.get("--checkpointing", checkpointing), device_batch=rows)
    assert change(changed, 1, rows, free) is None


def counted(away=False, **changes):
    run = RunConfig(precision="bfloat16", **changes)
    return counted_memory(run, "light", "triton", "cpu", torch.bfloat16, away=away)


def test_options_count():
    """A bfloat16 stream keeps less per row; averages on the host leave the card; shards of state divide."""
    plain = counted()
    assert counted(stream="bfloat16").per_row < plain.per_row
    away = counted(away=True)
    assert away.optimizer == plain.optimizer - 3 * plain.weights // 2 and away.per_row == plain.per_row
    zero1, fsdp, hybrid = (shared(plain, kind, 8, 4) for kind in ("zero1", "fsdp", "hybrid"))
    assert zero1.weights == plain.weights and zero1.optimizer == fsdp.optimizer == -(-plain.optimizer // 8)
    assert fsdp.weights == plain.weights // 8 and hybrid.weights == plain.weights // 4


def test_readme_has_the_largest_batches_of_b16():
    settings, columns = pmf.config.PUBLISHED["pMF-B/16"], (24, 40, 80, 141)
    run = RunConfig(precision="bfloat16", model=settings.network, loss=settings.loss)
    lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| B/16; L/16; H/16 |"))
    rows = (("none", False), ("light", False), ("light", True), ("block", True))
    for line, (kind, away) in zip(lines[first : first + 4], rows, strict=True):
        memory = counted_memory(run, kind, "triton", "cpu", torch.bfloat16, away=away)
        shown = [int(cell.split(";")[0]) for cell in line.split("|")[2:-1]]
        assert shown == [memory.largest_batch(HEADROOM * gigabytes * GB) for gigabytes in columns]


def test_evaluations_in_several_spaces_hold_their_networks(tmp_path):
    for name in ("siglip", "pixels"):
        Statistics.of(torch.randn(9, 4)).save(tmp_path / f"{name}.npz")
    none = RunConfig(eval_every=10, evaluation=EvaluationConfig(reference=tmp_path / "one.npz"))
    every = dataclasses.replace(none, evaluation=EvaluationConfig(reference=tmp_path))
    one = dataclasses.replace(every, evaluation=EvaluationConfig(reference=tmp_path, networks=("pixels",)))
    single, both, pixels = (evaluation_bytes(config, torch.device("cpu")) for config in (none, every, one))
    assert both - pixels == 4 * WEIGHTS["siglip"] and single - pixels == 4 * WEIGHTS["inception"] > 0


@pytest.mark.parametrize(
    "flags", [["--steps", "5"], ["--checkpointing", "block"], ["--seconds", "1"], ["--model.depth", "3"]]
)
def test_what_a_card_does_not_depend_on_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--card", "24", *flags])
    name = flags[0][2:].replace("-", "_")
    assert stop.value.code == 2 and f"pmf: {name}: has no effect with --card" in capsys.readouterr().err


def test_a_card_is_a_table(capsys, monkeypatch):
    some = ("pMF-B/16", "pMF-H/32")
    monkeypatch.setattr(budget, "PUBLISHED", {name: pmf.config.PUBLISHED[name] for name in some})
    main(["doctor", "digits", "--card", "40", "--ema-device", "cpu", "--stream", "bfloat16"])
    head, options, _, columns, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("largest device batches on a card of 40 GB, filled to 90%")
    assert options == "triton kernels, bfloat16, stream bfloat16, 3 averages on the host, 1 x ddp"
    assert columns.split() == ["checkpointing", *(w for kind in CHECKPOINTING for w in (kind, "(operations)"))]
    assert [row.split()[0] for row in rows] == list(some)
    for row in rows:
        none, light, block = (int(n.replace(",", "")) for n in row.split()[1::2])
        assert none < light < block and row.split()[2:5:2] == ["(1.00)", "(1.00)"]


# Advice on data.


def test_slow_data_ask_for_workers_while_there_are_cores():
    assert data_change(1500, 1400, workers=8, cores=16) is None
    assert data_change(900, 1400, workers=8, cores=16) == "the step takes 1,400 images/s: set --workers 15"
    assert data_change(900, 1400, 8, cores=12).endswith("set --workers 12")
    assert "a faster disk, more cores" in data_change(900, 1400, 8, 8)


def test_without_workers_data_must_be_many_times_as_fast():
    assert data_change(20_000, 1000, workers=0, cores=4) is None
    assert data_change(10_000, 1000, workers=0, cores=4).endswith("set --workers 1")
