import random
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from tests.data.pictures import encode, picture
from ummim.data import Augment, DataConfig, decode
from ummim.data.augment import PADDING, draw_crop, resize, trim
from ummim.errors import RecipeError


def levels(view: Tensor, image: Image.Image) -> int:
    """The largest difference of a view's values from an image's."""
    return int(np.abs(view.permute(1, 2, 0).numpy().astype(int) - np.asarray(image)).max())


def in_two_passes(image: Image.Image, size: tuple[int, int], filtering: Image.Resampling) -> Image.Image:
    """Pillow's resize, columns first: it takes the pass first that costs less, which moves what is clipped between."""
    return image.resize((size[0], image.height), filtering).resize(size, filtering)


def test_a_crop_is_a_function_of_image_and_seed_alone() -> None:
    augment = Augment(DataConfig("", image_size=32))
    torch.manual_seed(0)
    random.seed(0)
    first = augment(picture(), 2**63 + 5)
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate()
    again = augment(picture(), 2**63 + 5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert first.dtype == torch.uint8
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(picture(), 6))
    assert not torch.equal(first, augment(picture(), 5))  # all 64 bits of a seed count


def test_places_stay_as_they_are() -> None:
    """Another draw would make another run of the same recipe and seed."""
    assert draw_crop(random.Random(7), 500, 375, (0.2, 1.0), (3 / 4, 4 / 3)) == (17, 33, 265, 324)
    augment = Augment(DataConfig("", image_size=32))
    flipped = [box.left > box.right for box in (augment.located(picture(), seed)[1] for seed in range(8))]
    assert flipped == [False, True, False, False, True, False, True, False]


@pytest.mark.parametrize("size", [(500, 375), (48, 40), (7, 9), (1, 1), (400, 20), (20, 400), (3, 90)])
def test_crops_are_torchvisions_where_it_draws_the_same_numbers(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("RGB", size)
    rng = random.Random()
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_(rng.uniform(low, high)))
    monkeypatch.setattr(
        torch, "randint", lambda low, high, size: torch.tensor([low + int(rng.random() * (high - low))])
    )
    torch.set_default_dtype(torch.float64)  # ours compute in it
    try:
        for seed in range(300):
            rng.seed(seed)
            scale, ratio = ((0.2, 1.0), (3 / 4, 4 / 3)) if seed % 2 else ((0.05, 0.6), (0.5, 1.2))
            top, left, height, width = transforms.RandomResizedCrop.get_params(image, list(scale), list(ratio))
            assert draw_crop(random.Random(seed), *size, scale, ratio) == (left, top, width, height)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("filtering", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(80, 60), (61, 97), (33, 300), (500, 375), (9, 9), (1600, 1000)])
def test_views_are_pillows_crop_and_resize(size: tuple[int, int], filtering: Literal["bicubic", "bilinear"]) -> None:
    """The pixels of the MAE code: crop, resize with antialiasing, flip."""
    augment = Augment(DataConfig("", image_size=56, interpolation=filtering))
    image = picture(1, size)
    for seed in range(15):
        view, box = augment.located(image, seed)
        left, right = sorted((round(box.left * size[0]), round(box.right * size[0])))
        crop = image.crop((left, round(box.top * size[1]), right, round(box.bottom * size[1])))
        expected = in_two_passes(crop, (56, 56), Image.Resampling[filtering.upper()])
        if box.left > box.right:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert levels(view, expected) <= 2  # each pass may round a half the other way
        assert view.permute(1, 2, 0).is_contiguous()  # a batch of this layout copies it as it is


def test_a_box_tells_where_the_pixels_come_from() -> None:
    x, y = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    image, size = Image.fromarray(np.stack([x, y, x], axis=2)), 32
    padded = Augment(DataConfig("", image_size=size, crop="padded"))
    flips = 0
    for seed in range(20):
        for augment, margin in ((Augment(DataConfig("", image_size=size)), 2), (padded, PADDING + 1)):
            view, box = augment.located(image, seed)
            inner = slice(margin, size - margin)
            steps = (np.arange(size) + 0.5) / size  # the pixels' centres
            across = (box.left + steps * (box.right - box.left)) * 256 - 0.5
            down = (box.top + steps * (box.bottom - box.top)) * 256 - 0.5
            assert np.abs(view[0].numpy() - across)[:, inner].max() <= 1.5
            assert np.abs(view[1].numpy() - down[:, None])[inner].max() <= 1.5
            flips += box.left > box.right
    assert 5 < flips < 35


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_and_its_image_have_the_same_views(kind: str) -> None:
    data = encode(picture(size=(120, 90)), kind)
    for config in (DataConfig("", image_size=32), DataConfig("", image_size=32, crop="padded")):
        augment = Augment(config)
        for seed in range(5):
            view, box = augment.located_view(data, seed)
            assert torch.equal(view, augment(decode(data), seed))
            assert torch.equal(view, augment.view(data, seed))
            assert box == augment.located(decode(data), seed)[1]


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (24, 24), (24, 200), (9, 11)])
def test_padded_crops_equal_those_written_out(size: tuple[int, int]) -> None:
    """MFF: the shorter side becomes the crop's, 4 pixels are reflected at every edge, and the crop lies anywhere."""
    augment = Augment(DataConfig("", image_size=24, crop="padded", interpolation="bilinear"))
    image = picture(3, size)
    width, height = image.size
    short = min(width, height)
    to = int(24 * width / short), int(24 * height / short)
    resized = resize(np.array(image), to[::-1], "bilinear")
    assert levels(resized, in_two_passes(image, to, Image.Resampling.BILINEAR)) <= 2
    padded = np.pad(resized.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (24, 24), axis=(1, 2))  # (3, rows, columns, 24, 24)
    places = set()
    for seed in range(40):
        crop = augment(image, seed).numpy()
        assert crop.shape == (3, 24, 24)
        found = [
            tuple(place)
            for view in (crop, crop[:, :, ::-1])
            for place in np.argwhere((windows == view[:, None, None]).all((0, 3, 4))).tolist()
        ]
        assert found
        places.add(found[0])
    assert len(places) > 20
    across = 0 if height <= width else 1  # the axis of the shorter side
    assert {place[across] for place in places} == set(range(9))  # up to both edges


def test_flips_come_as_often_as_asked() -> None:
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2))
    for hflip, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        augment = Augment(DataConfig("", image_size=16, hflip=hflip))
        flipped = sum(int(augment(ramp, seed)[0, 0, 0] > augment(ramp, seed)[0, 0, -1]) for seed in range(200))
        assert low <= flipped <= high


def test_the_centre_view_takes_the_whole_short_side() -> None:
    centre = Augment(DataConfig("", image_size=20)).centre
    image = Image.new("RGB", (80, 40), "red")
    image.paste((0, 0, 255), (20, 0, 60, 40))
    found = centre(image)
    assert found.shape == (3, 20, 20)
    assert found[2, :, 2:-2].min() > 250
    assert centre(picture(size=(7, 90))).shape == (3, 20, 20)  # enlarged where it must be


@pytest.mark.parametrize("size", [(1, 6000), (6000, 1)])
def test_a_line_of_pixels_is_trimmed_before_it_is_enlarged(size: tuple[int, int]) -> None:
    assert trim(picture(size=size)).size in ((1, 32), (32, 1))
    assert Augment(DataConfig("", image_size=64)).centre(picture(size=size)).shape == (3, 64, 64)
    assert trim(whole := picture(size=(3, 96))) is whole


@pytest.mark.parametrize(
    "field",
    [
        {"workers": -1},
        {"image_size": 0},
        {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.5, 1.5)},
        {"crop_ratio": (2.0, 1.0)},
        {"hflip": 1.5},
        {"streams": 0},
        {"window": 0},
    ],
)
def test_impossible_values_are_refused_by_their_key(field: dict) -> None:
    with pytest.raises(RecipeError) as caught:
        DataConfig("x", **field).validate()
    assert caught.value.key == f"data.{next(iter(field))}"
