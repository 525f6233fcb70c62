"""What is read for a batch, in the caller's process or in a worker: checked images, checked labels, or one error."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info

from pmf.data.training_data import DTYPES, CorruptImageError, TrainingData
from pmf.errors import InputError, first_line, require


class Batch(NamedTuple):
    """A batch before it is scaled and moved."""

    images: Tensor | None
    """uint8, float32 or float64 [n, c, H, W]; None if an image and those after it are unreadable, or with an error."""
    labels: Tensor
    """int64 [n]."""
    unreadable: list[CorruptImageError]
    """The images that others replace."""
    error: tuple[str, BaseException] | None = None
    """What ended the batch, in one line, and its cause."""


@dataclass(frozen=True)
class Reader(Dataset):
    """Reads batches of training data. Whatever is raised while a batch is read becomes its `error`."""

    data: TrainingData
    length: int
    shape: tuple[int, ...]
    classes: int
    max_corrupt: int

    @staticmethod
    def of(data: TrainingData, max_corrupt: int) -> Reader:
        """A reader of these data. Errors: `InputError` if they have no length, shape or number of classes."""
        length = _asked("len(data)", lambda: len(data))
        require(length > 0, "data: expected at least one image, got none")
        shape = _asked("image_shape", lambda: tuple(map(operator.index, data.image_shape)))
        classes = _asked("num_classes", lambda: operator.index(data.num_classes))
        return Reader(data, length, shape, classes, max_corrupt)

    def __getitems__(self, items: list[tuple[int, bool]]) -> Batch:
        """Read the images with these indices, mirrored where the second value says so."""
        unreadable: list[CorruptImageError] = []
        try:
            return self._batch(items, unreadable)
        except BaseException as error:
            if get_worker_info() is None and not isinstance(error, Exception):  # Ctrl-C and sys.exit in the caller
                raise
            return Batch(None, torch.empty(0), [], _told(error))

    def _batch(self, items: list[tuple[int, bool]], unreadable: list[CorruptImageError]) -> Batch:
        pairs: list[tuple[Tensor, int]] = []
        for index, mirror in items:
            pair = self._first_readable(index, unreadable)
            if pair is None:
                return Batch(None, torch.empty(0), unreadable)
            if pairs and pair[0].dtype != pairs[0][0].dtype:
                both = f"{pairs[0][0].dtype} and {pair[0].dtype}"
                raise InputError(f"data: image {index}: expected one dtype in a batch, got {both}")
            pairs.append((pair[0].flip(-1) if mirror else pair[0], pair[1]))
        labels = torch.tensor([label for _, label in pairs])
        if get_worker_info() is not None:
            labels.share_memory_()  # here and not when it is sent, where an error would be lost
        return Batch(default_collate([image for image, _ in pairs]), labels, unreadable)

    def _first_readable(self, index: int, unreadable: list[CorruptImageError]) -> tuple[Tensor, int] | None:
        """The image of that index, or the first readable one after it; None if there are too many others before it."""
        for position in range(index, index + min(self.length, self.max_corrupt + 1)):
            place = position % self.length
            try:
                return self._checked(place, self.data.read(place))
            except CorruptImageError as error:
                unreadable.append(
                    CorruptImageError(str(error.key), str(error.reason))
                )  # subclasses may not be picklable
            except InputError:
                raise
            except Exception as error:
                what = f"{type(error).__name__}: {first_line(error)}"
                raise InputError(f"data: image {place} cannot be read: {what}") from error
        return None

    def _checked(self, index: int, item: Any) -> tuple[Tensor, int]:
        """An item of the data. Errors: `InputError` names its index and what was expected."""
        if not (isinstance(item, tuple | list) and len(item) == 2):  # messages are made only where they are needed
            raise InputError(f"data: image {index}: expected read() to give (image, label), got {type(item).__name__}")
        image, label = item
        if not (isinstance(image, Tensor) and image.dtype in DTYPES and image.shape == self.shape and image.is_cpu):
            kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            wanted = f"a tensor uint8, float32 or float64 {list(self.shape)} on the CPU"
            raise InputError(f"data: image {index}: expected {wanted}, got {kind}")
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < self.classes:
            wanted = f"an integer in [0, {self.classes})"
            raise InputError(f"data: label of image {index}: expected {wanted}, got {label!r:.50}")
        if type(image) is not Tensor:  # a worker may not be able to send another type
            image = image.as_subclass(Tensor)
        return image.detach() if image.requires_grad else image, number


def _asked(what: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        raise InputError(f"data: {what} raises {type(error).__name__}: {first_line(error)}") from error


def _told(error: BaseException) -> tuple[str, BaseException]:
    """An error's line and its cause, which a worker can send whatever the cause's type is."""
    line = str(error) if isinstance(error, InputError) else f"data: {type(error).__name__}: {first_line(error)}"
    if "shared memory" in line or "shm" in line:
        line += "; use fewer --workers, or docker run --shm-size=8g or --ipc=host"
    cause = error.__cause__ if isinstance(error, InputError) and error.__cause__ else error
    if get_worker_info() is not None:
        cause = RuntimeError("in a worker:\n" + "".join(traceback.format_exception(cause)))
    return line, cause
