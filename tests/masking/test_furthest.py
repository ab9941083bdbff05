"""Furthest sampling against the greedy algorithm written out."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ummim.masking import furthest_sample
from ummim.masking.furthest import furthest

SIX = np.array([0, 1, 5, 7, 10, 15])  # of a 4x4 grid


def greedy(ids: list[int], width: int, keep: int, first: int) -> list[int]:
    """Repeat: keep the token furthest from its nearest kept one, the lowest id among equals."""
    kept = [first]
    while len(kept) < keep:
        gaps = {
            i: min((i // width - k // width) ** 2 + (i % width - k % width) ** 2 for k in kept)
            for i in ids
            if i not in kept
        }
        kept.append(min(i for i in gaps if gaps[i] == max(gaps.values())))
    return kept


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, int], list[int], int, int]:
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    ids = draw(st.sets(st.integers(0, h * w - 1), min_size=1))
    return (h, w), sorted(ids), draw(st.integers(1, len(ids))), draw(st.sampled_from(sorted(ids)))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_equals_the_greedy_selection_written_out(case: tuple[tuple[int, int], list[int], int, int]) -> None:
    grid, ids, keep, first = case
    assert furthest_sample(np.array(ids), grid, keep, first).tolist() == greedy(ids, grid[1], keep, first)


@settings(deadline=None, max_examples=100)
@given(cases(), st.randoms(use_true_random=False))
def test_every_token_kept_is_a_furthest_one_in_whatever_order_they_come(
    case: tuple[tuple[int, int], list[int], int, int], random: random.Random
) -> None:
    (_, width), ids, keep, _ = case
    random.shuffle(ids)
    kept = furthest(np.array(ids), width, keep, 0).tolist()
    assert kept[0] == ids[0]
    for i in range(1, keep):
        gaps = [min((a // width - b // width) ** 2 + (a % width - b % width) ** 2 for b in kept[:i]) for a in ids]
        furthest_ones = [a for a, gap in zip(ids, gaps, strict=True) if gap == max(gaps)]
        assert kept[i] == furthest_ones[0]  # ties: the first in the list


def test_ties_go_to_the_lowest_id() -> None:
    corners = np.array([0, 2, 6, 8])  # of a 3x3 grid: from corner 0, 8 is furthest, then 2 and 6 tie
    assert furthest_sample(corners, (3, 3), 4, 0).tolist() == [0, 8, 2, 6]
    line = np.arange(5)  # from the middle, both ends are two away
    assert furthest_sample(line, (1, 5), 3, 2).tolist() == [2, 0, 4]


def test_forms_of_the_masked_tokens_are_equivalent() -> None:
    mask = np.zeros((4, 4), bool)
    mask.flat[SIX] = True
    expected = furthest_sample(SIX, (4, 4), 4, 5)
    forms = [SIX[::-1].copy(), SIX.astype(np.int32), mask, mask.ravel(), SIX.tolist()]
    for form in forms:
        np.testing.assert_array_equal(furthest_sample(form, (4, 4), 4, 5), expected)
    for tensor in (torch.from_numpy(SIX), torch.from_numpy(mask)):
        kept = furthest_sample(tensor, (4, 4), 4, 5)
        assert isinstance(kept, torch.Tensor)
        assert kept.dtype == torch.int64
        assert kept.tolist() == expected.tolist()
    assert expected.dtype == np.int64


def test_keeping_all_keeps_each_once() -> None:
    assert sorted(furthest_sample(SIX, (4, 4), 6, 10).tolist()) == SIX.tolist()


@pytest.mark.parametrize(
    ("masked", "keep", "first", "message"),
    [
        (SIX, 0, 5, "keep = 0"),
        (SIX, 7, 5, "keep = 7"),
        (SIX, 2, 6, "first = 6"),
        (SIX, 2, 99, "first = 99"),
        (np.array([0, 16]), 1, 0, "outside the grid 4x4"),
        (np.array([-1, 3]), 1, 3, "outside the grid 4x4"),
        (np.array([3, 3]), 1, 3, "twice"),
        (np.ones(15, bool), 1, 3, "does not fit the grid 4x4"),
        (np.array([], np.int64), 1, 0, "keep = 1"),
    ],
)
def test_impossible_requests_are_refused(masked: np.ndarray, keep: int, first: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        furthest_sample(masked, (4, 4), keep, first)


def test_float_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="integers"):
        furthest_sample(np.array([0.5, 1.5]), (4, 4), 1, 0)
