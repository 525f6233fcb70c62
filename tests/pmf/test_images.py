import json

import numpy as np
import pytest
import torch
from PIL import Image

import pmf
from pmf.images import save_grid, to_bytes, to_float
from pmf.train.export import save_loss_curve


def test_bytes_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.7, 2 * 100.6 / 255 - 1])
    assert to_bytes(values).tolist() == [0, 0, 128, 255, 255, 101]
    assert torch.equal(to_bytes(values.bfloat16()), to_bytes(values.bfloat16().float()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_images_of_every_accepted_dtype_become_float32(dtype):
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8)
    images = to_float(pixels) if dtype == torch.uint8 else to_float(to_float(pixels).to(dtype))
    assert images.dtype == torch.float32 and torch.equal(to_bytes(images), pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_images_row_by_row(tmp_path, channels):
    images = torch.stack([torch.full((channels, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    save_grid(tmp_path / "deep" / "grid.png", images, columns=2, min_side=4)
    array = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert array.shape == ((10, 10) if channels == 1 else (10, 10, 3))
    assert (array[:4, :4] == 0).all() and (array[:4, 6:] == 128).all() and (array[6:, :4] == 255).all()
    assert (array[4:6] == 255).all()


def test_loss_curve_is_a_picture_even_of_one_step(tmp_path):
    for count in (1, 50):
        save_loss_curve(tmp_path / "loss.png", list(range(count)), {"u": [1.0] * count, "v": [2.0] * count})
        assert Image.open(tmp_path / "loss.png").size[0] > 500


def test_unwritable_pictures_are_one_line_errors(tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(pmf.InputError, match="path: cannot write"):
        save_grid(tmp_path / "file" / "x.png", torch.zeros(1, 1, 8, 8), columns=1)
