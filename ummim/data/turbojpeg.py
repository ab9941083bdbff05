"""Part of a JPEG's pixels, where a libturbojpeg of version 3 is installed: no Python package offers this yet.

Of what lies outside the part, libjpeg-turbo skips the inverse DCT, the upsampling and the colours, and below it
everything, damage included. The pixels are those of the whole picture, bit for bit. ``None`` in their place says that
the whole picture has to be decoded: there is no such library, or it finds fault with the file.

The functions are declared as in libjpeg-turbo's turbojpeg.h. A handle lives for one call: nothing is shared between
threads or over a fork.
"""

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import simplejpeg

VARIABLE = "UMMIM_TURBOJPEG"  # the library's file, where it is not among those that are found; empty: none
_NAME = "libturbojpeg.so.0"
_END = b"\xff\xd9"  # of a JPEG
_MARGIN = 2  # pixels beside the part: smooth upsampling of colours looks at a neighbour

_DECOMPRESS, _RGB = 1, 0  # TJINIT_DECOMPRESS, TJPF_RGB
_SUBSAMPLING, _WIDTH, _HEIGHT, _PROGRESSIVE = 4, 5, 6, 12  # TJPARAM_*
_BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)  # in pixels, by TJSAMP_*: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1, 4:4:1


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class TurboJpeg:
    """A libturbojpeg. Raises ``OSError`` if ``file`` cannot be loaded, ``AttributeError`` if it is too old."""

    def __init__(self, file: str) -> None:
        library, handle, number, text = ctypes.CDLL(file), ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        self._functions = library
        for name, result, arguments in (
            ("tj3Init", handle, [number]),
            ("tj3Destroy", None, [handle]),
            ("tj3DecompressHeader", number, [handle, text, ctypes.c_size_t]),
            ("tj3Get", number, [handle, number]),
            ("tj3SetCroppingRegion", number, [handle, _Region]),
            ("tj3Decompress8", number, [handle, text, ctypes.c_size_t, ctypes.c_void_p, number, number]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments

    def part(self, data: bytes, left: int, top: int, width: int, height: int) -> np.ndarray | None:
        """(height, width, 3) uint8: a rectangle of a picture's pixels, or None, see above.

        Only whole files are taken, and no progressive ones: of them all scans have to be read in any case.
        """
        if not data.endswith(_END):
            return None
        handle = self._functions.tj3Init(_DECOMPRESS)
        if not handle:
            return None
        try:
            return self._part(handle, data, left, top, width, height)
        finally:
            self._functions.tj3Destroy(handle)

    def _part(self, handle: int, data: bytes, left: int, top: int, width: int, height: int) -> np.ndarray | None:
        turbo = self._functions
        if turbo.tj3DecompressHeader(handle, data, len(data)) or turbo.tj3Get(handle, _PROGRESSIVE):
            return None
        across, down = turbo.tj3Get(handle, _WIDTH), turbo.tj3Get(handle, _HEIGHT)
        subsampling = turbo.tj3Get(handle, _SUBSAMPLING)
        if not 0 <= subsampling < len(_BLOCK_WIDTHS):
            return None
        if left < 0 or top < 0 or width < 1 or height < 1 or left + width > across or top + height > down:
            return None
        block = _BLOCK_WIDTHS[subsampling]
        begin, end = max(0, left - _MARGIN) // block * block, min(across, left + width + _MARGIN)
        if turbo.tj3SetCroppingRegion(handle, _Region(begin, top, end - begin, height)):
            return None
        pixels = np.empty((height, end - begin, 3), np.uint8)
        if turbo.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, pixels.strides[0], _RGB):
            return None  # an error, or a mere complaint
        return pixels[:, left - begin : left - begin + width]


@lru_cache(maxsize=1)
def turbojpeg() -> TurboJpeg | None:
    """The library that ``UMMIM_TURBOJPEG`` names, else the environment's or the system's, if it is one that serves."""
    given = os.environ.get(VARIABLE)
    for file in (str(Path(sys.prefix, "lib", _NAME)), _NAME) if given is None else (given,):
        try:
            found = TurboJpeg(file) if file else None
        except (OSError, AttributeError):
            continue
        if found is not None and _serves(found):
            return found
    return None


def _serves(library: TurboJpeg) -> bool:
    """Whether a part of a small picture comes out as simplejpeg decodes it."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    data = simplejpeg.encode_jpeg(noise, colorsubsampling="420")
    part = library.part(data, 19, 9, 21, 20)
    return part is not None and np.array_equal(part, simplejpeg.decode_jpeg(data)[9:29, 19:40])
