import io
import logging
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from pmf import pictures
from pmf.errors import InputError
from pmf.features import find_images, images_of
from pmf.images import centre_crop

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([GREY, GREY * 2, GREY * 3], axis=-1)
RGB = Image.fromarray(COLOUR)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png16(kind, channels):
    """A PNG of 16-bit pixels 1000 i, of a colour kind that Pillow cannot write."""
    raw = b"".join(b"\0" + (np.arange(8 * channels, dtype=">u2") * 1000).tobytes() for _ in range(8))
    parts = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def read(data):
    """(pixels [H, W, 3], what was lost)."""
    lost = []
    return np.asarray(pictures.read_picture(data, lost.append)), lost


def adm(picture, size):
    """The crop as ADM's script has it."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.BOX)
    scale = size / min(*picture.size)
    pixels = np.array(
        picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.BICUBIC).convert("RGB")
    )
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("side", [(8, 8), (37, 50), (64, 20), (9, 31)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_the_published_crop_is_bit_equal_for_8_bit_pictures(side, mode):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*side, 3), np.uint8))
    picture = noise.quantize(32) if mode == "P" else noise.convert(mode)
    lost = []
    got = np.asarray(centre_crop(picture, 8, lost.append))
    assert np.array_equal(got, adm(picture.convert("RGB"), 8)) and lost == []


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind):
    values = np.array([[0, 128, 129, 257], [1000, 30000, 65407, 65535]], np.uint16)
    pixels, lost = read(encoded(Image.fromarray(values), kind))
    assert np.array_equal(pixels[..., 1], np.round(values / 257)) and lost == [pictures.DEPTH]


@pytest.mark.parametrize(("kind", "channels", "lost"), [(2, 3, []), (4, 2, [pictures.TRANSPARENCY])])
def test_16_bit_colours_are_named(kind, channels, lost):
    assert read(png16(kind, channels))[1] == [pictures.DEPTH, *lost]


@pytest.mark.parametrize("pixels", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(pixels):
    with pytest.raises(InputError, match=r"mode [FI], whose range is unknown, expected 8 or 16 bits"):
        read(encoded(Image.fromarray(GREY.astype(pixels)), "TIFF"))


def tiff(bits, photometric):
    """A TIFF of 8 x 8 grey pixels, all bits set, without compression."""
    data = b"\xff" * (8 * bits)
    tags = (256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 8), (279, len(data))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_16_bit_forms_that_pillow_misreads_are_refused():
    assert read(tiff(16, 1))[0].min() == 255 and read(tiff(8, 0))[0].max() == 0
    for bits, photometric in [(12, 1), (16, 0)]:
        with pytest.raises(InputError, match="TIFF of 12 bits or with white as 0, expected 8 or 16 bits"):
            read(tiff(bits, photometric))
    for kind, channels in [(0, 1), (2, 3)]:
        chunk = b"tRNS" + struct.pack(f">{channels}H", *range(0, 1000 * channels, 1000))
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = png16(kind, channels)
        with pytest.raises(InputError, match="marks a 16-bit colour as transparent, expected an alpha channel"):
            read(data[:33] + chunk + data[33:])


def test_16_bit_ppm_is_named():
    assert read(b"P6 8 8 65535\n" + bytes(384))[1] == [pictures.DEPTH]
    assert read(b"P6 8 8 100\n" + bytes(192))[1] == []


def test_transparent_pixels_become_white_whatever_says_that_they_are_transparent():
    alpha = np.where(GREY < 32, 0, 255).astype(np.uint8)
    clear = np.broadcast_to(GREY < 32, (3, 8, 8)).transpose(1, 2, 0)
    rgba = Image.fromarray(np.dstack([COLOUR, alpha]))
    la = rgba.convert("LA")
    palette = RGB.quantize(8)
    one = palette.getpixel((0, 0))
    for data in (encoded(rgba, "PNG"), encoded(la, "PNG"), encoded(rgba, "WEBP", lossless=True), encoded(rgba, "TIFF")):
        pixels, lost = read(data)
        assert (pixels[clear] == 255).all() and (pixels[~clear] < 255).any() and lost == [pictures.TRANSPARENCY]
    for kind in ("PNG", "GIF"):
        pixels, lost = read(encoded(palette, kind, transparency=one))
        assert (pixels[np.asarray(palette) == one] == 255).all() and lost == [pictures.TRANSPARENCY]
    pixels, lost = read(encoded(RGB, "PNG", transparency=(1, 2, 3)))
    assert pixels[0, 1].tolist() == [255] * 3 and np.array_equal(pixels[1:], COLOUR[1:])
    half = np.dstack([np.zeros_like(COLOUR), np.full((8, 8), 128, np.uint8)])
    assert (read(encoded(Image.fromarray(half), "PNG"))[0] == 127).all()


def test_an_opaque_alpha_channel_loses_nothing():
    pixels, lost = read(encoded(Image.fromarray(np.dstack([COLOUR, np.full_like(GREY, 255)])), "PNG"))
    assert np.array_equal(pixels, COLOUR) and lost == []


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_is_taken(kind):
    options = dict(lossless=True) if kind == "WEBP" else {}
    other = Image.fromarray(255 - COLOUR)
    pixels, lost = read(encoded(RGB, kind, save_all=True, append_images=[other], **options))
    assert lost == [pictures.FRAMES]
    assert np.abs(pixels.astype(int) - COLOUR).max() < (64 if kind == "GIF" else 1)


def test_orientation_and_colours_without_a_profile_are_named():
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = 6
    assert read(encoded(RGB, "PNG", exif=exif))[1] == [pictures.ROTATION]
    assert read(encoded(RGB.convert("CMYK"), "JPEG"))[1] == [pictures.COLOURS]
    assert read(encoded(RGB, "MPO", save_all=True, append_images=[RGB]))[1] == []


@pytest.mark.parametrize(
    "array", [COLOUR.transpose(2, 0, 1), GREY, GREY[None], np.asfortranarray(COLOUR.transpose(2, 0, 1))]
)
def test_npy_of_bytes_is_a_picture(array):
    wide = np.broadcast_to(array, (3, 8, 8)) if array.ndim < 3 or len(array) == 1 else array
    assert np.array_equal(read(npy(array))[0].transpose(2, 0, 1), wide)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (GREY.astype(np.float32), r"npy holds float32 \[8, 8\], expected uint8 \[3, H, W\]"),
        (COLOUR, r"npy holds uint8 \[8, 8, 3\]"),
        (np.zeros((3, 8, 0), np.uint8), "has 0 x 8 pixels"),
        (np.array([{}], dtype=object), "npy holds object"),
        (np.zeros(4, np.uint8), r"npy holds uint8 \[4\]"),
    ],
)
def test_other_npy_is_refused(array, message):
    with pytest.raises(InputError, match=message):
        read(npy(array))


def test_declared_sizes_are_checked_before_memory_is_taken(monkeypatch, recwarn):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=(3, 10**6, 10**6)))
    with pytest.raises(InputError, match="1000000 x 1000000 pixels, expected at least one and at most"):
        read(header.getvalue())
    with pytest.raises(InputError, match="npy holds 3 bytes of pixels, its header declares 192"):
        read(npy(COLOUR.transpose(2, 0, 1))[:131])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    for limit in (40, 20):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=r"pixels, expected at .*most"):
            read(encoded(RGB, "PNG"))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"has 2048000 x 256 pixels, expected at least one and at most"):
        centre_crop(Image.new("RGB", (8000, 1)), 256)


def test_a_large_picture_does_not_warn(tmp_path):
    file = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000)).save(file)
    code = f"from pmf.pictures import *; read_picture(read_file({str(file)!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("pmf.errors.InputError: it has 10000 x 10000 pixels")
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "ICO"])
def test_only_the_listed_decoders_are_asked(kind):
    with pytest.raises(InputError, match=r"^it is not a picture, expected PNG, JPEG, .* or npy$"):
        read(encoded(RGB, kind))


@pytest.fixture
def tree(tmp_path):
    """Pictures among litter, and links up, down and elsewhere."""
    root = tmp_path / "up" / "root"
    data = encoded(RGB, "PNG")
    inside = ("a/1.png", "a/b/2.PNG", "c.gif", "a/._1.png", "__MACOSX/a/3.png", ".ipynb_checkpoints/4.png")
    for name in (*inside, "@eaDir/5.png", "a/Thumbs.db", "../beside.png", "../../elsewhere/6.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    for name, target in (
        ("a/self", "."),
        ("a/b/top", "../.."),
        ("above", ".."),
        ("a/0", "b"),
        ("x", "../../elsewhere"),
    ):
        (root / name).symlink_to(target)
    (root / "x" / "round").symlink_to(root)
    return root


def test_a_folder_is_walked_once_without_litter_and_links_lead_elsewhere_only(tree):
    found = [file.relative_to(tree).as_posix() for file in find_images(tree)]
    assert found == ["a/1.png", "a/b/2.PNG", "c.gif", "x/6.png"]


@pytest.mark.parametrize("kind", ["fifo", "broken", "torn"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    bad = tmp_path / "a.png"
    {"fifo": os.mkfifo, "broken": lambda p: p.symlink_to("nowhere"), "torn": lambda p: p.write_bytes(b"\x89PNG")}[kind](
        bad
    )
    with pytest.raises(InputError, match=r"^files: .*a.png is not a readable picture: [^\n]+$"):
        list(images_of(find_images(tmp_path))(range(1)))
    with pytest.raises((InputError, OSError)):
        pictures.read_picture(pictures.read_file("/dev/zero"))


def test_without_pillows_limit_any_size_is_taken(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    pictures.checked_size(10**9, 10**9)
    with pytest.raises(InputError, match="it has 0 x 8 pixels"):
        pictures.checked_size(0, 8)


def test_a_loss_is_warned_of_once_a_kind(tmp_path, caplog):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(RGB.convert("LA"), "PNG"))
        (tmp_path / f"{number}.tif").write_bytes(encoded(Image.fromarray(GREY.astype(np.uint16)), "TIFF"))
    caplog.set_level(logging.WARNING)
    source = images_of(find_images(tmp_path))
    assert sum(len(group) for span in (range(3), range(3, 6)) for group in source(span)) == 6
    (message,) = [record.getMessage() for record in caplog.records]
    assert "0.tif had 16 bits a channel: reduced to 8; other pictures may be the same" in message


@pytest.mark.parametrize(
    "name", ["__pycache__", "@tmp", "$Recycle.Bin", "desktop.ini", "Desktop.ini", "lost+found", ".a"]
)
def test_what_systems_leave_is_litter_in_any_case(name):
    assert pictures.is_litter(name) and not pictures.is_litter(f"my {name}")
