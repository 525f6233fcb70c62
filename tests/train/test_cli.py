import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pmf
from pmf.train.cli import main
from tests.train.small_runs import SMALL_MODEL

TINY_RUN = ["--steps", "2", "--batch-size", "4", "--loss.p-mean", "0.1", *SMALL_MODEL]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    main(["digits", "--out", str(out), *TINY_RUN])
    return out


def test_a_file_of_a_run_is_sampled_and_measured_as_the_run_is(run, tmp_path, capsys):
    for weights in ("model", "ema_500"):
        main(["sample", str(run), "--weights", weights, "--rows", "1", "--out", str(tmp_path / "run.png")])
        main(["sample", str(run / f"{weights}.safetensors"), "--rows", "1", "--out", str(tmp_path / "file.png")])
        assert (tmp_path / "run.png").read_bytes() == (tmp_path / "file.png").read_bytes()
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--out", str(tmp_path / "a.jpg")])
    assert "out: expected a name that ends in .png, got" in capsys.readouterr().err


def test_nothing_is_drawn_for_a_place_that_cannot_be_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pmf, "generate", None)
    (tmp_path / "file").touch()
    places = {
        tmp_path: "it is a directory, expected the name of a file",
        tmp_path / "file" / "a.png": "Not a directory",
        tmp_path / ("a" * 300 + ".png"): "File name too long",
        "/proc/a.png": "No such file or directory",
    }
    for place, why in places.items():
        with pytest.raises(SystemExit):
            main(["sample", str(run), "--out", str(place)])
        assert capsys.readouterr().err == f"pmf: out: cannot write {place}: {why}\n"
    assert os.listdir(tmp_path) == ["file"]
    before = (run / "config.json").read_bytes()
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--out", str(run / "config.json")])
    assert capsys.readouterr().err == f"pmf: out: expected a name that ends in .png, got {run}/config.json\n"
    assert (run / "config.json").read_bytes() == before


LONG = "a" * 300


@pytest.mark.parametrize(
    ("argument", "command"),
    [
        ("source", ["sample", LONG]),
        ("source", ["eval", LONG]),
        ("source", ["posttrain", LONG]),
        ("source", ["data", "prepare", f"folder:{LONG}", "--out", "out", "--size", "8"]),
        ("init", ["digits", "--init", LONG]),
        ("data", ["digits", "--data", LONG]),
        ("resume", ["train", "--resume", LONG]),
        ("evaluation.reference", ["digits", "--evaluation.reference", LONG, "--eval-every", "1"]),
        ("folder", ["eval", "statistics", LONG, "--out", "out.npz"]),
        ("reference", ["eval", "run", "--reference", LONG]),
        ("images", ["eval", "run", "--reference", "a.npz", "--images", LONG]),
    ],
)
def test_a_path_that_cannot_be_looked_up_is_named_with_its_argument(argument, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert re.fullmatch(
        rf"pmf: {argument}: cannot read {LONG}(/config.json)?: File name too long\n", capsys.readouterr().err
    )
    assert not os.listdir(tmp_path)


def test_statistics_are_not_computed_for_a_place_that_cannot_be_written(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    with pytest.raises(SystemExit):
        main(["eval", "statistics", str(folder), "--out", str(tmp_path)])
    assert f"pmf: out: {tmp_path} is a directory, expected the name of a file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["pictures"]


def test_ctrl_c_while_packages_are_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\n")
    start = "import pmf.train.start; import sys; sys.path.insert(0, sys.argv[1]); pmf.train.start.main()"
    ended = subprocess.run([sys.executable, "-c", start, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 130 and ended.stderr == "pmf: interrupted\n"


def test_flags_override_and_are_stored(run):
    stored = json.loads((run / "config.json").read_text())
    assert stored["model"]["hidden_size"] == 16 and stored["loss"]["p_mean"] == 0.1
    assert stored["loss"]["p_std"] == 1.2 and stored["steps"] == 2


def test_resume_takes_the_stored_values_and_flags_override_them(run):
    main(["train", "--resume", str(run), "--steps", "3"])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_resume_knows_the_runs_own_values(tmp_path):
    out = tmp_path / "run"
    main(["digits", "--out", str(out), *TINY_RUN, "--ema-half-lives", "5", "--sampling-weights", "ema_5"])
    main(["train", f"--resume={out}", "--steps", "3", "--ema-half-lives", "5"])
    assert json.loads((out / "config.json").read_text())["steps"] == 3
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(out), "--out", str(tmp_path / "other")])


def test_sample_draws_one_column_per_label(run, tmp_path, capsys):
    png = tmp_path / "grid.png"
    main(["sample", str(run), "--labels", "3", "1", "4", "--rows", "2", "--steps", "2", "--out", str(png)])
    assert Image.open(png).size == (3 * 66 - 2, 2 * 66 - 2)
    assert "columns 3 1 4" in capsys.readouterr().out


def test_eval_prints_a_line_per_number_of_steps(run, capsys):
    main(["eval", str(run), "--steps", "1", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["steps"] for line in lines] == [1, 2]
    assert all(line["frechet_distance"] > 0 and 0 <= line["accuracy"] <= 1 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "/nowhere"], "source: /nowhere does not exist"),
        (["train", "--resume", "/nowhere"], "resume: /nowhere holds no run"),
        (["digits", "--out", "/proc/run"], "out: cannot write /proc/run: No such file or directory"),
        (["digits", "--optimizer.clip-norm", "-1"], "optimizer.clip_norm: expected >= 0, got -1.0"),
        (["digits", "--sampling.omega", "0.5"], "omega: expected a guidance scale >= 1, got 0.5"),
        (["digits", "--model.patch-size", "3"], "ModelConfig: patch_size must divide image_size 8, got 3"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"pmf: {message}")


def test_a_warning_is_a_line_of_its_own(tmp_path, capsys):
    for out in ("one", "two"):
        main(["digits", "--out", str(tmp_path / out), *TINY_RUN, "--ema-every", "5"])
        told = re.split(r"[\r\n]", capsys.readouterr().err)  # a progress bar is drawn over
        (warning,) = (line for line in told if "warning" in line)
        assert warning.startswith("pmf: warning: ema_every: "), told
    assert not logging.getLogger("pmf").handlers


def test_samples_take_a_published_setting_by_name(run, tmp_path, capsys):
    images = []
    for flags in (["--guidance", "pMF-B/16-torch"], ["--omega", "7.5", "--t-min", "0.1", "--t-max", "0.8"]):
        main(["sample", str(run), "--labels", "3", "--rows", "1", "--out", str(tmp_path / "a.png"), *flags])
        images.append((tmp_path / "a.png").read_bytes())
    assert images[0] == images[1]
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--guidance", "pMF-B/16", "--omega", "2"])
    assert "guidance: expected no omega, t_min or t_max beside it" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_named(run, tmp_path, capsys):
    broken = pmf.PMFDiT.from_pretrained(run, aux_head=False)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    file = tmp_path / "broken.safetensors"
    pmf.save_model(file, broken.config, broken.state_dict())
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    main(["eval", "statistics", str(tmp_path / "pictures"), "--out", str(tmp_path / "real"), "--networks", "pixels"])
    for command in (["sample", str(file)], ["eval", str(file), "--reference", str(tmp_path / "real")]):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*command, "--guidance", "pMF-B/16-torch", "--out", str(tmp_path / command[0])])
        (told,) = (line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("pmf: weights"))
        assert re.fullmatch(r"pmf: weights: .*broken(\.safetensors)? give images that are not finite", told)


def test_labels_out_of_range_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--labels", "11"])
    assert "labels: expected classes in [0, 10], got 11 to 11" in capsys.readouterr().err


def test_module_and_help_work_and_explain_every_value():
    out = subprocess.run([sys.executable, "-m", "pmf.train", "--help"], capture_output=True, text=True, check=True)
    assert all(command in out.stdout for command in ("train", "digits", "data", "sample", "eval"))
    text = subprocess.run(
        [sys.executable, "-m", "pmf.train", "digits", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    ).stdout
    for flag in ("--steps", "--resume", "--model.hidden-size", "--loss.p-mean", "--optimizer.clip-norm"):
        assert flag in text
    assert "(default: 1.2)" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("started_by_torchrun", [False, True])
@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["--help"], 0, ""),
        (["paint"], 2, "pmf: command: expected one of train"),
        (["sample", "/no"], 2, "pmf: source: /no"),
    ],
)
def test_a_process_ends_with_its_status_and_all_that_it_printed(started_by_torchrun, arguments, status, error):
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    environment |= {"LOCAL_RANK": "0"} if started_by_torchrun else {}
    command = [sys.executable, "-m", "pmf.train", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == status and ("usage: pmf COMMAND" in result.stdout) == (not error)
    assert result.stderr.startswith(error) and result.stderr.count("\n") == bool(error)


@pytest.mark.parametrize("arguments", [[], ["train", "--help"], ["sample", "/no"], ["data", "prepare", "folder:/no"]])
def test_what_one_process_does_is_not_repeated_by_the_others_of_torchrun(arguments, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    main(arguments)
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("LOCAL_RANK")  # a cluster names its machines by RANK: there this is the only process
    with contextlib.suppress(SystemExit):
        main(arguments)
    assert capsys.readouterr() != ("", "")


def test_unknown_commands_name_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["paint"])
    known = "train, posttrain, data, sample, eval, doctor, digits, photographs, pMF-B/16"
    assert f"pmf: command: expected one of {known}" in capsys.readouterr().err


def test_paths_that_are_not_text_are_read_written_and_printed(run, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(run, odd / "run")
    command = [sys.executable, "-m", "pmf.train", "sample", os.fsencode(odd / "run"), "--rows", "1", "--labels", "1"]
    result = subprocess.run([*command, "--out", os.fsencode(odd / "a.png")], capture_output=True, text=True)
    # safetensors takes text alone, and says so in words of its version.
    assert "utf-8" in result.stderr.lower() and result.stderr.count("\n") == 1
    (odd / "run").rename(tmp_path / "run")
    command[4] = str(tmp_path / "run")
    result = subprocess.run([*command, "--out", os.fsencode(odd / "a.png")], capture_output=True, text=True)
    assert result.returncode == 0 and "wrote" in result.stdout and (odd / "a.png").is_file(), result.stderr


@pytest.mark.parametrize("out", ["/dev/null", "pipe"])
def test_samples_go_into_devices_and_pipes(run, tmp_path, out):
    arguments = ["sample", str(run), "--rows", "1", "--labels", "1"]
    if out == "pipe":
        os.mkfifo(tmp_path / "pipe")
        reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
        main([*arguments, "--out", str(tmp_path / "pipe")])
        assert reader.communicate()[0].startswith(b"\x89PNG")
    else:
        main([*arguments, "--out", out])
        assert not os.path.isfile(out)


@pytest.mark.parametrize("seed", ["18446744073709551616", "-1", "4294967295"])
@pytest.mark.parametrize("command", ["sample", "eval"])
def test_seeds_out_of_range_are_one_line(run, command, seed, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, str(run), "--seed", seed])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("pmf: seed: expected an integer ")
