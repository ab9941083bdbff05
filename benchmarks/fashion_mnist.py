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
    """Fashion-MNIST: (N, 28, 28) uint8 images and (N,) int64 labels, training and test.

    Args:
        folder: where the IDX files are.
        margin: pixels of background that an input gets on each side.
        scale: side, in pixels of an input, of a pixel.
        device: where images and labels are kept.
    """

    def __init__(self, folder: Path, margin: int = 2, scale: int = 4, device: str = "cpu") -> None:
        self.margin, self.scale = margin, scale
        self.train_images, self.train_labels = (read_idx(folder / f"train-{part}-ubyte.gz") for part in PARTS)
        self.test_images, self.test_labels = (read_idx(folder / f"t10k-{part}-ubyte.gz") for part in PARTS)
        padded = F.pad(self.train_images.double() / 255, [margin] * 4)
        self.mean, self.deviation = padded.mean().item(), padded.std().item()
        self.train_images, self.train_labels = self.train_images.to(device), self.train_labels.to(device)
        self.test_images, self.test_labels = self.test_images.to(device), self.test_labels.to(device)

    def inputs(self, images: Tensor) -> Tensor:
        """(B, 28, 28) uint8 -> (B, 3, S, S) float32, normalised; nearest-neighbour upscaling, grey as RGB.

        S = scale * (28 + 2 * margin): 128 by default.
        """
        x = (F.pad(images.float() / 255, [self.margin] * 4) - self.mean) / self.deviation  # (B, S / scale, S / scale)
        x = x.repeat_interleave(self.scale, dim=1).repeat_interleave(self.scale, dim=2)  # (B, S, S)
        return x[:, None].expand(-1, 3, -1, -1)
