import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from pmf.errors import InputError
from pmf.images import to_float
from pmf.metrics import Statistics, frechet_distance
from pmf.train.data.by_name import open_data
from pmf.train.demo import photographs
from pmf.train.demo.image_sets import PHOTOGRAPHS, _file
from pmf.train.demo.scores import area_colours, evaluate_photographs, grey_structure, photograph_classifier
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
    photographs.cache_clear()
    assert torch.equal(photographs(32)[0].images, train.images)


@pytest.mark.parametrize(
    ("part", "place", "window"),
    [(1, 0, (45, 0, 45 + 225, 225)), (0, -1, (45 + 15, 15, 345, 300))],
)
def test_a_crop_is_a_window_of_its_photograph(part, place, window):
    """The photograph has 451 x 300 pixels and its square starts at column 45. The first crop, held out, is 0.75 of the
    square in one corner; the last, for training, is 0.95 of it in the opposite corner.
    """
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
    monkeypatch.setitem(PHOTOGRAPHS, "cat", ("skimage", "data/dog.png", 0.5))
    with pytest.raises(InputError, match=r"the installed skimage lacks data/dog.png"):
        _file("cat")
    monkeypatch.setitem(PHOTOGRAPHS, "cat", ("no_such_package", "a.png", 0.5))
    with pytest.raises(InputError, match=r"need scikit-image, pip install 'pixel-meanflow\[data\]'"):
        _file("cat")


def test_the_classifier_names_held_out_crops_whatever_their_colour():
    _, held_out = photographs(32)
    classifier = photograph_classifier(32)
    assert classifier.score(grey_structure(held_out.images).numpy(), held_out.labels.numpy()) > 0.97
    grey = to_float(held_out.images).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert classifier.score(grey_structure(0.3 * grey + 0.5).numpy(), held_out.labels.numpy()) > 0.97
    patches = area_colours(held_out.images).view(-1, 3, 64)[
        :, :, torch.randperm(64, generator=torch.Generator().manual_seed(0))
    ]
    assert classifier.score(grey_structure(patches.view(-1, 3, 8, 8)).numpy(), held_out.labels.numpy()) < 0.5


def test_the_scale_of_the_distances():
    train, held_out = (area_colours(part.images) for part in photographs(32))
    some = train.view(10, 540, 192)[:, ::11].flatten(0, 1)
    means = train.view(10, 540, 192).mean(1).repeat_interleave(50, 0)
    noise = area_colours(torch.randn(500, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    real = Statistics.of(held_out)
    for features, distance, spread in ((some, 0.27, 0.03), (means, 5.2, 0.1), (noise, 51, 1)):
        assert frechet_distance(Statistics.of(features), real) == pytest.approx(distance, abs=spread)


class Copier(torch.nn.Module):
    """Returns real training crops of each label's class, shifted by `shift` classes."""

    def __init__(self, shift):
        super().__init__()
        self.template = random_model()
        self.config = self.template.config.__class__(image_size=32, patch_size=32, num_classes=10)
        self.shift = shift
        self.held_weights = contextlib.nullcontext

    def predict_dual(self, z, h, omega, t_min, t_max, y, *, heads):
        from pmf.pair import Dual

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
