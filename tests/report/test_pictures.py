"""The gallery keeps to its budget; maps and shares of tokens say what the sampler does."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import TINY_MAE, TINY_UM_MAE
from tests.report.conftest import figure
from ummim.recipe import Recipe
from ummim.recipe_file import load_recipe
from ummim.report.masks import token_shares
from ummim.report.pictures import FRAMES, LEAST, WIDTHS, gallery, shaded, spread


def picture_of(uri: str) -> Image.Image:
    match = re.fullmatch(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)", uri)
    assert match is not None
    return Image.open(io.BytesIO(base64.b64decode(match[1])))


@pytest.fixture
def figures(tmp_path: Path) -> list[tuple[int, Path]]:
    """40 figures of 1000 x 250 pixels, which compress badly."""
    rng = np.random.default_rng(0)
    path = tmp_path / "epoch-0001.png"
    Image.fromarray(rng.integers(0, 256, (250, 1000, 3), dtype=np.uint8)).save(path, compress_level=0)
    return [(epoch, path) for epoch in range(1, 41)]


@pytest.mark.parametrize(("budget", "width"), [(10**9, WIDTHS[0]), (400_000, 480)])
def test_a_gallery_keeps_first_and_last_within_its_budget(
    figures: list[tuple[int, Path]], budget: int, width: int
) -> None:
    frames, broken = gallery(figures, budget)
    assert broken == []
    assert sum(len(frame.uri) for frame in frames) <= budget
    assert LEAST <= len(frames) <= FRAMES
    assert (frames[0].epoch, frames[-1].epoch) == (1, 40)
    assert all(frame.size[0] == width and picture_of(frame.uri).size == frame.size for frame in frames)


def test_small_figures_are_not_enlarged_and_broken_ones_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"epoch-000{epoch}.png" for epoch in (1, 2, 3, 4)]
    for path in paths[:3]:
        figure(1).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:500])
    paths[3].write_text("no picture")
    frames, broken = gallery(list(enumerate(paths, start=1)), 10**6)
    assert [(frame.epoch, frame.size) for frame in frames] == [(1, (300, 200)), (3, (300, 200))]
    assert broken == ["epoch-0002.png", "epoch-0004.png"]
    assert gallery([(2, paths[1])], 10**6) == ([], ["epoch-0002.png"])
    assert gallery([], 10**6) == ([], [])


def test_spread_is_even() -> None:
    items = [(i, Path()) for i in range(101)]
    assert [i for i, _ in spread(items, 5)] == [0, 25, 50, 75, 100]
    assert spread(items[:3], 5) == items[:3]


def test_a_map_is_a_pixel_for_a_token_and_stronger_the_larger_the_share() -> None:
    picture = np.asarray(picture_of(shaded(np.array([[0.0, 0.25], [0.5, 1.0]]), (10, 20, 30), full=0.5)))
    assert picture.shape == (2, 2, 4)
    assert picture[..., 3].tolist() == [[0, 128], [255, 255]]
    assert (picture[..., :3] == (10, 20, 30)).all()


def recipe_of(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "tiny.yaml"
    path.write_text(text.replace("SHARDS", "gone"))
    return load_recipe(str(path))


def test_shares_of_a_token_add_up_and_have_the_recipes_means(tmp_path: Path) -> None:
    shares = token_shares(recipe_of(tmp_path, TINY_UM_MAE), plans=200)
    assert list(shares) == ["visible", "secondary", "kept", "thrown"]
    np.testing.assert_allclose(sum(each.share for each in shares.values()), 1)
    means = {part: round(float(each.share.mean()), 6) for part, each in shares.items()}
    assert means == {"visible": 0.1875, "secondary": 0.0625, "kept": 0.25, "thrown": 0.5}
    assert shares["thrown"].deviation == pytest.approx((0.25 / 200) ** 0.5)


def test_a_random_mask_treats_all_tokens_alike(tmp_path: Path) -> None:
    shares = token_shares(recipe_of(tmp_path, TINY_MAE), plans=400)
    assert list(shares) == ["visible", "kept"]
    visible = shares["visible"]
    assert np.abs(visible.share - 0.25).max() < 5 * visible.deviation


def test_shared_masks_are_drawn_anew_for_every_group(tmp_path: Path) -> None:
    shares = token_shares(recipe_of(tmp_path, TINY_MAE + "mask: {shared_by: 4}\n"), plans=100)
    assert shares["visible"].share.min() > 0 and shares["visible"].share.max() < 0.6
