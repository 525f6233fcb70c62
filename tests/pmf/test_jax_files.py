"""Zips and folders of JAX train states, before flax or orbax read them."""

import shutil
import sys
import zipfile
from collections import namedtuple

import numpy as np
import pytest
import torch

import pmf
from pmf.jax_files import is_state


def refused(source, message, weights=None):
    with pytest.raises(pmf.InputError, match=message) as error:
        pmf.PMFDiT.from_pretrained(source, weights=weights)
    assert "\n" not in str(error.value)


def make(file, entries):
    with zipfile.ZipFile(file, "w") as archive:
        for name in entries:
            archive.writestr(name, b"content of some length")
    return file


def test_torn_and_foreign_zips_are_one_line_errors(tmp_path):
    file = make(tmp_path / "state.zip", ["pMF/checkpoint_7", "pMF/other"])
    whole = file.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        b"",
        b"PK\x03\x04",
        whole.replace(b"content of some", b"c0ntent of some"),
    ):
        file.write_bytes(content)
        refused(file, r"source: .*state.zip is not a readable zip: ")
    refused(make(tmp_path / "pictures.zip", ["a.png"]), "holds no JAX train state, expected checkpoint_<step> in it")
    torch.save({"w": torch.ones(2)}, tmp_path / "torch.zip")
    refused(tmp_path / "torch.zip", "holds no JAX train state, expected checkpoint_<step> in it")
    refused(tmp_path / "gone.zip", r"gone.zip does not exist, expected a run directory, a checkpoint file or a hub id")
    assert not is_state(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "\\evil", "C:\\evil"])
def test_no_path_leads_out_of_a_zip(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    refused(make(tmp_path / "state.zip", ["checkpoint_7", name]), r"holds the path .*evil', which leads out of it")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["state.zip", "temporary"]


def test_zips_that_do_not_fit_are_not_begun(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    refused(make(tmp_path / "state.zip", ["checkpoint_7"]), "unpacks to 0.0 GB, and .* has 0.0 free: expected another")


def test_states_need_an_extra(tmp_path, monkeypatch):
    """A folder written by orbax, a file written by flax, and both in zips."""
    for name in ("flax", "flax.serialization", "orbax", "orbax.checkpoint"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "flax" / "checkpoint_7").parent.mkdir()
    (tmp_path / "flax" / "checkpoint_7").write_bytes(b"msgpack")
    (tmp_path / "orbax" / "checkpoint_7").mkdir(parents=True)
    (tmp_path / "orbax" / "checkpoint_7" / "_METADATA").write_text("{}")
    places = [tmp_path / "flax", tmp_path / "flax" / "checkpoint_7", tmp_path / "orbax"]
    for entry in ("checkpoint_7", "checkpoint_7/_METADATA", "_METADATA"):
        places.append(make(tmp_path / f"{len(places)}.zip", [entry]))
    for place in places:
        refused(place, r"is a JAX train state, which needs pip install 'pixel-meanflow\[jax-checkpoints\]'", "ema_500")


def test_folders_without_networks_say_so(tmp_path):
    refused(tmp_path, r"holds no network, expected a file \*.safetensors, \*.pt, \*.pth, \*.bin, \*.zip")
    (tmp_path / "checkpoint_7.orbax-checkpoint-tmp-1").mkdir()
    refused(tmp_path, "holds no network", "ema_500")


@pytest.mark.extras
def test_arrays_far_larger_than_their_files_are_not_read(tmp_path, monkeypatch):
    """The metadata of a small checkpoint can declare any shape, which reading would fill with zeros."""
    ocp = pytest.importorskip("orbax.checkpoint")
    saved = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    saved.save(tmp_path / "checkpoint_7", {"params": {"w": np.zeros((999, 999), np.float32)}})
    monkeypatch.setattr("pmf.sizes.FLOOR", 1000)
    refused(tmp_path, r"source: .*checkpoint_7 declares 0.00399 GB of content, but holds [\d,]+ bytes")
