import numpy as np
import pytest
import torch
from PIL import Image

from pmf.errors import InputError
from pmf.train.data import open_data, photographs, to_float
from pmf.train.data.photographs import PHOTOGRAPHS, _file, _photographs
from pmf.train.judge import evaluate_photographs, features, photograph_judge
from tests.networks import random_model

pytest.importorskip("skimage")


def test_photographs_are_ten_classes_split_without_a_shared_crop():
    train, held_out = photographs(32)
    assert train.image_shape == (3, 32, 32) and train.num_classes == 10 and train.classes == tuple(PHOTOGRAPHS)
    assert train.images.dtype == torch.uint8
    assert torch.bincount(train.labels).tolist() == [540] * 10
    assert torch.bincount(held_out.labels).tolist() == [135] * 10
    crops = torch.cat([train.images, held_out.images]).flatten(1)
    assert len(crops.unique(dim=0)) == len(crops)
    _photographs.cache_clear()
    assert torch.equal(photographs(32)[0].images, train.images)


@pytest.mark.parametrize(
    ("part", "place", "window"),
    [(1, 0, (0, 0, 210, 210)), (0, -1, (451 - 270, 300 - 270, 451, 300))],
)
def test_a_crop_is_a_window_of_its_photograph(part, place, window):
    """The first crop is 0.7 of the short side in one corner, held out; the last 0.9 in the other, for training."""
    with Image.open(_file("cat")) as file:
        pixels = np.array(file.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC, box=window))
    parts = photographs(64)
    crops = torch.cat([p.images for p in parts]).float()
    nearest = (crops - torch.from_numpy(pixels).permute(2, 0, 1)).abs().mean(dim=(1, 2, 3)).argmin()
    cats = (parts[part].labels == list(PHOTOGRAPHS).index("cat")).nonzero()[:, 0]
    assert nearest == cats[place] + part * len(parts[0])


def test_photographs_open_by_name():
    data = open_data("photographs", 32)
    image, label = data.read(5399)
    assert image.shape == (3, 32, 32) and label == 9
    with pytest.raises(InputError, match="size: expected 8 to 64 pixels, got 256"):
        photographs(256)


def test_missing_files_are_named(monkeypatch):
    monkeypatch.setitem(PHOTOGRAPHS, "cat", ("skimage", "data/dog.png"))
    with pytest.raises(InputError, match=r"the installed skimage lacks data/dog.png"):
        _file("cat")
    monkeypatch.setitem(PHOTOGRAPHS, "cat", ("no_such_package", "a.png"))
    with pytest.raises(InputError, match=r"need scikit-image, pip install 'pixel-meanflow\[data\]'"):
        _file("cat")


def test_the_judge_names_held_out_crops():
    _, held_out = photographs(32)
    assert photograph_judge(32).score(features(held_out.images).numpy(), held_out.labels.numpy()) > 0.97


class Copier(torch.nn.Module):
    """Answers every label with real training crops of that class, shifted by `shift` classes."""

    def __init__(self, shift):
        super().__init__()
        self.template = random_model()
        self.config = self.template.config.__class__(image_size=32, patch_size=32, num_classes=10)
        self.shift = shift

    def predict_dual(self, z, h, omega, t_min, t_max, y, *, heads):
        from pmf.dual import Dual

        train, _ = photographs(32)
        chosen = [540 * ((c + self.shift) % 10) + 7 * i % 540 for i, c in enumerate(y.tolist())]
        return {"u": Dual(to_float(train.images[chosen]).flatten(2))}

    def to_images(self, tokens):
        return tokens.unflatten(-1, (32, 32))


def test_real_crops_are_close_and_named_rightly_and_wrong_classes_are_not():
    result = evaluate_photographs(Copier(0), omega=1.0, t_min=0.0, t_max=1.0)
    assert result["accuracy"] > 0.99 and result["frechet_distance"] < 1
    assert evaluate_photographs(Copier(3), omega=1.0, t_min=0.0, t_max=1.0)["accuracy"] < 0.01
    with pytest.raises(InputError, match="expected a network for colour images of 10 classes, got 5 classes"):
        network = Copier(0)
        network.config = network.config.__class__(image_size=32, patch_size=32, num_classes=5)
        evaluate_photographs(network, omega=1.0, t_min=0.0, t_max=1.0)
