"""Packing ragged windows into groups, and attention within them."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ummim.backbones.group_attention import (
    GroupAttention,
    Grouping,
    cheapest_groups,
    fullest_subset,
    group_tokens,
    pack,
    unit_cells,
    unit_groups,
)


def random_sizes(seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, rng.integers(2, 50), rng.integers(1, 40)).tolist()


def scattered(seed: int, units: int = 12, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the tokens of some of 7x7 units."""
    chosen = np.sort(np.random.default_rng(seed).permutation(49)[:units])
    cells = unit_cells(tuple(chosen.tolist()), (7, 7), side)
    return cells // (7 * side), cells % (7 * side)


@pytest.mark.parametrize(
    ("sizes", "capacity", "groups"),
    [
        ([16, 16, 4, 33, 49, 20, 20, 9], 49, [[0, 3], [4], [1, 2, 5, 7], [6]]),
        ([3, 7, 5, 5, 2, 8], 10, [[0, 1], [2, 3], [4, 5]]),
        ([5], 5, [[0]]),
        ([2, 2, 2], 100, [[0, 1, 2]]),
    ],
)
def test_groups_are_those_of_the_official_code(sizes: list[int], capacity: int, groups: list[list[int]]) -> None:
    assert pack(sizes, capacity) == groups


def test_no_subset_is_fuller() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        sizes, capacity = rng.integers(1, 12, 8).tolist(), int(rng.integers(1, 40))
        every = (sum(subset) for n in range(9) for subset in combinations(sizes, n))
        found = fullest_subset(sizes, capacity)
        assert found == sorted(set(found))
        assert sum(sizes[i] for i in found) == max(total for total in every if total <= capacity)


def test_every_window_is_packed_once_and_no_group_overflows() -> None:
    for seed in range(50):
        sizes = random_sizes(seed)
        groups, size = cheapest_groups(sizes)
        assert sorted(window for group in groups for window in group) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in group) <= size for group in groups)


def test_the_search_finds_the_cheapest_group_size() -> None:
    gains = 0
    for seed in range(50):
        sizes = random_sizes(seed)
        groups, size = cheapest_groups(sizes)
        costs = [len(pack(sizes, g)) * g**2 for g in range(max(sizes), sum(sizes) + 1)]
        assert len(groups) * size**2 == min(costs) <= costs[0]  # costs[0]: the fullest window's, as officially
        gains += min(costs) < costs[0]
    assert gains > 0


def test_a_window_larger_than_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="7 tokens does not fit a group of 6"):
        pack([3, 7], 6)


@pytest.mark.parametrize(("window", "shift"), [(7, 0), (7, 3), (14, 7), (4, 2), (5, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_of_a_window_have_their_place_in_the_table_and_others_none(window: int, shift: int, seed: int) -> None:
    rows, cols = scattered(seed)
    order, place, bias_index = group_tokens(rows, cols, window, shift)
    assert order is not None
    assert place is not None
    groups, size, _ = bias_index.shape
    assert (order[place] == np.arange(768)).all()
    at = np.full(groups * size, -1)
    at[place] = np.arange(768)
    first = shift - window if shift else 0
    for g, tokens in enumerate(at.reshape(groups, size)):
        for q, k in np.ndindex(size, size):
            if (tokens[q] < 0) != (tokens[k] < 0):
                assert bias_index[g, q, k] == (2 * window - 1) ** 2
            if tokens[q] < 0 or tokens[k] < 0:
                continue
            (r, c), (r2, c2) = ((rows[token], cols[token]) for token in (tokens[q], tokens[k]))
            apart = (r - first) // window != (r2 - first) // window or (c - first) // window != (c2 - first) // window
            place_in_table = (r - r2 + window - 1) * (2 * window - 1) + c - c2 + window - 1
            assert bias_index[g, q, k] == ((2 * window - 1) ** 2 if apart else place_in_table)
    together = bias_index != (2 * window - 1) ** 2
    windows = {(int((r - first) // window), int((c - first) // window)) for r, c in zip(rows, cols, strict=True)}
    sizes = [sum(((rows - first) // window == i) & ((cols - first) // window == j)) for i, j in windows]
    padding = [size - (at.reshape(groups, size)[g] >= 0).sum() for g in range(groups)]
    assert together.sum() == sum(n**2 for n in sizes) + sum(n**2 for n in padding)  # no window is split


def test_few_tokens_are_one_group_as_they_stand() -> None:
    rows, cols = scattered(0, side=2)  # 48 tokens, at most 2 * 7**2
    assert group_tokens(rows, cols, 7, 0).order is None
    assert group_tokens(rows, cols, 7, 0).bias_index.shape == (1, 48, 48)
    rows, cols = scattered(0, units=25, side=2)  # 100
    assert group_tokens(rows, cols, 7, 0).order is not None


def test_whole_maps_fill_every_group() -> None:
    everything = tuple(range(49))
    for shift in (0, 3):
        assert unit_groups(everything, (7, 7), 8, 7, shift, False).bias_index.shape == (64, 49, 49)


def test_legacy_coordinates_read_the_token_number_as_a_raster_position() -> None:
    units = (3, 10)
    legacy = unit_groups(units, (7, 7), 2, 14, 0, True)
    numbers = np.array([12, 13, 14, 15, 40, 41, 42, 43])
    expected = group_tokens(numbers // 14, numbers % 14, 14, 0)
    assert (legacy.bias_index == expected.bias_index).all()
    assert not (legacy.bias_index == unit_groups(units, (7, 7), 2, 14, 0, False).bias_index).all()


def attention(dim: int = 12, heads: int = 3, window: int = 4) -> GroupAttention:
    torch.manual_seed(0)
    module = GroupAttention(dim, heads, window).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def as_tensors(grouping: Grouping) -> list[Any]:
    return [None if array is None else torch.from_numpy(array) for array in grouping]


def one_group(grouping: Grouping, tokens: int, window: int) -> tuple[None, None, Tensor]:
    """All tokens in one group: every pair's row of the table, or the row past the last."""
    _, place, bias_index = grouping
    assert place is not None
    groups, size, _ = bias_index.shape
    index = np.full((groups, size, groups, size), (2 * window - 1) ** 2, np.int32)
    for g in range(groups):
        index[g, :, g] = bias_index[g]
    flat = index.reshape(groups * size, groups * size)[place][:, place]
    assert flat.shape == (tokens, tokens)
    return None, None, torch.from_numpy(flat[None])


@pytest.mark.parametrize("shift", [0, 2])
def test_grouping_is_masking(shift: int) -> None:
    """The same numbers and gradients from groups, and from all tokens in one group."""
    module = attention()
    rows, cols = scattered(1, side=4)
    grouping = group_tokens(rows, cols, 4, shift)
    x = torch.randn(2, len(rows), 12, dtype=torch.float64, requires_grad=True)
    toward = torch.randn(2, len(rows), 12, dtype=torch.float64)
    results = []
    for groups in (as_tensors(grouping), one_group(grouping, len(rows), 4)):
        y = module(x, *groups)
        results.append([y, *torch.autograd.grad((y * toward).sum(), [x, *module.parameters()])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_tokens_of_other_windows_have_no_influence_at_all() -> None:
    module = attention()
    rows, cols = scattered(2, side=4)
    x = torch.randn(1, len(rows), 12, dtype=torch.float64, requires_grad=True)
    y = module(x, *as_tensors(group_tokens(rows, cols, 4, 0)))
    (grad,) = torch.autograd.grad(y[0, 0].sum(), [x])
    same = (rows // 4 == rows[0] // 4) & (cols // 4 == cols[0] // 4)
    assert (grad[0].abs().amax(1) > 0).equal(torch.from_numpy(same))


def test_the_fused_kernels_result_is_the_same() -> None:
    """What a GPU computes: the same queries, keys, values and bias, through scaled_dot_product_attention."""
    module = attention()
    order, place, bias_index = as_tensors(group_tokens(*scattered(3, side=4), 4, 2))
    x = torch.randn(2, 192, 12, dtype=torch.float64)
    groups, size, _ = bias_index.shape
    qkv = module.qkv(x).view(2, 192, 3, 3, -1).permute(2, 0, 3, 1, 4).index_select(3, order)
    q, k, v = qkv.reshape(3, 2, 3 * groups, size, -1)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=module.bias(bias_index))
    y = y.reshape(2, 3, groups * size, -1).transpose(1, 2).index_select(1, place).reshape(2, 192, 12)
    torch.testing.assert_close(module.proj(y), module(x, order, place, bias_index))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_finite(dtype: torch.dtype) -> None:
    module = attention().to(dtype)
    x = torch.randn(2, 192, 12, dtype=dtype, requires_grad=True)
    y = module(x, *as_tensors(group_tokens(*scattered(3, side=4), 4, 2)))
    y.float().sum().backward()
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [x, *module.parameters()])
