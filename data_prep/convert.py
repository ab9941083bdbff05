"""What of an image goes into a shard: its own bytes where possible, a JPEG or PNG otherwise. Every image is decoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import simplejpeg
from PIL import ExifTags, Image

from ummim.data.images import APP1, is_turned, jpeg_segments, open_image, reason, to_rgb

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with pictures behind it
DEFAULT_QUALITY = 95
READER_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 2**62)  # pixels; above it, the loader refuses an image
_MODES = {"Gray": "L", "YCbCr": "RGB", "RGB": "RGB"}


class Stored(NamedTuple):
    """What is stored of an image, and what it was.

    Attributes:
        extension: of the member, without the dot.
        data: bytes to store.
        width, height: pixels of what is stored, upright.
        kind: format and colour mode of the source, "JPEG RGB".
    """

    extension: str
    data: bytes
    width: int
    height: int
    kind: str


@dataclass(frozen=True)
class Conversion:
    """Attributes:
    short_side: images with a larger short side are shrunk to it (bicubic), in pixels; None leaves the size.
    quality: every image becomes a JPEG of this quality; None keeps the bytes of JPEG, PNG and WebP files that
        are not shrunk, stores other formats as PNG, and shrunk images as JPEG of quality 95.
    exif: "keep" leaves the EXIF rotation in the bytes that are kept, for the loader to apply; "bake" turns such
        images and stores them anew (JPEG of quality 95, PNG for other formats); "drop" takes the rotation away, so
        that the picture lies as it is stored (a JPEG loses its EXIF and XMP, its pixels stay). What is encoded
        anyway has no EXIF: the rotation is applied, or with "drop" ignored.
    min_side: images with a smaller side are refused, in pixels.
    max_pixels: images with more pixels are refused before they are decoded.
    """

    short_side: int | None = None
    quality: int | None = None
    exif: Literal["keep", "bake", "drop"] = "keep"
    min_side: int = 1
    max_pixels: int = READER_LIMIT

    @property
    def keeps_bytes(self) -> bool:
        return self.short_side is None and self.quality is None

    def __call__(self, data: bytes) -> Stored:
        """What to store of an image file, after decoding it in full.

        Raises:
            ValueError: ``data`` is no readable image, or too small or too large a one; the message says why.
        """
        size = None if self.quality is not None else _plain_jpeg(data, self.max_pixels)
        if size is not None and not self._shrinks(size.width, size.height):
            self._check_side(size.width, size.height)
            return self._checked(Stored("jpg", data, size.width, size.height, size.kind))
        try:
            return self._checked(self._convert(data))
        except Exception as error:  # a damaged file makes Pillow raise anything
            raise ValueError(reason(error)) from None

    def _convert(self, data: bytes) -> Stored:
        with _no_pixel_limit():
            image = open_image(data)
        if image.width * image.height > self.max_pixels:
            raise ValueError(f"{image.width}x{image.height} pixels are more than {self.max_pixels}")
        self._check_side(*image.size)
        kind = f"{image.format} {image.mode}"
        kept = KEPT.get(image.format or "")
        turned = is_turned(image)
        if turned and self.exif == "drop":
            image.getexif()[ExifTags.Base.Orientation] = 1
        rgb = to_rgb(image)
        shrink = self._shrinks(*rgb.size)
        if kept and not shrink and self.quality is None:
            if not turned or self.exif == "keep":
                return Stored(kept, data, *rgb.size, kind)
            if kept == "jpg":
                data = _without_notes(data) if self.exif == "drop" else _encode(rgb, "JPEG")
                return Stored(kept, data, *rgb.size, kind)
        if shrink and self.short_side is not None:
            scale = self.short_side / min(rgb.size)
            size = (max(round(rgb.width * scale), 1), max(round(rgb.height * scale), 1))
            rgb = rgb.resize(size, Image.Resampling.BICUBIC)
        if shrink or self.quality is not None:
            return Stored("jpg", _encode(rgb, "JPEG", self.quality or DEFAULT_QUALITY), *rgb.size, kind)
        return Stored("png", _encode(rgb, "PNG"), *rgb.size, kind)

    def _shrinks(self, width: int, height: int) -> bool:
        return self.short_side is not None and min(width, height) > self.short_side

    def _check_side(self, width: int, height: int) -> None:
        if min(width, height) < self.min_side:
            raise ValueError(f"{width}x{height} pixels: a side is below {self.min_side}")

    def _checked(self, stored: Stored) -> Stored:
        if stored.width * stored.height > READER_LIMIT:
            raise ValueError(f"{stored.width}x{stored.height} pixels as stored, but the loader reads up to "
                             f"{READER_LIMIT}: shrink with --short-side")  # fmt: skip
        return stored


class _Plain(NamedTuple):
    width: int
    height: int
    kind: str


def _plain_jpeg(data: bytes, max_pixels: int) -> _Plain | None:
    """Size and kind of a JPEG that libjpeg-turbo decodes without a complaint and that no note turns; None: ask Pillow.

    All of the coded data are decoded; the inverse transform is done for one pixel in 64, for it cannot fail.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in _MODES or width * height > max_pixels:
            return None
        simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1)
        noted = any(marker == APP1 for marker, _, _ in jpeg_segments(data))
        if noted and is_turned(open_image(data)):
            return None
    except Exception:  # Pillow will say what is wrong, or find nothing
        return None
    return _Plain(width, height, f"JPEG {_MODES[colours]}")


def _without_notes(data: bytes) -> bytes:
    """A JPEG without its EXIF and XMP segments (APP1)."""
    parts, end = [data[:2]], 2
    for marker, start, end in jpeg_segments(data):
        parts += [data[start:end]] if marker != APP1 else []
    return b"".join([*parts, data[end:]])


def _encode(rgb: Image.Image, kind: str, quality: int = DEFAULT_QUALITY) -> bytes:
    buffer = io.BytesIO()
    rgb.save(buffer, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return buffer.getvalue()


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Pillow refuses an image above its limit while reading the header; ours is checked after it."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
