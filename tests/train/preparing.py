"""Pictures, sources of them, and preparations, for tests."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image

from pmf.images import centre_crop

CLASSES = ("ant", "bee", "cat")


def picture(number, side=20):
    noise = np.random.default_rng(number).integers(0, 256, (side, side + 4, 3), np.uint8)
    return Image.fromarray(noise)


def encoded(number, kind="PNG", **size):
    buffer = io.BytesIO()
    picture(number, **size).save(buffer, kind)
    return buffer.getvalue()


def expected(number, size=8):
    return torch.from_numpy(np.array(centre_crop(picture(number), size))).permute(2, 0, 1)


def holds_all(data, skipped=()):
    numbers = [n for n in range(21) if n not in skipped]
    assert len(data) == len(numbers) and data.image_shape == (3, 8, 8) and data.num_classes == 3
    for index, number in enumerate(numbers):
        image, label = data.read(index)
        assert torch.equal(image, expected(number)) and label == number // 7
        assert image.dtype == torch.uint8


def config(folder, out, **changes):
    from pmf.train.data.prepare import PrepareConfig  # needs the extra `data`

    return PrepareConfig(**(dict(source=f"folder:{folder}", out=out, size=8, shard_images=5, workers=0) | changes))


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def tar(file, entries):
    with tarfile.open(file, "w") as archive:
        for name, data in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file


def fill(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(number))
    return root


def run(source, out, **changes):
    from pmf.train.data.prepare import PrepareConfig, prepare  # needs the extra `data`

    return prepare(PrepareConfig(**(dict(source=str(source), out=out, size=8, shard_images=3, workers=1) | changes)))


def tar_pair(number):
    return [(f"{number}.png", encoded(number)), (f"{number}.cls", b"%d" % (number % 2))]
