"""Options of the command line: none is given twice with different values, and none is accepted and then ignored."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatch
from typing import Any, TypeVar, get_origin, get_type_hints

import torch
import tyro

from pmf.errors import InputError, require

Config = TypeVar("Config")


@dataclass(frozen=True)
class Need:
    """Options that have an effect only under a condition."""

    names: tuple[str, ...]
    """Dotted names of values; * stands for any characters."""
    otherwise: str
    """When they have none, as words that follow "has no effect"."""
    met: Callable[[Any], bool]
    """The condition, on the whole configuration."""


def _on_gpu(config: Any) -> bool:
    """Whether a run trains on a GPU."""
    return config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())


def _of_spaces(prefix: str, measurement: Callable[[Any], Any]) -> tuple[Need, Need]:
    """What `MeasurementConfig` needs for references of one and of several feature spaces."""

    def missing(config: Any) -> bool:  # which another error will say
        reference = measurement(config).reference
        return reference is not None and not reference.exists()

    return (
        Need(
            (f"{prefix}networks", f"{prefix}held_out"),
            f"without a directory of NAME.npz as --{prefix}reference",
            lambda c: measurement(c).of_spaces or missing(c),
        ),
        Need(
            (f"{prefix}resize", f"{prefix}inception"),
            f"in several spaces; see --{prefix}networks",
            lambda c: not measurement(c).of_spaces,
        ),
    )


def _of_card(config: Any) -> bool:
    """Whether `pmf doctor` is asked about a card, on whatever machine."""
    return getattr(config, "card", None) is not None


RUN_NEEDS = (
    Need(("init", "init_weights", "init_state", "overwrite"), "with --resume", lambda c: c.resume is None),
    Need(("init_weights",), "without --init", lambda c: c.init is not None),
    Need(("evaluation.*",), "without --eval-every", lambda c: c.eval_every > 0),
    Need(
        tuple(
            f"evaluation.{name}" for name in ("precision", "per_class", "resize", "inception", "batch_size", "chunk")
        ),
        "without --evaluation.reference",
        lambda c: c.evaluation.reference is not None,
    ),
    *_of_spaces("evaluation.", lambda c: c.evaluation),
    Need(
        (
            "perceptual.lpips",
            "perceptual.convnext",
            "loss.perceptual_max_t",
            "loss.lpips_weight",
            "loss.convnext_weight",
        ),
        "without --perceptual.enabled",
        lambda c: c.perceptual.enabled,
    ),
    Need(("captured",), "without a GPU", _on_gpu),
    Need(
        ("stream",),
        "without --precision bfloat16",
        lambda c: c.precision == "bfloat16" or (c.precision == "auto" and (_on_gpu(c) or _of_card(c))),
    ),
    Need(
        ("perceptual.enabled",),
        "with --loss.lpips-weight 0 and --loss.convnext-weight 0",
        lambda c: not c.perceptual.enabled or c.loss.lpips_weight > 0 or c.loss.convnext_weight > 0,
    ),
    Need(("perceptual.lpips",), "with --loss.lpips-weight 0", lambda c: c.loss.lpips_weight > 0),
    Need(("perceptual.convnext",), "with --loss.convnext-weight 0", lambda c: c.loss.convnext_weight > 0),
    Need(
        ("optimizer.decay", "optimizer.decay_to"),
        "without --optimizer.decay-share",
        lambda c: c.optimizer.decay_share > 0,
    ),
    Need(
        ("optimizer.momentum", "optimizer.newton_schulz_steps"),
        "with --optimizer.name adamw",
        lambda c: c.optimizer.name == "muon",
    ),
    Need(("optimizer.weight_decay",), "with --optimizer.name muon", lambda c: c.optimizer.name == "adamw"),
    Need(("ema_device", "ema_every"), "without --ema-half-lives", lambda c: bool(c.ema_half_lives)),
    Need(("model.*_tokens",), "with --model.conditioning adaln", lambda c: c.model.conditioning == "in_context"),
)
EVAL_NEEDS = (
    Need(
        ("per_class", "resize", "inception", "batch_size", "chunk", "out", "images", "dtype"),
        "without --reference",
        lambda c: c.reference is not None,
    ),
    *_of_spaces("", lambda c: c),
)


POSTTRAIN_NEEDS = (
    Need(
        ("workers", "flip", "max_corrupt", "loss.*", "perceptual.*"),
        "without --anchor",
        lambda c: c.anchor > 0,
    ),
    Need(("data",), "without --anchor, but with --reference", lambda c: c.anchor > 0 or c.reference is None),
    Need(("fill",), "with --resume, for what is saved is filled", lambda c: c.resume is None),
    Need(
        ("feature_precision",),
        "for pixels and digits",
        lambda c: not {"pixels", "digits"}.issuperset(c.spaces),
    ),
    Need(("decay", "fill"), "with --population queue", lambda c: c.population == "average"),
    Need(("queue",), "with --population average", lambda c: c.population == "queue"),
)


def refuse_ignored(config: Any, default: Any, needs: tuple[Need, ...]) -> None:
    """Raise `InputError` for the first value that differs from its default and has no effect."""
    before = dict(_flat(default))
    for name, value in _flat(config):
        for need in needs if value != before[name] else ():
            if any(fnmatch(name, pattern) for pattern in need.names) and not need.met(config):
                raise InputError(f"{name}: has no effect {need.otherwise}, expected {before[name]}, got {value}")


FIXED = "model.*", "ema_half_lives", "optimizer.name", "population"
"""What a resumed run keeps: its checkpoints have the tensors of these."""


def refuse_changed(config: Any, stored: Any) -> None:
    """Raise `InputError` for the first value that differs from that of the run to resume, and has to be the same."""
    before = dict(_flat(stored))
    for name, value in _flat(config):
        if any(fnmatch(name, pattern) for pattern in FIXED):
            require(value == before[name], f"{name}: expected that of the run to resume, {before[name]}, got {value}")


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted name."""
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def parse(
    kind: type[Config], prog: str, arguments: list[str], default: Config | None = None, note: str | None = None
) -> Config:
    """Parse arguments by tyro, which exits on unknown options. `note` follows the class's docstring in the help.

    Errors: `InputError` on an option that is given twice with different values, and those of the class.
    """
    refuse_repeated(kind, arguments)
    if default is None:
        return tyro.cli(kind, prog=prog, args=arguments)
    described = None if note is None else f"{inspect.getdoc(kind)}\n\n{note}"
    return tyro.cli(kind, prog=prog, args=arguments, default=default, description=described)


def refuse_repeated(kind: type, arguments: list[str]) -> None:
    """Raise `InputError` on an option given twice with different values, of which tyro takes the last in silence."""
    kinds, seen = dict(_kinds(kind)), dict[str, str]()
    for name, values in _given(arguments):
        plain = re.sub(r"(^|\.)no-(?=[^.]*$)", r"\1", name)
        name, switch = (name, "") if name in kinds or kinds.get(plain) is not bool else (plain, "off")
        several = get_origin(kinds.get(name)) is tuple
        got = switch if kinds.get(name) is bool else " ".join(values if several else values[:1])
        known = seen.setdefault(name, got)
        require(known == got, f"{name}: expected one value, got it twice, as {known or 'on'!r} and {got or 'on'!r}")


def _kinds(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option, without its dashes, with the type of its value."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        name, hint = f"{prefix}{field.name}".replace("_", "-"), hints[field.name]
        if is_dataclass(hint):
            yield from _kinds(hint, f"{name}.")  # type: ignore[arg-type]
        else:
            yield name, hint


def _given(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Every option given, without its dashes, with the words that follow it."""
    found: list[tuple[str, list[str]]] = []
    for word in arguments:
        if re.match(r"--[^\W\d]", word):
            name, equals, value = word[2:].partition("=")
            found.append((name.replace("_", "-"), [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    yield from found
