"""Views and batches of labelled images."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from tests.data.pictures import encode, picture
from ummim.data import ShardIndex
from ummim.data.augment_labelled import LabelledAugment, seeded
from ummim.data.config import LabelledDataConfig
from ummim.data.labelled import LabelledBatch, build_eval_loader, build_labelled_loader, check_labels
from ummim.errors import DataError, RecipeError

RICH = LabelledDataConfig("", image_size=32, randaugment="rand-m9-mstd0.5-inc1", erasing=0.5, workers=0)
PICTURE = encode(picture(), "PNG")


def test_a_training_view_follows_from_image_and_seed_alone() -> None:
    augment = LabelledAugment(RICH)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    views = [augment.train_view(PICTURE, seed) for seed in range(40)]
    before = random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    again = [augment.train_view(PICTURE, seed) for seed in reversed(range(40))][::-1]
    assert all(torch.equal(view, other) for view, other in zip(views, again, strict=True))
    assert len({view.numpy().tobytes() for view in views}) == 40
    assert {(view.dtype, tuple(view.shape)) for view in views} == {(torch.uint8, (3, 32, 32))}
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert random.getstate() == before[0]  # as if nothing had been drawn
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_generators_go_on_after_an_error_as_if_nothing_was_drawn() -> None:
    random.seed(3)
    expected = random.Random(3).random()
    with pytest.raises(KeyError), seeded("x"):
        random.random()
        raise KeyError
    assert random.random() == expected


def test_erasing_puts_noise_into_a_rectangle_and_leaves_the_rest() -> None:
    plain = LabelledAugment(LabelledDataConfig("", image_size=64))
    erasing = LabelledAugment(LabelledDataConfig("", image_size=64, erasing=1.0))
    flat = encode(Image.new("RGB", (80, 80), (120, 120, 120)), "PNG")
    view, other = plain.train_view(flat, 5), erasing.train_view(flat, 5)
    changed = (view != other).any(0)
    rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
    box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert box.float().mean() > 0.98
    assert 0.02 * 64 * 64 * 0.8 < box.numel() < 64 * 64 / 3 * 1.2
    assert other[:, changed].float().std() > 40  # of noise with ImageNet's deviation, about 57 levels


def test_a_posterisation_to_no_bits_is_black() -> None:
    """timm asks for 0 bits at the highest magnitude, which Pillow refuses; it must not pass for a bad image."""
    strongest = LabelledDataConfig("", image_size=32, randaugment="rand-m10-n8-p1-inc1")
    augment = LabelledAugment(strongest)
    for seed in range(30):
        augment.train_view(PICTURE, seed)
    with pytest.raises(ValueError, match="not an image"):
        augment.train_view(b"no image", 0)


@pytest.mark.parametrize(
    ("size", "resize", "side"), [(224, None, 256), (192, None, 219), (256, None, 256), (256, 292, 292)]
)
def test_the_evaluation_view_is_the_papers(size: int, resize: int | None, side: int) -> None:
    config = LabelledDataConfig("", image_size=size, eval_resize=resize)
    assert config.eval_side == side
    image = picture()
    official = transforms.Compose([transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
                                   transforms.CenterCrop(size), transforms.PILToTensor()])  # fmt: skip
    assert torch.equal(LabelledAugment(config).eval_view(encode(image, "PNG")), official(image))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"randaugment": "rand-m9-mstd0.5-inc1-x3"}, "randaugment"),
        ({"randaugment": "augmix-m5"}, "randaugment"),
        ({"erasing": 1.5}, "erasing"),
        ({"color_jitter": -0.1}, "color_jitter"),
        ({"eval_resize": 200}, "eval_resize"),
    ],
)
def test_impossible_values_are_refused(values: dict, key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        LabelledDataConfig("", **values).validate()
    assert caught.value.key == f"data.{key}"


def test_a_global_batch_is_the_same_however_it_is_cut(folder: Path, arithmetic: Callable[..., SimpleNamespace]) -> None:
    index = ShardIndex.open(folder)

    def images(accumulation: int, world: int, micro: int) -> dict[str, bytes]:
        found = {}
        plan = arithmetic(accumulation, world, micro, stop=2)
        for rank in range(world):
            batches = list(build_labelled_loader(index, RICH, 7, plan, rank, world))
            assert len(batches) == 2 * accumulation
            for number, batch in enumerate(batches):
                assert isinstance(batch, LabelledBatch)
                assert batch.mixing == f"7 mixing 0 {number // accumulation}"
                for key, image, label in zip(batch.keys, batch.images, batch.labels.tolist(), strict=True):
                    assert index.classes is not None
                    assert key.startswith(index.classes[label])
                    found[key] = image.numpy().tobytes()
        return found

    whole = images(1, 1, 8)
    assert len(whole) == 16
    assert images(2, 2, 2) == images(1, 4, 2) == whole


def test_an_evaluations_batches_are_the_same_for_any_number_of_ranks(folder: Path) -> None:
    index = ShardIndex.open(folder)

    def batches(world: int) -> dict[int, list[str]]:
        loaders = [build_eval_loader(index, RICH, 4, rank, world) for rank in range(world)]
        return {n * world + rank: batch.keys for rank in range(world) for n, batch in enumerate(loaders[rank])}

    one = batches(1)
    assert [key for keys in one.values() for key in keys][:26] == [index.key(row) for row in range(26)]
    assert one[6][2:] == [index.key(25)] * 2  # filled up
    three = batches(3)
    assert {number: three[number] for number in one} == one
    assert set(three[7]) == {index.key(25)}


def test_a_batch_is_saved_with_its_keys(tmp_path: Path) -> None:
    from safetensors import safe_open

    batch = LabelledBatch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, 0]), ["a", "b"], "7 mixing 0 1")
    batch.save(tmp_path / "x" / "batch.safetensors", {"step": 3})
    with safe_open(tmp_path / "x" / "batch.safetensors", "pt") as file:
        assert file.metadata() == {"step": "3", "keys": '["a", "b"]', "mixing": '"7 mixing 0 1"'}
        assert file.get_tensor("labels").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 4], "labels up to 4: set classify.classes=5"), ([0, -1], "images without a label"), ([], "holds no images")],
)
def test_labels_that_do_not_fit_are_one_message(labels: list[int], message: str) -> None:
    index: ShardIndex = SimpleNamespace(table={"label": np.array(labels)}, place="here")  # type: ignore[assignment]
    with pytest.raises(DataError, match=message):
        check_labels(index, 4, "data.shards")
