"""A step of post-training: the gradient of the Fréchet loss in the weights of a one-step generator.

x = generate(z, y)       z ~ N(0, I), y uniform over the classes       (GeneratorModule)
f_k = network_k(x)                                                     (pmf.feature_networks)
loss = FrechetLoss({k: f_k}) + label_weight sum_k CE(y, logits_k(f_k)) over networks with a classifier

The loss needs the features of all images of a step, but a device holds the activations of one device batch. With
several device batches, features are computed without recording; the loss gives their gradients; then each batch is
made again, recorded, and takes its rows of these gradients backward. The result is that of one batch, for one more
forward pass.

The label term, which the authors do not have, is for statistics that do not know the classes: nothing in them keeps an
image in the class that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pmf.draws import step_seed
from pmf.errors import require
from pmf.feature_networks import FeatureNetwork
from pmf.fields import check_values
from pmf.frechet import FrechetLoss, FrechetOutput

Generate = Callable[[Tensor, Tensor], Tensor]
"""(noise [B, c, H, W] of unit variance, labels int64 [B]) -> images [B, c, H, W]."""


@dataclass(frozen=True)
class Latents:
    """What the images of a device batch are made of."""

    noise: Tensor
    """float32 [B, c, H, W] of unit variance."""
    labels: Tensor
    """int64 [B], uniform over the classes."""

    @classmethod
    def drawn(
        cls, count: int, image_shape: Sequence[int], classes: int, seed: int, device: torch.device | str
    ) -> Latents:
        """`count` latents as a function of `seed`; the noise is drawn on `device`."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (count,), generator=generator)
        on_device = torch.Generator(device).manual_seed(step_seed(seed, 0, "noise"))
        noise = torch.randn(count, *image_shape, generator=on_device, device=device)
        return cls(noise, labels.to(device))


@dataclass(frozen=True)
class FrechetStepOutput:
    """The result of `FrechetStep`."""

    terms: dict[str, Tensor]
    """Detached scalars: loss; fd/NAME, the distance in each network's features; label, the label term if it counts."""
    features: dict[str, Tensor]
    """The features of all ranks, which `FrechetLoss.add` takes once the step is taken."""


class FrechetStep:
    """Computes features and accumulates gradients of the loss in whatever `generate` records.

    Args: generate, a generator, such as a wrapped `pmf.parallel.GeneratorModule`; networks, by name, those of `loss`;
    label_weight, of the cross-entropy of the labels by the networks that have a classifier.
    Errors: `InputError` on other names than those of the loss, or a label weight without a classifier.
    """

    def __init__(
        self,
        generate: Generate,
        networks: Mapping[str, FeatureNetwork],
        loss: FrechetLoss,
        *,
        label_weight: float = 0.0,
    ) -> None:
        check_values(float, label_weight=label_weight)
        same = set(networks) == set(loss.targets)
        require(same, lambda: f"networks: expected {sorted(loss.targets)}, got {sorted(networks)}")
        judged = any(network.classes for network in networks.values())
        require(not label_weight or judged, "label_weight: expected a network with a classifier of the classes")
        self.generate, self.networks, self.loss, self.label_weight = generate, networks, loss, label_weight

    @torch.no_grad()
    def features(self, latents: Latents) -> dict[str, Tensor]:
        """The features of a device batch by network, not recorded."""
        return self._features(latents)

    def _features(self, latents: Latents) -> dict[str, Tensor]:
        images = self.generate(latents.noise, latents.labels)
        return {name: network(images) for name, network in self.networks.items()}

    def __call__(
        self, batches: Sequence[Latents], synchronise: Callable[[bool], None] = lambda last: None
    ) -> FrechetStepOutput:
        """Run forward and backward on this rank's device batches.

        `synchronise(last)` is called before each recorded pass: gradients are to be reduced over ranks in the last.
        """
        recorded = len(batches) == 1
        if recorded:
            synchronise(True)
        passes = [self._features(batches[0])] if recorded else [self.features(latents) for latents in batches]
        leaves = {name: torch.cat([p[name] for p in passes]).detach().requires_grad_() for name in self.networks}
        out = self.loss(leaves)
        label = self._label_term(leaves, torch.cat([latents.labels for latents in batches]))
        total = out.loss + self.label_weight * label
        total.backward()
        gradients = [_gradient(leaf).split([len(latents.labels) for latents in batches]) for leaf in leaves.values()]
        for i, (latents, *rows) in enumerate(zip(batches, *gradients, strict=True)):
            if not recorded:
                synchronise(i == len(batches) - 1)
            features = passes[0] if recorded else self._features(latents)
            torch.autograd.backward([features[name] for name in leaves], rows)
        return FrechetStepOutput(self._terms(total, out, label), out.features)

    def _label_term(self, features: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy of the labels under every network with a classifier, a sum of means over rows."""
        total = torch.zeros((), device=labels.device)
        for name, network in self.networks.items() if self.label_weight else ():
            if network.classes:
                total = total + cross_entropy(network.logits(features[name]), labels)
        return total

    def _terms(self, total: Tensor, out: FrechetOutput, label: Tensor) -> dict[str, Tensor]:
        terms = {"loss": total.detach()} | {f"fd/{name}": value for name, value in out.distances.items()}
        return terms | ({"label": label.detach()} if self.label_weight else {})


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
