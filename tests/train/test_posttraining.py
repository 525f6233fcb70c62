"""`pmf posttrain`: runs that resume bit for bit, several processes against one, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import pmf
from pmf.config import PUBLISHED
from pmf.feature_networks import FeatureNetwork, feature_network
from pmf.metrics import Statistics
from pmf.optim import OptimizerConfig
from pmf.sharded import full
from pmf.train.cli import main
from pmf.train.config import PosttrainConfig, load_run_config, to_json
from pmf.train.demo import digits
from pmf.train.distributed import join
from pmf.train.loop import Trainer
from pmf.train.posttraining.references import open_networks, open_references
from pmf.train.posttraining.start import configuration_of, published_run
from pmf.train.posttraining.trainer import PosttrainTrainer
from pmf.train.presets import run_preset
from tests.train.small_runs import ENVIRONMENT, SMALL_MODEL
from tests.train.test_distributed import free_port, placed_like
from tests.train.test_killed import flatten, lines
from tests.train.test_loop import SMALL

ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-3)
PIXELS = ["--features", "pixels", "--label-weight", "0"]
FILL = ["--fill", "64"]
SMALL_STEPS = ["--batch-size", "16", "--device-batch", "4", "--device", "cpu"]
FLAGS = [*PIXELS, *FILL, *SMALL_STEPS]


def config(out: Path, **changes) -> PosttrainConfig:
    base = dict(
        model=SMALL, features=("pixels",), steps=3, batch_size=8, device_batch=2, fill=24, device="cpu",
        ema_half_lives=(500.0,), optimizer=ADAMW,
    )  # fmt: skip
    return PosttrainConfig(out=out, **(base | changes))


class Judge(nn.Module):
    """Random features, and a classifier."""

    classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.classifier = nn.Linear(64, 6), nn.Linear(6, 10)
        generator = torch.Generator().manual_seed(5)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=generator)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(images.flatten(1)).tanh()


def network_of(name: str, dtype: torch.dtype) -> FeatureNetwork:
    """The pixels, or for another name a network with a classifier, in a dtype of choice."""
    if name == "pixels":
        return feature_network(name, dtype=dtype)
    return FeatureNetwork(name, Judge().to(dtype), width=6, space="random", dtype=dtype)


def trainer_of(config: PosttrainConfig, dtype: torch.dtype = torch.float32) -> PosttrainTrainer:
    world = join(config.device, config.sharding)
    networks = {name: network_of(name, dtype) for name in config.features}
    data = digits()[0] if config.anchor else None
    return PosttrainTrainer(config, world, networks, open_references(config, networks), data=data)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run of digits."""
    out = tmp_path_factory.mktemp("base") / "run"
    flags = ["--steps", "30", "--batch-size", "32", "--device", "cpu", "--seed", "3"]
    main(["digits", "--out", str(out), *flags, *SMALL_MODEL])
    return out


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_lowers_the_distance_that_it_trains_and_can_be_sampled_and_measured(run, tmp_path, capsys):
    out = tmp_path / "post"
    main(["posttrain", str(run), "--out", str(out), *FLAGS, "--steps", "60", "--optimizer.learning-rate", "3e-3"])
    found = records(out)
    assert [record["step"] for record in found] == list(range(1, 61))
    assert found[-1]["fd/pixels"] < 0.5 * found[0]["fd/pixels"]
    config = load_run_config(out)
    assert (
        isinstance(config, PosttrainConfig) and config.init == str(run) and config.model == load_run_config(run).model
    )
    assert {"samples.png", "loss.png", "model.safetensors", "ema_500.safetensors"} <= set(os.listdir(out))
    weights = pmf.PMFDiT.from_pretrained(out).state_dict()
    assert not any(".v." in name for name in weights)
    main(["sample", str(out), "--out", str(tmp_path / "grid.png"), "--rows", "1"])
    capsys.readouterr()
    main(["eval", str(out), "--steps", "1"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["trained_on"] == ["pixels"]
    assert {"frechet_distance", "judge_distance", "precision", "recall", "accuracy", "class_spread"} <= set(line)


def test_without_options_it_starts_from_the_run_beside_it(run):
    found = configuration_of(str(run))
    assert found.out == run.with_name("run-posttrained") and found.init == str(run)
    assert found.features == ("pixels", "digits") and found.optimizer.name == "adamw"
    assert configuration_of(str(run / "model.safetensors")).model == found.model


def test_a_source_of_another_device_batch_or_a_relative_path(run, tmp_path, monkeypatch):
    stored = dataclasses.replace(load_run_config(run), data="photographs", batch_size=96, device_batch=96)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(to_json(stored))
    assert configuration_of(str(tmp_path / "other")).device_batch is None
    monkeypatch.chdir(run)
    assert configuration_of(".").out == run.with_name("run-posttrained")


def test_a_run_without_a_reference_resumes_on_another_number_of_threads(run, tmp_path):
    digests = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        digests.append(trainer_of(config(tmp_path / str(threads))).references)
        torch.set_num_threads(before)
    assert digests[0] == digests[1] and digests[0]["pixels"]


def test_the_weights_that_an_option_names_are_those_whose_network_counts(run, tmp_path):
    for name in ("a", "b"):
        pmf.save_model(tmp_path / f"{name}.safetensors", SMALL, pmf.create_model(SMALL).state_dict())
    with pytest.raises(pmf.InputError, match="holds several networks"):
        configuration_of(str(tmp_path))
    with pytest.raises(pmf.InputError, match="so its guidance is unknown"):
        configuration_of(str(tmp_path), "a")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_starts_with_its_own_guidance_and_the_authors_recipe(name):
    found = published_run(PUBLISHED[name].network)
    assert found is not None and found == run_preset(name)
    assert found.sampling == PUBLISHED[name].guidance


def start(processes: int, arguments: list[str]) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "pmf.train", "posttrain", *arguments]
    common = ENVIRONMENT | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(processes))
    ranks = [common | dict(RANK=str(i), LOCAL_RANK=str(i)) for i in range(processes)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return [subprocess.Popen(command, env=e if processes > 1 else ENVIRONMENT, **quiet) for e in ranks]


def final_state(directory: Path, steps: int) -> dict[str, torch.Tensor]:
    config = dataclasses.replace(load_run_config(directory), resume=directory)
    networks = open_networks(config, torch.device("cpu"))
    data = digits()[0] if config.anchor else None
    held = PosttrainTrainer(config, join("cpu", "ddp"), networks, open_references(config, networks), data=data)
    assert held.step == steps
    return flatten(held.state())


CASES = {
    "average": FLAGS,
    "queue": [*PIXELS, *SMALL_STEPS, "--population", "queue", "--queue", "40"],
    "anchor": [*FLAGS, "--anchor", "0.5"],
    "digits": [*FILL, *SMALL_STEPS, "--label-weight", "2"],
}


@pytest.mark.parametrize(
    ("case", "processes"), [("average", 2), ("queue", 1), ("anchor", 1), ("anchor", 2), ("digits", 1)]
)
def test_a_killed_run_resumes_bit_for_bit(run, tmp_path, case, processes):
    peace, war, steps = tmp_path / "peace", tmp_path / "war", 16
    flags = [*CASES[case], "--steps", str(steps), "--save-every", "2"]
    assert all(job.wait() == 0 for job in start(processes, [str(run), "--out", str(peace), *flags]))
    jobs = start(processes, [str(run), "--out", str(war), *flags])
    deadline = time.monotonic() + 120
    while lines(war) < 7:
        assert all(job.poll() is None for job in jobs) and time.monotonic() < deadline
        time.sleep(0.002)
    for job in jobs:
        job.send_signal(signal.SIGKILL)
    for job in jobs:
        job.wait()
    assert all(job.wait() == 0 for job in start(processes, ["--resume", str(war)]))
    expected, got = final_state(peace, steps), final_state(war, steps)
    populations = [name for name in expected if name.startswith(".populations")]
    assert len(populations) >= 3 and expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


SHARED = {
    "two batches": {},
    "two batches, anchor": dict(anchor=0.5),
    "one batch, two networks": dict(device_batch=4, features=("pixels", "digits"), label_weight=2.0),
}
"""Options of a run of 8 images, over 2 processes."""


def first_steps(out: Path, sharding: str, case: str) -> dict[str, torch.Tensor]:
    """Gradients of the first step, and weights, averages and populations after two steps, all in float64."""
    torch.set_default_dtype(torch.float64)
    trainer = trainer_of(config(out, sharding=sharding, impl="reference", **SHARED[case]), torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            spread = 1.0 if p.ndim == 1 else p.shape[-1] ** -0.5
            p.copy_(placed_like(p, torch.randn(p.shape) * spread))
    trainer._prepare(type("Never", (), {"is_requested": staticmethod(lambda: False)}))
    batches = trainer._loader()
    batch = next(batches)
    terms = trainer._gradients(*batch)
    result = {f"gradient {name}": full(p.grad).clone() for name, p in trainer.model.named_parameters()}
    result |= {f"term {name}": trainer.world.mean(value.detach().clone()) for name, value in terms.items()}
    trainer.model.zero_grad()
    trainer.train_step(*batch)
    trainer.train_step(*next(batches))
    result |= {f"weight {name}": full(p).detach().clone() for name, p in trainer.model.named_parameters()}
    result |= {f"average {name}": full(v).clone() for name, v in trainer.emas["ema_500"].state_dict().items()}
    return result | {f"population {name}": v.clone() for name, v in trainer.frechet.state_dict().items()}


def worker(rank: int, size: int, port: int, out: str) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    for sharding in ("ddp", "fsdp"):
        for case in SHARED:
            result = first_steps(Path(out) / f"{sharding}-{case}", sharding, case)
            if rank == 0:
                torch.save(result, Path(out) / f"{sharding}-{case}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # for the reason given in train/__main__.py


def test_two_processes_give_the_results_of_one(tmp_path):
    """To 1e-10, in float64: of the norm of a gradient, absolutely for the rest, which is of order 1."""
    mp.spawn(worker, (2, free_port(), str(tmp_path)), nprocs=2)
    for case in SHARED:
        expected = first_steps(tmp_path / f"one-{case}", "ddp", case)
        torch.set_default_dtype(torch.float32)
        assert float(expected["population populations.pixels.count"]) == 24 + 2 * 8
        for sharding in ("ddp", "fsdp"):
            result = torch.load(tmp_path / f"{sharding}-{case}.pt")
            assert result.keys() == expected.keys()
            for key, value in expected.items():
                scale = value.norm() if key.startswith("gradient") else 1.0
                assert (result[key] - value).abs().max() <= 1e-10 * scale, (sharding, case, key)


def test_a_step_that_is_not_finite_changes_neither_weights_nor_populations(run, tmp_path):
    trainer = trainer_of(config(tmp_path / "run", init=str(run), model=load_run_config(run).model))
    trainer._prepare(type("Never", (), {"is_requested": staticmethod(lambda: False)}))
    before = {name: value.clone() for name, value in flatten(trainer.state()).items()}
    images = trainer._images
    trainer.frechet_step.generate = lambda noise, labels: images(noise, labels) * torch.nan
    trainer.train_step(*next(trainer._loader()))
    assert (trainer.step, trainer.skipped) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in flatten(trainer.state()).items())
    trainer.frechet_step.generate = images
    trainer.train_step(*next(trainer._loader()))
    assert trainer.skipped == 0
    assert not torch.equal(
        trainer.frechet.state_dict()["populations.pixels.mu"], before[".populations.populations.pixels.mu"]
    )


def test_the_population_begins_as_images_of_the_generator_as_it_is(run, tmp_path):
    trainer = trainer_of(config(tmp_path / "run", init=str(run), model=load_run_config(run).model, fill=20))
    trainer._prepare(type("Never", (), {"is_requested": staticmethod(lambda: False)}))
    network, sampling = pmf.PMFDiT.from_pretrained(run, aux_head=False), vars(load_run_config(run).sampling)
    parts = [part for number in range(3) for part in trainer._batches(f"population {number}")]
    images = [pmf.generate(network, part.labels, noise=part.noise, **sampling).flatten(1) for part in parts]
    expected = Statistics.of(torch.cat(images))
    population = trainer.frechet.populations["pixels"]
    assert int(population.count) == expected.count == 24
    torch.testing.assert_close(population.mu, torch.from_numpy(expected.mu), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(population.sigma * 24 / 23, torch.from_numpy(expected.sigma), rtol=1e-5, atol=1e-6)


def test_a_stop_while_the_population_fills_ends_the_run(run, tmp_path):
    out = tmp_path / "run"
    flags = [*PIXELS, *SMALL_STEPS, "--fill", "1000000", "--steps", "3"]
    command = [sys.executable, "-m", "pmf.train", "posttrain", str(run), "--out", str(out), *flags]
    job = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "data.json").exists() and not (out / "metrics.jsonl").exists():
        assert job.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    job.send_signal(signal.SIGTERM)
    told, errors = job.communicate(timeout=60)
    why = "its population was still being filled; run the same command again"
    assert told == f"stopped at step 0; the run is not saved: {why}\n"
    assert job.returncode == 130 and "SIGTERM" not in errors  # which says that the run saves
    assert not list(out.glob("*.png"))
    main(["posttrain", str(run), "--out", str(out), *FLAGS, "--steps", "1"])
    assert len(records(out)) == 1


def save_statistics(folder: Path, **changes) -> Path:
    """NAME.npz of pixels in a new folder: of the training digits, with these changes."""
    folder.mkdir()
    dataclasses.replace(Statistics.of(digits()[0].images.flatten(1)), **changes).save(folder / "pixels.npz")
    return folder


def test_references_of_a_directory_and_distances_over_held_out_ones(run, tmp_path, capsys):
    reference = save_statistics(tmp_path / "reference")
    held = Statistics.of(digits()[1].images.flatten(1))
    held_out = save_statistics(tmp_path / "held", mu=held.mu, sigma=held.sigma)
    out = tmp_path / "post"
    main(
        [
            "posttrain",
            str(run),
            "--out",
            str(out),
            *FLAGS,
            "--steps",
            "2",
            "--reference",
            str(reference),
            "--held-out",
            str(held_out),
        ]
    )
    last = records(out)[-1]
    assert last["fdr/pixels"] == pytest.approx(last["fd/pixels"] / 0.4647, rel=1e-3)
    capsys.readouterr()
    save_statistics(tmp_path / "other", mu=np.zeros(64))
    with pytest.raises(SystemExit):
        main(["posttrain", "--resume", str(out), "--steps", "3", "--reference", str(tmp_path / "other")])
    assert "reference: the statistics of pixels are not those that" in capsys.readouterr().err
    main(["posttrain", "--resume", str(out), "--steps", "3"])
    assert len(records(out)) == 3


def test_a_post_trained_run_is_not_resumed_by_pmf_train(run, tmp_path, capsys):
    out = tmp_path / "post"
    main(["posttrain", str(run), "--out", str(out), *FLAGS, "--steps", "1"])
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(out)])
    assert f"expected `pmf posttrain --resume {out}`" in capsys.readouterr().err


def test_a_window_that_covers_much_of_the_run_is_warned_of(run, tmp_path, caplog):
    for decay, warned in (("0.99", True), ("0.8", False)):
        caplog.clear()
        trainer_of(config(tmp_path / decay, steps=200, decay=float(decay)))
        assert ("more than a twentieth of the run" in caplog.text) == warned, decay
    assert config(tmp_path, steps=400).decay_in_effect == 0.8
    assert config(tmp_path, steps=1500).decay_in_effect == pytest.approx(1 - 1 / 15)
    assert config(tmp_path, steps=10**6).decay_in_effect == 0.999


def test_a_run_of_both_heads_trains_its_v_head_by_the_anchor_alone(run, tmp_path):
    trainer = trainer_of(config(tmp_path / "run", init=str(run), model=load_run_config(run).model, anchor=0.3))
    trainer._prepare(type("Never", (), {"is_requested": staticmethod(lambda: False)}))
    trainer._gradients(*next(trainer._loader()))
    whole = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    Trainer._gradients(trainer, *next(trainer._loader()), 0.3)
    for name, p in trainer.model.named_parameters():
        same = torch.equal(p.grad, whole[name])
        assert same if ".v." in name else not same, name
