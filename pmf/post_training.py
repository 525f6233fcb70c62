"""A step of post-training: the gradient of the Fréchet loss in the weights of a one-step generator.

x = generate(z, y)       z ~ N(0, I), y uniform over the classes       (GeneratorModule)
f_k = network_k(x)                                                     (pmf.feature_networks)
loss = FrechetLoss({k: f_k}) + label_weight sum_k CE(y, logits_k(f_k)) over networks with a classifier

The loss is a sum over networks, which take the images one after another: one network's forward, its part of the loss
and its backward as far as the images, which frees its activations, then the next network. The gradients in the images
add up, and go backward through the generator once. So the memory is that of the generator and the largest network.

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
from pmf.frechet import FrechetLoss

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
        images = self.generate(latents.noise, latents.labels)
        return {name: network(images) for name, network in self.networks.items()}

    def __call__(
        self, batches: Sequence[Latents], synchronise: Callable[[bool], None] = lambda last: None
    ) -> FrechetStepOutput:
        """Run forward and backward on this rank's device batches.

        `synchronise(last)` is called before each recorded pass: gradients are to be reduced over ranks in the last.
        """
        total = _Total(self, torch.cat([latents.labels for latents in batches]))
        if len(batches) == 1:
            synchronise(True)
            self._backward(batches[0], total.gradient)
            return total.output()
        for i, (latents, gradients) in enumerate(zip(batches, self._gradients(batches, total), strict=True)):
            synchronise(i == len(batches) - 1)
            self._backward(latents, _known(gradients))
        return total.output()

    def _gradients(self, batches: Sequence[Latents], total: _Total) -> list[dict[str, Tensor]]:
        """The gradients in the features of each device batch, by network."""
        passes, sizes = [self.features(latents) for latents in batches], [len(latents.labels) for latents in batches]
        rows = {name: torch.cat([features[name] for features in passes]) for name in self.loss.targets}
        parts = [total.gradient(name, value).split(sizes) for name, value in rows.items()]
        return [dict(zip(rows, of_batch, strict=True)) for of_batch in zip(*parts, strict=True)]

    def _backward(self, latents: Latents, gradient: Callable[[str, Tensor], Tensor]) -> None:
        """Make a device batch, and take the gradients in its features, gradient(name, features), backward."""
        images = self.generate(latents.noise, latents.labels)
        # In float32 at least, as networks take images: the sum over networks is rounded to the images' dtype once.
        leaf = images.detach().to(torch.promote_types(images.dtype, torch.float32)).requires_grad_()
        for name in self.loss.targets:  # every rank in the same order, since ranks exchange features
            self._backward_through(name, leaf, gradient)
        images.backward(torch.zeros_like(images) if leaf.grad is None else leaf.grad.to(images.dtype))

    def _backward_through(self, name: str, images: Tensor, gradient: Callable[[str, Tensor], Tensor]) -> None:
        """Add one network's share to images.grad. Nothing of the network is held on return."""
        features = self.networks[name](images)
        d_features = gradient(name, features.detach())
        if features.requires_grad:  # else it does not depend on the images
            features.backward(d_features)


def _known(gradients: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, features: gradients[name]


class _Total:
    """Sums the loss over networks, and gives the gradient in the features of each.

    labels: int64 [B], of all device batches of this rank.
    """

    def __init__(self, step: FrechetStep, labels: Tensor) -> None:
        self.step, self.labels = step, labels
        self.loss, self.label = (torch.zeros((), dtype=torch.float64, device=labels.device) for _ in range(2))
        self.distances: dict[str, Tensor] = {}
        self.features: dict[str, Tensor] = {}

    def gradient(self, name: str, features: Tensor) -> Tensor:
        """The gradient of the loss in the features [B, width] of network `name`, whose part enters the sum."""
        network, weight = self.step.networks[name], self.step.label_weight
        rows = features.detach().requires_grad_()
        out = self.step.loss.term(name, rows)
        part = out.loss
        if weight and network.classes:
            label = cross_entropy(network.logits(rows), self.labels)
            self.label += label.detach()
            part = part + weight * label
        (gradient,) = torch.autograd.grad(part, rows)
        self.loss += part.detach()
        self.distances |= out.distances
        self.features |= out.features
        return gradient

    def output(self) -> FrechetStepOutput:
        """What the step returns, once every network has entered."""
        terms = {"loss": self.loss} | {f"fd/{name}": value for name, value in self.distances.items()}
        return FrechetStepOutput(terms | ({"label": self.label} if self.step.label_weight else {}), self.features)
