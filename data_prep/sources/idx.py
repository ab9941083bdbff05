"""IDX files, the format of MNIST and its relatives, plain or gzipped."""

import gzip
import io
import math
import re
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image

from data_prep.locations import exists, read
from data_prep.sources.item import Item, Source, make_key
from ummim.data.shards import UNLABELLED
from ummim.data.urls import basename, beside
from ummim.errors import DataError

IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")


def idx_source(path: str) -> Source:
    """The images of an IDX file, with the labels of the file beside it if there is one.

    Raises:
        DataError: a file that is damaged, of another kind, or that does not fit the other.
    """
    images = _images(path)
    if images.ndim != 3:
        raise DataError(f"{path} holds {images.ndim}-dimensional data; images are 3-dimensional (count, rows, columns)")
    if not len(images):
        raise DataError(f"{path} holds no images")
    labels_path = _labels_beside(path)
    labels = np.full(len(images), UNLABELLED) if labels_path is None else read_idx(labels_path)
    if labels.shape != (len(images),):
        raise DataError(f"{labels_path} holds {labels.size} labels for the {len(images)} images of {basename(path)}")
    stem = make_key(IDX_IMAGES.sub("", basename(path)).strip("-_.") or "image", set())
    size = int(images[0].size)
    items = [Item(f"{stem}-{i:06d}", path, int(label), size, i, "idx") for i, label in enumerate(labels)]
    return Source(items, None if labels_path is None else [str(i) for i in range(int(labels.max()) + 1)])


def read_image(path: str, number: int) -> bytes:
    """An image of an IDX file as the bytes of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(_images(path)[number]).save(buffer, "PNG")
    return buffer.getvalue()


def read_idx(path: str) -> np.ndarray:
    """The uint8 array of an IDX file: images (count, rows, columns) or labels (count,).

    Raises:
        DataError: not an IDX file of unsigned bytes, or one cut short.
    """
    try:
        data = gzip.decompress(read(path)) if path.endswith(".gz") else read(path)
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


@lru_cache(maxsize=1)
def _images(path: str) -> np.ndarray:
    return read_idx(path)


def _labels_beside(images: str) -> str | None:
    """The label file of ``train-images-idx3-ubyte`` and the like, gzipped or not, if it is there."""
    own = basename(images).removesuffix(".gz")
    name = own.replace("images", "labels").replace("idx3", "idx1")
    if name == own:
        return None
    paths = (beside(images, name), beside(images, f"{name}.gz"))
    return next((path for path in paths if exists(path)), None)
