"""Histograms of oriented gradients, LocalMIM's reconstruction target: one map for each side of a cell.

Source: "Masked Image Modeling with Local Multi-Scale Reconstruction" (LocalMIM), section 3.2 and its code.
"""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ummim.nn.layers import exact


class HOG(nn.Module):
    """Images -> a map of histograms for each side of a cell. Nothing here is trained.

    Args:
        cells: sides of the cells, in pixels, ascending; the first divides the others.
        bins: orientations that pi is divided into.
        bias: add two constants to the gradients, one pair for each side of a cell. They are drawn once, uniformly
            in +-1/3, and kept in the checkpoint: the official Sobel filter is a convolution whose default bias was
            left on in some recipes.
    """

    def __init__(self, cells: Sequence[int], bins: int, bias: bool = False) -> None:
        super().__init__()
        self.cells, self.bins, self.biased = tuple(cells), bins, bias
        for k in range(len(self.cells) if bias else 0):
            self.register_buffer(f"bias_{k}", torch.empty(2).uniform_(-1 / 3, 1 / 3))

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> for each cell side k (B, h * w, 3 * bins), h = H / k: row-major cells, float32 or better.

        A channel's histogram has length 1, unless the channel is constant over the cell (then 0).
        """
        gradients = sobel(exact(images))
        if self.biased:
            biases = [self.get_buffer(f"bias_{k}").to(gradients[0].dtype) for k in range(len(self.cells))]
            maps = [
                orientation_histograms(gradients[0] + bias[0], gradients[1] + bias[1], self.bins, cell)
                for bias, cell in zip(biases, self.cells, strict=True)
            ]
        else:  # a larger cell's histogram is the mean of the smaller ones'
            finest = orientation_histograms(*gradients, self.bins, self.cells[0])
            maps = [F.avg_pool3d(finest, (1, cell // self.cells[0], cell // self.cells[0])) for cell in self.cells]
        return [F.normalize(each, dim=2).flatten(1, 2).flatten(2).transpose(1, 2) for each in maps]


def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> two of the same shape: gradients from right to left and from bottom to top, edges reflected.

    Cross-correlation with [[1, 0, -1], [2, 0, -2], [1, 0, -1]] and with its transpose, written as differences:
    a convolution would run in 16 bits under autocast, and in TF32 on a GPU.
    """
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")  # (B, C, H + 2, W + 2)
    across = x[..., :-2] - x[..., 2:]  # (B, C, H + 2, W)
    down = x[..., :-2, :] - x[..., 2:, :]  # (B, C, H, W + 2)
    return (
        across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :],
        down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:],
    )


def orientation_histograms(across: Tensor, down: Tensor, bins: int, cell: int) -> Tensor:
    """(B, C, H, W) twice -> (B, C, bins, H / cell, W / cell): the mean gradient magnitude of each orientation.

    A pixel counts in one bin only, floor(atan2(across, down) * bins / pi) modulo bins: opposite directions share one.
    """
    magnitude = (across.square() + down.square()).sqrt()
    index = (torch.atan2(across, down) / pi * bins).floor().remainder(bins)  # exact at axes and diagonals
    # Bin by bin: scattering into the cells would sum in another order every time on a GPU.
    means = [F.avg_pool2d(magnitude.where(index == i, 0.0), cell) for i in range(bins)]
    return torch.stack(means, dim=2)
