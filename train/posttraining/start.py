"""The configuration of a post-training from what it starts from: a run, or a published network."""

from __future__ import annotations

from pathlib import Path

from pmf.config import PUBLISHED, ModelConfig
from pmf.errors import InputError
from pmf.optim import OptimizerConfig
from pmf.train.config import EvaluationConfig, PerceptualConfig, PosttrainConfig, RunConfig, find_run_around
from pmf.train.presets import Start, run_preset
from pmf.weights import read_weights

BATCH, STEPS = 1024, 62_500
"""Fifty epochs of 1,250 steps, as in the authors' shorter runs."""


def configuration_of(source: str, weights: str | None = None) -> PosttrainConfig:
    """The defaults of a post-training of a run, a checkpoint in one, or a published network.

    `weights` names a network in the source, see `PMFDiT.from_pretrained`. Network, guidance and data are those of the
    source. Learning rate, batch and length are the authors', for digits ours; an anchor has no perceptual terms unless
    they are asked for. Errors: `InputError` on a network of unknown guidance.
    """
    return _configuration(_run_of(source, weights), source, weights)


def _configuration(base: RunConfig, source: str, weights: str | None = None) -> PosttrainConfig:
    kept = {name: value for name, value in vars(base).items() if name in vars(RunConfig())}
    name = (weights or Path(source).stem).replace("/", "-").replace(":", "-")
    run = Path(source).resolve() if Path(source).is_dir() else Path("runs") / name
    kept |= dict(
        out=run.with_name(f"{run.name}-posttrained"),
        init=source,
        init_weights=None,
        init_state=False,
        resume=None,
        overwrite=False,
        captured=False,
        perceptual=PerceptualConfig(),
        sharding="ddp" if base.sharding == "zero1" else base.sharding,
        evaluation=EvaluationConfig(),
        eval_every=0,
    )
    return _digits(kept) if base.data == "digits" else _published(kept)


def _published(kept: dict) -> PosttrainConfig:
    warmup, size = STEPS // 10, kept["device_batch"]
    return PosttrainConfig(
        **kept
        | dict(
            steps=STEPS,
            batch_size=BATCH,
            device_batch=size if size is not None and BATCH % size == 0 else None,
            ema_half_lives=(250.0, 500.0, 1000.0, 2000.0),
            sampling_weights="ema_500",
            optimizer=OptimizerConfig(
                name="adamw", learning_rate=1e-6, warmup_steps=warmup, decay_share=1.0, decay="cosine"
            ),
        )
    )


def _digits(kept: dict) -> PosttrainConfig:
    return PosttrainConfig(
        **kept
        | dict(
            steps=500,
            batch_size=128,
            device_batch=None,
            ema_half_lives=(500.0,),
            sampling_weights="ema_500",
            features=("pixels", "digits"),
            fill=4000,
            label_weight=20.0,
            optimizer=OptimizerConfig(
                name="adamw", learning_rate=5e-5, warmup_steps=20, decay_share=1.0, decay="cosine"
            ),
        )
    )


def _run_of(source: str, weights: str | None) -> RunConfig:
    """The run that made the source: its own, that of the directory it is in, or the preset of its network."""
    run = find_run_around(source)
    if run is not None:
        return run
    published = published_run(read_weights(source, weights)[1])
    if published is None:
        raise InputError(f"source: {source} is in no run and no published network, so its guidance is unknown")
    return published


def published_run(network: ModelConfig) -> RunConfig | None:
    """The preset of a published network; None for any other."""
    name = next((name for name, settings in PUBLISHED.items() if settings.network == network), None)
    return None if name is None else run_preset(name)


SOURCE = Start(
    word="source",
    expected="a run directory, a checkpoint file or a hub id",
    configuration=configuration_of,
    example="pMF-B/16",
    of_example=lambda: _configuration(run_preset("pMF-B/16"), "SOURCE"),
)
