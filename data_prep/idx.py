"""IDX files, the format of MNIST and its relatives, plain or gzipped."""

import gzip
import io
import math
import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ummim.errors import DataError

IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file: images (count, rows, columns) or labels (count,).

    Raises:
        DataError: not an IDX file of unsigned bytes, or one cut short.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    dimensions = data[3] if len(data) > 3 else 0
    if data[:3] != b"\0\0\x08" or not 1 <= dimensions <= 4:
        raise DataError(f"{path} is no IDX file of unsigned bytes (it starts with {data[:4].hex(' ')})")
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    needed = start + math.prod(shape)
    if len(data) != needed:
        raise DataError(f"{path} holds {len(data)} bytes, its header says {needed}: truncated or damaged")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def labels_beside(images: Path) -> Path | None:
    """The label file of ``train-images-idx3-ubyte`` and the like, gzipped or not, if it is there."""
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    return next((path for path in (images.with_name(name), images.with_name(f"{name}.gz")) if path.exists()), None)


def encode_png(pixels: np.ndarray) -> bytes:
    """A grey image (rows, columns) as the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
