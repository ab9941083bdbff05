"""Attention maps of the training images (AMT): read from a file, followed through crop and flip, turned into masks."""

from pathlib import Path

import numpy as np

from ummim.data.augment import Box
from ummim.masking import AttentionSampler, SamplePlan


class AttentionMaps:
    """Draws mask plans from the maps in a file; cheap to pass to worker processes, which share the file's pages.

    Args:
        path: .npy file of (samples, h, w) floats: the map of every row of the index's table.
        sampler: draws the plans.
        pixels: side of the views, in pixels.
        legacy_crop: see ``AttentionMaskConfig``.
    """

    def __init__(self, path: Path, sampler: AttentionSampler, pixels: int, legacy_crop: bool = False) -> None:
        self.path, self.sampler, self.pixels, self.legacy_crop = path, sampler, pixels, legacy_crop
        self.maps = np.load(path, mmap_mode="r", allow_pickle=False)

    def __reduce__(self) -> tuple:
        return AttentionMaps, (self.path, self.sampler, self.pixels, self.legacy_crop)

    def plan(self, row: int, box: Box, seed: int) -> SamplePlan:
        """The plan of a view of the image in ``row``: a pure function of the map, the view and the seed."""
        attention = self.maps[row]
        if self.legacy_crop:
            attention, box = _top_left(attention, box)
        return self.sampler(seed, view_weights(attention, box, self.sampler.grid, self.pixels))


def view_weights(attention: np.ndarray, box: Box, grid: tuple[int, int], pixels: int) -> np.ndarray:
    """(h', w') map of a whole image -> (h, w) float64: the weight of each token of the view at ``box``.

    As if the map were resized (bilinear) to the image, cropped, flipped and resized to ``pixels`` with it, and then
    averaged over each token's pixels. A bilinear resize treats rows and columns one after the other, so two small
    matrices do it, whatever the image's size.
    """
    down = _axis(box.top, box.bottom, attention.shape[0], grid[0], pixels)  # (h, h')
    across = _axis(box.left, box.right, attention.shape[1], grid[1], pixels)  # (w, w')
    return down @ attention.astype(np.float64) @ across.T


def _axis(start: float, stop: float, cells: int, tokens: int, pixels: int) -> np.ndarray:
    """(tokens, cells): what each cell of a map adds to each token of a view that spans [start, stop] of the image."""
    at = start + (np.arange(pixels) + 0.5) / pixels * (stop - start)  # pixels' centres, as shares of the image's side
    at = (at * cells - 0.5).clip(0, cells - 1)  # in cells, between the centres of the outermost ones
    low = np.minimum(at.astype(np.int64), max(cells - 2, 0))
    high = np.minimum(low + 1, cells - 1)
    share = np.zeros((pixels, cells))
    np.add.at(share, (np.arange(pixels), low), 1 - (at - low))
    np.add.at(share, (np.arange(pixels), high), at - low)
    return share.reshape(tokens, pixels // tokens, cells).mean(1)


def _top_left(attention: np.ndarray, box: Box) -> tuple[np.ndarray, Box]:
    """The official mistake (docs/fidelity.md, Q-A1): pixels over the image's side, as integers, are taken for cells."""
    edge = 1 - 1e-6
    rows = 3 if box.bottom > edge else 2
    cols = 3 if max(box.left, box.right) > edge else 2
    return attention[:rows, :cols], Box(0.0, 0.0, 1.0, 1.0) if box.left < box.right else Box(1.0, 0.0, 0.0, 1.0)
