"""Exponential moving averages of the weights, on the network's device or in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pmf.errors import checked_device, require
from pmf.fields import check_values
from pmf.optim.background import Background, Staging
from pmf.optim.moments import require_replicated
from pmf.private import foreach_lerp_
from pmf.published_weights import unwrapped
from pmf.sharded import local, shard


class EMA:
    """An exponential moving average of a model's parameters with the published ramp (EDM, arXiv 2206.00364).

    average = beta average + (1 - beta) p, beta = 0.5^(batch / max(half_life, 1e-8)),
    half_life = min(1000 half_life_kimg, 0.05 images_seen), in images.

    `average` holds it by parameter name, in the parameters' dtype. With FSDP2 it is sharded like the parameters:
    construct it after `fully_shard`. `shard_over`: a mesh of one dimension over which the average of a replicated model
    is sharded by rows (`pmf.sharded.shard`). `device`: where it is (default: where the model is).

    `every`: the average moves in every k-th update alone, by B average + (1 - B) p with B the product of the k betas.
    `pending` is that product so far, and of how many updates: whoever saves the average saves it too.
    """

    def __init__(
        self,
        model: nn.Module,
        half_life_kimg: float,
        *,
        every: int = 1,
        device: torch.device | str | None = None,
        shard_over: DeviceMesh | None = None,
    ) -> None:
        check_values(nn.Module, model=model)
        check_values(float, half_life_kimg=half_life_kimg)
        check_values(int, every=every)
        require(half_life_kimg > 0, f"half_life_kimg: expected a positive number, got {half_life_kimg}")
        require(every > 0, f"every: expected a positive number, got {every}")
        place = None if device is None else checked_device(device)
        require_replicated(list(model.parameters()), shard_over)
        self.half_life_kimg, self.every, self.shard_over = half_life_kimg, every, shard_over
        self.pending = {"beta": 1.0, "updates": 0}
        self._background: Background | None = None
        self._average = {
            name: shard(p.detach(), shard_over).to(place or p.device, copy=True) for name, p in model.named_parameters()
        }

    @property
    def average(self) -> dict[str, Tensor]:
        """The averaged parameters by name, once a thread that moves them is done."""
        if self._background is not None:
            self._background.wait()
        return self._average

    @torch.no_grad()
    def update(self, model: nn.Module, batch: int, images_seen: int) -> None:
        """Move the average towards the model after a step of `batch` images; images_seen includes them."""
        if self._background is not None:
            self._background.wait()
        parts = self.parts(model)
        if self.advance(batch, images_seen):
            self.move(parts, self.take())

    def parts(self, model: nn.Module) -> list[Tensor]:
        """This rank's parts of the model's parameters, paired by name, whatever wraps it, or else by order.

        Errors: `InputError` unless the average has their shapes and dtypes.
        """
        check_values(nn.Module, model=model)
        named: dict[str, Tensor] = dict(model.named_parameters())
        names = list(self._average)
        if named.keys() != self._average.keys():
            named, names = unwrapped(named), list(unwrapped(self._average))
        parameters = [named[name] for name in names] if named.keys() == set(names) else [*named.values()]
        kinds = [(p.shape, p.dtype, p.is_meta) for p in parameters]
        same = kinds == [(x.shape, x.dtype, x.is_meta) for x in self._average.values()]
        require(same, "model: expected the parameters that the average was made of, got others")
        return [local(p.detach(), self.shard_over) for p in parameters]

    def advance(self, batch: int, images_seen: int) -> bool:
        """Count an update; return whether the average moves in it."""
        check_values(int, batch=batch, images_seen=images_seen)
        require(
            0 < batch <= images_seen,
            f"images_seen: expected at least batch, a positive number, got {images_seen}, {batch}",
        )
        half_life = min(self.half_life_kimg * 1000, 0.05 * images_seen)
        beta = 0.5 ** (batch / max(half_life, 1e-8))
        self.pending = {"beta": self.pending["beta"] * beta, "updates": self.pending["updates"] + 1}
        return self.pending["updates"] >= self.every

    def take(self) -> float:
        """The share 1 - B of the weights in the pending updates, of which none are pending then."""
        share = 1 - self.pending["beta"]
        self.pending = {"beta": 1.0, "updates": 0}
        return share

    def move(self, parts: Sequence[Tensor], share: float) -> None:
        """average = (1 - share) average + share parts, this rank's parts of the parameters, on any device."""
        averages = [local(value) for value in self._average.values()]
        foreach_lerp_(averages, [part.to(old.device) for part, old in zip(parts, averages, strict=True)], share)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return self.average


class Averages(Mapping[str, EMA]):
    """Several averages of one model, {"ema_500": EMA, ...}, that are updated together. Arguments: see `EMA`.

    On another type of device than the model's they move in the background (`background`, by default just then):
    `update` starts a copy of the weights to the host on a stream of its own and returns, and a thread moves the
    averages once the copy is done. Call `before_step` before the weights change. Who reads an average waits for the
    thread. An error in it is raised by every later update and reading: half of an update is worth nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        half_lives_kimg: Sequence[float],
        *,
        every: int = 1,
        device: torch.device | str | None = None,
        shard_over: DeviceMesh | None = None,
        background: bool | None = None,
    ) -> None:
        check_values(nn.Module, model=model)
        how = dict(every=every, device=device, shard_over=shard_over)
        several = isinstance(half_lives_kimg, Sequence) and not isinstance(half_lives_kimg, str)
        require(several, lambda: f"half_lives_kimg: expected a sequence of numbers, got {half_lives_kimg!r}")
        emas = [EMA(model, k, **how) for k in half_lives_kimg]  # type: ignore[arg-type]
        self._emas = {f"ema_{ema.half_life_kimg:g}": ema for ema in emas}
        different = len(self._emas) == len(emas)
        require(different, lambda: f"half_lives_kimg: expected different ones, got {half_lives_kimg}")
        if background is None:
            background = device is not None and torch.device(device).type != next(model.parameters()).device.type
        self._staging = Staging(emas[0].parts(model)) if background and emas else None
        self._background = Background()
        for ema in self.values() if background else ():
            ema._background = self._background

    def __getitem__(self, name: str) -> EMA:
        return self._emas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._emas)

    def __len__(self) -> int:
        return len(self._emas)

    def before_step(self) -> None:
        """Make the device, not the host, wait until the weights of the last update are copied."""
        if self._staging is not None:
            self._staging.release()

    @torch.no_grad()
    def update(self, model: nn.Module, batch: int, images_seen: int) -> None:
        """Update every average; see `EMA.update`."""
        self._background.check()
        parts = next(iter(self.values())).parts(model) if self._emas else []
        due = [ema for ema in self.values() if ema.advance(batch, images_seen)]
        if not due:
            return
        moves = [(ema, ema.take()) for ema in due]
        if self._staging is None:
            _move(moves, parts)
        else:
            self._background.wait()  # it reads the staged weights
            self._staging.fill(parts)
            self._background.run(partial(_move_staged, moves, self._staging))


@torch.no_grad()
def _move(moves: list[tuple[EMA, float]], parts: list[Tensor]) -> None:
    for ema, share in moves:
        ema.move(parts, share)


def _move_staged(moves: list[tuple[EMA, float]], staging: Staging) -> None:
    _move(moves, staging.wait())
