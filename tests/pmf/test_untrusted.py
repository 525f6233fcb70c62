"""Files from elsewhere: what they declare is checked before memory is taken, and nothing in them runs."""

import io
import json
import os
import re
import resource
import struct
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pmf
from pmf.metrics import Statistics
from pmf.weights import save_model
from tests.networks import TINY, golden, random_model

ROOM = 2**31


@pytest.fixture(autouse=True)
def little_memory():
    """Little more address space than this process already uses: an allocation by a declared size fails."""
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(file, message, **options):
    with pytest.raises(pmf.InputError, match=message) as error:
        pmf.PMFDiT.from_pretrained(file, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(hidden_size=10**9, num_heads=10**6),
        dict(hidden_size=10**6, num_heads=1000),
        dict(depth=10**9),
        dict(depth=10**9, aux_head_depth=10**9 - 1),
        dict(image_size=2**30),
        dict(image_size=2**40, patch_size=2**30),
        dict(num_classes=10**12),
        dict(in_channels=10**12),
        dict(bottleneck=10**12),
        dict(class_tokens=10**12),
        dict(time_tokens=2**60),
        dict(hidden_size=10**30),
        dict(conditioning="adaln", hidden_size=2**40, num_heads=4),
    ],
)
def test_a_configuration_larger_than_its_file_is_refused(tmp_path, change):
    state, config = random_model(dtype=torch.float32).state_dict(), asdict(TINY) | change
    save_file(state, tmp_path / "m.safetensors", metadata={"pmf_config": json.dumps(config), "pmf_metadata": "{}"})
    refused(
        tmp_path / "m.safetensors",
        "must have shape|expected weights of|lacks the weight|holds no readable configuration",
    )


def test_a_wide_network_of_vectors_alone_is_refused(tmp_path):
    """Every vector of the declared width is there, the matrices are not."""
    wide = replace(TINY, conditioning="adaln", hidden_size=2**20, num_heads=2**15, image_size=4, patch_size=4, depth=2)
    state = {
        "patch_embed.positions": torch.zeros(wide.sequence_length, 2**20),
        "patch_embed.proj1.weight": torch.zeros(wide.bottleneck, wide.in_channels, 4, 4),
        "conditioning.classes.weight": torch.zeros(wide.num_classes + 1, 2**20),
        "shared_blocks.0.norm1.weight": torch.zeros(1),
        "head_blocks.u.0.norm1.weight": torch.zeros(1),
        "final_layers.u.norm.weight": torch.zeros(1),
    }
    info = {"pmf_config": json.dumps(asdict(replace(wide, aux_head_depth=1))), "pmf_metadata": "{}"}
    save_file(state, tmp_path / "m.safetensors", metadata=info)
    refused(tmp_path / "m.safetensors", "expected a network of at least .* values")


@pytest.mark.parametrize("name", ["net.pos_embed", "net.x_embedder.proj1.weight", "net.omega_tokens"])
def test_shapes_without_values_are_refused(tmp_path, name):
    """A few bytes declare any shape by strides of zero, on the meta device, or as a sparse tensor."""
    shape = [10**9 if i == golden().state[name].ndim - 1 else n for i, n in enumerate(golden().state[name].shape)]
    tensors = [torch.zeros(1).expand(shape), torch.empty(shape, device="meta")]
    tensors += [torch.sparse_coo_tensor(torch.zeros(len(shape), 0), [], shape)]
    for tensor in tensors:
        torch.save(golden().state | {name: tensor}, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", f"does not hold the values of '{name}'")


def test_blocks_that_are_not_there_are_not_built(tmp_path):
    torch.save(golden().state | {"net.shared_blocks.999999999.attn_scale": torch.zeros(1)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", r"key 'net.shared_blocks.\d+.attn_scale' is missing")
    torch.save(golden().state | {"net.pos_embed": torch.zeros(1, 1, 32)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "image_size must be positive")


def test_headers_of_torn_and_of_lying_safetensors_are_refused(tmp_path):
    file = tmp_path / "m.safetensors"
    for header in (
        {"w": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}},
    ):
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
        refused(file, "is not a readable checkpoint")
    for size in (2**40, 2**63 + 5):
        file.write_bytes(struct.pack("<Q", size) + b"{}")
        refused(file, "is not a readable checkpoint")


def bomb(file, entries, size=2**27):
    """An archive whose entries unpack to `size` zeros each."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, head in entries.items():
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(head)
                for _ in range(size // 2**26):
                    entry.write(bytes(2**26))


def test_archives_that_unpack_to_far_more_than_they_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pmf.sizes.FLOOR", 2**20)
    bomb(tmp_path / "m.pt", {"archive/data.pkl": b"", "archive/data/0": b""})
    refused(tmp_path / "m.pt", "declares .* GB of content, but holds")
    bomb(tmp_path / "m.zip", {"checkpoint_7": b""})
    refused(tmp_path / "m.zip", "declares .* GB of content, but holds")


def npy(shape, dtype="<f8"):
    """The header of an array alone."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr=dtype, fortran_order=False, shape=shape))
    return head.getvalue()


def test_statistics_are_checked_by_their_headers(tmp_path, monkeypatch):
    file = tmp_path / "ref.npz"

    def statistics(message, **content):
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in content.items():
                archive.writestr(f"{name}.npy", data)
        with pytest.raises(pmf.InputError, match=message) as error:
            Statistics.load(file)
        assert "\n" not in str(error.value)

    for shape in ((10**15,), (10**9, 10**9), (-1,), ()):
        statistics("ref.npz is not a readable npz archive", mu=npy(shape), sigma=npy((2, 2)) + bytes(32))
    statistics("expected mu .* got .2. and .2, 3.", mu=npy((2,)) + bytes(16), sigma=npy((2, 3)) + bytes(48))
    statistics("is not a readable npz archive", mu=b"no array", sigma=npy((1, 1)) + bytes(8))
    statistics("is not a readable npz archive", mu=npy((1,), "|O") + bytes(8), sigma=npy((1, 1)) + bytes(8))
    monkeypatch.setattr("pmf.sizes.FLOOR", 2**20)
    bomb(file, {"mu.npy": npy((2**12,)), "sigma.npy": npy((2**12, 2**12))})
    with pytest.raises(pmf.InputError, match=r"declares .* GB of content"):
        Statistics.load(file)
    np.savez(file, mu=np.zeros(2), sigma=np.eye(2), other=np.array([{}], dtype=object))
    assert Statistics.load(file).count is None  # what is not needed is not read


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x93NUMPY\1\0", b"mu,sigma\n", None])
def test_what_is_no_archive_is_one_line(tmp_path, content):
    file = tmp_path / "ref.npz"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(pmf.InputError, match=r"reference: .*ref.npz is not a readable npz archive") as error:
        Statistics.load(file)
    assert "\n" not in str(error.value)


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return open, ("/tmp/pmf-was-run", "w")


@pytest.mark.parametrize("content", [Runs(), {"model": Runs()}, {"epoch": Runs(), **{"net.pos_embed": torch.ones(1)}}])
@pytest.mark.parametrize("new", [True, False])
def test_objects_are_not_unpickled(tmp_path, content, new):
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    refused(tmp_path / "m.pt", "expected tensors alone, not Python objects")


def wrapped(state, prefix):
    """Names as several wrappers leave them."""
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod.").replace("attn.", "attn.module."): value
             for name, value in state.items()}  # fmt: skip
    return {f"{prefix}{name}": value for name, value in inner.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model.", "ema."])
def test_names_of_wrapped_networks_are_read(tmp_path, prefix):
    model = random_model(dtype=torch.float32)
    ours, theirs = wrapped(model.state_dict(), prefix), wrapped(golden().state, prefix)
    info = {"pmf_config": json.dumps(asdict(TINY)), "pmf_metadata": "{}"}
    save_file(ours, tmp_path / "raw.safetensors", metadata=info)
    save_model(tmp_path / "ours.safetensors", TINY, ours)
    save_file(theirs, tmp_path / "theirs.safetensors")
    torch.save({"model": {"n_averaged": torch.tensor(3), **theirs}}, tmp_path / "theirs.pt")
    for name, expected in {"raw.safetensors": model, "ours.safetensors": model, "theirs.pt": golden().model(),
                           "theirs.safetensors": golden().model()}.items():  # fmt: skip
        loaded, expected = pmf.PMFDiT.from_pretrained(tmp_path / name).state_dict(), expected.state_dict()
        assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], expected[k]) for k in loaded)
    from safetensors import safe_open

    with safe_open(tmp_path / "ours.safetensors", "pt") as reader:
        assert set(reader.keys()) == set(model.state_dict())


def test_two_weights_of_one_name_are_refused(tmp_path):
    torch.save(golden().state | {"module.net.pos_embed": golden().state["net.pos_embed"]}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "'module.net.pos_embed' names 'net.pos_embed', as another key does")


def test_of_several_sets_in_a_file_one_is_named(tmp_path):
    other = {name: value + 1 for name, value in golden().state.items()}
    torch.save({"model": golden().state, "model_ema": other, "epoch": 3}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "holds several networks, expected one of model, model_ema")
    refused(tmp_path / "m.pt", "holds model, model_ema, got 'ema_500' of it", weights="ema_500")
    averaged = pmf.PMFDiT.from_pretrained(tmp_path / "m.pt", weights="model_ema")
    trained = pmf.PMFDiT.from_pretrained(tmp_path, weights="m:model")
    assert torch.equal(averaged.patch_embed.positions, trained.patch_embed.positions + 1)


def test_weights_that_are_not_floating_are_refused(tmp_path):
    state = random_model(dtype=torch.float32).state_dict()
    state["patch_embed.proj2.bias"] = state["patch_embed.proj2.bias"].to(torch.int64)
    info = {"pmf_config": json.dumps(asdict(TINY)), "pmf_metadata": "{}"}
    save_file(state, tmp_path / "m.safetensors", metadata=info)
    refused(tmp_path / "m.safetensors", "'patch_embed.proj2.bias' must have floating values, got torch.int64")


@pytest.mark.parametrize("source", ["../secret", "a/..", "./x", "a/b/c", "-/x", "x" * 5000, "a\0b", ".hidden/x"])
def test_what_is_no_hub_id_is_not_asked_of_the_hub(source, monkeypatch):
    def asked(*_):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("pmf.hub._download", asked)
    refused(source, "source: ")


def test_weights_do_not_lead_out_of_their_directory(tmp_path):
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "secret.safetensors", TINY, random_model(dtype=torch.float32).state_dict())
    save_model(tmp_path / "run" / "a.safetensors", TINY, random_model(dtype=torch.float32).state_dict())
    for name in ("../secret", str(tmp_path / "secret"), "../secret.safetensors"):
        refused(tmp_path / "run", "has no '.*secret", weights=name)
        (tmp_path / "run" / "config.json").write_text(json.dumps(dict(sampling_weights=name)))
        refused(tmp_path / "run", "has no '.*secret")
        (tmp_path / "run" / "config.json").unlink()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.zip", "a"])
def test_pipes_and_devices_are_no_sources(tmp_path, name):
    (tmp_path / "run").mkdir()
    for pipe in (tmp_path / name, tmp_path / "run/model.pt"):
        os.mkfifo(pipe)
    for source in (tmp_path / name, tmp_path / "run", "/dev/zero"):
        refused(source, "^source: .* is a pipe or a device, expected a file$")
    with pytest.raises(pmf.InputError, match=r"^reference: .* is a pipe or a device, expected a file$"):
        Statistics.load(tmp_path / name)


def test_statistics_that_cannot_be_are_refused(tmp_path):
    mu, sigma = np.zeros(3), np.eye(3)
    odd = [dict(sigma=sigma + np.eye(3, k=1)), dict(sigma=-sigma), dict(count=-5), dict(count=0)]
    for change in odd:
        np.savez(tmp_path / "a.npz", **dict(mu=mu, sigma=sigma) | change)
        with pytest.raises(pmf.InputError, match=r"^reference: .*a.npz: (sigma is no covariance|count: expected at)"):
            Statistics.load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", mu=mu, sigma=np.zeros((3, 3)), count=1)
    assert Statistics.load(tmp_path / "a.npz").count == 1


def test_an_empty_source_is_not_the_present_directory():
    refused("", "^source: expected a run directory, a checkpoint file or a hub id, got ''$")
