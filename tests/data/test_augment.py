import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from tests.data.pictures import picture
from ummim.data import Augment, DataConfig
from ummim.errors import RecipeError


def test_a_crop_is_a_function_of_image_and_seed_alone() -> None:
    augment = Augment(DataConfig("", image_size=32))
    torch.manual_seed(0)
    first = augment(picture(), 2**63 + 5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = augment(picture(), 2**63 + 5)
    assert torch.equal(before, torch.get_rng_state())
    assert first.dtype == torch.uint8
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, augment(picture(), 6))


def test_the_generator_is_restored_after_an_error() -> None:
    augment = Augment(DataConfig("", image_size=32))
    before = torch.get_rng_state()
    with pytest.raises(TypeError):
        augment("no image", 1)  # type: ignore[arg-type]
    assert torch.equal(before, torch.get_rng_state())


def test_crops_equal_those_of_the_mae_code() -> None:
    """MAE's main_pretrain.py: RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=3), RandomHorizontalFlip()."""
    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(24, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    augment = Augment(DataConfig("", image_size=24))
    for seed in range(20):
        torch.manual_seed(seed)
        assert torch.equal(augment(picture(seed), seed), reference(picture(seed)))


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (24, 24), (24, 200), (9, 11)])
def test_padded_crops_equal_those_written_out(size: tuple[int, int]) -> None:
    """MFF: the shorter side becomes the crop's, 4 pixels are reflected at every edge, and the crop lies anywhere."""
    augment = Augment(DataConfig("", image_size=24, crop="padded", interpolation="bilinear"))
    image = picture(3, size)
    width, height = image.size
    short = min(width, height)
    resized = image.resize((int(24 * width / short), int(24 * height / short)), Image.Resampling.BILINEAR)
    padded = np.pad(np.asarray(resized), ((4, 4), (4, 4), (0, 0)), mode="reflect").transpose(2, 0, 1)
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


def test_a_padded_crop_is_a_function_of_image_and_seed_alone() -> None:
    augment = Augment(DataConfig("", image_size=32, crop="padded"))
    before = torch.get_rng_state()
    first = augment(picture(), 5)
    torch.manual_seed(1)
    assert torch.equal(first, augment(picture(), 5))
    assert not torch.equal(first, augment(picture(), 6))
    torch.set_rng_state(before)
    augment(picture(), 7)
    assert torch.equal(before, torch.get_rng_state())


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
