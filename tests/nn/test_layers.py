"""Position tables, gathers of patches, and initialisation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ummim.nn.layers import PatchConv, every_token, init_mae, sincos_table, take, take_patches


def test_the_table_has_the_columns_in_its_first_half() -> None:
    """The official code's values, D = 768."""
    table = sincos_table(768, (14, 14), cls_token=True)
    assert table.shape == (1, 197, 768)
    assert table.dtype == torch.float32
    expected = torch.tensor([0.84147, 0.81525, 0.78859])
    right, below = table[0, 1 + 1], table[0, 1 + 14]  # (row 0, col 1) and (row 1, col 0)
    torch.testing.assert_close(right[:3], expected, atol=5e-6, rtol=0)
    assert right[384:387].tolist() == [0, 0, 0]
    assert below[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(below[384:387], expected, atol=5e-6, rtol=0)
    assert table[0, 0].eq(0).all()  # class token
    assert sincos_table(768, (14, 14)).equal(table[:, 1:])


def test_each_quarter_of_the_table_is_its_formula_on_oblong_grids() -> None:
    table = sincos_table(16, (3, 5)).view(3, 5, 4, 4)
    for row in range(3):
        for col in range(5):
            for i in range(4):
                omega = 10000 ** (-i / 4)
                at = torch.tensor([col * omega, row * omega], dtype=torch.float64)
                expected = torch.stack([at[0].sin(), at[0].cos(), at[1].sin(), at[1].cos()]).float()
                torch.testing.assert_close(table[row, col, :, i], expected)


def test_a_width_that_four_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 4, not 18"):
        sincos_table(18, (4, 4))


def test_taken_patches_are_the_images_own() -> None:
    images = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    ids = torch.tensor([[5, 0], [2, 3]])  # of a 2x3 grid of 4x4 patches
    patches = take_patches(images, ids, 4)
    for b in range(2):
        for j, i in enumerate(ids[b].tolist()):
            top, left = 4 * (i // 3), 4 * (i % 3)
            assert patches[b, j].equal(images[b, :, top : top + 4, left : left + 4])


def test_taken_tokens_are_each_samples_own() -> None:
    tokens = torch.randn(2, 5, 3)
    ids = torch.tensor([[4, 0], [1, 1]])
    assert take(tokens, ids).equal(torch.stack([tokens[0, [4, 0]], tokens[1, [1, 1]]]))
    assert take(tokens, every_token(2, 5, tokens.device)).equal(tokens)


def test_a_patch_convolution_equals_the_convolution() -> None:
    conv = PatchConv(4, 6)
    images = torch.randn(2, 3, 8, 8)
    patches = take_patches(images, every_token(2, 4, images.device), 4)
    expected = F.conv2d(images, conv.weight, conv.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(conv(patches.flatten(2)), expected)
    assert conv.weight.shape == (6, 3, 4, 4)


def test_initialisation_is_maes() -> None:
    torch.manual_seed(0)
    linear, norm, conv = nn.Linear(200, 600), nn.LayerNorm(4), PatchConv(16, 200)
    nn.init.constant_(norm.weight, 3)
    nn.init.constant_(norm.bias, 3)
    for module in (linear, norm):
        init_mae(module)
    bound = (6 / 800) ** 0.5  # xavier-uniform: sqrt(6 / (fan_in + fan_out)), one matrix for q, k and v
    assert 0.99 * bound < linear.weight.abs().max() <= bound
    assert linear.bias.eq(0).all()
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()
    bound = (6 / (768 + 200)) ** 0.5
    assert 0.99 * bound < conv.weight.abs().max() <= bound
    assert conv.bias is not None
    assert 0 < conv.bias.abs().max() <= 768**-0.5  # the convolution's default
