"""Statistics and evaluations in several feature spaces."""

import dataclasses
import json
import os
import shutil
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
from pmf.config import Guidance
from pmf.feature_networks import FeatureNetwork
from pmf.images import to_float
from pmf.metrics import Statistics, frechet_distance, precision_recall
from pmf.train.config import MeasurementConfig, PosttrainConfig, to_json
from pmf.train.evaluation import spaces
from pmf.train.evaluation.command import command
from pmf.train.evaluation.reference import FEW
from tests.train.evaluation import checkpoint

ROOT = Path(__file__).parents[2]
CPU = ["--device", "cpu"]


def pictures(folder, seed, count=24, side=8):
    """Pictures with class folders, as those of a data set."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(i % 2) / f"{side}-{i:02}.png")
    return folder


def read(folder):
    images = [np.array(Image.open(file)) for file in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def statistics(folder, out, *more, networks=("pixels",)):
    command(["statistics", str(folder), "--out", str(out), "--networks", *networks, *CPU, *more])
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("source") / "model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Real images and held-out ones, with their statistics in pixel space (real: with features)."""
    root = tmp_path_factory.mktemp("folders")
    real, held = pictures(root / "real", 0), pictures(root / "held", 1)
    return real, statistics(real, root / "ref", "--features"), statistics(held, root / "held-ref")


def evaluate(source, reference, out, *more):
    grid = ["--omega", "1.5", "--interval", "0,1", "--batch-size", "3", "--chunk", "8"]
    grid += [] if "--per-class" in more else ["--per-class", "6"]
    command([str(source), "--reference", str(reference), "--out", str(out), *grid, *CPU, *more])


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_statistics_of_pixels_are_those_of_the_images(folders):
    real, reference, held = folders
    known, expected = Statistics.load(reference / "pixels.npz"), Statistics.of(to_float(read(real)).flatten(1))
    assert np.allclose(known.mu, expected.mu, atol=1e-12) and np.allclose(known.sigma, expected.sigma, atol=1e-12)
    assert (known.count, known.space, known.image_size) == (24, "pixels", 8)
    assert torch.equal(torch.from_numpy(known.features), to_float(read(real)).flatten(1))
    assert Statistics.load(held / "pixels.npz").features is None
    kinds = [MeasurementConfig(reference=folder).of_spaces for folder in (reference, real, None)]
    assert kinds == [True, False, False] and not list(reference.glob(".*"))


def test_two_processes_write_what_one_writes(folders, tmp_path):
    real, reference, _ = folders
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    arguments = ["statistics", str(real), "--out", str(tmp_path), "--networks", "pixels", "--features", "--chunk", "7"]
    run = [sys.executable, "-m", "pmf.train", "eval", *arguments, *CPU]
    both = [
        subprocess.Popen(run, cwd=ROOT, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    assert [process.wait() for process in both] == [0, 0]
    one, two = (Statistics.load(folder / "pixels.npz") for folder in (reference, tmp_path))
    assert np.array_equal(one.features, two.features) and np.allclose(one.sigma, two.sigma, atol=1e-12)


class Scaled(torch.nn.Module):
    """The pixels by a factor: a feature network of a test."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, images):
        return self.factor * images.flatten(1)


@pytest.fixture
def fed(monkeypatch):
    """Feature networks that need no package: which were fed, and with how many images; `fed.dies` is to raise."""
    calls = Calls()

    def network(spec, device):
        name = spec.partition(":")[0]
        made = FeatureNetwork(name, Scaled(len(name)), width=192, space=f"{name} of a test", dtype=torch.float32)

        def fed(module, inputs):
            if len(inputs[0]) == 1:  # a blank image tells the width
                return
            if calls.dies == (name, sum(n for which, n in calls if which == name)):
                raise KeyboardInterrupt
            calls.append((name, len(inputs[0])))

        made.register_forward_pre_hook(fed)
        return made

    monkeypatch.setattr(spaces, "feature_network", network)
    return calls


class Calls(list):
    dies = None

    def taken(self):
        """Images by network since the last call."""
        found = dict.fromkeys((name for name, _ in self), 0)
        for name, n in self:
            found[name] += n
        self.clear()
        return found


def test_interrupted_statistics_resume_with_the_network_they_were_at(folders, tmp_path, fed):
    real, out = folders[0], tmp_path / "out"
    fed.dies = "mae", 0
    with pytest.raises(KeyboardInterrupt):
        statistics(real, out, networks=("clip", "mae"))
    assert fed.taken() == {"clip": 24} and not list(out.glob("[!.]*"))
    fed.dies = None
    statistics(real, out, networks=("clip", "mae"))
    assert fed.taken() == {"mae": 24} and sorted(file.name for file in out.iterdir()) == ["clip.npz", "mae.npz"]
    assert Statistics.load(out / "clip.npz").space == "clip of a test"
    statistics(real, out, networks=("clip",))  # a complete call computes anew
    assert fed.taken() == {"clip": 24}


def test_statistics_that_another_process_has_named_are_not_named_again(tmp_path):
    part, file = tmp_path / ".part.npz", tmp_path / "pixels.npz"
    part.write_bytes(b"content")
    for _ in range(2):
        spaces._publish(part, file)
        assert file.read_bytes() == b"content" and not part.exists()
    file.unlink()
    with pytest.raises(pmf.InputError, match=r"pixels.npz was removed meanwhile, expected it to stay"):
        spaces._publish(part, file)


def test_images_are_drawn_once_for_all_spaces(source, folders, tmp_path, fed, monkeypatch, capsys):
    """Also where an evaluation resumes, and where some spaces are known already."""
    reference = statistics(folders[0], tmp_path / "ref", networks=("clip", "mae", "pixels"))
    fed.clear()
    capsys.readouterr()
    own, drawn = pmf.generate, []

    def generate(model, labels, **settings):
        drawn.append(len(labels))
        return own(model, labels, **settings)

    monkeypatch.setattr(pmf, "generate", generate)
    evaluate(source, reference, tmp_path / "whole")
    *whole, summary = lines(capsys)
    assert sum(drawn) == 30 and fed.taken() == {"clip": 30, "mae": 30, "pixels": 30}
    # Factors of pixels scale distances by their squares: every line is of its own space.
    distances = summary["not_trained_on"]
    assert distances["mae"] == pytest.approx(9 / 16 * distances["clip"], rel=1e-3)
    assert distances["pixels"] == pytest.approx(36 / 16 * distances["clip"], rel=1e-3)
    assert [line["network"] for line in whole] == ["clip", "mae", "pixels"]

    drawn.clear()
    fed.dies = "mae", 8 + 3  # in the second chunk of 8 images, after a batch of 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(source, reference, tmp_path / "out")
    fed.taken()
    fed.dies = None
    evaluate(source, reference, tmp_path / "out", "--networks", "pixels")
    assert fed.taken() == {"pixels": 22}
    drawn.clear()
    capsys.readouterr()
    evaluate(source, reference, tmp_path / "out")
    assert sum(drawn) == 22 and fed.taken() == {"clip": 22, "mae": 22}
    assert lines(capsys)[:3] == whole

    drawn.clear()
    evaluate(source, reference, tmp_path / "out", "--images", str(tmp_path / "images"))
    assert sum(drawn) == 30 and not fed and len(list((tmp_path / "images").parent.glob("images/*/*.png"))) == 30
    assert lines(capsys)[:3] == whole


def test_the_distance_is_that_of_the_drawn_images_and_fdr_is_relative_to_held_out_ones(
    source, folders, tmp_path, capsys, caplog
):
    real, reference, held = folders
    evaluate(source, reference, tmp_path, "--held-out", str(held), "--images", str(tmp_path / "images"))
    line, summary = lines(capsys)
    assert f"held_out: 24 images; {FEW} 192" in caplog.text
    assert (
        caplog.text.count("held_out: 24 images, but 30 are generated; FDr is too low with fewer held-out images") == 1
    )
    drawn = to_float(read(tmp_path / "images")).flatten(1)
    known = Statistics.load(reference / "pixels.npz")
    distance = frechet_distance(Statistics.of(drawn), known)
    # Rounded zeros among the eigenvalues: the covariances have no full rank.
    assert line["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    precise = precision_recall(drawn, to_float(read(real)).flatten(1))
    assert (line["precision"], line["recall"]) == precise
    assert (line["network"], line["space"], line["images"]) == ("pixels", "pixels", 30)
    assert not {"fid", "resize", "inception_score"} & set(line)
    found = Statistics.load(held / "pixels.npz")
    floor = frechet_distance(found, known)
    assert summary["not_trained_on"] == {"pixels": line["frechet_distance"]} and summary["trained_on"] == {}
    assert summary["fdr"] == {"pixels": pytest.approx(line["frechet_distance"] / floor, rel=1e-9)}
    evaluate(source, reference, tmp_path)
    again, bare = lines(capsys)
    assert again == line and "fdr" not in bare and bare.items() <= summary.items()
    assert len((tmp_path / "results.jsonl").read_bytes().splitlines()) == 1  # nothing was measured twice


def test_two_evaluations_of_the_same_spaces_do_not_wait_for_each_other_in_turn(source, folders, tmp_path, fed):
    """Whatever the order in which they name them."""
    reference = statistics(folders[0], tmp_path / "ref", networks=("clip", "mae"))
    fed.clear()
    orders = ("clip", "mae"), ("mae", "clip")
    both = [
        threading.Thread(target=evaluate, args=(source, reference, tmp_path / "out", "--networks", *o), daemon=True)
        for o in orders
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in both)
    assert fed.taken() == {"clip": 30, "mae": 30}  # the second takes the results of the first
    assert len((tmp_path / "out" / "results.jsonl").read_bytes().splitlines()) == 2
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["results.jsonl"]


def test_spaces_that_a_run_was_trained_on_are_told_apart(source, folders, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(source, run / "model.safetensors")
    network, features = pmf.PMFDiT.from_pretrained(source).config, ("pixels", "mae:/some/file")
    stored = PosttrainConfig(model=network, features=features, sampling=Guidance(1.5), sampling_weights="model")
    (run / "config.json").write_text(to_json(stored))
    evaluate(run, folders[1], tmp_path)
    line, summary = lines(capsys)
    assert summary["trained_on"] == {"pixels": line["frechet_distance"]} and summary["not_trained_on"] == {}


def changed(folders, tmp_path, **changes):
    known = Statistics.load(folders[1] / "pixels.npz")
    (tmp_path / "changed").mkdir()
    dataclasses.replace(known, **changes).save(tmp_path / "changed" / "pixels.npz")
    return tmp_path / "changed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(space="mae 224"), "reference: .*pixels.npz: expected features of pixels, got mae 224"),
        (dict(image_size=16), "reference: expected statistics of 768 features, got 192"),
        (
            dict(image_size=16, mu=np.zeros(768), sigma=np.eye(768), features=None),
            "reference: expected images of 8 pixels, as the samples, got 16",
        ),
        (
            dict(mu=np.zeros(7), sigma=np.eye(7), features=None),
            "reference: expected statistics of 192 features, got 7",
        ),
    ],
)
def test_statistics_of_another_kind_are_refused(source, folders, tmp_path, changes, message):
    reference = changed(folders, tmp_path, **changes)
    with pytest.raises(pmf.InputError, match=message) as error:
        evaluate(source, reference, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(space="mae 224"), "held_out: .*pixels.npz: statistics: expected features of one space, got mae 224 and"),
        (dict(image_size=16), "held_out: .*: statistics: expected features of images of one size, got 16 and 8"),
        (dict(), "held_out: .*: expected other images than the reference's"),
    ],
)
def test_held_out_statistics_of_another_kind_are_refused(source, folders, tmp_path, changes, message):
    with pytest.raises(pmf.InputError, match=message):
        evaluate(source, folders[1], tmp_path, "--held-out", str(changed(folders, tmp_path, **changes)))


def test_what_does_not_fit_together_is_one_line(source, folders, tmp_path):
    real, reference, held = folders
    (tmp_path / "empty").mkdir()
    cases = [
        ((reference, "--networks", "vgg"), "networks: expected some of inception, .*, pixels, got 'vgg'"),
        ((reference, "--networks", "mae"), r"reference: .* has no mae.npz, expected statistics in the space of mae"),
        ((reference, "--networks", "pixels", "pixels:random"), "networks: expected each network once, got pixels"),
        ((reference, "--held-out", str(tmp_path / "empty")), "held_out: .*empty has no pixels.npz"),
        ((reference, "--resize", "tf1"), "resize: has no effect in several spaces"),
        ((real, "--networks", "pixels"), "networks: has no effect without a directory of NAME.npz"),
        ((real, "--held-out", str(held)), "held_out: has no effect without a directory of NAME.npz"),
        ((tmp_path / "no", "--networks", "mae"), "reference: .*no does not exist, expected an npz archive"),
    ]
    for (where, *more), message in cases:
        with pytest.raises(pmf.InputError, match=message):
            evaluate(source, where, tmp_path / "out", *more)


def test_statistics_name_what_does_not_fit(folders, tmp_path):
    mixed = pictures(pictures(tmp_path / "mixed", 0, 6), 1, 6, side=16)
    (tmp_path / "file").write_text("")
    cases = [
        ((mixed, tmp_path / "out"), "folder: expected squares of one size for the network pixels"),
        ((folders[0], tmp_path / "file"), "out: .*file is a file, expected a directory for one npz per network"),
        ((folders[0], tmp_path / "out", "--resize", "tf1"), "resize: has no effect with --networks"),
        ((folders[0], tmp_path / "out", "--inception", "x"), "inception: has no effect with --networks"),
    ]
    for arguments, message in cases:
        with pytest.raises(pmf.InputError, match=message):
            statistics(*arguments)
    with pytest.raises(pmf.InputError, match=r"networks: expected some of .*, got 'vgg'"):
        statistics(folders[0], tmp_path / "out", networks=("vgg",))


def test_statistics_of_another_space_are_no_reference_of_inception(source, folders, tmp_path):
    reference = changed(folders, tmp_path, mu=np.zeros(2048), sigma=np.eye(2048), features=None)
    from tests.train.evaluation import SETTINGS, EvalConfig, Toy
    from tests.train.evaluation import evaluate as measured

    config = EvalConfig(source=str(source), reference=reference / "pixels.npz", out=tmp_path, **SETTINGS)
    with pytest.raises(
        pmf.InputError, match=r"reference: .*pixels.npz: expected features of inception tf1 299 .*, got pixels"
    ):
        measured(config, Toy())


@pytest.mark.extras
def test_inception_and_mae_are_measured_together(source, folders, inception_weights, tmp_path, capsys):
    specs = (f"inception:{inception_weights}", "mae:random", "pixels")
    small = pictures(tmp_path / "small", 0, 8)
    reference = statistics(small, tmp_path / "ref", "--batch-size", "2", "--features", networks=specs)
    known = Statistics.load(reference / "mae.npz")
    assert known.features.shape == (8, 1024) and known.space.startswith("vit_large_patch16_224.mae bicubic 224 ")
    capsys.readouterr()
    evaluate(source, reference, tmp_path / "out", "--per-class", "2", "--networks", *specs)
    first, second, third, summary = lines(capsys)
    assert [line["network"] for line in (first, second, third)] == ["inception", "mae", "pixels"]
    distances = {"inception": first["fid"], "mae": second["frechet_distance"], "pixels": third["frechet_distance"]}
    assert summary["not_trained_on"] == distances and min(distances.values()) > 0
    with pytest.raises(pmf.InputError, match=r"reference: .*mae.npz: expected features of vit_large.*, got vit_large"):
        other = dataclasses.replace(known, space=known.space[:-32] + 32 * "0")
        other.save(reference / "mae.npz")
        evaluate(source, reference, tmp_path / "out", "--networks", "mae:random")
    evaluate_inception = [str(source), "--reference", str(reference / "inception.npz"), "--out", str(tmp_path / "one")]
    evaluate_inception += ["--omega", "1.5", "--interval", "0,1", "--per-class", "2", *CPU]
    command([*evaluate_inception, "--inception", str(inception_weights)])
    (alone,) = lines(capsys)
    assert alone["fid"] == pytest.approx(first["fid"], rel=1e-3) and alone["inception_score"] >= 1
