"""What `pmf posttrain` refuses, each in one line that names the argument."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

import pmf
from pmf.train.cli import main
from tests.train.test_posttraining import PIXELS, run, save_statistics

__all__ = ["run"]  # a fixture


def u_headless(run: Path, file: Path) -> Path:
    network = pmf.PMFDiT.from_pretrained(run, weights="model")
    state = {name: value for name, value in network.state_dict().items() if ".u." not in name}
    info = {"pmf_config": json.dumps(asdict(network.config)), "pmf_metadata": "{}"}
    save_file(state, file, metadata=info)  # `save_model` refuses it
    return file


ALONE = ["RUN", *PIXELS]
REFUSED = {
    "no source": ([], "source: expected a run directory, a checkpoint file or a hub id, or --resume DIRECTORY"),
    "unknown": (["nowhere"], "source: nowhere does not exist"),
    "network": (["RUN", "--features", "vgg"], "features: expected one of inception"),
    "twice": (["RUN", "--features", "pixels", "pixels"], "features: expected different networks"),
    "weights": ([*ALONE, "--feature-weights", "1", "2"], "feature_weights: expected 1 of them, got 2"),
    "small queue": (
        ["RUN", "--population", "queue", "--queue", "100"],
        "queue: expected at least a batch, 128 features, got 100",
    ),
    "ignored queue": (["RUN", "--queue", "1000"], "queue: has no effect with --population average"),
    "ignored decay": (["RUN", "--population", "queue", "--decay", "0.9"], "decay: has no effect with --population"),
    "ignored precision": (
        ["RUN", "--features", "pixels", "--feature-precision", "bfloat16"],
        "feature_precision: has no effect for pixels and digits, expected float32, got bfloat16",
    ),
    "ignored data": (["RUN", "--flip"], "flip: has no effect without --anchor"),
    "decay": (["RUN", "--decay", "1"], "decay: expected a number in [0, 1), got 1.0"),
    "zero1": (["RUN", "--sharding", "zero1"], "sharding: expected ddp, fsdp or hybrid with optimizer adamw, got zero1"),
    "captured": (["RUN", "--captured"], "captured: "),
    "label": (
        ["RUN", "--features", "pixels", "--label-weight", "1"],
        "label_weight: expected a network with a classifier of 10 classes, got none",
    ),
    "missing": ([*ALONE, "--reference", "EMPTY"], "reference: EMPTY has no pixels.npz, expected statistics in the"),
    "width": ([*ALONE, "--reference", "NARROW"], "reference: NARROW/pixels.npz: expected 64 features, got 9"),
    "space": ([*ALONE, "--reference", "SPACE"], "reference: SPACE/pixels.npz: expected features of pixels, got mae"),
    "size": ([*ALONE, "--reference", "SIZE"], "SIZE/pixels.npz: expected images of 8 pixels, as the network's, got 16"),
    "held out": ([*ALONE, "--reference", "GOOD", "--held-out", "EMPTY"], "held_out: EMPTY has no pixels.npz, expected"),
    "held out of another size": (
        [*ALONE, "--held-out", "SIZE"],
        "held_out: SIZE/pixels.npz: statistics: expected features of images of one size, got 16 and 8",
    ),
    "held out of another space": (
        [*ALONE, "--held-out", "SPACE"],
        "held_out: SPACE/pixels.npz: statistics: expected features of one space, got mae and pixels",
    ),
    "held out the same": (
        [*ALONE, "--held-out", "GOOD"],
        "held_out: GOOD/pixels.npz: expected other images than the reference's",
    ),
    "no u head": (["HEADLESS"], "source: HEADLESS has no u head, which draws the images"),
    "trained": (["--resume", "RUN"], "resume: RUN is a run of `pmf train`, expected `pmf train --resume RUN`"),
}


@pytest.fixture(scope="module")
def places(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    made = dict(
        GOOD={}, NARROW=dict(mu=np.zeros(9), sigma=np.eye(9)), SPACE=dict(space="mae"), SIZE=dict(image_size=16)
    )
    found = {name: str(save_statistics(folder / name, **changes)) for name, changes in made.items()}
    headless = u_headless(run, folder / "headless.safetensors")
    return found | dict(RUN=str(run), EMPTY=str(folder / "empty"), HEADLESS=str(headless))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(places, case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = REFUSED[case]
    for name, path in places.items():
        expected = expected.replace(name, path)
    with pytest.raises(SystemExit) as ended:
        main(["posttrain", *(places.get(word, word) for word in arguments), "--device", "cpu"])
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and len(told.splitlines()) == 1, told
    assert expected in told
    assert not list(tmp_path.iterdir())


def test_images_that_would_fill_a_filled_population_are_refused(run, tmp_path, capsys):
    out = tmp_path / "post"
    flags = [*PIXELS, "--fill", "64", "--batch-size", "16", "--device", "cpu"]
    main(["posttrain", str(run), "--out", str(out), *flags, "--steps", "1"])
    before = sorted(out.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["posttrain", "--resume", str(out), "--steps", "2", "--fill", "99"])
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert told[-1] == "pmf: fill: has no effect with --resume, for what is saved is filled, expected 64, got 99"
    assert sorted(out.rglob("*")) == before
    main(["posttrain", "--resume", str(out), "--steps", "2", "--fill", "64"])
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
