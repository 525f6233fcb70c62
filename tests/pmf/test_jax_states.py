"""Train states written by flax, optax and orbax are read under our names, bit for bit."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import pmf
from pmf.config import PUBLISHED
from pmf.fine_tuning import copy_weights
from pmf.jax_states import load_train_state, published_state_dict
from pmf.train.config import load_run_config
from pmf.train.loop import Trainer
from pmf.weights import save_model
from tests.networks import DATA, TINY, model_inputs, relative_error
from tests.train.test_distributed import config, data

pytestmark = pytest.mark.extras
flax = pytest.importorskip("flax")
pytest.importorskip("optax")
import jax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from flax.training import checkpoints  # noqa: E402

from tests.pmf import flax_network  # noqa: E402

FORMATS = ("orbax", "orbax without ocdbt", "msgpack")


@pytest.fixture(scope="module")
def state():
    return flax_network.trained_state(TINY)


def save(folder, state, how="orbax", step=7):
    """Save a state as the authors do, with flax's save_checkpoint_multiprocess, in one of its formats."""
    if how == "orbax without ocdbt":
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).save(folder / f"checkpoint_{step}", state)
        return folder
    flax.config.update("flax_use_orbax_checkpointing", how == "orbax")
    try:
        checkpoints.save_checkpoint_multiprocess(folder, state, step, keep=3)
    finally:
        flax.config.update("flax_use_orbax_checkpointing", True)
    return folder


def zipped(folder, file, below=""):
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path(below) / path.relative_to(folder))
    return file


@pytest.fixture(scope="module", params=FORMATS)
def full(request, state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return zipped(save(folder / "state", state, request.param), folder / "pMF-tiny-full.zip")


def flat(tree):
    """The leaves of a tree by name, joined by slashes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def outputs(params, inputs, eval=False):
    """u, and v if there is a v head, as flax computes them."""
    values = {name: value.numpy() for name, value in inputs.items()}
    z = values.pop("z").transpose(0, 2, 3, 1)
    images = flax_network.PixelMeanFlow(TINY, eval).apply({"params": params}, z, *values.values())
    return [torch.from_numpy(np.asarray(image).transpose(0, 3, 1, 2).copy()) for image in images]


@pytest.mark.parametrize("name", ["model", "ema_500", "ema_1000", "ema_2000"])
def test_each_set_of_weights_computes_what_flax_computes(full, state, name):
    model = pmf.PMFDiT.from_pretrained(full, weights=name)
    params = state.params if name == "model" else state.ema_params[int(name[4:])]
    inputs = model_inputs(TINY, 3, dtype=torch.float32)
    with torch.no_grad():
        ours = model(**inputs)
    for got, expected in zip(ours, outputs(params, inputs), strict=True):
        assert relative_error(got, expected) < 2e-6
    values = {name: value for name, value in flat(params).items()}
    assert model.config == TINY and sum(p.numel() for p in model.parameters()) == sum(v.size for v in values.values())
    block = model.head_blocks["v"][0]
    for ours, theirs in (
        (model.conditioning.classes.weight, values["net/y_embedder/embedding_table/embedding"][0]),
        (block.mlp.w1.weight, values["net/v_heads_0/mlp/w1/_flax_linear/kernel"].T),
        (block.norm1.weight, values["net/v_heads_0/norm1/kernel"]),
        (model.patch_embed.proj1.weight, values["net/x_embedder/proj1/kernel"].transpose(3, 2, 0, 1)),
    ):
        assert np.array_equal(ours.detach().numpy(), theirs)


def test_step_averages_and_moments(full, state):
    read = load_train_state(full)
    assert (read.step, read.count, read.config) == (3, 3, TINY)
    assert list(read.averages) == ["ema_500", "ema_1000", "ema_2000"]
    for name, weights in {"model": read.model, **read.averages}.items():
        expected = pmf.PMFDiT.from_pretrained(full, weights=name).state_dict()
        assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n]) for n in expected)
    # Moments are read by the same code as weights, which the test of outputs above has checked.
    muon, adam = (state.opt_state.inner_states[kind].inner_state[0] for kind in ("muon", "adam"))
    assert read.muon.keys() | read.adam.keys() == read.model.keys() and not read.muon.keys() & read.adam.keys()
    chosen = {name for name, module in pmf.create_model(TINY).named_modules() if isinstance(module, torch.nn.Linear)}
    assert read.muon.keys() == {f"{name}.weight" for name in chosen}
    for ours, theirs in (
        (
            read.muon["shared_blocks.0.attn.q_proj.weight"],
            flat(muon.mu)["net/shared_blocks_0/attn/q_proj/_flax_linear/kernel"].T,
        ),
        (read.adam["shared_blocks.0.attn_scale"][0], flat(adam.mu)["net/shared_blocks_0/attn_scale"]),
        (read.adam["shared_blocks.0.attn_scale"][1], flat(adam.nu)["net/shared_blocks_0/attn_scale"]),
        (read.adam["patch_embed.proj1.weight"][1], flat(adam.nu)["net/x_embedder/proj1/kernel"].transpose(3, 2, 0, 1)),
    ):
        assert np.array_equal(ours.numpy(), theirs)


def test_a_run_goes_on_as_flax_and_optax_do(full, state, tmp_path):
    """Two more steps on the same gradients, ours and theirs; then a run as a user starts it."""
    changes = dict(steps=8, init=str(full), ema_half_lives=(500.0, 1000.0, 2000.0))
    trainer = Trainer(config(tmp_path / "run", init_state=True, **changes), data())
    assert trainer.step == 3
    for average in trainer.emas.values():
        kept = state.ema_params[int(average.half_life_kimg)]
        assert all(map(torch.equal, average.state_dict().values(), named(trainer.model, kept).values()))
    for number in range(2):
        grads = flax_network.random_params(TINY, 200 + number)
        state = flax_network.update(state, grads)
        for name, grad in named(trainer.model, grads).items():
            trainer.model.get_parameter(name).grad = grad
        for part in trainer.optimizers.values():
            part.param_groups[0]["lr"] = 1e-3
            part.step()
    theirs = named(trainer.model, state.params)
    for name, p in trainer.model.named_parameters():
        assert relative_error(p.detach(), theirs[name]) < 1e-6, name
    trainer = Trainer(config(tmp_path / "run", overwrite=True, init_state=True, **changes), data())
    trainer.run()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5, 6, 7, 8]
    resumed = Trainer(dataclasses.replace(load_run_config(tmp_path / "run"), resume=tmp_path / "run"), data())
    assert resumed.step == 8


def named(model, tree):
    """A tree of flax parameters by our names, in the model's order."""
    ours = pmf.convert_official_state_dict(published_state_dict(tree))
    return {name: ours[name] for name, _ in model.named_parameters()}


NANO = pmf.ModelConfig(
    image_size=4,
    patch_size=2,
    hidden_size=8,
    depth=2,
    num_heads=1,
    aux_head_depth=1,
    num_classes=2,
    in_channels=1,
    bottleneck=4,
    class_tokens=1,
    omega_tokens=1,
    t_min_tokens=1,
    t_max_tokens=1,
    time_tokens=1,
)


def numbers(seed):
    """The parameters of NANO in the files below: counted up modulo 7, from the name's position plus `seed`."""
    names, tree = flat(flax_network.shapes(NANO, False)), {}
    for place, name in enumerate(sorted(names)):
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        values = (np.arange(names[name].size) + place + seed) % 7 - 3
        node[last] = values.astype(np.float32).reshape(names[name].shape)
    return tree


@pytest.mark.parametrize("how", ["orbax", "msgpack"])
def test_states_of_the_versions_that_the_authors_pin(how):
    """Files in tests/data, by jax 0.4.34, flax 0.10.4, orbax-checkpoint 0.6.4, tensorstore 0.1.78 and optax 0.2.5.

    They hold the params numbers(0), the averages numbers(500), numbers(1000) and numbers(2000), and the moments after
    one update by numbers(1), saved by save_checkpoint_multiprocess in each of its formats.
    """
    file, model = DATA / f"train_state_{how}.zip", pmf.create_model(NANO)
    read, grads = load_train_state(file), named(model, numbers(1))
    assert (read.step, read.count, read.config) == (1, 1, NANO)
    for weights, seed in ((read.model, 0), *((read.averages[f"ema_{k}"], k) for k in (500, 1000, 2000))):
        assert all(torch.equal(weights[name], value) for name, value in named(model, numbers(seed)).items())
    assert read.muon.keys() == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, grad in grads.items():
        expected = [(1 - 0.95) * grad] if name in read.muon else [(1 - 0.9) * grad, (1 - 0.95) * grad**2]
        got = [read.muon[name]] if name in read.muon else read.adam[name]
        assert all(map(functools.partial(torch.allclose, rtol=1e-6), got, expected)), name


def test_fine_tuning_has_a_real_v_head_and_the_weights_it_asks_for(full, state):
    model = pmf.create_model(TINY)
    for weights, params in (("model", state.params), ("ema_500", state.ema_params[500])):
        assert copy_weights(model, str(full), weights) == []
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in named(model, params).items())


def test_a_run_goes_on_from_full_states_alone(full, tmp_path):
    changes = dict(init=str(full), init_state=True)
    for change, message in (
        (
            dict(ema_half_lives=(7.0,), sampling_weights="model"),
            "ema_half_lives: init holds ema_500, ema_1000, ema_2000",
        ),
        (dict(steps=2), "steps: init is at step 3, expected at least that, got 2"),
        (dict(init_weights="ema_500"), "weights: a run resumes from \"model\", got 'ema_500'"),
        (dict(init_weights="else:model"), "has no 'else:model', expected an average of it"),
    ):
        with pytest.raises(pmf.InputError, match=message):
            Trainer(config(tmp_path / "run", **(dict(steps=8) | changes | change)), data())
    save_model(tmp_path / "model.safetensors", TINY, pmf.create_model(TINY).state_dict())
    with pytest.raises(pmf.InputError, match="source: expected a train state of the authors, got"):
        Trainer(config(tmp_path / "run", init=str(tmp_path), init_state=True), data())
    with pytest.raises(pmf.InputError, match="init_state: expected a train state in init, got none"):
        config(tmp_path / "run", init_state=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", FORMATS)
def test_a_state_may_lie_anywhere_in_a_zip_or_a_folder(state, tmp_path, how):
    folder = save(tmp_path / "state", state, how)
    expected = pmf.PMFDiT.from_pretrained(folder, weights="model").state_dict()
    inside = folder / "checkpoint_7"
    places = [inside, zipped(folder, tmp_path / "below.zip", "a/b"), zipped(folder, tmp_path / "mac.zip", "pMF")]
    places += [zipped(inside, tmp_path / "top.zip")] if inside.is_dir() else []
    with zipfile.ZipFile(tmp_path / "mac.zip", "a") as archive:
        archive.writestr("__MACOSX/pMF/._checkpoint_7", b"\0")
    for place in places:
        got = pmf.PMFDiT.from_pretrained(place, weights="model").state_dict()
        assert all(torch.equal(value, got[name]) for name, value in expected.items())
    assert not list(Path(tmp_path).glob("pmf-*"))


def test_of_several_steps_the_last_one_is_taken(state, tmp_path):
    save(tmp_path, state, step=9)
    save(tmp_path, flax_network.trained_state(TINY, updates=1), step=10)
    assert load_train_state(tmp_path).step == 1
    shutil.copytree(tmp_path / "checkpoint_9", tmp_path / "other" / "checkpoint_9")
    shutil.move(tmp_path / "checkpoint_9", tmp_path / "one" / "checkpoint_9")
    shutil.rmtree(tmp_path / "checkpoint_10")
    with pytest.raises(pmf.InputError, match=r"several train states, expected one of one/checkpoint_9, other/"):
        load_train_state(tmp_path)


@pytest.mark.parametrize("how", FORMATS)
def test_inference_states_have_no_v_head(tmp_path, how):
    state = flax_network.inference_state(TINY)
    file = zipped(save(tmp_path / "state", state, how), tmp_path / "pMF-tiny.zip")
    model = pmf.PMFDiT.from_pretrained(file)
    assert model.heads == ("u",)
    inputs = model_inputs(TINY, 2, dtype=torch.float32)
    with torch.no_grad():
        u = model(**inputs)[0]
    assert relative_error(u, outputs(state.ema_params[2000], inputs, eval=True)[0]) < 2e-6
    with pytest.raises(pmf.InputError, match="holds no moments of Muon and Adam, expected a full training state"):
        load_train_state(file)


def test_presets_sample_from_their_own_average(tmp_path, monkeypatch):
    """pMF-L/16 samples from the average of 1000 kimg; here a preset of its name is tiny."""
    monkeypatch.setitem(PUBLISHED, "pMF-L/16", dataclasses.replace(PUBLISHED["pMF-L/16"], network=TINY))
    state = flax_network.inference_state(TINY, (500, 1000))
    save(tmp_path, state)
    got = pmf.PMFDiT.from_pretrained(tmp_path).patch_embed.proj1.bias
    assert np.array_equal(got.detach(), state.ema_params[1000]["net"]["x_embedder"]["proj1"]["bias"])
    monkeypatch.undo()
    with pytest.raises(pmf.InputError, match="holds several averages, expected one of model, ema_500, ema_1000"):
        pmf.PMFDiT.from_pretrained(tmp_path)
    with pytest.raises(pmf.InputError, match="has no 'ema_7', expected one of model, ema_500, ema_1000"):
        pmf.PMFDiT.from_pretrained(tmp_path, weights="ema_7")


def test_states_are_found_by_name_beside_other_files(full, state, tmp_path):
    shutil.copy(full, tmp_path / "pMF-B-16-full.zip")
    torch.save({}, tmp_path / "pMF-B-16.pt")
    names = ("pMF-B/16-full:ema_500", "pMF-B-16-full.zip:ema_500")
    for source, weights in ((full, "ema_500"), (full, "pMF-tiny-full:ema_500"), *((tmp_path, name) for name in names)):
        got = pmf.PMFDiT.from_pretrained(source, weights=weights).patch_embed.proj1.bias
        assert np.array_equal(got.detach(), state.ema_params[500]["net"]["x_embedder"]["proj1"]["bias"])
    with pytest.raises(pmf.InputError, match=r"has no 'pMF-L:ema_500', expected an average of it"):
        pmf.PMFDiT.from_pretrained(full, weights="pMF-L:ema_500")


def test_a_state_of_many_devices_is_read_on_one(tmp_path):
    """The authors' sharded training saves jax arrays for a device mesh that this machine does not have."""
    code = f"""
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flax.training import checkpoints
from tests.pmf import flax_network
from tests.networks import TINY
mesh = Mesh(np.array(jax.devices()), ("x",))
place = lambda x: jax.device_put(x, NamedSharding(mesh, P("x") if np.ndim(x) and len(x) % 8 == 0 else P()))
checkpoints.save_checkpoint_multiprocess({str(tmp_path)!r}, jax.tree.map(place, flax_network.trained_state(TINY)), 3)
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)
    assert (tmp_path / "checkpoint_3" / "_sharding").exists()
    got, state = load_train_state(tmp_path), flax_network.trained_state(TINY)
    kernel = state.params["net"]["u_heads_0"]["mlp"]["w1"]["_flax_linear"]["kernel"]
    assert got.step == 3 and np.array_equal(got.model["head_blocks.u.0.mlp.w1.weight"], kernel.T)


def changed(state, change):
    """The state with another tree of parameters: a copy of nested dicts that `change` may alter."""
    params = jax.tree.map(lambda x: x, state.params)
    change(params["net"])
    return state.replace(params=params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net["u_heads_0"].pop("mlp_scale"), "key 'net.u_heads.0.mlp_scale' is missing"),
        (lambda net: net.update(extra=np.ones(1)), "unexpected key 'net.extra'"),
        (lambda net: net["u_final_layer"]["norm"].update(kernel=np.ones(3)), r"must have shape \[32\], got \[3\]"),
        (lambda net: net["y_embedder"]["embedding_table"].update(embedding=np.ones(3)), "embedding of 3 dimensions"),
        (lambda net: net.clear(), "key 'net.class_tokens' is missing, expected a published pMF checkpoint"),
        (lambda net: net.pop("v_final_layer"), "key 'net.v_final_layer.norm.weight' is missing"),
    ],
)
@pytest.mark.parametrize("how", ["orbax", "msgpack"])
def test_a_state_of_another_network_is_refused(state, tmp_path, change, message, how):
    save(tmp_path, changed(state, change), how)
    for read in (lambda: pmf.PMFDiT.from_pretrained(tmp_path, weights="model"), lambda: load_train_state(tmp_path)):
        with pytest.raises(pmf.InputError, match=message) as error:
            read()
        assert "\n" not in str(error.value)


def test_parts_of_different_networks_are_refused(state, tmp_path):
    other = flax_network.trained_state(dataclasses.replace(TINY, num_classes=6))
    save(tmp_path / "a", state.replace(opt_state=other.opt_state))
    save(tmp_path / "b", state.replace(ema_params=other.ema_params))
    for folder in ("a", "b"):
        with pytest.raises(pmf.InputError, match="holds weights, averages and moments of different networks"):
            load_train_state(tmp_path / folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", FORMATS)
def test_torn_states_are_one_line_errors(state, tmp_path, how):
    """The warnings filter is needed because orbax abandons the other reads if one array cannot be read."""

    def refused(source):
        with pytest.raises(pmf.InputError, match="is not a readable JAX train state: ") as error:
            load_train_state(source)
        assert "\n" not in str(error.value) and str(source) in str(error.value)

    folder = save(tmp_path / "state", state, how)
    values = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(("_", ".")))
    largest = max(values, key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello"):
        largest.write_bytes(content)
        refused(folder)
    largest.write_bytes(whole)
    if how != "msgpack":
        (folder / "checkpoint_7" / "_METADATA").write_text("{ torn")
        refused(folder)


def test_another_state_is_refused(tmp_path):
    for how in ("orbax", "msgpack"):
        save(tmp_path / how, {"step": 3, "params": {"w": np.ones(2)}}, how)
        with pytest.raises(pmf.InputError, match="is not a train state of pMF: it has no ema_params, opt_state"):
            pmf.PMFDiT.from_pretrained(tmp_path / how)
    save(tmp_path / "list", [1, 2], "msgpack")
    with pytest.raises(pmf.InputError, match="is not a train state of pMF: it has no step, params"):
        pmf.PMFDiT.from_pretrained(tmp_path / "list")
