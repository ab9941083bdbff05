"""MaskPlan: from boolean masks and back."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ummim.masking import MaskPlan, SamplePlan

ROW = [[1, 0, 1, 1, 0, 1, 1, 1, 1]]  # 3x3, visible 1 and 4


def test_ids_are_ascending_and_the_mask_comes_back() -> None:
    masked = torch.tensor(ROW, dtype=torch.bool)
    plan = MaskPlan.from_mask(masked)
    assert plan.grid == (3, 3)
    assert plan.visible.tolist() == [[1, 4]]
    assert plan.kept.tolist() == [[0, 2, 3, 5, 6, 7, 8]]
    assert plan.thrown.shape == (1, 0)
    assert plan.secondary.tolist() == [[False, False]]
    assert not plan.compact
    assert plan.visible.dtype == plan.kept.dtype == plan.thrown.dtype == torch.int64
    assert plan.mask().equal(masked)
    assert plan.batch_size == 1


def test_flat_square_numpy_and_integer_masks_are_equivalent() -> None:
    expected = MaskPlan.from_mask(torch.tensor(ROW, dtype=torch.bool))
    forms: list[Any] = [
        np.array(ROW, bool),
        np.array(ROW, bool).reshape(1, 3, 3),
        torch.tensor(ROW),
        np.array(ROW, np.uint8),
    ]
    for form in forms:
        plan = MaskPlan.from_mask(form)
        assert plan.grid == (3, 3)
        assert plan.visible.equal(expected.visible)
        assert plan.kept.equal(expected.kept)


def test_oblong_grids_are_row_major() -> None:
    masked = torch.ones(2, 2, 3, dtype=torch.bool)
    masked[0, 1, 0] = masked[1, 0, 2] = False
    plan = MaskPlan.from_mask(masked)
    assert plan.grid == (2, 3)
    assert plan.visible.tolist() == [[3], [2]]
    assert plan.mask().equal(masked.flatten(1))


def test_thrown_tokens_leave_the_kept_ones() -> None:
    thrown = torch.zeros(1, 9, dtype=torch.bool)
    thrown[0, [2, 7]] = True
    plan = MaskPlan.from_mask(torch.tensor(ROW), thrown=thrown.view(1, 3, 3))
    assert plan.kept.tolist() == [[0, 3, 5, 6, 8]]
    assert plan.thrown.tolist() == [[2, 7]]
    assert plan.masked.tolist() == [[0, 3, 5, 6, 8, 2, 7]]


def test_a_uniform_mask_comes_out_compact_in_block_order() -> None:
    masked = torch.ones(2, 4, 4, dtype=torch.bool)
    for at in [(1, 0), (0, 3), (2, 1), (3, 2)]:  # one in each 2x2 block
        masked[0][at] = False
    for at in [(0, 0), (1, 2), (3, 0), (2, 3)]:
        masked[1][at] = False
    secondary = torch.zeros_like(masked)
    secondary[0, 0, 3] = secondary[1, 3, 0] = True
    plan = MaskPlan.from_mask(masked, secondary)
    assert plan.compact
    assert plan.visible.tolist() == [[4, 3, 9, 14], [0, 6, 12, 11]]
    assert plan.secondary.tolist() == [[False, True, False, False], [False, False, True, False]]


def test_a_quarter_visible_without_the_block_pattern_is_not_compact() -> None:
    masked = torch.ones(2, 4, 4, dtype=torch.bool)
    masked[0, ::2, ::2] = False  # uniform
    masked[1, 0] = False  # a row
    plan = MaskPlan.from_mask(masked)
    assert not plan.compact
    assert plan.visible.tolist() == [[0, 2, 8, 10], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("masked", "secondary", "thrown", "message"),
    [
        ([[1, 0, 1, 1], [1, 0, 0, 1]], None, None, "masked: counts differ"),
        ([[1, 0, 1, 1]] * 2, [[0, 1, 0, 0], [0, 0, 0, 0]], None, "secondary: counts differ"),
        ([[1, 0, 1, 1]] * 2, None, [[1, 0, 0, 0], [1, 0, 1, 0]], "counts differ"),
        ([[1, 0, 1, 1]], [[1, 0, 0, 0]], None, "secondary marks masked"),
        ([[1, 0, 1, 1]], None, [[0, 1, 0, 0]], "thrown marks visible"),
        ([[1, 0, 1]], None, None, "no square grid"),
        ([1, 0, 1, 1], None, None, "of shape"),
        ([[1, 0, 1, 1]], [[0, 1]], None, "secondary has shape"),
        ([[1, 0, 1, 1]] * 2, None, [[1, 0, 0, 0, 0, 0, 0, 0]], "thrown has shape"),
        ([[1, 0, 2, 1]], None, None, "must be boolean"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    masked: list, secondary: list | None, thrown: list | None, message: str
) -> None:
    given = [None if mask is None else torch.tensor(mask) for mask in (masked, secondary, thrown)]
    with pytest.raises(ValueError, match=message):
        MaskPlan.from_mask(*given)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.data())
def test_every_token_is_visible_kept_or_thrown(b: int, h: int, w: int, data: st.DataObject) -> None:
    visible = data.draw(st.integers(0, h * w))
    thrown = data.draw(st.integers(0, h * w - visible))
    order = torch.rand(b, h * w, generator=torch.Generator().manual_seed(h * w)).argsort(1)
    masked = torch.ones(b, h * w, dtype=torch.bool).scatter(1, order[:, :visible], False)
    throw = torch.zeros(b, h * w, dtype=torch.bool).scatter(1, order[:, visible : visible + thrown], True)
    plan = MaskPlan.from_mask(masked.view(b, h, w), thrown=throw.view(b, h, w))
    parts = torch.cat([plan.visible, plan.masked], dim=1)
    assert parts.sort(1).values.equal(torch.arange(h * w).expand(b, -1))
    assert plan.mask().equal(masked)
    assert throw.gather(1, plan.thrown).all()
    assert not throw.gather(1, plan.kept).any()


def test_stacking_and_moving_keep_every_field() -> None:
    samples = [
        SamplePlan(np.array([0, 3]), np.array([True, False]), np.array([1]), np.array([2])),
        SamplePlan(np.array([1, 2]), np.array([False, True]), np.array([3]), np.array([0])),
    ]
    plan = MaskPlan.stack(samples, (2, 2), compact=False)
    assert plan.visible.tolist() == [[0, 3], [1, 2]]
    assert plan.secondary.tolist() == [[True, False], [False, True]]
    assert plan.kept.tolist() == [[1], [3]]
    assert plan.thrown.tolist() == [[2], [0]]
    meta = plan.to("meta")
    assert all(ids.is_meta for ids in (meta.visible, meta.secondary, meta.kept, meta.thrown))
    assert meta.grid == (2, 2)


def test_equal_masks_are_a_shared_plan() -> None:
    row = torch.tensor([[True, False, True, True]])
    plan = MaskPlan.from_mask(row.expand(3, -1))
    assert plan.shared == (1,)
    assert plan.to("cpu").shared == (1,)
    other = torch.tensor([[True, True, False, True]])
    assert MaskPlan.from_mask(torch.cat([row, other])).shared is None
    thrown = torch.tensor([[True, False, False, False], [False, False, True, False]])
    assert MaskPlan.from_mask(row.expand(2, -1), thrown=thrown).shared == (1,)  # thrown tokens may differ
