"""Pixel targets and the loss on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ummim.nn.targets import mean_squared_error, normalise_patches, patchify, pixel_targets, unpatchify


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_unpatchify_inverts_patchify(h: int, w: int, patch: int) -> None:
    images = torch.randn(2, 3, h * patch, w * patch)
    assert unpatchify(patchify(images, patch), (h, w), patch).equal(images)


def test_patches_are_row_major_with_channels_last() -> None:
    images = torch.arange(3 * 4 * 6).view(1, 3, 4, 6)
    tokens = patchify(images, 2)
    assert tokens.shape == (1, 6, 12)
    for token in range(6):
        top, left = 2 * (token // 3), 2 * (token % 3)
        pixels = [images[0, c, top + y, left + x] for y in range(2) for x in range(2) for c in range(3)]
        assert tokens[0, token].equal(torch.stack(pixels))


def test_normalisation_pools_channels_with_unbiased_variance() -> None:
    patch = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, squared deviations 4 + 1 + 0 + 9 = 14
    normal, mean, deviation = normalise_patches(patch)
    assert mean.item() == 3
    assert deviation.item() == pytest.approx((14 / 3 + 1e-6) ** 0.5)
    torch.testing.assert_close(normal * deviation + mean, patch)


def test_normalisation_adds_1e_6_to_the_variance() -> None:
    patch = torch.tensor([0.0, 1e-3, 2e-3, 5e-3], dtype=torch.float64)  # squared deviations 4, 1, 0 and 9, in 1e-6
    variance = 14e-6 / 3
    normal, _, _ = normalise_patches(patch)
    expected = (patch - 2e-3) / (variance + 1e-6) ** 0.5
    torch.testing.assert_close(normal, expected, rtol=1e-12, atol=0)


def test_a_flat_patch_normalises_to_zero() -> None:
    assert normalise_patches(torch.full((1, 1, 12), 0.7, dtype=torch.float64))[0].abs().max() < 1e-9


@pytest.mark.parametrize("norm_pix", [True, False])
def test_targets_are_the_patches_at_the_ids(norm_pix: bool) -> None:
    images = torch.randn(2, 3, 8, 12)
    ids = torch.tensor([[5, 0, 2], [2, 3, 4]])
    target = pixel_targets(images, ids, 4, norm_pix)
    dense = patchify(images, 4)
    dense = normalise_patches(dense)[0] if norm_pix else dense
    torch.testing.assert_close(target, torch.stack([dense[b, ids[b]] for b in range(2)]))


def test_targets_and_loss_are_float32_or_better() -> None:
    ids = torch.tensor([[0, 1]])
    for images, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        target = pixel_targets(torch.randn(1, 3, 8, 8).to(images), ids, 4, True)
        assert target.dtype == expected
        assert mean_squared_error(torch.zeros_like(target, dtype=torch.bfloat16), target).dtype == expected


def test_the_loss_averages_pixels_and_tokens() -> None:
    target = torch.zeros(2, 3, 4)
    prediction = torch.zeros(2, 3, 4)
    prediction[0, 1, 2] = 6.0
    assert mean_squared_error(prediction, target).item() == pytest.approx(36 / 24)
