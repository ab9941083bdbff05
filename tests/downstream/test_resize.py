"""Tables at other sizes: SimMIM's rule for relative position biases, and what gets lost."""

import pytest
import torch
from scipy.interpolate import CubicSpline, RectBivariateSpline
from torch import Tensor

from ummim.downstream.resize import geometric_offsets, offset_weights, resize_bias, resize_positions, spline_weights
from ummim.nn.layers import sincos_table


def simmims(field: Tensor, window: int) -> Tensor:
    """SimMIM's rule for one head's (n, n) field: places of the old offsets by bisection, a spline, the new offsets."""
    steps, reach = len(field) // 2, window - 1
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**steps) / (1 - q) > reach else (q, high)
    places = torch.tensor([sum(q**i for i in range(k)) for k in range(steps + 1)], dtype=torch.float64)
    places = torch.cat([-places[1:].flip(0), places])
    at = torch.arange(1.0 - window, window).clamp(places[0], places[-1])
    return torch.from_numpy(RectBivariateSpline(places, places, field, s=0)(at, at))


def smooth_table(window: int, heads: int = 2) -> Tensor:
    """Biases as they are learned: the nearer the higher, with a direction; float64 of magnitude 1."""
    at = torch.arange(1.0 - window, window, dtype=torch.float64) / window
    rows, cols = at[:, None], at[None, :]
    fields = [torch.exp(-4 * (rows - 0.2 * h) ** 2 - 3 * cols**2) - 0.3 * h * cols for h in range(heads)]
    return torch.stack([field.flatten() for field in fields], dim=1)


@pytest.mark.parametrize(("old", "new"), [(6, 7), (12, 14), (7, 12), (14, 24)])
def test_biases_are_resized_as_in_simmim(old: int, new: int) -> None:
    table = torch.randn((2 * old - 1) ** 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    resized = resize_bias(table, new).view(2 * new - 1, 2 * new - 1, 3)
    for head in range(3):
        expected = simmims(table[:, head].view(2 * old - 1, -1), new)
        torch.testing.assert_close(resized[..., head], expected, rtol=0, atol=5e-4)  # their bisection ends at 1e-6


def test_equal_sizes_give_the_very_table() -> None:
    table = torch.randn(169, 4)
    assert resize_bias(table, 7) is table
    assert resize_bias(torch.cat([table, table[:3]]), 7, others=3).shape == (172, 4)
    positions = torch.randn(1, 17, 8)
    assert resize_positions(positions, (4, 4), class_token=True) is positions


@pytest.mark.parametrize(("old", "new"), [(6, 7), (12, 14), (7, 12), (3, 8), (2, 5), (7, 6)])
def test_a_bias_that_is_linear_in_the_offset_is_reproduced(old: int, new: int) -> None:
    """Linear in the place that each offset has in the new window, as the rule lays it out."""
    small, large = min(old, new), max(old, new)
    stretched = geometric_offsets(small, large)
    assert stretched[:2].tolist() == pytest.approx([0, 1] if small > 2 else [0, large - 1])
    assert stretched[-1].item() == pytest.approx(large - 1)
    stretched = torch.cat([-stretched[1:].flip(0), stretched])
    plain = torch.arange(1.0 - large, large, dtype=torch.float64)
    before, after = (stretched, plain) if old < new else (plain, stretched)
    table = (2 * before[:, None] - 0.5 * before + 3).reshape(-1, 1)
    expected = (2 * after[:, None] - 0.5 * after + 3).reshape(-1, 1)
    torch.testing.assert_close(resize_bias(table, new), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("old", "new"), [(6, 7), (12, 14), (7, 12), (14, 24)])
def test_up_and_down_again_is_close(old: int, new: int) -> None:
    """Of smooth biases of magnitude 1, less than a thousandth is lost."""
    table = smooth_table(old)
    torch.testing.assert_close(resize_bias(resize_bias(table, new), old), table, rtol=0, atol=1e-3)


def test_rows_of_the_class_token_stay() -> None:
    table = torch.randn(11**2 + 3, 2)
    resized = resize_bias(table, 7, others=3)
    assert resized.shape == (13**2 + 3, 2)
    assert resized[-3:].equal(table[-3:])
    assert resized[:-3].equal(resize_bias(table[:-3], 7))
    assert resized.dtype == torch.float32


def test_the_offset_zero_and_its_neighbours_keep_their_meaning() -> None:
    weights = offset_weights(6, 7)
    assert weights.shape == (13, 11)
    torch.testing.assert_close(weights.sum(1), torch.ones(13, dtype=torch.float64))
    for new, old in ((5, 4), (6, 5), (7, 6), (0, 0), (12, 10)):  # offsets -1, 0, 1 and the edges
        assert weights[new, old].item() == pytest.approx(1, abs=1e-6)
    assert offset_weights(1, 3).tolist() == [[1.0]] * 5  # of one offset, its value everywhere


@pytest.mark.parametrize("count", [3, 4, 5, 12])
def test_splines_are_scipys(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    places = torch.rand(count, generator=generator, dtype=torch.float64).cumsum(0)
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    at = torch.linspace(places[0].item(), places[-1].item(), 40, dtype=torch.float64)
    expected = torch.from_numpy(CubicSpline(places, values, bc_type="not-a-knot")(at))
    torch.testing.assert_close(spline_weights(places, at) @ values, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(spline_weights(places, places), torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-9)


def test_positions_keep_their_share_of_the_image() -> None:
    """As MAE's interpolation: bicubic, class token's row untouched; smooth tables come back."""
    table = torch.cat([torch.randn(1, 1, 32), sincos_table(32, (14, 14))], dim=1)
    larger = resize_positions(table, (28, 28), class_token=True)
    assert larger.shape == (1, 785, 32)
    assert larger[:, :1].equal(table[:, :1])
    grid = table[:, 1:].view(1, 14, 14, 32).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (28, 28), mode="bicubic", align_corners=False)
    assert larger[:, 1:].equal(expected.permute(0, 2, 3, 1).flatten(1, 2))
    back = resize_positions(larger, (14, 14), class_token=True)
    assert (back - table)[:, 1:].abs().max() < 0.1  # of sines and cosines, at the border
    assert (back - table)[:, 1:].abs().mean() < 0.01
