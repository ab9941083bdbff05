"""HOG against the official code's numbers, a pixel-by-pixel computation, and scikit-image."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.feature import hog as skimage_hog
from skimage.filters import sobel_h, sobel_v
from torch import Tensor

from tests.interop.fixtures import images as fixture_images
from tests.nn.plain_hog import plain_hog
from ummim.nn.hog import HOG, orientation_histograms, sobel

PHOTOGRAPH = next((Path(__file__).parents[2] / "ummim/sample_images/astronaut").glob("*.jpg"))


def grey(size: int) -> np.ndarray:
    with Image.open(PHOTOGRAPH) as picture:
        return np.asarray(picture.convert("L").resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / 255


def test_sums_are_the_official_codes() -> None:
    """9 bins, no bias, float32."""
    maps = HOG((4, 8, 16, 32), 9)(fixture_images(224).float())
    assert [tuple(each.shape) for each in maps] == [(2, side**2, 27) for side in (56, 28, 14, 7)]
    sums = [each.double().sum().item() for each in maps]
    assert sums == pytest.approx([24961.0766, 7000.2202, 1944.5129, 586.9211], abs=6e-5)
    assert maps[0][0, 0, :5].tolist() == pytest.approx([0.1162844, 0, 0.4393848, 0.7444780, 0.4890515], abs=2e-7)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("bins", [9, 18])
def test_equals_the_computation_pixel_by_pixel(bins: int, biased: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 32, dtype=torch.float64)
    hog = HOG((4, 8, 16, 16), bins, biased).double()
    for k, (cell, each) in enumerate(zip(hog.cells, hog(images), strict=True)):
        bias = tuple(hog.get_buffer(f"bias_{k}").tolist()) if biased else (0.0, 0.0)
        expected = np.stack([plain_hog(image, bins, cell, bias) for image in images.numpy()])
        np.testing.assert_allclose(each.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_scikit_images() -> None:
    image = grey(48)
    across, down = sobel(torch.from_numpy(image)[None, None])
    inside = (0, 0, slice(1, -1), slice(1, -1))  # the edge rows are reflected another way there
    # Ours point from right to left and from bottom to top, theirs the other way and are a quarter as long.
    np.testing.assert_allclose(-across[inside].numpy() / 4, sobel_v(image)[1:-1, 1:-1], atol=1e-14)
    np.testing.assert_allclose(-down[inside].numpy() / 4, sobel_h(image)[1:-1, 1:-1], atol=1e-14)


def mirrored(histograms: np.ndarray) -> np.ndarray:
    """scikit-image's 18 bins in our order: it measures the angle from the rows' axis, we from the columns'."""
    return histograms[..., (8 - np.arange(18)) % 18]


@pytest.mark.parametrize("degrees", [5, 25, 85, 95, 125, 175, 205, 355])
def test_a_ramps_orientation_is_scikit_images(degrees: int) -> None:
    """Inside a ramp, scikit-image's plain differences and Sobel's point the same way: the histograms are equal."""
    row, col = np.mgrid[:64, :64]
    image = row * math.sin(math.radians(degrees)) + col * math.cos(math.radians(degrees))
    expected = mirrored(skimage_hog(image, 18, (16, 16), (1, 1), block_norm="L2", feature_vector=False)[:, :, 0, 0])
    ours = HOG((16,), 18)(torch.from_numpy(image)[None, None])[0][0].view(4, 4, 18).numpy()
    np.testing.assert_allclose(ours[1:3, 1:3], expected[1:3, 1:3], atol=1e-5)  # 1e-5 stands under its root
    assert ours[1:3, 1:3].max(-1).min() > 0.999


def test_a_photographs_orientations_are_scikit_images() -> None:
    """Its differences are narrower than Sobel's, so the histograms are alike, not equal."""
    image = grey(224)
    expected = mirrored(skimage_hog(image, 18, (32, 32), (1, 1), block_norm="L2", feature_vector=False)[:, :, 0, 0])
    ours = HOG((32,), 18)(torch.from_numpy(image)[None, None])[0][0].view(7, 7, 18).numpy()
    likeness = [np.median((ours * np.roll(expected, turn, -1)).sum(-1)) for turn in range(18)]
    assert likeness[0] > 0.95
    assert max(likeness[1:]) < 0.9


def test_axes_and_diagonals_fall_on_the_edge_they_open() -> None:
    """Rounding must not push exact directions below their bin: with 18 bins each of these starts one."""
    across = torch.tensor([0.0, 1.0, 1.0, 1.0])[None, None, None]
    down = torch.tensor([1.0, 1.0, 0.0, -1.0])[None, None, None]  # 0, pi / 4, pi / 2, 3 pi / 4
    for sign in (1, -1):
        for dtype in (torch.float32, torch.float64):
            each = orientation_histograms(sign * across.to(dtype), sign * down.to(dtype), 36, 1)
            assert each[0, 0, :, 0].argmax(0).tolist() == [0, 9, 18, 27]


def test_a_constant_cell_has_no_orientation() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[:, 1] = torch.randn(16, 16)
    each = HOG((8,), 9)(images)[0].view(4, 3, 9)
    assert each[:, [0, 2]].eq(0).all()
    torch.testing.assert_close(each[:, 1].norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_float32_whatever_the_precision(dtype: torch.dtype) -> None:
    images = fixture_images(32).float()
    hog = HOG((4, 8), 9)
    with torch.autocast("cpu", dtype):
        under_autocast = hog(images)
    assert all(torch.equal(a, b) for a, b in zip(under_autocast, hog(images), strict=True))
    assert all(each.dtype is torch.float32 for each in hog(images.to(dtype)))


def test_has_no_gradient_and_no_parameters() -> None:
    hog = HOG((4, 8), 9, bias=True)
    assert not hog(torch.randn(1, 3, 8, 8, requires_grad=True))[0].requires_grad
    assert not list(hog.parameters())
    assert set(hog.state_dict()) == {"bias_0", "bias_1"}
    assert not HOG((4, 8), 9).state_dict()


def test_the_bias_is_drawn_from_the_seed_and_changes_the_target() -> None:
    biases: list[Tensor] = []
    for _ in range(2):
        torch.manual_seed(3)
        biases.append(HOG((4, 8), 9, bias=True).get_buffer("bias_1"))
    assert biases[0].equal(biases[1])
    assert biases[0].abs().max() <= 1 / 3
    images = torch.rand(1, 3, 16, 16)
    assert not torch.allclose(HOG((8,), 9, bias=True)(images)[0], HOG((8,), 9)(images)[0], atol=0.05)
