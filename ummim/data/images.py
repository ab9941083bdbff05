"""From the bytes of an image file to RGB pixels: one set of rules for building and for reading.

* The EXIF orientation is applied.
* Transparent pixels (RGBA, LA, palette with transparency) are composited on white.
* 16-bit grey is reduced to 8 bits (value // 256); grey, palette, CMYK and others become RGB as Pillow has it.
* Of an animation, the first frame counts.
* Images above Pillow's decompression-bomb limit (about 179 million pixels) are refused.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

# What a broken, foreign or oversized file makes Pillow raise.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, Image.DecompressionBombError)


def open_image(data: bytes) -> Image.Image:
    """Read the header of an image file; pixels are decoded later, by ``to_rgb``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large or oddly tagged images: what matters is raised
        return Image.open(io.BytesIO(data))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode ``image`` in full and apply the rules above; the result has mode RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # I;16, I;16B, and I as PNG and PGM use it
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


def reason(error: BaseException) -> str:
    """Pillow's complaint in one line, without the address of a buffer."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow knows"
    return f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
