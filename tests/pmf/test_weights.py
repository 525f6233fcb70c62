import builtins
import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

import pmf
from pmf.atomic_files import write_atomically
from pmf.weights import save_model
from tests.networks import TINY, golden, random_model


@pytest.fixture
def saved(tmp_path):
    model = random_model(dtype=torch.float32)
    save_model(tmp_path / "model.safetensors", TINY, model.state_dict(), step=3)
    return model, tmp_path


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_network_comes_back_from_its_file_or_directory(saved):
    model, directory = saved
    assert same(pmf.PMFDiT.from_pretrained(directory / "model.safetensors"), model)
    loaded = pmf.PMFDiT.from_pretrained(directory, weights="model")
    assert same(loaded, model) and loaded.config == TINY


def test_the_v_head_can_be_left_out(saved):
    model, directory = saved
    loaded = pmf.PMFDiT.from_pretrained(directory, aux_head=False)
    assert loaded.heads == ("u",)
    assert torch.equal(loaded.final_layers["u"].linear.weight, model.final_layers["u"].linear.weight)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_files_load(tmp_path, suffix):
    file = tmp_path / f"published{suffix}"
    (torch.save if suffix == ".pt" else save_file)(golden().state, file)
    assert same(pmf.PMFDiT.from_pretrained(file), golden().model())


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_published_files_may_be_wrapped(tmp_path, wrapper):
    torch.save({wrapper: golden().state, "epoch": 3}, tmp_path / "published.pt")
    assert same(pmf.PMFDiT.from_pretrained(tmp_path / "published.pt"), golden().model())


def test_missing_and_torn_files_are_one_line_errors(saved):
    _, directory = saved
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b""):
        file.write_bytes(content)
        with pytest.raises(pmf.InputError, match=r"source: .* is not a readable checkpoint: ") as error:
            pmf.PMFDiT.from_pretrained(file)
        assert "\n" not in str(error.value)
    (directory / "model.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(pmf.InputError, match="is not a readable checkpoint"):
        pmf.PMFDiT.from_pretrained(directory / "model.pt")
    for content in (b"hello\n", b"\x80\x04K*."):
        (directory / "model.pt").write_bytes(content)
        with pytest.raises(pmf.InputError, match="is not a readable checkpoint"):
            pmf.PMFDiT.from_pretrained(directory / "model.pt")
    torch.save({"net.pos_embed": 3}, directory / "model.pt")
    with pytest.raises(pmf.InputError, match="expected a state dict of tensors"):
        pmf.PMFDiT.from_pretrained(directory / "model.pt")
    for text in ("{ torn", "[]"):
        (directory / "config.json").write_text(text)
        with pytest.raises(pmf.InputError, match=r"config.json is not a readable configuration"):
            pmf.PMFDiT.from_pretrained(directory)
    save_file({"w": torch.ones(1)}, file, metadata={"pmf_config": '{"widths": 3}'})
    with pytest.raises(pmf.InputError, match="holds no readable configuration"):
        pmf.PMFDiT.from_pretrained(file)
    with pytest.raises(pmf.InputError, match=r"has no 'ema_7', expected one of model.pt, model.safetensors"):
        pmf.PMFDiT.from_pretrained(directory, weights="ema_7")
    with pytest.raises(pmf.InputError, match=r"does not exist, expected a run directory, a checkpoint file or"):
        pmf.PMFDiT.from_pretrained(directory / "nowhere" / "model.safetensors")


def write(file, state):
    """Write what `save_model` refuses."""
    save_file(state, file, metadata={"pmf_config": json.dumps(asdict(TINY)), "pmf_metadata": "{}"})


def test_what_could_not_be_read_again_replaces_nothing(saved):
    model, directory = saved
    file, state = directory / "model.safetensors", model.state_dict()
    before = file.read_bytes()
    name = "shared_blocks.0.attn.q_proj.weight"
    for config, given, message in (
        (TINY, {}, r"^state dict: key 'conditioning.tokens.y' is missing$"),
        (replace(TINY, hidden_size=64), state, r"^state dict: 'conditioning.tokens.y' must have shape \[\d+, 64\]"),
        (
            replace(TINY, depth=TINY.depth + 1),
            state,
            r"^state dict: key 'shared_blocks.2.attn_scale' is missing$",
        ),
        (TINY, {n: x.to("meta") for n, x in state.items()}, "has no values, expected it on another device"),
        (TINY, state | {name: 3}, f"^{name}: expected a tensor, got int$"),
        (TINY, {n: x for n, x in state.items() if n != name}, f"^state dict: key '{name}' is missing$"),
        (TINY, state | {name: state[name][:2]}, rf"^state dict: '{name}' must have shape \[32, 32\], got \[2, 32\]$"),
        (TINY, state | {name: state[name].int()}, f"^state dict: '{name}' must have floating values, got torch.int32$"),
        (TINY, state | {"more": torch.ones(1)}, "^state dict: unexpected key 'more'$"),
        (replace(TINY, num_heads=2 * TINY.num_heads), state, r"norm.weight' must have shape"),
    ):
        with pytest.raises(pmf.InputError, match=message):
            save_model(file, config, given)
    for path in (None, 3, directory / "config.json", directory / "model.pt"):
        with pytest.raises(pmf.InputError, match=r"^path: expected "):
            save_model(path, TINY, state)
    assert file.read_bytes() == before and os.listdir(directory) == ["model.safetensors"]


def test_weights_of_an_adaln_network_are_compared_by_their_sizes(tmp_path):
    config, file = replace(TINY, conditioning="adaln"), tmp_path / "model.safetensors"
    model = pmf.create_model(config)
    save_model(file, config, model.state_dict())
    with pytest.raises(pmf.InputError, match=r"^state dict lacks the weight 'patch_embed.positions'$"):
        save_model(file, config, {})
    assert same(pmf.PMFDiT.from_pretrained(file), model)


def test_wrong_weights_are_named(saved):
    model, directory = saved
    state = model.state_dict()
    missing = {k: v for k, v in state.items() if k != "patch_embed.positions"}
    write(directory / "model.safetensors", missing)
    with pytest.raises(pmf.InputError, match=r"lacks the weight 'patch_embed.positions'"):
        pmf.PMFDiT.from_pretrained(directory)
    write(directory / "model.safetensors", state | {"patch_embed.positions": torch.ones(3)})
    named = r"^source: .*/model.safetensors: 'patch_embed.positions' must have shape \[11, 32\], got \[3\]$"
    with pytest.raises(pmf.InputError, match=named):
        pmf.PMFDiT.from_pretrained(directory)


def test_a_published_file_that_lacks_a_weight_is_named(tmp_path):
    file = tmp_path / "published.safetensors"
    save_file({n: x.contiguous() for n, x in golden().state.items() if n != "net.class_tokens"}, file)
    message = f"^source: {file}: state dict: key 'net.class_tokens' is missing, expected a published pMF checkpoint$"
    with pytest.raises(pmf.InputError, match=message):
        pmf.PMFDiT.from_pretrained(file)


def test_hub_ids_without_the_client_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_hub(name, *rest, **options):
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", no_hub)
    with pytest.raises(pmf.InputError, match=r"pip install 'pixel-meanflow\[hub\]'"):
        pmf.PMFDiT.from_pretrained("someone/pmf-tiny")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(pmf.InputError, match=r"path: cannot write .*file.txt: disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_an_unwritable_place_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(pmf.InputError, match=r"path: cannot write .*: (Not a directory|File exists)"):
        save_model(tmp_path / "file" / "model.safetensors", TINY, pmf.create_model(TINY).state_dict())
