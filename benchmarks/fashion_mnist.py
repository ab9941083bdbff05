"""Fashion-MNIST off its IDX files (Debian package ``dataset-fashion-mnist``), upscaled for a Swin."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PARTS = ("images-idx3", "labels-idx1")


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes: uint8 images, int64 labels.

    Raises:
        ValueError: it is no such file, or cut short.
    """
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes")
    shape = np.frombuffer(raw, ">u4", raw[3], offset=4).astype(int)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != shape.prod():
        raise ValueError(f"{path} holds {values.size} bytes of {shape.prod()}")
    tensor = torch.from_numpy(values.reshape(shape).copy())
    return tensor.long() if raw[3] == 1 else tensor


class Data:
    """Fashion-MNIST: (N, 28, 28) uint8 images and (N,) int64 labels, training and test."""

    def __init__(self, folder: Path) -> None:
        self.train_images, self.train_labels = (read_idx(folder / f"train-{part}-ubyte.gz") for part in PARTS)
        self.test_images, self.test_labels = (read_idx(folder / f"t10k-{part}-ubyte.gz") for part in PARTS)
        padded = F.pad(self.train_images.double() / 255, (2, 2, 2, 2))
        self.mean, self.deviation = padded.mean().item(), padded.std().item()

    def inputs(self, images: Tensor) -> Tensor:
        """(B, 28, 28) uint8 -> (B, 3, 128, 128) float32, normalised; nearest-neighbour upscaling, grey as RGB."""
        x = (F.pad(images.float() / 255, (2, 2, 2, 2)) - self.mean) / self.deviation  # (B, 32, 32)
        x = x.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)  # (B, 128, 128)
        return x[:, None].expand(-1, 3, -1, -1)
