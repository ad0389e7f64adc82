"""One image, of any of Pillow's modes, as 8-bit RGB or grey."""

from __future__ import annotations

import io
import os
import stat
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import TrainError

#: What is seen through transparent pixels: white, as viewers and browsers show them.
BACKGROUND = "white"
#: EXIF orientation -> how to turn an image upright; orientation 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: What may stand in place of a regular file, for the error text.
_OTHERS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip
_GREY = ("1", "L", "LA", "La")


class Encoded(NamedTuple):
    """An image file: its name for error texts, and its bytes or its path; None where a row of a table has no image."""

    name: str
    content: bytes | str | None


class UnreadableImage(TrainError):
    """An image could not be decoded; ``name`` is that of its file, ``reason`` says why."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self.reason = one_line(name), " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
            self.reason = "its format is not known"
        super().__init__(f"the image {self.name} could not be read, it may be damaged ({self.reason})")


def decode(encoded: Encoded) -> Image.Image:
    """Decode the first frame of an image file, turned as its EXIF orientation says, in one of two modes: ``L`` where
    its pixels are grey by their mode, ``RGB`` where they are not.

    Palette images become their colours.  Of 16 bits the higher eight are kept.  Transparent images lie on a white
    ``BACKGROUND``.

    Raises:
        UnreadableImage: the file is missing, damaged or no regular one, or its numbers have no defined range:
            floating-point ones, and integers outside 0 to 65535.
    """
    try:
        if encoded.content is None:
            raise ValueError("the row holds no image")
        if isinstance(encoded.content, bytes):
            source = io.BytesIO(encoded.content)
        else:
            source = encoded.content
            if other := no_file(source):  # to open a FIFO may wait for ever
                raise ValueError(f"it must be a regular file, got {other}")
        with Image.open(source) as image:
            image.load()
            if not (image.width and image.height):
                raise ValueError("it has no pixels")
            return plain(_upright(image))
    except Exception as error:  # damaged files make Pillow's decoders raise nearly everything
        raise UnreadableImage(encoded.name, error) from error


def no_file(path: str | os.PathLike[str]) -> str | None:
    """What is there, or where its links lead, instead of a regular file.

    Raises:
        OSError: there is nothing, or it cannot be reached.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    return None if kind == stat.S_IFREG else _OTHERS.get(kind, "something else")


def one_line(name: str) -> str:
    """A file's name for a message: a name may hold line breaks."""
    return name if name.isprintable() else name.encode("unicode_escape", "surrogatepass").decode()


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(image.getexif().get(0x0112))
    except Exception:  # EXIF that does not parse says nothing, and the pixels are there
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    turned.info = image.info
    return turned


def plain(image: Image.Image) -> Image.Image:
    """An image in mode ``L`` or ``RGB``, see :func:`decode`.

    Raises:
        ValueError: its numbers have no defined range.
    """
    if image.mode.startswith("I"):
        return _high_byte(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of no defined range; 8 or 16 bits are expected")
    mode = "L" if image.mode in _GREY else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    # Of what is saved with premultiplied alpha, Pillow converts only to the same channels without.
    image = image.convert({"L": "LA", "RGB": "RGBA"}[mode])
    flat = Image.new(mode, image.size, BACKGROUND)
    flat.paste(image.convert(mode), mask=image.getchannel("A"))
    return flat


def _high_byte(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.size and not (values.min() >= 0 and values.max() <= 65535):
        raise ValueError(f"its pixels are from {values.min()} to {values.max()}; 8 or 16 bits are expected")
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
