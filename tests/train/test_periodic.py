"""Evaluations during training: they are right, leave the run unchanged, and none is lost or made twice."""

import dataclasses
import json
import os
import sys

import numpy as np
import pytest
import torch

import pmf
from pmf.data import ImageSet
from pmf.images import save_png, to_bytes
from pmf.metrics import Statistics
from pmf.train.config import EvaluationConfig, load_run_config
from pmf.train.demo import digits
from pmf.train.demo.scores import evaluate_digits
from pmf.train.evaluation.command import command
from pmf.train.loop import Trainer
from tests.networks import TINY
from tests.train.test_killed import FLAGS, start, survive
from tests.train.test_loop import SMALL, config, train

BOTH = EvaluationConfig(weights=("model", "ema_500"))


def examined(out, **changes):
    return config(out, **(dict(eval_every=2, steps=5, evaluation=BOTH) | changes))


def lines(run):
    return [json.loads(line) for line in (run / "eval" / "results.jsonl").read_text().splitlines()]


def records(run):
    """The records of evaluations in metrics.jsonl."""
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in kept if "loss" not in record]


def where(run):
    return [(line["step"], line["weights"]) for line in lines(run)]


def numbers(run):
    """All results, without the run's own name."""
    return [{**line, "source": None} for line in lines(run)]


STEPS = [(step, weights) for step in (2, 4, 5) for weights in ("model", "ema_500")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(examined(tmp_path_factory.mktemp("run") / "whole"))


def test_the_weights_are_measured_every_eval_every_steps_and_at_the_last(whole):
    assert where(whole) == STEPS
    for weights, line in (("model", lines(whole)[-2]), ("ema_500", lines(whole)[-1])):
        network = pmf.PMFDiT.from_pretrained(whole, weights=weights, aux_head=False)
        expected = evaluate_digits(network, **dataclasses.asdict(load_run_config(whole).sampling))
        assert {name: line[name] for name in expected} == expected
        assert records(whole)[-1][f"frechet_distance/{weights}"] == expected["frechet_distance"]
    assert [record["step"] for record in records(whole)] == [2, 4, 5]
    assert all(len(record) == 9 for record in records(whole))  # four scores of two networks, and the step


def test_weights_that_are_equal_are_measured_once_and_named_twice(tmp_path):
    """Averages are equal early in a run, where the ramp limits their half-lives."""
    trainer = Trainer(
        examined(tmp_path / "run", evaluation=EvaluationConfig(weights=("ema_500", "ema_2000"))), digits()[0]
    )
    kill_after(trainer, 3)
    trainer.run()
    assert where(tmp_path / "run") == [(step, weights) for step in (2, 4, 5) for weights in ("ema_500", "ema_2000")]
    for record in records(tmp_path / "run"):
        assert record["frechet_distance/ema_500"] == record["frechet_distance/ema_2000"]


def test_one_line_is_printed_for_each(tmp_path, capsys):
    train(examined(tmp_path / "run", steps=2, evaluation=EvaluationConfig()))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2: ")]
    assert len(told) == 1 and "frechet_distance/ema_500 " in told[0] and ", accuracy/ema_500 " in told[0]


def test_evaluations_do_not_change_training(whole, tmp_path):
    plain = train(config(tmp_path / "plain", steps=5))
    for name in ("model", "ema_500", "ema_2000"):
        a, b = (pmf.PMFDiT.from_pretrained(run, weights=name).state_dict() for run in (whole, plain))
        assert all(torch.equal(a[key], b[key]) for key in a)
    without = [line for line in (plain / "metrics.jsonl").read_text().splitlines()]
    with_them = [line for line in (whole / "metrics.jsonl").read_text().splitlines() if "frechet" not in line]
    for a, b in zip(map(json.loads, without), map(json.loads, with_them), strict=True):
        assert {**a, "images_per_second": 0} == {**b, "images_per_second": 0}


def test_the_random_state_is_left_as_it_was(tmp_path):
    trainer = Trainer(examined(tmp_path / "run"), digits()[0])
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    trainer.evaluation.measure(1, trainer._weights())
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_one_network_serves_evaluations_and_pictures(whole, tmp_path):
    """Weights are loaded in place: a sampler's graph is bound to their memory."""
    trainer = Trainer(examined(tmp_path / "run"), digits()[0])
    places = [p.data_ptr() for p in trainer.evaluation.network.parameters()]
    trainer.run()
    assert [p.data_ptr() for p in trainer.evaluation.network.parameters()] == places
    assert (tmp_path / "run" / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()


class Killed(BaseException):
    """Stands for a kill: no handler catches it."""


def kill_after(trainer, count):
    """Make the run die in an evaluation, after `count` sets of weights."""
    own = trainer.evaluation.score

    def measured(*inputs, **settings):
        nonlocal count
        if count == 0:
            raise Killed
        count -= 1
        return own(*inputs, **settings)

    trainer.evaluation.score = measured


@pytest.mark.parametrize("count", range(6))
def test_a_run_killed_while_it_measures_completes_and_repeats_nothing(whole, tmp_path, count):
    out = tmp_path / "run"
    trainer = Trainer(examined(out, save_every=100), digits()[0])
    kill_after(trainer, count)
    with pytest.raises(Killed):
        trainer.run()
    assert where(out) == STEPS[:count] if count else not (out / "eval").exists()
    train(dataclasses.replace(load_run_config(out), resume=out))
    assert numbers(out) == numbers(whole) and records(out) == records(whole)
    before = (out / "metrics.jsonl").read_bytes()
    train(dataclasses.replace(load_run_config(out), resume=out))
    assert numbers(out) == numbers(whole) and (out / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_record_was_written_writes_it(whole, tmp_path):
    out = train(examined(tmp_path / "run", steps=4))
    kept = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(kept[:-1]))
    train(dataclasses.replace(load_run_config(out), resume=out, steps=5))
    assert records(out) == records(whole) and where(out) == STEPS


def test_a_step_that_was_saved_when_it_was_stopped_is_measured_by_the_resumed_run(whole, tmp_path):
    out = tmp_path / "run"
    trainer = Trainer(examined(out), digits()[0])
    gradients = trainer._gradients

    def interrupted(*batch):
        if trainer.step == 1:
            os.kill(os.getpid(), 15)
        return gradients(*batch)

    trainer._gradients = interrupted
    trainer.run()
    assert trainer.step == 2 and not (out / "eval").exists()
    train(dataclasses.replace(load_run_config(out), resume=out))
    assert numbers(out) == numbers(whole) and records(out) == records(whole)


def test_a_finished_run_can_be_measured_later(tmp_path):
    out = train(config(tmp_path / "run", steps=3))
    train(dataclasses.replace(load_run_config(out), resume=out, eval_every=2))
    assert where(out) == [(3, "ema_500")] and [record["step"] for record in records(out)] == [3]


def test_overwriting_a_run_removes_its_results(tmp_path):
    out = train(examined(tmp_path / "run", steps=2))
    train(examined(out, steps=2, seed=1, overwrite=True))
    assert where(out) == STEPS[:2]


def test_killed_for_real_nothing_is_lost_or_repeated(tmp_path):
    flags = [*FLAGS, "--eval-every", "12", "--evaluation.weights", "model", "ema_500"]
    survive(tmp_path, 2, 1, seed=3, flags=flags)
    peace, war = tmp_path / "peace", tmp_path / "war"
    assert where(peace) == [(step, weights) for step in range(12, 61, 12) for weights in ("model", "ema_500")]
    assert numbers(war) == numbers(peace) and records(war) == records(peace)


@pytest.mark.parametrize("sharding", ["ddp", "zero1", "fsdp"])
def test_several_processes_measure_what_one_does(tmp_path, sharding):
    """Equal up to the order in which two processes sum gradients."""
    flags = ["digits", *FLAGS[2:], "--steps", "4", "--eval-every", "2", "--evaluation.weights", "model", "ema_500"]
    for processes in (1, 2):
        jobs = start(processes, [*flags, "--out", str(tmp_path / str(processes)), "--sharding", sharding])
        assert all(job.wait() == 0 for job in jobs)
    one, two = (lines(tmp_path / name) for name in "12")
    assert where(tmp_path / "2") == [(step, weights) for step in (2, 4) for weights in ("model", "ema_500")]
    for a, b in zip(one, two, strict=True):
        assert b["frechet_distance"] == pytest.approx(a["frechet_distance"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eval_every=-1), "eval_every: expected a number >= 0, got -1"),
        (dict(weights=("ema_3",)), "evaluation.weights: expected one of model, ema_500, .*, got 'ema_3'"),
        (dict(per_class=0), "evaluation.per_class: expected a positive number, got 0"),
        (dict(chunk=0), "evaluation.chunk: expected a positive number, got 0"),
        (dict(resize="bicubic"), "evaluation.resize: expected one of tf1, half_pixel, got 'bicubic'"),
        (dict(precision="int8"), "evaluation.precision: expected one of auto, bfloat16, float32, got 'int8'"),
    ],
)
def test_impossible_evaluations_are_refused(tmp_path, change, message):
    with pytest.raises(pmf.InputError, match=message):
        if "eval_every" in change:
            examined(tmp_path, **change)
        else:
            examined(tmp_path, evaluation=EvaluationConfig(**change))


def refused(out, message, model=SMALL, data=None, **evaluation):
    """Assert that the run is refused in one line, before it trains or writes anything."""
    with pytest.raises(pmf.InputError, match=message) as error:
        Trainer(examined(out, model=model, evaluation=EvaluationConfig(**evaluation)), data or digits()[0])
    assert "\n" not in str(error.value) and not out.exists()


def test_what_cannot_be_measured_is_refused_before_training(tmp_path, monkeypatch):
    out, missing = tmp_path / "run", tmp_path / "missing.npz"
    refused(out, f"^evaluation.reference: {missing} does not exist, expected an npz archive", reference=missing)
    (tmp_path / "empty").mkdir()
    refused(out, r"^evaluation.reference: .*empty holds no \.png", reference=tmp_path / "empty")
    np.savez(tmp_path / "half.npz", ref_mu=np.zeros(3), sigma=np.eye(3))
    refused(out, "expected mu and sigma, or ref_mu and ref_sigma", reference=tmp_path / "half.npz")
    tiny = ImageSet(torch.zeros(20, *TINY.image_shape), torch.arange(20) % TINY.num_classes)
    refused(out, "^evaluation.reference: expected a folder of images or an npz of statistics, got none", TINY, tiny)
    refused(out, "model.in_channels: expected images of 1 or 3 channels", TINY, tiny, reference=missing)
    one = dataclasses.replace(TINY, in_channels=3)
    refused(
        out,
        "per_class: expected at least 10 images in all, got 5",
        one,
        ImageSet(torch.zeros(20, *one.image_shape), torch.arange(20) % 5),
        **dict(reference=missing, per_class=1),
    )
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    Statistics.of(torch.randn(9, 7)).save(tmp_path / "seven.npz")  # refused before Inception is loaded
    refused(out, "^evaluation.reference: expected statistics of 2048 features, got 7", reference=tmp_path / "seven.npz")
    Statistics.of(torch.randn(3, 2048)).save(tmp_path / "fitting.npz")
    refused(out, r"expected pip install 'pixel-meanflow\[eval\]'", reference=tmp_path / "fitting.npz")


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    """Statistics of training digits and of held-out ones in the space of pixels."""
    folder = tmp_path_factory.mktemp("spaces")
    for name, part, of in (("ref", digits()[0], 20), ("held", digits()[1], 30)):
        for i, image in enumerate(to_bytes(part.images[:of])):
            save_png(folder / f"{name}-pictures" / f"{i}.png", image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        pictures, out = (str(folder / f"{name}{end}") for end in ("-pictures", ""))
        command(["statistics", pictures, "--out", out, "--networks", "pixels", "--features", "--device", "cpu"])
    return folder


def test_a_run_is_measured_in_the_spaces_of_a_directory(spaces, tmp_path, capsys):
    measured = dict(reference=spaces / "ref", held_out=spaces / "held", per_class=1, chunk=4, batch_size=3)
    run = train(examined(tmp_path / "run", steps=2, evaluation=EvaluationConfig(**measured)))
    (record,), (line,) = records(run), lines(run)
    kinds = ("frechet_distance", "precision", "recall")
    assert record == {
        "step": 2,
        **{f"{kind}/pixels/ema_500": line[kind] for kind in kinds},
        "fdr/pixels/ema_500": record["fdr/pixels/ema_500"],
    }
    capsys.readouterr()
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in measured.items()]
    command([str(run), *arguments, "--device", "cpu"])
    known, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert len(lines(run)) == 1 and known["frechet_distance"] == line["frechet_distance"]
    assert summary["fdr"]["pixels"] == record["fdr/pixels/ema_500"]


def test_spaces_that_a_run_stored_are_not_ignored_with_another_reference(spaces, tmp_path):
    Statistics.of(torch.randn(9, 2048)).save(tmp_path / "one.npz")
    for name, given in (("networks", ("pixels",)), ("held_out", spaces / "held")):
        message = f"evaluation.{name}: expected none with a reference of one space, got "
        refused(tmp_path / "run", message, reference=tmp_path / "one.npz", **{name: given})


def test_what_cannot_be_measured_in_spaces_is_refused_before_training(spaces, tmp_path):
    out, ref = tmp_path / "run", spaces / "ref"
    refused(out, "^evaluation.networks: expected some of inception, siglip", reference=ref, networks=("dino",))
    refused(out, r"^evaluation.reference: .*/ref has no mae\.npz", reference=ref, networks=("mae:random",))
    refused(
        out, r"^evaluation.held_out: .*-pictures has no pixels\.npz", reference=ref, held_out=spaces / "held-pictures"
    )
    for change, message in (
        (dict(image_size=16), "^evaluation.reference: expected statistics of 768 features, got 192"),
        (dict(image_size=8), "^evaluation.reference: expected images of 16 pixels, as the samples, got 8"),
    ):
        known = dataclasses.replace(Statistics.load(ref / "pixels.npz"), **change)
        (tmp_path / "other").mkdir(exist_ok=True)
        known.save(tmp_path / "other" / "pixels.npz")
        size = SMALL if change["image_size"] == 16 else dataclasses.replace(SMALL, image_size=16)
        data = ImageSet(torch.zeros(20, *size.image_shape), torch.arange(20) % 10)
        refused(out, message, size, data, reference=tmp_path / "other")


@pytest.fixture(scope="module")
def reference(inception_weights, tmp_path_factory):
    """Statistics of held-out digits with the half-pixel resize."""
    from pmf.metrics import inception

    images = to_bytes(digits()[1].images[:12]).expand(-1, 3, -1, -1)
    features, _ = inception(inception_weights, resize="half_pixel")(images)
    file = tmp_path_factory.mktemp("reference") / "ref.npz"
    dataclasses.replace(Statistics.of(features), resize="half_pixel").save(file)
    return file


def against(reference, inception_weights):
    small = dict(per_class=1, chunk=4, batch_size=3)
    return EvaluationConfig(reference=reference, inception=inception_weights, weights=BOTH.weights, **small)


class Dies(torch.nn.Module):
    """An extractor that dies after `calls` batches."""

    def __init__(self, extractor, calls):
        super().__init__()
        self.extractor, self.calls = extractor, calls

    def forward(self, images):
        self.calls -= 1
        if self.calls < 0:
            raise Killed
        return self.extractor(images)


@pytest.mark.extras
def test_a_run_is_measured_by_inception_and_goes_on_where_it_was_killed(reference, inception_weights, tmp_path):
    # Enough steps for the averages to differ from the weights by a grey level.
    measured = dict(steps=20, eval_every=20, evaluation=against(reference, inception_weights))
    whole = train(examined(tmp_path / "whole", **measured))
    first, second = lines(whole)
    assert first["resize"] == "half_pixel" and (first["images"], first["step"], first["dtype"]) == (10, 20, "float32")
    assert first["fid"] != second["fid"] and list(records(whole)[0]) == [
        "step",
        *(f"{metric}/{weights}" for weights in BOTH.weights for metric in ("fid", "inception_score")),
    ]

    trainer = Trainer(examined(tmp_path / "run", **measured), digits()[0])
    (measurement,) = trainer.evaluation.measurements
    measurement.extractor = Dies(measurement.extractor, 8)
    with pytest.raises(Killed):
        trainer.run()
    assert len(lines(tmp_path / "run")) == 1 and len(list((tmp_path / "run" / "eval").glob(".*/chunk-*"))) == 1
    resumed = Trainer(dataclasses.replace(load_run_config(tmp_path / "run"), resume=tmp_path / "run"), digits()[0])
    (measurement,) = resumed.evaluation.measurements
    measurement.extractor = Dies(measurement.extractor, 3)  # the rest
    resumed.run()
    assert numbers(tmp_path / "run") == numbers(whole) and records(tmp_path / "run") == records(whole)


@pytest.mark.extras
def test_pmf_eval_finds_what_the_run_has_measured(reference, inception_weights, tmp_path, capsys):
    run = train(examined(tmp_path / "run", steps=2, evaluation=against(reference, inception_weights)))
    before = (run / "eval" / "results.jsonl").read_bytes()
    capsys.readouterr()
    arguments = ["--reference", str(reference), "--inception", str(inception_weights), "--device", "cpu"]
    command([str(run), *arguments, "--per-class", "1", "--weights", *BOTH.weights])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()][:2] == lines(run)
    assert (run / "eval" / "results.jsonl").read_bytes() == before


@pytest.mark.extras
def test_statistics_of_another_width_are_refused_before_training(inception_weights, tmp_path):
    Statistics.of(torch.randn(9, 7)).save(tmp_path / "seven.npz")
    message = "reference: expected statistics of 2048 features, got 7"
    refused(tmp_path / "run", message, reference=tmp_path / "seven.npz", inception=inception_weights)


@pytest.mark.extras
def test_sharded_processes_share_an_evaluation(reference, inception_weights, tmp_path):
    evaluation = ["--eval-every", "2", "--evaluation.reference", str(reference), "--evaluation.per-class", "1"]
    evaluation += ["--evaluation.inception", str(inception_weights), "--evaluation.chunk", "5"]
    for processes in (1, 2):
        flags = ["digits", *FLAGS[2:], "--steps", "2", *evaluation, "--out", str(tmp_path / str(processes))]
        assert all(job.wait() == 0 for job in start(processes, [*flags, "--sharding", "fsdp"]))
    (one,), (two,) = lines(tmp_path / "1"), lines(tmp_path / "2")
    assert two["fid"] == pytest.approx(one["fid"], rel=1e-3) and two["resize"] == "half_pixel"
