import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import pmf
from pmf.data.workers import STOP_SIGNALS
from pmf.draws import step_seed
from pmf.optim import OptimizerConfig
from pmf.train import run_directory
from pmf.train.config import RunConfig, load_run_config
from pmf.train.demo import digits
from pmf.train.distributed import pick_device
from pmf.train.loop import Trainer

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
        "data.json",
        "metrics.jsonl",
        "checkpoints",
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


def test_a_checkpoint_without_muons_step_count_resumes(tmp_path, capsys):
    trainer = Trainer(config(tmp_path / "run", steps=3), digits()[0])
    trainer.run()
    state = trainer.state()
    for values in state["optimizers"]["muon"]["state"].values():
        del values["step"]
    shutil.rmtree(tmp_path / "run/checkpoints")
    trainer.snapshots.save(3, state)
    trainer.snapshots.publish(wait=True)
    capsys.readouterr()
    resumed = Trainer(dataclasses.replace(config(tmp_path / "run", steps=6), resume=tmp_path / "run"), digits()[0])
    assert "resume: this checkpoint is from a version in which Muon counted no steps" in capsys.readouterr().out
    a, b = (t.state()["optimizers"]["muon"]["state"] for t in (trainer, resumed))
    assert a.keys() == b.keys() and {v["step"].item() for v in b.values()} == {3.0}
    assert all(torch.equal(a[key]["momentum_buffer"], b[key]["momentum_buffer"]) for key in a)
    resumed.run()


def test_averages_count_the_step_just_taken(tmp_path):
    """In the second step the half-life is 5 % of two batches: an average keeps 2^-10 of its value."""
    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    batches = trainer._loader()
    trainer.train_step(*next(batches))
    before = {name: value.double() for name, value in trainer.emas["ema_500"].average.items()}
    trainer.train_step(*next(batches))
    for name, p in trainer.model.named_parameters():
        moved = (trainer.emas["ema_500"].average[name].double() - p) - 0.5**10 * (before[name] - p)
        assert moved.abs().max() < 1e-2 * 0.5**10 * (before[name] - p).abs().max() + 1e-7, name


def test_metrics_of_steps_that_were_not_saved_are_dropped(finished, tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 7.0}) + "\n")
        file.write('{"step": 5, "lo')  # killed while writing
    train(dataclasses.replace(load_run_config(out), resume=out, steps=6))
    assert losses(out) == losses(finished)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_an_interrupted_run_saves_and_continues_exactly(tmp_path, number):
    """With the default optimizer, whose learning rate depends on the step."""
    decaying = dict(optimizer=RunConfig().optimizer, save_every=100)
    whole = train(config(tmp_path / "whole", **decaying))
    trainer = Trainer(config(tmp_path / "run", **decaying), digits()[0])
    gradients = trainer._gradients

    def interrupted(*batch):
        if trainer.step == 1:
            os.kill(os.getpid(), number)
        return gradients(*batch)

    trainer._gradients = interrupted
    before = signal.getsignal(signal.SIGINT)
    trainer.run()
    assert trainer.step == 2 and signal.getsignal(signal.SIGINT) is before
    train(dataclasses.replace(load_run_config(tmp_path / "run"), resume=tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(whole)


def test_a_run_killed_while_it_saved_the_last_step_is_completed(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    for file in (*out.glob("*.safetensors"), *out.glob("*.png")):
        file.unlink()
    train(dataclasses.replace(load_run_config(out), resume=out))
    assert len([*out.glob("*.safetensors"), *out.glob("*.png")]) == 6


def test_a_run_killed_before_its_first_checkpoint_can_start_again(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    (out / "checkpoints" / "step-00000003").rename(out / "checkpoints" / ".step-00000003")
    train(config(out, steps=2))
    assert os.listdir(out / "checkpoints") == ["step-00000002"]


def test_a_directory_killed_while_it_was_overwritten_is_still_a_runs(tmp_path):
    out = train(config(tmp_path / "run", steps=2))
    run_directory.make_room(out, overwrite=True)
    assert set(os.listdir(out)) - {"tensorboard"} == {"config.json"}
    train(config(out, steps=2))


def test_flags_beside_resume_override_and_are_kept(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    chosen = dataclasses.replace(CONSTANT, momentum=0.5, adam_betas=(0.5, 0.6))
    changed = dataclasses.replace(load_run_config(out), resume=out, steps=4, optimizer=chosen)
    trainer = Trainer(changed, digits()[0])
    trainer.run()
    assert trainer.optimizers["muon"].param_groups[0]["momentum"] == 0.5
    assert trainer.optimizers["adam"].param_groups[0]["betas"] == (0.5, 0.6)
    stored = load_run_config(out)
    assert stored.steps == 4 and stored.optimizer == chosen and stored.resume is None
    with pytest.raises(pmf.InputError, match=r"steps: .* is already at step 4, expected at least that, got 3"):
        Trainer(dataclasses.replace(stored, resume=out, steps=3), digits()[0])


def test_a_run_without_any_recorded_loss_ends_without_a_curve(tmp_path):
    out = train(config(tmp_path / "run", steps=2))
    for file in ("metrics.jsonl", "loss.png"):
        (out / file).unlink()
    trainer = Trainer(config(out, steps=2, resume=out), digits()[0])
    trainer.run()
    assert trainer.step == 2 and not (out / "loss.png").exists()


def test_overwriting_removes_only_the_run(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    (out / "notes.txt").write_text("mine")
    train(config(out, steps=2, overwrite=True))
    assert len(losses(out)) == 2 and (out / "notes.txt").read_text() == "mine"


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    (tmp_path / "model.safetensors").write_text("theirs")
    for overwrite in (False, True):
        with pytest.raises(pmf.InputError, match=r"is not empty and holds no run"):
            Trainer(config(tmp_path, overwrite=overwrite), digits()[0])
    assert (tmp_path / "model.safetensors").read_text() == "theirs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model=dataclasses.replace(SMALL, in_channels=3)), r"images of shape \[1, 8, 8\], got \[3, 8, 8\]"),
        (dict(model=dataclasses.replace(SMALL, num_classes=5)), "model.num_classes: expected at least 10"),
        (dict(device="meta"), "device: cannot use 'meta'"),
    ],
)
def test_what_cannot_run_leaves_nothing_behind(tmp_path, change, message):
    with pytest.raises(pmf.InputError, match=message):
        Trainer(config(tmp_path / "run", **change), digits()[0])
    assert not (tmp_path / "run").exists()


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
    (tmp_path / "config.json").write_text('{"steps": 3, "stepz": 4}')
    with pytest.raises(pmf.InputError, match=r"run configuration: RunConfig has no field stepz here: "):
        load_run_config(tmp_path)
    with pytest.raises(pmf.InputError, match="has no complete checkpoint, nothing was saved there yet"):
        Trainer(config(tmp_path, resume=tmp_path), digits()[0])
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for file in tmp_path.glob("checkpoints/*/*.distcp"):
        os.truncate(file, 1000)
    with pytest.raises(pmf.InputError, match=r"resume: every checkpoint of .* is damaged: step-00000006: ") as error:
        Trainer(config(tmp_path, resume=tmp_path), digits()[0])
    assert "\n" not in str(error.value)
    with pytest.raises(pmf.InputError, match="out: cannot write"):
        Trainer(config(Path("/proc/run")), digits()[0])


def test_a_resumed_network_must_be_the_same(finished):
    other = dataclasses.replace(SMALL, hidden_size=32)
    with pytest.raises(pmf.InputError, match="resume: cannot continue from"):
        Trainer(config(finished, resume=finished, model=other), digits()[0])


def break_steps(trainer, steps):
    """Make the images of these steps overflow the loss, so that it is infinite or NaN."""
    gradients = trainer._gradients

    def broken(x, y):
        return gradients(x * 1e30 if trainer.step in steps else x, y)

    trainer._gradients = broken


def test_steps_that_are_not_finite_change_nothing_and_are_counted(tmp_path):
    trainer = Trainer(config(tmp_path / "run"), digits()[0])
    break_steps(trainer, (2, 3))
    before = {}
    step = trainer.train_step

    def watched(*inputs):
        if trainer.step in (2, 4):
            before[trainer.step] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        return step(*inputs)

    trainer.train_step = watched
    trainer.run()
    assert torch.equal(before[2], before[4]) and trainer.step == 6 and trainer.skipped == 0
    assert [loss is None for loss in losses(tmp_path / "run")] == [False, False, True, True, False, False]


def test_saving_before_the_first_update_changes_nothing(tmp_path):
    weights = []
    for save_every in (1, 6):
        trainer = Trainer(config(tmp_path / str(save_every), save_every=save_every), digits()[0])
        break_steps(trainer, (0,))
        trainer.run()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_too_many_steps_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    trainer = Trainer(dataclasses.replace(load_run_config(out), resume=out, steps=6, max_skipped=1), digits()[0])
    break_steps(trainer, (3, 4))
    message = r"loss: not finite at step 5 and 1 before it \(loss, loss_u, .*\), expected a lower learning rate"
    with pytest.raises(pmf.InputError, match=message):
        trainer.run()
    assert os.listdir(out / "checkpoints") == ["step-00000003"]
    train(dataclasses.replace(load_run_config(out), resume=out, steps=6))


def test_a_gradient_that_is_not_finite_is_named_and_the_checkpoint_underway_completed(tmp_path):
    trainer = Trainer(config(tmp_path / "run", max_skipped=0), digits()[0])
    gradients, name = trainer._gradients, "shared_blocks.0.attn.out_proj.weight"

    def broken(*batch):
        terms = gradients(*batch)
        if trainer.step == 3:
            trainer.model.get_parameter(name).grad[0] = float("inf")
        return terms

    trainer._gradients = broken
    with pytest.raises(pmf.InputError, match=rf"at step 4 and 0 before it \(gradient_norm; the gradient of {name}\)"):
        trainer.run()
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000003"]


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path):
    norms = {}
    for limit in (0.0, 0.01):
        chosen = dataclasses.replace(CONSTANT, clip_norm=limit)
        trainer = Trainer(config(tmp_path / str(limit), optimizer=chosen), digits()[0])
        update = trainer._update

        def watched(record, trainer=trainer, update=update):
            norms[len(norms)] = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()
            update(record)

        trainer._update = watched
        record = trainer.train_step(*next(trainer._loader()))
        norms[len(norms)] = record["gradient_norm"]
    whole, reported, clipped, before = norms.values()
    assert whole == pytest.approx(reported) and before == reported > 0.01
    assert clipped == pytest.approx(0.01, rel=1e-3)


def test_a_full_disk_is_an_error_that_keeps_the_checkpoint(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    script = f"""
import resource
from pathlib import Path
from pmf.train.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
main(["train", "--resume", {str(out)!r}, "--steps", "6"])
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 2 and "path: cannot write" in result.stderr, result.stderr
    assert "the last complete checkpoint is that of step 3" in result.stderr
    assert os.listdir(out / "checkpoints") == ["step-00000003"]
    train(dataclasses.replace(load_run_config(out), resume=out, steps=6))


@pytest.mark.parametrize("device_batch", (None, 4))
def test_captured_steps_are_the_plain_ones(tmp_path, device_batch):
    plain, captured = (
        train(config(tmp_path / str(flag), steps=4, device_batch=device_batch, captured=flag)) for flag in (False, True)
    )
    assert losses(captured) == pytest.approx(losses(plain), rel=1e-5)


def test_device_batches_add_up_to_the_step(tmp_path):
    """Two device batches of 4 give the gradients of one step on 8 rows with the same draws."""
    trainer = Trainer(config(tmp_path / "run", device_batch=4), digits()[0])
    x, y = next(trainer._loader())
    trainer._gradients(x, y)
    summed = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    shape, loss = trainer.config.model.image_shape, trainer.config.loss
    halves = [
        pmf.sample_draws(4, shape, loss, torch.Generator().manual_seed(step_seed(0, 0, f"draws {i}"))) for i in (0, 1)
    ]
    fields = [f.name for f in dataclasses.fields(pmf.Draws)]
    draws = pmf.Draws(**{name: torch.cat([getattr(half, name) for half in halves]) for name in fields})
    pmf.pmf_loss(trainer.model, x, y, draws, loss).loss.backward()
    for name, p in trainer.model.named_parameters():
        assert torch.allclose(summed[name], p.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=0), "steps: expected a positive number, got 0"),
        (dict(device_batch=3), "device_batch: expected a divisor of batch_size 8, got 3"),
        (dict(sharding="zero"), "sharding: expected one of ddp, zero1, fsdp, hybrid, got 'zero'"),
        (dict(stream="float16"), "stream: expected one of float32, bfloat16, got 'float16'"),
        (dict(keep_checkpoints=0), "keep_checkpoints: expected a positive number, got 0"),
        (dict(ema_every=0), "ema_every: expected a positive number, got 0"),
        (dict(ema_device="gpu"), "ema_device: expected one of auto, cpu, got 'gpu'"),
        (dict(compiled=True, sharding="fsdp"), "compiled: expected sharding ddp or zero1, got fsdp"),
        (dict(seed=-1), "seed: expected a number >= 0, got -1"),
        (dict(sampling_weights="ema_3"), "sampling_weights: expected one of model, ema_500"),
    ],
)
def test_impossible_runs_are_refused(tmp_path, change, message):
    with pytest.raises(pmf.InputError, match=message):
        config(tmp_path, **change)


def test_a_missing_device_is_named():
    with pytest.raises(pmf.InputError, match="device: cannot use 'warp'"):
        pick_device("warp")
