import numpy as np
import pytest
import torch
from PIL import Image

from pmf.errors import InputError
from pmf.features import Chunks, compute, find_images, images_of
from pmf.metrics import Statistics
from pmf.train.config import ExtractionConfig
from pmf.train.distributed import World, join, leave
from pmf.train.evaluation.reference import compute_together, open_pictures, write_folder_statistics
from pmf.train.evaluation.results import weights_digest
from tests.train.evaluation import ALONE, Toy


def picture(file, size, mode="RGB", seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    white = Image.new("RGBA", size[::-1], "white")
    return Image.alpha_composite(white, Image.open(file).convert("RGBA")).convert("RGB")


def test_a_folder_is_read_to_the_bottom_in_order_and_hidden_files_are_not(tmp_path):
    for name in ("b/1.png", "a/2.JPEG", "a/1.webp", "c.bmp", "a/.hidden.png"):
        picture(tmp_path / name, (4, 4))
    (tmp_path / "notes.txt").write_text("no picture")
    found = [file.relative_to(tmp_path).as_posix() for file in find_images(tmp_path)]
    assert found == ["a/1.webp", "a/2.JPEG", "b/1.png", "c.bmp"]


def test_pictures_come_as_rgb_bytes_at_their_own_size(tmp_path):
    kinds = [((4, 4), "RGB"), ((4, 4), "L"), ((6, 5), "RGBA"), ((4, 4), "RGB")]
    expected = [picture(tmp_path / f"{i}.png", size, mode, i) for i, (size, mode) in enumerate(kinds)]
    groups = list(images_of(find_images(tmp_path))(range(4)))
    assert [tuple(group.shape) for group in groups] == [(2, 3, 4, 4), (1, 3, 6, 5), (1, 3, 4, 4)]
    got = [image for group in groups for image in group]
    for image, wanted in zip(got, expected, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(wanted))


def test_what_is_no_folder_and_no_picture_is_named(tmp_path):
    with pytest.raises(InputError, match=r"^folder: .*nothing does not exist"):
        find_images(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"^folder: .* holds no \.png"):
        find_images(tmp_path)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"^files: .*torn.png is not a readable picture"):
        list(images_of(find_images(tmp_path))(range(1)))


def source(batch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    yield images[batch.start : batch.stop]


def test_chunks_hold_the_features_of_every_image_in_order(tmp_path):
    chunks = Chunks(tmp_path / "chunks", 23, 10)
    compute([(chunks, Toy())], chunks.spans(), source, batch_size=10)
    features, logits = (torch.cat(list(chunks.read(name))) for name in ("features", "logits"))
    expected = [Toy()(next(source(span))) for span in (range(10), range(10, 20), range(20, 23))]
    assert torch.equal(features, torch.cat([f for f, _ in expected]))
    assert torch.equal(logits, torch.cat([part for _, part in expected]))
    whole, merged = Statistics.of(features), chunks.statistics(keep=True)
    assert merged.count == 23 and np.array_equal(merged.features, features.numpy())
    assert np.allclose(merged.mu, whole.mu, rtol=0, atol=23 * np.finfo(float).eps)
    assert chunks.statistics(keep=False).features is None
    chunks.remove()
    with pytest.raises(InputError, match="is missing, expected storage that every process sees"):
        list(chunks.read("features"))


def test_the_processes_share_the_missing_chunks(tmp_path):
    chunks = Chunks(tmp_path, 23, 5)

    class Second(World):
        def broadcast(self, value):
            return value

        def wait(self):
            pass

    compute_together([(chunks, Toy())], chunks.missing(), source, Second(torch.device("cpu"), rank=1, size=2), 5)
    assert [chunks.file(span).is_file() for span in chunks.spans()] == [False, True, False, True, False]
    extractor = Toy()
    compute_together([(chunks, extractor)], chunks.missing(), source, ALONE, 5)
    assert extractor.calls == 3 and all(chunks.file(span).is_file() for span in chunks.spans())


def test_statistics_of_a_folder_continue_where_they_were_interrupted(tmp_path):
    for i in range(11):
        picture(tmp_path / "in" / f"{i:02}.png", (8, 8), seed=i)

    class Interrupted(Toy):
        def forward(self, images):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().forward(images)

    files, four = open_pictures(tmp_path / "in", "folder"), ExtractionConfig(batch_size=4, chunk=4)
    with pytest.raises(KeyboardInterrupt):
        write_folder_statistics(files, tmp_path / "ref.npz", Interrupted(), ALONE, four, keep=True)
    assert not (tmp_path / "ref.npz").exists()
    rest = Toy()
    write_folder_statistics(files, tmp_path / "ref.npz", rest, ALONE, four, keep=True)
    write_folder_statistics(files, tmp_path / "whole.npz", Toy(), ALONE, four, keep=True)
    assert rest.calls == 1
    assert (tmp_path / "ref.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert Statistics.load(tmp_path / "ref.npz").features.shape == (11, 6)
    assert not list(tmp_path.glob(".*"))


def test_a_digest_names_weights_and_names():
    first, second = Toy(), Toy()
    assert weights_digest(first) == weights_digest(second)
    second.second[0, 0] += 1e-6
    assert weights_digest(first) != weights_digest(second)


def test_one_process_is_alone():
    world = join("cpu")
    assert (world.rank, world.size, world.broadcast("mine"), world.main_first(lambda: "own")) == (0, 1, "mine", "own")
    world.wait()
    leave(world)
