"""Find a network's file in a run directory, on the hub or among JAX train states, and the weights in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePath

from pmf.errors import InputError, extra, first_line, reading, require
from pmf.jax_files import is_state
from pmf.sizes import check_is_file

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".zip")
"""Suffixes of network files; among files with the same stem, the earliest suffix wins."""


def locate(source: str, weights: str | None) -> tuple[Path, str | None]:
    """The file (or folder, for a JAX train state) that `source` and `weights` name, and the average in it, if named.

    `weights` is a file's name with or without suffix, or "file:average" for a train state; if `source` is itself a
    train state, "average" is enough. Likewise for a file of PyTorch with several state dicts. Errors: `InputError`
    lists the choices.
    """
    require(weights is None or isinstance(weights, str), lambda: f"weights: expected a name, got {weights!r}")
    require(weights != "", "weights: expected a name, or none, got ''")
    require(source != "", "source: expected a run directory, a checkpoint file or a hub id, got ''")
    path = Path(source)
    with reading("source", source):
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir())
            if _networks(names) or not is_state(path):
                file, average = _split(weights)
                return _with_average(path / _choose(names, file, str(path), path / "config.json"), average)
        if path.exists():
            return _in_one_file(path, weights)
        is_hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) and path.suffix not in SUFFIXES
        require(
            bool(is_hub_id) and not path.parent.is_dir(),
            f"source: {source} does not exist, expected a run directory, a checkpoint file or a hub id",
        )
    return _download(source, weights)


def _split(weights: str | None) -> tuple[str | None, str | None]:
    """("file", "average") of "file:average"."""
    file, _, average = (weights or "").partition(":")
    return file or None, average or None


def _in_one_file(path: Path, weights: str | None) -> tuple[Path, str | None]:
    """Resolve `weights` for a source that is itself a file or a train state: an average in it, or "file:average"."""
    file, average = _split(weights)
    own = (None, path.name, path.stem)
    if average is None and file not in own:
        file, average = None, file
    require(file in own, f"weights: {path} has no {weights!r}, expected an average of it")
    return _with_average(path, average)


def _with_average(file: Path, average: str | None) -> tuple[Path, str | None]:
    check_is_file("source", file)
    several = is_state(file) or file.suffix in (".pt", ".pth", ".bin")
    require(average is None or several, f"weights: {file} holds one network, got {average!r} of it")
    return file, average


def _networks(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if PurePath(name).suffix in SUFFIXES)


def _choose(names: Iterable[str], wanted: str | None, place: str, config: Path | None) -> str:
    """Choose the file among `names` whose full name or stem is `wanted`, which may also be a preset ("pMF-B/16").

    The default is the configuration's choice for sampling, else model.safetensors, else the only file.
    """
    found = _networks(names)
    require(bool(found), f"source: {place} holds no network, expected a file *{', *'.join(SUFFIXES)}")
    held = f"expected one of {', '.join(found)}"
    if wanted is None:
        wanted = _sampling_weights(config) or ("model.safetensors" if "model.safetensors" in found else None)
    if wanted is None:
        require(len(found) == 1, f"weights: {place} holds several networks, {held}")
        return found[0]
    for name in (wanted, wanted.replace("/", "-")):
        matches = [file for file in found if name in (file, PurePath(file).stem)]
        if matches:
            return min(matches, key=lambda file: (file != name, SUFFIXES.index(PurePath(file).suffix)))
    raise InputError(f"weights: {place} has no {wanted!r}, {held}")


def _sampling_weights(config: Path | None) -> str | None:
    """The weights that a run's configuration names for sampling."""
    if config is None or not config.is_file():
        return None
    try:
        stored = json.loads(config.read_text())
        require(isinstance(stored, dict), f"expected an object, got {stored!r:.80}")
        name = stored.get("sampling_weights")
    except (InputError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"source: {config} is not a readable configuration: {first_line(error)}") from error
    return None if name is None else str(name)


def _download(hub_id: str, weights: str | None) -> tuple[Path, str | None]:
    """Download only the file that is needed; fall back to the local cache if the hub cannot be reached."""
    with extra("hub", f"source: {hub_id} is not a path; hub ids need"):
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
    try:
        names = [file.rfilename for file in HfApi().model_info(hub_id).siblings or ()]
    except Exception as error:
        try:
            if isinstance(error, RepositoryNotFoundError):
                raise
            cached = snapshot_download(hub_id, local_files_only=True)
        except Exception:
            raise _not_served(hub_id, error) from error
        return locate(cached, weights)
    file, average = _split(weights)
    try:
        config = Path(hf_hub_download(hub_id, "config.json")) if file is None and "config.json" in names else None
        chosen = _choose(names, file, hub_id, config)
        path = Path(hf_hub_download(hub_id, chosen))
    except InputError:
        raise
    except Exception as error:
        raise _not_served(hub_id, error) from error
    return _with_average(path, average)


def _not_served(hub_id: str, error: Exception) -> InputError:
    return InputError(f"source: {hub_id} is not a local path and the hub did not serve it: {first_line(error)}")
