"""Attention maps follow their image through crop and flip, and decide its mask."""

import pickle
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from tests.data.pictures import picture
from ummim.data import Augment, Box, DataConfig, ShardIndex
from ummim.data.attention import AttentionMaps, view_weights
from ummim.data.order import Pick
from ummim.data.samples import Samples
from ummim.masking import AttentionMaskConfig, AttentionSampler, MaskConfig, PlanSampler, sample_seed

WHOLE = Box(0.0, 0.0, 1.0, 1.0)


def random_map(seed: int = 0, side: int = 14) -> np.ndarray:
    return np.random.default_rng(seed).random((side, side)).astype(np.float16)


def per_token(pixels: Tensor, tokens: int) -> np.ndarray:
    """(1, S, S) -> (tokens, tokens) means."""
    return F.adaptive_avg_pool2d(pixels[None].double(), tokens)[0, 0].numpy()


def test_weights_are_the_maps_own_when_it_goes_through_the_same_transforms() -> None:
    """The plain way: resize the map to the image, and crop and flip both."""
    for seed in range(30):
        image, attention = picture(seed, (180, 140)), random_map(seed, 7)
        large = F.interpolate(torch.from_numpy(attention).float()[None, None], (140, 180), mode="bilinear")[0]
        _, box = Augment(DataConfig("", image_size=112, interpolation="bilinear")).located(image, seed)
        top, bottom = round(box.top * 140), round(box.bottom * 140)
        left, right = sorted((round(box.left * 180), round(box.right * 180)))
        cropped = v2.functional.resized_crop(large, top, left, bottom - top, right - left, [112, 112])
        if box.left > box.right:
            cropped = cropped.flip(-1)
        weights = view_weights(attention, box, (7, 7), 112)
        expected = per_token(cropped, 7)
        # Not closer: torchvision crops first, so it resizes nothing from beyond the crop's edge, and samples anew.
        assert weights == pytest.approx(expected, abs=0.02)
        inner = (slice(1, -1), slice(1, -1))
        assert weights[inner] == pytest.approx(expected[inner], abs=0.006)


def test_weights_lie_where_the_object_is_in_the_view() -> None:
    """A white disc on black, and a map that is its own brightness: weights and view agree in every crop."""
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    disc = ((x - 220) ** 2 + (y - 60) ** 2 < 50**2).astype(np.float32)
    image = Image.fromarray((255 * disc).astype(np.uint8)).convert("RGB")
    attention = per_token(torch.from_numpy(disc)[None], 14).astype(np.float16)
    augment, compared = Augment(DataConfig("", image_size=224)), 0
    for seed in range(60):
        view, box = augment.located(image, seed)
        bright = per_token(view[:1] / 255, 14)
        if 0.05 < bright.mean() < 0.95:
            found = np.corrcoef(view_weights(attention, box, (14, 14), 224).ravel(), bright.ravel())[0, 1]
            assert found > 0.95
            compared += 1
    assert compared > 25


def test_the_whole_image_gets_bilinear_weights_and_a_flip_mirrors_them() -> None:
    attention = random_map()
    large = F.interpolate(torch.from_numpy(attention).double()[None, None], 224, mode="bilinear")[0]
    weights = view_weights(attention, WHOLE, (14, 14), 224)
    assert weights == pytest.approx(per_token(large, 14), abs=1e-12)
    assert view_weights(attention, Box(1.0, 0.0, 0.0, 1.0), (14, 14), 224) == pytest.approx(weights[:, ::-1], abs=1e-12)


def test_grids_and_maps_may_differ_in_size_and_boxes_reach_beyond_the_image() -> None:
    assert view_weights(np.full((14, 14), 0.5), Box(-0.1, -0.2, 1.1, 1.3), (7, 7), 56) == pytest.approx(0.5)
    assert view_weights(np.full((1, 1), 2.0), WHOLE, (4, 4), 32) == pytest.approx(2.0)
    assert (view_weights(random_map(), Box(0.2, 0.1, 0.9, 0.4), (14, 14), 224) >= 0).all()


@pytest.mark.parametrize(
    ("box", "rows", "cols"),
    [
        (Box(0.3, 0.4, 0.9, 0.8), 2, 2),
        (Box(0.9, 0.4, 0.3, 0.8), 2, 2),  # flipped
        (Box(0.3, 0.4, 1.0, 1.0 - 1e-8), 3, 3),
        (Box(0.0, 0.0, 0.5, 1.0), 3, 2),
        (Box(1.0, 0.0, 0.2, 0.7), 2, 3),
    ],
)
def test_the_legacy_crop_takes_the_top_left_cells_wherever_the_view_lies(
    box: Box, rows: int, cols: int, tmp_path: Path
) -> None:
    """Official: map[0 : (top + height) // image height + 2], and so for columns, resized to the view (Q-A1)."""
    np.save(tmp_path / "maps.npy", random_map()[None])
    sampler = AttentionSampler((14, 14), AttentionMaskConfig())
    legacy, mended = (AttentionMaps(tmp_path / "maps.npy", sampler, 224, flag) for flag in (True, False))
    block = torch.from_numpy(random_map()[:rows, :cols]).double()[None, None]
    weights = per_token(F.interpolate(block, 224, mode="bilinear")[0], 14)
    weights = weights[:, ::-1] if box.left > box.right else weights
    for seed in range(3):
        expected = sampler(seed, np.ascontiguousarray(weights))
        assert np.array_equal(legacy.plan(0, box, seed).kept, expected.kept)
        assert not np.array_equal(mended.plan(0, box, seed).kept, expected.kept)


@pytest.fixture
def index(folder: Path) -> ShardIndex:
    return ShardIndex.open(folder)


@pytest.fixture
def maps(index: ShardIndex, tmp_path: Path) -> AttentionMaps:
    np.save(tmp_path / "maps.npy", np.stack([random_map(row, 6) for row in range(len(index))]))
    return AttentionMaps(tmp_path / "maps.npy", AttentionSampler((6, 6), AttentionMaskConfig()), 48)


def test_masks_of_a_batch_follow_each_rows_own_map(index: ShardIndex, maps: AttentionMaps) -> None:
    data = DataConfig("", image_size=48)
    plain = Samples(index, data, PlanSampler((6, 6), MaskConfig()), 9)
    driven = Samples(index, data, PlanSampler((6, 6), MaskConfig()), 9, attention=maps)
    picks = [Pick(epoch, row, 0) for epoch in (5, 6) for row in (3, 0, 7, 7)]
    with closing(plain.reader), closing(driven.reader):
        expected, found = plain.batch(picks), driven.batch(picks)
        for i, (epoch, row, _) in enumerate(picks):
            seed = sample_seed(9, epoch, index.key(row))
            _, box = driven.augment.located_view(driven.reader.read(row), seed)
            assert found.plan.kept[i].tolist() == maps.plan(row, box, seed).kept.tolist()
    assert torch.equal(found.images, expected.images)
    assert found.keys == expected.keys
    assert (found.plan.kept.shape, found.plan.thrown.shape) == ((8, 16), (8, 14))
    assert torch.equal(found.plan.kept[2], found.plan.kept[3])  # the same pick
    assert not torch.equal(found.plan.kept[2], found.plan.kept[6])  # another epoch


def test_maps_travel_to_spawned_workers_by_name(maps: AttentionMaps) -> None:
    there = pickle.dumps(maps)
    assert len(there) < 2000
    again = pickle.loads(there)  # noqa: S301 (our own)
    assert np.array_equal(again.maps, maps.maps)
    assert np.array_equal(again.plan(2, WHOLE, 1).kept, maps.plan(2, WHOLE, 1).kept)
