"""Hub repositories, through huggingface_hub's client and a local hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pmf
from pmf.weights import save_model
from tests.networks import TINY, golden, random_model
from tests.pmf.hub_server import serve

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).parents[2]

# Runs in a separate process: the client reads its settings when it is imported.
CODE = """
import json, sys
import pmf
for source, weights in json.loads(sys.argv[1]):
    try:
        model = pmf.PMFDiT.from_pretrained(source, weights=weights)
        print(json.dumps(float(model.patch_embed.proj1.bias.double().sum())))
    except pmf.InputError as error:
        print(json.dumps(str(error)))
"""


def load(cache, address, *calls):
    """Result of each call of from_pretrained: the sum of one loaded parameter, or the error."""
    environment = dict(os.environ, HF_ENDPOINT=address, HF_HOME=str(cache), HF_HUB_DISABLE_PROGRESS_BARS="1")
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", CODE, json.dumps(calls)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Repositories like the authors' and like a run of ours."""
    root = tmp_path_factory.mktemp("hub")
    theirs, ours = root / "someone" / "pMF", root / "someone" / "run"
    for folder in (theirs, ours):
        folder.mkdir(parents=True)
    for place, name in enumerate(("pMF-B-16", "pMF-B-32", "pMF-H-16")):
        torch.save(shifted(place), theirs / f"{name}.pt")
        for rest in (".zip", "-full.zip"):
            (theirs / f"{name}{rest}").write_bytes(b"a state of JAX")
    (theirs / "imagenet_256_fid_stats.npz").write_bytes(b"statistics")
    (theirs / "README.md").write_text("# pMF")
    for place, name in enumerate(("model", "ema_500", "ema_1000")):
        save_model(ours / f"{name}.safetensors", TINY, random_model(seed=place, dtype=torch.float32).state_dict())
    (ours / "config.json").write_text(json.dumps(dict(sampling_weights="ema_1000")))
    (root / "someone" / "one").mkdir()
    save_model(root / "someone" / "one" / "weights.safetensors", TINY, random_model(dtype=torch.float32).state_dict())
    return root


def shifted(place):
    """The golden state dict plus `place`; for place 1 without the prefix of names."""
    state = {name: value + place for name, value in golden().state.items()}
    return {name.removeprefix("net."): value for name, value in state.items()} if place == 1 else state


def ours(seed):
    return random_model(seed=seed, dtype=torch.float32).patch_embed.proj1.bias.double().sum().item()


def theirs(place):
    return shifted(0)["net.x_embedder.proj1.bias"].add(place).double().sum().item()


def test_the_authors_files_are_found_by_name(root, tmp_path):
    repository = "someone/pMF"
    with serve(root) as (address, loaded):
        names = ["pMF-B-16", "pMF-B/16", "pMF-B/32", "pMF-H-16.pt"]
        assert load(tmp_path, address, *((repository, name) for name in names)) == [theirs(i) for i in (0, 0, 1, 2)]
        assert loaded == ["pMF-B-16.pt", "pMF-B-32.pt", "pMF-H-16.pt"]  # each once, and nothing else
        held = ", ".join(sorted(f"pMF-{n}{e}" for n in ("B-16", "B-32", "H-16") for e in (".pt", ".zip", "-full.zip")))
        several, unknown, plain, torn = load(
            tmp_path,
            address,
            (repository, None),
            (repository, "pMF-G/16"),
            (repository, "pMF-B-16:ema_500"),
            (repository, "pMF-B-16-full:ema_1000"),
        )
        assert several == f"weights: someone/pMF holds several networks, expected one of {held}"
        assert unknown == f"weights: someone/pMF has no 'pMF-G/16', expected one of {held}"
        assert plain.endswith("pMF-B-16.pt holds one network, got 'ema_500' of it")
        assert "pMF-B-16-full.zip is not a readable zip: " in torn and "\n" not in torn
        assert loaded[3:] == ["pMF-B-16-full.zip"]


def test_runs_of_ours_have_a_choice_of_their_own(root, tmp_path):
    calls = [("someone/run", name) for name in (None, "model", "ema_500.safetensors")] + [("someone/one", None)]
    with serve(root) as (address, loaded):
        assert load(tmp_path, address, *calls) == [ours(2), ours(0), ours(1), ours(0)]
    names = ["config.json", "ema_1000.safetensors", "model.safetensors", "ema_500.safetensors", "weights.safetensors"]
    assert loaded == names


def test_without_the_hub_its_cache_serves(root, tmp_path):
    with serve(root) as (address, _):
        load(tmp_path, address, ("someone/pMF", "pMF-B-16"), ("someone/run", None))
        (unknown,) = load(tmp_path, address, ("someone/nothing", None))
        assert unknown.startswith("source: someone/nothing is not a local path and the hub did not serve it: 404")
    calls = [("someone/pMF", "pMF-B/16"), ("someone/run", None), ("someone/pMF", "pMF-H-16"), ("someone/one", None)]
    first, second, uncached, nothing = load(tmp_path, address, *calls)
    assert (first, second) == (theirs(0), ours(2))
    assert "has no 'pMF-H-16', expected one of pMF-B-16.pt" in uncached
    assert nothing.startswith("source: someone/one is not a local path and the hub did not serve it: ")


def test_local_directories_name_files_alike(root):
    place = root / "someone" / "pMF"
    for name in ("pMF-B-32", "pMF-B/32", "pMF-B-32.pt"):
        model = pmf.PMFDiT.from_pretrained(place, weights=name)
        assert model.patch_embed.proj1.bias.double().sum().item() == theirs(1)
    with pytest.raises(
        pmf.InputError, match=r"pMF holds several networks, expected one of pMF-B-16-full.zip, pMF-B-16"
    ):
        pmf.PMFDiT.from_pretrained(place)
    with pytest.raises(pmf.InputError, match=r"has no 'pMF-G', expected one of pMF-B-16-full.zip, pMF-B-16.pt, "):
        pmf.PMFDiT.from_pretrained(place, weights="pMF-G")
    with pytest.raises(pmf.InputError, match=r"has no '../run/model', expected one of"):
        pmf.PMFDiT.from_pretrained(place, weights="../run/model")
    file = place / "pMF-B-32.pt"
    for name in (None, "pMF-B-32", "pMF-B-32.pt"):
        assert pmf.PMFDiT.from_pretrained(file, weights=name).config == golden().config
    with pytest.raises(pmf.InputError, match=r"pMF-B-32.pt holds one network, got 'ema_500' of it"):
        pmf.PMFDiT.from_pretrained(file, weights="ema_500")
