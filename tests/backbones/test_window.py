"""Windows, shift masks, and the coordinate difference of every pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ummim.backbones.window import attend, merge_windows, partition, shift_mask, window_geometry
from ummim.masking import MaskConfig, PlanSampler


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_merging_inverts_partitioning(rows: int, cols: int, window: int) -> None:
    x = torch.randn(2, rows * window, cols * window, 3)
    parts = partition(x, window)
    assert parts.shape == (2, rows * cols, window**2, 3)
    assert parts[:, 0].equal(x[:, :window, :window].reshape(2, -1, 3))
    assert merge_windows(parts, window, rows * window, cols * window).equal(x)


@pytest.mark.parametrize(("size", "window", "shift"), [(8, 4, 2), (9, 3, 1), (12, 6, 3), (4, 2, 1)])
def test_the_shift_mask_separates_what_only_rolling_brought_together(size: int, window: int, shift: int) -> None:
    at = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"), dim=-1)[None]
    rolled = partition(torch.roll(at, (-shift, -shift), (1, 2)), window)[0]  # (nW, n, 2) places before rolling
    gap = (rolled[:, :, None] - rolled[:, None, :]).abs().amax(-1)
    expected = torch.where(gap < window, 0.0, -100.0)
    assert shift_mask(size, size, window, shift, torch.device("cpu")).equal(expected)


def compact_coordinates(grid: int, seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, W) true rows and columns of a compact first-stage map, by a loop over tokens."""
    sampler = PlanSampler((grid, grid), MaskConfig("uniform"))
    rows = torch.zeros(len(seeds), 2 * grid, 2 * grid, dtype=torch.long)
    cols = torch.zeros_like(rows)
    for b, seed in enumerate(seeds):
        for block, token in enumerate(sampler(seed).visible.tolist()):
            top, left = 4 * (block // (grid // 2)), 4 * (block % (grid // 2))
            for i in range(4):
                for j in range(4):
                    rows[b, top + i, left + j] = 4 * (token // grid) + i
                    cols[b, top + i, left + j] = 4 * (token % grid) + j
    return rows, cols


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [2, 3, 4, 6, 8, 12, 24])
def test_every_pair_that_may_meet_has_its_true_difference(window: int, shifted: bool) -> None:
    rows, cols = compact_coordinates(12, range(4))  # a 24x24 map
    for stage in range(4):
        size = rows.shape[1]
        if size % min(window, size) == 0:
            geometry = window_geometry(rows, cols, window, shifted, stage, compact=True)
            side = min(window, size)
            assert geometry.shift == (side // 2 if shifted and size > window else 0)
            at = torch.stack([rows, cols], dim=-1) / 2**stage
            at = partition(torch.roll(at, (-geometry.shift,) * 2, (1, 2)), side)  # (B, nW, n, 2)
            expected = at[:, :, None, :] - at[:, :, :, None]  # key minus query
            found = geometry.differences[geometry.index.long()]
            meet = torch.ones(found.shape[1:4], dtype=torch.bool) if geometry.mask is None else geometry.mask == 0
            assert found[:, meet].equal(expected[:, meet])
        rows, cols = rows[:, ::2, ::2], cols[:, ::2, ::2]


@pytest.mark.parametrize("shifted", [False, True])
def test_dense_windows_share_one_table_of_differences(shifted: bool) -> None:
    rows, cols = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    geometry = window_geometry(rows[None], cols[None], 4, shifted, 0, compact=False)
    assert geometry.index.shape == (1, 1, 16, 16)
    inner = torch.stack([rows[:4, :4], cols[:4, :4]], dim=-1).flatten(0, 1)
    found = geometry.differences[geometry.index[0, 0].long()]
    assert found.equal((inner[None, :] - inner[:, None]).float())
    assert (geometry.mask is not None) == shifted


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 3)])
def test_attention_in_windows_takes_as_few_biases_as_there_are(shape: tuple[int, int], batch: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(batch, 3, 5, 24, dtype=torch.float64)
    bias = torch.randn(min(shape[0], batch), shape[1], 2, 5, 5, dtype=torch.float64)
    found = attend(qkv, 2, bias)
    every = bias.expand(batch, 3, -1, -1, -1)
    for b in range(batch):
        for window in range(3):
            q, k, v = qkv[b, window].chunk(3, dim=-1)
            for head in range(2):
                at = slice(4 * head, 4 * head + 4)
                weights = (q[:, at] @ k[:, at].T / 2 + every[b, window, head]).softmax(-1)
                torch.testing.assert_close(found[b, window][:, at], weights @ v[:, at])


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 3)])
def test_no_bias_is_repeated_for_the_fused_kernel(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches it holds the numbers once: the kernel expands what samples or windows share."""
    sizes: list[int] = []

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        attn_mask.expand(*q.shape[:-1], k.shape[-2])  # the shapes fit
        sizes.append(attn_mask.untyped_storage().nbytes())
        return v

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    qkv, bias = torch.empty(2, 3, 5, 24, device="meta"), torch.empty(*shape, 2, 5, 5, device="meta")
    assert attend(qkv, 2, bias).shape == (2, 3, 5, 8)
    assert sizes == [4 * bias.numel()]
