"""HOG written plainly, one pixel at a time."""

import math

import numpy as np


def plain_hog(image: np.ndarray, bins: int, cell: int, bias: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """(3, H, W) -> (cells, 3 * bins), one pixel at a time."""
    channels, height, width = image.shape
    sides = np.array([1.0, 2.0, 1.0])  # opposite sides are subtracted first: where they are equal, as at a
    # reflected edge, the gradient is exactly 0, and rounding does not choose its bin
    histograms = np.zeros((height // cell, width // cell, channels, bins))
    for c in range(channels):
        padded = np.pad(image[c], 1, mode="reflect")
        for row in range(height):
            for col in range(width):
                around = padded[row : row + 3, col : col + 3]
                g0 = ((around[:, 0] - around[:, 2]) * sides).sum() + bias[0]
                g1 = ((around[0] - around[2]) * sides).sum() + bias[1]
                which = math.floor(math.atan2(g0, g1) / math.pi * bins) % bins
                histograms[row // cell, col // cell, c, which] += math.hypot(g0, g1) / cell**2
    lengths = np.sqrt((histograms**2).sum(-1, keepdims=True))
    return (histograms / np.maximum(lengths, 1e-12)).reshape(-1, channels * bins)
