"""What of an image goes into a shard: its own bytes where possible, a JPEG or PNG otherwise."""

import io
from dataclasses import dataclass

from PIL import Image

from ummim.data.images import UNREADABLE, open_image, reason, to_rgb

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with pictures behind it
DEFAULT_QUALITY = 95


@dataclass(frozen=True)
class Conversion:
    """Attributes:
    short_side: images with a larger short side are shrunk to it (bicubic), in pixels; None leaves the size.
    quality: every image becomes a JPEG of this quality; None keeps the bytes of JPEG, PNG and WebP files that
        are not shrunk, stores other formats as PNG, and shrunk images as JPEG of quality 95.
    """

    short_side: int | None = None
    quality: int | None = None

    def __call__(self, data: bytes) -> tuple[str, bytes]:
        """(extension, bytes) to store, after decoding ``data`` in full.

        Raises:
            ValueError: ``data`` is no readable image; the message says why.
        """
        try:
            image = open_image(data)
            kept = KEPT.get(image.format or "")
            rgb = to_rgb(image)
        except UNREADABLE as error:
            raise ValueError(reason(error)) from None
        shrink = self.short_side is not None and min(rgb.size) > self.short_side
        if kept and not shrink and self.quality is None:
            return kept, data
        if shrink and self.short_side is not None:
            scale = self.short_side / min(rgb.size)
            size = (max(round(rgb.width * scale), 1), max(round(rgb.height * scale), 1))
            rgb = rgb.resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        if shrink or self.quality is not None:
            rgb.save(buffer, "JPEG", quality=self.quality or DEFAULT_QUALITY)
            return "jpg", buffer.getvalue()
        rgb.save(buffer, "PNG")
        return "png", buffer.getvalue()
