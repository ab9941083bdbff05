"""From the bytes of an image file to RGB pixels: one set of rules for building and for reading.

* The EXIF orientation is applied.
* Transparent pixels (RGBA, LA, palette with transparency) are composited on white.
* 16-bit grey is reduced to 8 bits (value // 256); grey, palette, CMYK and others become RGB as Pillow has it.
* Pixels of 32 bits, floats or integers, are refused: whether white is 1, 255 or 2**31 is nowhere told.
* Of an animation, the first frame counts.
* Images above Pillow's decompression-bomb limit (about 179 million pixels) are refused.
* Only the formats in ``FORMATS`` are tried, whatever a file's name: Pillow knows many more, some of them by running
  other programs (EPS).

Upright JPEGs in grey or YCbCr, which is nearly all of them, do not go through Pillow: libjpeg-turbo, which Pillow
calls too, decodes them straight into an array in two thirds of the time, to the same pixels; of a crop, where it can,
only that. What it finds fault with, it leaves to Pillow.
"""

import io
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, ImageOps
from PIL.BmpImagePlugin import BmpImageFile, DibImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ummim.data.turbojpeg import turbojpeg

try:
    from PIL.AvifImagePlugin import AvifImageFile
except ImportError:  # before Pillow 11.3
    _RECENT: tuple[type[ImageFile.ImageFile], ...] = ()
else:
    _RECENT = (AvifImageFile,)

_READERS: tuple[type[ImageFile.ImageFile], ...] = (
    JpegImageFile,
    PngImageFile,
    WebPImageFile,
    BmpImageFile,
    DibImageFile,
    GifImageFile,
    TiffImageFile,
    PpmImageFile,
    Jpeg2KImageFile,
    *_RECENT,
)
FORMATS = tuple(str(reader.format) for reader in _READERS)  # a JPEG with pictures behind it (MPO) is opened as JPEG

# What a broken, foreign or oversized file makes Pillow raise.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, Image.DecompressionBombError)

START = b"\xff\xd8"  # of a JPEG
APP1, SCAN = 0xE1, 0xDA  # markers in a JPEG: EXIF or XMP, which may turn the picture, and its data


def open_image(data: bytes) -> Image.Image:
    """Read the header of an image file; pixels are decoded later, by ``to_rgb``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large or oddly tagged images: what matters is raised
        return Image.open(io.BytesIO(data), formats=FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode ``image`` in full and apply the rules above; the result has mode RGB."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("pixels of 32 bits have no known range: convert them to 8 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # I;16, I;16B, and I as PGM uses it
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    """RGB image from the bytes of a file.

    Raises:
        ValueError: the bytes are no image, or a broken one; the message is Pillow's reason.
    """
    try:
        return to_rgb(open_image(data))
    except UNREADABLE as error:
        raise ValueError(reason(error)) from None


class Pixels:
    """The pixels of ``decode(data)``, and parts of them, faster. Its size is known before they are decoded.

    Here and in its methods, ``ValueError`` is raised where ``decode`` does.
    """

    def __init__(self, data: bytes) -> None:
        self._data, size = data, _plain_jpeg_size(data)
        self._decoded: np.ndarray | None = None  # (H, W, 3)
        if size is None:
            self._decoded = np.array(decode(data))
            size = self._decoded.shape[0], self._decoded.shape[1]
        self.height, self.width = size

    def whole(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        if self._decoded is None:
            try:
                self._decoded = simplejpeg.decode_jpeg(self._data)
            except ValueError:
                self._decoded = np.array(decode(self._data))
                if self._decoded.shape[:2] != (self.height, self.width):
                    raise ValueError("its header tells two sizes") from None
        return self._decoded

    def part(self, left: int, top: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8: a rectangle that lies in the picture."""
        turbo = turbojpeg() if self._decoded is None else None
        pixels = None if turbo is None else turbo.part(self._data, left, top, width, height)
        return self.whole()[top : top + height, left : left + width] if pixels is None else pixels


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG without oddities, or None where Pillow has to decide what the bytes are."""
    if not data.startswith(START):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    plain = colours in ("YCbCr", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or np.inf)
    return (height, width) if plain and _is_upright(data) else None


def _is_upright(data: bytes) -> bool:
    """Whether a JPEG's header has no EXIF or XMP, or Pillow finds no rotation in it."""
    if not any(marker == APP1 for marker, _, _ in jpeg_segments(data)):
        return True
    try:
        return not is_turned(open_image(data))
    except UNREADABLE:
        return False


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that the picture is to be turned or mirrored."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments of a JPEG's header."""
    at = len(START)
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != SCAN:
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at + 1], at, end
        at = end


def reason(error: BaseException) -> str:
    """Pillow's complaint in one line, without the address of a buffer."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a format that is read"
    return f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
