"""What an evaluation is given: references, checkpoints of known training data, stops, and others at the same time."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pmf
from pmf.metrics import Statistics
from pmf.train.config import EvaluationConfig, RunConfig, to_json
from pmf.train.evaluation.command import EvalConfig, command
from pmf.train.evaluation.lock import alone
from pmf.train.evaluation.measurement import Measurement, measure
from pmf.train.evaluation.periodic import PeriodicEvaluation
from pmf.train.evaluation.reference import open_pictures
from pmf.train.evaluation.results import Results
from pmf.train.stop_signals import Stopped
from tests.networks import random_model
from tests.train.evaluation import ALONE, COLOUR, SETTINGS, Toy, checkpoint, evaluate

ROOT = Path(__file__).parents[2]
ONE = SETTINGS | dict(omega=(1.5,), interval=("0,1",))


def pictures(folder, count=20, side=8):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (folder / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i % 2}" / f"{side}-{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("source") / "model.safetensors")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def config(source, reference, tmp_path):
    return EvalConfig(source=str(source), reference=reference, out=tmp_path / "out", **ONE)


def test_a_prepared_directory_is_a_reference(config, reference, tmp_path):
    pytest.importorskip("pyarrow")
    from pmf.train.data.prepare import command as prepare

    prepare(["prepare", f"folder:{reference}", "--out", str(tmp_path / "shards"), "--size", "8"])
    prepared = dataclasses.replace(config, reference=tmp_path / "shards", out=tmp_path / "other")
    (a,), (b,) = evaluate(config), evaluate(prepared)
    assert b["fid"] == pytest.approx(a["fid"], rel=1e-9) and b["precision"] == a["precision"]
    shard = tmp_path / "shards" / "shard-000000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(pmf.InputError, match=r"(reference: .*shards holds a corrupt image|data: .*shard-000000.arrow)"):
        evaluate(dataclasses.replace(prepared, out=tmp_path / "third"))
    for file in (tmp_path / "shards").iterdir():
        file.unlink()
    with pytest.raises(pmf.InputError, match=r"reference: .*/shards holds no \.png"):
        evaluate(prepared)


def test_too_few_images_are_warned_of_once(config, caplog, tmp_path):
    evaluate(dataclasses.replace(config, omega=(1.5, 2.0)))
    assert caplog.messages == []  # 6 features, 30 and 20 images
    Statistics.of(torch.randn(3, 6)).save(tmp_path / "ref.npz")
    evaluate(dataclasses.replace(config, reference=tmp_path / "ref.npz", omega=(1.5, 2.0)))
    (line,) = caplog.messages
    assert line.startswith("reference: 3 images; a Fr\u00e9chet distance of so few is mostly error")


def test_sizes_that_differ_are_warned_of_once_with_their_counts(config, caplog, tmp_path):
    mixed = pictures(pictures(tmp_path / "in", 12), 5, side=16)
    evaluate(dataclasses.replace(config, reference=mixed, omega=(1.5, 2.0)))
    assert caplog.messages == ["reference: images of 8 x 8 (12), 16 x 16 (5); expected 8 x 8, as the samples"]
    caplog.clear()
    evaluate(dataclasses.replace(config, reference=pictures(tmp_path / "other", 9, side=16)))
    assert caplog.messages == ["reference: images of 16 x 16 (9); expected 8 x 8, as the samples"]


def test_the_reference_is_looked_at_before_any_network(config, tmp_path):
    def no_extractor(**_):
        pytest.fail("the extractor was loaded")

    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    for path, message in (
        ("gone", "does not exist, expected an npz archive"),
        ("wide.npz", "expected statistics of 2048 features, got"),
    ):
        changed = dataclasses.replace(config, reference=tmp_path / path, source="/nowhere")
        with pytest.raises(pmf.InputError, match=message):
            Measurement(changed, tmp_path, ALONE, no_extractor if path == "gone" else None)


@pytest.mark.parametrize("kind", ["pipe", "link to nowhere"])
def test_what_is_no_picture_is_named_and_not_waited_for(config, tmp_path, kind):
    bad = pictures(tmp_path / "in") / "bad.png"
    os.mkfifo(bad) if kind == "pipe" else bad.symlink_to("nowhere")
    assert open_pictures(tmp_path / "in", "reference").sizes() == {(8, 8): 20}
    with pytest.raises(pmf.InputError, match=r"^reference: .*bad.png is not a readable picture: "):
        evaluate(dataclasses.replace(config, reference=tmp_path / "in"))


def test_too_few_images_for_precision_and_recall_are_refused_at_the_start(config, tmp_path):
    features = torch.randn(3, 6)
    dataclasses.replace(Statistics.of(features), features=features.numpy()).save(tmp_path / "three.npz")
    for path in (pictures(tmp_path / "in", 3), tmp_path / "three.npz"):
        with pytest.raises(pmf.InputError, match=r"^reference: expected more than 3 images, for precision and recall"):
            evaluate(dataclasses.replace(config, reference=path, source="/nowhere"))


@pytest.fixture
def digits(tmp_path):
    """A network for pictures like digits."""
    model = random_model(pmf.MODELS["pMF-digits"], dtype=torch.float32)

    def saved(name, **metadata):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        pmf.save_model(file, model.config, model.state_dict(), **metadata)
        return str(file)

    return saved


FLAGS = ["--omega", "1.1", "--interval", "0,1", "--steps", "1", "--device", "cpu"]


def test_all_weights_are_looked_for_before_any_is_measured(digits, tmp_path, capsys):
    digits("known.safetensors", data="digits")
    with pytest.raises(pmf.InputError, match=r"weights: .* has no 'nope', expected one of known.safetensors"):
        command([str(tmp_path), "--weights", "known", "nope", *FLAGS])
    assert capsys.readouterr().out == ""


def test_digits_score_only_what_was_trained_on_digits(digits, tmp_path, capsys, caplog):
    command([digits("known.safetensors", data="digits"), *FLAGS])
    assert "frechet_distance" in capsys.readouterr().out
    mine = digits("mine.safetensors", data="data/mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(RunConfig(data="data/mine", sampling_weights="model")))
    inside = digits("run/model.safetensors")
    for checkpoint_of_mine in (mine, inside, str(tmp_path / "run")):
        with pytest.raises(pmf.InputError, match="only digits and photographs do without, this is of data/mine"):
            command([checkpoint_of_mine, *FLAGS])
    with pytest.raises(pmf.InputError, match="images of this shape are no photographs"):
        command([digits("photographs.safetensors", data="photographs"), *FLAGS])
    capsys.readouterr()
    command([digits("unknown.safetensors"), *FLAGS])
    (warning,) = caplog.messages
    assert warning.startswith("source: its training data are unknown; scored as digits") and capsys.readouterr().out


def test_a_run_of_other_data_is_not_scored_as_digits_while_it_trains(tmp_path):
    run = RunConfig(data="data/mine", eval_every=1, device="cpu")
    with pytest.raises(pmf.InputError, match="only digits and photographs do without, this is of data/mine"):
        PeriodicEvaluation(run, ALONE, tmp_path)


class Asked:
    """Asks for a stop at its `number`-th call."""

    def __init__(self, number):
        self.left = number

    def __call__(self):
        self.left -= 1
        return self.left < 0


def measured(config, stopping, extractor=None):
    toy = extractor or Toy()
    measurement = Measurement(config, config.out, ALONE, lambda resize: toy)
    network = pmf.PMFDiT.from_pretrained(config.source, aux_head=False)
    settings = dict(steps=1, omega=1.5, t_min=0.0, t_max=1.0)

    def draw(labels, seeds):
        return pmf.generate(network, labels, seeds=seeds, **settings)

    return measure([measurement], network, draw, {}, settings, seed=0, dtype="float32", stopping=stopping)[0]


def test_an_evaluation_stops_at_the_next_batch_and_loses_no_chunk(config):
    whole, calls, stops = Toy(), 0, 0
    expected = measured(dataclasses.replace(config, out=config.out / "whole"), Asked(10**6), whole)
    while True:
        toy = Toy()
        try:
            line = measured(config, Asked(8), toy)
            break
        except Stopped:
            stops += 1
            assert not list(config.out.glob("*.lock"))
        calls += toy.calls
    assert stops >= 2 and line == expected
    assert calls + toy.calls <= whole.calls + stops * (1 + 2)  # a blank image, and a chunk begun


def test_a_stop_while_another_evaluation_is_waited_for_is_obeyed(config, tmp_path, capsys):
    line = measured(config, Asked(10**6))
    with alone(config.out / f".{line['key']}.lock", ALONE, Asked(10**6)) as held, pytest.raises(Stopped):
        assert held
        measured(config, Asked(3))
    assert f"process {os.getpid()} on " in capsys.readouterr().err


def test_one_process_that_is_asked_stops_all(config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    jobs = []
    for rank in "01":
        torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank}
        arguments = [config.source, str(config.reference), str(config.out), "0", "4" if rank == "1" else "1000000"]
        program = [sys.executable, "-m", "tests.train.evaluation", *arguments]
        jobs.append(subprocess.Popen(program, cwd=ROOT, env={**os.environ, **torchrun}, stdout=subprocess.PIPE))
    assert [job.communicate(timeout=120)[0].decode().strip() for job in jobs] == ["stopped", "stopped"]
    assert [job.returncode for job in jobs] == [0, 0] and list(config.out.glob(".*/chunk-*.npz"))


def test_two_evaluations_of_the_same_do_not_disturb_each_other(config):
    class Slow(Toy):
        calls_in_all = 0

        def forward(self, images):
            Slow.calls_in_all += 1
            return super().forward(images)

    results, failures = [], []

    def run():
        try:
            results.append(measured(config, Asked(10**6), Slow(delay=0.02)))
        except BaseException as error:
            failures.append(error)

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not failures and results[0] == results[1]
    lines = (config.out / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1 and not list(config.out.glob(".*"))


def test_the_lock_of_a_process_that_died_is_free(tmp_path):
    code = f"""
import os, torch
from pathlib import Path
from pmf.train.distributed import World
from pmf.train.evaluation.lock import alone
with alone(Path({str(tmp_path / "a.lock")!r}), World(torch.device("cpu")), lambda: False):
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert (tmp_path / "a.lock").exists()
    with alone(tmp_path / "a.lock", ALONE, lambda: False) as held:
        assert held
    assert not (tmp_path / "a.lock").exists()


@pytest.mark.parametrize("text", [b"[]", b"3", b"null", b"\xff\xfe{", b'"text"', b"[" * 10**5, b"{", b'{"key": [1]}'])
def test_odd_lines_among_the_results_are_skipped(tmp_path, text):
    (tmp_path / "results.jsonl").write_bytes(text + b"\n" + json.dumps({"key": "a", "fid": 1}).encode() + b"\n" + text)
    results = Results(tmp_path)
    assert results.find("a") == {"key": "a", "fid": 1} and results.find("b") is None
    results.append({"key": "b"})
    assert results.find("b") == {"key": "b"}


@pytest.mark.parametrize("numbers", [{}, {"fid": "x"}, {"fid": float("nan")}, {"fid": None}])
def test_a_result_that_has_lost_its_numbers_is_measured_again(config, numbers):
    (line,) = evaluate(config)
    file = config.out / "results.jsonl"
    file.write_text(json.dumps({"key": line["key"], **numbers}) + "\n")
    assert evaluate(config) == [line]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=(1, 0)), r"steps: expected positive numbers, got \(1, 0\)"),
        (dict(images=Path(__file__)), "images: .* is a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(config, changes, message):
    with pytest.raises(pmf.InputError, match=message):
        dataclasses.replace(config, **changes)


def test_points_that_are_given_twice_are_measured_once(config):
    twice = dataclasses.replace(config, steps=(1, 1), omega=(1.5, 1.5), weights=config.weights * 2)
    assert len(evaluate(twice)) == 1


def test_damaged_features_are_named(config):
    with pytest.raises(Stopped):
        measured(config, Asked(14))
    (chunk, *_) = sorted(config.out.glob(".*/chunk-*.npz"))
    for content in (b"", chunk.read_bytes()[:99]):
        chunk.write_bytes(content)
        with pytest.raises(pmf.InputError, match=r"out: .*chunk-00000000.npz is damaged, remove it: "):
            measured(config, Asked(10**6))


@pytest.mark.parametrize("seed", [-1, 2**32 - 29, 2**32, 2**63 - 1])
def test_seeds_that_leave_their_range_are_refused(config, digits, seed):
    with pytest.raises(pmf.InputError, match=r"seed: expected an integer from 0 to 4294967266, for 30 images, got"):
        evaluate(dataclasses.replace(config, seed=seed))
    if seed > 0:
        with pytest.raises(pmf.InputError, match="seed: expected an integer from 0 to"):
            command([digits("a.safetensors", data="digits"), *FLAGS, "--seed", str(seed)])


def test_the_evaluations_of_a_run_take_the_same_stop(tmp_path, reference, monkeypatch):
    monkeypatch.setattr("pmf.train.evaluation.measurement.inception", lambda *_, resize, device: Toy())
    evaluation = EvaluationConfig(reference=reference, per_class=6, chunk=8, batch_size=3)
    run = RunConfig(model=COLOUR, eval_every=1, evaluation=evaluation, device="cpu", data="mine")
    periodic = PeriodicEvaluation(run, ALONE, tmp_path)
    with pytest.raises(Stopped):
        periodic.prepare(Asked(2))
    weights = {"ema_500": periodic.network.state_dict()}
    for calls in (0, 3, 12):
        with pytest.raises(Stopped):
            periodic.measure(1, weights, Asked(calls))
    assert periodic.measure(1, weights, Asked(10**6))["fid/ema_500"] > 0
