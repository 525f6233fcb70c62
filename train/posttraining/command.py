"""`pmf posttrain`: post-train a run or a published network, or resume that."""

from __future__ import annotations

from pmf.train.config import PosttrainConfig
from pmf.train.data.by_name import open_data
from pmf.train.distributed import join
from pmf.train.evaluation.spaces import floors
from pmf.train.loop import end
from pmf.train.options import POSTTRAIN_NEEDS
from pmf.train.posttraining.references import open_networks, open_references
from pmf.train.posttraining.start import SOURCE
from pmf.train.posttraining.trainer import PosttrainTrainer
from pmf.train.presets import configured


def command(arguments: list[str]) -> None:
    """Post-train, `pmf posttrain SOURCE [options]`, or resume, `pmf posttrain --resume DIRECTORY [options]`."""
    config = configured(arguments, "posttrain", PosttrainConfig, start=SOURCE, needs=POSTTRAIN_NEEDS)
    world = join(config.device, config.sharding)
    networks = open_networks(config, world.device)
    references = open_references(config, networks)
    held_out = {name: floor.distance for name, floor in floors(config.held_out, references, world).items()}
    data = open_data(config.data, config.model.image_size) if config.anchor else None
    trainer = PosttrainTrainer(config, world, networks, references, held_out=held_out, data=data)
    trainer.run()
    end(trainer)
