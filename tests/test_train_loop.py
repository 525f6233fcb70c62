import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import pmf
from pmf.train.config import RunConfig, load_run_config
from pmf.train.data import digits
from pmf.train.loop import Trainer, pick_device
from pmf.train.optim import OptimizerConfig

SMALL = dataclasses.replace(pmf.MODELS["pMF-digits"], depth=2, aux_head_depth=1, hidden_size=16, num_heads=2)

CONSTANT = OptimizerConfig(learning_rate=5e-3)


def config(out, **changes):
    small = dict(model=SMALL, steps=6, batch_size=8, save_every=3, optimizer=CONSTANT)
    return RunConfig(out=out, **(small | changes))


def losses(directory):
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def train(run_config):
    Trainer(run_config, digits()[0]).run()
    return run_config.resume or run_config.out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(config(tmp_path_factory.mktemp("run") / "whole"))


def test_a_run_directory_holds_everything(finished):
    names = set(os.listdir(finished))
    weights = {f"{name}.safetensors" for name in ("model", "ema_500", "ema_1000", "ema_2000")}
    assert names - {"tensorboard"} == weights | {
        "config.json",
        "metrics.jsonl",
        "state.pt",
        "samples.png",
        "loss.png",
    }
    assert Image.open(finished / "samples.png").size == (10 * 66 - 2, 8 * 66 - 2)
    assert load_run_config(finished) == config(finished)
    assert len(losses(finished)) == 6


def test_a_resumed_run_repeats_the_uninterrupted_one(finished, tmp_path):
    part = train(config(tmp_path / "part", steps=3))
    resumed = dataclasses.replace(load_run_config(part), resume=part, steps=6)
    trainer = Trainer(resumed, digits()[0])
    assert trainer.step == 3
    trainer.run()
    assert losses(part) == losses(finished)
    for name in ("model", "ema_500", "ema_2000"):
        a, b = (pmf.PMFDiT.from_pretrained(d, weights=name).state_dict() for d in (part, finished))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_metrics_of_steps_that_were_not_saved_are_dropped(finished, tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 7.0}) + "\n")
        file.write('{"step": 5, "lo')  # killed while writing
    train(dataclasses.replace(load_run_config(out), resume=out, steps=6))
    assert losses(out) == losses(finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_continues_exactly(finished, tmp_path, number):
    trainer = Trainer(config(tmp_path / "run", save_every=100), digits()[0])
    step = trainer.train_step

    def interrupted():
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return step()

    trainer.train_step = interrupted
    trainer.run()
    assert trainer.step == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(dataclasses.replace(load_run_config(tmp_path / "run"), resume=tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(finished)


def test_training_learns(tmp_path):
    out = train(config(tmp_path / "run", steps=60, batch_size=32, save_every=60))
    curve = [json.loads(line)["loss_u"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(curve[-10:]) < 0.75 * sum(curve[:10])


def test_wrong_places_are_refused(finished, tmp_path):
    with pytest.raises(pmf.InputError, match=r"out: .* already holds a run, expected --resume"):
        Trainer(config(finished), digits()[0])
    with pytest.raises(pmf.InputError, match=r"resume: .* holds no run"):
        load_run_config(tmp_path)
    (tmp_path / "config.json").write_text("{ torn")
    with pytest.raises(pmf.InputError, match="is not a readable run configuration"):
        load_run_config(tmp_path)
    with pytest.raises(pmf.InputError, match=r"has no state.pt, nothing was saved there yet"):
        Trainer(config(tmp_path, resume=tmp_path), digits()[0])
    (tmp_path / "state.pt").write_bytes((finished / "state.pt").read_bytes()[:1000])
    with pytest.raises(pmf.InputError, match=r"resume: cannot continue from .*state.pt: ") as error:
        Trainer(config(tmp_path, resume=tmp_path), digits()[0])
    assert "\n" not in str(error.value)
    with pytest.raises(pmf.InputError, match="path: cannot write"):
        Trainer(config(Path("/proc/run")), digits()[0])


def test_a_resumed_network_must_be_the_same(finished):
    other = dataclasses.replace(SMALL, hidden_size=32)
    with pytest.raises(pmf.InputError, match="resume: cannot continue from"):
        Trainer(config(finished, resume=finished, model=other), digits()[0])


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    kept = (out / "state.pt").read_bytes()
    trainer = Trainer(dataclasses.replace(load_run_config(out), resume=out, steps=6), digits()[0])
    with torch.no_grad():
        trainer.model.final_layers["u"].linear.bias.fill_(torch.nan)
    with pytest.raises(pmf.InputError, match="loss: not finite at step 4"):
        trainer.run()
    assert (out / "state.pt").read_bytes() == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=0), "steps: expected a positive number, got 0"),
        (dict(sampling_weights="ema_3"), "sampling_weights: expected one of model, ema_500"),
    ],
)
def test_impossible_runs_are_refused(tmp_path, change, message):
    with pytest.raises(pmf.InputError, match=message):
        config(tmp_path, **change)


def test_a_missing_device_is_named():
    with pytest.raises(pmf.InputError, match="device: cannot use 'warp'"):
        pick_device("warp")
