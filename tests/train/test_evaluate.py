import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pmf
from pmf.config import Guidance
from pmf.errors import InputError
from pmf.images import to_bytes
from pmf.metrics import Statistics, frechet_distance, inception_score, precision_recall
from pmf.train.config import RunConfig, to_json
from pmf.train.demo import digits
from pmf.train.demo.scores import evaluate_digits
from pmf.train.evaluation.command import EvalConfig, Point, command, grid
from tests.networks import random_model
from tests.train.evaluation import COLOUR, SETTINGS, Toy, checkpoint, evaluate

ROOT = Path(__file__).parents[2]
METRICS = ("fid", "inception_score", "inception_score_std", "precision", "recall")


def frechet(a, b):
    return frechet_distance(*(Statistics.of(x.flatten(1)) for x in (a, b)))


def test_the_scale_of_the_digits_numbers():
    train, held_out = digits()
    means = torch.stack([train.images[train.labels == c].mean(0) for c in range(10)])
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert frechet(train.images, held_out.images) == pytest.approx(0.46, abs=0.01)
    assert frechet(means.repeat_interleave(50, 0), held_out.images) == pytest.approx(7.2, abs=0.1)
    assert frechet(noise, held_out.images) == pytest.approx(62, abs=1)


class Copier(torch.nn.Module):
    """Returns a real training digit of each label: the best that a generator can do."""

    def __init__(self):
        super().__init__()
        self.template = random_model()
        self.held_weights = contextlib.nullcontext  # nothing to hold
        self.config = self.template.config.__class__(image_size=8, patch_size=8, in_channels=1, num_classes=10)

    def predict_dual(self, z, h, omega, t_min, t_max, y, *, heads):
        train, _ = digits()
        places = [(train.labels == c).nonzero()[:, 0] for c in range(10)]
        chosen = [places[c][i % len(places[c])] for i, c in enumerate(y.tolist())]
        from pmf.pair import Dual

        return {"u": Dual(train.images[torch.stack(chosen)].flatten(2))}

    def to_images(self, tokens):
        return tokens.unflatten(-1, (8, 8))


def test_real_digits_are_close_and_named_rightly():
    result = evaluate_digits(Copier(), omega=1.0, t_min=0.0, t_max=1.0)
    assert result["frechet_distance"] < 0.9
    assert result["accuracy"] > 0.99


def test_published_settings_are_measured_by_name():
    config, model = EvalConfig(source="checkpoint.pt", guidance=("pMF-B/16", "pMF-B/16-torch")), pmf.MODELS["pMF-B/16"]
    settings = [Guidance(8.5, 0.1, 0.7), Guidance(7.5, 0.1, 0.8)]
    assert [point.sampling for point in grid(config, None, model)] == settings
    with pytest.raises(pmf.InputError, match="guidance: expected no omega and no interval beside it"):
        grid(dataclasses.replace(config, omega=(7.0,)), None, model)
    with pytest.raises(pmf.InputError, match=r"guidance: expected one of pMF-B/16, .*pMF-B/16-torch.*, got 'B/16'"):
        grid(dataclasses.replace(config, guidance=("B/16",)), None, model)


def test_a_digits_network_is_measured_over_the_grid(tmp_path, capsys):
    model = random_model(pmf.MODELS["pMF-digits"], dtype=torch.float32)
    file = tmp_path / "model.safetensors"
    pmf.save_model(file, model.config, model.state_dict())
    command([str(file), "--omega", "1.1", "2", "--interval", "0.1,0.7", "--device", "cpu"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    points = [(line["omega"], line["steps"]) for line in lines]
    assert points == [(1.1, 1), (1.1, 2), (2.0, 1), (2.0, 2)]
    expected = evaluate_digits(pmf.PMFDiT.from_pretrained(file), omega=2.0, t_min=0.1, t_max=0.7, steps=2)
    for name, value in expected.items():
        assert lines[-1][name] == round(value, 4)


def test_guidance_is_that_of_the_flags_else_of_the_run_else_of_the_preset(tmp_path):
    (preset,) = grid(EvalConfig(source="checkpoint.pt"), None, pmf.MODELS["pMF-B/16"])
    assert preset == Point("checkpoint", Guidance(8.5, 0.1, 0.7), 1)
    run = RunConfig(sampling=Guidance(2.0, 0.2, 0.6), sampling_weights="ema_2000")
    (tmp_path / "config.json").write_text(to_json(run))
    assert grid(EvalConfig(source=str(tmp_path)), None, run.model) == [Point("ema_2000", run.sampling, 1)]
    flags = EvalConfig(source=str(tmp_path), omega=(3.0,), steps=(2, 4))
    expected = [Point("ema_500", Guidance(3.0, 0.2, 0.6), steps) for steps in (2, 4)]
    assert grid(flags, "ema_500", run.model) == expected


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("source") / "model.safetensors")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder of two class folders with 20 pictures."""
    folder = tmp_path_factory.mktemp("reference")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(i % 2) / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def config(source, reference):
    return EvalConfig(source=str(source), reference=reference, **SETTINGS)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, evaluate(dataclasses.replace(config, out=out))


def results(out):
    return (out / "results.jsonl").read_bytes()


def features_of(config, *, steps, omega, t_min, t_max):
    """Expected features and logits: every image from its own class and seed, in the same batches."""
    model = pmf.PMFDiT.from_pretrained(config.source, aux_head=False)
    parts = []
    for start in range(0, 30, 8):
        for first in range(start, min(start + 8, 30), 3):
            batch = range(first, min(first + 3, start + 8, 30))
            labels, seeds = [i // 6 for i in batch], [config.seed + i for i in batch]
            setting = dict(steps=steps, omega=omega, t_min=t_min, t_max=t_max)
            parts.append(Toy()(to_bytes(pmf.generate(model, labels, seeds=seeds, **setting))))
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def test_every_grid_point_is_measured_and_written(config, uninterrupted, capsys):
    out, lines = uninterrupted
    points = [(line["omega"], line["t_min"], line["t_max"], line["steps"]) for line in lines]
    assert points == [(1.5, 0.0, 1.0, 1), (3.0, 0.0, 1.0, 1), (1.5, 0.1, 0.7, 1), (3.0, 0.1, 0.7, 1)]
    assert [json.loads(text) for text in results(out).splitlines()] == lines
    assert all(line["images"] == 30 and line["weights"] == "model" and line["resize"] == "tf1" for line in lines)
    assert not list(out.glob(".*"))  # no unfinished features remain


def test_the_metrics_are_those_of_images_by_class_and_seed(config, uninterrupted):
    real = [np.array(Image.open(f)) for f in sorted(config.reference.rglob("*.png"))]
    real = Toy()(torch.from_numpy(np.stack(real)).permute(0, 3, 1, 2))[0]
    for line in uninterrupted[1]:
        setting = {name: line[name] for name in ("steps", "omega", "t_min", "t_max")}
        features, logits = features_of(config, **setting)
        fid = frechet_distance(Statistics.of(features), Statistics.of(real))
        expected = (fid, *inception_score(logits), *precision_recall(features, real))
        # Chunked sums of 30 terms differ by float64 rounding, and the distance takes a root of rounded zeros.
        assert [line[name] for name in METRICS] == pytest.approx(expected, rel=1e-6)
    assert len({line["fid"] for line in uninterrupted[1]}) == 4


class Interrupted(Toy):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, images):
        if self.calls == self.after:
            raise KeyboardInterrupt
        return super().forward(images)


def test_an_interrupted_evaluation_continues_and_ends_the_same(config, uninterrupted, tmp_path):
    config = dataclasses.replace(config, out=tmp_path)
    complete = Toy()
    evaluate(dataclasses.replace(config, out=tmp_path / "again"), complete)
    calls = []
    for after in (6, 9, 14, 9):
        extractor = Interrupted(after)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, extractor)
        calls.append(extractor.calls)
    last = Toy()
    evaluate(config, last)
    assert results(tmp_path) == results(uninterrupted[0])
    # Each start extracts one blank image, and each interruption costs less than a chunk of three batches.
    assert sum(calls) + last.calls < complete.calls + 4 * (1 + 3)
    idle = Toy()
    evaluate(config, idle)
    assert idle.calls == 1 and results(tmp_path) == results(uninterrupted[0])


def process(config, out, *, delay=0.0, **environment):
    arguments = [config.source, str(config.reference), str(out), str(delay)]
    command = [sys.executable, "-m", "tests.train.evaluation", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})


def test_a_killed_evaluation_continues_and_ends_the_same(config, uninterrupted, tmp_path):
    running = process(config, tmp_path, delay=0.1)
    while len(list(tmp_path.glob(".*/chunk-*.npz"))) < 2 and running.poll() is None:
        time.sleep(0.001)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    evaluate(dataclasses.replace(config, out=tmp_path))
    assert results(tmp_path) == results(uninterrupted[0])


def test_two_processes_give_what_one_gives(config, uninterrupted, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [process(config, tmp_path, RANK=rank, LOCAL_RANK=rank, **torchrun) for rank in "01"]
    assert [running.wait() for running in both] == [0, 0]
    assert results(tmp_path) == results(uninterrupted[0])


def test_images_are_kept_where_asked_for_and_made_again_where_missing(config, uninterrupted, tmp_path):
    config = dataclasses.replace(config, out=tmp_path, images=tmp_path / "images", omega=(1.5,), interval=("0,1",))
    (line,) = evaluate(config)
    assert line == uninterrupted[1][0]
    (folder,) = config.images.iterdir()
    files = sorted(folder.iterdir())
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    expected, _ = features_of(config, steps=1, omega=1.5, t_min=0.0, t_max=1.0)
    # In the measured batches: a product of one row may sum in another order.
    batches = [part for chunk in images.split(8) for part in chunk.split(3)]
    assert len(files) == 30 and torch.equal(torch.cat([Toy()(batch)[0] for batch in batches]), expected)
    before = files[17].read_bytes()
    files[17].unlink()
    evaluate(config)
    assert files[17].read_bytes() == before and len(results(tmp_path).splitlines()) == 1


def test_weights_that_equal_others_are_told_by_their_own_name(config, source, uninterrupted, tmp_path):
    out, twin = tmp_path / "out", tmp_path / "twin.safetensors"
    shutil.copytree(uninterrupted[0], out)
    shutil.copy(source, twin)
    lines = evaluate(dataclasses.replace(config, source=str(twin), out=out))
    assert lines == [{**line, "source": str(twin), "weights": "twin"} for line in uninterrupted[1]]
    assert results(out) == results(uninterrupted[0])  # nothing was measured twice


def test_statistics_without_features_leave_precision_and_recall_out(config, uninterrupted, tmp_path):
    features = Toy()(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8))[0]
    known = Statistics.of(features)
    np.savez(tmp_path / "ref.npz", ref_mu=known.mu, ref_sigma=known.sigma)
    (line,) = evaluate(
        dataclasses.replace(
            config, reference=tmp_path / "ref.npz", out=tmp_path, omega=(1.5,), interval=("0,1",), seed=4
        )
    )
    assert line["precision"] is None and line["recall"] is None and line["fid"] > 0
    assert line["inception_score"] != uninterrupted[1][0]["inception_score"]  # other seeds, other images


def test_the_resize_is_that_of_the_references_names_else_of_the_flag(config, tmp_path):
    """Results of one resize are never reused for the other."""
    config = dataclasses.replace(config, out=tmp_path, omega=(1.5,), interval=("0,1",))
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    extractor = Toy()
    extractor.resize = "half_pixel"
    known = dataclasses.replace(Statistics.of(extractor(images)[0]), resize="half_pixel")
    known.save(tmp_path / "ref.npz")
    statistics = dataclasses.replace(config, reference=tmp_path / "ref.npz")
    lines = [evaluate(dataclasses.replace(statistics, resize=resize))[0] for resize in (None, "half_pixel", "tf1")]
    assert [line["resize"] for line in lines] == ["half_pixel", "half_pixel", "tf1"]
    assert lines[0] == lines[1] and lines[0]["key"] != lines[2]["key"] and lines[0]["fid"] != lines[2]["fid"]
    folders = [evaluate(dataclasses.replace(config, resize=resize))[0] for resize in (None, "tf1", "half_pixel")]
    assert [line["resize"] for line in folders] == ["tf1", "tf1", "half_pixel"]
    assert folders[0] == folders[1] and folders[0]["fid"] != folders[2]["fid"]
    kept = sorted(Statistics.load(file).resize for file in tmp_path.glob("reference-*.npz"))
    assert kept == ["half_pixel", "tf1"] and len(results(tmp_path).splitlines()) == 4


def test_changed_settings_are_measured_again_and_torn_lines_skipped(config, source, tmp_path):
    config = dataclasses.replace(config, out=tmp_path, omega=(1.5,), interval=("0,1",))
    evaluate(config)
    evaluate(dataclasses.replace(config, batch_size=30))  # changes only rounding: not measured again
    assert len(results(tmp_path).splitlines()) == 1
    (tmp_path / "results.jsonl").write_bytes(results(tmp_path)[:-9])
    evaluate(dataclasses.replace(config, dtype="bfloat16"))
    torn, whole = results(tmp_path).splitlines()
    with pytest.raises(ValueError, match="Unterminated"):
        json.loads(torn)
    assert json.loads(whole)["dtype"] == "bfloat16"
    other = tmp_path / "other.safetensors"
    pmf.save_model(other, COLOUR, random_model(COLOUR, seed=1, dtype=torch.float32).state_dict())
    other.replace(tmp_path / "model.safetensors")
    evaluate(dataclasses.replace(config, source=str(tmp_path / "model.safetensors")))
    assert len(results(tmp_path).splitlines()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(interval=("0.1",)), "interval: expected t_min,t_max such as 0.1,0.7, got '0.1'"),
        (dict(interval=("0.7,0.1",)), "t_min: expected 0 <= t_min <= t_max <= 1, got 0.7 and 0.1"),
        (dict(omega=(0.5,)), "omega: expected a guidance scale >= 1, got 0.5"),
        (dict(per_class=1), "per_class: expected at least 10 images in all, got 5"),
        (dict(omega=()), "omega: this network is not a preset, so omega must be given"),
        (dict(reference=Path("/nowhere")), "reference: /nowhere does not exist, expected an npz archive"),
    ],
)
def test_bad_settings_are_named(config, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        evaluate(dataclasses.replace(config, out=tmp_path, **change))


def test_grey_pictures_are_measured_in_three_equal_channels(config, tmp_path):
    model = random_model(pmf.MODELS["pMF-digits"], dtype=torch.float32)
    pmf.save_model(tmp_path / "grey.safetensors", model.config, model.state_dict())
    grey = dict(source=str(tmp_path / "grey.safetensors"), out=tmp_path, images=tmp_path / "images", per_class=1)
    (line,) = evaluate(dataclasses.replace(config, **grey, omega=(1.5,), interval=("0,1",)))
    files = sorted((tmp_path / "images").rglob("*.png"))
    kept = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    expected = pmf.generate(model, range(10), omega=1.5, t_min=0.0, t_max=1.0, batch_size=10)
    assert kept.shape == (10, 3, 8, 8) and line["images"] == 10
    assert (kept.int() - to_bytes(expected).int()).abs().max() <= 1  # batches of three round differently


def test_pictures_have_one_or_three_channels(config, tmp_path):
    model = random_model(dtype=torch.float32)
    pmf.save_model(tmp_path / "two.safetensors", model.config, model.state_dict())
    with pytest.raises(InputError, match="source: expected images of 1 or 3 channels, got 2"):
        evaluate(dataclasses.replace(config, source=str(tmp_path / "two.safetensors"), out=tmp_path))


def test_statistics_of_another_extractor_are_refused(config, tmp_path):
    Statistics.of(torch.randn(9, 7)).save(tmp_path / "ref.npz")
    with pytest.raises(InputError, match="reference: expected statistics of 6 features, got 7"):
        evaluate(dataclasses.replace(config, reference=tmp_path / "ref.npz", out=tmp_path))


def test_only_digits_do_without_a_reference(source):
    with pytest.raises(InputError, match="reference: expected a folder of images or an npz of statistics, got none"):
        command([str(source), "--omega", "2", "--interval", "0,1", "--device", "cpu"])


@pytest.mark.extras
def test_the_commands_measure_with_inception(source, reference, inception_weights, tmp_path, capsys):
    inception = ["--inception", str(inception_weights), "--device", "cpu"]
    folder = reference / "0"
    command(["statistics", str(folder), "--out", str(tmp_path / "ref.npz"), *inception])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'ref.npz'}: statistics of 10 images, tf1 resize\n"
    arguments = [str(source), "--reference", str(tmp_path / "ref.npz"), "--out", str(tmp_path), *inception]
    grid = ["--per-class", "2", "--omega", "1.5", "--interval", "0,1", "--steps", "1", "2"]
    command([*arguments, *grid])
    *lines, best = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["steps"] for line in lines] == [1, 2] and all(line["precision"] is None for line in lines)
    assert best == {"best": min(lines, key=lambda line: line["fid"])}
    assert all(line["resize"] == "tf1" for line in lines)

    command(["statistics", str(folder), "--out", str(tmp_path / "half.npz"), "--resize", "half_pixel", *inception])
    assert "10 images, half_pixel resize" in capsys.readouterr().out
    arguments[2] = str(tmp_path / "half.npz")
    command([*arguments, *grid[:-1]])
    command([*arguments, *grid[:-1], "--resize", "tf1"])
    half, crossed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (half["resize"], crossed["resize"]) == ("half_pixel", "tf1")
    assert len({lines[0]["fid"], half["fid"], crossed["fid"]}) == 3


def test_the_command_names_the_extra_it_lacks(source, reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"expected pip install 'pixel-meanflow\[eval\]'"):
        command([str(source), "--reference", str(reference), "--device", "cpu"])
