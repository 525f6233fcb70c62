"""Options are honoured or refused with one line: none is accepted and then ignored."""

import dataclasses
import json

import pytest
import torch

import pmf
from pmf.train.config import RunConfig, to_json
from pmf.train.evaluation.command import EvalConfig, command
from pmf.train.options import EVAL_NEEDS, RUN_NEEDS, _flat, parse
from pmf.train.presets import PRESETS, configured
from pmf.train.sample import SampleConfig
from pmf.train.sample import command as sample
from tests.networks import relative_error
from tests.train.test_loop import config as small_run
from tests.train.test_loop import losses, train


@pytest.fixture
def stored(tmp_path):
    """A run that was fine-tuned, with its configuration."""
    config = RunConfig(out=tmp_path, init="runs/b16", init_weights="ema_500", data="digits")
    (tmp_path / "config.json").write_text(to_json(config))
    return str(tmp_path)


def run(*arguments):
    return configured(list(arguments), "train", RunConfig)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "runs/other"], "init: has no effect with --resume, expected runs/b16, got runs/other"),
        (["--init-weights", "model"], "init_weights: has no effect with --resume, expected ema_500, got model"),
        (["--init-state"], "init_state: has no effect with --resume, expected False, got True"),
        (["--overwrite"], "overwrite: has no effect with --resume, expected False, got True"),
        (["--out", "elsewhere"], "out: expected none beside --resume"),
        (["--evaluation.per-class", "5"], "evaluation.per_class: has no effect without --eval-every"),
        (["--resume", "elsewhere"], "resume: expected one value, got it twice"),
        (["--model.depth", "9"], r"model.depth: expected that of the run to resume, \d+, got 9"),
        (["--optimizer.name", "adamw"], "optimizer.name: expected that of the run to resume, muon, got adamw"),
        (["--ema-half-lives", "500", "700"], r"ema_half_lives: expected that of the run to resume, \(500.0, .*700"),
    ],
)
def test_what_a_resumed_run_would_ignore_is_refused(stored, arguments, message):
    with pytest.raises(pmf.InputError, match=message):
        run("--resume", stored, *arguments)


def test_a_preset_beside_resume_is_refused(stored):
    for kind in ("digits", "pMF-B/16"):
        with pytest.raises(pmf.InputError, match="preset: expected none beside --resume"):
            run(kind, "--resume", stored)


def test_scripts_may_repeat_what_the_run_was_started_with(stored):
    flags = ["--init", "runs/b16", "--init-weights", "ema_500", "--data", "digits", "--evaluation.per-class", "50"]
    config = run("--resume", stored, "--out", stored, "--resume", stored, *flags, "--steps", "7")
    assert config.steps == 7 and config.init == "runs/b16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--init-weights ema_500", "init_weights: has no effect without --init"),
        ("--evaluation.reference x.npz", "evaluation.reference: has no effect without --eval-every"),
        ("--eval-every 5 --evaluation.batch-size 5", "evaluation.batch_size: has no effect without --evaluation.refe"),
        ("--eval-every 5 --evaluation.precision bfloat16", "evaluation.precision: has no effect without --evaluation"),
        ("--perceptual.lpips random", "perceptual.lpips: has no effect without --perceptual.enabled"),
        ("--loss.convnext-weight 1", "loss.convnext_weight: has no effect without --perceptual.enabled"),
        ("--perceptual.enabled --perceptual.lpips random --loss.lpips-weight 0", "perceptual.lpips: has no effect wit"),
        ("--captured --device cpu", "captured: has no effect without a GPU, expected False, got True"),
        (
            "--stream bfloat16 --device cpu",
            "stream: has no effect without --precision bfloat16, expected float32, got bfloat16",
        ),
        ("--stream bfloat16 --precision float32", "stream: has no effect without --precision bfloat16"),
        ("--optimizer.decay-share 0 --optimizer.decay cosine", "optimizer.decay: has no effect without --optimizer.d"),
        ("--model.conditioning adaln --model.class-tokens 4", "model.class_tokens: has no effect with --model.cond"),
        (
            "--perceptual.enabled --loss.lpips-weight 0 --loss.convnext-weight 0",
            "perceptual.enabled: has no effect with",
        ),
        ("--ema-half-lives 500 500.0000001", "ema_half_lives: expected different ones"),
        ("--workers 5000", "workers: expected at most 512, got 5000"),
        ("--loss.cfg-beta -1000", "LossConfig: cfg_beta is too small for cfg_max 7, got -1000"),
        ("--model.t-clip 2", "ModelConfig: t_clip must be at most 1"),
        ("--model.noise-scale 1e39", "noise_scale: expected a finite number of float32"),
        ("--steps 5 --steps 6", "steps: expected one value, got it twice, as '5' and '6'"),
        ("--flip --no-flip", "flip: expected one value, got it twice, as 'on' and 'off'"),
        ("--perceptual.enabled --perceptual.no-enabled", "perceptual.enabled: expected one value, got it twice"),
        ("--steps=5 --steps 6", "steps: expected one value, got it twice, as '5' and '6'"),
        ("--loss.p_mean 1 --loss.p-mean -1", "loss.p-mean: expected one value, got it twice, as '1' and '-1'"),
        ("--ema-half-lives 500 5 --ema-half-lives 5", "ema-half-lives: expected one value, got it twice"),
    ],
)
def test_what_a_new_run_would_ignore_is_refused(arguments, message):
    with pytest.raises(pmf.InputError, match=message) as error:
        run("digits", *arguments.split())
    assert "\n" not in str(error.value)


def test_default_values_and_honoured_ones_are_taken():
    run(
        "digits",
        *[
            "--steps",
            "5",
            "--steps",
            "5",
            "--perceptual.lpips",
            "hub",
            "--evaluation.per-class",
            "50",
            "--no-flip",
            "--no-flip",
        ],
    )
    run("digits", *["--perceptual.enabled", "--perceptual.lpips", "random", "--loss.lpips-weight", "1"])
    assert run("digits", "--stream", "bfloat16", "--precision", "bfloat16", "--device", "cpu").stream == "bfloat16"
    assert run("pMF-B/16", "--perceptual.no-enabled").perceptual.enabled is False
    for name in PRESETS:
        assert run(name) == PRESETS[name]


@pytest.mark.parametrize(
    "flags",
    ["--per-class 5", "--resize tf1", "--inception f", "--batch-size 5", "--chunk 5", "--out x", "--images x",
     "--dtype bfloat16"],
)  # fmt: skip
def test_an_evaluation_without_reference_refuses_what_only_a_reference_uses(flags):
    name = flags.split()[0][2:].replace("-", "_")
    with pytest.raises(pmf.InputError, match=f"{name}: has no effect without --reference"):
        command(["/nowhere", *flags.split()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--omega", "1e39"], "omega: expected a finite number of float32, got 1e\\+39"),
        (["--rows", "100000000"], "rows: expected at most 100000 images in a grid, got 1000000000"),
        (["--weights", ""], "weights: expected a name, or none, got ''"),
    ],
)
def test_samples_are_refused_before_work(arguments, message, tmp_path):
    with pytest.raises(pmf.InputError, match=message):
        sample([str(tmp_path), "--device", "cpu", *arguments])


def test_positional_words_are_not_taken_for_repeated_values():
    assert parse(SampleConfig, "x", ["--device", "cpu", "runs/a", "--device", "cpu"]).source == "runs/a"
    with pytest.raises(pmf.InputError, match="labels: expected one value, got it twice, as '3 1' and '3'"):
        parse(SampleConfig, "x", ["runs/a", "--labels", "3", "1", "--labels", "3"])


def test_every_name_in_the_tables_is_that_of_a_value():
    from fnmatch import filter as matching

    for needs, config in ((RUN_NEEDS, RunConfig()), (EVAL_NEEDS, EvalConfig(source="x"))):
        known = dict(_flat(config))
        for need in needs:
            assert all(matching(known, pattern) for pattern in need.names), need


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
def test_no_value_of_any_configuration_may_be_nan_or_infinite(value):
    """Floats alone, in tuples, optional, and in nested configurations."""
    presets = dict(_flat(RunConfig())).items()
    several = {name: len(kept) for name, kept in presets if isinstance(kept, tuple) and kept and kept[0] * 1.0}
    for name in [name for name, kept in presets if isinstance(kept, float) or name in several]:
        flag = f"--{name}".replace("_", "-")
        with pytest.raises(pmf.InputError, match=r"expected (a|an) (finite number|.*), got -?(nan|inf)"):
            run("digits", flag, *[value] * several.get(name, 1))
    for flag in ("--omega", "--t-min", "--t-max"):
        with pytest.raises(pmf.InputError, match="expected a finite number"):
            parse(SampleConfig, "x", ["runs/a", flag, value])
    for flag in (["--omega", value], ["--interval", f"0,{value}", "--omega", "2"]):
        with pytest.raises(pmf.InputError, match="expected a finite number"):
            parse(EvalConfig, "x", ["runs/a", *flag])


def test_stored_configurations_are_checked_alike(tmp_path):
    good = dataclasses.asdict(RunConfig())
    cases = [
        ([], "expected the fields of RunConfig, got \\[\\]"),
        ({**good, "steps": "many"}, "steps: expected an integer below 2\\^63, got 'many'"),
        ({**good, "out": 3}, "out: expected a path, got 3"),
        ({**good, "flip": 1}, "flip: expected true or false, got 1"),
        (
            {**good, "loss": {"p_mean": float("nan")}},
            "LossConfig: p_mean: expected a finite number of float32, got nan",
        ),
        ({**good, "model": 3}, "expected the fields of ModelConfig, got 3"),
        ({**good, "model": {"widths": 3}}, "ModelConfig has no field widths here: a newer version of pixel-meanflow"),
        ({name: value for name, value in good.items() if name != "model"}, "it has no field model"),
        ({**good, "colour": 3}, "RunConfig has no field colour here: a newer version of pixel-meanflow wrote it"),
        ({**good, "precision": "float8"}, "precision: expected one of auto, bfloat16, float32, got 'float8'"),
    ]
    texts = [(json.dumps(values, default=str).encode(), message) for values, message in cases]
    texts += [(b"\xff\xfe", "codec can't decode"), (b"[" * 10**5, "recursion"), (b"", "Expecting value")]
    for text, message in texts:
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(pmf.InputError, match=f"config.json is not a readable run configuration: .*{message}") as e:
            run("--resume", str(tmp_path))
        assert "\n" not in str(e.value)


def test_a_run_with_a_bfloat16_stream_follows_that_with_a_float32_one(tmp_path):
    """Losses differ by rounding alone; samples of the last step, drawn without autocast, are allowed."""
    runs = [small_run(tmp_path / s, precision="bfloat16", device="cpu", stream=s) for s in ("float32", "bfloat16")]
    whole, half = (torch.tensor(losses(train(run))) for run in runs)
    assert not torch.equal(whole, half) and relative_error(half, whole) < 0.01
