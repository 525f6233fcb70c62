"""Pictures in files: which names and formats are pictures, where they lie in a folder, and their pixels as RGB bytes.

All commands read pictures by these functions, so that one rule says what is a picture and what happens to its colours.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from pmf.errors import InputError, require

if TYPE_CHECKING:
    import PIL.Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
"""Pillow's decoders that are used. Others run programs (Ghostscript for PostScript) or are hardly tested."""
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif", ".tif", ".tiff", ".npy"),
)
"""What names of pictures end in, in lower case; .npy holds uint8 [3, H, W], [1, H, W] or [H, W]."""
LITTER = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
LITTER |= {"Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r"}
LITTER |= {
    "__pycache__",
    "@tmp",
    "@Recycle",
    "@Recently-Snapshot",
    "RECYCLER",
    "Network Trash Folder",
    "Temporary Items",
}
LITTER = {name.casefold() for name in LITTER}
"""What systems leave in folders; names that start with a dot are litter too. In any case."""
MAX_SIDE = 16384
"""Largest side of a prepared picture."""
MAX_BYTES = 1 << 30
"""Largest encoded picture."""
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262
FRAMES = "had several frames: only the first is shown"
TRANSPARENCY = "had transparency: shown on white"
ROTATION = "had an EXIF orientation, which is not applied"
DEPTH = "had 16 bits a channel: reduced to 8"
COLOURS = "had CMYK or LAB colours: converted without a profile"


def is_litter(name: str) -> bool:
    """Whether a file or folder of that name is hidden or was left by a system."""
    return name.startswith(".") or name.casefold() in LITTER


def is_picture(name: str) -> bool:
    """Whether a file of that name is taken for a picture."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def walk(root: Path, above: tuple[str, ...] = ()) -> Iterator[os.DirEntry]:
    """Yield the files below a folder, sorted by name; litter is left out.

    Links are followed, except to folders that lie above them or were entered before: no file comes twice.
    Errors: `OSError` if a folder cannot be listed.
    """
    yield from _walk(str(root), above or (os.path.realpath(root),), {os.path.realpath(root)})


def _walk(place: str, above: tuple[str, ...], seen: set[str]) -> Iterator[os.DirEntry]:
    with os.scandir(place) as listing:
        entries = sorted((entry for entry in listing if not is_litter(entry.name)), key=lambda entry: entry.name)
    for entry in sorted(entries, key=os.DirEntry.is_symlink):  # a folder's own place comes before links to it
        if not is_folder(entry):
            yield entry
            continue
        target = os.path.realpath(entry.path)
        if target not in seen and not leads_up(target, above):
            seen.add(target)
            yield from _walk(entry.path, (*above, target), seen)


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one; one to itself leads nowhere, as a broken one does."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def leads_up(target: str, above: tuple[str, ...]) -> bool:
    """Whether a folder, a real path, is one of these or lies above one of them."""
    return any(os.path.commonpath((target, place)) == target for place in above)


@contextlib.contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file. Errors: `InputError` if it is no file or a huge one; `OSError`."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else opening a pipe would wait for its writer
    try:
        state = os.fstat(handle)
        require(stat.S_ISREG(state.st_mode), "it is a pipe, a device or a folder, not a file")
        require(state.st_size <= MAX_BYTES, f"it has {state.st_size:,} bytes, expected at most {MAX_BYTES:,}")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def read_file(path: str | Path) -> bytes:
    """The bytes of a file. Errors: see `open_file`."""
    with open_file(path) as file:
        return file.read()


@functools.cache
def _pillow() -> ModuleType:
    from PIL import Image

    Image.init()  # registers the decoders; opening by `formats` alone does not
    # `checked_size` refuses what Pillow would only warn of, picture by picture.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image


def open_picture(data: bytes | BinaryIO) -> PIL.Image.Image:
    """Open an encoded picture without decoding it.

    Errors: `InputError` if it is none of FORMATS, has no pixels, or declares more than Pillow's MAX_IMAGE_PIXELS.
    """
    pillow = _pillow()
    try:
        picture = pillow.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)
    except pillow.UnidentifiedImageError:
        raise InputError(f"it is not a picture, expected {', '.join(FORMATS)} or npy") from None
    except pillow.DecompressionBombError:
        raise InputError(f"it has too many pixels, expected at most {pillow.MAX_IMAGE_PIXELS:,}") from None
    checked_size(*picture.size)
    return picture


def checked_size(width: int, height: int) -> None:
    """Raise `InputError` if a picture of that size has no pixels or more than Pillow's MAX_IMAGE_PIXELS."""
    limit = _pillow().MAX_IMAGE_PIXELS or math.inf
    fits = width > 0 and height > 0 and width * height <= limit
    require(fits, f"it has {width} x {height} pixels, expected at least one and at most {limit:,}")


def read_picture(data: bytes, note: Callable[[str], object] = lambda lost: None) -> PIL.Image.Image:
    """The pixels of a picture, encoded by one of FORMATS or npy, as RGB. `note`: see `to_rgb`.

    Errors: `InputError` says what is wrong with it; decoders may raise anything on torn pictures.
    """
    return to_rgb(opened(data), note)


def opened(data: bytes) -> PIL.Image.Image:
    """A picture, encoded by one of FORMATS or npy, as it is. Errors: see `open_picture` and `from_npy`."""
    return from_npy(data) if data.startswith(b"\x93NUMPY") else open_picture(data)


def from_npy(data: bytes) -> PIL.Image.Image:
    """The picture in an npy file of uint8 [3, H, W], [1, H, W] or [H, W]. Errors: `InputError` for anything else."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    require(version in ((1, 0), (2, 0)), f"npy has version {version}, expected 1.0 or 2.0")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    plane = shape[1:] if len(shape) == 3 and shape[0] in (1, 3) else shape
    whole = dtype == np.uint8 and len(plane) == 2
    require(whole, f"npy holds {dtype} {list(shape)}, expected uint8 [3, H, W], [1, H, W] or [H, W]")
    checked_size(plane[1], plane[0])
    body = data[file.tell() :]
    count = int(np.prod(shape, dtype=np.int64))
    require(len(body) == count, f"npy holds {len(body)} bytes of pixels, its header declares {count}")
    array = np.frombuffer(body, np.uint8).reshape(shape, order="F" if fortran else "C")
    array = array.transpose(1, 2, 0) if array.ndim == 3 else array[..., None]
    return _pillow().fromarray(np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))))


def to_rgb(picture: PIL.Image.Image, note: Callable[[str], object] = lambda lost: None) -> PIL.Image.Image:
    """A picture as RGB: 8-bit RGB, grey and palette colours as Pillow converts them, 16 bits reduced to 8.

    Transparent pixels are laid on white. Of several frames the first is taken, an EXIF orientation is not applied
    (Pillow applies that of a TIFF), and colour profiles are not used. `note` is called once with each thing that is
    lost: TRANSPARENCY, FRAMES and so on. Errors: `InputError` for floating-point and 32-bit pixels, whose range is
    unknown, and for the 16-bit forms that Pillow misreads.
    """
    _note_metadata(picture, note)
    deep = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if deep or _has_16_bits(picture):
        note(DEPTH)
        _check_deep(picture, deep)
    if deep:
        values = np.asarray(picture).astype(np.int64)
        return _pillow().fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    known = picture.mode not in ("F", "I") and not picture.mode.startswith(("I;", "F;", "BGR"))
    require(known, f"its pixels are of mode {picture.mode}, whose range is unknown, expected 8 or 16 bits a channel")
    if picture.mode in ("CMYK", "LAB"):
        note(COLOURS)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:
        return layer.convert("RGB")
    note(TRANSPARENCY)
    return _pillow().alpha_composite(_pillow().new("RGBA", layer.size, "white"), layer).convert("RGB")


def _has_16_bits(picture: PIL.Image.Image) -> bool:
    """Whether Pillow will decode 16 bits a channel into 8; ask before it does."""
    given = [tile[3] for tile in getattr(picture, "tile", ())]
    deep_ppm = picture.format == "PPM" and any(isinstance(one, tuple) and one[-1] > 255 for one in given)
    return deep_ppm or (picture.mode != "I" and any(";16" in str(one) for one in given))


def _check_deep(picture: PIL.Image.Image, grey: bool) -> None:
    """Refuse 16-bit pictures whose pixels would come out wrong: Pillow ignores what says how to read them."""
    opaque = "transparency" not in picture.info
    require(opaque, "it marks a 16-bit colour as transparent, expected an alpha channel")
    tags = getattr(picture, "tag_v2", {}) if grey else {}
    plain = tuple(tags.get(BITS, (16,))) == (16,) and tags.get(PHOTOMETRIC, 1) == 1
    require(plain, "it is a TIFF of 12 bits or with white as 0, expected 8 or 16 bits with black as 0")


def _note_metadata(picture: PIL.Image.Image, note: Callable[[str], object]) -> None:
    """Note what the file holds besides the pixels that will be read; call it before they are decoded."""
    if "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) not in (0, 1):
        note(ROTATION)
    if picture.format == "TIFF":
        if getattr(picture, "n_frames", 1) > 1:
            note(FRAMES)
    elif picture.format != "MPO" and getattr(picture, "is_animated", False):  # an MPO is a photograph with previews
        note(FRAMES)
